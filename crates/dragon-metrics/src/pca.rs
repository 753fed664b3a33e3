//! Principal axes of a set of embeddings, for maps of songs.

use faer::Mat;

use crate::linalg::{gram_lower, symmetric_eigen};
use crate::rows::{dot, view};
use crate::{Error, Result, Rows};

/// Mean and the axes of largest variance of a set, as [`pca`] gives them.
#[derive(Debug, Clone, PartialEq)]
pub struct Pca {
    /// Mean of the rows, `[D]`.
    pub mean: Vec<f64>,
    /// Axes of length 1, each `[D]`, by falling variance; the entry of largest magnitude is positive. Zeros where the rows
    /// have no variance left.
    pub axes: Vec<Vec<f64>>,
    /// Share of the total variance along each axis, in [0, 1]; 0 if there is none.
    pub shares: Vec<f64>,
}

/// The `k` axes along which the rows vary most: eigenvectors of their covariance, or those of the Gram matrix of the
/// centred rows carried over where there are fewer rows than dimensions.
///
/// # Errors
/// If there is no row, or `k` is above D.
pub fn pca(rows: &Rows, k: usize) -> Result<Pca> {
    let (n, dim) = (rows.n(), rows.dim());
    if k > dim {
        return Err(Error::Dimension { what: "axes (against the embeddings)", expected: dim, found: k });
    }
    let mean = rows.mean()?;
    let centered = rows.centered(&mean);
    let x = view(&centered, n, dim);
    let (values, vectors) =
        symmetric_eigen(if n < dim { gram_lower(x, 1.0) } else { gram_lower(x.transpose(), 1.0) }.as_ref())?;
    let total: f64 = values.iter().map(|l| l.max(0.0)).sum();
    let (mut axes, mut shares) = (Vec::with_capacity(k), Vec::with_capacity(k));
    for i in 0..k {
        // Rising order; what lies below rounding is no direction.
        let at = values.len().checked_sub(i + 1).filter(|&at| values[at] > f64::EPSILON * n as f64 * total);
        let axis = at.map(|at| axis(&vectors, at, &centered, n, dim));
        shares.push(at.map_or(0.0, |at| values[at] / total));
        axes.push(axis.unwrap_or_else(|| vec![0.0; dim]));
    }
    Ok(Pca { mean, axes, shares })
}

/// Eigenvector `at` as an axis `[D]` of length 1.
fn axis(vectors: &Mat<f64>, at: usize, centered: &[f64], n: usize, dim: usize) -> Vec<f64> {
    let vector: Vec<f64> = (0..vectors.nrows()).map(|i| vectors[(i, at)]).collect();
    let mut axis = if n < dim {
        let mut sum = vec![0.0; dim];
        for (row, weight) in centered.chunks_exact(dim).zip(&vector) {
            sum.iter_mut().zip(row).for_each(|(s, x)| *s += weight * x);
        }
        sum
    } else {
        vector
    };
    let largest = axis.iter().copied().fold(0.0f64, |a, b| if b.abs() > a.abs() { b } else { a });
    let scale = dot(&axis, &axis).sqrt().copysign(largest);
    axis.iter_mut().for_each(|x| *x /= scale);
    axis
}

impl Pca {
    /// Coordinates of a row along the axes.
    ///
    /// # Errors
    /// If the dimension differs.
    pub fn project(&self, row: &[f64]) -> Result<Vec<f64>> {
        if row.len() != self.mean.len() {
            return Err(Error::Dimension {
                what: "row (against the axes)",
                expected: self.mean.len(),
                found: row.len(),
            });
        }
        let centered: Vec<f64> = row.iter().zip(&self.mean).map(|(x, m)| x - m).collect();
        Ok(self.axes.iter().map(|axis| dot(axis, &centered)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows along (3, 4)/5 with a little along (-4, 3)/5, and as many columns of zeros as asked for.
    fn rows(zeros: usize) -> Rows {
        let at = [(-2.0, 0.1), (-1.0, -0.1), (0.0, 0.0), (1.0, -0.1), (2.0, 0.1)];
        let rows: Vec<Vec<f64>> = at
            .iter()
            .map(|(a, b)| {
                let mut row = vec![0.6 * a - 0.8 * b + 7.0, 0.8 * a + 0.6 * b];
                row.resize(2 + zeros, 0.0);
                row
            })
            .collect();
        Rows::from_vecs(&rows).unwrap()
    }

    #[test]
    fn the_axes_are_those_of_the_rows_by_either_matrix() {
        for zeros in [0, 9] {
            let found = pca(&rows(zeros), 2).unwrap();
            assert!((found.axes[0][0] - 0.6).abs() < 1e-12 && (found.axes[0][1] - 0.8).abs() < 1e-12);
            assert!((found.axes[1][0] - 0.8).abs() < 1e-12 && (found.axes[1][1] + 0.6).abs() < 1e-12);
            let share = 10.0 / 10.04;
            assert!((found.shares[0] - share).abs() < 1e-12, "{found:?}");
            let mut row = vec![7.6, 0.8];
            row.resize(2 + zeros, 0.0);
            let at = found.project(&row).unwrap();
            assert!((at[0] - 1.0).abs() < 1e-12 && at[1].abs() < 1e-12, "{at:?}");
        }
    }

    #[test]
    fn rows_without_variance_have_no_axes_and_too_many_axes_are_refused() {
        let same = Rows::new(3, 2, vec![1.0, 2.0, 1.0, 2.0, 1.0, 2.0]).unwrap();
        let found = pca(&same, 2).unwrap();
        assert_eq!((found.axes, found.shares), (vec![vec![0.0; 2]; 2], vec![0.0; 2]));
        assert!(pca(&same, 3).is_err());
        assert!(found_along_one().shares[1] < 1e-15);
    }

    fn found_along_one() -> Pca {
        pca(&Rows::new(3, 2, vec![0.0, 0.0, 1.0, 1.0, 2.0, 2.0]).unwrap(), 2).unwrap()
    }
}
