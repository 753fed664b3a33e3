//! Vendi score: the effective number of different songs (paper Eq. 4; Friedman and Dieng 2023, arXiv:2210.02410).
//!
//! Rows are normalised to length 1, `K = X Xᵀ/n`, and the score is `exp(-Σ l ln l)` over the eigenvalues of `K`
//! (`0 ln 0 = 0`): 1 when all rows agree, `n` when all are orthogonal. With more rows than dimensions the dual
//! `Xᵀ X/n` has the same non-zero eigenvalues. At most `min(different rows, D)` are kept; the rest is rounding.

use faer::Mat;

use crate::linalg::{gram_lower, mirror_lower, symmetric_eigenvalues};
use crate::rows::view;
use crate::{Error, Result, Rows};

/// Vendi score of order 1, in [1, n].
///
/// # Errors
/// If there is no row, or a row is all zeros.
pub fn vendi(rows: &Rows) -> Result<f64> {
    vendi_order(rows, 1.0)
}

/// Vendi score of order `q` in [0, ∞]: `(Σ l^q)^(1/(1-q))`; 1 is the limit `exp(entropy)`, ∞ is `1/max l`,
/// 0 counts the eigenvalues above `n ε max l`. In [1, n], falling in `q`.
///
/// # Errors
/// If there is no row, a row is all zeros, or `q` is negative or NaN.
pub fn vendi_order(rows: &Rows, q: f64) -> Result<f64> {
    let n = rows.n();
    if n == 0 {
        return Err(Error::TooFew { what: "embeddings for a Vendi score", expected: 1, found: 0 });
    }
    let unit = rows.normalized("embeddings for a Vendi score")?;
    let x = view(unit.data(), n, unit.dim());
    let scale = 1.0 / n as f64;
    let k = if n <= unit.dim() { gram_lower(x, scale) } else { gram_lower(x.transpose(), scale) };
    let values = symmetric_eigenvalues(k.as_ref())?;
    effective_number(&values, unit.unique().min(unit.dim()), q)
}

/// A fixed pool of embeddings: the Vendi score of any multiset of its rows, from one Gram matrix.
#[derive(Debug)]
pub struct VendiPool {
    gram: Mat<f64>,
    classes: Vec<usize>,
    dim: usize,
}

impl VendiPool {
    /// Makes the Gram matrix of the pool, `n²` numbers.
    ///
    /// # Errors
    /// If there is no row, or a row is all zeros.
    pub fn new(rows: &Rows) -> Result<Self> {
        if rows.n() == 0 {
            return Err(Error::TooFew { what: "embeddings for a Vendi score", expected: 1, found: 0 });
        }
        let unit = rows.normalized("embeddings for a Vendi score")?;
        let mut gram = gram_lower(view(unit.data(), unit.n(), unit.dim()), 1.0);
        mirror_lower(&mut gram);
        Ok(Self { gram, classes: unit.classes(), dim: unit.dim() })
    }

    /// Number of rows in the pool.
    pub fn n(&self) -> usize {
        self.classes.len()
    }

    /// Vendi score of order 1 of the rows `members` (a row drawn twice counts twice).
    ///
    /// # Errors
    /// If `members` is empty or an index is out of range.
    pub fn vendi(&self, members: &[usize]) -> Result<f64> {
        if members.is_empty() {
            return Err(Error::TooFew { what: "embeddings for a Vendi score", expected: 1, found: 0 });
        }
        // Equal rows become one row with a weight: sqrt(w_i w_j) k_ij / n has the same non-zero eigenvalues.
        let mut weights = vec![0.0f64; self.n()];
        for &m in members {
            if m >= self.n() {
                return Err(Error::Index { what: "embedding", index: m, len: self.n() });
            }
            weights[self.classes[m]] += 1.0;
        }
        let rows: Vec<usize> = (0..self.n()).filter(|&i| weights[i] > 0.0).collect();
        let n = members.len() as f64;
        let roots: Vec<f64> = rows.iter().map(|&i| (weights[i] / n).sqrt()).collect();
        let k = Mat::from_fn(rows.len(), rows.len(), |i, j| {
            if i < j { 0.0 } else { self.gram[(rows[i], rows[j])] * roots[i] * roots[j] }
        });
        effective_number(&symmetric_eigenvalues(k.as_ref())?, rows.len().min(self.dim), 1.0)
    }
}

fn effective_number(rising: &[f64], keep: usize, q: f64) -> Result<f64> {
    if q.is_nan() || q < 0.0 {
        return Err(Error::Parameter { name: "order q", expected: "0 to infinity", found: q.to_string() });
    }
    let kept = &rising[rising.len().saturating_sub(keep)..];
    let largest = kept.last().copied().unwrap_or(0.0);
    let positive = kept.iter().copied().filter(|l| *l > 0.0);
    Ok(if q == 1.0 {
        (-positive.map(|l| l * l.ln()).sum::<f64>()).exp()
    } else if q == 0.0 {
        let floor = rising.len() as f64 * f64::EPSILON * largest;
        kept.iter().filter(|l| **l > floor).count() as f64
    } else if q.is_infinite() {
        1.0 / largest
    } else {
        positive.map(|l| l.powf(q)).sum::<f64>().powf(1.0 / (1.0 - q))
    })
}
