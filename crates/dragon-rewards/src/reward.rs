//! The kinds of rewards (paper 4): of one song, of one song against a distribution, of a set of songs.

use std::fmt::Debug;

use crate::mix::RunningStats;
use crate::{Error, Result, Song};

/// A reward of a single song: instance-wise (CLAP score) or instance-to-distribution (per-song FAD).
pub trait InstanceReward: Debug + Send + Sync {
    /// Reward of one song; higher is better.
    ///
    /// # Errors
    /// If the song lacks what the reward reads, or the metric underneath refuses it.
    fn score(&self, song: &Song) -> Result<f64>;

    /// Updates running normalisers with a batch; only weighted sums have any. Call it once per training step, before
    /// scoring, so that all songs of a step are scored on one scale.
    ///
    /// # Errors
    /// If a song cannot be scored.
    fn observe(&mut self, _songs: &[&Song]) -> Result<()> {
        Ok(())
    }

    /// Running normalisers, for a checkpoint.
    fn state(&self) -> Vec<RunningStats> {
        Vec::new()
    }

    /// Takes back what [`InstanceReward::state`] gave.
    ///
    /// # Errors
    /// If the number of normalisers differs.
    fn load_state(&mut self, state: &[RunningStats]) -> Result<()> {
        no_state(state)
    }
}

/// A reward of a set of songs (distribution-to-distribution: dataset FAD; reference-free: Vendi).
pub trait DistributionReward: Debug + Send + Sync {
    /// Reward of a set; higher is better. The order of the songs does not matter.
    ///
    /// # Errors
    /// If a song lacks what the reward reads, or the metric underneath refuses the set.
    fn score(&self, songs: &[&Song]) -> Result<f64>;

    /// Prepares fast scores of many subsets of `pool` (for Algorithm 1: the songs of D1, then those of D2).
    ///
    /// # Errors
    /// As [`DistributionReward::score`].
    fn incremental<'a>(&'a self, pool: &[&'a Song]) -> Result<Box<dyn IncrementalScore + 'a>>;

    /// As [`InstanceReward::observe`], with the sets of a step.
    ///
    /// # Errors
    /// If a set cannot be scored.
    fn observe(&mut self, _sets: &[&[&Song]]) -> Result<()> {
        Ok(())
    }

    /// Running normalisers, for a checkpoint.
    fn state(&self) -> Vec<RunningStats> {
        Vec::new()
    }

    /// Takes back what [`DistributionReward::state`] gave.
    ///
    /// # Errors
    /// If the number of normalisers differs.
    fn load_state(&mut self, state: &[RunningStats]) -> Result<()> {
        no_state(state)
    }
}

/// Scores of subsets of one pool; cheapest when each subset differs little from the one before.
pub trait IncrementalScore {
    /// Reward of the songs `members` (indices into the pool); equal to [`DistributionReward::score`] to rounding.
    ///
    /// # Errors
    /// If an index is out of range or the metric refuses the subset.
    fn score(&mut self, members: &[usize]) -> Result<f64>;
}

/// A reward of either form.
#[derive(Debug)]
pub enum Reward {
    /// Scores each song.
    Instance(Box<dyn InstanceReward>),
    /// Scores a set of songs.
    Distribution(Box<dyn DistributionReward>),
}

impl Reward {
    /// Reward of a set: the set's own reward, or the mean over its songs.
    ///
    /// # Errors
    /// If the set is empty or cannot be scored.
    pub fn set_score(&self, songs: &[&Song]) -> Result<f64> {
        match self {
            Reward::Instance(_) => {
                let scores = self.song_scores(songs)?.unwrap_or_default();
                if scores.is_empty() {
                    return Err(Error::UnequalSets { sizes: Vec::new() });
                }
                Ok(scores.iter().sum::<f64>() / scores.len() as f64)
            }
            Reward::Distribution(reward) => finite(reward.score(songs)?),
        }
    }

    /// Reward of each song, or `None` for a reward that only sets have.
    ///
    /// # Errors
    /// For the first song that cannot be scored; the message holds its index.
    pub fn song_scores(&self, songs: &[&Song]) -> Result<Option<Vec<f64>>> {
        match self {
            Reward::Instance(reward) => scores(reward.as_ref(), songs).map(Some),
            Reward::Distribution(_) => Ok(None),
        }
    }

    /// Updates running normalisers with the sets of a step (see [`InstanceReward::observe`]).
    ///
    /// # Errors
    /// If a song or set cannot be scored.
    pub fn observe(&mut self, sets: &[&[&Song]]) -> Result<()> {
        match self {
            Reward::Instance(reward) => reward.observe(&sets.concat()),
            Reward::Distribution(reward) => reward.observe(sets),
        }
    }

    /// Running normalisers, for a checkpoint; empty for most rewards.
    pub fn state(&self) -> Vec<RunningStats> {
        match self {
            Reward::Instance(reward) => reward.state(),
            Reward::Distribution(reward) => reward.state(),
        }
    }

    /// Takes back what [`Reward::state`] gave.
    ///
    /// # Errors
    /// If the number of normalisers differs.
    pub fn load_state(&mut self, state: &[RunningStats]) -> Result<()> {
        match self {
            Reward::Instance(reward) => reward.load_state(state),
            Reward::Distribution(reward) => reward.load_state(state),
        }
    }
}

/// Scores of all songs, in parallel, in order.
pub(crate) fn scores(reward: &dyn InstanceReward, songs: &[&Song]) -> Result<Vec<f64>> {
    use rayon::prelude::*;
    let all: Vec<Result<f64>> = songs.par_iter().map(|song| reward.score(song).and_then(finite)).collect();
    all.into_iter().enumerate().map(|(i, score)| score.map_err(|e| e.of_song(i))).collect()
}

pub(crate) fn finite(value: f64) -> Result<f64> {
    if value.is_finite() { Ok(value) } else { Err(Error::NotFinite { value }) }
}

fn no_state(state: &[RunningStats]) -> Result<()> {
    if state.is_empty() { Ok(()) } else { Err(Error::State { expected: 0, found: state.len() }) }
}
