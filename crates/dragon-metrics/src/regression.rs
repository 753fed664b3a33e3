//! Regression of ratings on embeddings: kernel ridge and Nadaraya-Watson, with cross-validation.
//!
//! Serves as an aesthetics head: fit on the CLAP embeddings of rated songs, predict for each embedding of a generated
//! song and take the mean ("rate then average").
//!
//! - Kernel ridge: `f(x) = m + Σ a_i k(x, x_i)`, `(K + λ I) a = y - m`, `m` the mean rating (scikit-learn's `KernelRidge`
//!   on centred targets; its `alpha` is our `λ`).
//! - Nadaraya-Watson: `f(x) = Σ k(x, x_i) y_i / Σ k(x, x_i)` (Nadaraya 1964, Watson 1964).

use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::bootstrap::SplitMix64;
use crate::pairwise::{exact_squared_distances, same_dim};
use crate::rows::dot;
use crate::{Error, Result, Rows};

/// Similarity of two embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Similarity {
    /// `exp(-|a - b|²/(2 b²))`.
    Rbf {
        /// Bandwidth `b > 0`, in the units of the embeddings; [`crate::kad::median_distance`] is a start.
        bandwidth: f64,
    },
    /// `a · b`.
    Linear,
}

impl Similarity {
    fn check(self) -> Result<()> {
        match self {
            Similarity::Rbf { bandwidth } if !(bandwidth > 0.0 && bandwidth.is_finite()) => {
                Err(Error::Parameter {
                    name: "bandwidth",
                    expected: "above 0 and finite",
                    found: bandwidth.to_string(),
                })
            }
            _ => Ok(()),
        }
    }

    /// `[a.n, b.n]`, row after row; for `Rbf` the logarithm.
    fn log_or_value(self, a: &Rows, b: &Rows) -> Vec<f64> {
        match self {
            Similarity::Rbf { bandwidth } => {
                let gamma = 1.0 / (2.0 * bandwidth * bandwidth);
                exact_squared_distances(a, b).into_iter().map(|d| -gamma * d).collect()
            }
            Similarity::Linear => a.iter().flat_map(|x| b.iter().map(move |y| dot(x, y))).collect(),
        }
    }
}

/// What is fitted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Method {
    /// Kernel ridge regression.
    KernelRidge {
        /// Kernel.
        similarity: Similarity,
        /// Ridge `λ > 0`.
        lambda: f64,
    },
    /// Nadaraya-Watson: the mean rating, weighted by similarity.
    NadarayaWatson {
        /// Kernel; `Linear` makes sense only where all similarities are positive.
        similarity: Similarity,
    },
}

impl Method {
    fn similarity(self) -> Similarity {
        match self {
            Method::KernelRidge { similarity, .. } | Method::NadarayaWatson { similarity } => similarity,
        }
    }
}

/// A fitted regression.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelRegression {
    method: Method,
    rows: Rows,
    /// Kernel ridge: the coefficients `a`. Nadaraya-Watson: the targets less their mean.
    weights: Vec<f64>,
    mean: f64,
}

impl KernelRegression {
    /// Fits embeddings `[N, D]` with one target each. Cost: `N²` kernel values, and `N³/3` for kernel ridge.
    ///
    /// # Errors
    /// If there is no row, the lengths differ, a target is not finite, or a parameter is out of range.
    pub fn fit(rows: &Rows, targets: &[f64], method: Method) -> Result<Self> {
        check_targets(rows, targets)?;
        method.similarity().check()?;
        let n = rows.n();
        let mean = targets.iter().sum::<f64>() / n as f64;
        let centered: Vec<f64> = targets.iter().map(|y| y - mean).collect();
        let weights = match method {
            Method::NadarayaWatson { .. } => centered,
            Method::KernelRidge { similarity, lambda } => {
                if !(lambda > 0.0 && lambda.is_finite()) {
                    let expected = "above 0 and finite";
                    return Err(Error::Parameter { name: "lambda", expected, found: lambda.to_string() });
                }
                let mut k = similarity.log_or_value(rows, rows);
                if let Similarity::Rbf { .. } = similarity {
                    k.iter_mut().for_each(|k| *k = k.exp());
                }
                let system = Mat::from_fn(n, n, |i, j| k[i * n + j] + if i == j { lambda } else { 0.0 });
                let too_small = |_| Error::Parameter {
                    name: "lambda",
                    expected: "large enough that the kernel plus lambda can be factored (try 1e-10 of the kernel)",
                    found: lambda.to_string(),
                };
                let factor = system.llt(Side::Lower).map_err(too_small)?;
                let solved = factor.solve(Mat::from_fn(n, 1, |i, _| centered[i]));
                (0..n).map(|i| solved[(i, 0)]).collect()
            }
        };
        Ok(Self { method, rows: rows.clone(), weights, mean })
    }

