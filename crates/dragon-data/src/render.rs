//! Corpus "scores": tunes in ABC, arranged, rendered with a soundfont, captioned with what was rendered.
//!
//! Rendered in stereo with the synthesiser's reverb and chorus at twice the sample rate of the clips, averaged to mono,
//! resampled, and brought to their loudness. The same tunes, soundfont and seed give the same bytes, whatever the number
//! of threads; an interrupted run goes on where it stopped.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use rustysynth::{SoundFont, Synthesizer, SynthesizerSettings};
use serde_json::{Map, Value, json};

use crate::abc::{self, Tune};
use crate::arrange::{Arrangement, arrange};
use crate::caption::caption;
use crate::clips::{Form, Refusal};
use crate::error::{Error, Result};
use crate::manifest::{CaptionSource, Corpus, Entry, Shares, Split};
use crate::rng::{Choices, sha256_hex};
use crate::store::{Store, slug};

/// Sample rate of the synthesiser in that of the clips: its own aliasing stays out of their band.
const OVERSAMPLING: u32 = 2;

/// Version of the arranger: raised whenever the same seed would give other clips.
const VERSION: u32 = 1;

/// What to render.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder searched for `*.abc` files, or for a `.whl` or `.zip` archive that holds them.
    pub tunes: PathBuf,
    /// SF2 soundfont with the General MIDI programs and a drum kit.
    pub soundfont: PathBuf,
    /// Output folder: `manifest.jsonl`, `render.json`, `wav/`.
    pub out: PathBuf,
    /// Number of clips; tunes take turns, so a larger number keeps the clips of a smaller one.
    pub n_clips: usize,
    /// Seed of all choices.
    pub seed: u64,
    /// Form of the clips.
    pub clip: Form,
    /// Held-out shares of the pieces.
    pub split: Shares,
    /// Which parts of that split to render; a clip is the same whichever others are.
    pub parts: Vec<Split>,
}

impl Options {
    /// Checks everything that can be checked without reading a file.
    ///
    /// # Errors
    /// If a setting cannot work.
    pub fn check(&self) -> Result<()> {
        if self.n_clips == 0 {
            return Err(Error::config("n_clips", "at least 1", self.n_clips));
        }
        if self.parts.is_empty() {
            return Err(Error::config("parts", "at least one of train, valid, test", "none"));
        }
        self.clip.check()?;
        self.split.check()
    }
}

/// What was rendered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Clips in the manifest.
    pub n_clips: usize,
    /// Tunes they come from.
    pub n_tunes: usize,
    /// Clips that lay in the folder already.
    pub n_kept: usize,
    /// Attempts refused, by reason.
    pub refused: BTreeMap<String, usize>,
    /// Whether it stopped early because `stop` was set.
    pub stopped: bool,
}

/// A tune with its names.
struct Piece {
    /// Name that decides the split; shared by tunes with the same title or the same melody.
    piece: String,
    /// Unique name: collection, file, number.
    id: String,
    collection: String,
    tune: Tune,
}

