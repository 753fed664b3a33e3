//! Watching a run: validation on prompts that are not tuned on, with rewards that are not optimised beside the one that is,
//! and warnings when a gain is not what it seems.

use std::collections::VecDeque;

use candle_core::DType;
use dragon_diffusion::DiffusionModel;
use dragon_metrics::{Better, bootstrap_indices};
use dragon_rewards::{Reward, RewardConfig, RewardSet, Song};

use super::generations::not_asked_to_stop;
use super::{FinetuneConfig, FinetuneTask};
use crate::bundle::{Bundle, Prompt};
use crate::embedder::Embedder;
use crate::error::{Error, Result};
use crate::eval::scale_by_base;
use crate::rollout::Sampling;
use crate::run::RunContext;

/// Songs of validation prompts, by the base and by the policy.
pub(super) struct Validation {
    prompts: Vec<Prompt>,
    /// The run's rewards, then the monitors.
    rewards: RewardSet,
    /// Songs of the base, made at the first validation.
    base: Option<Vec<Song>>,
}

/// A reward of the songs of both models.
struct Scores {
    base: f64,
    tuned: f64,
    /// Difference of each song, if it is a reward of songs.
    gains: Option<Vec<f64>>,
}

impl Validation {
    /// Subsets of the base's songs that give the scale of a weighted sum of rewards of sets.
    const SUBSETS: usize = 20;

    /// # Errors
    /// If a reward cannot be built.
    pub fn new(
        cfg: &FinetuneConfig,
        bundle: &Bundle,
        embedder: &Embedder,
        prompts: Vec<Prompt>,
        ctx: &RunContext,
    ) -> Result<Self> {
        let all = cfg.reward.parts().iter().chain(cfg.watched()).cloned().collect();
        let all = RewardConfig::RandomMix { rewards: all };
        let rewards = embedder.reward(&all, Some(bundle), ctx)?;
        embedder.try_out(&rewards, bundle)?;
        Ok(Self { prompts, rewards, base: None })
    }

    /// Generates for the prompts and scores: `reward`, `reward_base` and `win_rate` of the run's (first) reward, and of each
    /// monitor the value, `(base)` and `(songs won)`. Distances are logged as distances, as in reports.
    ///
    /// # Errors
    /// If songs cannot be made or scored.
    pub fn run(&mut self, task: &FinetuneTask) -> Result<Vec<(String, f64)>> {
        let refused = |err: dragon_rewards::Error| Error::input("cannot score the validation songs")(err);
        let state = self.rewards.state();
        let own = task.rewards.state(); // the normalisers of weighted sums
        let n_own = own.len();
        self.rewards
            .load_state(&own.into_iter().chain(state.into_iter().skip(n_own)).collect::<Vec<_>>())
            .map_err(refused)?;
        if self.base.is_none() {
            let songs = self.songs(task, task.reference.as_ref())?;
            let base: Vec<&Song> = songs.iter().collect();
            // Weighted sums among the monitors are on the base's scale, as in the evaluation.
            let subsets = bootstrap_indices(task.cfg.seed, Self::SUBSETS, base.len(), base.len())
                .map_err(Error::input("validation"))?;
            for reward in self.rewards.iter_mut().skip(n_own) {
                scale_by_base(reward, &base, &subsets).map_err(refused)?;
            }
            self.base = Some(songs);
        }
        let tuned = self.songs(task, task.policy.frozen(task.exported(), DType::F32)?.as_ref())?;
        let base = self.base.as_deref().unwrap_or_default();
        let (tuned, base): (Vec<&Song>, Vec<&Song>) = (tuned.iter().collect(), base.iter().collect());
        let scores = |reward: &Reward| -> std::result::Result<Scores, dragon_rewards::Error> {
            let songs = reward.song_scores(&tuned)?.zip(reward.song_scores(&base)?);
            Ok(Scores {
                base: reward.set_score(&base)?,
                tuned: reward.set_score(&tuned)?,
                gains: songs.map(|(tuned, base)| tuned.iter().zip(&base).map(|(t, b)| t - b).collect()),
            })
        };
        let all: Vec<Scores> =
            self.rewards.iter().map(scores).collect::<std::result::Result<_, _>>().map_err(refused)?;
        let target = &all[0];
        let mut log = vec![("reward".to_owned(), target.tuned), ("reward_base".to_owned(), target.base)];
        if let Some(gains) = &target.gains {
            log.push(("win_rate".into(), win_rate(gains)?));
        }
        for (metric, scores) in task.cfg.validation.monitors.iter().zip(&all[n_own..]) {
            let sign = if metric.reward.is_distance() { -1.0 } else { 1.0 };
            log.push((metric.name.clone(), sign * scores.tuned));
            log.push((format!("{} (base)", metric.name), sign * scores.base));
            if let Some(gains) = &scores.gains {
                log.push((format!("{} (songs won)", metric.name), win_rate(gains)?));
                if disagree(target.gains.as_deref(), gains) {
                    tracing::warn!(
                        "the reward rises and `{}` becomes worse ({:.4} from {:.4}): one encoder's taste may be what is learned (reward hacking)",
                        metric.name,
                        sign * scores.tuned,
                        sign * scores.base
                    );
                }
            }
        }
        Ok(log)
    }

