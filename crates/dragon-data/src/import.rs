//! The user's own audio and captions: a folder, or a JSONL or CSV list.
//!
//! - *Folder*: every audio file in it and below; the caption stands in a text file of the same name (`song.wav`,
//!   `song.txt`), else the file's name becomes the caption.
//! - *List*: a column or field `path` (or `audio`, `file`) and `caption` (or `text`, `prompt`); `piece` may name what
//!   the file is a part of. Paths are relative to the list.
//!
//! Each file is mixed to mono, resampled and cut into as many clips as fit, with the file's caption.
//! Clips come to their place together, when all are made: an import that fails leaves its output folder as it was.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::clips::{Form, Refusal};
use crate::error::{Error, Result};
use crate::manifest::{
    CaptionSource, Corpus, Entry, Shares, parse_csv, read_manifest, read_text, write_manifest,
};
use crate::rng::hash64;
use crate::store::slug;

/// Longest caption accepted, in characters: more is a mistake, such as a whole lyric.
const MAX_CAPTION_CHARS: usize = 1000;

/// What to import.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder, `.jsonl` or `.csv`.
    pub from: PathBuf,
    /// Output folder: `manifest.jsonl`, `wav/`.
    pub out: PathBuf,
    /// At most this many clips per file, evenly spread; `None` takes all that fit.
    pub max_clips_per_file: Option<usize>,
    /// Leave out files that cannot be used, instead of stopping at the first.
    pub skip_bad: bool,
    /// Form of the clips.
    pub clip: Form,
    /// Held-out shares of the pieces.
    pub split: Shares,
}

/// What was imported.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Clips in the manifest.
    pub n_clips: usize,
    /// Files they come from.
    pub n_files: usize,
    /// Excerpts refused, by reason.
    pub refused: BTreeMap<String, usize>,
    /// Files left out, with the reason (only with `skip_bad`).
    pub left_out: Vec<String>,
    /// Whether it stopped early because `stop` was set.
    pub stopped: bool,
}

/// One audio file to import.
#[derive(Debug, Clone, PartialEq)]
struct Item {
    path: PathBuf,
    caption: String,
    piece: String,
}

/// Imports audio. Every caption and path is checked, and every file looked at, before the first is decoded.
///
/// # Errors
/// If a setting cannot work, the source is missing or empty, a caption is empty or longer than 1000 characters, or a file cannot be
/// used (missing, damaged, too short, silent) and `skip_bad` is off; also if the output folder holds an import of other
/// files. The output folder is then as it was.
pub fn import(options: &Options, stop: &AtomicBool) -> Result<Summary> {
    options.clip.check()?;
    options.split.check()?;
    if options.max_clips_per_file == Some(0) {
        return Err(Error::config("max_clips_per_file", "at least 1", 0));
    }
    let items = if options.from.is_dir() { folder(&options.from)? } else { list(&options.from)? };
    if items.is_empty() {
        let detail = format!("looked for files ending in {}", dragon_audio::ENDINGS.join(", "));
        return Err(Error::Nothing { what: "audio", path: options.from.clone(), detail });
    }
    if !options.skip_bad {
        items.iter().try_for_each(|item| dragon_audio::check(&item.path))?;
    }
    let manifest = options.out.join("manifest.jsonl");
    if manifest.exists() {
        let pieces: HashSet<&str> = items.iter().map(|item| item.piece.as_str()).collect();
        if let Some(other) = read_manifest(&manifest)?.iter().find(|e| !pieces.contains(e.piece.as_str())) {
            let piece = format!("`{}`", other.piece);
            return Err(Error::OtherClips { path: options.out.clone(), piece });
        }
    }
    let staged = Staged::new(&options.out)?;
    let (summary, entries) = cut(items, options, &staged, stop)?;
    staged.place(&entries)?;
    write_manifest(&manifest, &entries)?;
    Ok(summary)
}

/// Clips on their way: made in a folder of their own, which goes away with this, and moved when all are whole.
struct Staged {
    out: PathBuf,
    dir: PathBuf,
    created: Vec<PathBuf>, // folders that were not there before, outermost first
}

