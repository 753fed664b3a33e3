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

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::OnceLock;

use faer::{Mat, MatMut, MatRef, Scale, Side};
use rayon::prelude::*;

use crate::linalg::{
    add_gram_lower, gram_lower, mirror_lower, product, product_into, sum_of_roots, symmetric_eigen,
    symmetric_eigenvalues, upper_product_into,
};
use crate::rows::{add, dot, view};
use crate::{Error, GaussianStats, Result, Rows};

/// Negative eigenvalue of a covariance that still counts as rounding, as a fraction of the largest.
const POSITIVITY_TOLERANCE: f64 = 1e-6;
/// Pivot of Cholesky's factor, as a fraction of the largest, below which another factor is made.
const SMALLEST_PIVOT: f64 = 1e-11;
/// Rows that are projected at once where there are many.
const BLOCK: usize = 256;
/// Error of a sum of roots, estimated for the worst case and as a fraction of the sum, that is accepted; errors seen are
/// a tenth of the estimate.
const GRAM_ERROR: f64 = 5e-9;
/// Largest pool, in rows, whose Gram matrix is kept whole (72 MB).
const GRAM_MAX_ROWS: usize = 3000;
/// Largest table of second moments per song that a pool keeps, in bytes.
const MOMENTS_MAX_BYTES: usize = 64 << 20;

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

/// A fixed pool of songs and one reference: the distance of any multiset of the songs, fast.
///
/// All rows are projected once. A subset with fewer different rows than dimensions is then an index selection in the
/// pool's Gram matrix, re-weighted by how often each song was drawn, doubly centred; a larger one is a sum of second
/// moments. This serves Algorithm 1 (paper A.1) and bootstraps alike. A pool of up to 3000 rows keeps its whole Gram
/// matrix (made on first use).
#[derive(Debug)]
pub struct FrechetPool<'a> {
    reference: &'a FrechetReference,
    /// Rows of song `s`.
    ranges: Vec<Range<usize>>,
    /// Mean over the pool, `[D]`; everything below is relative to it, which keeps the sums small.
    center: Vec<f64>,
    /// Per song: sum of its rows, `[D]`.
    sums: Vec<Vec<f64>>,
    /// Per song: sum of squared lengths of its rows.
    squares: Vec<f64>,
    /// Projected rows, row-major `[N, r]`.
    y: Vec<f64>,
    /// Per song: sum of its projected rows, `[r]`.
    y_sums: Vec<Vec<f64>>,
    /// Equal rows share a number.
    classes: Vec<usize>,
    gram: OnceLock<Mat<f64>>,
    moments: OnceLock<Vec<Mat<f64>>>,
}

impl<'a> FrechetPool<'a> {
    /// Projects the songs.
    ///
    /// # Errors
    /// If there is no song, a song has no rows, or a dimension differs from the reference's.
    pub fn new(reference: &'a FrechetReference, songs: &[&Rows]) -> Result<Self> {
        for (i, song) in songs.iter().enumerate() {
            reference.check(song).map_err(|e| e.within(format!("song {i}")))?;
            if song.n() == 0 {
                return Err(Error::TooFew { what: "embeddings of a song", expected: 1, found: 0 }
                    .within(format!("song {i}")));
            }
        }
        let all = Rows::concat(songs)?;
        let (n, dim, r) = (all.n(), all.dim(), reference.factor.nrows());
        let center = all.mean()?;
        let centered = all.centered(&center);
        let mut y = vec![0.0; n * r];
        // Blocks of rows, so that a large pool projects on all threads; each block's result is its own.
        y.par_chunks_mut((BLOCK * r).max(1)).zip(centered.par_chunks(BLOCK * dim)).for_each(|(y, x)| {
            let n = x.len() / dim;
            reference.project_into(MatMut::from_column_major_slice_mut(y, r, n), view(x, n, dim));
        });
        let mut ranges = Vec::with_capacity(songs.len());
        let (mut sums, mut squares, mut y_sums) = (Vec::new(), Vec::new(), Vec::new());
        let mut start = 0;
        for song in songs {
            let range = start..start + song.n();
            start = range.end;
            let x = &centered[range.start * dim..range.end * dim];
            let mut sum = vec![0.0; dim];
            x.chunks_exact(dim).for_each(|row| add(&mut sum, row));
            let mut y_sum = vec![0.0; r];
            if r > 0 {
                y[range.start * r..range.end * r].chunks_exact(r).for_each(|row| add(&mut y_sum, row));
            }
            squares.push(dot(x, x));
            sums.push(sum);
            y_sums.push(y_sum);
            ranges.push(range);
        }
        Ok(Self {
            reference,
            ranges,
            center,
            sums,
            squares,
            y,
            y_sums,
            classes: all.classes(),
            gram: OnceLock::new(),
            moments: OnceLock::new(),
        })
    }

