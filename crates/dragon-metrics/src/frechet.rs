//! Fréchet distance between Gaussians (paper Eq. 3), through symmetric eigenvalues only.
//!
//! `|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½)`; with `S_r = L Lᵀ`, `tr (S_g S_r)^½ = Σ sqrt(eig(Lᵀ S_g L))`. With fewer
//! rows than dimensions the same eigenvalues are those of the small matrix `Y Yᵀ/(n-1)`, `Y = Xc L`. At most
//! `min(different rows - 1, D)` of them are not zero; the others are rounding and are dropped, never by a threshold.
//! The tests compare with 40-digit arithmetic to 1e-9 (`fixtures/dragon-metrics/frechet`).
//!
//! An eigenvalue of the product below 1e-16 of the largest is lost in rounding, and its root is off by up to 1e-8 of the
//! largest root. A handful of such directions does not show; where they would, the roots are computed as singular values
//! of `Y` itself, which loses nothing. Limit: a covariance given as numbers has itself lost its directions below 1e-16 of
//! the largest; with many of them (rank far below D, number of rows unknown) the distance is good to about 1e-6 only. A
//! reference made from rows by [`FrechetReference::from_rows`] does not have this limit.

mod pool;

use faer::{Mat, MatMut, MatRef, Scale, Side};
use rayon::prelude::*;

use crate::linalg::{
    add_gram_lower, gram_lower, product, product_into, sum_of_roots, symmetric_eigen, symmetric_eigenvalues,
    upper_product_into,
};
use crate::rows::{dot, view};
use crate::{Error, GaussianStats, Result, Rows};

pub use pool::{FrechetPool, FrechetWalk};

/// Negative eigenvalue of a covariance that still counts as rounding, as a fraction of the largest.
const POSITIVITY_TOLERANCE: f64 = 1e-6;
/// Pivot of Cholesky's factor, as a fraction of the largest, below which another factor is made.
const SMALLEST_PIVOT: f64 = 1e-11;
/// Rows that are projected at once where there are many.
const BLOCK: usize = 256;
/// Error of a sum of roots, estimated for the worst case and as a fraction of the sum, that is accepted; errors seen are
/// a tenth of the estimate.
const GRAM_ERROR: f64 = 5e-9;

/// Fréchet distance of two Gaussians, in [0, ∞) up to rounding (never below -1e-9 of the traces).
///
/// For many distances to one Gaussian, make a [`FrechetReference`] once.
///
/// # Errors
/// If the dimensions differ or a covariance is not positive semi-definite.
pub fn frechet_distance(a: &GaussianStats, b: &GaussianStats) -> Result<f64> {
    FrechetReference::new(b)?.distance_to_stats(a)
}

/// Per-song FAD of each song to one reference, songs in parallel: [`FrechetReference::distance`] of each.
///
/// # Errors
/// For the first song (in order) that has no distance; the message holds its index.
pub fn per_song_fad(reference: &FrechetReference, songs: &[&Rows]) -> Result<Vec<f64>> {
    let distances: Vec<Result<f64>> = songs.par_iter().map(|song| reference.distance(song)).collect();
    distances.into_iter().enumerate().map(|(i, d)| d.map_err(|e| e.within(format!("song {i}")))).collect()
}

/// A reference Gaussian with a factor of its covariance, so that each distance costs one product and one small
/// eigenproblem.
#[derive(Debug, Clone)]
pub struct FrechetReference {
    mean: Vec<f64>,
    /// `R [r, D]` with `S = Rᵀ R`: Cholesky's factor; where `S` is nearly singular, roots of eigenvalues times
    /// eigenvectors, or `R` of a QR decomposition of the centred rows; or the rows themselves when they are fewer than D.
    /// (Any of them is `V S^½` with orthogonal `V`, and gives the same eigenvalues.)
    factor: Mat<f64>,
    /// Whether `factor` is upper triangular, which halves the work of a projection.
    triangular: bool,
    trace: f64,
    rank: usize,
}

