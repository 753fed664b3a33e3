//! The audio VAE: encoder, KL bottleneck, decoder, and the model folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use dragon_nn::{LoadError, Params};
use serde::de::DeserializeOwned;

use crate::config::{Config, Design};
use crate::model::{Decoder, Encoder};

/// Bounds of the log-variance: e^-30 to e^20, far outside what training reaches, so that `exp` stays finite in f32
/// (the bounds that latent-diffusion implementations commonly use).
const LOG_VAR_BOUNDS: (f64, f64) = (-30.0, 20.0);

/// Diagonal Gaussian over the latents of one batch.
#[derive(Debug, Clone)]
pub struct Posterior {
    /// `[B, C, T]`.
    pub mean: Tensor,
    /// Logarithm of the variance, `[B, C, T]`.
    pub log_var: Tensor,
}

impl Posterior {
    /// Splits the encoder's output `[B, 2C, T]`.
    ///
    /// # Errors
    /// If the number of channels is odd.
    pub fn new(parameters: &Tensor) -> Result<Self> {
        let (_, channels, _) = parameters.dims3()?;
        if !channels.is_multiple_of(2) {
            bail!("posterior: expected mean and log-variance, an even number of channels, found {channels}");
        }
        let mean = parameters.narrow(1, 0, channels / 2)?;
        let log_var = parameters.narrow(1, channels / 2, channels / 2)?;
        Ok(Self { mean, log_var: log_var.clamp(LOG_VAR_BOUNDS.0, LOG_VAR_BOUNDS.1)? })
    }

    /// Splits the output `[B, 2C, T]` of an encoder that gives mean and deviation ([`Design::Oobleck`]): the deviation is
    /// `softplus(x) + 1e-4`.
    ///
    /// # Errors
    /// If the number of channels is odd.
    pub fn of_deviation(parameters: &Tensor) -> Result<Self> {
        let Posterior { mean, .. } = Self::new(parameters)?;
        let x = parameters.narrow(1, mean.dim(1)?, mean.dim(1)?)?;
        // softplus(x) = max(x, 0) + ln(1 + exp(-|x|)), which overflows nowhere
        let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
        Ok(Self { mean, log_var: ((softplus + 1e-4)?.log()? * 2.0)? })
    }

    /// `mean + exp(log_var / 2) * noise`, with `noise` standard normal of the latents' shape.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor> {
        &self.mean + ((&self.log_var * 0.5)?.exp()? * noise)?
    }

    /// Divergence from the standard normal, `½ (mean² + var - 1 - log var)` in nats, averaged over batch, channels and frames.
    ///
    /// # Errors
    /// Those of tensor arithmetic.
    pub fn kl(&self) -> Result<Tensor> {
        (((self.mean.sqr()? + self.log_var.exp()?)? - &self.log_var)? - 1.0)?.mean_all()? * 0.5
    }
}

/// Waveform to latents and back.
#[derive(Debug, Clone)]
pub struct AudioVae {
    cfg: Config,
    encoder: Encoder,
    decoder: Decoder,
}

