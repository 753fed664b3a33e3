//! KAD: kernel audio distance, a squared maximum mean discrepancy (Chung et al. 2025, arXiv:2502.15602; Gretton et al.
//! 2012, unbiased estimate).
//!
//! `MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean k(x_i, y_j)`, and KAD is 100 times that
//! ([`KAD_SCALE`], as kadtk prints it). It needs no Gaussian assumption, has no bias in the number of rows, and comes out
//! slightly negative when both sets are alike.

use faer::Mat;
use serde::{Deserialize, Serialize};

use crate::pairwise::{Points, same_dim};
use crate::{Error, Result, Rows};

/// KAD is this many times the unbiased MMD².
pub const KAD_SCALE: f64 = 100.0;
/// Sets above this many rows are thinned to it (evenly spaced) for the median of their distances.
const MEDIAN_MAX_ROWS: usize = 8192;
/// kadtk adds it to `2 b²`, which keeps the kernel finite for a set of equal rows.
const GAMMA_EPSILON: f64 = 1e-8;

/// Kernel of the distance `s = g |a - b|²`, `g = 1/(2 b² + 1e-8)` with bandwidth `b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// `exp(-s)`, the default of kadtk.
    #[default]
    Gaussian,
    /// Inverse quadratic, `1/(1 + s)`: kadtk's `iq`.
    InverseQuadratic,
    /// Inverse multiquadric, `1/sqrt(1 + s)`: kadtk's `imq`.
    InverseMultiquadric,
}

impl Kernel {
    /// Sum of the kernel over squared distances.
    fn sum(self, gamma: f64, squared: &[f64]) -> f64 {
        pulp::Arch::new().dispatch(Sum { kernel: self, gamma, squared })
    }
}

/// A sum of kernels, compiled for the vector instructions of the machine it runs on.
struct Sum<'a> {
    kernel: Kernel,
    gamma: f64,
    squared: &'a [f64],
}

impl pulp::NullaryFnOnce for Sum<'_> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        match self.kernel {
            Kernel::Gaussian => self.of(|s| exp(-s)),
            Kernel::InverseQuadratic => self.of(|s| 1.0 / (1.0 + s)),
            Kernel::InverseMultiquadric => self.of(|s| 1.0 / (1.0 + s).sqrt()),
        }
    }
}

impl Sum<'_> {
    #[inline(always)]
    fn of(&self, kernel: impl Fn(f64) -> f64) -> f64 {
        let mut sums = [0.0f64; 8];
        let (whole, tail) = self.squared.as_chunks::<8>();
        for squared in whole {
            for (sum, d) in sums.iter_mut().zip(squared) {
                *sum += kernel(self.gamma * d);
            }
        }
        sums.iter().sum::<f64>() + tail.iter().map(|d| kernel(self.gamma * d)).sum::<f64>()
    }
}

/// `exp(x)` for `x <= 0`, within 1e-15 of itself; below -708, where it is under 4e-308, it gives what it gives there.
/// Without branches, so that several are computed at once (the standard library's are not).
#[inline(always)]
fn exp(x: f64) -> f64 {
    /// Adding it rounds to a whole number, which is then in the lowest bits.
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    /// `ln 2` in two parts; a whole number times the first is exact.
    const LN_2: [f64; 2] = [6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10];
    /// `1/k!` for k = 13, 12, …, 1, 0: the next term is below 5e-18.
    const TERMS: [f64; 14] = {
        let (mut terms, mut k) = ([1.0; 14], 1);
        while k < 14 {
            terms[13 - k] = terms[14 - k] / k as f64;
            k += 1;
        }
        terms
    };
    let x = x.max(-708.0);
    let rounded = x.mul_add(std::f64::consts::LOG2_E, ROUND);
    let k = rounded - ROUND;
    let rest = (-k).mul_add(LN_2[1], (-k).mul_add(LN_2[0], x)); // |rest| <= ln(2)/2
    let power = f64::from_bits((rounded.to_bits() << 52).wrapping_add(1023 << 52)); // 2^k
    let mut sum = TERMS[0];
    for term in &TERMS[1..] {
        sum = sum.mul_add(rest, *term);
    }
    sum * power
}