impl Staged {
    fn new(out: &Path) -> Result<Self> {
        let created: Vec<PathBuf> =
            out.ancestors().take_while(|dir| !dir.exists()).map(Path::to_owned).collect();
        let created: Vec<PathBuf> =
            created.into_iter().rev().filter(|dir| !dir.as_os_str().is_empty()).collect();
        let dir = out.join(format!(".import-{}.tmp", std::process::id()));
        let staged = Self { out: out.to_owned(), dir, created };
        fs::create_dir_all(&staged.dir).map_err(Error::io(&staged.dir, "created"))?;
        Ok(staged)
    }

    fn place(&self, entries: &[Entry]) -> Result<()> {
        let wav = self.out.join("wav");
        fs::create_dir_all(&wav).map_err(Error::io(&wav, "created"))?;
        for entry in entries {
            let to = self.out.join(&entry.path);
            fs::rename(self.dir.join(&entry.path), &to).map_err(Error::io(&to, "written"))?;
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir); // what cannot be removed does no harm
        for dir in self.created.iter().rev() {
            let _ = fs::remove_dir(dir); // only if nothing came into it
        }
    }
}

/// Cuts the files into clips under the staging folder.
fn cut(
    items: Vec<Item>,
    options: &Options,
    staged: &Staged,
    stop: &AtomicBool,
) -> Result<(Summary, Vec<Entry>)> {
    let mut ids = HashSet::new();
    let items: Vec<(String, Item)> = items
        .into_iter()
        .map(|item| {
            let stem = slug(&item.path.file_stem().unwrap_or_default().to_string_lossy());
            // files of one name in several folders are told apart by a hash of the path
            let id = if ids.insert(stem.clone()) && !stem.is_empty() {
                stem
            } else {
                format!("{stem}-{:08x}", hash64(&item.path.to_string_lossy()) as u32)
            };
            (id, item)
        })
        .collect();
    let mut summary = Summary::default();
    let mut entries = Vec::new();
    for batch in items.chunks(rayon::current_num_threads().max(1) * 2) {
        if stop.load(Ordering::Relaxed) {
            summary.stopped = true;
            break;
        }
        let done: Vec<Result<(Vec<Entry>, Vec<Refusal>)>> =
            batch.par_iter().map(|(id, item)| import_one(id, item, options, &staged.dir)).collect();
        for (result, (_, item)) in done.into_iter().zip(batch) {
            match result {
                Ok((new, refused)) => {
                    for reason in refused {
                        *summary.refused.entry(format!("{reason:?}").to_lowercase()).or_default() += 1;
                    }
                    summary.n_files += usize::from(!new.is_empty());
                    entries.extend(new);
                }
                Err(error) if options.skip_bad && !is_full(&error) => {
                    tracing::warn!("left out: {error}");
                    summary.left_out.push(format!("{}: {error}", item.path.display()));
                }
                Err(error) => return Err(error),
            }
        }
        tracing::info!("imported {} clips of {} files", entries.len(), summary.n_files);
    }
    if entries.is_empty() {
        let detail = match summary.stopped {
            true => "stopped before the first clip".to_owned(),
            false => {
                let refused = summary.refused.iter().map(|(reason, n)| format!("{n} {reason}"));
                let left_out = summary.left_out.iter().map(|line| line.lines().next().unwrap_or_default());
                refused.chain(left_out.map(str::to_owned)).collect::<Vec<_>>().join("; ")
            }
        };
        return Err(Error::Nothing { what: "excerpts", path: options.from.clone(), detail });
    }
    summary.n_clips = entries.len();
    Ok((summary, entries))
}

/// Whether the output cannot be written: no fault of the file that is imported.
fn is_full(error: &Error) -> bool {
    matches!(error, Error::Io { .. } | Error::Audio(dragon_audio::Error::Io { action: "written", .. }))
}