impl AudioVae {
    /// Reads `encoder.…` and `decoder.…` under `vb`.
    ///
    /// # Errors
    /// If `cfg` is not valid, or a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Self::from_parts(cfg, vb.clone(), vb)
    }

    /// As [`AudioVae::new`], with encoder and decoder from two sources: one of them can then be trained while the other stays.
    ///
    /// # Errors
    /// If `cfg` is not valid, or a tensor is missing or has another shape.
    pub fn from_parts(cfg: &Config, encoder: VarBuilder, decoder: VarBuilder) -> Result<Self> {
        cfg.validate().map_err(candle_core::Error::msg)?;
        Ok(Self {
            encoder: Encoder::new(cfg, encoder.pp("encoder"))?,
            decoder: Decoder::new(cfg, decoder.pp("decoder"))?,
            cfg: cfg.clone(),
        })
    }

    /// Reads a model folder: `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// If a file cannot be read, the config is not valid, or the weights do not fit it (all tensors that do not, at once).
    pub fn load(dir: &Path, dtype: DType, device: &Device) -> std::result::Result<Self, Error> {
        let cfg = read_config(&dir.join("config.json"))?;
        let params = Params::new(0);
        let vae = Self::new(&cfg, params.builder(dtype, device)).map_err(|source| Error::Model { source })?;
        params.load(dir.join("model.safetensors")).map_err(Box::new)?;
        Ok(vae)
    }

    /// Hyperparameters and latent statistics.
    pub fn config(&self) -> &Config {
        &self.cfg
    }

    /// Replaces the latent statistics.
    ///
    /// # Errors
    /// If they are not `latent_dim` numbers each, or a deviation is not above 0.
    pub fn set_latent_stats(&mut self, mean: Vec<f32>, std: Vec<f32>) -> Result<()> {
        let cfg = Config { latent_mean: mean, latent_std: std, ..self.cfg.clone() };
        cfg.validate().map_err(candle_core::Error::msg)?;
        self.cfg = cfg;
        Ok(())
    }

    /// Distribution of the latents.
    ///
    /// # Shapes
    /// - `audio`: `[B, audio_channels, T * hop]`; the posterior's tensors are `[B, latent_dim, T]`.
    ///
    /// # Errors
    /// If the channels differ or the length is not a positive multiple of the hop.
    pub fn encode(&self, audio: &Tensor) -> Result<Posterior> {
        let parameters = self.encoder.forward(audio)?;
        match self.cfg.design {
            Design::Dac => Posterior::new(&parameters),
            Design::Oobleck => Posterior::of_deviation(&parameters),
        }
    }

    /// Mean of the posterior of audio of any length of at least a frame, in pieces of about `chunk_frames` latent frames, each
    /// with the samples that it depends on: bounded memory, and the numbers of the whole. Samples beyond the last whole
    /// frame are left out.
    ///
    /// # Shapes
    /// - `audio`: `[B, audio_channels, N]`; returns `[B, latent_dim, N / hop]`.
    ///
    /// # Errors
    /// If `chunk_frames` is 0, the channels differ, or there is less than a frame.
    pub fn encode_mean_chunked(&self, audio: &Tensor, chunk_frames: usize) -> Result<Tensor> {
        let hop = self.cfg.hop();
        let frames = audio.dim(2)? / hop;
        if chunk_frames == 0 || frames == 0 {
            bail!("encode: expected chunks of at least one frame, and audio of at least {hop} samples");
        }
        let mut pieces = Vec::new();
        for start in (0..frames).step_by(chunk_frames) {
            let end = (start + chunk_frames).min(frames);
            let (from, to) = self.encoder.receptive_field(start, end);
            let (from, to) = (from.max(0) as usize / hop, (to as usize).div_ceil(hop).min(frames));
            let mean = self.encode(&audio.narrow(2, from * hop, (to - from) * hop)?)?.mean; // [B, C, to - from]
            pieces.push(mean.narrow(2, start - from, end - start)?);
        }
        Tensor::cat(&pieces, 2)
    }

    /// Decodes latents as [`AudioVae::encode`] gives them, not normalised.
    ///
    /// # Shapes
    /// - `latents`: `[B, latent_dim, T]`; returns `[B, audio_channels, T * hop]`.
    ///
    /// # Errors
    /// If the channels differ or there is no frame.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decoder.forward(latents)
    }

    /// [`AudioVae::decode`] in pieces of `chunk_frames` latent frames, for audio too long to decode at once.
    ///
    /// Each piece is decoded together with the frames that its samples depend on (see [`Decoder::receptive_field`]), so
    /// the pieces meet without a seam: the result equals the whole decode but for the rounding of other batch shapes.
    ///
    /// # Errors
    /// If `chunk_frames` is 0, and those of [`AudioVae::decode`].
    pub fn decode_chunked(&self, latents: &Tensor, chunk_frames: usize) -> Result<Tensor> {
        if chunk_frames == 0 {
            bail!("decode_chunked: expected chunks of at least one latent frame, found 0");
        }
        let (_, _, frames) = latents.dims3()?;
        if frames <= chunk_frames {
            return self.decode(latents);
        }
        let hop = self.cfg.hop();
        let mut pieces = Vec::new();
        for start in (0..frames).step_by(chunk_frames) {
            let end = (start + chunk_frames).min(frames);
            let (from, to) = self.decoder.receptive_field(start, end);
            let (from, to) = (from.max(0) as usize, (to as usize).min(frames));
            let audio = self.decode(&latents.narrow(2, from, to - from)?)?; // [B, audio_channels, (to-from)*hop]
            pieces.push(audio.narrow(2, (start - from) * hop, (end - start) * hop)?);
        }
        Tensor::cat(&pieces, 2)
    }

    /// Mean of the posterior, each channel shifted and scaled to mean 0 and deviation 1 by the config's statistics:
    /// the latents that the diffusion model sees, `[B, latent_dim, T]`.
    ///
    /// # Errors
    /// If the config has no statistics, and those of [`AudioVae::encode`].
    pub fn encode_normalized(&self, audio: &Tensor) -> Result<Tensor> {
        self.normalize(&self.encode(audio)?.mean)
    }

    /// Decodes latents of [`AudioVae::encode_normalized`].
    ///
    /// # Errors
    /// If the config has no statistics, and those of [`AudioVae::decode`].
    pub fn decode_normalized(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode(&self.denormalize(latents)?)
    }

    /// `(latents - latent_mean) / latent_std`, channel by channel.
    ///
    /// # Errors
    /// If the config has no statistics.
    pub fn normalize(&self, latents: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.latent_stats(latents)?;
        latents.broadcast_sub(&mean)?.broadcast_div(&std)
    }

    /// `latents * latent_std + latent_mean`, channel by channel: undoes [`AudioVae::normalize`].
    ///
    /// # Errors
    /// If the config has no statistics.
    pub fn denormalize(&self, latents: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.latent_stats(latents)?;
        latents.broadcast_mul(&std)?.broadcast_add(&mean)
    }

    fn latent_stats(&self, like: &Tensor) -> Result<(Tensor, Tensor)> {
        if self.cfg.latent_mean.is_empty() {
            bail!(
                "latents cannot be normalised: `latent_mean` and `latent_std` are missing in the VAE's config.json; export the VAE with `dragon pretrain vae`"
            );
        }
        let tensor =
            |v: &[f32]| Tensor::new(v, like.device())?.to_dtype(like.dtype())?.reshape((1, v.len(), 1));
        Ok((tensor(&self.cfg.latent_mean)?, tensor(&self.cfg.latent_std)?)) // [1, C, 1]
    }
}

