//! Precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al. 2020,
//! arXiv:2002.09797), with balls that reach to the k-th nearest neighbour.
//!
//! Definitions as in the reference implementation `prdc` 0.2: a point is inside a ball when it is strictly nearer than
//! the radius, and the radius is the distance to the k-th other row of the same set. Distances are sums of squared
//! differences, so that ties between equal rows are exact.

use serde::{Deserialize, Serialize};

use crate::pairwise::{exact_squared_distances, same_dim};
use crate::{Error, Result, Rows};

/// The four shares; 5 neighbours is the usual choice of k.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Prdc {
    /// Share of generated rows inside a ball of the reference, in [0, 1]: are they realistic?
    pub precision: f64,
    /// Share of reference rows inside a ball of the generated set, in [0, 1]: are all kinds of songs there?
    pub recall: f64,
    /// Mean number of reference balls around a generated row, divided by k; at least 0, about 1 for equal
    /// distributions, may exceed 1.
    pub density: f64,
    /// Share of reference rows whose ball holds a generated row, in [0, 1]. Equal distributions: `1 - 2^-k` about.
    pub coverage: f64,
}

/// Precision, recall, density and coverage of `generated` `[N, D]` against `reference` `[M, D]`, from `k` neighbours.
/// Memory: `(N + M)²` distances.
///
/// # Errors
/// If `k` is 0, a set has fewer than `k + 1` rows, or the dimensions differ.
pub fn prdc(reference: &Rows, generated: &Rows, k: usize) -> Result<Prdc> {
    PrdcPool::new(reference, &[generated], k)?.prdc(&[0])
}

/// A fixed pool of songs and one reference: the four shares of any multiset of the songs, for bootstraps.
#[derive(Debug)]
pub struct PrdcPool {
    k: usize,
    /// Rows of song `s` are `starts[s]..starts[s + 1]`.
    starts: Vec<usize>,
    /// Squared radius of each reference row.
    radii: Vec<f64>,
    /// Squared distances of generated rows to reference rows, `[N, M]`.
    to_reference: Vec<f64>,
    /// Squared distances between generated rows, `[N, N]`.
    within: Vec<f64>,
}

impl PrdcPool {
    /// Computes all distances, once.
    ///
    /// # Errors
    /// If `k` is 0, the reference has fewer than `k + 1` rows, there is no song, or a dimension differs.
    pub fn new(reference: &Rows, songs: &[&Rows], k: usize) -> Result<Self> {
        if k == 0 {
            return Err(Error::TooFew { what: "neighbours k", expected: 1, found: 0 });
        }
        if reference.n() <= k {
            return Err(Error::TooFew {
                what: "reference embeddings",
                expected: k + 1,
                found: reference.n(),
            });
        }
        let mut starts = vec![0];
        for (i, song) in songs.iter().enumerate() {
            same_dim("embeddings (against the reference)", reference.dim(), song)
                .map_err(|e| e.within(format!("song {i}")))?;
            starts.push(starts[i] + song.n());
        }
        let generated = Rows::concat(songs)?;
        let mut own = exact_squared_distances(reference, reference);
        let radii = own.chunks_exact_mut(reference.n()).map(|row| kth_neighbour(row, k)).collect();
        let to_reference = exact_squared_distances(&generated, reference);
        let within = exact_squared_distances(&generated, &generated);
        Ok(Self { k, starts, radii, to_reference, within })
    }

    /// The four shares of the songs `members` (indices into the pool; a song drawn twice counts twice).
    ///
    /// # Errors
    /// If an index is out of range, or the members have fewer than `k + 1` rows together.
    pub fn prdc(&self, members: &[usize]) -> Result<Prdc> {
        let len = self.starts.len() - 1;
        if let Some(&index) = members.iter().find(|&&m| m >= len) {
            return Err(Error::Index { what: "song", index, len });
        }
        let rows: Vec<usize> = members.iter().flat_map(|&m| self.starts[m]..self.starts[m + 1]).collect();
        if rows.len() <= self.k {
            let what = "generated embeddings";
            return Err(Error::TooFew { what, expected: self.k + 1, found: rows.len() });
        }
        let (m, n) = (self.radii.len(), self.starts[len]);
        let mut recalled = vec![false; m];
        let mut nearest = vec![f64::INFINITY; m];
        let (mut inside, mut balls) = (0usize, 0usize);
        for &i in &rows {
            let mut own: Vec<f64> = rows.iter().map(|&j| self.within[i * n + j]).collect();
            let radius = kth_neighbour(&mut own, self.k);
            let distances = &self.to_reference[i * m..(i + 1) * m];
            let holding = distances.iter().zip(&self.radii).filter(|(d, r)| d < r).count();
            inside += usize::from(holding > 0);
            balls += holding;
            for ((d, recalled), nearest) in distances.iter().zip(&mut recalled).zip(&mut nearest) {
                *recalled |= *d < radius;
                *nearest = nearest.min(*d);
            }
        }
        let share = |count: usize, of: usize| count as f64 / of as f64;
        Ok(Prdc {
            precision: share(inside, rows.len()),
            recall: share(recalled.iter().filter(|r| **r).count(), m),
            density: share(balls, rows.len()) / self.k as f64,
            coverage: share(nearest.iter().zip(&self.radii).filter(|(d, r)| d < r).count(), m),
        })
    }
}

/// Squared distance to the k-th other row: the row itself is among `squared`, at distance 0.
fn kth_neighbour(squared: &mut [f64], k: usize) -> f64 {
    *squared.select_nth_unstable_by(k, f64::total_cmp).1
}
