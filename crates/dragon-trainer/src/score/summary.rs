//! What a scoring found, ranked, and its tables.

use std::fmt::Write as _;

use dragon_metrics::bootstrap::percentile;
use dragon_metrics::{Convention, FadInf};
use serde::{Deserialize, Serialize};

use super::measure::Measured;
use super::{Reference, ScoreConfig, System};
use crate::embed::Skipped;
use crate::embedder::Setting;
use crate::eval::number;
use crate::report::Table;
use crate::song_encoder::SongEncoder;

/// What a scoring found; written to `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The reference, if there is one.
    pub reference: Option<ReferenceInfo>,
    /// What embedded audio and texts; `None` where all embeddings were read.
    pub encoder: Option<String>,
    /// How songs were cut; `None` as above.
    pub setting: Option<Setting>,
    /// How embeddings became a Gaussian.
    pub convention: Convention,
    /// Seed of the songs drawn anew.
    pub seed: u64,
    /// How often they were drawn: subset `s` is `dragon_metrics::bootstrap_indices(seed, subsets, n, n)[s]`, `n` the
    /// number of songs, in the order of their names.
    pub subsets: usize,
    /// The systems by name.
    pub systems: Vec<SystemInfo>,
    /// Metric after metric, best system first.
    pub values: Vec<RankedValue>,
    /// Metrics that were not measured, and why.
    pub left_out: Vec<String>,
    /// What to keep in mind when reading the numbers.
    pub warnings: Vec<String>,
    /// Files left out, and why.
    pub skipped: Vec<Skipped>,
}

/// The reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReferenceInfo {
    /// Its path.
    pub name: String,
    /// `songs`, `rows` or `texts`; `None` for statistics.
    pub unit: Option<String>,
    /// How many of them.
    pub n_songs: Option<usize>,
    /// Embeddings, where known.
    pub n_rows: Option<usize>,
    /// Length of an embedding.
    pub dim: usize,
}

/// A system.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SystemInfo {
    /// Its path.
    pub name: String,
    /// `songs`, `rows` or `texts`.
    pub unit: String,
    /// Embeddings.
    pub n_rows: usize,
    /// The songs in the order of their names.
    pub songs: Vec<ScoredSong>,
}

/// A song of a system.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoredSong {
    /// Path inside its folder, with the ending.
    pub name: String,
    /// Embeddings.
    pub n_rows: usize,
    /// Its own distance to the reference, if that was measured.
    pub per_song_fad: Option<f64>,
    /// Its agreement with its prompt, if that was measured.
    pub clap_score: Option<f64>,
}

/// A metric of a system.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankedValue {
    /// The metric.
    pub metric: String,
    /// Whether it is a distance.
    pub lower_is_better: bool,
    /// 1 for the best system by this metric; equal values share a rank.
    pub rank: usize,
    /// The system.
    pub system: String,
    /// On all songs.
    pub value: f64,
    /// On songs drawn anew.
    pub interval: Option<Interval>,
    /// Against the best system by this metric; `None` for that system.
    pub behind: Option<Difference>,
    /// FAD-infinity's line.
    pub line: Option<FadInf>,
}

/// Spread of a value over songs drawn anew, with replacement.
///
/// A drawn set has fewer different songs than the system, which alone raises a distance and lowers a diversity. `low` and
/// `high` are the percentiles moved by that bias, so that they lie around the value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end of the 95 % interval: 2.5 % percentile of the draws, plus value minus mean.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Mean of the draws.
    pub mean: f64,
    /// Their standard deviation: the standard error of the value.
    pub std: f64,
    /// 2.5 % percentile as it is.
    pub percentile_low: f64,
    /// 97.5 % percentile as it is.
    pub percentile_high: f64,
}

/// How much a system's value is above the best one's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Value minus that of the best system.
    pub value: f64,
    /// Its spread over the draws, which both systems share where they have equally many songs.
    pub interval: Option<Interval>,
}

impl Interval {
    fn of(value: f64, draws: &[f64], range: (f64, f64)) -> Option<Self> {
        let n = draws.len() as f64;
        let mean = draws.iter().sum::<f64>() / n;
        let square: f64 = draws.iter().map(|x| (x - mean).powi(2)).sum();
        let (percentile_low, percentile_high) =
            (percentile(draws, 0.025).ok()?, percentile(draws, 0.975).ok()?);
        let moved = |x: f64| (x + value - mean).clamp(range.0, range.1);
        let (low, high) = (moved(percentile_low), moved(percentile_high));
        let std = (square / (n - 1.0)).sqrt();
        Some(Self { low, high, mean, std, percentile_low, percentile_high })
    }

