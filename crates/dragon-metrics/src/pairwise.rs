//! Squared distances between all rows of two sets, block by block, so that memory does not grow with the product.

use rayon::prelude::*;

use crate::linalg::product;
use crate::rows::{dot, view};
use crate::{Error, Result, Rows};

/// Rows per block.
const BLOCK: usize = 256;

/// Rows relative to a common centre, with their squared lengths: `|a - b|² = |a|² + |b|² - 2 a·b` then loses nothing to
/// an offset that all rows share.
#[derive(Debug, Clone)]
pub(crate) struct Points {
    n: usize,
    dim: usize,
    data: Vec<f64>,
    squares: Vec<f64>,
}

impl Points {
    /// `rows - center`.
    pub fn new(rows: &Rows, center: &[f64]) -> Self {
        let data = rows.centered(center);
        let squares = data.chunks_exact(rows.dim()).map(|x| dot(x, x)).collect();
        Self { n: rows.n(), dim: rows.dim(), data, squares }
    }

    pub fn n(&self) -> usize {
        self.n
    }

    /// Calls `each` for blocks of rows of `self`, in parallel, with the block's first row and its squared distances to
    /// the rows of `other`, `[block, other.n]`, row after row; returns what it gives, in order.
    ///
    /// With `below`, `other` must be `self`, and row `i` holds the distances to the rows `0..i` only (the rest is zero).
    pub fn blocks<T: Send>(
        &self,
        other: &Points,
        below: bool,
        each: impl Fn(usize, &[f64], usize) -> T + Sync,
    ) -> Vec<T> {
        self.data
            .par_chunks(BLOCK * self.dim)
            .enumerate()
            .map(|(b, x)| {
                let (first, m) = (b * BLOCK, x.len() / self.dim);
                let n = if below { first + m } else { other.n };
                // Transposed, so that the distances of one row lie side by side in faer's column-major result.
                let cross =
                    product(view(&other.data[..n * self.dim], n, self.dim), view(x, m, self.dim).transpose());
                let mut distances = vec![0.0; m * n];
                for (i, row) in distances.chunks_exact_mut(n).enumerate() {
                    let end = if below { first + i } else { n };
                    let square = self.squares[first + i];
                    let cross = &cross.col_as_slice(i)[..end];
                    for ((to, ab), bb) in row[..end].iter_mut().zip(cross).zip(&other.squares) {
                        *to = (square + bb - 2.0 * ab).max(0.0);
                    }
                }
                each(first, &distances, n)
            })
            .collect()
    }
}

/// Squared distances `[a.n, b.n]`, row after row, each as the sum of squared differences in one fixed order: equal rows
/// have distance 0, and the distance of two rows does not depend on where they stand. Slower than [`Points::blocks`].
pub(crate) fn exact_squared_distances(a: &Rows, b: &Rows) -> Vec<f64> {
    let mut out = vec![0.0; a.n() * b.n()];
    if b.n() > 0 {
        out.par_chunks_mut(b.n()).zip(a.data().par_chunks(a.dim())).for_each(|(to, x)| {
            for (to, y) in to.iter_mut().zip(b.iter()) {
                let mut lanes = [0.0; 8];
                let (mut cx, mut cy) = (x.chunks_exact(8), y.chunks_exact(8));
                for (x, y) in (&mut cx).zip(&mut cy) {
                    for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
                        *lane += (x - y) * (x - y);
                    }
                }
                let tail: f64 =
                    cx.remainder().iter().zip(cy.remainder()).map(|(x, y)| (x - y) * (x - y)).sum();
                *to = lanes.iter().sum::<f64>() + tail;
            }
        });
    }
    out
}

/// [`Error::Dimension`] unless the sets agree.
pub(crate) fn same_dim(what: &'static str, expected: usize, rows: &Rows) -> Result<()> {
    if rows.dim() == expected {
        return Ok(());
    }
    Err(Error::Dimension { what, expected, found: rows.dim() })
}
