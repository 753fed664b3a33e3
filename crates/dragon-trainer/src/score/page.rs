//! The files of a scoring: report, tables, and what they are made of.

use std::fs;
use std::path::Path;

use dragon_metrics::{Rows, pca};

use super::measure::Measured;
use super::summary::{ScoredSong, Summary};
use super::{Reference, ScoreConfig, System};
use crate::error::{Error, Result};
use crate::eval::number;
use crate::report::{Chart, Point, Report, Series, Song, Table, Take, as_in_config};
use crate::run::{RunContext, write_atomic};
use crate::sets::Set;

/// Longest audio of a song in the report, s; the rest is cut, which keeps the page small.
const LONGEST_S: f64 = 30.0;
/// Highest sample rate of audio in the report, Hz.
const HIGHEST_RATE_HZ: u32 = 24_000;
/// Most points of a set on the map; a larger set is thinned evenly.
const MAP_POINTS: usize = 1000;
/// Songs in the report's table, shared among the systems, each of which has at least three.
const SONGS_SHOWN: usize = 24;

/// Writes `report.json`, `report.html`, `systems.csv` and `songs.csv`.
pub(super) fn write(
    cfg: &ScoreConfig,
    summary: &Summary,
    reference: Option<&Reference>,
    systems: &[System],
    found: &[Vec<Measured>],
    ctx: &RunContext,
) -> Result<()> {
    let page = page(cfg, summary, reference, systems, found, ctx)?;
    let dir = &ctx.out_dir;
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let json = serde_json::to_vec_pretty(summary).map_err(|err| Error::Bug(err.to_string()))?;
    write_atomic(&dir.join("report.json"), &json)?;
    write_atomic(&dir.join("systems.csv"), summary.systems_csv().as_bytes())?;
    write_atomic(&dir.join("songs.csv"), summary.songs_csv().as_bytes())?;
    page.write(&dir.join("report.html"))
}

fn page(
    cfg: &ScoreConfig,
    summary: &Summary,
    reference: Option<&Reference>,
    systems: &[System],
    found: &[Vec<Measured>],
    ctx: &RunContext,
) -> Result<Report> {
    let lead = summary.values.first().map_or(String::new(), |first| {
        let spread = first
            .interval
            .map_or(String::new(), |i| format!(" (95 %: {} to {})", number(i.low), number(i.high)));
        let better = if first.lower_is_better { "lower" } else { "higher" };
        match systems.len() {
            1 => format!("{}: {}{spread}; {better} is better.", first.metric, number(first.value)),
            n => format!(
                "Best of {n} by {}: {} with {}{spread}; {better} is better.",
                first.metric,
                first.system,
                number(first.value)
            ),
        }
    });
    let mut tables = vec![summary.table_of_values()];
    let of_each = (SONGS_SHOWN / systems.len().max(1)).clamp(3, 10);
    let songs = summary.table_of_songs(of_each);
    if !songs.rows.is_empty() {
        let note = format!("{} At most {of_each} of each system; all are in songs.csv.", songs.note);
        tables.push(Table { title: "Outliers".into(), note, ..songs });
    }
    if !summary.skipped.is_empty() {
        let rows =
            summary.skipped.iter().map(|s| vec![s.file.display().to_string(), s.reason.clone()]).collect();
        let head = vec!["file".into(), "what is wrong with it".into()];
        tables.push(Table { title: "Left out".into(), note: String::new(), head, rows });
    }
    Ok(Report {
        title: "Score".into(),
        lead,
        facts: facts(summary, ctx),
        tables,
        charts: charts(summary, reference, systems, found)?,
        songs: outliers(cfg, summary, systems),
        appendix: Vec::new(),
    })
}

