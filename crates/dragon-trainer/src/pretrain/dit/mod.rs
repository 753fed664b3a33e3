//! Pre-training of the diffusion transformer together with its text encoder, on latents of a trained VAE (paper Appendix E).
//!
//! The clips of a manifest are encoded once ([`latents()`]) and kept in a cache that is keyed by the VAE's files, so trainings that differ in the DiT only
//! share it. The text encoder is small and starts from noise here, so it learns with the DiT; its states reach the DiT through one loss.
//!
//! The loss is the EDM loss with 10 % of the captions dropped. Noise levels are drawn one from each of `batch` equally likely ranges, which
//! evens out the batches' losses. Validation uses the averaged weights on held-out pieces with fixed noises and levels, three times: with the
//! right caption, with another clip's, with none. A model that listens to its captions has the first loss well below the second.
//!
//! Reading order: `config`; the task is here; `latents` fills and reads the cache, `captions` holds the clips' tokens; `validation`.

mod captions;
mod config;
mod latents;
#[cfg(test)]
mod tests;
mod validation;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dragon_data::manifest;
use dragon_diffusion::{Model, TextCond, denoising_errors};
use dragon_encoders::t5::T5Encoder;
use dragon_encoders::tokenizer::Tokenizer;
use dragon_nn::{AdamW, AdamWConfig, Params, Rng, write_safetensors};

pub use config::{Config, DataConfig, TrainConfig};
pub use latents::{LatentSet, latents};

use super::{Outcome, Task};
use crate::bundle::{Info, frozen};
use crate::error::{Error, Result};
use crate::run::{RunContext, write_atomic};
use captions::Captions;

/// [`prepare`], then the training in the run folder of `ctx`.
///
/// # Errors
/// As [`prepare`] and [`super::run`].
pub fn run(cfg: &Config, device: &Device, ctx: &RunContext) -> Result<Outcome> {
    let mut task = prepare(cfg, device, ctx)?;
    super::run(&mut task, "pretrain dit", cfg, &cfg.run, cfg.seed, ctx)
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
    fn rows(&self, step: usize) -> Vec<usize> {
        super::items_of_step(step, self.cfg.train.batch, self.train.len(), self.cfg.seed)
    }

    fn lr(&self, step: usize) -> f64 {
        let train = &self.cfg.train;
        train.lr * train.schedule.factor(step, train.warmup_steps, self.cfg.run.steps)
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

    fn validate(&mut self) -> Result<Vec<(String, f64)>> {
        Ok(super::named(self.losses()?))
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        super::put(&mut state, "params.", self.params.tensors()?);
        super::put(&mut state, "average.", self.average.tensors()?);
        super::put(&mut state, "optimizer.", self.optimizer.state()?);
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        const WRONG: &str = "the checkpoint does not fit this config";
        self.params.load_tensors(&super::take(state, "params."), "").map_err(Error::input(WRONG))?;
        self.average.load_tensors(&super::take(state, "average."), "").map_err(Error::input(WRONG))?;
        self.optimizer.load_state(&super::take(state, "optimizer.")).map_err(Error::input(WRONG))
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
            let weights: BTreeMap<String, Tensor> = super::take(&average, &format!("{part}."));
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
