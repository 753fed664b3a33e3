//! `[N, D]` embeddings, checked once.

use faer::MatRef;

use crate::{Error, Result};

/// `N` embeddings of dimension `D`, row after row, in f64; every value is finite.
///
/// Reading f16 or f32 embeddings promotes them; nothing is rounded down again.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    n: usize,
    dim: usize,
    data: Vec<f64>,
}

impl Rows {
    /// Takes `data` as `n` rows of `dim` values.
    ///
    /// # Errors
    /// If `data.len() != n * dim`, `dim` is 0, or a value is NaN or infinite (the message names its row).
    /// `n = 0` is accepted: what needs rows says so itself.
    pub fn new(n: usize, dim: usize, data: Vec<f64>) -> Result<Self> {
        if dim == 0 {
            return Err(Error::TooFew { what: "columns of the embeddings", expected: 1, found: 0 });
        }
        if n.checked_mul(dim) != Some(data.len()) {
            return Err(Error::Dimension {
                what: "length of the embedding data (rows x columns)",
                expected: n.saturating_mul(dim),
                found: data.len(),
            });
        }
        if let Some(at) = data.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite {
                what: "embeddings",
                row: at / dim,
                column: at % dim,
                value: data[at],
            });
        }
        Ok(Self { n, dim, data })
    }

    /// [`Rows::new`] from f32 values.
    ///
    /// # Errors
    /// As [`Rows::new`].
    pub fn from_f32(n: usize, dim: usize, data: &[f32]) -> Result<Self> {
        Self::new(n, dim, data.iter().map(|&x| f64::from(x)).collect())
    }

    /// One row after another; all of the same length.
    ///
    /// # Errors
    /// If there is no row, the lengths differ, or a value is not finite.
    pub fn from_vecs<R: AsRef<[f64]>>(rows: &[R]) -> Result<Self> {
        let Some(first) = rows.first() else {
            return Err(Error::TooFew { what: "embeddings", expected: 1, found: 0 });
        };
        let dim = first.as_ref().len();
        let mut data = Vec::with_capacity(rows.len() * dim);
        for row in rows {
            let row = row.as_ref();
            if row.len() != dim {
                return Err(Error::Dimension { what: "embedding row", expected: dim, found: row.len() });
            }
            data.extend_from_slice(row);
        }
        Self::new(rows.len(), dim, data)
    }

    /// All rows of several sets, in order.
    ///
    /// # Errors
    /// If `sets` is empty or the dimensions differ.
    pub fn concat(sets: &[&Rows]) -> Result<Self> {
        let Some(first) = sets.first() else {
            return Err(Error::TooFew { what: "sets of embeddings", expected: 1, found: 0 });
        };
        let mut data = Vec::with_capacity(sets.iter().map(|s| s.data.len()).sum());
        for set in sets {
            if set.dim != first.dim {
                return Err(Error::Dimension { what: "embeddings", expected: first.dim, found: set.dim });
            }
            data.extend_from_slice(&set.data);
        }
        Ok(Self { n: data.len() / first.dim, dim: first.dim, data })
    }

    /// The rows `indices`, in that order; a row may be taken several times.
    ///
    /// # Errors
    /// If an index is out of range.
    pub fn select(&self, indices: &[usize]) -> Result<Self> {
        let mut data = Vec::with_capacity(indices.len() * self.dim);
        for &index in indices {
            if index >= self.n {
                return Err(Error::Index { what: "embedding", index, len: self.n });
            }
            data.extend_from_slice(self.row(index));
        }
        Ok(Self { n: indices.len(), dim: self.dim, data })
    }

    /// Number of rows `N`.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Dimension `D` of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// All values, row after row.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// All values, row after row, without a copy.
    pub(crate) fn into_data(self) -> Vec<f64> {
        self.data
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If `i >= n`.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.dim..(i + 1) * self.dim]
    }

    /// The rows, in order.
    pub fn iter(&self) -> std::slice::ChunksExact<'_, f64> {
        self.data.chunks_exact(self.dim)
    }

    /// Mean over the rows, `[D]`.
    ///
    /// # Errors
    /// If there is no row.
    pub fn mean(&self) -> Result<Vec<f64>> {
        if self.n == 0 {
            return Err(Error::TooFew { what: "embeddings", expected: 1, found: 0 });
        }
        let mut mean = vec![0.0; self.dim];
        for row in self.iter() {
            add(&mut mean, row);
        }
        let n = self.n as f64;
        mean.iter_mut().for_each(|m| *m /= n);
        // Second pass: the rounding error of the first sum is itself averaged away.
        let mut rest = vec![0.0; self.dim];
        for row in self.iter() {
            for ((r, x), m) in rest.iter_mut().zip(row).zip(&mean) {
                *r += x - m;
            }
        }
        for (m, r) in mean.iter_mut().zip(&rest) {
            *m += r / n;
        }
        Ok(mean)
    }

    /// The rows minus `center`, same layout.
    pub(crate) fn centered(&self, center: &[f64]) -> Vec<f64> {
        let mut out = Vec::with_capacity(self.data.len());
        for row in self.iter() {
            out.extend(row.iter().zip(center).map(|(x, c)| x - c));
        }
        out
    }

    /// Every row divided by its length.
    ///
    /// # Errors
    /// If a row is all zeros.
    pub fn normalized(&self, what: &'static str) -> Result<Rows> {
        let mut data = Vec::with_capacity(self.data.len());
        for (i, row) in self.iter().enumerate() {
            let length = norm(row);
            if length == 0.0 {
                return Err(Error::ZeroRow { what, row: i });
            }
            data.extend(row.iter().map(|x| x / length));
        }
        Ok(Rows { n: self.n, dim: self.dim, data })
    }

    /// For every row the number of the first row equal to it, so that equal rows share a number.
    pub(crate) fn classes(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.n).collect();
        let compare = |a: &usize, b: &usize| {
            self.row(*a).partial_cmp(self.row(*b)).expect("rows hold no NaN").then(a.cmp(b))
        };
        order.sort_unstable_by(compare);
        let mut class = vec![0; self.n];
        let mut first = 0;
        for (k, &i) in order.iter().enumerate() {
            if k == 0 || self.row(order[k - 1]) != self.row(i) {
                first = i;
            }
            class[i] = first;
        }
        class
    }

    /// Number of different rows.
    pub fn unique(&self) -> usize {
        self.classes().iter().enumerate().filter(|(i, c)| i == *c).count()
    }
}