fn facts(summary: &Summary, ctx: &RunContext) -> Vec<(String, String)> {
    let mut facts = vec![("command".into(), ctx.command.clone()), ("commit".into(), ctx.commit.clone())];
    if let Some(reference) = &summary.reference {
        let what = match (&reference.unit, reference.n_songs, reference.n_rows) {
            (Some(unit), Some(songs), Some(rows)) if songs != rows => {
                format!("{songs} {unit}, {rows} embeddings")
            }
            (Some(unit), Some(songs), _) => format!("{songs} {unit}"),
            (.., Some(rows)) => format!("statistics of {rows} embeddings"),
            _ => "statistics".into(),
        };
        facts.push((
            "reference".into(),
            format!("{} ({what} of dimension {})", reference.name, reference.dim),
        ));
    }
    for system in &summary.systems {
        let what = match system.songs.len() {
            n if n == system.n_rows => format!("{n} {}", system.unit),
            n => format!("{n} {}, {} embeddings", system.unit, system.n_rows),
        };
        facts.push(("system".into(), format!("{} ({what})", system.name)));
    }
    if let (Some(encoder), Some(setting)) = (&summary.encoder, &summary.setting) {
        facts.push(("encoder".into(), encoder.clone()));
        facts.push(("setting".into(), as_in_config(setting)));
    }
    facts.push(("convention".into(), summary.convention.name().into()));
    facts.push(("seed".into(), summary.seed.to_string()));
    facts.extend(summary.left_out.iter().map(|line| ("not measured".into(), line.clone())));
    facts
}

fn charts(
    summary: &Summary,
    reference: Option<&Reference>,
    systems: &[System],
    found: &[Vec<Measured>],
) -> Result<Vec<Chart>> {
    let mut charts: Vec<Chart> = map(reference, systems)?.into_iter().collect();
    for m in 0..found.first().map_or(0, Vec::len) {
        let first = &found[0][m];
        let of = |values: &dyn Fn(&Measured) -> Option<Vec<f64>>| -> Vec<(String, Vec<f64>)> {
            let named = systems.iter().zip(found);
            named.filter_map(|(system, found)| Some((system.name.clone(), values(&found[m])?))).collect()
        };
        let better = if first.lower_is_better { "lower is better" } else { "higher is better" };
        let songs = of(&|measured| measured.songs.clone());
        if !songs.is_empty() {
            charts.push(Chart::Histogram {
                title: format!("{} of the songs", first.name),
                x_label: format!("{} of a song, {better}", first.name),
                series: songs,
            });
        }
        let drawn = of(&|measured| {
            let draws = measured.draws.as_ref()?;
            let bias = draws.iter().sum::<f64>() / draws.len() as f64 - measured.value;
            Some(draws.iter().map(|x| (x - bias).clamp(measured.range.0, measured.range.1)).collect())
        });
        if !drawn.is_empty() {
            let of_songs = if first.songs.is_some() { "mean " } else { "" };
            charts.push(Chart::Histogram {
                title: format!("{of_songs}{} on {} draws of the songs", first.name, summary.subsets),
                x_label: format!("{}, {better}", first.name),
                series: drawn,
            });
        }
        let lines: Vec<Series> = systems
            .iter()
            .zip(found)
            .filter_map(|(system, found)| {
                let line = found[m].line.as_ref()?;
                let points = line.points.iter().map(|&(n, y)| (1.0 / n as f64, y));
                let at_infinity = std::iter::once((0.0, line.score));
                Some(Series { name: system.name.clone(), points: at_infinity.chain(points).collect() })
            })
            .collect();
        if !lines.is_empty() {
            charts.push(Chart::Lines {
                title: "FAD of growing sets; at 0 what infinitely many rows would have".into(),
                x_label: "1 / rows".into(),
                y_label: "FAD".into(),
                series: lines,
                log_y: false,
            });
        }
    }
    Ok(charts)
}

/// Name and mean embedding of songs.
type Means = Vec<(String, Vec<f64>)>;