impl FrechetReference {
    /// Factors the covariance of `stats`.
    ///
    /// # Errors
    /// If an eigenvalue is below -1e-6 of the largest (negative ones above that are taken as zero).
    pub fn new(stats: &GaussianStats) -> Result<Self> {
        if let Some(factor) = cholesky(stats) {
            let rank = stats.dim();
            return Ok(Self {
                mean: stats.mean().to_vec(),
                factor,
                triangular: true,
                trace: stats.trace(),
                rank,
            });
        }
        let dim = stats.dim();
        let (values, vectors) = symmetric_eigen(view(stats.cov(), dim, dim))?;
        let (smallest, largest) = (values[0], values[dim - 1]);
        if smallest < -POSITIVITY_TOLERANCE * largest.abs() {
            return Err(Error::NotPositive { smallest, largest });
        }
        let kept: Vec<usize> = (dim - stats.rank_bound()..dim).filter(|&k| values[k] > 0.0).collect();
        let factor = Mat::from_fn(kept.len(), dim, |k, i| vectors[(i, kept[k])] * values[kept[k]].sqrt());
        let (trace, rank) = (stats.trace(), kept.len());
        Ok(Self { mean: stats.mean().to_vec(), factor, triangular: false, trace, rank })
    }

    /// The reference of a set of embeddings; exact also where there are fewer rows than dimensions.
    ///
    /// # Errors
    /// If there are fewer than two rows.
    pub fn from_rows(rows: &Rows) -> Result<Self> {
        let (n, dim) = (rows.n(), rows.dim());
        if n > dim {
            let stats = GaussianStats::fit(rows)?;
            if let Some(factor) = cholesky(&stats) {
                let (mean, trace) = (stats.mean().to_vec(), stats.trace());
                return Ok(Self { mean, factor, triangular: true, trace, rank: dim });
            }
            // Squaring the rows into a covariance has lost the small directions; QR has not.
            let centered = rows.centered(stats.mean());
            let root = (1.0 / (n as f64 - 1.0)).sqrt();
            let qr = view(&centered, n, dim).qr();
            let r = qr.R();
            let factor = Mat::from_fn(dim, dim, |k, i| if i < k { 0.0 } else { r[(k, i)] * root });
            let (trace, rank) = (dot(&centered, &centered) * root * root, (rows.unique() - 1).min(dim));
            return Ok(Self { mean: stats.mean().to_vec(), factor, triangular: true, trace, rank });
        }
        if n < 2 {
            return Err(Error::TooFew { what: "reference embeddings", expected: 2, found: n });
        }
        let mean = rows.mean()?;
        let centered = rows.centered(&mean);
        let scale = 1.0 / (n as f64 - 1.0);
        let root = scale.sqrt();
        let factor = Mat::from_fn(n, dim, |k, i| centered[k * dim + i] * root);
        let trace = dot(&centered, &centered) * scale;
        Ok(Self { mean, factor, triangular: false, trace, rank: rows.unique() - 1 })
    }

    /// Dimension `D`.
    pub fn dim(&self) -> usize {
        self.mean.len()
    }

    /// Mean, `[D]`.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Fréchet distance of the rows' Gaussian (ddof 1) to the reference: per-song FAD when the rows are one song's,
    /// dataset FAD when they are all songs'.
    ///
    /// Biased upwards unless there are many more rows than dimensions: compare only sets of equal size.
    ///
    /// # Errors
    /// If there are fewer than two rows, or the dimension differs.
    pub fn distance(&self, rows: &Rows) -> Result<f64> {
        let (mean, trace, cross) = self.spread(rows)?;
        Ok(self.combine(&mean, trace, cross))
    }

    /// [`FrechetReference::distance`] with the rows' mean replaced, for tools that round it.
    pub(crate) fn distance_with_mean(&self, rows: &Rows, mean: &[f64]) -> Result<f64> {
        let (_, trace, cross) = self.spread(rows)?;
        Ok(self.combine(mean, trace, cross))
    }

    /// Fréchet distance of a Gaussian to the reference.
    ///
    /// # Errors
    /// If the dimension differs.
    pub fn distance_to_stats(&self, stats: &GaussianStats) -> Result<f64> {
        let dim = self.dim();
        if stats.dim() != dim {
            return Err(Error::Dimension { what: "statistics", expected: dim, found: stats.dim() });
        }
        let keep = stats.rank_bound().min(self.rank);
        let mut cross = 0.0;
        if keep > 0 {
            let half = self.project(view(stats.cov(), dim, dim)); // [r, D]
            let whole = self.project(half.as_ref()); // [r, r]
            let values = symmetric_eigenvalues(whole.as_ref())?;
            cross = roots_or(&values, keep, || {
                let other = FrechetReference::new(stats)?;
                Ok(product(other.factor.as_ref(), self.factor.transpose())) // singular values: roots of `whole`'s
            })?;
        }
        Ok(self.combine(stats.mean(), stats.trace(), cross))
    }

