//! Bootstraps of set metrics: subsets drawn with replacement, the same for every system.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::win_rate::{WinRate, win_rate};
use crate::{Error, Result};

/// Which direction is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// A reward, a score.
    Higher,
    /// A distance.
    Lower,
}

impl Better {
    /// Whether `a` is strictly better than `b`.
    pub fn is_better(self, a: f64, b: f64) -> bool {
        match self {
            Better::Higher => a > b,
            Better::Lower => a < b,
        }
    }
}

/// `n_subsets` lists of `size` indices below `n`, drawn with replacement (the paper: 1000 subsets of 40 songs).
///
/// The generator is SplitMix64 (Steele et al. 2014), one stream per subset: subset `s` starts at state
/// `mix(seed) + mix(s + 1)`, where `mix` is one SplitMix64 output. An index is the high word of `output * n` (128 bits),
/// with Lemire's rejection, so it is exactly uniform. Subset `s` therefore does not depend on `n_subsets`.
///
/// # Errors
/// If `n` or `size` is 0.
pub fn bootstrap_indices(seed: u64, n_subsets: usize, size: usize, n: usize) -> Result<Vec<Vec<usize>>> {
    if n == 0 {
        return Err(Error::TooFew { what: "songs to draw from", expected: 1, found: 0 });
    }
    if size == 0 {
        return Err(Error::TooFew { what: "songs in a subset", expected: 1, found: 0 });
    }
    Ok((0..n_subsets).map(|s| draw(seed, s as u64, size, n)).collect())
}

/// One subset: `size` indices below `n` from stream `s` of `seed`.
pub(crate) fn draw(seed: u64, s: u64, size: usize, n: usize) -> Vec<usize> {
    let mut rng = SplitMix64(SplitMix64(seed).next().wrapping_add(SplitMix64(s + 1).next()));
    (0..size).map(|_| rng.below(n as u64) as usize).collect()
}

/// A set metric on resampled songs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Value on each subset, in the order of the subsets.
    pub values: Vec<f64>,
    /// Mean of the values.
    pub mean: f64,
    /// Standard deviation of the values (ddof 1): the standard error of the metric. 0 for one subset.
    pub std: f64,
    /// Percentile interval of the level asked for.
    pub interval: (f64, f64),
}

/// Evaluates a set metric on subsets of songs (in parallel) and takes the percentile interval of `level` (e.g. 0.95).
///
/// The metric takes indices into the songs: [`crate::FrechetPool::distance`], [`crate::VendiPool::vendi`],
/// [`crate::KadPool::kad`], [`crate::PrdcPool::prdc`], or a mean of per-song scores. Distances and diversities of
/// resampled sets are biased (fewer different songs), so that the interval need not hold the full-set value: use it to
/// compare systems on the same subsets, with [`paired_bootstrap`] where it decides.
///
/// # Errors
/// If `subsets` is empty, `level` is not in (0, 1), or the metric fails on a subset (the message holds its index).
pub fn bootstrap<M>(subsets: &[Vec<usize>], metric: M, level: f64) -> Result<Bootstrap>
where
    M: Fn(&[usize]) -> Result<f64> + Sync,
{
    if !(level > 0.0 && level < 1.0) {
        return Err(Error::Parameter {
            name: "level",
            expected: "between 0 and 1",
            found: level.to_string(),
        });
    }
    let values: Vec<Result<f64>> = subsets.par_iter().map(|s| metric(s)).collect();
    let named = |(i, v): (usize, Result<f64>)| v.map_err(|e| e.within(format!("bootstrap subset {i}")));
    let values = values.into_iter().enumerate().map(named).collect::<Result<Vec<f64>>>()?;
    let tail = (1.0 - level) / 2.0;
    let interval = (percentile(&values, tail)?, percentile(&values, 1.0 - tail)?);
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let square: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let std = if values.len() > 1 { (square / (n - 1.0)).sqrt() } else { 0.0 };
    Ok(Bootstrap { values, mean, std, interval })
}

/// A set metric of two systems on shared subsets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PairedBootstrap {
    /// Value of the first system on each subset.
    pub a: Vec<f64>,
    /// Value of the second system on the same subsets.
    pub b: Vec<f64>,
    /// Share of the subsets on which the first is better. Its interval treats subsets as independent trials and
    /// therefore describes the drawing, not the population of songs.
    pub win_rate: WinRate,
    /// Mean of `a - b`.
    pub mean_difference: f64,
    /// 2.5 % and 97.5 % percentiles of `a - b`.
    pub difference_95: (f64, f64),
}

/// Evaluates two systems on the same subsets of songs, subsets in parallel.
///
/// `a` and `b` take indices into the songs (song `i` of both systems answers prompt `i`), e.g.
/// [`crate::FrechetPool::distance`] or [`crate::VendiPool::vendi`].
///
/// # Errors
/// If `subsets` is empty, or the metric fails on one (the message holds its index).
pub fn paired_bootstrap<A, B>(subsets: &[Vec<usize>], a: A, b: B, better: Better) -> Result<PairedBootstrap>
where
    A: Fn(&[usize]) -> Result<f64> + Sync,
    B: Fn(&[usize]) -> Result<f64> + Sync,
{
    let values: Vec<Result<(f64, f64)>> = subsets.par_iter().map(|s| Ok((a(s)?, b(s)?))).collect();
    let mut sides = (Vec::with_capacity(subsets.len()), Vec::with_capacity(subsets.len()));
    for (i, value) in values.into_iter().enumerate() {
        let (x, y) = value.map_err(|e| e.within(format!("bootstrap subset {i}")))?;
        sides.0.push(x);
        sides.1.push(y);
    }
    let (a, b) = sides;
    let win_rate = win_rate(&a, &b, better)?;
    let difference: Vec<f64> = a.iter().zip(&b).map(|(x, y)| x - y).collect();
    let mean_difference = difference.iter().sum::<f64>() / difference.len() as f64;
    let difference_95 = (percentile(&difference, 0.025)?, percentile(&difference, 0.975)?);
    Ok(PairedBootstrap { a, b, win_rate, mean_difference, difference_95 })
}

/// The `p`-quantile, `p` in [0, 1], linear between order statistics (as `numpy.quantile` does by default).
///
/// # Errors
/// If there is no value, one is NaN, or `p` is outside [0, 1].
pub fn percentile(values: &[f64], p: f64) -> Result<f64> {
    if values.is_empty() {
        return Err(Error::TooFew { what: "values", expected: 1, found: 0 });
    }
    if !(0.0..=1.0).contains(&p) {
        return Err(Error::Parameter { name: "quantile", expected: "0 to 1", found: p.to_string() });
    }
    if let Some(row) = values.iter().position(|v| v.is_nan()) {
        return Err(Error::NotFinite { what: "values", row, column: 0, value: f64::NAN });
    }
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let at = p * (sorted.len() - 1) as f64;
    let low = at.floor() as usize;
    let high = (low + 1).min(sorted.len() - 1);
    Ok(sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64))
}

/// SplitMix64: `state += 0x9E3779B97F4A7C15`, output mixed by two multiplications.
#[derive(Debug, Clone)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// Next 64 bits.
    #[allow(clippy::should_implement_trait)] // a generator never ends; `Iterator` would say it may
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Exactly uniform in `0..n` (Lemire 2019). `n = 0` gives 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        loop {
            let wide = u128::from(self.next()) * u128::from(n);
            if (wide as u64) >= n.wrapping_neg() % n {
                return (wide >> 64) as u64;
            }
        }
    }
}
