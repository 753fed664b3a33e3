//! Two systems against each other: values on all songs, win rates, differences over subsets.

use dragon_metrics::bootstrap::percentile;
use dragon_metrics::{Better, bootstrap_indices, win_rate};
use dragon_rewards::{Reward, RewardSet, Song};
use rayon::prelude::*;

use super::summary::number;
use super::systems::System;
use super::{BootstrapConfig, MetricConfig, MetricResult, Monitor, SongResult, Summary};
use crate::error::{Error, Result};
use crate::rollout::MONITORS;

/// Puts the terms of a weighted sum on the base's scale: its mean and deviation over the songs, or over subsets of them for
/// a reward of sets. Other rewards have no scale.
///
/// # Errors
/// If a song or a subset cannot be scored.
pub(crate) fn scale_by_base(
    reward: &mut Reward,
    base: &[&Song],
    subsets: &[Vec<usize>],
) -> std::result::Result<(), dragon_rewards::Error> {
    match reward {
        Reward::Instance(reward) => reward.observe(base),
        Reward::Distribution(reward) => {
            let sets: Vec<Vec<&Song>> =
                subsets.iter().map(|members| members.iter().map(|&m| base[m]).collect()).collect();
            reward.observe(&sets.iter().map(Vec::as_slice).collect::<Vec<_>>())
        }
    }
}

/// How two systems are compared, whatever made their songs.
pub(super) struct Comparison<'a> {
    pub metrics: &'a [MetricConfig],
    /// One reward a metric, in their order.
    pub rewards: &'a mut RewardSet,
    pub bootstrap: BootstrapConfig,
    /// Seed of the subsets.
    pub seed: u64,
    /// Whether song `i` of both systems answers the same prompt.
    pub paired: bool,
}

