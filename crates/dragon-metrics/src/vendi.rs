//! Vendi score: the effective number of different songs (paper Eq. 4; Friedman and Dieng 2023, arXiv:2210.02410).
//!
//! Rows are normalised to length 1, `K = X Xᵀ/n`, and the score is `exp(-Σ l ln l)` over the eigenvalues of `K`
//! (`0 ln 0 = 0`): 1 when all rows agree, `n` when all are orthogonal. With more rows than dimensions the dual
//! `Xᵀ X/n` has the same non-zero eigenvalues. At most `min(different rows, D)` are kept; the rest is rounding.
//!
//! [`vendi`] and [`vendi_order`] choose the smaller of the two matrices; [`vendi_weighted`] gives rows probabilities;
//! [`VendiBatches`] sees the rows in batches and keeps only the dual; [`vendi_of_kernel`] takes a similarity matrix of any
//! origin; [`VendiPool`] serves many subsets.

use faer::Mat;

use crate::linalg::{add_gram_lower, gram_lower, mirror_lower, symmetric_eigenvalues};
use crate::rows::view;
use crate::{Error, Result, Rows};

/// Asymmetry of a similarity matrix, and distance of its diagonal from 1, that count as rounding.
const KERNEL_TOLERANCE: f64 = 1e-6;
/// How far probabilities may sum from 1.
const PROBABILITY_TOLERANCE: f64 = 1e-9;

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
    vendi_weighted(rows, &vec![1.0 / n as f64; n], q)
}

/// Vendi score of order `q` where row `i` has probability `p[i]`: the eigenvalues of `sqrt(p_i p_j) k_ij`. From
/// 1 to the number of rows with a probability above 0.
///
/// # Errors
/// As [`vendi_order`], and if `p` does not have one entry a row, one is negative, or they do not sum to 1 within 1e-9.
pub fn vendi_weighted(rows: &Rows, p: &[f64], q: f64) -> Result<f64> {
    let n = rows.n();
    if n == 0 {
        return Err(Error::TooFew { what: "embeddings for a Vendi score", expected: 1, found: 0 });
    }
    check_probabilities(p, n)?;
    check_order(q)?;
    let unit = rows.normalized("embeddings for a Vendi score")?;
    let (dim, classes) = (unit.dim(), unit.classes());
    let mut present: Vec<usize> = classes.iter().zip(p).filter(|(_, p)| **p > 0.0).map(|(c, _)| *c).collect();
    present.sort_unstable();
    present.dedup();
    let mut scaled = unit.into_data();
    for (row, p) in scaled.chunks_exact_mut(dim).zip(p) {
        let root = p.sqrt();
        row.iter_mut().for_each(|x| *x *= root);
    }
    let x = view(&scaled, n, dim);
    let k = if n <= dim { gram_lower(x, 1.0) } else { gram_lower(x.transpose(), 1.0) };
    let values = symmetric_eigenvalues(k.as_ref())?;
    Ok(effective_number(&values, present.len().min(dim), q))
}

/// Vendi score of order `q` of a similarity matrix `k` `[n, n]` (row-major, symmetric, positive semi-definite, ones on
/// the diagonal), each element with probability `p[i]`, or all alike. In [1, n].
///
/// # Errors
/// If `k` is not `n x n` finite numbers, is not symmetric or its diagonal not 1 (both within 1e-6), `n` is 0, or `p` or
/// `q` is out of range as in [`vendi_weighted`].
pub fn vendi_of_kernel(k: &[f64], n: usize, p: Option<&[f64]>, q: f64) -> Result<f64> {
    if n == 0 {
        return Err(Error::TooFew { what: "elements for a Vendi score", expected: 1, found: 0 });
    }
    let k = Rows::new(n, n, k.to_vec())?;
    let uniform = vec![1.0 / n as f64; n];
    let p = p.unwrap_or(&uniform);
    check_probabilities(p, n)?;
    check_order(q)?;
    for i in 0..n {
        if (k.row(i)[i] - 1.0).abs() > KERNEL_TOLERANCE {
            let expected = "1 on the diagonal (an element is like itself)";
            return Err(Error::Parameter { name: "similarity", expected, found: k.row(i)[i].to_string() });
        }
        for j in 0..i {
            let (value, mirrored) = (k.row(i)[j], k.row(j)[i]);
            if (value - mirrored).abs() > KERNEL_TOLERANCE {
                return Err(Error::NotSymmetric { row: i, column: j, value, mirrored });
            }
        }
    }
    let weighted = Mat::from_fn(n, n, |i, j| if i < j { 0.0 } else { k.row(i)[j] * (p[i] * p[j]).sqrt() });
    let present = p.iter().filter(|p| **p > 0.0).count();
    Ok(effective_number(&symmetric_eigenvalues(weighted.as_ref())?, present, q))
}