fn import_one(id: &str, item: &Item, options: &Options, dir: &Path) -> Result<(Vec<Entry>, Vec<Refusal>)> {
    let form = &options.clip;
    let n_samples = form.n_samples();
    let audio = dragon_audio::read_mono(&item.path, form.sample_rate_hz)?;
    let n_fit = audio.samples.len() / n_samples;
    if n_fit == 0 {
        return Err(dragon_audio::Error::TooShort {
            path: item.path.clone(),
            expected_s: form.exact_s(),
            found_s: audio.duration_s(),
        }
        .into());
    }
    let n = options.max_clips_per_file.map_or(n_fit, |max| n_fit.min(max));
    let (mut entries, mut refused) = (Vec::new(), Vec::new());
    for k in 0..n {
        let from = (k * n_fit / n) * n_samples;
        let mut samples = audio.samples[from..from + n_samples].to_vec();
        let gain_db = match form.level(&mut samples) {
            Ok(gain_db) => gain_db,
            Err(reason) => {
                refused.push(reason);
                continue;
            }
        };
        let id = format!("{id}-{k:03}");
        let path = format!("wav/{id}.wav");
        form.store(&dir.join(&path), samples)?;
        let mut attributes = Map::new();
        attributes.insert("file".into(), json!(item.path.file_name().unwrap_or_default().to_string_lossy()));
        attributes.insert("gain_db".into(), json!((100.0 * gain_db).round() / 100.0));
        entries.push(Entry {
            id,
            piece: item.piece.clone(),
            path,
            start_s: from as f64 / f64::from(form.sample_rate_hz),
            duration_s: form.exact_s(),
            sample_rate_hz: form.sample_rate_hz,
            caption: item.caption.clone(),
            caption_source: CaptionSource::User,
            split: options.split.split_of(&item.piece),
            corpus: Corpus::Import,
            attributes,
        });
    }
    if entries.is_empty() && refused.contains(&Refusal::Silent) {
        return Err(dragon_audio::Error::Silent {
            path: item.path.clone(),
            expected_dbfs: form.silence_lufs,
            found_dbfs: dragon_audio::rms_dbfs(&audio.samples),
        }
        .into());
    }
    Ok((entries, refused))
}

/// Audio files below a folder, sorted, with the captions beside them.
fn folder(root: &Path) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for found in fs::read_dir(&folder).map_err(Error::io(&folder, "read"))? {
            let path = found.map_err(Error::io(&folder, "read"))?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_lowercase();
            if !dragon_audio::ENDINGS.contains(&extension.as_str()) {
                continue;
            }
            let text = path.with_extension("txt");
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_string();
            let caption = if text.exists() {
                let caption = read_text(&text, "caption")?.split_whitespace().collect::<Vec<_>>().join(" ");
                check_caption(&caption).map_err(|detail| Error::Input {
                    what: "caption",
                    path: text,
                    detail,
                })?;
                caption
            } else {
                stem.replace(['_', '-'], " ")
            };
            let piece = path.strip_prefix(root).unwrap_or(&path).with_extension("");
            let piece = piece.to_string_lossy().replace('\\', "/");
            items.push(Item { path, caption, piece });
        }
    }
    items.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(items)
}

/// The lines of a JSONL or CSV list.
fn list(path: &Path) -> Result<Vec<Item>> {
    let text = read_text(path, "list or folder of audio")?;
    let is_csv = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv"));
    let refuse = |line: usize, detail: String| Error::Line { path: path.to_path_buf(), line, detail };
    let rows: Vec<(usize, Map<String, Value>)> = if is_csv {
        let rows = parse_csv(path, &text)?;
        rows.into_iter()
            .map(|(n, row)| (n, row.into_iter().map(|(k, v)| (k, Value::String(v))).collect()))
            .collect()
    } else {
        let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
        lines
            .map(|(i, line)| match serde_json::from_str(line) {
                Ok(Value::Object(map)) => Ok((i + 1, map)),
                Ok(_) => Err(refuse(i + 1, "expected an object, found another JSON value".into())),
                Err(e) => Err(refuse(i + 1, format!("expected JSON, found something else ({e})"))),
            })
            .collect::<Result<_>>()?
    };
    let base = path.parent().unwrap_or(Path::new(""));
    rows.into_iter()
        .map(|(line, row)| {
            let field = |names: &[&str]| names.iter().find_map(|n| row.get(*n)).and_then(Value::as_str);
            let missing = |names: &[&str]| {
                let found: Vec<&str> = row.keys().map(String::as_str).collect();
                refuse(
                    line,
                    format!("expected a field `{}`, found {}", names.join("` or `"), found.join(", ")),
                )
            };
            let audio =
                field(&["path", "audio", "file"]).ok_or_else(|| missing(&["path", "audio", "file"]))?;
            let names = ["caption", "text", "prompt"];
            let caption = field(&names).ok_or_else(|| missing(&names))?;
            let caption = caption.split_whitespace().collect::<Vec<_>>().join(" ");
            check_caption(&caption).map_err(|detail| refuse(line, detail))?;
            let file = base.join(audio);
            if !file.exists() {
                return Err(refuse(line, format!("audio file `{}` does not exist", file.display())));
            }
            let piece = field(&["piece"]).unwrap_or(audio).to_string();
            Ok(Item { path: file, caption, piece })
        })
        .collect()
}

