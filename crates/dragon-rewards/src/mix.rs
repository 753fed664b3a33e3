//! Several rewards together: weighted sums of running-normalised rewards.
//!
//! Rewards have different units (a distance of 30, a cosine of 0.3), so each term is first put on a common scale:
//! `weight * (r - mean)/std`, with the mean and standard deviation of everything observed so far in the run (in an
//! evaluation, of the base's songs). Ours; the paper draws one of two rewards per step instead (5.5), which is
//! [`crate::RewardSet::pick`].

use serde::{Deserialize, Serialize};

use crate::reward::{finite, scores};
use crate::{DistributionReward, Error, IncrementalScore, InstanceReward, Result, Reward, Song};

/// Mean and variance of a stream of rewards (Welford).
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningStats {
    /// Values seen.
    pub n: u64,
    /// Their mean.
    #[serde(with = "exact")]
    pub mean: f64,
    /// Sum of squared deviations from the mean.
    #[serde(with = "exact")]
    pub scatter: f64,
}

/// Floats as text: Rust prints the shortest digits that read back as the same bits, which not every format's own
/// number parser does, and a resumed run must go on bit for bit.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{value:?}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|_| D::Error::custom(format!("`{text}` is not a number")))
    }
}

impl RunningStats {
    /// Takes one more value.
    pub fn push(&mut self, x: f64) {
        self.n += 1;
        let before = x - self.mean;
        self.mean += before / self.n as f64;
        self.scatter += before * (x - self.mean);
    }

    /// Standard deviation (ddof 1); 1 until two different values were seen, so that nothing is divided by zero.
    pub fn std(&self) -> f64 {
        if self.n < 2 || self.scatter <= 0.0 {
            return 1.0;
        }
        (self.scatter / (self.n - 1) as f64).sqrt()
    }

    /// `(x - mean)/std`.
    pub fn normalize(&self, x: f64) -> f64 {
        (x - self.mean) / self.std()
    }
}

/// `Σ weight * normalised reward` of instance rewards; normalised over songs.
#[derive(Debug)]
pub struct WeightedInstances {
    terms: Vec<(f64, Box<dyn InstanceReward>, RunningStats)>,
}

impl WeightedInstances {
    /// A sum of `(weight, reward)` terms.
    pub fn new(terms: Vec<(f64, Box<dyn InstanceReward>)>) -> Self {
        Self { terms: terms.into_iter().map(|(w, r)| (w, r, RunningStats::default())).collect() }
    }
}

impl InstanceReward for WeightedInstances {
    fn score(&self, song: &Song) -> Result<f64> {
        let mut sum = 0.0;
        for (weight, reward, stats) in &self.terms {
            sum += weight * stats.normalize(reward.score(song)?);
        }
        Ok(sum)
    }

    fn observe(&mut self, songs: &[&Song]) -> Result<()> {
        for (_, reward, stats) in &mut self.terms {
            reward.observe(songs)?;
            scores(reward.as_ref(), songs)?.into_iter().for_each(|x| stats.push(x));
        }
        Ok(())
    }

    fn state(&self) -> Vec<RunningStats> {
        self.terms.iter().map(|t| t.2).collect()
    }

    fn load_state(&mut self, state: &[RunningStats]) -> Result<()> {
        load(self.terms.iter_mut().map(|t| &mut t.2).collect(), state)
    }
}

/// `Σ weight * normalised reward` of rewards of sets (an instance reward enters by its mean); normalised over sets.
#[derive(Debug)]
pub struct WeightedDistributions {
    terms: Vec<(f64, Box<dyn DistributionReward>, RunningStats)>,
}

impl WeightedDistributions {
    /// A sum of `(weight, reward)` terms.
    pub fn new(terms: Vec<(f64, Box<dyn DistributionReward>)>) -> Self {
        Self { terms: terms.into_iter().map(|(w, r)| (w, r, RunningStats::default())).collect() }
    }
}

impl DistributionReward for WeightedDistributions {
    fn score(&self, songs: &[&Song]) -> Result<f64> {
        let mut sum = 0.0;
        for (weight, reward, stats) in &self.terms {
            sum += weight * stats.normalize(reward.score(songs)?);
        }
        Ok(sum)
    }

    fn incremental<'a>(&'a self, pool: &[&'a Song]) -> Result<Box<dyn IncrementalScore + 'a>> {
        let terms = self
            .terms
            .iter()
            .map(|(weight, reward, stats)| Ok((*weight, *stats, reward.incremental(pool)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Box::new(WeightedSubsets(terms)))
    }

    fn observe(&mut self, sets: &[&[&Song]]) -> Result<()> {
        for (_, reward, stats) in &mut self.terms {
            reward.observe(sets)?;
            for set in sets {
                stats.push(finite(reward.score(set)?)?);
            }
        }
        Ok(())
    }

    fn state(&self) -> Vec<RunningStats> {
        self.terms.iter().map(|t| t.2).collect()
    }

    fn load_state(&mut self, state: &[RunningStats]) -> Result<()> {
        load(self.terms.iter_mut().map(|t| &mut t.2).collect(), state)
    }
}

struct WeightedSubsets<'a>(Vec<(f64, RunningStats, Box<dyn IncrementalScore + 'a>)>);

impl IncrementalScore for WeightedSubsets<'_> {
    fn score(&mut self, members: &[usize]) -> Result<f64> {
        let mut sum = 0.0;
        for (weight, stats, subsets) in &mut self.0 {
            sum += *weight * stats.normalize(subsets.score(members)?);
        }
        Ok(sum)
    }
}

/// The weighted sum of rewards of any kind: of songs if every term is, else of sets.
pub fn weighted_sum(terms: Vec<(f64, Reward)>) -> Reward {
    if terms.iter().all(|(_, r)| matches!(r, Reward::Instance(_))) {
        let instances = terms.into_iter().filter_map(|(w, r)| match r {
            Reward::Instance(r) => Some((w, r)),
            Reward::Distribution(_) => None,
        });
        return Reward::Instance(Box::new(WeightedInstances::new(instances.collect())));
    }
    let sets = terms.into_iter().map(|(w, r)| match r {
        Reward::Instance(r) => (w, Box::new(crate::MeanOf(r)) as Box<dyn DistributionReward>),
        Reward::Distribution(r) => (w, r),
    });
    Reward::Distribution(Box::new(WeightedDistributions::new(sets.collect())))
}

fn load(slots: Vec<&mut RunningStats>, state: &[RunningStats]) -> Result<()> {
    if slots.len() != state.len() {
        return Err(Error::State { expected: slots.len(), found: state.len() });
    }
    slots.into_iter().zip(state).for_each(|(slot, s)| *slot = *s);
    Ok(())
}
