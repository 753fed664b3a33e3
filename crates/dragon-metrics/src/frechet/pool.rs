//! Fréchet distances of many subsets of one pool of songs to one reference: what Algorithm 1 (paper A.1) and bootstraps
//! ask for. The same eigenvalues as the parent module's, from products that are made once.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::OnceLock;

use faer::{Mat, MatMut};
use rayon::prelude::*;

use super::{BLOCK, FrechetReference, roots_or};
use crate::linalg::{add_gram_lower, gram_lower, mirror_lower, symmetric_eigenvalues};
use crate::rows::{add, dot, view};
use crate::{Error, Result, Rows};

/// Largest pool, in rows, whose Gram matrix is kept whole (72 MB).
const GRAM_MAX_ROWS: usize = 3000;
/// Largest table of second moments per song that a pool keeps, in bytes.
const MOMENTS_MAX_BYTES: usize = 64 << 20;

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