    /// Songs of the validation prompts by a model, with the noise that `generate` and `eval` use.
    fn songs(&self, task: &FinetuneTask, model: &dyn DiffusionModel) -> Result<Vec<Song>> {
        let captions: Vec<&str> = self.prompts.iter().map(|p| p.caption.as_str()).collect();
        let keys: Vec<(&str, u64)> = captions.iter().map(|&caption| (caption, task.cfg.seed)).collect();
        let sampling = Sampling {
            bundle: task.bundle,
            texts: &task.texts,
            sampler: &task.cfg.validation.sampler,
            batch: task.cfg.rollout.batch,
        };
        let made = sampling.songs(model, &keys, &task.unstoppable())?.ok_or_else(not_asked_to_stop)?;
        let batch = task.batch(&made.latents, &made.clips, &captions);
        task.embedder.songs(self.rewards.sources(), &batch)
    }
}

fn win_rate(gains: &[f64]) -> Result<f64> {
    let zeros = vec![0.0; gains.len()];
    let rate = dragon_metrics::win_rate(gains, &zeros, Better::Higher);
    Ok(rate.map_err(Error::input("validation"))?.rate)
}

/// Whether one reward of the same songs rises and the other falls, each by more than two standard errors.
fn disagree(target: Option<&[f64]>, other: &[f64]) -> bool {
    target.is_some_and(|target| standard_errors(target) > 2.0 && standard_errors(other) < -2.0)
}

/// The mean of paired differences in units of its standard error.
fn standard_errors(gains: &[f64]) -> f64 {
    let n = gains.len() as f64;
    let mean = gains.iter().sum::<f64>() / n;
    let variance = gains.iter().map(|gain| (gain - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    if variance > 0.0 { mean / (variance / n).sqrt() } else { 0.0 }
}

/// Watches the two error curves: learning to avoid D- may cost D+ too, and then the model only gets worse.
#[derive(Default)]
pub(super) struct Drift {
    /// Relative growth of the policy's error over the reference's on D+ and D-, of the last steps.
    growth: VecDeque<[f64; 2]>,
    warned: bool,
}

impl Drift {
    /// Steps over which the growth is averaged: a step's own noise is a few percent.
    const STEPS: usize = 10;
    /// Growth that is no noise.
    const LIMIT: f64 = 0.02;

    /// Takes the log of a step; gives a sentence when both errors have begun to grow.
    pub fn after(&mut self, log: &[(&'static str, f64)]) -> Option<String> {
        let value = |name: &str| log.iter().find(|(key, _)| *key == name).map_or(0.0, |(_, value)| *value);
        let growth = |set: &str| {
            let reference = value(&format!("error_reference_{set}"));
            if reference > 0.0 { value(&format!("error_policy_{set}")) / reference - 1.0 } else { 0.0 }
        };
        self.growth.push_back([growth("plus"), growth("minus")]);
        if self.growth.len() > Self::STEPS {
            self.growth.pop_front();
        }
        let mean = |k: usize| self.growth.iter().map(|g| g[k]).sum::<f64>() / self.growth.len() as f64;
        let (plus, minus) = (mean(0), mean(1));
        let grows = self.growth.len() == Self::STEPS && plus > Self::LIMIT && minus > Self::LIMIT;
        let begun = grows && !self.warned;
        self.warned = grows;
        begun.then(|| {
            format!(
                "the policy's errors have grown over the reference's on D+ ({:+.1} %) and on D- ({:+.1} %): it \
                 forgets more than it learns; try a smaller learning rate or a larger beta",
                100.0 * plus,
                100.0 * minus
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoders_disagree_when_both_changes_are_beyond_chance() {
        let up = [1.0, 2.0, 1.5, 0.5];
        let down = up.map(|x| -x);
        assert!(disagree(Some(&up), &down));
        assert!(!disagree(Some(&up), &up) && !disagree(Some(&down), &down) && !disagree(None, &down));
        assert!(!disagree(Some(&up), &[-1.0, 1.0, -0.5, 0.4]));
    }

    #[test]
    fn drift_is_reported_once_when_both_errors_grow() {
        let log = |plus: f64, minus: f64| {
            [
                ("error_policy_plus", plus),
                ("error_reference_plus", 1.0),
                ("error_policy_minus", minus),
                ("error_reference_minus", 1.0),
            ]
        };
        let mut drift = Drift::default();
        assert!((0..20).all(|_| drift.after(&log(0.95, 1.2)).is_none()), "D+ is learned");
        let found: Vec<String> = (0..20).filter_map(|_| drift.after(&log(1.1, 1.1))).collect();
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("smaller learning rate"), "{}", found[0]);
        (0..10).for_each(|_| drop(drift.after(&log(0.9, 1.0))));
        assert_eq!((0..20).filter_map(|_| drift.after(&log(1.1, 1.1))).count(), 1, "again after it was over");
    }
}
