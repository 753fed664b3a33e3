//! What a pre-training of the diffusion transformer depends on: [`Config`] and its sections.

use std::path::PathBuf;

use dragon_diffusion::Weighting;
use dragon_encoders::t5;
use serde::{Deserialize, Serialize};

use super::super::LoopConfig;
use crate::error::{Error, Result};
use crate::schedule::Schedule;

/// Config of `dragon pretrain dit`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Seed of weights, data order and noise.
    pub seed: u64,
    /// What is trained on.
    pub data: DataConfig,
    /// Network and diffusion; `text_dim` is the text encoder's `d_model`.
    pub model: dragon_diffusion::Config,
    /// Text encoder; its `vocab_size` is an upper bound, the tokenizer trained on the captions may need less.
    pub text: t5::Config,
    /// How it is trained.
    pub train: TrainConfig,
    /// Length and intervals.
    pub run: LoopConfig,
}

/// Clips, captions, and the VAE that makes latents of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Manifest of the clips (JSONL or CSV).
    pub manifest: PathBuf,
    /// Model folder of the VAE, with latent statistics.
    pub vae: PathBuf,
    /// Folder for encoded clips.
    pub cache: PathBuf,
    /// Latent frames of a clip; longer clips are cut at their end, shorter ones refused.
    pub n_frames: usize,
    /// Tokens of a caption, special ones included; longer captions are cut.
    pub max_tokens: usize,
    /// Held-out clips used in a validation, at most.
    pub valid_clips: usize,
}

/// Optimisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Clips of a step. Paper: 256.
    pub batch: usize,
    /// Learning rate after the warm-up. The paper's value is unknown.
    pub lr: f64,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: usize,
    /// What it does then.
    pub schedule: Schedule,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of AdamW's second moment; below PyTorch's 0.999, since a short training meets each scale of gradients for some hundred steps only.
    pub beta2: f64,
    /// Gradients are scaled down to this norm.
    pub max_grad_norm: f64,
    /// Share of captions replaced by the null token. Paper: 0.1.
    pub caption_dropout: f64,
    /// Decay of the weights' average; in the first steps it is `(1 + step) / (10 + step)`, if that is less.
    pub ema_decay: f64,
    /// Weights of the noise levels in the loss.
    pub weighting: Weighting,
}

impl Config {
    /// The tiny model on the clips of `manifest`; the preset `pretrain/dit` has the shipped one's settings.
    pub fn tiny_music(manifest: PathBuf, vae: PathBuf, cache: PathBuf) -> Self {
        Self {
            seed: 0,
            data: DataConfig { manifest, vae, cache, n_frames: 80, max_tokens: 32, valid_clips: 96 },
            model: dragon_diffusion::Config::tiny_music(),
            text: t5::Config::tiny_music(),
            train: TrainConfig {
                batch: 64,
                lr: 1e-3,
                warmup_steps: 100,
                schedule: Schedule::Constant,
                weight_decay: 0.01,
                beta2: 0.99,
                max_grad_norm: 1.0,
                caption_dropout: 0.1,
                ema_decay: 0.999,
                weighting: Weighting::Edm,
            },
            run: LoopConfig {
                steps: 10_000,
                log_every: 20,
                validate_every: 200,
                checkpoint_every: 100,
                keep_checkpoints: 2,
            },
        }
    }

    /// Checks everything that can be checked without reading a file.
    ///
    /// # Errors
    /// If a value cannot work; the key is named.
    pub fn check(&self) -> Result<()> {
        self.run.check()?;
        self.model.dit.check().map_err(Error::input("config section `model.dit`"))?;
        self.model.edm.check().map_err(Error::input("config section `model.edm`"))?;
        let counts = [
            ("data.n_frames", self.data.n_frames),
            ("data.valid_clips", self.data.valid_clips),
            ("train.batch", self.train.batch),
        ];
        for (key, value) in counts {
            if value == 0 {
                return Err(Error::config(key, "at least 1", value));
            }
        }
        if self.data.max_tokens < 3 {
            return Err(Error::config("data.max_tokens", "at least 3", self.data.max_tokens));
        }
        if self.model.dit.text_dim != self.text.d_model {
            return Err(Error::config(
                "model.dit.text_dim",
                format!("`text.d_model`, {}", self.text.d_model),
                self.model.dit.text_dim,
            ));
        }
        let train = &self.train;
        let positive = [("train.lr", train.lr), ("train.max_grad_norm", train.max_grad_norm)];
        for (key, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::config(key, "a number above 0", value));
            }
        }
        let shares = [
            ("train.caption_dropout", train.caption_dropout),
            ("train.beta2", train.beta2),
            ("train.ema_decay", train.ema_decay),
        ];
        for (key, value) in shares {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::config(key, "a number from 0 up to, not including, 1", value));
            }
        }
        if !(train.weight_decay.is_finite() && train.weight_decay >= 0.0) {
            return Err(Error::config("train.weight_decay", "a number of at least 0", train.weight_decay));
        }
        Ok(())
    }
}
