//! Named number conventions: what the tools in use compute from the same embeddings.
//!
//! All three give the same Fréchet distance of the same two Gaussians; they differ in how embeddings become a Gaussian.
//! The tools round on the way, and their result moves by up to 4e-5 of itself; to compare with numbers that they printed,
//! name the tool. What they add by numerical noise (up to 3e-7, from roots of eigenvalues that should be zero) is not
//! imitated. Measured differences: `docs/metrics.md`.

use half::f16;
use serde::{Deserialize, Serialize};

use crate::{Error, FrechetReference, GaussianStats, Moments, Result, Rows};

/// How embeddings become a mean and a covariance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Convention {
    /// f64 throughout, nothing rounded.
    #[default]
    #[serde(rename = "exact")]
    Exact,
    /// fadtk 1.1: rows are stored in f16, the mean of an array of f16 rows is rounded to f16, the covariance is not.
    /// A folder is merged file by file, so that each file's rounded mean enters.
    #[serde(rename = "fadtk-1.1")]
    Fadtk11,
    /// frechet_audio_distance 0.3 (gudgud): rows and their mean in f32, the covariance in f64.
    #[serde(rename = "gudgud")]
    Gudgud,
}

impl Convention {
    /// All conventions, in the order of the documentation.
    pub const ALL: [Convention; 3] = [Convention::Exact, Convention::Fadtk11, Convention::Gudgud];

    /// Its name in settings and tables: `exact`, `fadtk-1.1`, `gudgud`.
    pub fn name(self) -> &'static str {
        match self {
            Convention::Exact => "exact",
            Convention::Fadtk11 => "fadtk-1.1",
            Convention::Gudgud => "gudgud",
        }
    }

    /// The rows `[N, D]` as the tool stores them.
    ///
    /// # Errors
    /// If a value is too large for the tool's type (65504 in f16).
    pub fn store(self, rows: &Rows) -> Result<Rows> {
        let data = rows.data().iter();
        let data = match self {
            Convention::Exact => return Ok(rows.clone()),
            Convention::Fadtk11 => data.map(|&x| f16::from_f64(x).to_f64()).collect(),
            Convention::Gudgud => data.map(|&x| f64::from(x as f32)).collect(),
        };
        Rows::new(rows.n(), rows.dim(), data).map_err(|e| e.within(format!("rounded as {}", self.name())))
    }

    /// The mean `[D]` of rows that [`Convention::store`] gave, as numpy computes it in the tool's type.
    fn mean(self, stored: &Rows) -> Result<Vec<f64>> {
        if self == Convention::Exact || stored.n() == 0 {
            return stored.mean();
        }
        let mut sum = vec![0.0f32; stored.dim()];
        for row in stored.iter() {
            sum.iter_mut().zip(row).for_each(|(s, x)| *s += *x as f32);
        }
        let n = stored.n() as f32;
        Ok(sum
            .iter()
            .map(|s| match self {
                Convention::Fadtk11 => f16::from_f32(s / n).to_f64(),
                _ => f64::from(s / n),
            })
            .collect())
    }

    /// Statistics of rows held in one array: a song in fadtk, a set in frechet_audio_distance.
    ///
    /// # Errors
    /// If there are fewer than two rows, or a value is too large for the tool's type.
    pub fn stats(self, rows: &Rows) -> Result<GaussianStats> {
        let stored = self.store(rows)?;
        let exact = GaussianStats::fit(&stored)?;
        GaussianStats::new(self.mean(&stored)?, exact.cov().to_vec(), exact.n())
    }

    /// Statistics of a folder, one element per file.
    ///
    /// `exact` and `gudgud` pool all rows. `fadtk-1.1` merges file after file with rounded means,
    /// `mu += d m/(n+m)`, `S += S_f + d dᵀ n m/(n+m)`, `d = mean_f - mu`; a file of one row adds no scatter of its own
    /// (as with the numpy below 2 that fadtk requires).
    ///
    /// # Errors
    /// If there are fewer than two rows in all, dimensions differ, or a value is too large for the tool's type; the
    /// message holds the index of the file.
    pub fn stats_of_files(self, files: &[&Rows]) -> Result<GaussianStats> {
        let Some(first) = files.first() else {
            return Err(Error::TooFew { what: "files of embeddings", expected: 1, found: 0 });
        };
        if self == Convention::Gudgud {
            return self.stats(&Rows::concat(files)?);
        }
        let mut moments = Moments::new(first.dim());
        for (i, file) in files.iter().enumerate() {
            let pushed = self.store(file).and_then(|stored| {
                let mean = self.mean(&stored)?;
                moments.push_with_mean(&stored, &mean)
            });
            pushed.map_err(|e| e.within(format!("file {i}")))?;
        }
        moments.stats()
    }

    /// Fréchet distance of rows held in one array to a reference: what `fadtk --indiv` prints for a song, or
    /// frechet_audio_distance for a set. The reference's statistics are used as they are.
    ///
    /// # Errors
    /// As [`FrechetReference::distance`], and if a value is too large for the tool's type.
    pub fn distance(self, reference: &FrechetReference, rows: &Rows) -> Result<f64> {
        if self == Convention::Exact {
            return reference.distance(rows);
        }
        let stored = self.store(rows)?;
        let mean = self.mean(&stored)?;
        reference.distance_with_mean(&stored, &mean)
    }
}

impl Moments {
    /// Adds rows whose mean is taken to be `mean` when they are merged; their scatter is about their true mean.
    fn push_with_mean(&mut self, rows: &Rows, mean: &[f64]) -> Result<()> {
        let mut block = Moments::new(rows.dim());
        block.push(rows)?;
        block.set_mean(mean);
        self.merge(&block)
    }
}