/// Median of the distances between all pairs of rows; the lower one of two middle ones, as torch's. Sets above 8192 rows
/// are thinned to 8192 evenly spaced ones.
///
/// # Errors
/// If there are fewer than two rows.
pub fn median_distance(rows: &Rows) -> Result<f64> {
    let n = rows.n();
    if n < 2 {
        return Err(Error::TooFew { what: "embeddings for a median distance", expected: 2, found: n });
    }
    let thinned;
    let rows = if n > MEDIAN_MAX_ROWS {
        let spaced: Vec<usize> = (0..MEDIAN_MAX_ROWS).map(|i| i * n / MEDIAN_MAX_ROWS).collect();
        thinned = rows.select(&spaced)?;
        &thinned
    } else {
        rows
    };
    let points = Points::new(rows, &rows.mean()?);
    let blocks = points.blocks(&points, true, |first, squared, n| {
        let rows = squared.chunks_exact(n).enumerate();
        rows.flat_map(|(i, row)| row[..first + i].to_vec()).collect::<Vec<f64>>()
    });
    let mut squared = blocks.concat();
    let middle = (squared.len() - 1) / 2;
    let (_, median, _) = squared.select_nth_unstable_by(middle, f64::total_cmp);
    Ok(median.sqrt())
}

/// A reference set with its kernel: each distance then costs the products with the evaluated rows only.
#[derive(Debug, Clone)]
pub struct KadReference {
    center: Vec<f64>,
    points: Points,
    kernel: Kernel,
    bandwidth: f64,
    /// Mean kernel of two different reference rows.
    within: f64,
}

impl KadReference {
    /// Takes the bandwidth from the reference ([`median_distance`]), so that all sets compared with it share a kernel.
    ///
    /// # Errors
    /// If there are fewer than two rows.
    pub fn new(reference: &Rows, kernel: Kernel) -> Result<Self> {
        Self::with_bandwidth(reference, kernel, median_distance(reference)?)
    }

    /// Uses the bandwidth given.
    ///
    /// # Errors
    /// If there are fewer than two rows, or the bandwidth is negative or not finite.
    pub fn with_bandwidth(reference: &Rows, kernel: Kernel, bandwidth: f64) -> Result<Self> {
        if !(bandwidth.is_finite() && bandwidth >= 0.0) {
            let expected = "finite and at least 0";
            return Err(Error::Parameter { name: "bandwidth", expected, found: bandwidth.to_string() });
        }
        if reference.n() < 2 {
            return Err(Error::TooFew { what: "reference embeddings", expected: 2, found: reference.n() });
        }
        let center = reference.mean()?;
        let points = Points::new(reference, &center);
        let mut made = Self { center, points, kernel, bandwidth, within: 0.0 };
        made.within = made.within(&made.points);
        Ok(made)
    }

    /// The bandwidth in use.
    pub fn bandwidth(&self) -> f64 {
        self.bandwidth
    }

    /// The kernel in use.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// KAD of the rows `[N, D]`: [`KAD_SCALE`] times [`KadReference::mmd`].
    ///
    /// # Errors
    /// As [`KadReference::mmd`].
    pub fn kad(&self, rows: &Rows) -> Result<f64> {
        Ok(KAD_SCALE * self.mmd(rows)?)
    }

    /// Unbiased MMD² of the rows `[N, D]` to the reference, at most 2; negative values are possible near 0.
    ///
    /// # Errors
    /// If there are fewer than two rows, or the dimension differs.
    pub fn mmd(&self, rows: &Rows) -> Result<f64> {
        same_dim("embeddings (against the reference)", self.center.len(), rows)?;
        if rows.n() < 2 {
            return Err(Error::TooFew { what: "embeddings of a song or set", expected: 2, found: rows.n() });
        }
        let points = Points::new(rows, &self.center);
        let cross: f64 = points
            .blocks(&self.points, false, |_, squared, _| self.kernel.sum(self.gamma(), squared))
            .iter()
            .sum();
        let cross = cross / (points.n() as f64 * self.points.n() as f64);
        Ok(self.within + self.within(&points) - 2.0 * cross)
    }

    fn gamma(&self) -> f64 {
        1.0 / (2.0 * self.bandwidth * self.bandwidth + GAMMA_EPSILON)
    }

    /// Mean kernel of two different rows.
    fn within(&self, points: &Points) -> f64 {
        let below = points.blocks(points, true, |first, squared, n| {
            let rows = squared.chunks_exact(n).enumerate();
            rows.map(|(i, row)| self.kernel.sum(self.gamma(), &row[..first + i])).sum::<f64>()
        });
        let n = points.n() as f64;
        2.0 * below.iter().sum::<f64>() / (n * (n - 1.0))
    }
}