    /// What was fitted.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Prediction for each row of `rows` `[M, D]`.
    ///
    /// # Errors
    /// If the dimension differs, or (Nadaraya-Watson, linear) the similarities to the fitted rows do not sum to more
    /// than 0; the message names the row.
    pub fn predict(&self, rows: &Rows) -> Result<Vec<f64>> {
        same_dim("embeddings (against the fitted ones)", self.rows.dim(), rows)?;
        let k = self.method.similarity().log_or_value(rows, &self.rows);
        let rbf = matches!(self.method.similarity(), Similarity::Rbf { .. });
        k.chunks_exact(self.rows.n())
            .enumerate()
            .map(|(row, k)| {
                // Far from all rows every weight of Nadaraya-Watson underflows; relative to the largest they do not.
                let ridge = matches!(self.method, Method::KernelRidge { .. });
                let shift =
                    if ridge || !rbf { 0.0 } else { k.iter().copied().fold(f64::NEG_INFINITY, f64::max) };
                let (mut sum, mut weight) = (0.0, 0.0);
                for (k, w) in k.iter().zip(&self.weights) {
                    let k = if rbf { (k - shift).exp() } else { *k };
                    sum += k * w;
                    weight += k;
                }
                if ridge {
                    return Ok(self.mean + sum);
                }
                if weight > 0.0 {
                    return Ok(self.mean + sum / weight);
                }
                let expected = "a sum above 0";
                let found = weight.to_string();
                Err(Error::Parameter { name: "similarity to the fitted rows", expected, found }
                    .within(format!("row {row}")))
            })
            .collect()
    }

    /// Mean prediction over the rows of one song ("rate then average").
    ///
    /// # Errors
    /// As [`KernelRegression::predict`], and if there is no row.
    pub fn rate(&self, song: &Rows) -> Result<f64> {
        if song.n() == 0 {
            return Err(Error::TooFew { what: "embeddings of a song", expected: 1, found: 0 });
        }
        Ok(self.predict(song)?.iter().sum::<f64>() / song.n() as f64)
    }
}

/// What cross-validation found.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossValidation {
    /// The candidate with the smallest error, fitted on all rows.
    pub best: KernelRegression,
    /// Mean squared error on held-out rows of each candidate, in the order given; infinite where a candidate cannot be
    /// fitted or cannot predict.
    pub errors: Vec<f64>,
    /// Fold of each row.
    pub folds: Vec<usize>,
}

/// Chooses among `candidates` by the squared error on held-out rows, `n_folds` folds; candidates in parallel.
///
/// `groups[i]` is any label; rows of one group (e.g. the windows of a song) always share a fold. Groups are shuffled by
/// `seed` (Fisher-Yates, SplitMix64) and dealt out in turn. Of equal errors the first candidate wins.
///
/// # Errors
/// If there are fewer groups than folds, fewer than two folds, no candidate, lengths differ, or no candidate works.
pub fn cross_validate(
    rows: &Rows,
    targets: &[f64],
    groups: &[usize],
    candidates: &[Method],
    n_folds: usize,
    seed: u64,
) -> Result<CrossValidation> {
    check_targets(rows, targets)?;
    if groups.len() != rows.n() {
        return Err(Error::Dimension { what: "group labels", expected: rows.n(), found: groups.len() });
    }
    let mut labels = groups.to_vec();
    labels.sort_unstable();
    labels.dedup();
    for (what, expected, found) in [
        ("folds", 2, n_folds),
        ("groups of rows (one a fold)", n_folds, labels.len()),
        ("candidates", 1, candidates.len()),
    ] {
        if found < expected {
            return Err(Error::TooFew { what, expected, found });
        }
    }
    let mut order: Vec<usize> = (0..labels.len()).collect();
    let mut rng = SplitMix64(seed);
    for i in (1..order.len()).rev() {
        order.swap(i, rng.below(i as u64 + 1) as usize);
    }
    let fold_of = |group: &usize| {
        let label = labels.binary_search(group).expect("every group is among its own labels");
        order[label] % n_folds
    };
    let folds: Vec<usize> = groups.iter().map(fold_of).collect();
    let error_of = |method: &Method| -> Result<f64> {
        let mut square = 0.0;
        for fold in 0..n_folds {
            let part = |held: bool| (0..rows.n()).filter(|&i| (folds[i] == fold) == held).collect::<Vec<_>>();
            let (held, kept) = (part(true), part(false));
            let pick = |indices: &[usize]| indices.iter().map(|&i| targets[i]).collect::<Vec<_>>();
            let fitted = KernelRegression::fit(&rows.select(&kept)?, &pick(&kept), *method)?;
            let predicted = fitted.predict(&rows.select(&held)?)?;
            square += predicted.iter().zip(pick(&held)).map(|(p, y)| (p - y).powi(2)).sum::<f64>();
        }
        Ok(square / rows.n() as f64)
    };
    let results: Vec<Result<f64>> = candidates.par_iter().map(error_of).collect();
    let errors: Vec<f64> = results.iter().map(|r| r.as_ref().map_or(f64::INFINITY, |e| *e)).collect();
    let best =
        (0..errors.len()).min_by(|&a, &b| errors[a].total_cmp(&errors[b])).expect("at least one candidate");
    if !errors[best].is_finite() {
        results.into_iter().collect::<Result<Vec<f64>>>()?; // the first failure says why
    }
    let best = KernelRegression::fit(rows, targets, candidates[best])?;
    Ok(CrossValidation { best, errors, folds })
}

fn check_targets(rows: &Rows, targets: &[f64]) -> Result<()> {
    if rows.n() == 0 {
        return Err(Error::TooFew { what: "embeddings to fit", expected: 1, found: 0 });
    }
    if targets.len() != rows.n() {
        return Err(Error::Dimension { what: "targets", expected: rows.n(), found: targets.len() });
    }
    match targets.iter().position(|y| !y.is_finite()) {
        Some(row) => Err(Error::NotFinite { what: "targets", row, column: 0, value: targets[row] }),
        None => Ok(()),
    }
}