    /// `low to high`.
    fn text(&self) -> String {
        format!("{} to {}", number(self.low), number(self.high))
    }
}

impl Summary {
    /// Ranks what was measured; `found` has for each of `systems` the same metrics in the same order.
    pub(super) fn new(
        cfg: &ScoreConfig,
        reference: Option<&Reference>,
        encoder: Option<&SongEncoder>,
        systems: &[System],
        found: &[Vec<Measured>],
        left_out: Vec<String>,
        skipped: Vec<Skipped>,
    ) -> Self {
        let mut values = Vec::new();
        let n_metrics = found.first().map_or(0, Vec::len);
        let by_metric =
            (0..n_metrics).map(|m| found.iter().map(|of_system| &of_system[m]).collect::<Vec<_>>());
        for all in by_metric {
            let of = |s: usize| all[s];
            let mut order: Vec<usize> = (0..systems.len()).collect();
            let sign = if of(0).lower_is_better { 1.0 } else { -1.0 };
            order.sort_by(|&a, &b| (sign * of(a).value).total_cmp(&(sign * of(b).value)));
            let best = of(order[0]);
            let mut rank = 0;
            for (place, &s) in order.iter().enumerate() {
                let measured = of(s);
                if place == 0 || measured.value != of(order[place - 1]).value {
                    rank = place + 1;
                }
                let any = (f64::NEG_INFINITY, f64::INFINITY);
                let difference = measured.value - best.value;
                let draws = measured.draws.as_ref().zip(best.draws.as_ref());
                let draws: Option<Vec<f64>> =
                    draws.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a - b).collect());
                let behind = (place > 0).then(|| Difference {
                    value: difference,
                    interval: draws.and_then(|draws| Interval::of(difference, &draws, any)),
                });
                values.push(RankedValue {
                    metric: measured.name.clone(),
                    lower_is_better: measured.lower_is_better,
                    rank,
                    system: systems[s].name.clone(),
                    value: measured.value,
                    interval: measured
                        .draws
                        .as_ref()
                        .and_then(|draws| Interval::of(measured.value, draws, measured.range)),
                    behind,
                    line: measured.line.clone(),
                });
            }
        }
        let infos: Vec<SystemInfo> = systems
            .iter()
            .zip(found)
            .map(|(system, found)| {
                let scores = |metric: &str| {
                    found.iter().find(|measured| measured.name == metric).and_then(|m| m.songs.as_ref())
                };
                let (fads, claps) = (scores("per-song FAD"), scores("CLAP score"));
                let songs = system.set.songs.iter().enumerate().map(|(i, song)| ScoredSong {
                    name: song.name.clone(),
                    n_rows: song.rows.n(),
                    per_song_fad: fads.map(|scores| scores[i]),
                    clap_score: claps.map(|scores| scores[i]),
                });
                SystemInfo {
                    name: system.name.clone(),
                    unit: system.set.unit.plural().into(),
                    n_rows: system.rows.n(),
                    songs: songs.collect(),
                }
            })
            .collect();
        let mut summary = Self {
            reference: reference.map(|reference| reference.info.clone()),
            encoder: encoder.map(|encoder| encoder.id().to_owned()),
            setting: encoder.map(|_| cfg.setting),
            convention: cfg.convention,
            seed: cfg.seed,
            subsets: cfg.subsets,
            systems: infos,
            values,
            left_out,
            warnings: Vec::new(),
            skipped,
        };
        summary.warnings = summary.caveats(cfg);
        summary
    }

    /// What speaks against taking the numbers as they are.
    fn caveats(&self, cfg: &ScoreConfig) -> Vec<String> {
        let has = |metric: &str| self.values.iter().any(|value| value.metric == metric);
        let has_vendi = self.values.iter().any(|value| value.metric.starts_with("Vendi"));
        let mut out = Vec::new();
        let sizes: Vec<usize> = self.systems.iter().map(|system| system.n_rows).collect();
        let (least, most) =
            (sizes.iter().min().copied().unwrap_or(0), sizes.iter().max().copied().unwrap_or(0));
        if least != most && (has("FAD") || has_vendi) {
            out.push(format!(
                "the systems have {least} to {most} embeddings: FAD falls and Vendi rises with their number alone; compare \
                 sets of equal size, or by KAD or FAD-infinity"
            ));
        }
        if let (true, Some(reference)) = (has("FAD"), &self.reference)
            && let Some(system) = self.systems.iter().find(|system| system.n_rows <= reference.dim)
        {
            out.push(format!(
                "`{}` has {} embeddings of dimension {}: its FAD is far above that of more songs; compare sets of equal size only",
                system.name, system.n_rows, reference.dim
            ));
        }
        for system in self.systems.iter().filter(|system| system.unit == "rows") {
            out.push(format!(
                "in `{}` each embedding was taken for a song: where several are of one song, the intervals are too narrow",
                system.name
            ));
        }
        for value in self.values.iter() {
            let Some(line) = &value.line else { continue };
            let n_rows = self.systems.iter().find(|s| s.name == value.system).map_or(0, |s| s.n_rows);
            if n_rows < cfg.fad_inf.min_rows {
                out.push(format!(
                    "FAD-infinity of `{}` starts at {} rows, but there are {n_rows}: lower fad_inf.min_rows",
                    value.system, cfg.fad_inf.min_rows
                ));
            } else if line.r2 < 0.9 {
                out.push(format!(
                    "FAD-infinity of `{}` lies on a line that explains {:.0} % of the variance: it says little",
                    value.system,
                    100.0 * line.r2
                ));
            }
        }
        out
    }

    /// Head and rows of the ranked table.
    pub(super) fn table_of_values(&self) -> Table {
        let head = ["metric", "better", "rank", "system", "value", "95 %", "against the first (95 %)"];
        let rows = self.values.iter().enumerate().map(|(i, v)| {
            let first = i == 0 || self.values[i - 1].metric != v.metric;
            let value = match &v.line {
                Some(line) => format!("{} (R² {:.3})", number(v.value), line.r2),
                None => number(v.value),
            };
            let behind = match &v.behind {
                None => String::new(),
                Some(Difference { value, interval: None }) => number(*value),
                Some(Difference { value, interval: Some(i) }) => format!("{} ({})", number(*value), i.text()),
            };
            let name = |text: &str| if first { text.to_owned() } else { String::new() };
            vec![
                name(&v.metric),
                name(if v.lower_is_better { "lower" } else { "higher" }),
                v.rank.to_string(),
                v.system.clone(),
                value,
                v.interval.as_ref().map_or("-".into(), Interval::text),
                behind,
            ]
        });
        let mut note = format!(
            "Best system first. 95 %: over {} sets of as many songs, drawn with replacement, moved by the bias of drawing; the \
             same songs for all systems that have equally many.",
            self.subsets
        );
        for warning in &self.warnings {
            note += &format!(" Note: {warning}.");
        }
        Table { title: "Ranks".into(), note, head: head.map(str::to_owned).into(), rows: rows.collect() }
    }

    /// Whether songs have distances of their own.
    pub(super) fn has_distances(&self) -> bool {
        self.systems.iter().flat_map(|system| &system.songs).any(|song| song.per_song_fad.is_some())
    }

    /// The songs by their own scores, worst first; all of them, or `most` of each system.
    pub(super) fn table_of_songs(&self, most: usize) -> Table {
        let has_captions = self.systems.iter().flat_map(|s| &s.songs).any(|song| song.clap_score.is_some());
        let mut head = vec!["song", "system", "embeddings", "per-song FAD"];
        head.extend(has_captions.then_some("CLAP score"));
        let cell = |score: Option<f64>| score.map_or("-".into(), number);
        let mut rows = Vec::new();
        for system in &self.systems {
            for song in system.worst_first().into_iter().take(most) {
                let mut row = vec![song.name.clone(), system.name.clone(), song.n_rows.to_string()];
                row.push(cell(song.per_song_fad));
                row.extend(has_captions.then(|| cell(song.clap_score)));
                rows.push(row);
            }
        }
        let head = head.into_iter().map(str::to_owned).collect();
        let note = match self.has_distances() {
            true => "Farthest from the reference first.".into(),
            false => "Least like its prompt first.".into(),
        };
        Table { title: "Songs".into(), note, head, rows }
    }

    /// The tables for a terminal; with `per_song` also that of all songs.
    pub fn table(&self, per_song: bool) -> String {
        let mut text = self.table_of_values().to_text();
        let songs = self.table_of_songs(usize::MAX);
        if per_song && !songs.rows.is_empty() {
            text += "\n";
            text += &songs.to_text();
        }
        let said = [("not measured", &self.left_out), ("note", &self.warnings)];
        for (what, lines) in said {
            for line in lines {
                let _ = writeln!(text, "{what}: {line}");
            }
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "left out: {}: {}", skipped.file.display(), skipped.reason);
        }
        text
    }

    /// The ranked table as comma-separated values.
    pub fn systems_csv(&self) -> String {
        const HEADER: [&str; 13] = [
            "metric",
            "better",
            "rank",
            "system",
            "songs",
            "embeddings",
            "value",
            "low",
            "high",
            "std",
            "behind",
            "behind_low",
            "behind_high",
        ];
        let row = |v: &RankedValue| {
            let system = self.systems.iter().find(|system| system.name == v.system);
            let (n_songs, n_rows) = system.map_or((0, 0), |system| (system.songs.len(), system.n_rows));
            let behind = v.behind.as_ref();
            let spread = behind.and_then(|behind| behind.interval);
            [
                v.metric.clone(),
                if v.lower_is_better { "lower" } else { "higher" }.into(),
                v.rank.to_string(),
                v.system.clone(),
                n_songs.to_string(),
                n_rows.to_string(),
                v.value.to_string(),
                csv_number(v.interval.map(|i| i.low)),
                csv_number(v.interval.map(|i| i.high)),
                csv_number(v.interval.map(|i| i.std)),
                csv_number(behind.map(|behind| behind.value)),
                csv_number(spread.map(|i| i.low)),
                csv_number(spread.map(|i| i.high)),
            ]
        };
        csv_of(HEADER, self.values.iter().map(row))
    }

    /// The songs as comma-separated values, in the order of their names.
    pub fn songs_csv(&self) -> String {
        let rows = self.systems.iter().flat_map(|system| {
            system.songs.iter().map(|song| {
                let (fad, clap) = (csv_number(song.per_song_fad), csv_number(song.clap_score));
                [system.name.clone(), song.name.clone(), song.n_rows.to_string(), fad, clap]
            })
        });
        csv_of(["system", "song", "embeddings", "per_song_fad", "clap_score"], rows)
    }
}

