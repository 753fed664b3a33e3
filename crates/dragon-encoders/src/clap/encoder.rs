//! A CLAP ready to embed: model, tokenizer and front end together, read from and written to a folder.

use crate::clap::{Clap, Config};
use crate::encoder::{AudioEncoder, Embeddings, TextEncoder};
use crate::htsat::LogMel;
use crate::tokenizer::{self, Tokenizer, Tokens, TooLong};
use candle_core::{DType, Device, Result, Tensor};
use dragon_nn::{LoadError, Params};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// What goes wrong with a CLAP folder or its inputs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.json` is missing or does not parse.
    #[error("CLAP config `{}`: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// The weights do not fit.
    #[error(transparent)]
    Weights(#[from] LoadError),
    /// The tokenizer, or a caption.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The tokenizer has more entries than the text branch has rows.
    #[error("CLAP `{}`: the tokenizer has {found} entries, the config says vocab_size {expected}", path.display())]
    Vocabulary {
        /// The folder.
        path: PathBuf,
        /// Rows of the embedding table.
        expected: usize,
        /// Entries of the tokenizer.
        found: usize,
    },
    /// The front end's settings are impossible.
    #[error(transparent)]
    Audio(#[from] dragon_audio::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A CLAP with its tokenizer and front end, ready to embed; a folder of `config.json`, `model.safetensors` and
/// `tokenizer.json`.
pub struct ClapEncoder {
    /// The model.
    pub model: Clap,
    /// Its trainable variables.
    pub params: Params,
    /// Text to ids.
    pub tokenizer: Tokenizer,
    log_mel: LogMel,
    device: Device,
    id: String,
}

/// Clips embedded in one pass: bounds memory, and fills two to four cores.
const CLIPS_PER_PASS: usize = 16;

impl ClapEncoder {
    /// A model with new weights.
    ///
    /// # Errors
    /// If the config contradicts itself or the tokenizer's vocabulary exceeds the model's.
    pub fn new(
        config: &Config,
        tokenizer: Tokenizer,
        seed: u64,
        device: &Device,
    ) -> std::result::Result<Self, Error> {
        Self::with_params(config, tokenizer, Params::new(seed), device)
    }

    /// A model on variables that exist already (those of a moving average, say); missing ones are made.
    ///
    /// # Errors
    /// As [`Self::new`], or if a variable has another shape.
    pub fn with_params(
        config: &Config,
        tokenizer: Tokenizer,
        params: Params,
        device: &Device,
    ) -> std::result::Result<Self, Error> {
        let (expected, found) = (config.text.vocab_size, tokenizer.vocab_size());
        if found > expected {
            return Err(Error::Vocabulary { path: PathBuf::new(), expected, found });
        }
        let model = Clap::new(config, params.builder(DType::F32, device))?;
        let (log_mel, id) = (LogMel::new(&config.audio)?, "clap-new".to_string());
        Ok(Self { model, params, tokenizer, log_mel, device: device.clone(), id })
    }

    /// Reads a folder.
    ///
    /// # Errors
    /// If a file is missing or broken, or weights and config do not fit; every tensor in question is listed.
    pub fn load(folder: impl AsRef<Path>, device: &Device) -> std::result::Result<Self, Error> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let fail = |reason: String| Error::Config { path: path.clone(), reason };
        let text = std::fs::read_to_string(&path).map_err(|e| fail(e.to_string()))?;
        let config: Config = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
        let tokenizer = Tokenizer::load(folder.join("tokenizer.json"))?;
        let mut encoder = Self::new(&config, tokenizer, 0, device).map_err(|e| match e {
            Error::Vocabulary { expected, found, .. } => {
                Error::Vocabulary { path: folder.into(), expected, found }
            }
            other => other,
        })?;
        encoder.params.load(folder.join("model.safetensors"))?;
        encoder.id = format!("clap-{:016x}", encoder.fingerprint()?);
        Ok(encoder)
    }

    /// FNV-1a hash of all weights: tells statistics of one checkpoint from those of another.
    fn fingerprint(&self) -> Result<u64> {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for (_, var) in self.params.names_and_vars() {
            for value in var.as_tensor().flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
                for byte in value.to_le_bytes() {
                    hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
                }
            }
        }
        Ok(hash)
    }

    /// Writes a folder: `config.json`, `model.safetensors` (f32) and `tokenizer.json`; makes it if needed.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> std::result::Result<(), Error> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let fail = |e: std::io::Error| Error::Config { path: path.clone(), reason: e.to_string() };
        std::fs::create_dir_all(folder).map_err(fail)?;
        let json = serde_json::to_string_pretty(self.model.config()).expect("a config is plain data");
        dragon_nn::write_atomically(&path, json.as_bytes()).map_err(fail)?;
        self.tokenizer.save(folder.join("tokenizer.json"))?;
        self.params.save(folder.join("model.safetensors"), DType::F32)?;
        Ok(())
    }

    /// The front end.
    pub fn front_end(&self) -> &LogMel {
        &self.log_mel
    }

    /// Log-mel spectrograms of clips of exactly `clip_samples` samples: `[B, n_frames, mel_bins]`.
    ///
    /// # Errors
    /// If a clip has another length or holds NaN.
    pub fn log_mel(&self, clips: &[&[f32]]) -> Result<Tensor> {
        let config = &self.model.config().audio;
        let data = clips.par_iter().map(|clip| self.log_mel.compute(clip)).collect::<Result<Vec<_>>>()?;
        Tensor::from_vec(data.concat(), (clips.len(), config.n_frames(), config.mel_bins), &self.device)
    }

    /// Embeddings of clips of exactly `clip_samples` samples, rows of length 1, without gradients.
    ///
    /// # Errors
    /// If a clip has another length or holds NaN.
    pub fn embed_clips(&self, clips: &[&[f32]]) -> Result<Vec<Vec<f32>>> {
        let mut rows = Vec::with_capacity(clips.len());
        for chunk in clips.chunks(CLIPS_PER_PASS) {
            rows.extend(self.model.embed_log_mel(&self.log_mel(chunk)?)?.detach().to_vec2::<f32>()?);
        }
        Ok(rows)
    }

    /// Ids and mask of captions; too long ones are cut, and listed in the result.
    ///
    /// # Errors
    /// If a caption is empty.
    pub fn tokens<S: AsRef<str>>(&self, texts: &[S]) -> std::result::Result<Tokens, tokenizer::Error> {
        self.tokenizer.encode_batch(texts, self.model.config().max_tokens, TooLong::Truncate, &self.device)
    }

    /// Embeddings of captions, rows of length 1, without gradients.
    ///
    /// # Errors
    /// If a caption is empty.
    pub fn embed_captions<S: AsRef<str>>(&self, texts: &[S]) -> crate::Result<Vec<Vec<f32>>> {
        let mut rows = Vec::with_capacity(texts.len());
        for chunk in texts.chunks(4 * CLIPS_PER_PASS) {
            let tokens = self.tokens(chunk)?;
            rows.extend(self.model.embed_tokens(&tokens.ids, &tokens.mask)?.detach().to_vec2::<f32>()?);
        }
        Ok(rows)
    }
}

impl AudioEncoder for ClapEncoder {
    /// `clap-` and a hash of the weights; `clap-new` for a model that was not read from a folder.
    fn id(&self) -> &str {
        &self.id
    }

    fn sample_rate_hz(&self) -> u32 {
        self.model.config().audio.sample_rate_hz
    }

    fn window_samples(&self) -> usize {
        self.model.config().audio.clip_samples
    }

    fn dim(&self) -> usize {
        self.model.config().joint_dim
    }

    fn embed_windows(&self, windows: &[&[f32]]) -> crate::Result<Vec<Vec<f32>>> {
        Ok(self.embed_clips(windows)?)
    }
}

impl TextEncoder for ClapEncoder {
    /// Captions beyond `max_tokens` are cut; [`ClapEncoder::tokens`] tells which.
    fn embed_texts(&self, texts: &[&str]) -> crate::Result<Embeddings> {
        Embeddings::from_rows(&self.embed_captions(texts)?)
    }
}
