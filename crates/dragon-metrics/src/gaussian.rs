//! Mean and covariance of a set of embeddings, in one streaming pass.

use faer::Mat;

use crate::linalg::add_gram_lower;
use crate::rows::view;
use crate::{Error, Result, Rows};

/// Asymmetry that is taken as rounding: this fraction of the largest variance.
const SYMMETRY_TOLERANCE: f64 = 1e-6;

/// A Gaussian: mean `[D]`, sample covariance (ddof 1) `[D, D]`, and how many rows they summarise.
#[derive(Debug, Clone, PartialEq)]
pub struct GaussianStats {
    mean: Vec<f64>,
    cov: Vec<f64>,
    n: Option<usize>,
}

impl GaussianStats {
    /// Checks and takes a mean `[D]` and a covariance `[D, D]` (row-major).
    ///
    /// `n` is the number of rows they came from, where known: it bounds the rank, which sharpens the distance when
    /// `n <= D`. Files written by fadtk do not hold it.
    ///
    /// # Errors
    /// If sizes disagree, a value is not finite, a variance is negative, or the covariance is asymmetric by more than
    /// 1e-6 of its largest variance (below that it is symmetrised).
    pub fn new(mean: Vec<f64>, mut cov: Vec<f64>, n: Option<usize>) -> Result<Self> {
        let dim = mean.len();
        if dim == 0 {
            return Err(Error::TooFew { what: "entries of the mean", expected: 1, found: 0 });
        }
        if dim.checked_mul(dim) != Some(cov.len()) {
            return Err(Error::Dimension {
                what: "covariance entries (dimension of the mean, squared)",
                expected: dim.saturating_mul(dim),
                found: cov.len(),
            });
        }
        if let Some(n) = n
            && n < 2
        {
            return Err(Error::TooFew { what: "rows behind a covariance", expected: 2, found: n });
        }
        if let Some(column) = mean.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite { what: "mean", row: 0, column, value: mean[column] });
        }
        if let Some(at) = cov.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite {
                what: "covariance",
                row: at / dim,
                column: at % dim,
                value: cov[at],
            });
        }
        let largest = (0..dim).map(|i| cov[i * dim + i].abs()).fold(0.0, f64::max);
        if let Some(i) = (0..dim).find(|i| cov[i * dim + i] < -SYMMETRY_TOLERANCE * largest) {
            return Err(Error::NotPositive { smallest: cov[i * dim + i], largest });
        }
        for i in 0..dim {
            for j in 0..i {
                let (a, b) = (cov[i * dim + j], cov[j * dim + i]);
                if (a - b).abs() > SYMMETRY_TOLERANCE * largest {
                    return Err(Error::NotSymmetric { row: i, column: j, value: a, mirrored: b });
                }
                let middle = a + 0.5 * (b - a); // exactly a when a == b
                cov[i * dim + j] = middle;
                cov[j * dim + i] = middle;
            }
        }
        Ok(Self { mean, cov, n })
    }

    /// Statistics of the rows.
    ///
    /// # Errors
    /// If there are fewer than two rows.
    pub fn fit(rows: &Rows) -> Result<Self> {
        let mut moments = Moments::new(rows.dim());
        moments.push(rows)?;
        moments.stats()
    }

    /// Mean, `[D]`.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Covariance with ddof 1, `[D, D]`, row-major, exactly symmetric.
    pub fn cov(&self) -> &[f64] {
        &self.cov
    }

    /// Number of rows summarised, if known; at least 2.
    pub fn n(&self) -> Option<usize> {
        self.n
    }

    /// Dimension `D`.
    pub fn dim(&self) -> usize {
        self.mean.len()
    }

    /// Trace of the covariance: the total variance.
    pub fn trace(&self) -> f64 {
        (0..self.dim()).map(|i| self.cov[i * self.dim() + i]).sum()
    }

    /// Largest rank that the covariance can have: `min(n - 1, D)`.
    pub fn rank_bound(&self) -> usize {
        self.n.map_or(self.dim(), |n| (n - 1).min(self.dim()))
    }
}

