//! Folders of audio to embeddings and reference statistics.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use dragon_audio::Clip;
use dragon_encoders::{AudioEncoder, Embeddings, Setting};
use dragon_metrics::files::{write_embeddings, write_stats};
use dragon_metrics::{GaussianStats, Rows};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::run::{Meter, RunContext, write_atomic};

/// Endings that count as audio when a folder is read.
pub const AUDIO_ENDINGS: [&str; 11] =
    ["wav", "flac", "ogg", "oga", "mp3", "mp2", "aif", "aiff", "m4a", "mp4", "caf"];

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

/// The audio files of a folder and its subfolders, by ending, sorted by path; or the one file itself.
///
/// # Errors
/// If the path does not exist, a folder cannot be read, no file is found, or one is seen to be unusable without
/// decoding it (empty, mislabelled, truncated; see [`dragon_audio::check`]).
pub fn audio_files(path: &Path) -> Result<Vec<PathBuf>> {
    let found = find_files(path)?;
    found.iter().try_for_each(|file| dragon_audio::check(file)).map_err(Error::input("cannot use a file"))?;
    Ok(found)
}

fn find_files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = BTreeSet::new();
    let mut open = vec![path.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).map_err(Error::io("read", &dir))? {
            let path = entry.map_err(Error::io("read", &dir))?.path();
            let ending = path.extension().and_then(|e| e.to_str()).map(str::to_lowercase);
            if path.is_dir() {
                open.push(path);
            } else if ending.is_some_and(|e| AUDIO_ENDINGS.contains(&e.as_str())) {
                found.insert(path);
            }
        }
    }
    if found.is_empty() {
        return Err(Error::Data {
            problem: format!("the folder `{}` holds no audio", path.display()),
            hint: format!("files ending in {} are read", AUDIO_ENDINGS.join(", ")),
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
    let mut meter = Meter::new(ctx.progress, files.len(), 0, 1.0, "songs");
    let mut songs = Vec::with_capacity(files.len());
    for batch in files.chunks(BATCH) {
        if ctx.stopped() {
            return Err(Error::Data {
                problem: format!("stopped after {} of {} songs", songs.len(), files.len()),
                hint: "nothing was written; start the command again".into(),
            });
        }
        let done: Vec<Result<Rows>> = batch.par_iter().map(|path| one(path)).collect();
        for (path, rows) in batch.iter().zip(done) {
            songs.push(SongEmbeddings { path: path.clone(), rows: rows? });
        }
        meter.update(songs.len(), &[], &[], songs.len() == files.len());
    }
    meter.finish();
    Ok(songs)
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

/// Writes mean and covariance of all rows of all songs to `path` (`.npz` as fadtk's, or `.safetensors`) under `name`.
///
/// # Errors
/// If there are fewer than two rows, the ending is another, or the file cannot be written.
pub fn save_stats(path: &Path, name: &str, songs: &[SongEmbeddings]) -> Result<GaussianStats> {
    let stats = GaussianStats::fit(&concat(songs)?).map_err(Error::input("cannot compute statistics"))?;
    write_stats(path, name, &stats).map_err(Error::input("cannot save statistics"))?;
    Ok(stats)
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
        let stats = save_stats(&dir.path().join("s.npz"), "toy", &songs).unwrap();
        assert_eq!(stats.n(), Some(18));
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
}
