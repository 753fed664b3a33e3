//! FAD-infinity: the distance that a set would have with infinitely many rows (Chong and Forsyth 2020, arXiv:1911.07023;
//! Gui et al. 2024, arXiv:2311.01616, as fadtk computes it).
//!
//! The Fréchet distance of `n` rows is biased by about `slope / n`. Sets of growing size are drawn with replacement, and
//! a straight line through the distances over `1/n` is read off at 0.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::bootstrap::draw;
use crate::{Convention, Error, FrechetReference, Result, Rows};

/// How FAD-infinity draws; [`FadInfOptions::default`] has fadtk's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FadInfOptions {
    /// Rows of the smallest set; fadtk: 500.
    pub min_rows: usize,
    /// Sets drawn; fadtk: 25.
    pub steps: usize,
    /// Seed of the drawing. fadtk has none, and each of its runs gives another number.
    pub seed: u64,
    /// How rows become a Gaussian.
    pub convention: Convention,
}

impl Default for FadInfOptions {
    fn default() -> Self {
        Self { min_rows: 500, steps: 25, seed: 0, convention: Convention::Exact }
    }
}

/// FAD-infinity and the line it was read off.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FadInf {
    /// Intercept of the line: the distance at `1/n = 0`. May be negative when the true distance is near zero.
    pub score: f64,
    /// Slope of the line: bias of the distance times the number of rows.
    pub slope: f64,
    /// Share of the variance that the line explains, at most 1; below about 0.9 the score means little.
    pub r2: f64,
    /// (rows, distance) of each set drawn.
    pub points: Vec<(usize, f64)>,
    /// What it was made with; [`fad_inf_indices`] repeats the drawing.
    pub options: FadInfOptions,
}

/// FAD-infinity of rows `[N, D]` to a reference; sets in parallel.
///
/// With fewer than `min_rows` rows the sizes fall from `min_rows` to N (as in fadtk): rows are then drawn more often than
/// they exist, and the score says little.
///
/// # Errors
/// If N is below 2, `min_rows` is below 2, the sizes are all equal (`steps` below 2, or N is `min_rows`), the dimension
/// differs, or a value is too large for the convention's type.
pub fn fad_inf(reference: &FrechetReference, rows: &Rows, options: FadInfOptions) -> Result<FadInf> {
    let FadInfOptions { min_rows, convention, .. } = options;
    for (what, found) in [("embeddings for FAD-infinity", rows.n()), ("rows of the smallest set", min_rows)] {
        if found < 2 {
            return Err(Error::TooFew { what, expected: 2, found });
        }
    }
    let indices = fad_inf_indices(rows.n(), options)?;
    if indices.iter().all(|set| set.len() == indices[0].len()) {
        let expected =
            "sets of at least two different sizes (two steps, and more embeddings than the smallest set)";
        return Err(Error::Parameter { name: "FAD-infinity", expected, found: indices[0].len().to_string() });
    }
    let points: Vec<Result<(usize, f64)>> = indices
        .par_iter()
        .map(|set| Ok((set.len(), convention.distance(reference, &rows.select(set)?)?)))
        .collect();
    let points = points.into_iter().collect::<Result<Vec<_>>>()?;
    let n = points.len() as f64;
    let mean = |value: &dyn Fn(&(usize, f64)) -> f64| points.iter().map(value).sum::<f64>() / n;
    let inverse = |p: &(usize, f64)| 1.0 / p.0 as f64;
    let (mx, my) = (mean(&inverse), mean(&|p| p.1));
    let xx = mean(&|p| (inverse(p) - mx).powi(2));
    let xy = mean(&|p| (inverse(p) - mx) * (p.1 - my));
    let slope = xy / xx;
    let score = my - slope * mx;
    let rest = mean(&|p| (p.1 - slope * inverse(p) - score).powi(2));
    let spread = mean(&|p| (p.1 - my).powi(2));
    let r2 = if spread > 0.0 { 1.0 - rest / spread } else { 1.0 };
    Ok(FadInf { score, slope, r2, points, options })
}

/// The rows that [`fad_inf`] draws: for each set the indices below `n_rows`.
///
/// Sizes are `int(linspace(min_rows, n_rows, steps))`; set `s` comes from stream `s` of the seed, as in
/// [`crate::bootstrap_indices`].
///
/// # Errors
/// If `n_rows` or `steps` is 0.
pub fn fad_inf_indices(n_rows: usize, options: FadInfOptions) -> Result<Vec<Vec<usize>>> {
    for (what, found) in [("embeddings for FAD-infinity", n_rows), ("steps of FAD-infinity", options.steps)] {
        if found == 0 {
            return Err(Error::TooFew { what, expected: 1, found });
        }
    }
    let (first, last) = (options.min_rows as f64, n_rows as f64);
    let step = (last - first) / (options.steps.max(2) - 1) as f64;
    Ok((0..options.steps)
        .map(|s| {
            // numpy's linspace: start + s * step, the end exactly.
            let at = if s > 0 && s + 1 == options.steps { last } else { first + s as f64 * step };
            draw(options.seed, s as u64, at as usize, n_rows)
        })
        .collect())
}
