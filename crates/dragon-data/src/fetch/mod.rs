//! Music from Debian packages: the inputs of [`crate::render`], and corpus "recordings".
//!
//! Packages are downloaded with `apt-get download` and unpacked with `dpkg-deb` and `tar`; nothing is installed.
//! The tune collections come inside the PyPI wheel of music21, downloaded with `pip download`. Versions and SHA-256 of
//! every package and track go to `sources.json`. Licences are those that the packages declare; the music stays local.
//!
//! Recordings are mixed to mono, resampled, cut into clips spread evenly over all tracks, and brought to one loudness.
//! Captions are put together from titles, comments and folders: they describe the
//! track, not the excerpt. One measured word (bright or dark sounding, by spectral centroid) is about the excerpt.
//!
//! Reading order: what is fetched and how tracks are cut is here; `tracks` lists the packages and finds the music in
//! them; `caption` words the captions; `packages` downloads and unpacks.

mod caption;
mod packages;
mod tracks;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde_json::{Value, json};

use crate::clips::{Form, Refusal};
use crate::error::{Error, Result};
use crate::manifest::{CaptionSource, Corpus, Entry, Shares};
use crate::rng::Choices;
use crate::store::Store;
use caption::caption;
use packages::{find, run, unpack, walk};
use tracks::{PACKAGES, Track, find_tracks, is_excluded};

/// Version of the cutting and the captions: raised whenever the same seed would give other clips.
const VERSION: u32 = 2;

/// The package with the default soundfont (FluidR3, MIT) and its file.
const SOUNDFONT: (&str, &str) = ("fluid-soundfont-gm", "FluidR3_GM.sf2");

/// The wheel with the tune collections; pinned, since the corpus is made of it.
const TUNES: (&str, &str) = ("music21", "10.5.1");

/// What to fetch for corpus "recordings".
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder for downloaded packages and unpacked tracks; kept between runs.
    pub cache: PathBuf,
    /// Output folder: `manifest.jsonl`, `sources.json`, `fetch.json`, `wav/`.
    pub out: PathBuf,
    /// Number of clips to cut, spread over all tracks by duration; refused excerpts are not replaced.
    pub n_clips: usize,
    /// Seed of where clips start and how captions are worded.
    pub seed: u64,
    /// Tracks shorter than this are left out, seconds: they are signals and stings, not music.
    pub min_track_s: f64,
    /// Form of the clips.
    pub clip: Form,
    /// Held-out shares of the pieces.
    pub split: Shares,
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
        if !(self.min_track_s.is_finite() && self.min_track_s >= 0.0) {
            return Err(Error::config("min_track_s", "a number of at least 0", self.min_track_s));
        }
        self.clip.check()?;
        self.split.check()
    }
}

/// What was fetched.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Summary {
    /// Clips in the manifest.
    pub n_clips: usize,
    /// Tracks they come from.
    pub n_tracks: usize,
    /// Duration of those tracks, minutes.
    pub minutes: f64,
    /// Clips that lay in the folder already.
    pub n_kept: usize,
    /// Excerpts and tracks refused, by reason.
    pub refused: BTreeMap<String, usize>,
    /// Whether it stopped early because `stop` was set.
    pub stopped: bool,
}

/// Where [`crate::render`] finds its inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoreInputs {
    /// Archive with the tune collections.
    pub tunes: PathBuf,
    /// Soundfont.
    pub soundfont: PathBuf,
}

/// Downloads the tune collections and the soundfont into `cache`, if they are not there.
///
/// # Errors
/// If a program is missing or fails.
pub fn score_inputs(cache: &Path) -> Result<ScoreInputs> {
    fs::create_dir_all(cache).map_err(Error::io(cache, "created"))?;
    let wheel = find(cache, &format!("{}-{}-", TUNES.0, TUNES.1), ".whl")?;
    let tunes = match wheel {
        Some(path) => path,
        None => {
            let requirement = format!("{}=={}", TUNES.0, TUNES.1);
            let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", &requirement];
            let hint = "pip is needed to download the tune collections; or download the wheel yourself into the cache";
            run(Command::new("python3").args(pip).current_dir(cache), hint)?;
            find(cache, &format!("{}-{}-", TUNES.0, TUNES.1), ".whl")?.ok_or_else(|| Error::Missing {
                what: "wheel",
                path: cache.join(&requirement),
                hint,
            })?
        }
    };
    let unpacked = unpack(cache, SOUNDFONT.0)?;
    let soundfont = walk(&unpacked.folder)?
        .into_iter()
        .find(|p| p.file_name().is_some_and(|n| n == SOUNDFONT.1))
        .ok_or_else(|| Error::Missing {
            what: "soundfont",
            path: unpacked.folder.join(SOUNDFONT.1),
            hint: "has the package changed? give another SF2 file with `--soundfont`",
        })?;
    Ok(ScoreInputs { tunes, soundfont })
}

