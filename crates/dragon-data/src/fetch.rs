//! Music from Debian packages: the inputs of [`crate::render`], and corpus "recordings".
//!
//! Packages are downloaded with `apt-get download` and unpacked with `dpkg-deb` and `tar`; nothing is installed.
//! The tune collections come inside the PyPI wheel of music21, downloaded with `pip download`. Versions and SHA-256 of
//! every package and track go to `sources.json`. Licences are those that the packages declare; the music stays local.
//!
//! Recordings are mixed to mono, resampled to 16 kHz, cut into 5.12 s clips spread evenly over all tracks, and brought
//! to -20 LUFS (peak at most 0.9). Captions are put together from titles, comments and folders: they describe the
//! track, not the excerpt. One measured word (bright or dark sounding, by spectral centroid) is about the excerpt.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::clips::{self, CLIP_S, CLIP_SAMPLES, Refusal, SAMPLE_RATE_HZ};
use crate::error::{Error, Result};
use crate::manifest::{CaptionSource, Corpus, Entry, split_of};
use crate::render::{Store, slug};
use crate::rng::{Choices, sha256_hex};

/// Version of the cutting and the captions: raised whenever the same seed would give other clips.
const VERSION: u32 = 2;

/// Tracks shorter than this are signals and stings, not music, seconds.
const MIN_TRACK_S: f64 = 25.0;

/// The package with the default soundfont (FluidR3, MIT) and its file.
const SOUNDFONT: (&str, &str) = ("fluid-soundfont-gm", "FluidR3_GM.sf2");

/// The wheel with the tune collections; pinned, since the corpus is made of it.
const TUNES: (&str, &str) = ("music21", "10.5.1");

/// A package of recorded music.
#[derive(Debug)]
struct Package {
    name: &'static str,
    /// Part of the path that tells music from effects.
    folder: &'static str,
    /// Licence as the package declares it.
    licence: &'static str,
    /// Style words for captions.
    styles: &'static [&'static str],
}

/// Five packages, five styles that can be told apart.
const PACKAGES: [Package; 5] = [
    Package {
        name: "wesnoth-1.16-music",
        folder: "/music/",
        licence: "GPL-2+",
        styles: &["orchestral", "symphonic", "orchestral fantasy", "cinematic orchestral"],
    },
    Package {
        name: "singularity-music",
        folder: "/music/",
        licence: "CC-BY-SA-3.0",
        styles: &["ambient electronic", "electronic", "ambient synthesizer", "science-fiction electronic"],
    },
    Package {
        name: "marsshooter-data",
        folder: "/audio/",
        licence: "CC-BY-SA-3.0",
        styles: &["metal", "female-fronted metal", "metal band", "heavy metal"],
    },
    Package {
        name: "supertux-data",
        folder: "/music/",
        licence: "GPL-2+",
        styles: &["video game", "platform game", "game level", "platform game"],
    },
    Package {
        name: "nexuiz-music",
        folder: "/cdtracks/",
        licence: "GPL-2+",
        styles: &["electronic", "techno", "electronic shooter game", "electronic dance"],
    },
];

/// Tracks left out, with the reason.
const EXCLUDED: [(&str, &str, &str); 2] = [
    ("supertux-data", "greatgigantic", "based on the theme of a commercial game"),
    ("singularity-music", "March Thee to Dis", "the same recording as Advanced Simulacra"),
];

/// Tracks that are versions of one composition, and the name they share as a piece, so that no split divides them.
const RELATED: [(&str, &str, &str); 13] = [
    ("supertux-data", "cave_old", "cave"),
    ("supertux-data", "fortress_old", "fortress"),
    ("supertux-data", "airship_2", "airship"),
    ("supertux-data", "airship_remix", "airship"),
    ("supertux-data", "beneath_the_rabbit_hole", "rabbit-holes"),
    ("supertux-data", "forest2", "rabbit-holes"),
    ("supertux-data", "ghostforest2", "ghostforest"),
    ("supertux-data", "ghostforest_map", "ghostforest"),
    ("supertux-data", "voc-daytime", "voc"),
    ("supertux-data", "voc-daytime2", "voc"),
    ("supertux-data", "voc-night", "voc"),
    ("nexuiz-music", "sixtyfour_", "sixtyfour"),
    ("nexuiz-music", "sixtyfour_revisited", "sixtyfour"),
];

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

