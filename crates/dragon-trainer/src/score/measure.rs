//! One metric of one system: its value on all songs, and its values on songs drawn anew.

use dragon_metrics::bootstrap::bootstrap_indices;
use dragon_metrics::{
    Convention, FadInf, FadInfOptions, FrechetPool, FrechetReference, KadPool, KadReference, Prdc, PrdcPool,
    Rows, VendiPool, clap_score, fad_inf, per_song_fad, vendi_order,
};
use dragon_rewards::Pooling;
use rayon::prelude::*;

use super::{Metric, Reference, ScoreConfig, System};
use crate::error::{Error, Result};
use crate::sets::{Set, Unit};

/// Result of the metrics' crate.
type Computed<T> = dragon_metrics::Result<T>;

/// What was found.
pub(super) struct Measured {
    /// Its name in tables.
    pub name: String,
    pub lower_is_better: bool,
    /// Values that have a meaning.
    pub range: (f64, f64),
    pub value: f64,
    /// Values on songs drawn anew; systems of as many songs draw the same ones. `None` for a single song, and for
    /// FAD-infinity, which has a spread of its own.
    pub draws: Option<Vec<f64>>,
    /// One value a song, in their order.
    pub songs: Option<Vec<f64>>,
    pub line: Option<FadInf>,
}

/// Distances are not negative; KAD may be, near 0.
const DISTANCE: (f64, f64) = (0.0, f64::INFINITY);
const ANY: (f64, f64) = (f64::NEG_INFINITY, f64::INFINITY);

impl Measured {
    fn distance(name: impl Into<String>, range: (f64, f64), value: f64) -> Self {
        Self { name: name.into(), lower_is_better: true, range, value, draws: None, songs: None, line: None }
    }

    fn score(name: impl Into<String>, range: (f64, f64), value: f64) -> Self {
        Self { lower_is_better: false, ..Self::distance(name, range, value) }
    }

    fn drawn(self, draws: Option<Vec<f64>>) -> Self {
        Self { draws, ..self }
    }
}

/// The Gaussian of a set under a convention, as a reference.
pub(super) fn gaussian(convention: Convention, set: &Set, rows: &Rows) -> Computed<FrechetReference> {
    if convention == Convention::Exact {
        return FrechetReference::from_rows(rows);
    }
    FrechetReference::new(&stats(convention, set, rows)?)
}

/// Statistics as a tool makes them: merged file by file, or of one array where there are no files.
fn stats(convention: Convention, set: &Set, rows: &Rows) -> Computed<dragon_metrics::GaussianStats> {
    match set.unit {
        Unit::Song => convention.stats_of_files(&song_rows(set)),
        Unit::Row | Unit::Text => convention.stats(rows),
    }
}

fn song_rows(set: &Set) -> Vec<&Rows> {
    set.songs.iter().map(|song| &song.rows).collect()
}

/// What measuring takes.
pub(super) struct Measurer<'a> {
    pub cfg: &'a ScoreConfig,
    pub reference: Option<&'a Reference>,
}