    /// Mean, trace of the covariance, and `tr (S_g S_r)^½` of the rows.
    fn spread(&self, rows: &Rows) -> Result<(Vec<f64>, f64, f64)> {
        self.check(rows)?;
        let n = rows.n();
        if n < 2 {
            return Err(Error::TooFew { what: "embeddings of a song or set", expected: 2, found: n });
        }
        let mean = rows.mean()?;
        let scale = 1.0 / (n as f64 - 1.0);
        let (dim, r) = (rows.dim(), self.factor.nrows());
        let keep = (rows.unique() - 1).min(self.rank);
        if keep == 0 || n <= r {
            let centered = rows.centered(&mean);
            let mut cross = 0.0;
            if keep > 0 {
                let y = self.project(view(&centered, n, dim)); // [r, n]
                let values = symmetric_eigenvalues(gram_lower(y.transpose(), scale).as_ref())?;
                cross = roots_or(&values, keep, || Ok(&y * Scale(scale.sqrt())))?;
            }
            return Ok((mean, dot(&centered, &centered) * scale, cross));
        }
        // Many rows, block by block: no second copy of them is needed.
        let (mut gram, mut square) = (Mat::zeros(r, r), 0.0);
        let mut centered = Vec::new();
        for block in rows.data().chunks(BLOCK * dim) {
            centered.clear();
            block
                .chunks_exact(dim)
                .for_each(|row| centered.extend(row.iter().zip(&mean).map(|(x, m)| x - m)));
            square += dot(&centered, &centered);
            let y = self.project(view(&centered, block.len() / dim, dim)); // [r, block]
            add_gram_lower(gram.as_mut(), y.as_ref(), scale);
        }
        let cross = roots_or(&symmetric_eigenvalues(gram.as_ref())?, keep, || {
            Ok(self.project(view(&rows.centered(&mean), n, dim)) * Scale(scale.sqrt()))
        })?;
        Ok((mean, square * scale, cross))
    }

    /// `R xᵀ`, `[r, n]`, of the rows of `x [n, D]`.
    fn project(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut out = Mat::zeros(self.factor.nrows(), x.nrows());
        self.project_into(out.as_mut(), x);
        out
    }

    fn project_into(&self, out: MatMut<'_, f64>, x: MatRef<'_, f64>) {
        match self.triangular {
            true => upper_product_into(out, self.factor.as_ref(), x.transpose()),
            false => product_into(out, self.factor.as_ref(), x.transpose()),
        }
    }

    fn check(&self, rows: &Rows) -> Result<()> {
        if rows.dim() != self.dim() {
            return Err(Error::Dimension {
                what: "embeddings (against the reference)",
                expected: self.dim(),
                found: rows.dim(),
            });
        }
        Ok(())
    }

    fn combine(&self, mean: &[f64], trace: f64, cross: f64) -> f64 {
        let shift: f64 = mean.iter().zip(&self.mean).map(|(a, b)| (a - b) * (a - b)).sum();
        shift + trace + self.trace - 2.0 * cross
    }
}

/// Cholesky's factor, upper triangular, unless a pivot is so small that the covariance may be singular.
fn cholesky(stats: &GaussianStats) -> Option<Mat<f64>> {
    let dim = stats.dim();
    if stats.rank_bound() < dim {
        return None;
    }
    let llt = view(stats.cov(), dim, dim).llt(Side::Lower).ok()?;
    let factor = llt.L();
    let pivots = || (0..dim).map(|i| factor[(i, i)].powi(2));
    let (smallest, largest) = (pivots().fold(f64::INFINITY, f64::min), pivots().fold(0.0, f64::max));
    (smallest > SMALLEST_PIVOT * largest)
        .then(|| Mat::from_fn(dim, dim, |k, i| if i < k { 0.0 } else { factor[(i, k)] }))
}

