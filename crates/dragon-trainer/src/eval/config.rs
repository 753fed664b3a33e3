//! What an evaluation depends on: [`EvalConfig`], [`FoldersConfig`] and their sections.

use std::path::PathBuf;

use dragon_diffusion::SamplerConfig;
use dragon_rewards::RewardConfig;
use serde::{Deserialize, Serialize};

use crate::bundle::{self, Length, Split};
use crate::embedder::EmbedConfig;
use crate::error::{Error, Result};

/// Everything an evaluation depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// Seed of the prompts' noise and of the subsets.
    pub seed: u64,
    /// Model folder with the base model.
    pub bundle: PathBuf,
    /// Length of the songs of a published model.
    #[serde(default, skip_serializing_if = "Length::is_default")]
    pub length: Length,
    /// Folder of the tuned diffusion model, or of the run that made it.
    pub tuned: PathBuf,
    /// Prompt file.
    pub prompts: PathBuf,
    /// Which of its prompts; `test` was not tuned on.
    pub split: Split,
    /// How many of them, spread evenly over the split.
    pub n_prompts: usize,
    /// How latents are sampled; paper: 40 steps.
    pub sampler: SamplerConfig,
    /// Songs sampled at a time; bounds memory and changes no number.
    pub batch: usize,
    /// Encoders and settings that the metrics name.
    pub embed: EmbedConfig,
    /// What is measured; the first is the target.
    pub metrics: Vec<MetricConfig>,
    /// Subsets for the win rates of sets.
    pub bootstrap: BootstrapConfig,
    /// Prompts whose audio goes to `samples/` and into the report.
    pub examples: usize,
}

/// A named metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricConfig {
    /// Its name in tables.
    pub name: String,
    /// The reward that computes it; not a `random_mix`.
    pub reward: RewardConfig,
}

/// Random subsets of songs, drawn with replacement, the same for both systems.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootstrapConfig {
    /// How many; paper 1000.
    pub subsets: usize,
    /// Songs in each; paper 40.
    pub songs: usize,
}

/// Two folders of audio to compare.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FoldersConfig {
    /// Seed of the subsets.
    pub seed: u64,
    /// The first folder, in the role of the base.
    pub base: PathBuf,
    /// The second folder. Songs of the same path inside both folders answer the same prompt.
    pub tuned: PathBuf,
    /// Model folder, needed for metrics on its VAE's latents only.
    pub bundle: Option<PathBuf>,
    /// Prompt file whose ids are the files' names without ending, needed for the CLAP score only.
    pub prompts: Option<PathBuf>,
    /// Encoders and settings that the metrics name.
    pub embed: EmbedConfig,
    /// What is measured; the first is the target.
    pub metrics: Vec<MetricConfig>,
    /// Subsets for the win rates of sets.
    pub bootstrap: BootstrapConfig,
    /// Songs that go into the report.
    pub examples: usize,
}

impl EvalConfig {
    /// Checks everything that can be checked before weights are read.
    ///
    /// # Errors
    /// For the first key that cannot work.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("n_prompts", self.n_prompts, 2),
            ("batch", self.batch, 1),
            ("sampler.n_steps", self.sampler.n_steps, 1),
        ];
        for (key, value, least) in counts {
            if value < least {
                return Err(Error::config(key, format!("at least {least}"), value));
            }
        }
        self.sampler.guidance.check().map_err(Error::input("sampler.guidance"))?;
        check_metrics(&self.metrics, &self.embed, self.bootstrap)
    }

    /// Checks that the prompt file has enough prompts of the split.
    ///
    /// # Errors
    /// If not, or if it cannot be read.
    pub fn check_prompts(&self) -> Result<()> {
        bundle::some_prompts_of(&self.prompts, self.split, self.n_prompts).map(drop)
    }
}

/// Splits metrics into those of a run's reward, its target, and the others. A reward that is no metric yet is named by
/// its label; each reward of a `random_mix` is a target.
pub fn target_first(
    reward: &RewardConfig,
    mut metrics: Vec<MetricConfig>,
) -> (Vec<MetricConfig>, Vec<MetricConfig>) {
    let mut target = |reward: &RewardConfig| match metrics.iter().position(|metric| metric.reward == *reward)
    {
        Some(i) => metrics.remove(i),
        None => MetricConfig { name: reward.label(), reward: reward.clone() },
    };
    (reward.parts().iter().map(&mut target).collect(), metrics)
}

/// What [`EvalConfig`] and [`FoldersConfig`] have in common.
pub(super) fn check_metrics(
    metrics: &[MetricConfig],
    embed: &EmbedConfig,
    bootstrap: BootstrapConfig,
) -> Result<()> {
    if metrics.is_empty() {
        return Err(Error::config("metrics", "at least one metric", "none"));
    }
    for (key, value) in [("bootstrap.subsets", bootstrap.subsets), ("bootstrap.songs", bootstrap.songs)] {
        if value < 2 {
            return Err(Error::config(key, "at least 2", value));
        }
    }
    for metric in metrics {
        if matches!(metric.reward, RewardConfig::RandomMix { .. }) {
            return Err(Error::config("metrics.reward.kind", "one reward a metric", "random_mix"));
        }
    }
    embed.check(metrics.iter().map(|metric| &metric.reward))
}
