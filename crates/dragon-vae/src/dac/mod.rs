//! DAC, the Descript Audio Codec (Kumar et al. 2023, arXiv:2306.06546): waveform to latents, to codes, and back. Reference:
//! descript-audio-codec 1.0.0 (MIT), `dac/model/dac.py` and `dac/nn/quantize.py`; the path in code is the path in its
//! checkpoints. The layers are those of [`crate::model`]; [`published`] says what Hugging Face's files call them.
//!
//! Differences from the reference: none known. Golden tests: `tests/dac.rs`.

pub mod published;
pub mod quantizer;

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use dragon_nn::Loader;

use crate::config::{Design, Output};
use crate::model::{Decoder, Encoder};
use crate::vae::Error;
use quantizer::Quantizer;

/// Hyperparameters; the published models differ in nothing else. All are mono.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Sample rate, Hz.
    pub sample_rate_hz: u32,
    /// Width of the encoder at the audio's rate; it doubles with each stride.
    pub encoder_dim: usize,
    /// Downsampling factors in the encoder's order; their product is [`Config::hop`].
    pub strides: Vec<usize>,
    /// Channels of the latents.
    pub latent_dim: usize,
    /// Width of the decoder at the latents' rate; it halves with each stride.
    pub decoder_dim: usize,
    /// Codebooks, one for what the ones before leave.
    pub n_codebooks: usize,
    /// Vectors in a codebook.
    pub codebook_size: usize,
    /// Length of these vectors.
    pub codebook_dim: usize,
}

impl Config {
    /// `weights_44khz_8kbps_0.0.1.pth`: the model of the paper.
    pub fn dac_44khz() -> Self {
        Self {
            sample_rate_hz: 44_100,
            encoder_dim: 64,
            strides: vec![2, 4, 8, 8],
            latent_dim: 1024,
            decoder_dim: 1536,
            n_codebooks: 9,
            codebook_size: 1024,
            codebook_dim: 8,
        }
    }

    /// `weights_24khz_8kbps_0.0.4.pth`.
    pub fn dac_24khz() -> Self {
        let strides = vec![2, 4, 5, 8];
        Self { sample_rate_hz: 24_000, strides, n_codebooks: 32, ..Self::dac_44khz() }
    }

    /// `weights_16khz_8kbps_0.0.5.pth`.
    pub fn dac_16khz() -> Self {
        Self { sample_rate_hz: 16_000, n_codebooks: 12, ..Self::dac_24khz() }
    }

    /// `weights_44khz_16kbps_1.0.0.pth`.
    pub fn dac_44khz_16kbps() -> Self {
        Self { latent_dim: 128, n_codebooks: 18, ..Self::dac_44khz() }
    }

    /// Samples per latent frame.
    pub fn hop(&self) -> usize {
        self.strides.iter().product()
    }

    /// Checks that a model can be built.
    ///
    /// # Errors
    /// The key, what was expected and what was found.
    pub fn validate(&self) -> std::result::Result<(), String> {
        let n = self.strides.len();
        if self.encoder_dim == 0 || n == 0 || n > 8 || !self.decoder_dim.is_multiple_of(1 << n) {
            return Err(format!(
                "expected 1 to 8 `strides` and a `decoder_dim` that can be halved as often, found {n} and {}",
                self.decoder_dim
            ));
        }
        if self.n_codebooks == 0 || self.codebook_size == 0 || self.codebook_dim == 0 {
            return Err("`n_codebooks`, `codebook_size`, `codebook_dim`: expected at least 1".into());
        }
        self.layers().validate()
    }

    /// The layers, in the terms of [`crate::model`].
    fn layers(&self) -> crate::Config {
        let n = self.strides.len();
        crate::Config {
            design: Design::Dac,
            sample_rate_hz: self.sample_rate_hz,
            audio_channels: 1,
            latent_dim: self.latent_dim,
            frames_per_latent: 1,
            strides: self.strides.clone(),
            encoder_channels: (0..=n).map(|i| self.encoder_dim << i).collect(),
            decoder_channels: (0..=n).map(|i| self.decoder_dim >> (n - i)).collect(),
            encoder_units: vec![3; n],
            decoder_units: vec![3; n],
            output: Output::Tanh,
            latent_mean: Vec::new(),
            latent_std: Vec::new(),
        }
    }
}

