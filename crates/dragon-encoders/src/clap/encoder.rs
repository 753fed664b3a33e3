//! A CLAP ready to embed: model, tokenizer and front end together, read from and written to a folder.

use crate::clap::published::Files;
use crate::clap::{Clap, Config};
use crate::encoder::{AudioEncoder, Embeddings, TextEncoder};
use crate::htsat::LogMel;
use crate::tokenizer::{self, Tokenizer, Tokens, TooLong};
use candle_core::{DType, Device, Result, Tensor};
use dragon_nn::{LoadError, Params};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Once;

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
    /// A checkpoint that is no CLAP, or one of a kind that is not built here.
    #[error("CLAP `{}`: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do.
        reason: String,
    },
    /// The front end's settings are impossible.
    #[error(transparent)]
    Audio(#[from] dragon_audio::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A CLAP with its tokenizer and front end, ready to embed.
pub struct ClapEncoder {
    /// The model.
    pub model: Clap,
    /// Its trainable variables; none if it was read from a checkpoint, whose weights are frozen.
    pub params: Params,
    /// The frozen weights of a model that was read.
    frozen: BTreeMap<String, Tensor>,
    /// Text to ids.
    pub tokenizer: Tokenizer,
    log_mel: LogMel,
    device: Device,
    id: String,
    /// Of models that others trained, before the first text: whether [`Self::text_cosine`] is sane.
    text_check: Option<Once>,
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
        let (frozen, device) = (BTreeMap::new(), device.clone());
        Ok(Self { model, params, frozen, tokenizer, log_mel, device, id, text_check: None })
    }

    /// Reads a CLAP, whose weights are then frozen. `path` is one of:
    ///
    /// - a folder that [`Self::save`] wrote: `config.json`, `model.safetensors`, `tokenizer.json`;
    /// - a checkpoint of LAION without fusion (`music_audioset_epoch_15_esc_90.14.pt`, `630k-audioset-best.pt`; also
    ///   as safetensors with the same names), or the folder that holds it, with roberta-base's `tokenizer.json` beside
    ///   it;
    /// - a folder with a `ClapModel` of Hugging Face without fusion: `config.json`, `preprocessor_config.json`,
    ///   `model.safetensors` (or `pytorch_model.bin`) and `tokenizer.json`.
    ///
    /// # Errors
    /// If a file is missing or broken, or weights and config do not fit; every tensor in question is listed.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> std::result::Result<Self, Error> {
        let files = Files::find(path.as_ref())?;
        let tokenizer = if files.layout.is_foreign() && !files.tokenizer.exists() {
            return Err(Error::Tokenizer(tokenizer::Error::Read {
                path: files.tokenizer,
                reason: "it is missing\nhint: put the tokenizer.json of roberta-base there, \
                         https://huggingface.co/FacebookAI/roberta-base/blob/main/tokenizer.json"
                    .into(),
            }));
        } else {
            Tokenizer::load(&files.tokenizer)?
        };
        let (config, loader) = files.open()?;
        let (expected, found) = (config.text.vocab_size, tokenizer.vocab_size());
        if found > expected {
            return Err(Error::Vocabulary { path: path.as_ref().into(), expected, found });
        }
        let model = Clap::new(&config, loader.builder(DType::F32, device))?;
        let frozen = loader.finish(|name| files.layout.is_unneeded(name))?;
        let mut encoder = Self {
            log_mel: LogMel::new(&config.audio)?,
            params: Params::new(0),
            text_check: files.layout.is_foreign().then(Once::new),
            device: device.clone(),
            id: String::new(),
            model,
            frozen,
            tokenizer,
        };
        encoder.id = format!("clap-{:016x}", encoder.fingerprint()?);
        Ok(encoder)
    }

    /// All weights by name, frozen or not.
    pub fn weights(&self) -> BTreeMap<String, Tensor> {
        let vars =
            self.params.names_and_vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor()));
        vars.chain(self.frozen.clone()).collect()
    }

    /// FNV-1a hash of all weights: tells statistics of one checkpoint from those of another.
    fn fingerprint(&self) -> Result<u64> {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for tensor in self.weights().values() {
            for value in tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
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
        let weights =
            self.weights().into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)));
        let weights = weights.collect::<Result<BTreeMap<_, _>>>()?;
        dragon_nn::write_safetensors(folder.join("model.safetensors"), &weights, &BTreeMap::new())?;
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
    /// The first captions for a model that others trained also measure [`Self::text_cosine`], and a warning says if
    /// it is above [`COLLAPSED_COSINE`].
    ///
    /// # Errors
    /// If a caption is empty.
    pub fn embed_captions<S: AsRef<str>>(&self, texts: &[S]) -> crate::Result<Vec<Vec<f32>>> {
        let mut cosine = None;
        if let Some(check) = &self.text_check {
            check.call_once(|| cosine = Some(self.text_cosine()));
        }
        if let Some(cosine) = cosine.transpose()?.filter(|cosine| *cosine > COLLAPSED_COSINE) {
            tracing::warn!(
                "this CLAP tells texts hardly apart: {} unlike captions have a mean cosine of {cosine:.4}; scores \
                 against texts mean little, those against audio are not affected (known of laion/larger_clap_music)",
                UNLIKE_CAPTIONS.len()
            );
        }
        let mut rows = Vec::with_capacity(texts.len());
        for chunk in texts.chunks(4 * CLIPS_PER_PASS) {
            rows.extend(self.embed_tokens(&self.tokens(chunk)?)?);
        }
        Ok(rows)
    }

    fn embed_tokens(&self, tokens: &Tokens) -> Result<Vec<Vec<f32>>> {
        self.model.embed_tokens(&tokens.ids, &tokens.mask)?.detach().to_vec2()
    }

    /// Mean cosine between the embeddings of twenty captions that have nothing in common, in [-1, 1]. 1 says that
    /// every text gets the same embedding.
    ///
    /// # Errors
    /// If the tokenizer or the model fails.
    pub fn text_cosine(&self) -> crate::Result<f64> {
        let n_tokens = self.model.config().max_tokens.min(24); // the longest caption, not the longest text
        let tokens =
            self.tokenizer.encode_batch(&UNLIKE_CAPTIONS, n_tokens, TooLong::Truncate, &self.device)?;
        let rows = self.embed_tokens(&tokens)?;
        let n = rows.len() as f64;
        // |sum of unit rows|² = n + the sum over all ordered pairs
        let sums =
            (0..self.model.config().joint_dim).map(|j| rows.iter().map(|row| f64::from(row[j])).sum::<f64>());
        let squared: f64 = sums.map(|sum| sum * sum).sum();
        Ok((squared - n) / (n * (n - 1.0)))
    }
}

/// Mean cosine of unlike captions from which on a text branch counts as collapsed.
pub const COLLAPSED_COSINE: f64 = 0.99;

/// Captions that have nothing in common.
const UNLIKE_CAPTIONS: [&str; 20] = [
    "a slow lament played by a single violin",
    "thrash metal with distorted guitars and fast double bass drums",
    "a dog barks twice behind a fence",
    "heavy rain on a tin roof",
    "a woman sings a lullaby without accompaniment",
    "minimal techno, 128 beats per minute",
    "applause in a large concert hall",
    "a bluegrass banjo and a mandolin",
    "a helicopter flies over the listener",
    "a Gregorian chant in a cathedral",
    "glass breaks on a stone floor",
    "a jazz trio with brushed drums and upright bass",
    "a man reads the news on the radio",
    "a sad piano ballad in a minor key",
    "reggae with an offbeat organ",
    "children laugh on a playground",
    "a brass band marches down the street",
    "warm ambient pads without rhythm",
    "a steam train leaves the station",
    "an Indian raga on the sitar with tabla",
];

impl AudioEncoder for ClapEncoder {
    /// `clap-` and a hash of the weights, the same for one model in every layout; `clap-new` for a model that was not
    /// read.
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