impl Measurer<'_> {
    /// Measures one metric (which may give several numbers) of a system.
    ///
    /// # Errors
    /// If it has no value, which is checked before as far as possible: a row of zeros has no direction, say.
    pub fn measure(&self, metric: Metric, system: &System) -> Result<Vec<Measured>> {
        let songs = song_rows(&system.set);
        let n = songs.len();
        let refuse = |err: dragon_metrics::Error| {
            let hint = "leave the song out, or the metric";
            let context = format!("cannot measure `{}` of `{}`\nhint: {hint}", metric.name(), system.name);
            Error::input(context)(named(err, system))
        };
        let subsets = if n < 2 {
            Vec::new()
        } else {
            bootstrap_indices(self.cfg.seed, self.cfg.subsets, n, n).map_err(refuse)?
        };
        let found = match metric {
            Metric::Fad => self.fad(system, &songs, &subsets).map(|m| vec![m]),
            Metric::FadInf => self.fad_inf(system).map(|m| vec![m]),
            Metric::PerSongFad => self.per_song_fad(&songs, &subsets).map(|m| vec![m]),
            Metric::Kad => self.kad(&songs, &subsets).map(|m| vec![m]),
            Metric::Prdc => self.prdc(&songs, &subsets),
            Metric::Vendi => self.vendi(system, &songs, &subsets).map(|m| vec![m]),
            Metric::ClapScore => self.clap_score(system, &songs, &subsets).map(|m| vec![m]),
        };
        found.map_err(refuse)
    }

    fn reference(&self) -> Computed<&Reference> {
        let missing = || dragon_metrics::Error::TooFew { what: "references", expected: 1, found: 0 };
        self.reference.ok_or_else(missing)
    }

    fn reference_rows(&self) -> Computed<&Rows> {
        let missing =
            || dragon_metrics::Error::TooFew { what: "embeddings of the reference", expected: 2, found: 0 };
        self.reference()?.set.as_ref().map(|(_, rows)| rows).ok_or_else(missing)
    }

    fn fad(&self, system: &System, songs: &[&Rows], subsets: &[Vec<usize>]) -> Computed<Measured> {
        let gaussian = &self.reference()?.gaussian;
        let value = match self.cfg.convention {
            Convention::Exact => gaussian.distance(&system.rows)?,
            convention => gaussian.distance_to_stats(&stats(convention, &system.set, &system.rows)?)?,
        };
        let pool = FrechetPool::new(gaussian, songs)?;
        let draws = draws(subsets, |members| pool.distance(members))?;
        Ok(Measured::distance("FAD", DISTANCE, value).drawn(draws))
    }

    fn fad_inf(&self, system: &System) -> Computed<Measured> {
        let ScoreConfig { seed, convention, fad_inf: drawing, .. } = *self.cfg;
        let options = FadInfOptions { min_rows: drawing.min_rows, steps: drawing.steps, seed, convention };
        let line = fad_inf(&self.reference()?.gaussian, &system.rows, options)?;
        Ok(Measured { line: Some(line.clone()), ..Measured::distance("FAD-infinity", ANY, line.score) })
    }

    fn per_song_fad(&self, songs: &[&Rows], subsets: &[Vec<usize>]) -> Computed<Measured> {
        let gaussian = &self.reference()?.gaussian;
        let scores = match self.cfg.convention {
            Convention::Exact => per_song_fad(gaussian, songs)?,
            convention => {
                let all: Vec<Computed<f64>> =
                    songs.par_iter().map(|song| convention.distance(gaussian, song)).collect();
                let named =
                    |(i, score): (usize, Computed<f64>)| score.map_err(|e| e.within(format!("song {i}")));
                all.into_iter().enumerate().map(named).collect::<Computed<_>>()?
            }
        };
        let (value, draws) = mean_of(&scores, subsets)?;
        Ok(Measured {
            songs: Some(scores),
            ..Measured::distance("per-song FAD", DISTANCE, value).drawn(draws)
        })
    }

    fn clap_score(&self, system: &System, songs: &[&Rows], subsets: &[Vec<usize>]) -> Computed<Measured> {
        let missing = || dragon_metrics::Error::TooFew { what: "prompts", expected: songs.len(), found: 0 };
        let captions = system.captions.as_ref().ok_or_else(missing)?;
        let one = |(i, (song, text)): (usize, (&&Rows, &[f64]))| {
            clap_score(song, text, self.cfg.clip).map_err(|e| e.within(format!("song {i}")))
        };
        let scores =
            songs.iter().zip(captions.iter()).enumerate().map(one).collect::<Computed<Vec<f64>>>()?;
        let (value, draws) = mean_of(&scores, subsets)?;
        Ok(Measured { songs: Some(scores), ..Measured::score("CLAP score", (0.0, 1.0), value).drawn(draws) })
    }

    fn kad(&self, songs: &[&Rows], subsets: &[Vec<usize>]) -> Computed<Measured> {
        let reference = KadReference::new(self.reference_rows()?, self.cfg.kernel)?;
        let pool = KadPool::new(&reference, songs)?;
        let value = pool.kad(&(0..songs.len()).collect::<Vec<_>>())?;
        let draws = draws(subsets, |members| pool.kad(members))?;
        Ok(Measured::distance("KAD", ANY, value).drawn(draws))
    }

    fn prdc(&self, songs: &[&Rows], subsets: &[Vec<usize>]) -> Computed<Vec<Measured>> {
        let pool = PrdcPool::new(self.reference_rows()?, songs, self.cfg.neighbours)?;
        let all = pool.prdc(&(0..songs.len()).collect::<Vec<_>>())?;
        // Where the shortest song, drawn every time, has too few rows, there are no intervals.
        let least = songs.len() * songs.iter().map(|song| song.n()).min().unwrap_or(0);
        let subsets = if least > self.cfg.neighbours { subsets } else { &[] };
        let drawn = draws(subsets, |members| pool.prdc(members))?;
        let share = |name: &'static str, of: fn(&Prdc) -> f64, highest: f64| {
            let draws = drawn.as_ref().map(|all| all.iter().map(of).collect());
            Measured::score(name, (0.0, highest), of(&all)).drawn(draws)
        };
        Ok(vec![
            share("precision", |p| p.precision, 1.0),
            share("recall", |p| p.recall, 1.0),
            share("density", |p| p.density, f64::INFINITY),
            share("coverage", |p| p.coverage, 1.0),
        ])
    }

    fn vendi(&self, system: &System, songs: &[&Rows], subsets: &[Vec<usize>]) -> Computed<Measured> {
        let mut ranges = Vec::with_capacity(songs.len());
        let mut end = 0;
        for song in songs {
            ranges.push(end..end + song.n());
            end += song.n();
        }
        let means;
        let rows = match self.cfg.vendi {
            Pooling::Windows => &system.rows,
            Pooling::SongMean => {
                ranges = (0..songs.len()).map(|i| i..i + 1).collect();
                means =
                    Rows::from_vecs(&songs.iter().map(|song| song.mean()).collect::<Computed<Vec<_>>>()?)?;
                &means
            }
        };
        let members = |songs: &[usize]| songs.iter().flat_map(|&s| ranges[s].clone()).collect::<Vec<usize>>();
        let silent =
            ranges.iter().position(|rows_of| rows_of.clone().any(|i| rows.row(i).iter().all(|x| *x == 0.0)));
        if let Some(song) = silent {
            let what = "embeddings for a Vendi score";
            return Err(dragon_metrics::Error::ZeroRow { what, row: ranges[song].start }
                .within(format!("song {song}")));
        }
        let q = self.cfg.vendi_order;
        let value = vendi_order(rows, q)?;
        let highest = rows.n() as f64;
        // The smaller of the two matrices.
        let draws = if rows.n() > rows.dim() {
            draws(subsets, |songs| vendi_order(&rows.select(&members(songs))?, q))?
        } else {
            let pool = VendiPool::new(rows)?;
            draws(subsets, |songs| pool.vendi_order(&members(songs), q))?
        };
        let name = if q == 1.0 { "Vendi".to_owned() } else { format!("Vendi of order {q}") };
        Ok(Measured::score(name, (1.0, highest), value).drawn(draws))
    }
}