/// The dual `Xᵀ X` of rows that arrive in batches; memory `D²`, whatever the number of rows.
///
/// Equal rows are not recognised here, so that orders below 1 count rounding as tiny eigenvalues when fewer than D
/// different rows were seen; [`vendi_order`] on all rows does not.
#[derive(Debug, Clone)]
pub struct VendiBatches {
    n: usize,
    /// Lower triangle of the sum.
    second: Mat<f64>,
}

impl VendiBatches {
    /// Nothing seen yet, rows of dimension `dim`.
    pub fn new(dim: usize) -> Self {
        Self { n: 0, second: Mat::zeros(dim, dim) }
    }

    /// Adds a batch of rows.
    ///
    /// # Errors
    /// If the dimension differs or a row is all zeros.
    pub fn push(&mut self, rows: &Rows) -> Result<()> {
        let dim = self.second.nrows();
        if rows.dim() != dim {
            return Err(Error::Dimension { what: "embeddings", expected: dim, found: rows.dim() });
        }
        let unit = rows.normalized("embeddings for a Vendi score")?;
        add_gram_lower(self.second.as_mut(), view(unit.data(), unit.n(), dim).transpose(), 1.0);
        self.n += rows.n();
        Ok(())
    }

    /// Number of rows seen.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Vendi score of order `q` of all rows seen, as [`vendi_order`].
    ///
    /// # Errors
    /// If no row was seen, or `q` is negative or NaN.
    pub fn score(&self, q: f64) -> Result<f64> {
        check_order(q)?;
        if self.n == 0 {
            return Err(Error::TooFew { what: "embeddings for a Vendi score", expected: 1, found: 0 });
        }
        let scale = 1.0 / self.n as f64;
        let values: Vec<f64> =
            symmetric_eigenvalues(self.second.as_ref())?.into_iter().map(|l| l * scale).collect();
        Ok(effective_number(&values, self.n.min(values.len()), q))
    }
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
        self.vendi_order(members, 1.0)
    }

    /// The same of order `q`, as [`vendi_order`].
    ///
    /// # Errors
    /// As [`VendiPool::vendi`], and if `q` is negative or NaN.
    pub fn vendi_order(&self, members: &[usize], q: f64) -> Result<f64> {
        check_order(q)?;
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
        Ok(effective_number(&symmetric_eigenvalues(k.as_ref())?, rows.len().min(self.dim), q))
    }
}

fn check_order(q: f64) -> Result<()> {
    if q >= 0.0 {
        return Ok(());
    }
    Err(Error::Parameter { name: "order q", expected: "0 to infinity", found: q.to_string() })
}

fn check_probabilities(p: &[f64], n: usize) -> Result<()> {
    if p.len() != n {
        return Err(Error::Dimension { what: "probabilities", expected: n, found: p.len() });
    }
    let sum: f64 = p.iter().sum();
    if p.iter().any(|p| *p < 0.0) || (sum - 1.0).abs() > PROBABILITY_TOLERANCE || sum.is_nan() {
        let expected = "probabilities of at least 0 that sum to 1";
        return Err(Error::Parameter {
            name: "weights of the embeddings",
            expected,
            found: format!("sum {sum}"),
        });
    }
    Ok(())
}

/// Hill number of order `q` of the `keep` largest eigenvalues.
fn effective_number(rising: &[f64], keep: usize, q: f64) -> f64 {
    let kept = &rising[rising.len().saturating_sub(keep)..];
    let largest = kept.last().copied().unwrap_or(0.0);
    let positive = kept.iter().copied().filter(|l| *l > 0.0);
    if q == 1.0 {
        (-positive.map(|l| l * l.ln()).sum::<f64>()).exp()
    } else if q == 0.0 {
        let floor = rising.len() as f64 * f64::EPSILON * largest;
        kept.iter().filter(|l| **l > floor).count() as f64
    } else if q.is_infinite() {
        1.0 / largest
    } else {
        positive.map(|l| l.powf(q)).sum::<f64>().powf(1.0 / (1.0 - q))
    }
}
