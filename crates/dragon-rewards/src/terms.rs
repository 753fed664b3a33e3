//! The rewards: CLAP score, per-song FAD, dataset FAD, Vendi.

use std::ops::Range;
use std::sync::Arc;

use dragon_metrics::{Clip, FrechetPool, FrechetReference, FrechetWalk, Rows, VendiPool, clap_score, vendi};
use serde::{Deserialize, Serialize};

use crate::reward::scores;
use crate::{DistributionReward, IncrementalScore, InstanceReward, Result, Song};

/// CLAP score of a song and its own prompt (instance-wise, paper 4), in [0, 1]: `mean max(0, cos(audio, text))`.
#[derive(Debug, Clone, Copy)]
pub struct ClapScore {
    /// View to read.
    pub slot: usize,
    /// Where negative cosines become zero; the paper clips before the mean.
    pub clip: Clip,
}

impl InstanceReward for ClapScore {
    fn score(&self, song: &Song) -> Result<f64> {
        let view = song.view(self.slot)?;
        let text = view.text.as_ref().ok_or(crate::Error::MissingText)?;
        Ok(clap_score(&view.embeddings, text, self.clip)?)
    }
}

/// Negative Fréchet distance of one song's embeddings to a reference set (instance-to-distribution, paper 4),
/// in (-∞, 0]. The reference may come from audio or from text embeddings.
#[derive(Debug, Clone)]
pub struct PerSongFad {
    /// View to read.
    pub slot: usize,
    /// The reference set.
    pub reference: Arc<FrechetReference>,
}

impl InstanceReward for PerSongFad {
    fn score(&self, song: &Song) -> Result<f64> {
        Ok(-self.reference.distance(&song.view(self.slot)?.embeddings)?)
    }
}

/// Negative Fréchet distance of all songs' embeddings together to a reference set (distribution-to-distribution,
/// paper 4, Eq. 3), in (-∞, 0]. Biased unless there are many more embeddings than dimensions.
#[derive(Debug, Clone)]
pub struct DatasetFad {
    /// View to read.
    pub slot: usize,
    /// The reference set.
    pub reference: Arc<FrechetReference>,
}

impl DistributionReward for DatasetFad {
    fn score(&self, songs: &[&Song]) -> Result<f64> {
        let rows = embeddings(songs, self.slot)?;
        Ok(-self.reference.distance(&Rows::concat(&rows)?)?)
    }

    fn incremental<'a>(&'a self, pool: &[&'a Song]) -> Result<Box<dyn IncrementalScore + 'a>> {
        let rows = embeddings(pool, self.slot)?;
        Ok(Box::new(FadWalk(FrechetPool::new(&self.reference, &rows)?.into_walk())))
    }
}

struct FadWalk<'a>(FrechetWalk<'a>);

impl IncrementalScore for FadWalk<'_> {
    fn score(&mut self, members: &[usize]) -> Result<f64> {
        Ok(-self.0.distance(members)?)
    }
}

/// What one row of a Vendi score is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The mean of a song's embeddings: diversity between songs (the paper's batch reward).
    #[default]
    SongMean,
    /// Every embedding: diversity between and within songs (the paper's bootstrapped Vendi, App. H).
    Windows,
}

/// Vendi score of a set of songs (paper 4, Eq. 4), in [1, rows]: its effective number of different members.
#[derive(Debug, Clone, Copy)]
pub struct Vendi {
    /// View to read.
    pub slot: usize,
    /// What one row is.
    pub pooling: Pooling,
}

impl Vendi {
    /// Rows of the pool and the range that each song has among them.
    fn rows(&self, songs: &[&Song]) -> Result<(Rows, Vec<Range<usize>>)> {
        let views = embeddings(songs, self.slot)?;
        match self.pooling {
            Pooling::SongMean => {
                let means = views
                    .iter()
                    .enumerate()
                    .map(|(i, rows)| rows.mean().map_err(|e| crate::Error::from(e).of_song(i)))
                    .collect::<Result<Vec<_>>>()?;
                Ok((Rows::from_vecs(&means)?, (0..songs.len()).map(|i| i..i + 1).collect()))
            }
            Pooling::Windows => {
                let mut end = 0;
                let ranges = views
                    .iter()
                    .map(|rows| {
                        end += rows.n();
                        end - rows.n()..end
                    })
                    .collect();
                Ok((Rows::concat(&views)?, ranges))
            }
        }
    }
}

impl DistributionReward for Vendi {
    fn score(&self, songs: &[&Song]) -> Result<f64> {
        Ok(vendi(&self.rows(songs)?.0)?)
    }

    fn incremental<'a>(&'a self, pool: &[&'a Song]) -> Result<Box<dyn IncrementalScore + 'a>> {
        let (rows, ranges) = self.rows(pool)?;
        Ok(Box::new(VendiSubsets { pool: VendiPool::new(&rows)?, ranges }))
    }
}

struct VendiSubsets {
    pool: VendiPool,
    ranges: Vec<Range<usize>>,
}

impl IncrementalScore for VendiSubsets {
    fn score(&mut self, members: &[usize]) -> Result<f64> {
        let mut rows = Vec::with_capacity(members.len());
        for &m in members {
            let range = self.ranges.get(m).ok_or(dragon_metrics::Error::Index {
                what: "song",
                index: m,
                len: self.ranges.len(),
            })?;
            rows.extend(range.clone());
        }
        Ok(self.pool.vendi(&rows)?)
    }
}

/// The mean of an instance reward over a set, as a reward of the set. Algorithm 1 with it gives the pairwise winners.
#[derive(Debug)]
pub struct MeanOf(pub Box<dyn InstanceReward>);

impl DistributionReward for MeanOf {
    fn score(&self, songs: &[&Song]) -> Result<f64> {
        mean(&scores(self.0.as_ref(), songs)?)
    }

    fn incremental<'a>(&'a self, pool: &[&'a Song]) -> Result<Box<dyn IncrementalScore + 'a>> {
        Ok(Box::new(MeanSubsets(scores(self.0.as_ref(), pool)?)))
    }
}

struct MeanSubsets(Vec<f64>);

impl IncrementalScore for MeanSubsets {
    fn score(&mut self, members: &[usize]) -> Result<f64> {
        let picked = members
            .iter()
            .map(|&m| {
                let missing = dragon_metrics::Error::Index { what: "song", index: m, len: self.0.len() };
                self.0.get(m).copied().ok_or(missing)
            })
            .collect::<std::result::Result<Vec<_>, _>>()?;
        mean(&picked)
    }
}

fn mean(scores: &[f64]) -> Result<f64> {
    if scores.is_empty() {
        return Err(dragon_metrics::Error::TooFew { what: "songs", expected: 1, found: 0 }.into());
    }
    Ok(scores.iter().sum::<f64>() / scores.len() as f64)
}

fn embeddings<'a>(songs: &[&'a Song], slot: usize) -> Result<Vec<&'a Rows>> {
    songs
        .iter()
        .enumerate()
        .map(|(i, song)| song.view(slot).map(|v| &v.embeddings).map_err(|e| e.of_song(i)))
        .collect()
}
