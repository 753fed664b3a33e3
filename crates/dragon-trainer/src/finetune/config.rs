//! What a fine-tuning depends on: [`FinetuneConfig`] and its sections.

use std::path::PathBuf;

use candle_core::{DType, Device};
use dragon_diffusion::{SamplerConfig, Weighting};
use dragon_nn::{AdamWConfig, LoraConfig};
use dragon_rewards::{RewardConfig, Split};
use serde::{Deserialize, Serialize};

use crate::bundle::Length;
use crate::embedder::EmbedConfig;
use crate::error::{Error, Result};
use crate::eval::MetricConfig;
use crate::losses::LossConfig;
use crate::pretrain::{self, LoopConfig};
use crate::schedule::Schedule;

/// Everything a fine-tuning depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneConfig {
    /// Seed of the run: prompts' order, noise of generations, noise levels, condition dropout.
    pub seed: u64,
    /// Model folder: VAE, text encoder, the base diffusion model (which is also the reference), prompts.
    pub bundle: PathBuf,
    /// Length of the songs of a published model.
    #[serde(default, skip_serializing_if = "Length::is_default")]
    pub length: Length,
    /// Prompt file; lines of split `train` are tuned on, lines of split `valid` measured during the run.
    pub prompts: PathBuf,
    /// How demonstrations are made.
    pub rollout: RolloutConfig,
    /// What is rewarded (paper 4).
    pub reward: RewardConfig,
    /// Encoders and settings that the reward names.
    pub embed: EmbedConfig,
    /// What is learned from D+ and D- (paper 3.2, A).
    pub loss: LossConfig,
    /// How the policy is updated.
    pub update: UpdateConfig,
    /// Measuring during the run.
    pub validation: ValidationConfig,
    /// Length and intervals.
    pub run: LoopConfig,
}

/// How demonstrations are made (paper 3.1, appendix E).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// Generations per step (paper 80).
    pub songs_per_step: usize,
    /// Generations of each prompt of a step; left out, two if paired and one if unpaired, as in the paper. Of more than
    /// two the best and the worst are learned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub songs_per_prompt: Option<usize>,
    /// Whether D+ and D- hold pairs of one prompt.
    pub demonstrations: DemonstrationsConfig,
    /// Probability that a generation comes from the reference model instead of the policy, drawn for each generation;
    /// paper value unknown.
    pub reference_probability: f64,
    /// What the networks compute in while generating; learning is in f32.
    #[serde(default)]
    pub dtype: RolloutDtype,
    /// How latents are sampled; paper: 40 steps of a second-order DPM solver with CFG++. 10 steps train as well.
    pub sampler: SamplerConfig,
    /// Songs sampled at a time; bounds memory and changes no number.
    pub batch: usize,
}

impl RolloutConfig {
    /// Generations of each prompt of a step.
    pub fn songs_per_prompt(&self) -> usize {
        self.songs_per_prompt.unwrap_or(match self.demonstrations {
            DemonstrationsConfig::Paired => 2,
            DemonstrationsConfig::Unpaired { .. } => 1,
        })
    }

    /// Prompts of a step.
    pub fn prompts_per_step(&self) -> usize {
        self.songs_per_step / self.songs_per_prompt()
    }
}

/// What a network computes in while generating. Noise levels, latents and sampling are in f32 either way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RolloutDtype {
    /// f32.
    #[default]
    F32,
    /// bf16 on a device that has it, f32 on others: half the memory of the weights, another rounding.
    Bf16,
}

impl RolloutDtype {
    /// The type on a device.
    pub fn on(self, device: &Device) -> DType {
        match self {
            Self::Bf16 if device.supports_bf16() => DType::BF16,
            _ => DType::F32,
        }
    }
}

/// How D+ and D- are formed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DemonstrationsConfig {
    /// Two generations of each prompt: the better one for a reward of songs, Algorithm 1 for a reward of sets; the best and
    /// the worst of more than two.
    Paired,
    /// All generations, split at a threshold; needs a reward of songs and a loss without pairs.
    Unpaired {
        /// The threshold; paper: the batch mean.
        split: Split,
    },
}

/// How the policy is updated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateConfig {
    /// Weight of a squared error by its noise level.
    pub weighting: Weighting,
    /// Words of which one must be in the name of a variable for it to be tuned; empty, all are (as in the paper).
    #[serde(default)]
    pub parameters: Vec<String>,
    /// Adapters that are tuned instead of weights of the network; the reference is the network without them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Noise levels and noises drawn per demonstration and step: they average the loss without new generations; paper 1.
    pub draws: usize,
    /// Noise levels that are learned from: mean of `ln sigma`; left out, as the model was trained (the paper names none).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p_mean: Option<f64>,
    /// Standard deviation of `ln sigma`; left out, as the model was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p_std: Option<f64>,
    /// Probability that a demonstration is learned without its prompt; paper 0.1.
    pub condition_dropout: f64,
    /// Demonstrations in memory at a time, even; changes the result by rounding only.
    pub micro_batch: usize,
    /// Optimiser; paper: Adam, constant learning rate, gradient clipping; values unknown.
    pub optimizer: AdamWConfig,
    /// Steps over which the learning rate rises evenly from 0: Adam's first updates have full size whatever the gradient
    /// is worth.
    pub warmup_steps: usize,
    /// The learning rate after that; paper: constant.
    #[serde(default)]
    pub schedule: Schedule,
    /// Decay of the averaged weights that are exported; 0 exports the last weights (ours; the paper names none).
    pub ema_decay: f64,
}

