//! Pre-training of the diffusion transformer together with its text encoder, on latents of a trained VAE (paper Appendix E).
//!
//! The clips of a manifest are encoded once ([`latents`]) and kept in a cache that is keyed by the VAE's files, so trainings that differ in the DiT only
//! share it. The text encoder is small and starts from noise here, so it learns with the DiT; its states reach the DiT through one loss.
//!
//! The loss is the EDM loss with 10 % of the captions dropped. Noise levels are drawn one from each of `batch` equally likely ranges, which
//! evens out the batches' losses. Validation uses the averaged weights on held-out pieces with fixed noises and levels, three times: with the
//! right caption, with another clip's, with none. A model that listens to its captions has the first loss well below the second.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dragon_data::manifest::{self, Entry};
use dragon_diffusion::{Model, TextCond, Weighting, denoising_errors};
use dragon_encoders::t5::{self, T5Encoder};
use dragon_encoders::tokenizer::{Tokenizer, TooLong};
use dragon_nn::{AdamW, AdamWConfig, Params, Rng, write_safetensors};
use dragon_vae::AudioVae;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{LoopConfig, Outcome, Task};
use crate::bundle::{Info, frozen};
use crate::error::{Error, Result};
use crate::run::{RunContext, hex, write_atomic};

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

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls along half a cosine to a tenth at `run.steps`.
    Cosine,
}

impl Config {
    /// The tiny model on the clips of `manifest`; the shipped one was trained in several parts, see `fixtures/tiny/README.md`.
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

/// [`prepare`], then the training in the run folder of `ctx`.
///
/// # Errors
/// As [`prepare`] and [`super::run`].
pub fn run(cfg: &Config, device: &Device, ctx: &RunContext) -> Result<Outcome> {
    let mut task = prepare(cfg, device, ctx)?;
    super::run(&mut task, "pretrain dit", cfg, &cfg.run, cfg.seed, ctx)
}

/// Latents with captions.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSet {
    /// `[N, C, T]`, row by row; unit variance per channel.
    pub latents: Vec<f32>,
    /// Channels `C`.
    pub channels: usize,
    /// Frames `T`.
    pub n_frames: usize,
    /// `N` captions.
    pub captions: Vec<String>,
}

impl LatentSet {
    /// Number of clips.
    pub fn len(&self) -> usize {
        self.captions.len()
    }

    /// Whether there is no clip.
    pub fn is_empty(&self) -> bool {
        self.captions.is_empty()
    }

    /// The clips at `rows`, `[B, C, T]`.
    fn batch(&self, rows: &[usize], device: &Device) -> Result<Tensor> {
        let size = self.channels * self.n_frames;
        let values: Vec<f32> =
            rows.iter().flat_map(|&i| self.latents[i * size..(i + 1) * size].to_vec()).collect();
        Ok(Tensor::from_vec(values, (rows.len(), self.channels, self.n_frames), device)?)
    }
}

/// Reads the manifest, encodes its clips or takes them from the cache, and sets up a training.
///
/// # Errors
/// If the config cannot work, a file is missing or broken, a clip is too short, or there is no clip for training or validation;
/// also if `ctx` is asked to stop while clips are encoded (what is encoded stays in the cache).
pub fn prepare(cfg: &Config, device: &Device, ctx: &RunContext) -> Result<DitTask> {
    cfg.check()?;
    let entries =
        manifest::read_manifest(&cfg.data.manifest).map_err(Error::input("cannot read the manifest"))?;
    let of = |split: manifest::Split| entries.iter().filter(|e| e.split == split).collect::<Vec<_>>();
    let (train, mut valid) = (of(manifest::Split::Train), of(manifest::Split::Valid));
    for (name, part) in [("train", &train), ("valid", &valid)] {
        if part.len() < 2 {
            return Err(Error::Data {
                problem: format!(
                    "`{}` has {} clips of split `{name}`, at least 2 are needed",
                    cfg.data.manifest.display(),
                    part.len()
                ),
                hint: "the split is a hash of the piece's name; add pieces".into(),
            });
        }
    }
    // Neighbours in a manifest are clips of one piece: take clips from all over.
    if valid.len() > cfg.data.valid_clips {
        let stride = valid.len() as f64 / cfg.data.valid_clips as f64;
        valid = (0..cfg.data.valid_clips).map(|i| valid[(i as f64 * stride) as usize]).collect();
    }
    let sets = [train, valid].map(|part| latents(&cfg.data, &part, device, ctx));
    let [train, valid] = sets;
    DitTask::new(cfg, train?, valid?, device)
}