/// A number as a cell of a CSV file; nothing where there is none.
fn csv_number(x: Option<f64>) -> String {
    x.map_or(String::new(), |x| x.to_string())
}

/// Comma-separated values, with quotes where a cell needs them.
fn csv_of<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record(header).expect("a vector takes every byte");
    rows.for_each(|row| csv.write_record(row).expect("a vector takes every byte, and all rows have N cells"));
    String::from_utf8(csv.into_inner().expect("a vector takes every byte")).expect("all cells are text")
}

impl SystemInfo {
    /// The songs that have a score of their own, worst first; equal ones by name.
    pub(super) fn worst_first(&self) -> Vec<&ScoredSong> {
        let scored = |song: &&ScoredSong| song.per_song_fad.or(song.clap_score).is_some();
        let mut songs: Vec<&ScoredSong> = self.songs.iter().filter(scored).collect();
        // Without a reference, those that agree least with their prompts.
        let score = |song: &ScoredSong| song.per_song_fad.or(song.clap_score.map(|x| -x)).unwrap_or(0.0);
        songs.sort_by(|a, b| score(b).total_cmp(&score(a)));
        songs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_lies_around_its_value_and_inside_the_range() {
        let draws: Vec<f64> = (0..=100).map(f64::from).collect();
        let interval = Interval::of(10.0, &draws, (0.0, f64::INFINITY)).unwrap();
        assert_eq!((interval.mean, interval.percentile_low, interval.percentile_high), (50.0, 2.5, 97.5));
        assert_eq!((interval.low, interval.high), (0.0, 57.5));
    }

    #[test]
    fn names_with_commas_and_quotes_are_quoted() {
        let rows = [["a.wav".into(), String::new()], ["a \"b\", c".into(), "1".into()]];
        assert_eq!(csv_of(["x", "y"], rows.into_iter()), "x,y\na.wav,\n\"a \"\"b\"\", c\",1\n");
    }
}