/// Writes a model folder: `config.json`, and `model.safetensors` with the given tensors as f32.
///
/// # Errors
/// If a file cannot be written.
pub fn save(dir: &Path, cfg: &Config, tensors: &BTreeMap<String, Tensor>) -> std::result::Result<(), Error> {
    std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_path_buf(), source })?;
    let path = dir.join("model.safetensors");
    let mut f32s = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = tensor.to_dtype(DType::F32).map_err(|source| Error::Model { source })?;
        f32s.insert(name.clone(), tensor);
    }
    dragon_nn::write_safetensors(&path, &f32s, &BTreeMap::new())
        .map_err(|source| Error::Write { path, source })?;
    let path = dir.join("config.json");
    let json = serde_json::to_string_pretty(cfg).expect("a config of numbers and names always serialises");
    let temporary = dir.join("config.json.tmp");
    std::fs::write(&temporary, json + "\n")
        .and_then(|()| std::fs::rename(&temporary, &path))
        .map_err(|source| Error::Io { path, source })
}

/// Why a model folder could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system said no.
    #[error("cannot access `{}`: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `config.json` is not a config of this model.
    #[error("`{}` is not a VAE config: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Key, what was expected, what was found.
        message: String,
    },
    /// The weights cannot be read, or do not fit the config.
    #[error(transparent)]
    Weights(#[from] Box<LoadError>),
    /// The weights cannot be written.
    #[error("cannot write `{}`: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the writer said.
        source: candle_core::Error,
    },
    /// The model could not be built.
    #[error("the VAE cannot be built: {source}")]
    Model {
        /// What failed.
        source: candle_core::Error,
    },
}

/// A JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> std::result::Result<T, Error> {
    let text =
        std::fs::read_to_string(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    serde_json::from_str(&text)
        .map_err(|e| Error::Config { path: path.to_path_buf(), message: e.to_string() })
}

pub(crate) fn read_config(path: &Path) -> std::result::Result<Config, Error> {
    let refuse = |message: String| Error::Config { path: path.to_path_buf(), message };
    let cfg: Config = read_json(path)?;
    cfg.validate().map_err(refuse)?;
    Ok(cfg)
}