impl TryFrom<&nalgebra::DMatrix<f64>> for Rows {
    type Error = Error;

    /// One embedding a row of the matrix.
    fn try_from(matrix: &nalgebra::DMatrix<f64>) -> Result<Self> {
        Self::new(matrix.nrows(), matrix.ncols(), matrix.transpose().as_slice().to_vec())
    }
}

/// View of row-major values as an `[n, dim]` matrix.
pub(crate) fn view(data: &[f64], n: usize, dim: usize) -> MatRef<'_, f64> {
    MatRef::from_row_major_slice(data, n, dim)
}

/// `acc += x`.
pub(crate) fn add(acc: &mut [f64], x: &[f64]) {
    for (a, x) in acc.iter_mut().zip(x) {
        *a += x;
    }
}

/// Inner product, summed in eight fixed lanes (order independent of the machine).
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let (mut ca, mut cb) = (a.chunks_exact(8), b.chunks_exact(8));
    for (x, y) in (&mut ca).zip(&mut cb) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += x * y;
        }
    }
    let tail: f64 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f64>() + tail
}

/// Euclidean length without overflow for any finite input.
pub(crate) fn norm(x: &[f64]) -> f64 {
    let largest = x.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    if largest == 0.0 || (1e-100..1e100).contains(&largest) {
        return dot(x, x).sqrt();
    }
    x.iter().map(|v| (v / largest).powi(2)).sum::<f64>().sqrt() * largest
}
