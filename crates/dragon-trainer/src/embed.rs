//! Folders of audio to embeddings and reference statistics.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use dragon_audio::Clip;
use dragon_encoders::{AudioEncoder, Embeddings, Setting};
use dragon_metrics::files::write_embeddings;
use dragon_metrics::{Moments, Rows};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::run::{Meter, RunContext, write_atomic};

/// Files decoded and embedded at a time; the audio of more is never held in memory.
const BATCH: usize = 32;

/// The embeddings of one song.
#[derive(Debug, Clone)]
pub struct SongEmbeddings {
    /// The audio file.
    pub path: PathBuf,
    /// Its rows `[n, D]`.
    pub rows: Rows,
}

/// A file that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// What happens to a file that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBad {
    /// It ends the command, which names it.
    Refuse,
    /// It is left out and listed.
    Skip,
}

/// The audio files of a folder and its subfolders, by ending, sorted by path; or the one file itself.
///
/// # Errors
/// If the path does not exist, a folder cannot be read, no file is found, or one is seen to be unusable without
/// decoding it (empty, mislabelled, truncated; see [`dragon_audio::check`]).
pub fn audio_files(path: &Path) -> Result<Vec<PathBuf>> {
    Ok(usable_files(path, OnBad::Refuse)?.0)
}

/// [`audio_files`], and those among them that are seen to be unusable, if they are to be skipped.
///
/// # Errors
/// As [`audio_files`], and if no file is left.
pub fn usable_files(path: &Path, on_bad: OnBad) -> Result<(Vec<PathBuf>, Vec<Skipped>)> {
    let (mut usable, mut skipped) = (Vec::new(), Vec::new());
    for file in find_files(path)? {
        match dragon_audio::check(&file).map_err(Error::input("cannot use a file")) {
            Ok(()) => usable.push(file),
            Err(err) => skip(&file, err, on_bad, &mut skipped)?,
        }
    }
    some_left(usable.len(), path, &skipped)?;
    Ok((usable, skipped))
}

/// Notes a file that cannot be used, or gives its error back if that is to end the command.
pub(crate) fn skip(file: &Path, err: Error, on_bad: OnBad, skipped: &mut Vec<Skipped>) -> Result<()> {
    if on_bad == OnBad::Refuse || err.exit_code() != 1 {
        return Err(err);
    }
    let text = err.to_string();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("hint:"));
    // The first line says what was being done; what is wrong comes after.
    let cause: Vec<&str> =
        lines.skip(usize::from(matches!(err, Error::Input { .. }))).map(str::trim).collect();
    let reason = cause.join("; ");
    let name = file.display().to_string();
    if reason.contains(&name) {
        tracing::warn!("left out: {reason}");
    } else {
        tracing::warn!("left out: `{name}`: {reason}");
    }
    skipped.push(Skipped { file: file.to_owned(), reason });
    Ok(())
}

/// # Errors
/// If all files were left out.
pub(crate) fn some_left(n: usize, path: &Path, skipped: &[Skipped]) -> Result<()> {
    match (n, skipped.first()) {
        (0, Some(first)) => Err(Error::Data {
            problem: format!(
                "none of the {} files of `{}` can be used; the first: {}",
                skipped.len(),
                path.display(),
                first.reason
            ),
            hint: "mend the files, or name another folder".into(),
        }),
        _ => Ok(()),
    }
}

/// Whether a name ends as those of audio files do.
pub fn is_audio(path: &Path) -> bool {
    let ending = path.extension().and_then(|e| e.to_str()).map(str::to_lowercase);
    ending.is_some_and(|e| dragon_audio::ENDINGS.contains(&e.as_str()))
}

/// The lines of a text file, without blanks at their ends.
///
/// # Errors
/// If the file cannot be read, holds nothing, or a line is empty; the message has its number.
pub fn read_texts(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let refuse = |problem: String| {
        let hint = "it is a text file with one text a line".into();
        Err(Error::Content { path: path.to_owned(), problem, hint })
    };
    let lines: Vec<String> = text.lines().map(|line| line.trim().to_owned()).collect();
    if let Some(i) = lines.iter().position(String::is_empty) {
        return refuse(format!("line {}: expected words, found nothing", i + 1));
    }
    if lines.is_empty() {
        return refuse("is empty: expected one text a line, found 0 lines".into());
    }
    Ok(lines)
}