/// Renders clips. `stop` (a Ctrl-C flag) is looked at between batches; what is done by then is kept and listed.
///
/// # Errors
/// If a setting cannot work, tunes or soundfont are missing or unusable, or the folder holds clips of other settings.
pub fn render(options: &Options, stop: &AtomicBool) -> Result<Summary> {
    options.check()?;
    let mut pieces = find_tunes(&options.tunes)?;
    let tunes_sha256 = tunes_hash(&pieces);
    pieces.retain(|tune| options.parts.contains(&options.split.split_of(&tune.piece)));
    if pieces.is_empty() {
        let detail = format!("no tune falls to {:?}", options.parts);
        return Err(Error::Nothing { what: "tunes", path: options.tunes.clone(), detail });
    }
    let font_bytes = fs::read(&options.soundfont).map_err(|e| missing(&options.soundfont, "soundfont", e))?;
    let font = SoundFont::new(&mut font_bytes.as_slice()).map_err(|e| Error::Input {
        what: "soundfont",
        path: options.soundfont.clone(),
        detail: format!("expected an SF2 file, found something else ({e})"),
    })?;
    let font_name = options.soundfont.file_name().unwrap_or_default().to_string_lossy().to_string();
    let settings = json!({
        "version": VERSION,
        "seed": options.seed,
        "soundfont": font_name,
        "soundfont_sha256": sha256_hex(&font_bytes),
        "tunes_sha256": tunes_sha256,
        "clip": options.clip,
        "split": options.split,
    });
    drop(font_bytes);
    let font = Arc::new(font);
    fs::create_dir_all(&options.out).map_err(Error::io(&options.out, "created"))?;
    let store = Store::open(&options.out, "render.json", &settings, &options.clip)?;

    let mut summary = Summary::default();
    // (variant, tune): every tune once, then every tune a second time, ...
    let jobs = (0..).flat_map(|variant| (0..pieces.len()).map(move |i| (variant, i)));
    let mut entries: Vec<Entry> = Vec::new();
    let mut jobs = jobs.take(20 * options.n_clips.max(pieces.len())).peekable();
    while entries.len() < options.n_clips && jobs.peek().is_some() {
        if stop.load(Ordering::Relaxed) {
            summary.stopped = true;
            break;
        }
        let batch: Vec<(usize, usize)> =
            jobs.by_ref().take((options.n_clips - entries.len()).min(256)).collect();
        let done: Vec<std::result::Result<(Entry, bool), Skip>> = batch
            .par_iter()
            .map(|&(variant, i)| {
                let id = format!("{}-{variant:02}", pieces[i].id);
                if let Some(entry) = store.kept(&id) {
                    return Ok((entry.clone(), true));
                }
                let entry = render_one(&pieces[i], &id, variant, options, &font, &font_name)?;
                Ok((entry, false))
            })
            .collect();
        let mut fresh = Vec::new();
        for result in done {
            match result {
                Ok((entry, kept)) => {
                    summary.n_kept += usize::from(kept);
                    if !kept {
                        fresh.push(entry.clone());
                    }
                    entries.push(entry);
                }
                Err(Skip::Refused(reason)) => *summary.refused.entry(reason).or_default() += 1,
                Err(Skip::Failed(error)) => return Err(*error),
            }
        }
        store.append(&fresh)?;
        tracing::info!("rendered {}/{} clips", entries.len(), options.n_clips);
    }
    if entries.is_empty() {
        return Err(Error::Nothing {
            what: "excerpts",
            path: options.tunes.clone(),
            detail: format!("{:?}", summary.refused),
        });
    }
    entries.sort_by(|a, b| a.id.cmp(&b.id));
    store.finish(&entries)?;
    summary.n_clips = entries.len();
    summary.n_tunes =
        entries.iter().map(|e| e.id.rsplit_once('-').map_or("", |(t, _)| t)).collect::<HashSet<_>>().len();
    Ok(summary)
}

/// Why an attempt gave no clip.
enum Skip {
    /// Not good enough; the next one is tried.
    Refused(String),
    /// The run cannot go on.
    Failed(Box<Error>),
}

fn render_one(
    piece: &Piece,
    id: &str,
    variant: usize,
    options: &Options,
    font: &Arc<SoundFont>,
    font_name: &str,
) -> std::result::Result<Entry, Skip> {
    let form = &options.clip;
    let mut choices = Choices::new(options.seed, id);
    // some choices leave no excerpt in the instrument's range; a few tries find others
    let arrangement =
        (0..8).find_map(|_| arrange(&piece.tune, form.exact_s(), &mut choices)).ok_or_else(|| {
            Skip::Refused(format!("no excerpt of {} s in the instrument's range", form.exact_s()))
        })?;
    let mut samples = synthesise(&arrangement, font, form).map_err(|e| Skip::Failed(Box::new(e)))?;
    let gain_db = form.level(&mut samples).map_err(|why| {
        Skip::Refused(match why {
            Refusal::Silent => "silent".into(),
            Refusal::Clipped => "clipped".into(),
        })
    })?;
    let (caption, sentence) = caption(&arrangement.facts, &mut choices);
    let path = format!("wav/{}/{id}.wav", piece.collection);
    form.store(&options.out.join(&path), samples).map_err(|e| Skip::Failed(Box::new(e)))?;
    let Value::Object(mut attributes) =
        serde_json::to_value(&arrangement.facts).expect("facts are plain fields")
    else {
        unreachable!("a struct becomes an object");
    };
    let extra: Map<String, Value> = [
        ("title", json!(piece.tune.title)),
        ("collection", json!(piece.collection)),
        ("variant", json!(variant)),
        ("caption_form", json!(sentence)),
        ("gain_db", json!((100.0 * gain_db).round() / 100.0)),
        ("soundfont", json!(font_name)),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_string(), v))
    .collect();
    attributes.extend(extra);
    Ok(Entry {
        id: id.to_string(),
        piece: piece.piece.clone(),
        path,
        start_s: (1000.0 * arrangement.start_s).round() / 1000.0,
        duration_s: form.exact_s(),
        sample_rate_hz: form.sample_rate_hz,
        caption,
        caption_source: CaptionSource::Score,
        split: options.split.split_of(&piece.piece),
        corpus: Corpus::Scores,
        attributes,
    })
}