/// Downloads the five packages, cuts their tracks, writes clips and manifest. `stop` (a Ctrl-C flag) is looked at
/// between tracks; what is done by then is kept and listed.
///
/// # Errors
/// If a setting cannot work, a program is missing or fails, the disk is full, or the folder holds clips of other settings.
pub fn recordings(options: &Options, stop: &AtomicBool) -> Result<Summary> {
    options.check()?;
    let min_track_s = options.min_track_s;
    let mut packages = Vec::new();
    let mut tracks: Vec<Track> = Vec::new();
    for package in &PACKAGES {
        let unpacked = unpack(&options.cache, package.name)?;
        tracks.extend(find_tracks(package, &unpacked.folder)?);
        packages.push(json!({
            "name": package.name,
            "version": unpacked.version,
            "sha256": unpacked.sha256,
            "licence": package.licence,
        }));
    }
    let settings = json!({
        "version": VERSION,
        "seed": options.seed,
        "n_clips": options.n_clips,
        "packages": packages,
        "min_track_s": min_track_s,
        "clip": options.clip,
        "split": options.split,
    });
    fs::create_dir_all(&options.out).map_err(Error::io(&options.out, "created"))?;
    let store = Store::open(&options.out, "fetch.json", &settings, &options.clip)?;

    let mut summary = Summary::default();
    let mut sources: Vec<Value> = Vec::new();
    // 1: which tracks are long enough
    let mut usable: Vec<(Track, f64)> = Vec::new();
    let durations: Vec<Result<f64>> = tracks
        .par_iter()
        .map(|t| if is_excluded(t).is_some() { Ok(0.0) } else { Ok(dragon_audio::read_duration_s(&t.path)?) })
        .collect();
    for (track, duration) in tracks.into_iter().zip(durations) {
        let refusal = match (&duration, is_excluded(&track)) {
            (_, Some(reason)) => Some(reason.to_string()),
            (Err(e), _) => {
                tracing::warn!("track left out: {e}");
                Some(e.to_string().lines().next().unwrap_or("").to_string())
            }
            (Ok(s), _) if *s < min_track_s => Some(format!("shorter than {min_track_s} s")),
            _ => None,
        };
        let duration = duration.unwrap_or(0.0);
        sources.push(json!({
            "package": track.package.name,
            "file": track.path.file_name().unwrap_or_default().to_string_lossy(),
            "sha256": track.sha256,
            "duration_s": (100.0 * duration).round() / 100.0,
            "title": track.tags.get("title"),
            "artist": track.tags.get("artist"),
            "left_out": refusal,
        }));
        match refusal {
            Some(reason) => {
                let reason =
                    if reason.starts_with("shorter") { reason } else { format!("track left out: {reason}") };
                *summary.refused.entry(reason).or_default() += 1;
            }
            None => usable.push((track, duration)),
        }
    }
    let text = serde_json::to_string_pretty(&json!({ "packages": packages, "tracks": sources }))
        .expect("sources are plain JSON")
        + "\n";
    let path = options.out.join("sources.json");
    dragon_audio::write::write_atomic(&path, text.as_bytes()).map_err(Error::io(&path, "written"))?;

    // 2: cut
    let total_s: f64 = usable.iter().map(|(_, s)| s).sum();
    let mut entries: Vec<Entry> = Vec::new();
    for batch in usable.chunks(rayon::current_num_threads().max(1) * 2) {
        if stop.load(Ordering::Relaxed) {
            summary.stopped = true;
            break;
        }
        let done: Vec<Result<Cut>> = batch
            .par_iter()
            .map(|(track, duration_s)| {
                let n = (options.n_clips as f64 * duration_s / total_s).round().max(1.0) as usize;
                cut(
                    track,
                    *duration_s,
                    n.min((duration_s / options.clip.exact_s()) as usize),
                    options,
                    &store,
                )
            })
            .collect();
        let mut fresh = Vec::new();
        for cut in done {
            let cut = cut?;
            summary.n_kept += cut.n_kept;
            for reason in cut.refused {
                *summary.refused.entry(reason.to_string()).or_default() += 1;
            }
            fresh.extend(cut.entries.iter().filter(|e| store.kept(&e.id).is_none()).cloned());
            summary.n_tracks += usize::from(!cut.entries.is_empty());
            entries.extend(cut.entries);
        }
        summary.minutes += batch.iter().map(|(_, s)| s / 60.0).sum::<f64>();
        store.append(&fresh)?;
        tracing::info!("cut {}/{} clips", entries.len(), options.n_clips);
    }
    if entries.is_empty() {
        return Err(Error::Nothing {
            what: "excerpts",
            path: options.cache.clone(),
            detail: format!("{:?}", summary.refused),
        });
    }
    entries.sort_by(|a, b| a.id.cmp(&b.id));
    store.finish(&entries)?;
    summary.n_clips = entries.len();
    Ok(summary)
}