/// The audio files of a folder and its subfolders, or the one file, not looked at.
pub(crate) fn find_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = BTreeSet::new();
    let mut open = vec![path.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
            let path = entry.map_err(Error::io("read", &dir))?.path();
            if path.is_dir() {
                open.push(path);
            } else if is_audio(&path) {
                found.insert(path);
            }
        }
    }
    if found.is_empty() {
        return Err(Error::Data {
            problem: format!("the folder `{}` holds no audio", path.display()),
            hint: format!("files ending in {} count as audio", dragon_audio::ENDINGS.join(", ")),
        });
    }
    Ok(found.into_iter().collect())
}

/// Embeds audio files by `one`, several at a time, in their order.
///
/// # Errors
/// If a file cannot be read or embedded; the message names the first one in order.
pub fn embed_files(
    one: impl Fn(&Path) -> Result<Rows> + Sync,
    files: &[PathBuf],
    ctx: &RunContext,
) -> Result<Vec<SongEmbeddings>> {
    Ok(embed_songs(one, files, OnBad::Refuse, ctx)?.0)
}

/// [`embed_files`], and the files left out, if bad ones are to be skipped.
///
/// # Errors
/// As [`embed_files`], and if no file is left.
pub fn embed_songs(
    one: impl Fn(&Path) -> Result<Rows> + Sync,
    files: &[PathBuf],
    on_bad: OnBad,
    ctx: &RunContext,
) -> Result<(Vec<SongEmbeddings>, Vec<Skipped>)> {
    let (mut songs, mut skipped) = (Vec::with_capacity(files.len()), Vec::new());
    embed_each(one, files, ctx, |path, rows| match rows {
        Ok(rows) => {
            songs.push(SongEmbeddings { path: path.to_owned(), rows });
            Ok(())
        }
        Err(err) => skip(path, err, on_bad, &mut skipped),
    })?;
    some_left(songs.len(), folder_of(files), &skipped)?;
    Ok((songs, skipped))
}

fn folder_of(files: &[PathBuf]) -> &Path {
    files.first().and_then(|file| file.parent()).unwrap_or(Path::new("."))
}

/// Embeds audio files by `one`, several at a time, and gives each result to `take`, in the order of the files; no more
/// than a few are held at once.
///
/// # Errors
/// The first of `take`; or if `ctx.stop` was set.
pub fn embed_each(
    one: impl Fn(&Path) -> Result<Rows> + Sync,
    files: &[PathBuf],
    ctx: &RunContext,
    mut take: impl FnMut(&Path, Result<Rows>) -> Result<()>,
) -> Result<()> {
    let mut meter = Meter::new(ctx.progress, files.len(), 0, 1.0, "songs");
    let mut n_done = 0;
    for batch in files.chunks(BATCH) {
        if ctx.stopped() {
            return Err(Error::Data {
                problem: format!("stopped after {n_done} of {} songs", files.len()),
                hint: "nothing was written; start the command again".into(),
            });
        }
        let done: Vec<Result<Rows>> = batch.par_iter().map(|path| one(path)).collect();
        for (path, rows) in batch.iter().zip(done) {
            take(path, rows)?;
        }
        n_done += batch.len();
        meter.update(n_done, &[], &[], n_done == files.len());
    }
    meter.finish();
    Ok(())
}

/// Mean and scatter of all rows of audio files in one pass, whose memory does not grow with their number; and the files
/// left out.
///
/// # Errors
/// If a file cannot be used and is not to be skipped, or none is left.
pub fn moments_of(
    one: impl Fn(&Path) -> Result<Rows> + Sync,
    files: &[PathBuf],
    on_bad: OnBad,
    ctx: &RunContext,
) -> Result<(Moments, Vec<Skipped>)> {
    let (mut moments, mut skipped): (Option<Moments>, _) = (None, Vec::new());
    embed_each(one, files, ctx, |path, rows| {
        let rows = match rows {
            Ok(rows) => rows,
            Err(err) => return skip(path, err, on_bad, &mut skipped),
        };
        let moments = moments.get_or_insert_with(|| Moments::new(rows.dim()));
        moments.push(&rows).map_err(Error::input(format!("cannot use `{}`", path.display())))
    })?;
    some_left(usize::from(moments.is_some()), folder_of(files), &skipped)?;
    let moments = moments.ok_or_else(|| Error::Bug("no audio files".into()))?;
    Ok((moments, skipped))
}