/// Encoder, quantiser and decoder.
#[derive(Debug, Clone)]
pub struct Dac {
    cfg: Config,
    encoder: Encoder,
    quantizer: Quantizer,
    decoder: Decoder,
}

impl Dac {
    /// Reads `encoder.…`, `quantizer.…` and `decoder.…` under `vb`, by the names of descript-audio-codec's files.
    ///
    /// # Errors
    /// If `cfg` has no meaning, or a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.validate().map_err(candle_core::Error::msg)?;
        let layers = cfg.layers();
        Ok(Self {
            encoder: Encoder::with_outputs(&layers, cfg.latent_dim, vb.pp("encoder"))?,
            quantizer: Quantizer::new(cfg, vb.pp("quantizer"))?,
            decoder: Decoder::build(&layers, false, vb.pp("decoder"))?,
            cfg: cfg.clone(),
        })
    }

    /// Reads published weights, frozen, in f32: descript-audio-codec's file (`weights_44khz_8kbps_0.0.1.pth` and so on), or
    /// Hugging Face's folder (`config.json` and `model.safetensors`).
    ///
    /// # Errors
    /// If a file is missing or damaged, describes another model, or its tensors do not fit (all are listed).
    pub fn load(path: &Path, device: &Device) -> std::result::Result<Self, Error> {
        let (cfg, checkpoint) = published::open(path)?;
        let names = published::Names::of(&checkpoint);
        let loader = Loader::new(checkpoint, move |name| vec![names.name(name)]);
        let model = Self::new(&cfg, loader.builder(DType::F32, device));
        let model = model.map_err(|source| Error::Model { source })?;
        loader.finish(|_| false).map_err(Box::new)?;
        Ok(model)
    }

    /// Hyperparameters.
    pub fn config(&self) -> &Config {
        &self.cfg
    }

    /// The latents before quantisation (`DAC.encoder`).
    ///
    /// # Shapes
    /// - `audio`: `[B, 1, N]`, nominally in [-1, 1]; returns `[B, latent_dim, T]`, where `T` is `N / hop` if the hop divides `N`,
    ///   else what is left when each layer drops what does not fill its stride.
    ///
    /// # Errors
    /// If the audio is not mono, or too short for a frame.
    pub fn encode(&self, audio: &Tensor) -> Result<Tensor> {
        let (_, channels, _) = audio.dims3()?;
        if channels != 1 {
            bail!("encode: expected mono audio, found {channels} channels");
        }
        self.encoder.outputs(audio)?.transpose(1, 2)?.contiguous()
    }

    /// The nearest codes of latents `[B, latent_dim, T]`, by the first `n_codebooks`: `[B, n_codebooks, T]`, u32.
    ///
    /// # Errors
    /// If there are fewer codebooks, or the channels differ.
    pub fn quantize(&self, latents: &Tensor, n_codebooks: usize) -> Result<Tensor> {
        self.quantizer.encode(latents, n_codebooks)
    }

    /// The latents that codes stand for: `[B, K, T]`, whole numbers, to `[B, latent_dim, T]`.
    ///
    /// # Errors
    /// If there are more rows of codes than codebooks, or a code is not below the codebooks' size.
    pub fn dequantize(&self, codes: &Tensor) -> Result<Tensor> {
        self.quantizer.decode(codes)
    }

    /// Decodes latents, quantised or not, all at once: `[B, latent_dim, T]` to `[B, 1, N]` in (-1, 1). `N` is `T * hop`, or a
    /// little less if there are odd strides, as in the reference.
    ///
    /// # Errors
    /// If the channels differ or there is no frame.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decoder.forward(latents)
    }
}