/// Sum of the singular values of `Y`: roots of the eigenvalues of its Gram matrix, of which `keep` are not rounding; by a
/// singular value decomposition of `Y` itself where too many of these eigenvalues are lost beside the largest.
fn roots_or(rising: &[f64], keep: usize, y: impl FnOnce() -> Result<Mat<f64>>) -> Result<f64> {
    let sum = sum_of_roots(rising, keep);
    let lost = rising.last().copied().unwrap_or(0.0) * 0.5 * f64::EPSILON;
    let kept = &rising[rising.len().saturating_sub(keep)..];
    let error: f64 = kept.iter().map(|v| lost.sqrt().min(0.5 * lost / v.max(0.0).sqrt())).sum();
    if error <= GRAM_ERROR * sum {
        return Ok(sum);
    }
    let y = y()?;
    let values = y.singular_values().map_err(|_| Error::NoConvergence { size: y.ncols().min(y.nrows()) })?;
    Ok(values.iter().take(keep).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootstrap::SplitMix64;

    /// Rows whose coordinate `k` has standard deviation near `decay^k`, as given and turned by a rotation that mixes
    /// coordinates, so that nothing about the small directions can be read off a column.
    fn rows(seed: u64, n: usize, dim: usize, decay: f64) -> Rows {
        let mut rng = SplitMix64(seed);
        let mut data: Vec<f64> = (0..n * dim)
            .map(|i| ((rng.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0) * decay.powi((i % dim) as i32))
            .collect();
        let mut axis = SplitMix64(99);
        let axis: Vec<f64> = (0..dim).map(|_| (axis.next() >> 11) as f64 / (1u64 << 53) as f64).collect();
        for row in data.chunks_exact_mut(dim) {
            let along = 2.0 * dot(row, &axis) / dot(&axis, &axis);
            row.iter_mut().zip(&axis).for_each(|(x, a)| *x -= along * a);
        }
        Rows::new(n, dim, data).unwrap()
    }

    /// The same rows with coordinates that repeat earlier ones: each distance is that of the rows with these coordinates
    /// scaled by `√2`, and every covariance is singular.
    fn repeated(rows: &Rows) -> (Rows, Rows) {
        let twice = rows.iter().flat_map(|row| [row, row].concat()).collect();
        let scaled = rows.data().iter().map(|x| x * 2.0f64.sqrt()).collect();
        (
            Rows::new(rows.n(), 2 * rows.dim(), twice).unwrap(),
            Rows::new(rows.n(), rows.dim(), scaled).unwrap(),
        )
    }

    #[test]
    fn a_singular_reference_of_many_rows_is_exact_to_1e_9() {
        for (seed, n, decay) in [(1, 5, 0.9), (2, 40, 0.9), (3, 90, 0.8), (4, 90, 0.3)] {
            let (reference, small_reference) = repeated(&rows(seed + 10, 120, 20, decay));
            let (set, small_set) = repeated(&rows(seed, n, 20, 0.9));
            let singular = FrechetReference::from_rows(&reference).unwrap();
            let got = singular.distance(&set).unwrap();
            let want = FrechetReference::from_rows(&small_reference).unwrap().distance(&small_set).unwrap();
            assert!((got - want).abs() < 1e-9 * want, "{n} rows, decay {decay}: {got:e}, want {want:e}");
            let pool = FrechetPool::new(&singular, &[&set]).unwrap();
            assert!(
                (pool.distance(&[0]).unwrap() - want).abs() < 1e-9 * want,
                "pool, {n} rows, decay {decay}"
            );
        }
    }

    #[test]
    fn cholesky_is_taken_for_regular_covariances_only_and_gives_the_same_distances() {
        let regular = GaussianStats::fit(&rows(5, 300, 70, 0.95)).unwrap();
        let by_cholesky = FrechetReference::new(&regular).unwrap();
        assert!(by_cholesky.triangular);
        // With a count that bounds the rank, the eigenvectors are taken.
        let bounded = GaussianStats::new(regular.mean().to_vec(), regular.cov().to_vec(), Some(70)).unwrap();
        let by_vectors = FrechetReference::new(&bounded).unwrap();
        assert!(!by_vectors.triangular);
        assert!(
            !FrechetReference::new(&GaussianStats::fit(&rows(5, 300, 30, 0.3)).unwrap()).unwrap().triangular
        );
        let set = rows(6, 20, 70, 0.95);
        let (a, b) = (by_cholesky.distance(&set).unwrap(), by_vectors.distance(&set).unwrap());
        // `bounded` drops the smallest direction of 70.
        assert!((a - b).abs() < 0.05 * a && a < b + 1e-12, "{a} {b}");
    }

    #[test]
    fn many_rows_taken_block_by_block_give_the_distance_of_their_gaussian() {
        let reference = FrechetReference::from_rows(&rows(7, 300, 70, 0.97)).unwrap();
        for n in [71, BLOCK, BLOCK + 1, 3 * BLOCK + 40] {
            let set = rows(8, n, 70, 0.97);
            let got = reference.distance(&set).unwrap();
            let want = reference.distance_to_stats(&GaussianStats::fit(&set).unwrap()).unwrap();
            assert!((got - want).abs() < 1e-11 * want, "{n} rows: got {got:e}, want {want:e}");
        }
    }
}
