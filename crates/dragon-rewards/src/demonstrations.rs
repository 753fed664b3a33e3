//! Demonstration sets: which generations to learn towards (D+) and which to learn away from (D-) (paper 3.1, A.1).

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::reward::{finite, scores};
use crate::{DistributionReward, Error, Result, Reward, Song};

/// D+ and D- of one step, as indices into the songs they were made from.
///
/// Paired sets index the pool `D1 ++ D2 ++ …` of songs: songs `i`, `n + i`, … answer the same prompt, one is `plus[i]`,
/// another `minus[i]`. Unpaired sets index the songs given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Demonstrations {
    /// Songs in D+.
    pub plus: Vec<usize>,
    /// Songs in D-.
    pub minus: Vec<usize>,
    /// Reward of each song of the pool; `None` for rewards that only sets have.
    pub scores: Option<Vec<f64>>,
    /// Reward above which a song is in D+; `None` for paired sets.
    pub split_at: Option<f64>,
    /// Reward of D+ (mean over its songs for instance rewards).
    pub reward_plus: f64,
    /// Reward of D-.
    pub reward_minus: f64,
    /// Reward of D1, before any swap; of all songs for unpaired sets.
    pub reward_first: f64,
    /// Reward of D2; of all songs for unpaired sets.
    pub reward_second: f64,
}

/// Where unpaired songs are divided (paper App. E: at the batch mean).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// At the mean of the batch.
    #[default]
    Mean,
    /// At its median: equally many on both sides.
    Median,
}

/// Paired demonstrations of the sets D1, D2, … (two in the paper), whose songs `i` all answer the same prompt: the best
/// song of each prompt and the worst for instance rewards (the first of equals is better), Algorithm 1 for rewards of
/// sets. More than two widen the gap between D+ and D- and leave as many pairs to learn from.
///
/// # Errors
/// If there are fewer than two sets, they are empty or of unequal size, or a song or set cannot be scored.
pub fn paired(reward: &Reward, sets: &[&[&Song]]) -> Result<Demonstrations> {
    let n = pairs(sets)?;
    let reward = match reward {
        Reward::Distribution(reward) => return greedy(reward.as_ref(), sets, 0..n),
        Reward::Instance(reward) => reward,
    };
    let scores = scores(reward.as_ref(), &sets.concat())?;
    let (mut plus, mut minus) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for i in 0..n {
        let (mut best, mut worst) = (i, n + i);
        for song in (i..scores.len()).step_by(n) {
            if scores[song] > scores[best] {
                best = song;
            }
            if scores[song] <= scores[worst] {
                worst = song;
            }
        }
        plus.push(best);
        minus.push(worst);
    }
    let mean = |songs: &mut dyn Iterator<Item = usize>| songs.map(|s| scores[s]).sum::<f64>() / n as f64;
    Ok(Demonstrations {
        reward_plus: mean(&mut plus.iter().copied()),
        reward_minus: mean(&mut minus.iter().copied()),
        reward_first: mean(&mut (0..n)),
        reward_second: mean(&mut (n..2 * n)),
        plus,
        minus,
        scores: Some(scores),
        split_at: None,
    })
}

/// Unpaired demonstrations: songs above the split go to D+, songs below to D-; a song exactly on it teaches nothing and
/// is left out. If all rewards are equal, both sets are empty.
///
/// # Errors
/// If there are fewer than two songs, one cannot be scored, or the reward is one of sets (it has no score per song).
pub fn unpaired(reward: &Reward, songs: &[&Song], split: Split) -> Result<Demonstrations> {
    let Reward::Instance(reward) = reward else {
        return Err(Error::Config {
            key: "demonstrations",
            expected: "`paired` (Algorithm 1), since a reward of sets has no score per song".into(),
            found: "`unpaired`".into(),
        });
    };
    if songs.len() < 2 {
        return Err(dragon_metrics::Error::TooFew {
            what: "songs to split",
            expected: 2,
            found: songs.len(),
        }
        .into());
    }
    let scores = scores(reward.as_ref(), songs)?;
    let mean = scores.iter().sum::<f64>() / scores.len() as f64;
    let split_at = match split {
        // All equal: the rounded mean may miss the common value.
        Split::Mean if scores.iter().all(|s| *s == scores[0]) => scores[0],
        Split::Mean => mean,
        Split::Median => dragon_metrics::bootstrap::percentile(&scores, 0.5)?,
    };
    let plus: Vec<usize> = (0..scores.len()).filter(|&i| scores[i] > split_at).collect();
    let minus: Vec<usize> = (0..scores.len()).filter(|&i| scores[i] < split_at).collect();
    let mean_of = |members: &[usize]| match members.len() {
        0 => mean,
        n => members.iter().map(|&i| scores[i]).sum::<f64>() / n as f64,
    };
    Ok(Demonstrations {
        reward_plus: mean_of(&plus),
        reward_minus: mean_of(&minus),
        reward_first: mean,
        reward_second: mean,
        plus,
        minus,
        scores: Some(scores),
        split_at: Some(split_at),
    })
}