/// The sound of an arrangement: a clip's mono samples, not yet levelled.
///
/// # Errors
/// If the soundfont cannot be played.
pub fn synthesise(arrangement: &Arrangement, font: &Arc<SoundFont>, form: &Form) -> Result<Vec<f32>> {
    let rate_hz = OVERSAMPLING * form.sample_rate_hz;
    let settings = SynthesizerSettings::new(rate_hz as i32);
    let mut synth = Synthesizer::new(font, &settings).map_err(|e| Error::Input {
        what: "soundfont",
        path: PathBuf::new(),
        detail: format!("expected playable presets, found {e}"),
    })?;
    const CONTROL: i32 = 0xB0;
    const PROGRAM: i32 = 0xC0;
    const VOLUME: i32 = 7;
    for &(channel, program, volume) in &arrangement.channels {
        synth.process_midi_message(channel.into(), PROGRAM, program.into(), 0);
        synth.process_midi_message(channel.into(), CONTROL, VOLUME, volume.into());
    }
    let n = OVERSAMPLING as usize * form.n_samples();
    // releases before onsets at the same sample, so that repeated notes sound twice
    let at = |s: f64| ((s * f64::from(rate_hz)).round() as usize).min(n);
    let mut events: Vec<(usize, u8, &crate::arrange::Sounding)> = arrangement
        .notes
        .iter()
        .flat_map(|note| [(at(note.off_s), 0u8, note), (at(note.on_s), 1u8, note)])
        .collect();
    events.sort_by_key(|(at, on, note)| (*at, *on, note.channel, note.key));
    let (mut left, mut right) = (vec![0.0; n], vec![0.0; n]);
    let mut done = 0;
    for (at, on, note) in events {
        if at >= n {
            break;
        }
        synth.render(&mut left[done..at], &mut right[done..at]);
        done = at;
        if on == 1 {
            synth.note_on(note.channel.into(), note.key.into(), note.velocity.into());
        } else {
            synth.note_off(note.channel.into(), note.key.into());
        }
    }
    synth.render(&mut left[done..], &mut right[done..]);
    let mono: Vec<f32> = left.iter().zip(&right).map(|(l, r)| 0.5 * (l + r)).collect();
    let samples = dragon_audio::resample(&mono, rate_hz, form.sample_rate_hz)?;
    assert_eq!(samples.len(), form.n_samples(), "twice as many samples at twice the rate");
    Ok(samples)
}

/// All regular tunes under a folder or in an archive, sorted, with their names.
fn find_tunes(root: &Path) -> Result<Vec<Piece>> {
    let files = abc_files(root)?;
    let mut pieces = Vec::new();
    let mut by_melody: HashMap<Vec<i8>, String> = HashMap::new();
    let (mut n_tunes, n_files) = (0, files.len());
    for (name, text) in files {
        let mut parts: Vec<&str> = name.split('/').collect();
        let stem = parts.pop().unwrap_or("").trim_end_matches(".abc").to_string();
        let collection = parts.pop().unwrap_or("abc").to_string();
        let tunes = abc::parse(&text);
        let several = tunes.len() > 1;
        for tune in tunes {
            n_tunes += 1;
            if !tune.is_regular() {
                continue;
            }
            let number = if several { format!("-{:04}", tune.number) } else { String::new() };
            let id = slug(&format!("{collection}-{stem}{number}"));
            let title = piece_name(&tune.title);
            let title = if title.is_empty() { id.clone() } else { title };
            // the same melody under another title is the same piece
            let piece = by_melody.entry(melody(&tune)).or_insert(title).clone();
            pieces.push(Piece { piece, id, collection: slug(&collection), tune });
        }
    }
    // two tunes of one file may carry the same number
    let mut seen: HashMap<String, usize> = HashMap::new();
    for piece in &mut pieces {
        let n = seen.entry(piece.id.clone()).or_default();
        *n += 1;
        if *n > 1 {
            piece.id = format!("{}.{n}", piece.id);
        }
    }
    if pieces.is_empty() {
        return Err(Error::Nothing {
            what: "tunes",
            path: root.to_path_buf(),
            detail: format!("{n_files} ABC files, {n_tunes} tunes in them, none with regular bars"),
        });
    }
    tracing::info!("{} of {n_tunes} tunes are regular", pieces.len());
    Ok(pieces)
}