/// A track and what its package says about it.
#[derive(Debug)]
struct Track {
    package: &'static Package,
    /// File.
    path: PathBuf,
    /// Unique name: package and file stem.
    id: String,
    /// Name that decides the split.
    piece: String,
    /// Folder the file lies in, such as "forest".
    world: String,
    tags: BTreeMap<String, String>,
    sha256: String,
}

/// Downloads the five packages, cuts their tracks, writes clips and manifest. `stop` (a Ctrl-C flag) is looked at
/// between tracks; what is done by then is kept and listed.
///
/// # Errors
/// If a program is missing or fails, the disk is full, or the folder holds clips of other settings.
pub fn recordings(options: &Options, stop: &AtomicBool) -> Result<Summary> {
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
    });
    fs::create_dir_all(&options.out).map_err(Error::io(&options.out, "created"))?;
    let store = Store::open(&options.out, "fetch.json", &settings)?;

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
            (Ok(s), _) if *s < MIN_TRACK_S => Some(format!("shorter than {MIN_TRACK_S} s")),
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
                cut(track, *duration_s, n.min((duration_s / CLIP_S) as usize), options, &store)
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
    let plan: Vec<(String, f64)> = (0..n)
        .map(|k| {
            let id = format!("{}-{k:03}", track.id);
            let part_s = duration_s / n as f64;
            let slack_s = (part_s - CLIP_S).max(0.0);
            let start_s = k as f64 * part_s + slack_s * Choices::new(options.seed, &id).uniform();
            (id, (start_s.min(duration_s - CLIP_S) * 1000.0).floor() / 1000.0)
        })
        .collect();
    let kept: Vec<&Entry> = plan.iter().filter_map(|(id, _)| store.kept(id)).collect();
    if kept.len() == n {
        return Ok(Cut { entries: kept.into_iter().cloned().collect(), refused: Vec::new(), n_kept: n });
    }
    let audio = match dragon_audio::read_mono(&track.path, SAMPLE_RATE_HZ) {
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
        let from = (start_s * f64::from(SAMPLE_RATE_HZ)) as usize;
        let Some(samples) = audio.samples.get(from..from + CLIP_SAMPLES) else {
            cut.refused.push("beyond the end");
            continue;
        };
        let mut samples = samples.to_vec();
        let gain_db = match clips::level(&mut samples) {
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
        let centroid_hz = dragon_audio::spectral_centroid_hz(&samples, SAMPLE_RATE_HZ).round();
        let mut choices = Choices::new(options.seed, &format!("{id}/caption"));
        let (caption, facts) = caption(track, centroid_hz, &mut choices);
        let path = format!("wav/{}/{id}.wav", track.package.name);
        clips::store(&options.out.join(&path), samples)?;
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
            duration_s: CLIP_S,
            sample_rate_hz: SAMPLE_RATE_HZ,
            caption,
            caption_source: CaptionSource::Metadata,
            split: split_of(&track.piece),
            corpus: Corpus::Recordings,
            attributes,
        });
    }
    Ok(cut)
}