/// The embeddings of a file: mixed to mono and resampled to the encoder's rate, then cut by the setting.
///
/// # Errors
/// If the file cannot be read or embedded.
pub fn embed_file(encoder: &dyn AudioEncoder, setting: &Setting, path: &Path) -> Result<Rows> {
    let clip = read_song(path, encoder.sample_rate_hz(), encoder.window_samples().div_ceil(10))?;
    let context = || format!("cannot embed `{}`", path.display());
    let embeddings = encoder.embed_clip(&clip.samples, setting).map_err(Error::input(context()))?;
    rows(&embeddings).map_err(Error::input(context()))
}

/// Reads a song that is to be embedded, mixed to mono. A file must hold something to hear: one silent file among the
/// exemplars would bend their statistics unnoticed. (A generation may be silent; it is scored as it is.)
///
/// # Errors
/// If the file cannot be read, is silent, or has fewer than `least` samples at `sample_rate_hz`.
pub fn read_song(path: &Path, sample_rate_hz: u32, least: usize) -> Result<Clip> {
    let read = || -> dragon_audio::Result<Clip> {
        let clip = dragon_audio::read_mono(path, sample_rate_hz)?;
        if clip.samples.len() < least {
            return Err(dragon_audio::Error::TooShort {
                path: path.to_owned(),
                expected_s: least as f64 / f64::from(sample_rate_hz),
                found_s: clip.duration_s(),
            });
        }
        clip.check_sound(path)?;
        Ok(clip)
    };
    read().map_err(Error::input("cannot use a file"))
}

/// Embeddings as the metrics take them.
///
/// # Errors
/// If a value is not finite.
pub fn rows(embeddings: &Embeddings) -> std::result::Result<Rows, dragon_metrics::Error> {
    Rows::from_f32(embeddings.n, embeddings.dim, &embeddings.data)
}

/// Writes all rows to `path` (`.npy`, `.npz`, `.safetensors`; array `embeddings` `[N, D]`), and beside it
/// `path.songs.tsv`: first row, number of rows and file of each song.
///
/// # Errors
/// If the ending is another or a file cannot be written.
pub fn save_embeddings(path: &Path, songs: &[SongEmbeddings]) -> Result<()> {
    let all = concat(songs)?;
    write_embeddings(path, "embeddings", &all).map_err(Error::input("cannot save embeddings"))?;
    let mut index = String::from("first_row\trows\tfile\n");
    let mut first = 0;
    for song in songs {
        let _ = writeln!(index, "{first}\t{}\t{}", song.rows.n(), song.path.display());
        first += song.rows.n();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".songs.tsv");
    write_atomic(Path::new(&name), index.as_bytes())
}

