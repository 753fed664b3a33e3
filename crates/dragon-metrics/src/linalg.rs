//! Symmetric eigenvalues and products, on one thread, always in the same order.
//!
//! Eigenvalues without vectors are our own (`tridiagonal`): faer's take more than three times as long at side 360.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::reborrow::ReborrowMut;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use crate::{Error, Result, tridiagonal};

/// Rows of a triangular factor that are multiplied at once: what faer makes in registers, so that few zeros are multiplied.
const STRIP: usize = 24;
/// Rows of a matrix from which on they are copied side by side before their Gram matrix is made.
const COPY_FROM: usize = 64;
/// Rows of a product that are made at once: what belongs to them stays in the cache (a quarter of the time at 1000 rows).
/// A multiple of what faer makes in registers.
pub(crate) const TILE: usize = 48;
/// Rows that are copied into another order at once.
const BLOCK: usize = 256;

/// Eigenvalues of the symmetric matrix whose lower triangle is given, in rising order.
///
/// # Errors
/// If the iteration does not converge, or the matrix is not square.
pub fn symmetric_eigenvalues(lower: MatRef<'_, f64>) -> Result<Vec<f64>> {
    let n = lower.nrows();
    if lower.ncols() != n {
        return Err(Error::Dimension {
            what: "columns of a symmetric matrix",
            expected: n,
            found: lower.ncols(),
        });
    }
    if n == 0 {
        return Ok(Vec::new());
    }
    let stride = tridiagonal::stride(n);
    let (mut columns, from) = tridiagonal::aligned(n * stride);
    let columns = &mut columns[from..][..n * stride];
    for (j, column) in columns.chunks_exact_mut(stride).enumerate() {
        match lower.try_as_col_major() {
            Some(lower) => column[j..n].copy_from_slice(&lower.col(j).as_slice()[j..]),
            None => column[j..n].iter_mut().enumerate().for_each(|(i, x)| *x = lower[(i + j, j)]),
        }
    }
    let mut values = tridiagonal::eigenvalues(columns, n).ok_or(Error::NoConvergence { size: n })?;
    if values.iter().any(|v| v.is_nan()) {
        return Err(Error::NoConvergence { size: n });
    }
    values.sort_unstable_by(f64::total_cmp);
    Ok(values)
}

/// Eigenvalues (rising) and eigenvectors (columns, same order) of a symmetric matrix, from its lower triangle.
///
/// # Errors
/// If the iteration does not converge, or the matrix is not square.
pub fn symmetric_eigen(lower: MatRef<'_, f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let n = lower.nrows();
    if lower.ncols() != n {
        return Err(Error::Dimension {
            what: "columns of a symmetric matrix",
            expected: n,
            found: lower.ncols(),
        });
    }
    let mut values = Diag::<f64>::zeros(n);
    let mut vectors = Mat::<f64>::zeros(n, n);
    let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Default::default());
    self_adjoint_evd(
        lower,
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| Error::NoConvergence { size: n })?;
    Ok((values.column_vector().iter().copied().collect(), vectors))
}

/// `a * b`.
pub fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    product_into(out.as_mut(), a, b);
    out
}

/// [`product`] into `out`.
pub(crate) fn product_into(mut out: MatMut<'_, f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>) {
    for first in (0..a.nrows()).step_by(TILE) {
        let rows = TILE.min(a.nrows() - first);
        let to = out.rb_mut().subrows_mut(first, rows);
        matmul(to, Accum::Replace, a.subrows(first, rows), b, 1.0, Par::Seq);
    }
}

/// `u * b` into `out`, where `u` is upper triangular with zeros below: half of the work of [`product`].
pub fn upper_product_into(mut out: MatMut<'_, f64>, u: MatRef<'_, f64>, b: MatRef<'_, f64>) {
    let dim = u.nrows();
    for first in (0..dim).step_by(STRIP) {
        let (rows, depth) = (STRIP.min(dim - first), dim - first);
        let to = out.rb_mut().subrows_mut(first, rows);
        matmul(
            to,
            Accum::Replace,
            u.submatrix(first, first, rows, depth),
            b.subrows(first, depth),
            1.0,
            Par::Seq,
        );
    }
}