    /// Number of songs.
    pub fn n_songs(&self) -> usize {
        self.ranges.len()
    }

    /// Fréchet distance of the songs `members` (indices into the pool; a song drawn twice counts twice).
    ///
    /// # Errors
    /// If an index is out of range or the members have fewer than two rows together.
    pub fn distance(&self, members: &[usize]) -> Result<f64> {
        let plan = self.plan(members)?;
        let cross = if plan.keep == 0 {
            0.0
        } else if plan.rows.len() <= self.r() {
            self.cross_by_gram(&plan)?
        } else {
            let mut second = Mat::zeros(self.r(), self.r());
            self.add_moments(&mut second, &plan.weights);
            self.cross_by_moments(&plan, second)?
        };
        Ok(self.finish(&plan, cross))
    }

    /// An evaluator for a sequence of subsets that differ by a few songs each, as a greedy pass asks for them.
    pub fn into_walk(self) -> FrechetWalk<'a> {
        FrechetWalk { pool: self, base: None }
    }

    fn r(&self) -> usize {
        self.reference.factor.nrows()
    }

    fn plan(&self, members: &[usize]) -> Result<Plan> {
        let mut weights = BTreeMap::new();
        for &m in members {
            if m >= self.n_songs() {
                return Err(Error::Index { what: "song", index: m, len: self.n_songs() });
            }
            *weights.entry(m).or_insert(0.0) += 1.0;
        }
        let mut n = 0.0;
        let mut rows = Vec::new();
        let mut row_weights = Vec::new();
        for (&s, &w) in &weights {
            n += w * self.ranges[s].len() as f64;
            rows.extend(self.ranges[s].clone());
            row_weights.resize(rows.len(), w);
        }
        if n < 2.0 {
            return Err(Error::TooFew { what: "embeddings of a subset", expected: 2, found: n as usize });
        }
        let mut seen = vec![false; self.classes.len()];
        let mut unique = 0;
        for &i in &rows {
            let class = self.classes[i];
            unique += usize::from(!seen[class]);
            seen[class] = true;
        }
        let keep = (unique - 1).min(self.reference.rank);
        Ok(Plan { weights, rows, row_weights, n, keep })
    }

    /// Mean distance and traces around the cross term.
    fn finish(&self, plan: &Plan, cross: f64) -> f64 {
        let mut mean = vec![0.0; self.center.len()];
        let mut square = 0.0;
        for (&s, &w) in &plan.weights {
            for (m, x) in mean.iter_mut().zip(&self.sums[s]) {
                *m += w * x;
            }
            square += w * self.squares[s];
        }
        mean.iter_mut().for_each(|m| *m /= plan.n);
        let trace = (square - plan.n * dot(&mean, &mean)) / (plan.n - 1.0);
        add(&mut mean, &self.center);
        self.reference.combine(&mean, trace, cross)
    }

    fn cross_by_gram(&self, plan: &Plan) -> Result<f64> {
        let m = plan.rows.len();
        let r = self.r();
        let mut k = if self.classes.len() <= GRAM_MAX_ROWS {
            let whole = self.gram.get_or_init(|| {
                let mut gram = gram_lower(view(&self.y, self.classes.len(), r), 1.0);
                mirror_lower(&mut gram);
                gram
            });
            let mut k = Mat::zeros(m, m);
            for (j, &row_j) in plan.rows.iter().enumerate() {
                let from = whole.col_as_slice(row_j);
                for (to, &row_i) in k.col_as_slice_mut(j)[j..].iter_mut().zip(&plan.rows[j..]) {
                    *to = from[row_i];
                }
            }
            k
        } else {
            let mut gathered = Vec::with_capacity(m * r);
            for &i in &plan.rows {
                gathered.extend_from_slice(&self.y[i * r..(i + 1) * r]);
            }
            gram_lower(view(&gathered, m, r), 1.0)
        };
        // Double centring by the weighted mean: k_ij - k_i. - k_j. + k_.., then sqrt(w_i w_j)/(n-1).
        let w = &plan.row_weights;
        let mut means = vec![0.0; m];
        for j in 0..m {
            let col = &k.col_as_slice(j)[j..];
            let mut below = 0.0;
            for ((mean, x), wi) in means[j + 1..].iter_mut().zip(&col[1..]).zip(&w[j + 1..]) {
                below += wi * x;
                *mean += w[j] * x;
            }
            means[j] += w[j] * col[0] + below;
        }
        means.iter_mut().for_each(|x| *x /= plan.n);
        let grand = means.iter().zip(w).map(|(x, w)| x * w).sum::<f64>() / plan.n;
        let scale = 1.0 / (plan.n - 1.0);
        let roots: Vec<f64> = w.iter().map(|w| w.sqrt()).collect();
        for j in 0..m {
            let (offset, factor) = (grand - means[j], roots[j] * scale);
            let col = &mut k.col_as_slice_mut(j)[j..];
            for ((x, mean), root) in col.iter_mut().zip(&means[j..]).zip(&roots[j..]) {
                *x = (*x - mean + offset) * (factor * root);
            }
        }
        roots_or(&symmetric_eigenvalues(k.as_ref())?, plan.keep, || Ok(self.weighted(plan)))
    }

    /// The projected rows of a subset about their mean, times `sqrt(weight/(n - 1))`.
    fn weighted(&self, plan: &Plan) -> Mat<f64> {
        let r = self.r();
        let row = |i: usize| &self.y[i * r..(i + 1) * r];
        let mut mean = vec![0.0; r];
        for (&i, w) in plan.rows.iter().zip(&plan.row_weights) {
            mean.iter_mut().zip(row(i)).for_each(|(m, y)| *m += w * y / plan.n);
        }
        Mat::from_fn(plan.rows.len(), r, |i, k| {
            (row(plan.rows[i])[k] - mean[k]) * (plan.row_weights[i] / (plan.n - 1.0)).sqrt()
        })
    }

    /// Lower triangle of `second += Σ weight_s Y_sᵀ Y_s`.
    fn add_moments(&self, second: &mut Mat<f64>, weights: &BTreeMap<usize, f64>) {
        let r = self.r();
        if self.n_songs() * r * r * 8 <= MOMENTS_MAX_BYTES {
            let moments = self.moments.get_or_init(|| {
                self.ranges
                    .iter()
                    .map(|range| {
                        let y = &self.y[range.start * r..range.end * r];
                        gram_lower(view(y, range.len(), r).transpose(), 1.0)
                    })
                    .collect()
            });
            for (&s, &w) in weights {
                for j in 0..r {
                    let from = &moments[s].col_as_slice(j)[j..];
                    for (to, from) in second.col_as_slice_mut(j)[j..].iter_mut().zip(from) {
                        *to += w * from;
                    }
                }
            }
            return;
        }
        // Rows scaled by the root of their weight; positive and negative weights apart.
        for sign in [1.0, -1.0] {
            let mut gathered = Vec::new();
            for (&s, &w) in weights.iter().filter(|(_, w)| **w * sign > 0.0) {
                let root = w.abs().sqrt();
                let range = &self.ranges[s];
                gathered.extend(self.y[range.start * r..range.end * r].iter().map(|y| y * root));
            }
            if !gathered.is_empty() {
                let n = gathered.len() / r;
                add_gram_lower(second.as_mut(), view(&gathered, n, r).transpose(), sign);
            }
        }
    }

    fn cross_by_moments(&self, plan: &Plan, mut second: Mat<f64>) -> Result<f64> {
        let r = self.r();
        let mut mean = vec![0.0; r];
        for (&s, &w) in &plan.weights {
            for (m, y) in mean.iter_mut().zip(&self.y_sums[s]) {
                *m += w * y;
            }
        }
        mean.iter_mut().for_each(|m| *m /= plan.n);
        let scale = 1.0 / (plan.n - 1.0);
        for j in 0..r {
            let mj = plan.n * mean[j];
            for (to, mi) in second.col_as_slice_mut(j)[j..].iter_mut().zip(&mean[j..]) {
                *to = (*to - mi * mj) * scale;
            }
        }
        roots_or(&symmetric_eigenvalues(second.as_ref())?, plan.keep, || Ok(self.weighted(plan)))
    }
}