/// A caption from what the package says about the track, and one measured word.
fn caption(track: &Track, centroid_hz: f64, choices: &mut Choices) -> (String, Map<String, Value>) {
    let style = match (track.package.name, track.world.as_str()) {
        ("supertux-data", "retro") => {
            *choices.pick(&["retro game", "retro chiptune", "old-school video game"])
        }
        _ => *choices.pick(track.package.styles),
    };
    let noun = *choices.pick(&["music", "track", "piece", "soundtrack", "music", "instrumental"]);
    let is_sung = track.package.name == "marsshooter-data"; // a band with a singer
    let noun = if is_sung && noun == "instrumental" { "song" } else { noun };
    let title = track.tags.get("title").map(|t| tidy_title(t)).filter(|t| !t.is_empty());
    let purpose = track
        .tags
        .get("description")
        .or(track.tags.get("comment"))
        .and_then(|c| purpose(c))
        .or_else(|| world_words(&track.world).map(str::to_string));
    // about a quarter of the corpus lies below, a fifth above; measured on the corpus itself
    let shade = match centroid_hz {
        c if c < 1100.0 => Some("dark-sounding"),
        c if c > 2030.0 => Some("bright-sounding"),
        _ => None,
    };
    let vocals = is_sung
        .then(|| *choices.pick(&["with female vocals", "with a female singer", "with a woman singing"]));

    let mut words = String::new();
    let mut said = Vec::new();
    if let Some(shade) = shade.filter(|_| choices.chance(0.5)) {
        words += &format!("{shade} ");
        said.push("shade");
    }
    words += &format!("{style} {noun}");
    if let Some(vocals) = vocals.filter(|_| choices.chance(0.7)) {
        words += &format!(" {vocals}");
        said.push("vocals");
    }
    if let Some(purpose) = purpose.as_ref().filter(|_| choices.chance(0.6)) {
        words += &format!(" {purpose}");
        said.push("purpose");
    }
    if let Some(title) = title.as_ref().filter(|_| choices.chance(0.5)) {
        words = match choices.below(4) {
            0 => format!("{words}, called {title}"),
            1 => format!("{title}: {words}"),
            2 => format!("{words} titled {title}"),
            _ => format!("{words}, {title}"),
        };
        said.push("title");
    }
    let n = words.split_whitespace().count();
    let caption = if n > crate::caption::MAX_WORDS {
        words.split_whitespace().take(crate::caption::MAX_WORDS).collect::<Vec<_>>().join(" ")
    } else {
        words
    };
    let facts =
        json!({ "style": style, "title": title, "purpose": purpose, "world": track.world, "said": said });
    match facts {
        Value::Object(map) => (caption, map),
        _ => unreachable!("an object was written"),
    }
}

/// "Gameplay music, intended for use in underground scenarios" is "for underground scenarios".
fn purpose(comment: &str) -> Option<String> {
    let comment = comment.to_lowercase();
    let (_, rest) = comment.split_once("for use in ").or_else(|| comment.split_once("for "))?;
    if let Some((_, faction)) = comment.split_once("associated with ") {
        return Some(format!("for {faction}"));
    }
    (!rest.trim().is_empty() && !comment.contains("formerly")).then(|| format!("for {}", rest.trim()))
}

/// Words for a folder of levels.
fn world_words(world: &str) -> Option<&'static str> {
    Some(match world {
        "forest" => "for a forest level",
        "antarctic" => "for an icy level",
        "castle" => "for a castle level",
        "tropical" => "for a tropical level",
        _ => return None,
    })
}

/// Title without addresses, versions in brackets and file endings.
fn tidy_title(title: &str) -> String {
    let title = title.split(" (").next().unwrap_or(title);
    let title = title.trim_end_matches(".mp3").replace(['_', '"'], " ");
    let words = title.split(|c: char| c.is_whitespace()).filter(|w| !w.is_empty() && !w.contains("www."));
    words.collect::<Vec<_>>().join(" ")
}

fn is_excluded(track: &Track) -> Option<&'static str> {
    let stem = track.path.file_stem().unwrap_or_default().to_string_lossy();
    EXCLUDED.iter().find(|(p, s, _)| *p == track.package.name && *s == stem).map(|(_, _, reason)| *reason)
}