impl Comparison<'_> {
    /// Measures the base, `systems[0]`, and the tuned system, `systems[1]`; `songs` are the base's.
    ///
    /// # Errors
    /// If a metric cannot score the songs.
    pub fn summary(
        self,
        systems: &[System; 2],
        songs: Vec<SongResult>,
        names: [String; 2],
    ) -> Result<Summary> {
        let Self { metrics, rewards, bootstrap, seed, paired } = self;
        let failed = |err: dragon_metrics::Error| Error::input("cannot compare the systems")(err);
        let sizes: Vec<usize> = systems.iter().map(|system| system.songs.len()).collect();
        let subsets: Vec<Vec<Vec<usize>>> = sizes
            .iter()
            .enumerate()
            // Unpaired systems draw their own subsets.
            .map(|(i, &n)| {
                bootstrap_indices(
                    seed.wrapping_add(if paired { 0 } else { i as u64 }),
                    bootstrap.subsets,
                    bootstrap.songs,
                    n,
                )
            })
            .collect::<std::result::Result<_, _>>()
            .map_err(failed)?;
        let all: Vec<Vec<&Song>> = systems.iter().map(|system| system.songs.iter().collect()).collect();
        let mut results = Vec::with_capacity(metrics.len());
        for (i, metric) in metrics.iter().enumerate() {
            let reward = rewards.get_mut(i).ok_or_else(|| Error::Bug(format!("no reward {i}")))?;
            let refused = |err: dragon_rewards::Error| Error::input(format!("metric `{}`", metric.name))(err);
            scale_by_base(reward, &all[0], &subsets[0]).map_err(refused)?;
            let reward = &*reward;
            let full: Vec<f64> = all
                .iter()
                .map(|songs| reward.set_score(songs))
                .collect::<std::result::Result<_, _>>()
                .map_err(refused)?;
            let scores: Vec<Option<Vec<f64>>> = all
                .iter()
                .map(|songs| reward.song_scores(songs))
                .collect::<std::result::Result<_, _>>()
                .map_err(refused)?;
            let on_subsets: Vec<Vec<f64>> = (0..2)
                .map(|s| match &scores[s] {
                    Some(scores) => Ok(subsets[s].iter().map(|members| mean_of(scores, members)).collect()),
                    None => subset_scores(reward, &all[s], &subsets[s]).map_err(refused),
                })
                .collect::<Result<_>>()?;
            let sign = if metric.reward.is_distance() { -1.0 } else { 1.0 };
            let differences: Vec<f64> =
                on_subsets[1].iter().zip(&on_subsets[0]).map(|(t, b)| sign * (t - b)).collect();
            let set_win_rate = win_rate(&on_subsets[1], &on_subsets[0], Better::Higher).map_err(failed)?.rate;
            let (mut song_win_rate, mut effect_size) = (None, None);
            if let (Some(base), Some(tuned)) = (&scores[0], &scores[1]) {
                if paired {
                    song_win_rate = Some(win_rate(tuned, base, Better::Higher).map_err(failed)?);
                }
                let (center, n) = (mean(base), base.len() as f64);
                let std = (base.iter().map(|x| (x - center).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
                effect_size = (std > 0.0).then(|| (full[1] - full[0]) / std);
            }
            let printed =
                |scores: &Option<Vec<f64>>| scores.as_ref().map(|s| s.iter().map(|x| sign * x).collect());
            results.push(MetricResult {
                name: metric.name.clone(),
                reward: metric.reward.label(),
                lower_is_better: sign < 0.0,
                base: sign * full[0],
                tuned: sign * full[1],
                difference_95: (
                    percentile(&differences, 0.025).map_err(failed)?,
                    percentile(&differences, 0.975).map_err(failed)?,
                ),
                song_win_rate,
                set_win_rate,
                subset_means: (sign * mean(&on_subsets[0]), sign * mean(&on_subsets[1])),
                effect_size,
                base_songs: printed(&scores[0]),
                tuned_songs: printed(&scores[1]),
            });
        }
        let monitored =
            |s: usize, k: usize| mean(&systems[s].monitors.iter().map(|m| m[k]).collect::<Vec<_>>());
        let monitors = MONITORS
            .iter()
            .enumerate()
            .map(|(k, (_, name))| Monitor {
                name: (*name).into(),
                base: monitored(0, k),
                tuned: monitored(1, k),
            })
            .collect();
        let [base, tuned] = names;
        let warnings = disagreements(&results);
        Ok(Summary {
            base,
            tuned,
            n_songs: sizes[0],
            metrics: results,
            monitors,
            warnings,
            inputs_sha256: String::new(),
            songs,
        })
    }
}

/// What speaks against the gain of the first metric: others that became worse, beyond their interval, while it became
/// better.
fn disagreements(metrics: &[MetricResult]) -> Vec<String> {
    let (target, others) = match metrics.split_first() {
        Some((target, others)) if target.verdict() == Some(true) => (target, others),
        _ => return Vec::new(),
    };
    others
        .iter()
        .filter(|other| other.verdict() == Some(false))
        .map(|other| {
            format!(
                "{} became better and {} worse ({} to {}): the gain may be one encoder's taste (reward hacking)",
                target.name,
                other.name,
                number(other.base),
                number(other.tuned)
            )
        })
        .collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn mean_of(scores: &[f64], members: &[usize]) -> f64 {
    members.iter().map(|&m| scores[m]).sum::<f64>() / members.len().max(1) as f64
}

/// A reward of sets on many subsets, in parallel, in order.
fn subset_scores(
    reward: &Reward,
    songs: &[&Song],
    subsets: &[Vec<usize>],
) -> std::result::Result<Vec<f64>, dragon_rewards::Error> {
    let one = |members: &Vec<usize>| reward.set_score(&members.iter().map(|&m| songs[m]).collect::<Vec<_>>());
    let scores: Vec<std::result::Result<f64, _>> = subsets.par_iter().map(one).collect();
    scores.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use dragon_metrics::WinRate;

    use super::*;

    fn metric(name: &str, difference_95: (f64, f64), won: Option<(f64, f64)>) -> MetricResult {
        let won = won.map(|(lower, upper)| WinRate {
            wins: 0,
            ties: 0,
            n: 9,
            rate: 0.5 * (lower + upper),
            lower,
            upper,
        });
        MetricResult {
            name: name.into(),
            reward: String::new(),
            lower_is_better: name.starts_with("distance"),
            base: 2.0,
            tuned: 1.0,
            difference_95,
            song_win_rate: won,
            set_win_rate: 0.5,
            subset_means: (2.0, 1.0),
            effect_size: None,
            base_songs: None,
            tuned_songs: None,
        }
    }

    #[test]
    fn a_change_beyond_chance_is_told_by_songs_and_else_by_sets() {
        let verdict = |name: &str, interval, won| metric(name, interval, won).verdict();
        assert_eq!(verdict("distance", (-2.0, -1.0), None), Some(true));
        assert_eq!(verdict("score", (-2.0, -1.0), None), Some(false));
        assert_eq!(verdict("score", (-2.0, 1.0), None), None);
        // Subsets of 40 songs may hold 0 where 256 songs tell.
        assert_eq!(verdict("score", (-2.0, 1.0), Some((0.3, 0.4))), Some(false));
        assert_eq!(verdict("distance", (-2.0, 1.0), Some((0.6, 0.7))), Some(true));
        assert_eq!(verdict("score", (0.1, 0.2), Some((0.45, 0.6))), None);
    }

    #[test]
    fn what_falls_while_the_target_rises_is_named() {
        let rises = metric("distance", (-2.0, -1.0), None);
        let falls = metric("score", (-1.0, 1.0), Some((0.3, 0.4)));
        let unclear = metric("other", (-1.0, 1.0), None);
        let warnings = disagreements(&[rises.clone(), falls.clone(), unclear.clone()]);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].starts_with("distance became better and score worse (2.000 to 1.000)"));
        assert!(disagreements(&[unclear, falls]).is_empty(), "there is no gain to doubt");
    }
}