/// Lower triangle of `acc + alpha * a * aᵀ`, in place; the upper triangle is left as it is.
pub fn add_gram_lower(mut acc: MatMut<'_, f64>, a: MatRef<'_, f64>, alpha: f64) {
    if a.nrows() < COPY_FROM || a.row_stride() != 1 {
        return add_gram_lower_by_rows(acc, a, alpha);
    }
    // faer takes rows that lie side by side in memory twice as fast as columns that do.
    for first in (0..a.ncols()).step_by(BLOCK) {
        let a = a.subcols(first, BLOCK.min(a.ncols() - first));
        let stride = tridiagonal::stride(a.ncols());
        let rows = side_by_side(a, stride);
        let rows = MatRef::from_column_major_slice_with_stride(&rows, a.ncols(), a.nrows(), stride);
        add_gram_lower_by_rows(acc.rb_mut(), rows.transpose(), alpha);
    }
}

fn add_gram_lower_by_rows(acc: MatMut<'_, f64>, a: MatRef<'_, f64>, alpha: f64) {
    triangular::matmul(
        acc,
        BlockStructure::TriangularLower,
        Accum::Add,
        a,
        BlockStructure::Rectangular,
        a.transpose(),
        BlockStructure::Rectangular,
        alpha,
        Par::Seq,
    );
}

/// The rows of `a`, `stride` apart, from columns that lie side by side; tile by tile, so that no line of the cache is
/// fetched twice.
fn side_by_side(a: MatRef<'_, f64>, stride: usize) -> Vec<f64> {
    const SIDE: usize = 8;
    let mut out = vec![0.0; a.nrows() * stride];
    let columns: Vec<&[f64]> = (0..a.ncols())
        .map(|j| a.col(j).try_as_col_major().expect("the caller saw a row stride of 1").as_slice())
        .collect();
    for (tile, columns) in columns.chunks(SIDE).enumerate() {
        for (row, to) in out.chunks_exact_mut(stride).enumerate() {
            for (to, column) in to[tile * SIDE..].iter_mut().zip(columns) {
                *to = column[row];
            }
        }
    }
    out
}

/// Lower triangle of `alpha * a * aᵀ`, zeros above.
pub fn gram_lower(a: MatRef<'_, f64>, alpha: f64) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), a.nrows());
    add_gram_lower(out.as_mut(), a, alpha);
    out
}

/// Copies the lower triangle onto the upper one.
pub fn mirror_lower(matrix: &mut Mat<f64>) {
    for j in 0..matrix.ncols() {
        for i in j + 1..matrix.nrows() {
            matrix[(j, i)] = matrix[(i, j)];
        }
    }
}

/// Sum of the square roots of the `keep` largest of `values` (rising order); values below zero count as zero.
///
/// `keep` is the rank that the data can have: the others are zeros blurred by rounding, and their roots would add up.
/// No relative threshold: small true eigenvalues matter.
pub(crate) fn sum_of_roots(values: &[f64], keep: usize) -> f64 {
    let skip = values.len().saturating_sub(keep);
    values[skip..].iter().map(|v| v.max(0.0).sqrt()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootstrap::SplitMix64;

    fn random(seed: u64, n: usize, m: usize) -> Mat<f64> {
        let mut rng = SplitMix64(seed);
        Mat::from_fn(n, m, |_, _| (rng.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
    }

    #[test]
    fn products_in_tiles_are_the_products_whatever_the_layout() {
        // Above and below a strip (24), a tile (48), what is copied (64) and a block (256).
        for (n, k) in [(1, 1), (20, 7), (25, 24), (70, 64), (100, 65), (90, 300), (130, 130)] {
            let (a, b) = (random(1, n, k), random(2, k, k));
            let upper = Mat::from_fn(k, k, |i, j| if i > j { 0.0 } else { b[(i, j)] });
            let by_rows = a.transpose().to_owned();
            let by_rows = by_rows.transpose(); // the same matrix, rows side by side
            let entry = |x: MatRef<'_, f64>, y: MatRef<'_, f64>, i: usize, j: usize| {
                (0..k).map(|l| x[(i, l)] * y[(l, j)]).sum::<f64>()
            };
            let close =
                |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{n} x {k}: {got}, want {want}");
            for x in [a.as_ref(), by_rows] {
                let (whole, gram) = (product(x, b.as_ref()), gram_lower(x, 0.5));
                let mut half = Mat::zeros(k, n);
                upper_product_into(half.as_mut(), upper.as_ref(), x.transpose());
                for i in 0..n {
                    for j in 0..k {
                        close(whole[(i, j)], entry(a.as_ref(), b.as_ref(), i, j));
                        close(half[(j, i)], entry(a.as_ref(), upper.transpose(), i, j));
                    }
                    for j in 0..n {
                        let want = if i < j { 0.0 } else { 0.5 * entry(a.as_ref(), a.transpose(), i, j) };
                        close(gram[(i, j)], want);
                    }
                }
            }
        }
    }
}