/// Count, mean and scatter matrix of a stream of rows; memory `D²`, whatever the number of rows.
///
/// Blocks are merged by Chan et al. (1979): exact up to rounding. The order of the blocks moves the last bits only;
/// the same blocks in the same order give the same bits.
#[derive(Debug, Clone)]
pub struct Moments {
    n: usize,
    mean: Vec<f64>,
    /// Lower triangle of `sum (x - mean)(x - mean)ᵀ`.
    scatter: Mat<f64>,
}

impl Moments {
    /// An empty accumulator for rows of dimension `dim`.
    pub fn new(dim: usize) -> Self {
        Self { n: 0, mean: vec![0.0; dim], scatter: Mat::zeros(dim, dim) }
    }

    /// Number of rows seen.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Dimension `D`.
    pub fn dim(&self) -> usize {
        self.mean.len()
    }

    /// Adds a block of rows (an empty block changes nothing).
    ///
    /// # Errors
    /// If the dimension differs.
    pub fn push(&mut self, rows: &Rows) -> Result<()> {
        if rows.dim() != self.dim() {
            return Err(Error::Dimension { what: "embeddings", expected: self.dim(), found: rows.dim() });
        }
        if rows.n() == 0 {
            return Ok(());
        }
        let mean = rows.mean()?;
        let centered = rows.centered(&mean);
        add_gram_lower(self.scatter.as_mut(), view(&centered, rows.n(), rows.dim()).transpose(), 1.0);
        self.shift_to(&mean, rows.n());
        Ok(())
    }

    /// Adds everything another accumulator has seen.
    ///
    /// # Errors
    /// If the dimension differs.
    pub fn merge(&mut self, other: &Moments) -> Result<()> {
        if other.dim() != self.dim() {
            return Err(Error::Dimension { what: "moments", expected: self.dim(), found: other.dim() });
        }
        if other.n == 0 {
            return Ok(());
        }
        for j in 0..self.dim() {
            for i in j..self.dim() {
                self.scatter[(i, j)] += other.scatter[(i, j)];
            }
        }
        self.shift_to(&other.mean, other.n);
        Ok(())
    }

    /// Replaces the mean, and nothing else: tools that round it merge with the rounded one.
    pub(crate) fn set_mean(&mut self, mean: &[f64]) {
        self.mean.copy_from_slice(mean);
    }

    /// The between-blocks part of a merge: `d dᵀ n m/(n+m)`, `d` the difference of the means.
    fn shift_to(&mut self, mean: &[f64], m: usize) {
        let (n, m_f) = (self.n as f64, m as f64);
        let total = n + m_f;
        let d: Vec<f64> = mean.iter().zip(&self.mean).map(|(a, b)| a - b).collect();
        if self.n > 0 {
            let weight = n * m_f / total;
            for (j, dj) in d.iter().enumerate() {
                for (to, di) in self.scatter.col_as_slice_mut(j)[j..].iter_mut().zip(&d[j..]) {
                    *to += di * (dj * weight);
                }
            }
        }
        for (a, d) in self.mean.iter_mut().zip(&d) {
            *a += d * (m_f / total);
        }
        self.n += m;
    }

    /// Mean and covariance (ddof 1) so far.
    ///
    /// # Errors
    /// If fewer than two rows were seen.
    pub fn stats(&self) -> Result<GaussianStats> {
        if self.n < 2 {
            return Err(Error::TooFew { what: "embeddings for a covariance", expected: 2, found: self.n });
        }
        let dim = self.dim();
        let scale = 1.0 / (self.n as f64 - 1.0);
        let mut cov = vec![0.0; dim * dim];
        for i in 0..dim {
            for j in 0..=i {
                let value = self.scatter[(i, j)] * scale;
                cov[i * dim + j] = value;
                cov[j * dim + i] = value;
            }
        }
        GaussianStats::new(self.mean.clone(), cov, Some(self.n))
    }
}
