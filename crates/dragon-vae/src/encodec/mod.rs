//! EnCodec (Défossez et al. 2022, arXiv:2210.13438): waveform to latents, to codes, and back. Reference: encodec 0.1.1
//! (MIT), `model.py` and `modules/`; the path in code is the path in its checkpoints
//! (`encoder.model.3.conv.conv.weight_g`). [`published`] says what Hugging Face's files call it.
//!
//! In reading order: [`config`], [`network`] with encoder and decoder, [`quantizer`] for the codes.
//!
//! Differences from the reference: none known in what the networks compute. Long audio is encoded and decoded in pieces
//! that overlap by what their samples depend on, so that memory stays bounded; the numbers are those of the whole.
//! Entropy coding, and the language model for it, are left out; so is the overlapping of the 48 kHz model's segments.
//! Golden tests: `tests/encodec.rs`.

pub mod config;
pub mod network;
pub mod published;
pub mod quantizer;

pub use config::{Config, Norm};

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use dragon_nn::Loader;

use crate::vae::Error;
use network::{Decoder, Encoder};
use quantizer::Quantizer;

/// Encoder, quantiser and decoder.
#[derive(Debug, Clone)]
pub struct Encodec {
    cfg: Config,
    encoder: Encoder,
    quantizer: Quantizer,
    decoder: Decoder,
}

impl Encodec {
    /// Reads `encoder.…`, `quantizer.…` and `decoder.…` under `vb`, by the names of encodec's files.
    ///
    /// # Errors
    /// If `cfg` has no meaning, or a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.validate().map_err(candle_core::Error::msg)?;
        Ok(Self {
            encoder: Encoder::new(cfg, vb.pp("encoder"))?,
            quantizer: Quantizer::new(cfg, vb.pp("quantizer"))?,
            decoder: Decoder::new(cfg, vb.pp("decoder"))?,
            cfg: cfg.clone(),
        })
    }

    /// Reads published weights, frozen, in f32: encodec's file (`encodec_24khz-d7cc33bc.th`, `encodec_48khz-7e698e3e.th`),
    /// or Hugging Face's folder (`config.json` and `model.safetensors`).
    ///
    /// # Errors
    /// If a file is missing or damaged, describes another model, or its tensors do not fit (all are listed).
    pub fn load(path: &Path, device: &Device) -> std::result::Result<Self, Error> {
        let (cfg, checkpoint) = published::open(path)?;
        let names = published::Names::of(&checkpoint);
        let loader = Loader::new(checkpoint, move |name| vec![names.name(name)]);
        let model = Self::new(&cfg, loader.builder(DType::F32, device));
        let model = model.map_err(|source| Error::Model { source })?;
        loader.finish(published::is_unneeded).map_err(Box::new)?;
        Ok(model)
    }

    /// Hyperparameters.
    pub fn config(&self) -> &Config {
        &self.cfg
    }

    /// The latents before quantisation.
    ///
    /// The 48 kHz model normalises over time: it is made for segments of [`Config::segment_samples`], and a longer input is
    /// taken as one segment. Its authors scale each segment to a level of 1 before ([`Encodec::level`]); nothing is scaled here.
    ///
    /// # Shapes
    /// - `audio`: `[B, audio_channels, N]`, nominally in [-1, 1]; returns `[B, latent_dim, ceil(N / hop)]`.
    ///
    /// # Errors
    /// If the channels differ or there is no sample.
    pub fn encode(&self, audio: &Tensor) -> Result<Tensor> {
        let (_, channels, samples) = audio.dims3()?;
        if channels != self.cfg.audio_channels || samples == 0 {
            bail!(
                "encode: expected audio of {} channels and at least one sample, found {channels} and {samples}",
                self.cfg.audio_channels
            );
        }
        let latents = self.encoder.forward(&audio.transpose(1, 2)?.contiguous()?)?; // [B, T, C]
        latents.transpose(1, 2)?.contiguous()
    }

    /// The scale of a segment in encodec's normalisation: `1e-8` and the root mean square of its channels' mean, `[B]`.
    ///
    /// # Errors
    /// Those of tensor arithmetic.
    pub fn level(audio: &Tensor) -> Result<Tensor> {
        audio.mean(1)?.sqr()?.mean(1)?.sqrt()? + 1e-8
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

    /// Decodes latents, quantised or not.
    ///
    /// # Shapes
    /// - `latents`: `[B, latent_dim, T]`; returns `[B, audio_channels, T * hop]`, nominally in [-1, 1], not clipped.
    ///
    /// # Errors
    /// If the channels differ or there is no frame.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, channels, frames) = latents.dims3()?;
        if channels != self.cfg.latent_dim || frames == 0 {
            bail!(
                "decode: expected latents of {} channels and at least one frame, found {channels} and {frames}",
                self.cfg.latent_dim
            );
        }
        let audio = self.decoder.forward(&latents.transpose(1, 2)?.contiguous()?)?; // [B, T*hop, audio_channels]
        audio.transpose(1, 2)?.contiguous()
    }

    /// Decodes codes `[B, K, T]`: [`Encodec::dequantize`], then [`Encodec::decode`].
    ///
    /// # Errors
    /// Those of the two.
    pub fn decode_codes(&self, codes: &Tensor) -> Result<Tensor> {
        self.decode(&self.dequantize(codes)?)
    }
}
