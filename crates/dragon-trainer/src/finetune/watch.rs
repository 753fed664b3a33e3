//! Watching a run: validation on prompts that are not tuned on, with rewards that are not optimised beside the one that is,
//! and warnings when a gain is not what it seems.

use std::collections::VecDeque;

use candle_core::DType;
use dragon_diffusion::DiffusionModel;
use dragon_metrics::bootstrap::percentile;
use dragon_metrics::{Better, bootstrap_indices};
use dragon_rewards::{Reward, RewardConfig, RewardSet, Song};
use rayon::prelude::*;

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

/// Scalars of a validation, and warnings.
type Found = (Vec<(String, f64)>, Vec<String>);

impl Validation {
    /// Draws of the songs, with replacement, that say how far a reward of sets varies by chance.
    const SUBSETS: usize = 100;

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
    /// other one of a mix and of each monitor the value, `(base)` and `(songs won)`. These are logged as in reports, distances
    /// as distances. Warns of each monitor that falls beyond chance while what is optimised rises.
    ///
    /// # Errors
    /// If songs cannot be made or scored.
    pub fn run(&mut self, task: &FinetuneTask) -> Result<Found> {
        let refused = |err: dragon_rewards::Error| Error::input("cannot score the validation songs")(err);
        let state = self.rewards.state();
        let own = task.rewards.state(); // the normalisers of weighted sums
        let n_own = own.len();
        self.rewards
            .load_state(&own.into_iter().chain(state.into_iter().skip(n_own)).collect::<Vec<_>>())
            .map_err(refused)?;
        let n = self.prompts.len();
        let subsets =
            bootstrap_indices(task.cfg.seed, Self::SUBSETS, n, n).map_err(Error::input("validation"))?;
        if self.base.is_none() {
            let songs = self.songs(task, task.reference.as_ref())?;
            let base: Vec<&Song> = songs.iter().collect();
            // Weighted sums among the monitors are on the base's scale, as in the evaluation.
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
        let trend_of = |(reward, scores): (&Reward, &Scores)| match &scores.gains {
            Some(gains) => Ok(trend(gains)),
            None => trend_of_sets(reward, &tuned, &base, &subsets),
        };
        let own = self.rewards.iter().zip(&all).take(n_own).map(trend_of);
        let rises = own.collect::<std::result::Result<Vec<_>, _>>().map_err(refused)?.contains(&Some(true));
        // Draws of sets take seconds: only where there is a gain to doubt.
        let doubted = self.rewards.iter().zip(&all).skip(n_own).filter(|_| rises).map(trend_of);
        let trends = doubted.collect::<std::result::Result<Vec<_>, _>>().map_err(refused)?;
        let target = &all[0];
        let mut log = vec![("reward".to_owned(), target.tuned), ("reward_base".to_owned(), target.base)];
        if let Some(gains) = &target.gains {
            log.push(("win_rate".into(), win_rate(gains)?));
        }
        let parts = task.cfg.reward.parts();
        let own = parts.iter().map(|part| (part.label(), part));
        let monitors = task.cfg.monitors().iter().map(|metric| (metric.name.clone(), &metric.reward));
        let mut warnings = Vec::new();
        for (i, (name, reward)) in own.chain(monitors).enumerate().skip(1) {
            let sign = if reward.is_distance() { -1.0 } else { 1.0 };
            let (tuned, base) = (sign * all[i].tuned, sign * all[i].base);
            log.push((name.clone(), tuned));
            log.push((format!("{name} (base)"), base));
            if let Some(gains) = &all[i].gains {
                log.push((format!("{name} (songs won)"), win_rate(gains)?));
            }
            if i >= n_own && trends.get(i - n_own) == Some(&Some(false)) {
                warnings.push(format!(
                    "the reward rises and `{name}` becomes worse ({tuned:.4} from {base:.4}): one encoder's taste may be \
                     what is learned (reward hacking)"
                ));
            }
        }
        Ok((log, warnings))
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

/// Whether a reward of songs rises or falls by more than two standard errors of the differences; else `None`.
fn trend(gains: &[f64]) -> Option<bool> {
    let n = gains.len() as f64;
    let mean = gains.iter().sum::<f64>() / n;
    let variance = gains.iter().map(|gain| (gain - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean.abs() > 2.0 * (variance / n).sqrt()).then_some(mean > 0.0)
}

/// The same of a reward of sets, by the 95 % interval over draws of the songs.
fn trend_of_sets(
    reward: &Reward,
    tuned: &[&Song],
    base: &[&Song],
    subsets: &[Vec<usize>],
) -> std::result::Result<Option<bool>, dragon_rewards::Error> {
    let of = |songs: &[&Song], members: &[usize]| {
        reward.set_score(&members.iter().map(|&m| songs[m]).collect::<Vec<_>>())
    };
    let differences: Vec<std::result::Result<f64, dragon_rewards::Error>> =
        subsets.par_iter().map(|members| Ok(of(tuned, members)? - of(base, members)?)).collect();
    let differences: Vec<f64> = differences.into_iter().collect::<std::result::Result<_, _>>()?;
    let (low, high) = (percentile(&differences, 0.025)?, percentile(&differences, 0.975)?);
    Ok((low > 0.0 || high < 0.0).then_some(low > 0.0))
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

    /// Everything it remembers: whether it has warned, then the growth of the last steps.
    pub fn state(&self) -> Vec<f64> {
        let warned = if self.warned { 1.0 } else { 0.0 };
        [warned].into_iter().chain(self.growth.iter().flatten().copied()).collect()
    }

    /// Takes back what [`Self::state`] gave.
    pub fn of_state(state: &[f64]) -> Self {
        let growth = state.get(1..).unwrap_or_default().chunks_exact(2).map(|g| [g[0], g[1]]).collect();
        Self { growth, warned: state.first().is_some_and(|&warned| warned > 0.0) }
    }

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
    fn a_trend_is_what_chance_does_not_explain() {
        let up = [1.0, 2.0, 1.5, 0.5];
        assert_eq!([trend(&up), trend(&up.map(|x| -x))], [Some(true), Some(false)]);
        assert_eq!([trend(&[-1.0, 1.0, -0.5, 0.4]), trend(&[0.0; 4])], [None, None]);
    }

    #[test]
    fn sets_have_a_trend_where_all_draws_of_their_songs_agree() {
        let song = |x: &[f64]| {
            let embeddings = dragon_metrics::Rows::new(1, x.len(), x.to_vec()).unwrap();
            Song { views: vec![dragon_rewards::View { embeddings, text: None }] }
        };
        let unit = |i: usize| song(&std::array::from_fn::<f64, 8, _>(|k| if k == i { 1.0 } else { 0.0 }));
        let (alike, different): (Vec<Song>, Vec<Song>) = (0..8).map(|i| (unit(0), unit(i))).unzip();
        let vendi = toml::from_str("kind='vendi'\nencoder='e'\nsetting='s'\npooling='song_mean'").unwrap();
        let rewards = RewardSet::build(&vendi, |_, _| Err::<std::sync::Arc<_>, _>("no exemplars")).unwrap();
        let (alike, different): (Vec<&Song>, Vec<&Song>) =
            (alike.iter().collect(), different.iter().collect());
        let subsets = bootstrap_indices(1, 50, 8, 8).unwrap();
        let trend = |tuned, base| trend_of_sets(rewards.get(0).unwrap(), tuned, base, &subsets).unwrap();
        assert_eq!([trend(&different, &alike), trend(&alike, &different)], [Some(true), Some(false)]);
        assert_eq!(trend(&alike, &alike), None);
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
        drift = Drift::of_state(&drift.state()); // as a resumed run does
        assert!(drift.after(&log(1.1, 1.1)).is_none());
        assert!(found[0].contains("smaller learning rate"), "{}", found[0]);
        (0..10).for_each(|_| drop(drift.after(&log(0.9, 1.0))));
        assert_eq!((0..20).filter_map(|_| drift.after(&log(1.1, 1.1))).count(), 1, "again after it was over");
    }
}