/// What a subset consists of.
struct Plan {
    /// How often each song occurs.
    weights: BTreeMap<usize, f64>,
    /// Pool rows of the songs that occur, each once.
    rows: Vec<usize>,
    /// How often each of `rows` occurs.
    row_weights: Vec<f64>,
    /// Rows, counted with repetition.
    n: f64,
    /// Eigenvalues to keep.
    keep: usize,
}

/// Distances of subsets that change little from one to the next ([`FrechetPool::into_walk`]).
///
/// Where a subset needs second moments, those of a base subset are kept and corrected by the songs that differ.
/// Values agree with [`FrechetPool::distance`] to rounding.
#[derive(Debug)]
pub struct FrechetWalk<'a> {
    pool: FrechetPool<'a>,
    base: Option<(BTreeMap<usize, f64>, Mat<f64>)>,
}

impl FrechetWalk<'_> {
    /// As [`FrechetPool::distance`].
    ///
    /// # Errors
    /// As [`FrechetPool::distance`].
    pub fn distance(&mut self, members: &[usize]) -> Result<f64> {
        let pool = &self.pool;
        let r = pool.r();
        let plan = pool.plan(members)?;
        if plan.keep == 0 || plan.rows.len() <= r || pool.n_songs() * r * r * 8 <= MOMENTS_MAX_BYTES {
            return pool.distance(members);
        }
        let mut change = plan.weights.clone();
        if let Some((base, _)) = &self.base {
            for (&s, &w) in base {
                *change.entry(s).or_insert(0.0) -= w;
            }
            change.retain(|_, w| *w != 0.0);
        }
        let rows =
            |weights: &BTreeMap<usize, f64>| -> usize { weights.keys().map(|&s| pool.ranges[s].len()).sum() };
        let second = match &self.base {
            Some((_, second)) if 2 * rows(&change) < rows(&plan.weights) => {
                let mut moved = second.clone();
                pool.add_moments(&mut moved, &change);
                moved
            }
            _ => {
                let mut second = Mat::zeros(r, r);
                pool.add_moments(&mut second, &plan.weights);
                self.base = Some((plan.weights.clone(), second.clone()));
                change.clear();
                second
            }
        };
        // Two songs differ: a candidate swap. More: an earlier swap was kept, so the base moves along.
        if change.len() > 2 {
            self.base = Some((plan.weights.clone(), second.clone()));
        }
        let cross = pool.cross_by_moments(&plan, second)?;
        Ok(pool.finish(&plan, cross))
    }
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