fn concat(songs: &[SongEmbeddings]) -> Result<Rows> {
    let all: Vec<&Rows> = songs.iter().map(|song| &song.rows).collect();
    Rows::concat(&all).map_err(Error::input("cannot put embeddings together"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Embeds a window as its mean magnitude and its first sample.
    struct Toy;

    impl AudioEncoder for Toy {
        fn id(&self) -> &str {
            "toy"
        }
        fn sample_rate_hz(&self) -> u32 {
            8000
        }
        fn window_samples(&self) -> usize {
            4000
        }
        fn dim(&self) -> usize {
            2
        }
        fn embed_windows(&self, windows: &[&[f32]]) -> dragon_encoders::Result<Vec<Vec<f32>>> {
            Ok(windows
                .iter()
                .map(|w| vec![w.iter().map(|x| x.abs()).sum::<f32>() / w.len() as f32, w[0]])
                .collect())
        }
    }

    fn toy(file: &Path) -> Result<Rows> {
        embed_file(&Toy, &Setting::MA, file)
    }

    fn tone(path: &Path, seconds: f32) {
        let samples: Vec<f32> =
            (0..(8000.0 * seconds) as usize).map(|i| (i as f32 * 0.1).sin() * 0.5).collect();
        let clip = dragon_audio::Clip { samples, sample_rate_hz: 8000 };
        dragon_audio::write_wav(path, &clip, dragon_audio::SampleFormat::Int16).unwrap();
    }

    #[test]
    fn a_folder_is_embedded_in_the_order_of_its_names() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        for (name, seconds) in [("b/2.wav", 1.0), ("a.wav", 2.0)] {
            tone(&dir.path().join(name), seconds);
        }
        std::fs::write(dir.path().join("notes.txt"), "x").unwrap();
        let files = audio_files(dir.path()).unwrap();
        assert!(files[0].ends_with("a.wav") && files[1].ends_with("b/2.wav") && files.len() == 2);
        let songs = embed_files(toy, &files, &RunContext::new(dir.path())).unwrap();
        assert_eq!(songs[0].rows.n(), 9);

        let out = dir.path().join("e.npz");
        save_embeddings(&out, &songs).unwrap();
        let read = dragon_metrics::files::read_embeddings(&out, None).unwrap();
        assert_eq!((read.n(), read.dim()), (18, 2));
        let index = std::fs::read_to_string(dir.path().join("e.npz.songs.tsv")).unwrap();
        assert!(index.lines().nth(2).unwrap().starts_with("9\t9\t"), "{index}");
        let ctx = RunContext::new(dir.path());
        let (moments, skipped) = moments_of(toy, &files, OnBad::Refuse, &ctx).unwrap();
        assert!(skipped.is_empty());
        let (streamed, whole) =
            (moments.stats().unwrap(), dragon_metrics::GaussianStats::fit(&read).unwrap());
        assert_eq!(streamed.n(), Some(18));
        for (a, b) in streamed.cov().iter().zip(whole.cov()) {
            assert!((a - b).abs() < 1e-12, "{a} and {b}");
        }
    }

    #[test]
    fn a_folder_without_audio_and_a_bad_file_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let err = audio_files(dir.path()).unwrap_err().to_string();
        assert!(err.contains("holds no audio"), "{err}");
        assert!(audio_files(&dir.path().join("missing")).is_err());

        let silent = dir.path().join("silent.wav");
        let clip = Clip { samples: vec![0.0; 8000], sample_rate_hz: 8000 };
        dragon_audio::write_wav(&silent, &clip, dragon_audio::SampleFormat::Int16).unwrap();
        let short = dir.path().join("short.wav");
        tone(&short, 0.04);
        for (path, part) in [
            (silent, "silent.wav` is silent: expected a level above -80 dBFS"),
            (short, "short.wav` is too short: expected at least 0.05 s, found 0.04 s"),
        ] {
            let err = embed_files(toy, &[path], &RunContext::new(dir.path())).unwrap_err();
            assert!(err.to_string().contains(part), "{err}");
        }
        let path = dir.path().join("broken.wav");
        std::fs::write(&path, "not audio").unwrap();
        let err = embed_files(toy, &[path], &RunContext::new(dir.path())).unwrap_err();
        assert!(err.to_string().contains("broken.wav"), "{err}");
        assert_eq!(err.exit_code(), 1);
        let err = audio_files(dir.path()).unwrap_err().to_string();
        assert!(err.contains("broken.wav` is mislabelled"), "{err}");
    }

    #[test]
    fn bad_files_are_skipped_if_that_is_asked_for_and_listed_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let ctx = RunContext::new(dir.path());
        std::fs::write(dir.path().join("broken.wav"), "not audio").unwrap();
        let err = usable_files(dir.path(), OnBad::Skip).unwrap_err().to_string();
        assert!(err.contains("none of the 1 files") && err.contains("is mislabelled"), "{err}");
        tone(&dir.path().join("short.wav"), 0.04);
        tone(&dir.path().join("good.wav"), 2.0);
        let (files, seen) = usable_files(dir.path(), OnBad::Skip).unwrap();
        assert!(files.len() == 2 && seen.len() == 1 && seen[0].file.ends_with("broken.wav"), "{seen:?}");
        let (moments, heard) = moments_of(toy, &files, OnBad::Skip, &ctx).unwrap();
        assert_eq!(moments.n(), 9);
        assert!(heard.len() == 1 && heard[0].reason.contains("short.wav` is too short"), "{heard:?}");
        assert!(moments_of(toy, &files, OnBad::Refuse, &ctx).is_err());
    }

    #[test]
    fn an_empty_line_of_a_text_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("texts.txt");
        for (text, part) in
            [("a harp\n \na drum\n", "line 2: expected words"), ("", "expected one text a line, found 0")]
        {
            std::fs::write(&path, text).unwrap();
            let err = read_texts(&path).unwrap_err().to_string();
            assert!(err.contains("texts.txt") && err.contains(part), "{err}");
        }
        std::fs::write(&path, "a harp\r\n a drum ").unwrap();
        assert_eq!(read_texts(&path).unwrap(), ["a harp", "a drum"]);
    }
}