/// Mean of the songs' scores, and on each subset.
fn mean_of(scores: &[f64], subsets: &[Vec<usize>]) -> Computed<(f64, Option<Vec<f64>>)> {
    let mean = |members: &[usize]| members.iter().map(|&m| scores[m]).sum::<f64>() / members.len() as f64;
    let value = scores.iter().sum::<f64>() / scores.len() as f64;
    Ok((value, draws(subsets, |members| Ok(mean(members)))?))
}

/// A value on each subset, in parallel, in order; `None` without subsets.
fn draws<T: Send>(
    subsets: &[Vec<usize>],
    metric: impl Fn(&[usize]) -> Computed<T> + Sync,
) -> Computed<Option<Vec<T>>> {
    if subsets.is_empty() {
        return Ok(None);
    }
    let values: Vec<Computed<T>> = subsets.par_iter().map(|members| metric(members)).collect();
    let named =
        |(i, value): (usize, Computed<T>)| value.map_err(|e| e.within(format!("resampled songs {i}")));
    values.into_iter().enumerate().map(named).collect::<Computed<Vec<T>>>().map(Some)
}

/// The error with the name of its song.
fn named(err: dragon_metrics::Error, system: &System) -> dragon_metrics::Error {
    let found = match &err {
        dragon_metrics::Error::In { context, .. } => context
            .strip_prefix("song ")
            .and_then(|i| i.parse::<usize>().ok())
            .and_then(|i| system.set.songs.get(i))
            .map(|song| song.name.clone()),
        _ => None,
    };
    match found {
        Some(name) => err.within(format!("`{name}`")),
        None => err,
    }
}