/// Clips encoded and stored at a time.
const SHARD_CLIPS: usize = 128;
/// Clips encoded in one call.
const ENCODE_CLIPS: usize = 8;

/// The normalised latents (means) of clips, from the cache where they are there.
///
/// A shard of the cache is named by a hash of the VAE's two files, the number of frames, and its clips' names.
///
/// # Errors
/// As [`prepare`].
pub fn latents(cfg: &DataConfig, entries: &[&Entry], device: &Device, ctx: &RunContext) -> Result<LatentSet> {
    let vae = AudioVae::load(&cfg.vae, DType::F32, device).map_err(Error::input("cannot load the VAE"))?;
    let vae_config = vae.config().clone();
    if vae_config.latent_mean.is_empty() {
        return Err(Error::Content {
            path: cfg.vae.join("config.json"),
            problem: "has no latent statistics".into(),
            hint: "`dragon pretrain vae` measures them at its end".into(),
        });
    }
    let mut vae_hash = Sha256::new();
    for file in ["config.json", "model.safetensors"] {
        let path = cfg.vae.join(file);
        vae_hash.update(std::fs::read(&path).map_err(Error::io("read", &path))?);
    }
    let vae_hash = hex(&vae_hash.finalize());
    std::fs::create_dir_all(&cfg.cache).map_err(Error::io("create", &cfg.cache))?;
    let folder = cfg.manifest.parent().unwrap_or(Path::new("."));
    let mut all = Vec::new();
    let n_shards = entries.len().div_ceil(SHARD_CLIPS);
    let mut n_encoded = 0;
    for (shard, clips) in entries.chunks(SHARD_CLIPS).enumerate() {
        if ctx.stopped() {
            return Err(Error::Data {
                problem: format!("stopped after encoding {shard} of {n_shards} parts of the clips"),
                hint: "what is encoded is kept; start again to go on".into(),
            });
        }
        let mut key = Sha256::new();
        key.update(format!("{vae_hash} {}", cfg.n_frames));
        for clip in clips {
            key.update(format!("\n{} {} {}", clip.id, clip.path, clip.start_s));
        }
        let path = cfg.cache.join(format!("latents-{}.safetensors", &hex(&key.finalize())[..24]));
        if !path.exists() {
            let tensor = encode_clips(&vae, folder, cfg.n_frames, clips, device)?;
            write_safetensors(&path, &BTreeMap::from([("latents".to_owned(), tensor)]), &BTreeMap::new())
                .map_err(Error::input(format!("cannot write `{}`", path.display())))?;
            n_encoded += clips.len();
            tracing::info!("encoded part {} of {n_shards} of the clips", shard + 1);
        }
        let tensor = candle_core::safetensors::load(&path, &Device::Cpu)
            .ok()
            .and_then(|mut file| file.remove("latents"))
            .filter(|t| t.dims() == [clips.len(), vae_config.latent_dim, cfg.n_frames])
            .ok_or_else(|| Error::Content {
                path: path.clone(),
                problem: "is not a part of the latent cache".into(),
                hint: "remove the file; it will be made again".into(),
            })?;
        all.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    tracing::info!("{} clips, {n_encoded} of them encoded now", entries.len());
    Ok(LatentSet {
        latents: all,
        channels: vae_config.latent_dim,
        n_frames: cfg.n_frames,
        captions: entries.iter().map(|e| e.caption.clone()).collect(),
    })
}

fn encode_clips(
    vae: &AudioVae,
    folder: &Path,
    n_frames: usize,
    clips: &[&Entry],
    device: &Device,
) -> Result<Tensor> {
    let config = vae.config();
    let n_samples = n_frames * config.hop();
    let mut parts = Vec::new();
    for group in clips.chunks(ENCODE_CLIPS) {
        let mut samples = Vec::with_capacity(group.len() * n_samples);
        for clip in group {
            let path = folder.join(&clip.path);
            let audio = dragon_audio::read_mono(&path, config.sample_rate_hz)
                .map_err(Error::input(format!("cannot use clip `{}`", clip.id)))?;
            if audio.samples.len() < n_samples {
                return Err(Error::Data {
                    problem: format!(
                        "clip `{}` has {} samples at {} Hz, {n_samples} are needed for {n_frames} latent frames",
                        clip.id,
                        audio.samples.len(),
                        config.sample_rate_hz
                    ),
                    hint: "lower `data.n_frames`, or take the clip out of the manifest".into(),
                });
            }
            for _ in 0..config.audio_channels {
                samples.extend_from_slice(&audio.samples[..n_samples]);
            }
        }
        let audio = Tensor::from_vec(samples, (group.len(), config.audio_channels, n_samples), device)?;
        parts.push(vae.encode_normalized(&audio)?.detach().to_device(&Device::Cpu)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// Noise levels of the validation with the names of their losses, for latents of unit variance. The last entry of a row is the loss with shuffled captions.
const VALID_LEVELS: [(f64, &str, &str); 6] = [
    (0.1, "loss_sigma_0.1", "loss_other_text_sigma_0.1"),
    (0.3, "loss_sigma_0.3", "loss_other_text_sigma_0.3"),
    (0.7, "loss_sigma_0.7", "loss_other_text_sigma_0.7"),
    (1.5, "loss_sigma_1.5", "loss_other_text_sigma_1.5"),
    (4.0, "loss_sigma_4", "loss_other_text_sigma_4"),
    (15.0, "loss_sigma_15", "loss_other_text_sigma_15"),
];

/// Captions as token ids.
struct Captions {
    ids: Vec<u32>,
    mask: Vec<f32>,
    max_tokens: usize,
}

impl Captions {
    fn new(tokenizer: &Tokenizer, captions: &[String], max_tokens: usize) -> Result<Self> {
        let tokens = tokenizer
            .encode_batch(captions, max_tokens, TooLong::Truncate, &Device::Cpu)
            .map_err(Error::input("cannot read a caption"))?;
        if !tokens.truncated.is_empty() {
            tracing::warn!(
                "{} of {} captions cut at {max_tokens} tokens",
                tokens.truncated.len(),
                captions.len()
            );
        }
        Ok(Self {
            ids: tokens.ids.flatten_all()?.to_vec1()?,
            mask: tokens.mask.flatten_all()?.to_vec1()?,
            max_tokens,
        })
    }

    /// Ids and mask of some captions, as long as the longest of them.
    fn batch(&self, rows: &[usize], device: &Device) -> Result<(Tensor, Tensor)> {
        let row = |i: usize| i * self.max_tokens..(i + 1) * self.max_tokens;
        let tokens_of = |&i: &usize| self.mask[row(i)].iter().filter(|&&m| m > 0.5).count();
        let length = rows.iter().map(tokens_of).max().unwrap_or(0).max(1);
        let ids: Vec<u32> = rows.iter().flat_map(|&i| self.ids[row(i)][..length].to_vec()).collect();
        let mask: Vec<f32> = rows.iter().flat_map(|&i| self.mask[row(i)][..length].to_vec()).collect();
        let shape = (rows.len(), length);
        Ok((Tensor::from_vec(ids, shape, device)?, Tensor::from_vec(mask, shape, device)?))
    }
}

/// DiT and text encoder over one set of parameters (`dit.…`, `t5.…`).
struct Networks {
    model: Model,
    t5: T5Encoder,
}

impl Networks {
    fn new(cfg: &Config, vb: candle_nn::VarBuilder) -> Result<Self> {
        Ok(Self { model: Model::new(&cfg.model, vb.pp("dit"))?, t5: T5Encoder::new(&cfg.text, vb.pp("t5"))? })
    }

    fn texts(&self, (ids, mask): (Tensor, Tensor)) -> Result<TextCond> {
        Ok(TextCond { states: self.t5.forward(&ids, &mask)?, mask })
    }
}

/// A training in progress.
pub struct DitTask {
    /// With the tokenizer's vocabulary size.
    cfg: Config,
    device: Device,
    tokenizer: Tokenizer,
    train: LatentSet,
    train_captions: Captions,
    valid: LatentSet,
    valid_captions: Captions,
    params: Params,
    networks: Networks,
    optimizer: AdamW,
    average: Params,
    averaged: Networks,
    /// Epoch and its order of the training clips.
    order: (usize, Vec<usize>),
}

impl DitTask {
    /// A training on latents in memory; [`prepare`] makes them from a manifest.
    ///
    /// # Errors
    /// If the config cannot work, does not fit the latents, or a caption is empty.
    pub fn new(cfg: &Config, train: LatentSet, valid: LatentSet, device: &Device) -> Result<Self> {
        cfg.check()?;
        for set in [&train, &valid] {
            if set.channels != cfg.model.dit.latent_channels {
                return Err(Error::config(
                    "model.dit.latent_channels",
                    set.channels,
                    cfg.model.dit.latent_channels,
                ));
            }
        }
        let tokenizer = Tokenizer::train(&train.captions, cfg.text.vocab_size)
            .map_err(Error::input("cannot train a tokenizer on the captions"))?;
        let mut cfg = cfg.clone();
        cfg.text.vocab_size = tokenizer.vocab_size();
        let params = Params::new(cfg.seed);
        let networks = Networks::new(&cfg, params.builder(DType::F32, device))?;
        let optimizer = AdamW::new(
            &params,
            AdamWConfig {
                lr: cfg.train.lr,
                beta2: cfg.train.beta2,
                weight_decay: cfg.train.weight_decay,
                max_grad_norm: Some(cfg.train.max_grad_norm),
                ..AdamWConfig::default()
            },
        )?;
        let average = params.deep_clone()?;
        let averaged = Networks::new(&cfg, frozen(&average, device))?;
        tracing::info!(
            "{} parameters, {} clips for training, {} for validation, {} tokens",
            params.len_params(),
            train.len(),
            valid.len(),
            cfg.text.vocab_size
        );
        Ok(Self {
            train_captions: Captions::new(&tokenizer, &train.captions, cfg.data.max_tokens)?,
            valid_captions: Captions::new(&tokenizer, &valid.captions, cfg.data.max_tokens)?,
            device: device.clone(),
            order: (usize::MAX, Vec::new()),
            cfg,
            tokenizer,
            train,
            valid,
            params,
            networks,
            optimizer,
            average,
            averaged,
        })
    }

    /// The weights' average: what is exported.
    pub fn average(&self) -> &Params {
        &self.average
    }

    /// The clips of a step: each epoch goes through all of them once, in an order keyed by seed and epoch.
    fn rows(&mut self, step: usize) -> Vec<usize> {
        let n = self.train.len();
        let batch = self.cfg.train.batch;
        (step * batch..(step + 1) * batch)
            .map(|i| {
                if self.order.0 != i / n {
                    let mut order: Vec<usize> = (0..n).collect();
                    Rng::from_key(&format!("epoch/{}", i / n), self.cfg.seed).shuffle(&mut order);
                    self.order = (i / n, order);
                }
                self.order.1[i % n]
            })
            .collect()
    }

    fn lr(&self, step: usize) -> f64 {
        let train = &self.cfg.train;
        let warmup = ((step + 1) as f64 / train.warmup_steps.max(1) as f64).min(1.0);
        let factor = match train.schedule {
            Schedule::Constant => 1.0,
            Schedule::Cosine => {
                let done = step.saturating_sub(train.warmup_steps) as f64;
                let all = self.cfg.run.steps.saturating_sub(train.warmup_steps).max(1) as f64;
                0.55 + 0.45 * (std::f64::consts::PI * (done / all).min(1.0)).cos()
            }
        };
        train.lr * warmup * factor
    }

    fn update_average(&self, step: usize) -> Result<()> {
        let decay = self.cfg.train.ema_decay.min((1 + step) as f64 / (10 + step) as f64);
        for ((_, average), (_, value)) in
            self.average.names_and_vars().iter().zip(self.params.names_and_vars())
        {
            let kept = (average.as_tensor().detach() * decay)?;
            average.set(&(kept + (value.as_tensor().detach() * (1.0 - decay))?)?)?;
        }
        Ok(())
    }

    /// The averaged networks' mean weighted error on the validation clips at one noise level. `text` gives the caption of each clip.
    fn valid_loss(&self, sigma: f64, text: impl Fn(usize) -> Option<usize>) -> Result<f64> {
        let mut total = 0.0;
        let rows: Vec<usize> = (0..self.valid.len()).collect();
        for rows in rows.chunks(self.cfg.train.batch) {
            let x0 = self.valid.batch(rows, &self.device)?;
            let noise: Vec<Tensor> = rows
                .iter()
                .map(|row| {
                    let mut rng = Rng::from_key(&format!("valid/{sigma}/{row}"), 0);
                    rng.normal_tensor((1, self.valid.channels, self.valid.n_frames), DType::F32, &self.device)
                })
                .collect::<candle_core::Result<_>>()?;
            let x = (&x0 + (Tensor::cat(&noise, 0)? * sigma)?)?;
            let captions: Vec<usize> = rows.iter().map(|&row| text(row).unwrap_or(row)).collect();
            let cond = self.averaged.texts(self.valid_captions.batch(&captions, &self.device)?)?;
            let drop: Vec<bool> = rows.iter().map(|&row| text(row).is_none()).collect();
            let context = self.averaged.model.dit.context(&cond, Some(&drop), self.valid.n_frames)?;
            let sigmas = vec![sigma; rows.len()];
            let denoised = self.averaged.model.denoise_with(&x, &sigmas, &context)?;
            let errors = denoising_errors(&self.averaged.model.edm, Weighting::Edm, &denoised, &x0, &sigmas)?;
            total += f64::from(errors.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(total / self.valid.len() as f64)
    }
}

impl Task for DitTask {
    fn step(&mut self, step: usize, rng: &mut Rng) -> Result<Vec<(&'static str, f64)>> {
        let rows = self.rows(step);
        let n = rows.len();
        let edm = self.networks.model.edm;
        let x0 = self.train.batch(&rows, &self.device)?;
        let sigmas = edm.sample_sigmas_stratified(n, rng);
        let drop: Vec<bool> = (0..n).map(|_| rng.uniform() < self.cfg.train.caption_dropout).collect();
        let noise = rng.normal_tensor(x0.shape().clone(), DType::F32, &self.device)?;
        let levels = Tensor::from_vec(sigmas.iter().map(|&s| s as f32).collect(), (n, 1, 1), &self.device)?;
        let x = (&x0 + noise.broadcast_mul(&levels)?)?; // [B, C, T]

        let cond = self.networks.texts(self.train_captions.batch(&rows, &self.device)?)?;
        let context = self.networks.model.dit.context(&cond, Some(&drop), self.train.n_frames)?;
        let denoised = self.networks.model.denoise_with(&x, &sigmas, &context)?;
        let errors = denoising_errors(&edm, self.cfg.train.weighting, &denoised, &x0, &sigmas)?; // [B]
        let values = errors.to_vec1::<f32>()?;
        if let Some(worst) = values.iter().position(|e| !e.is_finite()) {
            return Err(Error::NotFinite {
                what: "loss".into(),
                value: f64::from(values[worst]),
                step,
                sigma: Some(sigmas[worst]),
                prompt: Some(self.train.captions[rows[worst]].clone()),
                checkpoint: None,
            });
        }
        let gradients = dragon_nn::backward(&errors.mean_all()?)?;
        let lr = self.lr(step);
        self.optimizer.set_lr(lr);
        let grad_norm = self.optimizer.step(&gradients)?;
        self.update_average(step)?;
        let loss = values.iter().map(|&e| f64::from(e)).sum::<f64>() / n as f64;
        Ok(vec![("loss", loss), ("grad_norm", grad_norm), ("lr", lr)])
    }

    fn validate(&mut self) -> Result<Vec<(&'static str, f64)>> {
        let n = self.valid.len();
        let (mut right, mut other, mut none) = (0.0, 0.0, 0.0);
        let mut scalars = Vec::new();
        for (sigma, name, name_other) in VALID_LEVELS {
            let loss = self.valid_loss(sigma, Some)?;
            // Half the set away: clips of one piece stand together.
            let loss_other = self.valid_loss(sigma, |row| Some((row + n / 2) % n))?;
            scalars.extend([(name, loss), (name_other, loss_other)]);
            right += loss;
            other += loss_other;
            none += self.valid_loss(sigma, |_| None)?;
        }
        let levels = VALID_LEVELS.len() as f64;
        let mut all = vec![
            ("loss", right / levels),
            ("loss_other_text", other / levels),
            ("loss_no_text", none / levels),
            // Relative, so that it can be followed while the losses fall.
            ("text_gain", 1.0 - right / other),
        ];
        all.append(&mut scalars);
        let line: Vec<String> = all.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        tracing::info!("validation: {}", line.join("  "));
        Ok(all)
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (prefix, tensors) in [
            ("params.", self.params.tensors()?),
            ("average.", self.average.tensors()?),
            ("optimizer.", self.optimizer.state()?),
        ] {
            state.extend(tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let tensors: HashMap<String, Tensor> = state.clone().into_iter().collect();
        let bad = || "the checkpoint does not fit this config";
        self.params.load_tensors(&tensors, "params.").map_err(Error::input(bad()))?;
        self.average.load_tensors(&tensors, "average.").map_err(Error::input(bad()))?;
        let moments = state
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix("optimizer.")?.to_owned(), t.clone())))
            .collect();
        self.optimizer.load_state(&moments).map_err(Error::input(bad()))
    }

    fn export(&self, dir: &Path) -> Result<()> {
        let json = |path: PathBuf, value: serde_json::Result<Vec<u8>>| {
            write_atomic(&path, &value.map_err(|err| Error::Bug(err.to_string()))?)
        };
        let info = Info { n_frames: self.cfg.data.n_frames, max_tokens: self.cfg.data.max_tokens };
        json(dir.join("bundle.json"), serde_json::to_vec_pretty(&info))?;
        let average = self.average.tensors()?;
        for part in ["dit", "t5"] {
            let folder = dir.join(part);
            std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
            let weights: BTreeMap<String, Tensor> = average
                .iter()
                .filter_map(|(name, t)| {
                    Some((name.strip_prefix(part)?.strip_prefix('.')?.to_owned(), t.clone()))
                })
                .collect();
            let path = folder.join("model.safetensors");
            write_safetensors(&path, &weights, &BTreeMap::new())
                .map_err(Error::input(format!("cannot write `{}`", path.display())))?;
        }
        json(dir.join("dit/config.json"), serde_json::to_vec_pretty(&self.cfg.model))?;
        json(dir.join("t5/config.json"), serde_json::to_vec_pretty(&self.cfg.text))?;
        self.tokenizer.save(dir.join("t5/tokenizer.json")).map_err(Error::input("cannot write the tokenizer"))
    }

    fn throughput(&self) -> (f64, &'static str) {
        (self.cfg.train.batch as f64, "clips")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Latents whose mean follows their caption: `loud` +0.8 in the first channel, `soft` -0.8, each with waves at random phases.
    fn toy(n: usize, seed: u64) -> LatentSet {
        let (channels, n_frames) = (4, 8);
        let mut rng = Rng::new(seed);
        let mut latents = Vec::new();
        let mut captions = Vec::new();
        for i in 0..n {
            // Half the set away, as the validation looks for another text, is always the other kind.
            let loud = i < n / 2;
            captions.push(if loud { "a loud song" } else { "a soft song" }.to_owned());
            for channel in 0..channels {
                let phase = rng.uniform() * 6.0;
                for t in 0..n_frames {
                    let mean = if channel == 0 { if loud { 0.8 } else { -0.8 } } else { 0.0 };
                    latents.push((mean + 0.8 * (phase + t as f64 * 0.7).sin()) as f32);
                }
            }
        }
        LatentSet { latents, channels, n_frames, captions }
    }

    fn toy_config() -> Config {
        let none = PathBuf::new();
        let mut cfg = Config::tiny_music(none.clone(), none.clone(), none);
        cfg.model = dragon_diffusion::Config::tiny();
        cfg.model.edm.p_mean = 0.5; // between the levels that caption and waves are learned at
        cfg.text = t5::Config { d_model: cfg.model.dit.text_dim, ..t5::Config::tiny() };
        cfg.data.n_frames = 8;
        cfg.data.max_tokens = 8;
        cfg.train = TrainConfig { batch: 16, lr: 5e-3, warmup_steps: 5, ema_decay: 0.9, ..cfg.train };
        cfg
    }

    fn task() -> DitTask {
        DitTask::new(&toy_config(), toy(64, 1), toy(16, 2), &Device::Cpu).unwrap()
    }

    fn go(task: &mut DitTask, steps: std::ops::Range<usize>) -> Vec<f64> {
        steps
            .map(|step| task.step(step, &mut Rng::from_key(&format!("step/{step}"), 0)).unwrap()[0].1)
            .collect()
    }

    #[test]
    fn the_loss_falls_and_the_caption_helps() {
        let mut task = task();
        let before: BTreeMap<_, _> = task.validate().unwrap().into_iter().collect();
        go(&mut task, 0..200);
        let after: BTreeMap<_, _> = task.validate().unwrap().into_iter().collect();
        assert!(after["loss"] < 0.9 * before["loss"], "{} -> {}", before["loss"], after["loss"]);
        assert!(after["loss_sigma_4"] < 0.9 * after["loss_other_text_sigma_4"], "{after:?}");
        assert!(after["loss_sigma_4"] < after["loss_no_text"], "{after:?}");
        assert!(before["text_gain"].abs() < 1e-9 && after["text_gain"] > 0.02, "{after:?}");
    }

    #[test]
    fn a_restored_state_goes_on_bit_for_bit() {
        let mut whole = task();
        let losses = go(&mut whole, 0..9);
        let mut first = task();
        go(&mut first, 0..5);
        let state = first.state().unwrap();
        let mut second = task();
        second.load_state(&state).unwrap();
        assert_eq!(go(&mut second, 5..9), losses[5..]);
        let (a, b) = (whole.state().unwrap(), second.state().unwrap());
        assert_eq!(a.len(), b.len());
        for (name, tensor) in &a {
            let values =
                |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(values(tensor), values(&b[name]), "{name}");
        }
    }

    #[test]
    fn the_export_holds_the_average_and_loads_again() {
        let mut task = task();
        go(&mut task, 0..3);
        let dir = tempfile::tempdir().unwrap();
        task.export(dir.path()).unwrap();
        let (config, params) = crate::bundle::load_dit(&dir.path().join("dit"), &Device::Cpu).unwrap();
        assert_eq!(config, task.cfg.model);
        let text = crate::bundle::TextStates::load(&dir.path().join("t5"), 8, &Device::Cpu).unwrap();
        let info: Info = crate::bundle::read_json(&dir.path().join("bundle.json")).unwrap();
        assert_eq!((info.n_frames, info.max_tokens), (8, 8));
        let model = Model::new(&config, frozen(&params, &Device::Cpu)).unwrap();
        let cond = text.encode(&["a loud song", "a soft song"]).unwrap();
        let noise = dragon_diffusion::prompts_noise(&[("a", 0), ("b", 0)], 4, 8).unwrap();
        let settings = dragon_diffusion::SamplerConfig { n_steps: 3, ..Default::default() };
        let latents = dragon_diffusion::sample(&model, &cond, &noise, &settings).unwrap();
        assert_eq!(latents.dims(), [2, 4, 8]);
        // The same from the task in memory.
        let last = task.valid.len() - 1; // the first is loud, the last is soft
        let rows = task.valid_captions.batch(&[0, last], &Device::Cpu).unwrap();
        let cond = task.averaged.texts(rows).unwrap();
        let want = dragon_diffusion::sample(&task.averaged.model, &cond, &noise, &settings).unwrap();
        dragon_testkit::assert_close(&latents, &want, dragon_testkit::Tol::LAYER);
    }

    #[test]
    fn an_epoch_shows_every_clip_once() {
        let mut task = task();
        let mut seen: Vec<usize> = (0..4).flat_map(|step| task.rows(step)).collect();
        let next: Vec<usize> = (4..8).flat_map(|step| task.rows(step)).collect();
        assert_ne!(seen, next);
        seen.sort_unstable();
        assert_eq!(seen, (0..64).collect::<Vec<_>>());
        // A step's clips do not depend on what was asked before.
        let again = task.rows(5);
        assert_eq!(again, next[16..32]);
    }

    #[test]
    fn configs_that_cannot_work_are_refused_by_their_key() {
        let refused = |change: &dyn Fn(&mut Config)| {
            let mut cfg = toy_config();
            change(&mut cfg);
            cfg.check().unwrap_err().to_string()
        };
        assert!(refused(&|c| c.train.batch = 0).contains("train.batch"));
        assert!(refused(&|c| c.train.lr = f64::NAN).contains("train.lr"));
        assert!(refused(&|c| c.train.caption_dropout = 1.0).contains("train.caption_dropout"));
        assert!(refused(&|c| c.model.dit.text_dim = 7).contains("model.dit.text_dim"));
        assert!(refused(&|c| c.model.edm.sigma_data = 0.0).contains("sigma_data"));
    }

    #[test]
    fn the_learning_rate_warms_up_and_falls_along_a_cosine() {
        let mut task = task();
        assert!((task.lr(0) - 1e-3).abs() < 1e-12 && task.lr(4) == 5e-3 && task.lr(5000) == 5e-3);
        task.cfg.train.schedule = Schedule::Cosine;
        task.cfg.run.steps = 105;
        assert!((task.lr(105) - 5e-4).abs() < 1e-12 && (task.lr(55) - 0.55 * 5e-3).abs() < 1e-9);
    }
}
