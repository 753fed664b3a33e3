//! What a pre-training of CLAP depends on: [`ClapConfig`].

use std::path::PathBuf;

use dragon_encoders::clap;
use dragon_nn::AdamWConfig;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pretrain::check_optimizer;

/// Settings of the pre-training of CLAP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClapConfig {
    /// Manifests of the clips; the model trains on their training split.
    pub manifests: Vec<PathBuf>,
    /// `tokenizer.json` to use; none: one is trained on the captions of the training split.
    pub tokenizer: Option<PathBuf>,
    /// Clips per step: each caption is told apart from `batch - 1` others.
    pub batch: usize,
    /// Clips of the validation split that captions are retrieved among, spread evenly over it.
    pub n_valid_clips: usize,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup_steps: usize,
    /// Step at which the learning rate has fallen to a twentieth, by a half cosine; constant from there.
    pub decay_steps: usize,
    /// Decay of the moving average of the weights, which is what validation and export use.
    pub ema_decay: f64,
    /// Random roll in time, one masked stretch of frames and one of mel bands per clip.
    pub augment: bool,
    /// The optimiser; `lr` is the highest learning rate.
    pub optimizer: AdamWConfig,
    /// The model; `text.vocab_size` bounds the tokenizer.
    pub model: clap::Config,
}

/// Fraction of the highest learning rate that is left at the end.
const LAST_LR: f64 = 0.05;

impl ClapConfig {
    /// Settings of a small training, for tests; the shipped model's are in the preset and in its folder's
    /// `config.json`.
    pub fn tiny_music(manifests: Vec<PathBuf>) -> Self {
        Self {
            manifests,
            tokenizer: None,
            batch: 64,
            n_valid_clips: 288,
            warmup_steps: 100,
            decay_steps: 4000,
            ema_decay: 0.995,
            augment: true,
            optimizer: AdamWConfig {
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.98,
                eps: 1e-6,
                weight_decay: 0.05,
                max_grad_norm: Some(1.0),
            },
            model: clap::Config::tiny_music(),
        }
    }

    /// Checks what can be checked before a file is read.
    ///
    /// # Errors
    /// The first key that cannot work.
    pub fn check(&self) -> Result<()> {
        for (key, value, least) in [
            ("clap.manifests", self.manifests.len(), 1),
            ("clap.batch", self.batch, 2),
            ("clap.n_valid_clips", self.n_valid_clips, 2),
            ("clap.decay_steps", self.decay_steps, self.warmup_steps + 1),
        ] {
            if value < least {
                return Err(Error::config(key, format!("at least {least}"), value));
            }
        }
        if !(0.0..1.0).contains(&self.ema_decay) {
            return Err(Error::config("clap.ema_decay", "0 or more, below 1", self.ema_decay));
        }
        check_optimizer("clap.optimizer", &self.optimizer)
    }

    /// Learning rate of a step: linear rise, half a cosine down, constant.
    pub(super) fn lr(&self, step: usize) -> f64 {
        let rise = (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        let fall =
            step.saturating_sub(self.warmup_steps) as f64 / (self.decay_steps - self.warmup_steps) as f64;
        let cosine = 0.5 + 0.5 * (std::f64::consts::PI * fall.min(1.0)).cos();
        self.optimizer.lr * rise.min(1.0) * (LAST_LR + (1.0 - LAST_LR) * cosine)
    }
}