/// Algorithm 1 (paper A.1) with incremental evaluation: starts from the better of D1 and D2 as D+, then goes once
/// through `swaps`, exchanging the members of a pair wherever that raises the reward of D+. Of more than two sets D+
/// starts from the best and D- from the worst, each tries every song of a prompt that the other does not hold, and D-
/// keeps what lowers its reward.
///
/// `swaps` is `0..n` for the global pass (ours, over the gathered sets: every rank holds the same D+), or this rank's
/// own pairs (the paper's rule).
///
/// Reward of D+ never falls, and is at least that of every set.
///
/// # Errors
/// If there are fewer than two sets, they are empty or of unequal size, `swaps` leaves them, or a set cannot be scored.
pub fn greedy(
    reward: &dyn DistributionReward,
    sets: &[&[&Song]],
    swaps: Range<usize>,
) -> Result<Demonstrations> {
    let n = pairs(sets)?;
    let pool = sets.concat();
    let mut subsets = reward.incremental(&pool)?;
    algorithm_1(n, sets.len(), swaps, |members| subsets.score(members))
}

/// Algorithm 1 on indices: `score` rates a set of `n` members of the pool `0..n_sets * n`, one of `i`, `n + i`, … for
/// each prompt `i`.
///
/// # Errors
/// If `n` is 0 or `n_sets` below 2, `swaps` leaves `0..n`, or `score` fails or is not finite.
pub fn algorithm_1(
    n: usize,
    n_sets: usize,
    swaps: Range<usize>,
    mut score: impl FnMut(&[usize]) -> Result<f64>,
) -> Result<Demonstrations> {
    if n == 0 || n_sets < 2 {
        return Err(Error::UnequalSets { sizes: vec![n; n_sets] });
    }
    if swaps.end > n || swaps.start > swaps.end {
        return Err(Error::SwapRange { start: swaps.start, end: swaps.end, pairs: n });
    }
    let mut score = |members: &[usize]| score(members).and_then(finite);
    let set = |k: usize| -> Vec<usize> { (k * n..(k + 1) * n).collect() };
    let rewards = (0..n_sets).map(|k| score(&set(k))).collect::<Result<Vec<_>>>()?;
    let (mut best, mut worst) = (0, 1);
    for (k, reward) in rewards.iter().enumerate() {
        if *reward > rewards[best] {
            best = k;
        }
        if *reward <= rewards[worst] {
            worst = k;
        }
    }
    let (mut plus, mut minus) = (set(best), set(worst));
    let mut reward_plus = rewards[best];
    for i in swaps.clone() {
        for song in (i..n_sets * n).step_by(n).filter(|&song| song != best * n + i) {
            let held = std::mem::replace(&mut plus[i], song);
            let candidate = score(&plus)?;
            if candidate > reward_plus {
                reward_plus = candidate;
                if minus[i] == song {
                    minus[i] = held;
                }
            } else {
                plus[i] = held;
            }
        }
    }
    let mut reward_minus = score(&minus)?;
    for i in swaps {
        for song in (i..n_sets * n).step_by(n) {
            if song == plus[i] || song == minus[i] {
                continue;
            }
            let held = std::mem::replace(&mut minus[i], song);
            let candidate = score(&minus)?;
            if candidate < reward_minus {
                reward_minus = candidate;
            } else {
                minus[i] = held;
            }
        }
    }
    Ok(Demonstrations {
        plus,
        minus,
        scores: None,
        split_at: None,
        reward_plus,
        reward_minus,
        reward_first: rewards[0],
        reward_second: rewards[1],
    })
}

/// Songs in each of the sets.
fn pairs(sets: &[&[&Song]]) -> Result<usize> {
    let n = sets.first().map_or(0, |set| set.len());
    if n == 0 || sets.len() < 2 || sets.iter().any(|set| set.len() != n) {
        return Err(Error::UnequalSets { sizes: sets.iter().map(|set| set.len()).collect() });
    }
    Ok(n)
}