fn check_caption(caption: &str) -> std::result::Result<(), String> {
    match caption.chars().count() {
        0 => Err("`caption`: expected words, found nothing".into()),
        n if n > MAX_CAPTION_CHARS => {
            Err(format!("`caption`: expected at most {MAX_CAPTION_CHARS} characters, found {n}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use dragon_audio::{Audio, SampleFormat, write_wav};

    use super::*;

    fn write(path: &Path, seconds: f64, amplitude: f32) {
        let n = (seconds * 44100.0) as usize;
        let tone: Vec<f32> = (0..n).map(|i| amplitude * (i as f32 * 0.05).sin()).collect();
        let audio = Audio { channels: vec![tone.clone(), tone], sample_rate_hz: 44100 };
        write_wav(path, &audio, SampleFormat::Int16).unwrap();
    }

    fn options(from: PathBuf, out: &Path) -> Options {
        Options {
            from,
            out: out.to_path_buf(),
            max_clips_per_file: None,
            skip_bad: false,
            clip: Form::default(),
            split: Shares::default(),
        }
    }

    fn message(result: Result<Summary>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_folder_becomes_clips_with_the_captions_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (from, out) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(from.join("sub")).unwrap();
        write(&from.join("one_tone.wav"), 11.0, 0.3);
        write(&from.join("sub/two.wav"), 6.0, 0.01);
        fs::write(from.join("sub/two.txt"), "a quiet\n tone").unwrap();
        let summary = import(&options(from, &out), &AtomicBool::new(false)).unwrap();
        assert_eq!((summary.n_clips, summary.n_files), (3, 2));
        let entries = crate::read_manifest(&out.join("manifest.jsonl")).unwrap();
        let captions: Vec<&str> = entries.iter().map(|e| e.caption.as_str()).collect();
        assert_eq!(captions, ["one tone", "one tone", "a quiet tone"]);
        for entry in &entries {
            let clip = dragon_audio::read(&out.join(&entry.path)).unwrap();
            assert_eq!((clip.channels.len(), clip.n_samples(), clip.sample_rate_hz), (1, 81920, 16000));
        }
    }

    #[test]
    fn clips_take_the_form_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let (from, out) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(&from).unwrap();
        write(&from.join("tone.wav"), 6.2, 0.3);
        let clip = Form { sample_rate_hz: 22050, duration_s: 2.0, target_lufs: -26.0, ..Form::default() };
        let split = Shares { valid_percent: 0, test_percent: 100 };
        let asked = Options { clip, split, ..options(from, &out) };
        assert_eq!(import(&asked, &AtomicBool::new(false)).unwrap().n_clips, 3);
        for entry in crate::read_manifest(&out.join("manifest.jsonl")).unwrap() {
            assert_eq!((entry.sample_rate_hz, entry.duration_s), (22050, 2.0));
            assert_eq!(entry.split, crate::Split::Test);
            let clip = dragon_audio::read(&out.join(&entry.path)).unwrap();
            assert_eq!((clip.n_samples(), clip.sample_rate_hz), (44100, 22050));
            assert!((dragon_audio::lufs(&[&clip.channels[0]], 22050) + 26.0).abs() < 0.1);
        }
    }

    #[test]
    fn lists_name_their_bad_lines() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a.wav"), 6.0, 0.3);
        let cases = [
            (
                "l.jsonl",
                "{\"path\":\"a.wav\",\"caption\":\"\"}",
                "line 1: `caption`: expected words, found nothing",
            ),
            ("l.jsonl", "{\"path\":\"b.wav\",\"text\":\"x\"}", "does not exist"),
            (
                "l.jsonl",
                "{\"path\":\"a.wav\"}",
                "expected a field `caption` or `text` or `prompt`, found path",
            ),
            ("l.jsonl", "\n{\"path\":", "line 2: expected JSON"),
            ("l.csv", "path,caption\na.wav,one,two\n", "line 2: expected 2 columns, found 3"),
            ("l.csv", "path,caption\na.wav,\"one\n", "expected a closing quote"),
        ];
        for (name, text, want) in cases {
            fs::write(dir.path().join(name), text).unwrap();
            let got = message(import(
                &options(dir.path().join(name), &dir.path().join("o")),
                &AtomicBool::new(false),
            ));
            assert!(got.contains(want), "{got}");
            assert!(!dir.path().join("o").exists());
        }
        let long = format!("path,caption\na.wav,{}\n", "la ".repeat(400));
        fs::write(dir.path().join("l.csv"), long).unwrap();
        let got = message(import(
            &options(dir.path().join("l.csv"), &dir.path().join("o")),
            &AtomicBool::new(false),
        ));
        assert!(got.contains("expected at most 1000 characters, found 1199"), "{got}");
    }

    #[test]
    fn unusable_audio_stops_or_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let (from, out) = (dir.path().join("in"), dir.path().join("out"));
        fs::create_dir_all(&from).unwrap();
        write(&from.join("good.wav"), 6.0, 0.3);
        write(&from.join("short.wav"), 2.0, 0.3);
        let got = message(import(&options(from.clone(), &out), &AtomicBool::new(false)));
        assert!(got.contains("is too short: expected at least 5.12 s, found 2.00 s"), "{got}");
        write(&from.join("short.wav"), 6.0, 0.0);
        let got = message(import(&options(from.clone(), &out), &AtomicBool::new(false)));
        assert!(got.contains("is silent"), "{got}");
        assert!(!out.exists(), "the clips of the good file are not left behind");
        let skipping = Options { skip_bad: true, ..options(from, &out) };
        let summary = import(&skipping, &AtomicBool::new(false)).unwrap();
        assert_eq!((summary.n_clips, summary.left_out.len()), (1, 1));
    }

    #[test]
    fn an_import_of_other_files_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, out) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("out"));
        for from in [&a, &b] {
            fs::create_dir_all(from).unwrap();
        }
        write(&a.join("one.wav"), 6.0, 0.3);
        write(&b.join("two.wav"), 6.0, 0.3);
        let run = |from: &Path| import(&options(from.to_owned(), &out), &AtomicBool::new(false));
        run(&a).unwrap();
        let before = fs::read(out.join("manifest.jsonl")).unwrap();
        run(&a).unwrap(); // the same files again are fine
        assert_eq!(fs::read(out.join("manifest.jsonl")).unwrap(), before);
        let got = message(run(&b));
        assert!(got.contains("holds clips of other files, among them `one`"), "{got}");
        // One file of an import that went well before turns bad: the clips of before stay.
        write(&a.join("three.wav"), 1.0, 0.3);
        assert!(message(run(&a)).contains("too short"));
        assert_eq!(fs::read(out.join("manifest.jsonl")).unwrap(), before);
        assert_eq!(fs::read_dir(&out).unwrap().count(), 2, "manifest and wav/ only");
        assert_eq!(fs::read_dir(out.join("wav")).unwrap().count(), 1);
    }

    #[test]
    fn an_empty_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let got =
            message(import(&options(dir.path().into(), &dir.path().join("o")), &AtomicBool::new(false)));
        assert!(got.starts_with("no usable audio in"), "{got}");
        let got =
            message(import(&options(dir.path().join("no"), &dir.path().join("o")), &AtomicBool::new(false)));
        assert!(got.contains("does not exist"), "{got}");
    }
}
