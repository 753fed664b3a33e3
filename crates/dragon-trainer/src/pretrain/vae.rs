//! Pre-training of the audio VAE on the clips of manifests ([`dragon_vae::training`] is the step itself).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dragon_data::{Split, read_manifest};
use dragon_nn::Rng;
use dragon_vae::training::{Clips, Training, TrainingConfig};
use serde::{Deserialize, Serialize};

use super::Task;
use crate::embed::read_song;
use crate::error::{Error, Result};

/// Settings of the pre-training of the VAE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeConfig {
    /// Manifests of the clips; the model trains on their training split.
    pub manifests: Vec<PathBuf>,
    /// Crops per step.
    pub batch: usize,
    /// Latent frames of a crop.
    pub crop_frames: usize,
    /// Clips of the validation split that are reconstructed at each validation, spread evenly over it.
    pub n_valid_clips: usize,
    /// Clips of the training split over which the latents' mean and deviation are measured at each export.
    pub n_stats_clips: usize,
    /// Model folder to start from; none: new weights.
    pub init: Option<PathBuf>,
    /// The model.
    pub model: dragon_vae::Config,
    /// Losses, learning rates, the adversarial stage.
    pub training: TrainingConfig,
}

impl VaeConfig {
    /// Settings of a small training, for tests; the shipped model's are in the preset and in its folder's
    /// `config.json`.
    pub fn tiny_music(manifests: Vec<PathBuf>) -> Self {
        Self {
            manifests,
            batch: 6,
            crop_frames: 16,
            n_valid_clips: 32,
            n_stats_clips: 300,
            init: None,
            model: dragon_vae::Config::tiny_music(),
            training: TrainingConfig::tiny_music(),
        }
    }

    /// Checks what can be checked before a file is read.
    ///
    /// # Errors
    /// The first key that cannot work.
    pub fn check(&self) -> Result<()> {
        for (key, value) in [
            ("vae.batch", self.batch),
            ("vae.crop_frames", self.crop_frames),
            ("vae.n_valid_clips", self.n_valid_clips),
            ("vae.n_stats_clips", self.n_stats_clips),
            ("vae.manifests", self.manifests.len()),
        ] {
            if value == 0 {
                return Err(Error::config(key, "at least 1", value));
            }
        }
        self.model.validate().map_err(|message| Error::config("vae.model", "a valid model", message))?;
        if self.model.audio_channels != 1 {
            return Err(Error::config(
                "vae.model.audio_channels",
                "1, the clips are mono",
                self.model.audio_channels,
            ));
        }
        // The longest window of the losses must fit: it is reflected by half its length.
        let samples = self.crop_frames * self.model.hop();
        if samples <= 1024 {
            return Err(Error::config(
                "vae.crop_frames",
                format!("crops of more than 1024 samples, {} per frame", self.model.hop()),
                self.crop_frames,
            ));
        }
        Ok(())
    }
}

/// The task of [`super::run`].
pub struct VaeTask {
    cfg: VaeConfig,
    training: Training,
    train: Clips,
    valid: Vec<Tensor>,
    stats: Vec<Tensor>,
    device: Device,
}

impl VaeTask {
    /// Reads the clips into memory (16-bit) and builds the model with weights drawn from `seed`.
    ///
    /// # Errors
    /// If a setting cannot work, a manifest or clip cannot be read, has another sample rate than the model, or a split is empty.
    pub fn new(cfg: &VaeConfig, seed: u64, device: &Device) -> Result<Self> {
        cfg.check()?;
        let rate = cfg.model.sample_rate_hz;
        let (mut train, mut valid) = (Clips::default(), Clips::default());
        for manifest in &cfg.manifests {
            let context = || format!("the VAE's training data, `{}`", manifest.display());
            let entries = read_manifest(manifest).map_err(Error::input(context()))?;
            let folder = manifest.parent().unwrap_or(Path::new("."));
            for entry in entries {
                let clips = match entry.split {
                    Split::Train => &mut train,
                    Split::Valid => &mut valid,
                    Split::Test => continue,
                };
                super::check_rate(&entry, manifest, rate, "vae.model.sample_rate_hz")?;
                let clip = read_song(&folder.join(&entry.path), rate, cfg.model.hop())
                    .map_err(Error::input(context()))?;
                clips.push(&clip.samples);
            }
        }
        for (name, clips) in [("training", &train), ("validation", &valid)] {
            if clips.is_empty() {
                return Err(Error::Data {
                    problem: format!("no clip of the {name} split in the manifests"),
                    hint: "add clips: 5 % of the pieces go to validation, so a few dozen pieces are needed"
                        .to_owned(),
                });
            }
        }
        let mut training = Training::new(&cfg.model, &cfg.training, seed, device)?;
        if let Some(dir) = &cfg.init {
            training.load_weights(dir).map_err(Error::input(format!(
                "the VAE to start from, `{}`\nhint: `vae.model` must be as in that folder's config.json",
                dir.display()
            )))?;
        }
        let spread = |clips: &Clips, n: usize| -> Result<Vec<Tensor>> {
            let every = clips.len().div_ceil(n);
            let hop = cfg.model.hop();
            Ok((0..clips.len())
                .step_by(every)
                .map(|i| clips.whole(i, hop, device))
                .collect::<std::result::Result<_, candle_core::Error>>()?)
        };
        Ok(Self {
            valid: spread(&valid, cfg.n_valid_clips)?,
            stats: spread(&train, cfg.n_stats_clips)?,
            cfg: cfg.clone(),
            training,
            train,
            device: device.clone(),
        })
    }
}

impl Task for VaeTask {
    fn step(&mut self, step: usize, rng: &mut Rng) -> Result<Vec<(&'static str, f64)>> {
        let (batch, frames, model) = (self.cfg.batch, self.cfg.crop_frames, &self.cfg.model);
        let audio = self.train.crops(batch, frames * model.hop(), rng, &self.device)?;
        let noise = rng.normal_tensor((batch, model.latent_dim, frames), DType::F32, &self.device)?;
        Ok(self.training.step(step, &audio, &noise)?)
    }

    fn validate(&mut self) -> Result<Vec<(String, f64)>> {
        Ok(super::named(self.training.validate(&self.valid)?))
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(self.training.state()?)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        Ok(self.training.load_state(state)?)
    }

    fn export(&self, dir: &Path) -> Result<()> {
        Ok(self.training.export(dir, &self.stats)?)
    }

    fn headline(&self) -> &'static [&'static str] {
        &["loss", "mel", "waveform", "kl"]
    }

    fn throughput(&self) -> (f64, &'static str) {
        let seconds = self.cfg.crop_frames as f64 / self.cfg.model.frame_rate_hz();
        (self.cfg.batch as f64 * seconds, "s of audio")
    }
}
