//! Squared distances between all rows of two sets, block by block, so that memory does not grow with the product.

use rayon::prelude::*;

use faer::MatMut;

use crate::linalg::{TILE, product_into};
use crate::rows::{dot, view};
use crate::{Error, Result, Rows};

/// Rows per block.
const BLOCK: usize = 128;

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
    /// With `below`, `other` must be `self`, and of row `i` only the distances to the rows `0..i` are to be used.
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
                // Tile by tile; transposed, so that the distances of one row lie side by side in faer's columns.
                let mut distances = vec![0.0; m * n];
                for start in (0..n).step_by(TILE) {
                    let end = (start + TILE).min(n);
                    let tile = MatMut::from_column_major_slice_mut(&mut distances, n, m);
                    let others = view(&other.data[start * self.dim..end * self.dim], end - start, self.dim);
                    let x = view(x, m, self.dim).transpose();
                    product_into(tile.subrows_mut(start, end - start), others, x);
                    for (row, square) in distances.chunks_exact_mut(n).zip(&self.squares[first..]) {
                        for (to, bb) in row[start..end].iter_mut().zip(&other.squares[start..end]) {
                            *to = (square + bb - 2.0 * *to).max(0.0);
                        }
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