/// Intervals of the first 24 notes: equal for the same melody in another key.
fn melody(tune: &Tune) -> Vec<i8> {
    let pitches: Vec<i32> =
        tune.bars.iter().flat_map(|b| b.notes.iter().map(|n| i32::from(n.pitch))).take(25).collect();
    pitches.windows(2).map(|p| (p[1] - p[0]) as i8).collect()
}

/// Title without the kind of tune after a dash, articles and punctuation: "THE EVICTION -- JIG" is "eviction".
fn piece_name(title: &str) -> String {
    let title = title.split(" -").next().unwrap_or(title);
    slug(title).split('-').filter(|w| !["the", "a", "an"].contains(w)).collect::<Vec<_>>().join("-")
}

/// Names and texts of all ABC files, sorted by name. Texts that are not UTF-8 are read as Latin-1.
fn abc_files(root: &Path) -> Result<Vec<(String, String)>> {
    if !root.exists() {
        return Err(Error::Missing {
            what: "folder of tunes",
            path: root.to_path_buf(),
            hint: "`dragon data render` without `--tunes` and `--soundfont` downloads the default ones",
        });
    }
    let mut files = Vec::new();
    let mut archives = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        if folder.is_file() {
            archives.push(folder);
            continue;
        }
        for item in fs::read_dir(&folder).map_err(Error::io(&folder, "read"))? {
            let path = item.map_err(Error::io(&folder, "read"))?.path();
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
            if path.is_dir() {
                folders.push(path);
            } else if extension == "abc" {
                let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
                let name = if name.contains('/') {
                    name
                } else {
                    format!("{}/{name}", root.file_name().unwrap_or_default().to_string_lossy())
                };
                files.push((name, decode_text(fs::read(&path).map_err(Error::io(&path, "read"))?)));
            } else if matches!(extension, "whl" | "zip") {
                archives.push(path);
            }
        }
    }
    for path in archives {
        let damaged = |detail: String| Error::Input { what: "archive of tunes", path: path.clone(), detail };
        let file = fs::File::open(&path).map_err(Error::io(&path, "read"))?;
        let mut zip = zip::ZipArchive::new(file)
            .map_err(|e| damaged(format!("expected a zip or wheel, found something else ({e})")))?;
        for i in 0..zip.len() {
            let mut member = zip.by_index(i).map_err(|e| damaged(e.to_string()))?;
            let name = member.name().map_err(|e| damaged(e.to_string()))?.to_string();
            // only the collections whose licence allows it (essenFolksong, for one, is non-commercial)
            if name.ends_with(".abc") && ["ryansMammoth/", "airdsAirs/"].iter().any(|c| name.contains(c)) {
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut member, &mut bytes).map_err(Error::io(&path, "read"))?;
                files.push((name, decode_text(bytes)));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn decode_text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| e.into_bytes().into_iter().map(char::from).collect())
}

fn tunes_hash(pieces: &[Piece]) -> String {
    let text: String = pieces.iter().map(|p| format!("{} {} {:?}\n", p.id, p.piece, p.tune.bars)).collect();
    sha256_hex(text.as_bytes())
}

fn missing(path: &Path, what: &'static str, error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        let hint = "`dragon data render` without `--tunes` and `--soundfont` downloads the default ones";
        return Error::Missing { what, path: path.to_path_buf(), hint };
    }
    Error::io(path, "read")(error)
}