/// The music files of an unpacked package, sorted.
fn find_tracks(package: &'static Package, folder: &Path) -> Result<Vec<Track>> {
    for pk3 in walk(folder)?.iter().filter(|p| p.extension().is_some_and(|e| e == "pk3")) {
        unzip_tracks(pk3)?;
    }
    let mut files: Vec<PathBuf> = walk(folder)?
        .into_iter()
        .filter(|p| p.extension().is_some_and(|e| e == "ogg") && p.to_string_lossy().contains(package.folder))
        .collect();
    files.sort();
    let mut seen = HashSet::new();
    let mut tracks = Vec::new();
    for path in files {
        let bytes = fs::read(&path).map_err(Error::io(&path, "read"))?;
        let sha256 = sha256_hex(&bytes);
        if !seen.insert(sha256.clone()) {
            continue; // the same file twice
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_string();
        let related =
            RELATED.iter().find(|(p, s, _)| *p == package.name && *s == stem).map(|(_, _, shared)| *shared);
        let mut tags = BTreeMap::new();
        for (key, value) in dragon_audio::read_tags(&path).unwrap_or_default() {
            if !value.trim().is_empty() {
                tags.entry(key).or_insert(value.trim().to_string());
            }
        }
        let world = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().to_string();
        tracks.push(Track {
            package,
            id: format!("{}-{}", package.name.replace('.', "_"), slug(&stem)),
            piece: format!("{}/{}", package.name, related.map_or_else(|| slug(&stem), str::to_string)),
            path,
            world,
            tags,
            sha256,
        });
    }
    if tracks.is_empty() {
        return Err(Error::Nothing {
            what: "tracks",
            path: folder.to_path_buf(),
            detail: format!("no *.ogg below `{}`", package.folder),
        });
    }
    Ok(tracks)
}

/// Unzips the Ogg files of a game archive beside it.
fn unzip_tracks(archive: &Path) -> Result<()> {
    let damaged = |detail: String| Error::Input { what: "archive", path: archive.to_path_buf(), detail };
    let file = fs::File::open(archive).map_err(Error::io(archive, "read"))?;
    let mut zip = zip::ZipArchive::new(file).map_err(|e| damaged(e.to_string()))?;
    for i in 0..zip.len() {
        let mut member = zip.by_index(i).map_err(|e| damaged(e.to_string()))?;
        let Some(inside) = member.enclosed_name().filter(|n| n.extension().is_some_and(|e| e == "ogg"))
        else {
            continue;
        };
        let to = archive.with_extension("").join(inside);
        if to.exists() {
            continue;
        }
        let parent = to.parent().unwrap_or(archive);
        fs::create_dir_all(parent).map_err(Error::io(parent, "created"))?;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut member, &mut bytes).map_err(Error::io(archive, "read"))?;
        dragon_audio::write::write_atomic(&to, &bytes).map_err(Error::io(&to, "written"))?;
    }
    Ok(())
}

/// An unpacked package.
struct Unpacked {
    folder: PathBuf,
    version: String,
    sha256: String,
}

/// Downloads and unpacks a Debian package in `cache`, each unless done already.
fn unpack(cache: &Path, name: &str) -> Result<Unpacked> {
    const HINT: &str = "Debian's apt-get, dpkg-deb and tar are needed (run `apt-get update` once); \
        or place the package's .deb file in the cache yourself";
    fs::create_dir_all(cache).map_err(Error::io(cache, "created"))?;
    let deb = match find(cache, &format!("{name}_"), ".deb")? {
        Some(deb) => deb,
        None => {
            tracing::info!("downloading {name}");
            run(Command::new("apt-get").args(["download", "--quiet", name]).current_dir(cache), HINT)?;
            find(cache, &format!("{name}_"), ".deb")?.ok_or_else(|| Error::Missing {
                what: "package",
                path: cache.join(name),
                hint: HINT,
            })?
        }
    };
    let bytes = fs::read(&deb).map_err(Error::io(&deb, "read"))?;
    let sha256 = sha256_hex(&bytes);
    drop(bytes);
    let file_name = deb.file_name().unwrap_or_default().to_string_lossy().to_string();
    let version = file_name.split('_').nth(1).unwrap_or("").replace("%3a", ":");
    let folder = cache.join(format!("{name}-{}", &sha256[..12]));
    if !folder.exists() {
        let partial = cache.join(format!("{name}-{}.tmp", &sha256[..12]));
        let _ = fs::remove_dir_all(&partial); // left by an interrupted run; an absent one is as good
        fs::create_dir_all(&partial).map_err(Error::io(&partial, "created"))?;
        let failed =
            |command: &str, detail: String| Error::Program { command: command.into(), detail, hint: HINT };
        let mut dpkg = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&deb)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| failed("dpkg-deb", e.to_string()))?;
        let stream = dpkg.stdout.take().expect("its output is piped");
        run(Command::new("tar").arg("-x").arg("-C").arg(&partial).stdin(stream), HINT)?;
        let status = dpkg.wait().map_err(|e| failed("dpkg-deb", e.to_string()))?;
        if !status.success() {
            return Err(failed(
                "dpkg-deb --fsys-tarfile",
                format!("{status}; is `{}` whole?", deb.display()),
            ));
        }
        fs::rename(&partial, &folder).map_err(Error::io(&folder, "written"))?;
    }
    Ok(Unpacked { folder, version, sha256 })
}