/// The songs' mean embeddings along the two axes on which they, and the reference's, vary most.
fn map(reference: Option<&Reference>, systems: &[System]) -> Result<Option<Chart>> {
    let mut sets: Vec<(&str, Means)> = Vec::new();
    for system in systems {
        sets.push((&system.name, means(&system.set)?));
    }
    let known = reference.and_then(|reference| reference.set.as_ref().map(|(set, _)| (reference, set)));
    if let Some((reference, set)) = known {
        sets.push((&reference.info.name, means(set)?));
    }
    let rows: Vec<&Vec<f64>> =
        sets.iter().flat_map(|(_, songs)| songs.iter().map(|(_, mean)| mean)).collect();
    let all = Rows::from_vecs(&rows).map_err(Error::input("cannot draw the map"))?;
    if all.dim() < 2 {
        return Ok(None);
    }
    let axes = pca(&all, 2).map_err(Error::input("cannot draw the map"))?;
    let place = |(name, mean): &(String, Vec<f64>)| -> Result<Point> {
        let at = axes.project(mean).map_err(Error::input("cannot draw the map"))?;
        Ok(Point { x: at[0], y: at[1], label: name.clone() })
    };
    let mut series = Vec::new();
    for (i, (name, songs)) in sets.iter().enumerate() {
        // A system may be the reference itself.
        let name = if i == systems.len() { format!("{name} (reference)") } else { (*name).to_owned() };
        series.push((name, songs.iter().map(place).collect::<Result<Vec<_>>>()?));
    }
    if let (Some(reference), None) = (reference, known) {
        let name = format!("{} (mean of the reference)", reference.info.name);
        series.push((name.clone(), vec![place(&(name, reference.gaussian.mean().to_vec()))?]));
    }
    let axis = |i: usize| format!("axis {} ({:.0} % of the variance)", i + 1, 100.0 * axes.shares[i]);
    Ok(Some(Chart::Points {
        title: "Map of the songs (mean embeddings)".into(),
        x_label: axis(0),
        y_label: axis(1),
        series,
    }))
}

/// Name and mean of songs, evenly thinned where there are many.
fn means(set: &Set) -> Result<Means> {
    let n = set.songs.len();
    let kept = n.min(MAP_POINTS);
    let songs = (0..kept).map(|i| &set.songs[i * n / kept]);
    songs
        .map(|song| Ok((song.name.clone(), song.rows.mean().map_err(Error::input("cannot draw the map"))?)))
        .collect()
}

/// The worst songs of each system, and for comparison the best, with audio.
fn outliers(cfg: &ScoreConfig, summary: &Summary, systems: &[System]) -> Vec<Song> {
    let by = if summary.has_distances() {
        "farthest from the reference, by per-song FAD"
    } else {
        "least like their prompts, by CLAP score"
    };
    let mut all = Vec::new();
    for (info, system) in summary.systems.iter().zip(systems) {
        let songs = info.worst_first();
        let n = cfg.outliers.min(songs.len());
        let mut takes: Vec<Take> =
            (0..n).filter_map(|i| take(system, songs[i], &format!("no. {}", i + 1))).collect();
        takes.extend(songs[n..].last().filter(|_| n > 0).and_then(|best| take(system, best, "best")));
        if !takes.is_empty() {
            all.push(Song { caption: format!("{}: {by}", info.name), takes });
        }
    }
    all
}

/// A song to listen to, if its audio is there.
fn take(system: &System, scored: &ScoredSong, place: &str) -> Option<Take> {
    let file = system.set.songs.iter().find(|song| song.name == scored.name)?.file.as_deref()?;
    let (samples, sample_rate_hz, duration_s) = excerpt(file)
        .inspect_err(|err| tracing::warn!("the report lacks the audio of a song: {err}"))
        .ok()?;
    let score = scored.per_song_fad.or(scored.clap_score).map_or(String::new(), number);
    let cut = if duration_s > LONGEST_S {
        format!(", first {LONGEST_S:.0} of {duration_s:.0} s")
    } else {
        String::new()
    };
    let note = format!("{place}: {score}{cut}");
    Some(Take { label: scored.name.clone(), samples, sample_rate_hz, note })
}

/// The start of a song at a rate that keeps the page small; and how long the song is.
fn excerpt(file: &Path) -> dragon_audio::Result<(Vec<f32>, u32, f64)> {
    let mut clip = dragon_audio::read(file)?.to_mono();
    let duration_s = clip.duration_s();
    clip.samples.truncate((LONGEST_S * f64::from(clip.sample_rate_hz)) as usize);
    if clip.sample_rate_hz > HIGHEST_RATE_HZ {
        clip = clip.resample(HIGHEST_RATE_HZ)?;
    }
    Ok((clip.samples, clip.sample_rate_hz, duration_s))
}