/// Measuring during the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Prompts of split `valid` to generate for; their noise is that of `generate` and `eval`.
    pub n_prompts: usize,
    /// How latents are sampled.
    pub sampler: SamplerConfig,
    /// What is watched besides the reward: rewards that are not optimised. `dragon finetune` takes those of the evaluation
    /// where none are given; an empty list watches nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub monitors: Option<Vec<MetricConfig>>,
}

impl FinetuneConfig {
    /// Checks everything that can be checked before weights are read.
    ///
    /// # Errors
    /// For the first key that cannot work.
    pub fn check(&self) -> Result<()> {
        self.run.check()?;
        let rollout = &self.rollout;
        let counts = [
            ("rollout.songs_per_step", rollout.songs_per_step, 2),
            ("rollout.batch", rollout.batch, 1),
            ("rollout.sampler.n_steps", rollout.sampler.n_steps, 1),
            ("update.draws", self.update.draws, 1),
            ("update.micro_batch", self.update.micro_batch, 2),
        ];
        for (key, value, least) in counts {
            if value < least {
                return Err(Error::config(key, format!("at least {least}"), value));
            }
        }
        if !self.update.micro_batch.is_multiple_of(2) {
            return Err(Error::config("update.micro_batch", "an even number", self.update.micro_batch));
        }
        let least = match rollout.demonstrations {
            DemonstrationsConfig::Paired => 2,
            DemonstrationsConfig::Unpaired { .. } => 1,
        };
        let each = rollout.songs_per_prompt();
        if each < least {
            return Err(Error::config("rollout.songs_per_prompt", format!("at least {least}"), each));
        }
        if !rollout.songs_per_step.is_multiple_of(each) {
            let expected = format!("a multiple of the {each} songs of each prompt");
            return Err(Error::config("rollout.songs_per_step", expected, rollout.songs_per_step));
        }
        let shares = [
            ("rollout.reference_probability", rollout.reference_probability),
            ("update.condition_dropout", self.update.condition_dropout),
            ("update.ema_decay", self.update.ema_decay),
        ];
        for (key, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::config(key, "a number in [0, 1]", value));
            }
        }
        if let Some(mean) = self.update.p_mean.filter(|mean| !mean.is_finite()) {
            return Err(Error::config("update.p_mean", "a number", mean));
        }
        if let Some(std) = self.update.p_std.filter(|std| !(std.is_finite() && *std > 0.0)) {
            return Err(Error::config("update.p_std", "a number above 0", std));
        }
        if let Some(lora) = &self.update.lora {
            lora.check().map_err(Error::input("config section `update.lora`"))?;
            if !self.update.parameters.is_empty() {
                let expected = "no words where there is `update.lora`: its `targets` say what is tuned";
                return Err(Error::config(
                    "update.parameters",
                    expected,
                    format!("{:?}", self.update.parameters),
                ));
            }
        }
        if self.update.ema_decay == 1.0 {
            return Err(Error::config("update.ema_decay", "a number below 1", 1.0));
        }
        pretrain::check_optimizer("update.optimizer", &self.update.optimizer)?;
        self.check_loss()?;
        if self.run.validate_every > 0 {
            let validation = &self.validation;
            for (key, value) in [
                ("validation.n_prompts", validation.n_prompts),
                ("validation.sampler.n_steps", validation.sampler.n_steps),
            ] {
                if value == 0 {
                    return Err(Error::config(key, "at least 1, or `run.validate_every` 0", value));
                }
            }
        }
        rollout.sampler.guidance.check().map_err(Error::input("rollout.sampler.guidance"))?;
        self.validation.sampler.guidance.check().map_err(Error::input("validation.sampler.guidance"))?;
        if matches!(rollout.demonstrations, DemonstrationsConfig::Unpaired { .. }) && self.loss.needs_pairs()
        {
            return Err(Error::config(
                "rollout.demonstrations.kind",
                "paired, which this loss needs",
                "unpaired",
            ));
        }
        self.embed.check([&self.reward])?;
        self.embed.check(self.watched())
    }

    /// What validations watch.
    pub(super) fn monitors(&self) -> &[MetricConfig] {
        match &self.validation.monitors {
            Some(monitors) if self.run.validate_every > 0 => monitors,
            _ => &[],
        }
    }

    /// Rewards that validations watch.
    pub(super) fn watched(&self) -> impl Iterator<Item = &RewardConfig> {
        self.monitors().iter().map(|metric| &metric.reward)
    }

    fn check_loss(&self) -> Result<()> {
        let (key, scale) = match self.loss {
            LossConfig::Mapo { b } => ("loss.b", b),
            _ => ("loss.beta", self.loss.beta()),
        };
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::config(key, "a number above 0", scale));
        }
        if let LossConfig::Kto { weight_plus, weight_minus, .. } = self.loss {
            for (key, value) in [("loss.weight_plus", weight_plus), ("loss.weight_minus", weight_minus)] {
                if !(value.is_finite() && value >= 0.0) {
                    return Err(Error::config(key, "a number of at least 0", value));
                }
            }
        }
        Ok(())
    }
}