/// KAD with the bandwidth of kadtk 1.1: the median distance of the **evaluated** set, so that every set has a kernel of
/// its own and values of different sets cannot be compared. In f64; kadtk computes in f32 and differs by up to 2e-5
/// (absolute) for that reason.
///
/// # Errors
/// If either set has fewer than two rows, or the dimensions differ.
pub fn kad_as_kadtk(reference: &Rows, evaluated: &Rows, kernel: Kernel) -> Result<f64> {
    same_dim("embeddings (against the reference)", reference.dim(), evaluated)?;
    KadReference::with_bandwidth(reference, kernel, median_distance(evaluated)?)?.kad(evaluated)
}

/// A fixed pool of songs: the KAD of any multiset of them from a table of kernel sums, for bootstraps.
#[derive(Debug)]
pub struct KadPool {
    lengths: Vec<f64>,
    /// Sum of the kernel over the rows of two songs, `[songs, songs]`.
    between: Mat<f64>,
    /// Sum of the kernel over a song's rows and all reference rows.
    cross: Vec<f64>,
    n_reference: f64,
    within: f64,
}

impl KadPool {
    /// Evaluates the kernel on all pairs of rows of the songs, once.
    ///
    /// # Errors
    /// If there is no song, or a dimension differs from the reference's.
    pub fn new(reference: &KadReference, songs: &[&Rows]) -> Result<Self> {
        for (i, song) in songs.iter().enumerate() {
            same_dim("embeddings (against the reference)", reference.center.len(), song)
                .map_err(|e| e.within(format!("song {i}")))?;
        }
        let all = Points::new(&Rows::concat(songs)?, &reference.center);
        let song_of: Vec<usize> =
            songs.iter().enumerate().flat_map(|(s, song)| std::iter::repeat_n(s, song.n())).collect();
        let sum = |squared: &[f64]| reference.kernel.sum(reference.gamma(), squared);
        let by_row: Vec<f64> = all
            .blocks(&reference.points, false, |_, squared, n| {
                squared.chunks_exact(n).map(sum).collect::<Vec<_>>()
            })
            .concat();
        let mut cross = vec![0.0; songs.len()];
        song_of.iter().zip(&by_row).for_each(|(&s, k)| cross[s] += k);
        // Per row the sums over each song; rows of a song are neighbours.
        let ends: Vec<usize> = songs
            .iter()
            .scan(0, |end, song| {
                *end += song.n();
                Some(*end)
            })
            .collect();
        let by_row: Vec<Vec<f64>> = all
            .blocks(&all, false, |_, squared, n| {
                let song_sums = |row: &[f64]| {
                    let mut start = 0;
                    let sums = ends.iter().map(|&end| sum(&row[std::mem::replace(&mut start, end)..end]));
                    sums.collect::<Vec<f64>>()
                };
                squared.chunks_exact(n).map(song_sums).collect::<Vec<_>>()
            })
            .concat();
        let mut between = Mat::zeros(songs.len(), songs.len());
        for (&s, sums) in song_of.iter().zip(&by_row) {
            sums.iter().enumerate().for_each(|(t, k)| between[(s, t)] += k);
        }
        let lengths = songs.iter().map(|song| song.n() as f64).collect();
        let (n_reference, within) = (reference.points.n() as f64, reference.within);
        Ok(Self { lengths, between, cross, n_reference, within })
    }

    /// KAD of the songs `members` (indices into the pool; a song drawn twice counts twice).
    ///
    /// # Errors
    /// If an index is out of range or the members have fewer than two rows together.
    pub fn kad(&self, members: &[usize]) -> Result<f64> {
        let len = self.lengths.len();
        if let Some(&index) = members.iter().find(|&&m| m >= len) {
            return Err(Error::Index { what: "song", index, len });
        }
        let n: f64 = members.iter().map(|&m| self.lengths[m]).sum();
        if n < 2.0 {
            return Err(Error::TooFew { what: "embeddings of a subset", expected: 2, found: n as usize });
        }
        let cross: f64 = members.iter().map(|&m| self.cross[m]).sum();
        // All ordered pairs, less each row with itself (kernel 1).
        let pairs: f64 =
            members.iter().map(|&s| members.iter().map(|&t| self.between[(s, t)]).sum::<f64>()).sum();
        let mmd = self.within + (pairs - n) / (n * (n - 1.0)) - 2.0 * cross / (n * self.n_reference);
        Ok(KAD_SCALE * mmd)
    }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exponentials_are_those_of_the_standard_library_to_1e_15() {
        for i in 0..200_000 {
            let x = -0.003_541 * f64::from(i);
            let (got, want) = (exp(x), x.exp());
            let off = (got - want).abs();
            assert!(off <= 1e-15 * want || x < -708.0 && got < 4e-308, "exp({x}) = {got:e}, want {want:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f64::NEG_INFINITY) < 4e-308);
    }
}