/// Runs a program to its end.
fn run(command: &mut Command, hint: &'static str) -> Result<()> {
    let name = format!("{command:?}").replace('"', "");
    let output = command.stdout(Stdio::null()).output().map_err(|e| Error::Program {
        command: name.clone(),
        detail: e.to_string(),
        hint,
    })?;
    if output.status.success() {
        return Ok(());
    }
    let messages = String::from_utf8_lossy(&output.stderr);
    let last = messages.lines().last().unwrap_or("no message");
    Err(Error::Program { command: name, detail: format!("{}: {last}", output.status), hint })
}

/// The file in `folder` with this beginning and end; the last by name if there are several.
fn find(folder: &Path, prefix: &str, suffix: &str) -> Result<Option<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .map_err(Error::io(folder, "read"))?
        .filter_map(|item| item.ok())
        .filter(|item| {
            let name = item.file_name();
            let name = name.to_string_lossy();
            name.starts_with(prefix) && name.ends_with(suffix)
        })
        .map(|item| item.path())
        .collect();
    found.sort();
    Ok(found.pop())
}

/// All files below a folder; links are not followed.
fn walk(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(&folder).map_err(Error::io(&folder, "read"))? {
            let item = item.map_err(Error::io(&folder, "read"))?;
            let kind = item.file_type().map_err(Error::io(&folder, "read"))?;
            if kind.is_dir() {
                folders.push(item.path());
            } else if kind.is_file() {
                files.push(item.path());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_become_purposes() {
        let cases = [
            ("Gameplay music, intended for use in underground scenarios", Some("for underground scenarios")),
            ("Gameplay music, intended for tragic love scenes", Some("for tragic love scenes")),
            ("Gameplay music, originally from Northern Rebirth", None),
            ("Formerly the main menu music of Battle For Wesnoth, now mood music", None),
            ("http://www.dougkaufman.net", None),
        ];
        for (comment, want) in cases {
            assert_eq!(purpose(comment).as_deref(), want, "{comment}");
        }
    }

    #[test]
    fn titles_are_tidied() {
        assert_eq!(tidy_title("SixtyFour_Revisited"), "SixtyFour Revisited");
        assert_eq!(tidy_title("The Cave (Milestone 2 Version)"), "The Cave");
        assert_eq!(tidy_title("elysis-subcities.mp3"), "elysis-subcities");
    }

    #[test]
    fn a_damaged_package_is_named_and_leaves_nothing_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("some-music_1.0_all.deb"), b"not a package").unwrap();
        let error = unpack(dir.path(), "some-music").err().expect("no package");
        assert!(matches!(error, Error::Program { .. }), "{error}");
        let names: Vec<_> = walk(dir.path()).unwrap();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn archives_cannot_write_outside_their_folder() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("music.pk3");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        for name in ["sound/cdtracks/a.ogg", "../evil.ogg", "sound/readme.txt"] {
            zip.start_file(name, options).unwrap();
            zip.write_all(b"OggS").unwrap();
        }
        zip.finish().unwrap();
        unzip_tracks(&path).unwrap();
        assert!(dir.path().join("music/sound/cdtracks/a.ogg").exists());
        assert_eq!(walk(dir.path()).unwrap().len(), 2, "the archive and one track");
    }
}