/// The clips of one track.
#[derive(Default)]
struct Cut {
    entries: Vec<Entry>,
    refused: Vec<&'static str>,
    n_kept: usize,
}

/// Cuts `n` clips, one from each `n`th of the track.
fn cut(track: &Track, duration_s: f64, n: usize, options: &Options, store: &Store) -> Result<Cut> {
    let form = &options.clip;
    let rate_hz = form.sample_rate_hz;
    let plan: Vec<(String, f64)> = (0..n)
        .map(|k| {
            let id = format!("{}-{k:03}", track.id);
            let part_s = duration_s / n as f64;
            let slack_s = (part_s - form.exact_s()).max(0.0);
            let start_s = k as f64 * part_s + slack_s * Choices::new(options.seed, &id).uniform();
            (id, (start_s.min(duration_s - form.exact_s()) * 1000.0).floor() / 1000.0)
        })
        .collect();
    let kept: Vec<&Entry> = plan.iter().filter_map(|(id, _)| store.kept(id)).collect();
    if kept.len() == n {
        return Ok(Cut { entries: kept.into_iter().cloned().collect(), refused: Vec::new(), n_kept: n });
    }
    let audio = match dragon_audio::read_mono(&track.path, rate_hz) {
        Ok(audio) => audio,
        Err(error) => {
            tracing::warn!("track left out: {error}");
            return Ok(Cut { refused: vec!["track left out: damaged"], ..Cut::default() });
        }
    };
    let mut cut = Cut::default();
    for (id, start_s) in plan {
        if let Some(entry) = store.kept(&id) {
            cut.entries.push(entry.clone());
            cut.n_kept += 1;
            continue;
        }
        let from = (start_s * f64::from(rate_hz)) as usize;
        let Some(samples) = audio.samples.get(from..from + form.n_samples()) else {
            cut.refused.push("beyond the end");
            continue;
        };
        let mut samples = samples.to_vec();
        let gain_db = match form.level(&mut samples) {
            Ok(gain_db) => gain_db,
            Err(Refusal::Silent) => {
                cut.refused.push("silent");
                continue;
            }
            Err(Refusal::Clipped) => {
                cut.refused.push("clipped");
                continue;
            }
        };
        let centroid_hz = dragon_audio::spectral_centroid_hz(&samples, rate_hz).round();
        let mut choices = Choices::new(options.seed, &format!("{id}/caption"));
        let (caption, facts) = caption(track, centroid_hz, &mut choices);
        let path = format!("wav/{}/{id}.wav", track.package.name);
        form.store(&options.out.join(&path), samples)?;
        let mut attributes = facts;
        attributes.insert("package".into(), json!(track.package.name));
        attributes.insert("file".into(), json!(track.path.file_name().unwrap_or_default().to_string_lossy()));
        attributes.insert("artist".into(), json!(track.tags.get("artist")));
        attributes.insert("licence".into(), json!(track.package.licence));
        attributes.insert("spectral_centroid_hz".into(), json!(centroid_hz));
        attributes.insert("gain_db".into(), json!((100.0 * gain_db).round() / 100.0));
        cut.entries.push(Entry {
            id,
            piece: track.piece.clone(),
            path,
            start_s,
            duration_s: form.exact_s(),
            sample_rate_hz: rate_hz,
            caption,
            caption_source: CaptionSource::Metadata,
            split: options.split.split_of(&track.piece),
            corpus: Corpus::Recordings,
            attributes,
        });
    }
    Ok(cut)
}
