//! CLAP: contrastive language-audio pre-training (Wu et al. 2023, arXiv:2211.06687) in the structure of LAION-CLAP.
//!
//! HTS-AT and RoBERTa, a two-layer head each, unit-length embeddings in one space. Reference: LAION-AI/CLAP@46cce9a,
//! `clap_module/model.py` (CC0), without fusion; tensor names are those of its checkpoints after `module.`. Of these
//! `audio_transform`, `text_transform` and `logit_scale_t` are not read: the embeddings do not pass through them.
//! Golden tests: `audio_branch_matches_laion_clap`, `text_branch_matches_transformers`.

use crate::encoder::{AudioEncoder, Embeddings, TextEncoder};
use crate::htsat::{self, Htsat, LogMel};
use crate::layers::Dense;
use crate::roberta::{self, Roberta};
use crate::tokenizer::{self, Tokenizer, Tokens, TooLong};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use dragon_nn::{LoadError, Params};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// Hyperparameters of [`Clap`].
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The audio branch and its front end.
    pub audio: htsat::Config,
    /// The text branch.
    pub text: roberta::Config,
    /// Width of the joint space.
    pub joint_dim: usize,
    /// Length to which texts are padded or cut, in tokens (LAION: 77).
    pub max_tokens: usize,
}

impl Config {
    /// The music checkpoints of LAION-CLAP (`HTSAT-base`, `roberta-base`): 194 M parameters.
    pub fn laion_base() -> Self {
        Self {
            audio: htsat::Config::laion_base(),
            text: roberta::Config::base(),
            joint_dim: 512,
            max_tokens: 77,
        }
    }

    /// The tiny CLAP that this project trains itself: 1.1 M parameters.
    pub fn tiny_music() -> Self {
        Self {
            audio: htsat::Config::tiny_music(),
            text: roberta::Config::tiny_music(),
            joint_dim: 128,
            max_tokens: 48,
        }
    }

    /// The smallest valid model, for tests.
    pub fn tiny() -> Self {
        let text = roberta::Config {
            vocab_size: 50,
            hidden_size: 16,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            intermediate_size: 24,
            max_position_embeddings: 20,
            ..roberta::Config::base()
        };
        Self { audio: htsat::Config::tiny(), text, joint_dim: 12, max_tokens: 12 }
    }
}

/// Audio and text to one space.
#[derive(Debug, Clone)]
pub struct Clap {
    config: Config,
    /// The audio branch, up to its `embedding`.
    pub audio_branch: Htsat,
    /// The text branch.
    pub text_branch: Roberta,
    audio_projection: Head,
    text_projection: Head,
    logit_scale: Tensor,
}

impl Clap {
    /// Reads the weights under `vb` (`audio_branch`, `text_branch`, `audio_projection`, `text_projection`,
    /// `logit_scale_a`).
    ///
    /// # Errors
    /// If the config contradicts itself, or a tensor is missing or has another shape.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        if config.max_tokens == 0 || config.max_tokens > config.text.max_tokens() {
            candle_core::bail!(
                "clap config: max_tokens {}, but the text branch reads 1 to {}",
                config.max_tokens,
                config.text.max_tokens()
            )
        }
        let joint = config.joint_dim;
        let first_scale = Init::Const((1.0f64 / 0.07).ln()); // temperature 0.07, as in the reference
        Ok(Self {
            audio_branch: Htsat::new(&config.audio, vb.pp("audio_branch"))?,
            text_branch: Roberta::new(&config.text, vb.pp("text_branch"))?,
            audio_projection: Head::new(config.audio.embedding_dim(), joint, vb.pp("audio_projection"))?,
            text_projection: Head::new(config.text.hidden_size, joint, vb.pp("text_projection"))?,
            logit_scale: vb.get_with_hints((), "logit_scale_a", first_scale)?,
            config: config.clone(),
        })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Natural logarithm of the factor on the cosines in the loss, a trained scalar.
    pub fn logit_scale(&self) -> &Tensor {
        &self.logit_scale
    }

    /// Embeddings of log-mel spectrograms: `[B, n_frames, mel_bins]` dB (from [`LogMel`]) to `[B, joint_dim]`, rows of
    /// length 1.
    ///
    /// # Errors
    /// If the shape is another one.
    pub fn embed_log_mel(&self, log_mel: &Tensor) -> Result<Tensor> {
        unit_rows(&self.audio_projection.forward(&self.audio_branch.forward(log_mel)?)?)
    }

    /// Embeddings of texts: ids and mask `[B, L]` to `[B, joint_dim]`, rows of length 1.
    ///
    /// # Errors
    /// If the shapes differ, a text is too long, or an id is not below the vocabulary size.
    pub fn embed_tokens(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let states = self.text_branch.forward(ids, mask)?; // [B, L, hidden]
        unit_rows(&self.text_projection.forward(&self.text_branch.pool(&states)?)?)
    }
}

/// Linear, ReLU, linear (`0` and `2` of the reference's `Sequential`).
#[derive(Debug, Clone)]
struct Head {
    first: Dense,
    second: Dense,
}

impl Head {
    fn new(n_in: usize, joint: usize, vb: VarBuilder) -> Result<Self> {
        // deviation of PyTorch's default, uniform with bound 1/sqrt(fan in)
        let std = |fan_in: usize| (3.0 * fan_in as f64).powf(-0.5);
        Ok(Self {
            first: Dense::new(n_in, joint, std(n_in), vb.pp(0))?,
            second: Dense::new(joint, joint, std(joint), vb.pp(2))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.second.forward(&self.first.forward(x)?.relu()?)
    }
}

/// Rows scaled to length 1: `x / max(|x|, 1e-12)` over the last axis.
fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let norm = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?; // [B, 1]
    x.broadcast_div(&norm.maximum(1e-12)?)
}

/// Symmetric contrastive loss: mean cross entropy of audio to text and of text to audio, halved sum, where clip `i`
/// belongs to text `i` (LAION's `ClipLoss` without the MLP loss). `ln B` when nothing is told apart.
///
/// # Shapes
/// - `audio`, `text`: `[B, D]`, rows of length 1; `logit_scale`: scalar, logarithm of the factor on the cosines;
///   returns a scalar.
/// - `same`: optional `[B, B]`, 1 where text `i` and text `j != i` are the same words: such pairs are left out of
///   the sums, since telling them apart is impossible.
///
/// # Errors
/// If the shapes differ.
pub fn contrastive_loss(
    audio: &Tensor,
    text: &Tensor,
    logit_scale: &Tensor,
    same: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, _) = audio.dims2()?;
    if audio.dims() != text.dims() {
        candle_core::bail!(
            "contrastive loss: audio {:?} and text {:?} differ in shape",
            audio.dims(),
            text.dims()
        )
    }
    let logits = audio.matmul(&text.t()?)?.broadcast_mul(&logit_scale.exp()?)?; // [B audio, B text]
    let logits = match same {
        // -1e4 is out of every sum, and its gradient is 0 rather than NaN
        Some(same) => (logits + (same.to_dtype(audio.dtype())? * -1e4)?)?,
        None => logits,
    };
    let diagonal = Tensor::eye(batch, audio.dtype(), audio.device())?;
    let nll = |logits: &Tensor| -> Result<Tensor> {
        let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?; // [B, B]
        (log_p * &diagonal)?.sum_all()? * (-1.0 / batch as f64)
    };
    (nll(&logits)? + nll(&logits.t()?.contiguous()?)?)? * 0.5
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use dragon_testkit::{Golden, Tol, assert_close};

    const TOL: Tol = Tol { atol: 1e-4, rtol: 1e-3 }; // a tiny model end to end

    fn golden() -> (Golden, Clap) {
        let root = env!("CARGO_MANIFEST_DIR");
        let golden = Golden::read(format!("{root}/../../fixtures/dragon-encoders/clap/tiny.safetensors"));
        let params = Params::new(0);
        let model = Clap::new(&Config::tiny(), params.builder(DType::F32, &Device::Cpu)).unwrap();
        params.load_tensors(&golden.with_prefix("weights."), "").unwrap();
        (golden, model)
    }

    fn captions() -> Vec<String> {
        ["jig", "reel", "waltz", "slow air"]
            .iter()
            .map(|t| format!("a lively {t} on fiddle and flute"))
            .collect()
    }

    fn encoder(seed: u64) -> ClapEncoder {
        let tokenizer = Tokenizer::train(&captions(), 50).unwrap();
        ClapEncoder::new(&Config::tiny(), tokenizer, seed, &Device::Cpu).unwrap()
    }

    fn clip(pitch_hz: f32) -> Vec<f32> {
        (0..6000).map(|i| 0.4 * (std::f32::consts::TAU * pitch_hz * i as f32 / 8000.0).sin()).collect()
    }

    #[test]
    fn the_front_end_matches_laion_clap() {
        let (golden, model) = golden();
        let clips: Vec<Vec<f32>> = golden.get("clips").to_vec2().unwrap();
        let log_mel = LogMel::new(&model.config().audio).unwrap();
        let rows: Vec<f32> = clips.iter().flat_map(|c| log_mel.compute(c).unwrap()).collect();
        let want = golden.get("log_mel");
        let got = Tensor::from_vec(rows, want.dims(), &Device::Cpu).unwrap();
        // dB of f32 spectra: near the floor, where the second clip has died away, cancellation decides
        assert_close(&got, &want, Tol { atol: 2e-3, rtol: 1e-3 });
    }

    #[test]
    fn audio_branch_matches_laion_clap() {
        let (golden, model) = golden();
        let log_mel = golden.get("log_mel");
        assert_close(&model.audio_branch.forward(&log_mel).unwrap(), &golden.get("embedding"), TOL);
        assert_close(&model.embed_log_mel(&log_mel).unwrap(), &golden.get("audio_embedding"), TOL);
    }

    #[test]
    fn text_branch_matches_transformers() {
        let (golden, model) = golden();
        let (ids, mask) = (golden.get("ids"), golden.get("mask"));
        let states = model.text_branch.forward(&ids, &mask).unwrap();
        assert_close(&model.text_branch.pool(&states).unwrap(), &golden.get("pooled"), TOL);
        assert_close(&model.embed_tokens(&ids, &mask).unwrap(), &golden.get("text_embedding"), TOL);
    }

    #[test]
    fn the_loss_matches_pytorch_and_starts_at_ln_b_when_nothing_differs() {
        let (golden, model) = golden();
        let (audio, text) =
            (golden.get("audio_embedding"), golden.get("text_embedding").narrow(0, 0, 2).unwrap());
        let loss = contrastive_loss(&audio, &text, model.logit_scale(), None).unwrap();
        assert_close(&loss, &golden.get("loss"), Tol { atol: 1e-5, rtol: 1e-4 });
        let same = audio.narrow(0, 0, 1).unwrap().broadcast_as((2, 12)).unwrap().contiguous().unwrap();
        let loss =
            contrastive_loss(&same, &same, model.logit_scale(), None).unwrap().to_scalar::<f32>().unwrap();
        assert!((loss - 2f32.ln()).abs() < 1e-6, "{loss}");
    }

    #[test]
    fn texts_with_the_same_words_are_no_negatives() {
        let scale = Tensor::new(3f32, &Device::Cpu).unwrap();
        let rows = Tensor::new(&[[1f32, 0.], [1., 0.]], &Device::Cpu).unwrap();
        let same = Tensor::new(&[[0f32, 1.], [1., 0.]], &Device::Cpu).unwrap();
        let loss = contrastive_loss(&rows, &rows, &scale, Some(&same)).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(loss, 0.0);
    }

    #[test]
    fn the_gradient_of_the_loss_matches_finite_differences() {
        let rows = |seed: &str| {
            let mut rng = dragon_nn::Rng::from_key(seed, 0);
            rng.normal_tensor((4, 5), DType::F64, &Device::Cpu).unwrap()
        };
        let inputs = [rows("audio"), rows("text"), Tensor::new(0.7f64, &Device::Cpu).unwrap()];
        dragon_testkit::gradient_check(&inputs, Tol { atol: 1e-7, rtol: 1e-5 }, |t| {
            contrastive_loss(&unit_rows(&t[0])?, &unit_rows(&t[1])?, &t[2], None)
        })
        .unwrap();
    }

    #[test]
    fn every_trained_parameter_gets_a_gradient_and_the_statistics_get_none() {
        let encoder = encoder(5);
        let clips = [clip(300.0), clip(700.0), clip(1500.0), clip(2500.0)];
        let views: Vec<&[f32]> = clips.iter().map(Vec::as_slice).collect();
        let tokens = encoder.tokens(&captions()).unwrap();
        let audio = encoder.model.embed_log_mel(&encoder.log_mel(&views).unwrap()).unwrap();
        let text = encoder.model.embed_tokens(&tokens.ids, &tokens.mask).unwrap();
        let loss = contrastive_loss(&audio, &text, encoder.model.logit_scale(), None).unwrap();
        let grads = loss.backward().unwrap();
        for (name, var) in encoder.params.names_and_vars() {
            let size =
                grads.get(&var).map(|g| g.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
            if name.contains("running_") {
                assert!(size.is_none(), "`{name}` has a gradient");
            } else {
                let size = size.unwrap_or_else(|| panic!("`{name}` has no gradient"));
                // a bias on all keys moves no softmax: its gradient is rounding noise
                let moves = !name.ends_with("key.bias");
                assert!(size.is_finite() && (size > 0.0 || !moves), "`{name}`: gradient sum {size}");
            }
        }
    }

    #[test]
    fn a_clip_and_a_caption_embed_the_same_alone_and_in_a_batch() {
        let encoder = encoder(5);
        let clips = [clip(300.0), clip(700.0), clip(1500.0)];
        let views: Vec<&[f32]> = clips.iter().map(Vec::as_slice).collect();
        let together = encoder.embed_clips(&views).unwrap();
        assert_eq!(together[1], encoder.embed_clips(&views[1..2]).unwrap()[0]);
        let norm: f32 = together[1].iter().map(|x| x * x).sum();
        assert!((norm - 1.0).abs() < 1e-5, "{norm}");
        let texts = captions();
        assert_eq!(
            encoder.embed_captions(&texts).unwrap()[2],
            encoder.embed_captions(&texts[2..3]).unwrap()[0]
        );
    }

    #[test]
    fn a_saved_folder_gives_the_same_embeddings() {
        let folder = tempfile::tempdir().unwrap();
        let encoder = encoder(9);
        encoder.save(folder.path().join("clap")).unwrap();
        let read = ClapEncoder::load(folder.path().join("clap"), &Device::Cpu).unwrap();
        let clip = clip(500.0);
        assert_eq!(encoder.embed_clips(&[&clip]).unwrap(), read.embed_clips(&[&clip]).unwrap());
        assert_eq!(encoder.embed_captions(&captions()).unwrap(), read.embed_captions(&captions()).unwrap());
        assert!(read.id().starts_with("clap-") && read.id() != "clap-new");
    }

    #[test]
    fn broken_folders_and_empty_captions_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let message = |e: Error| e.to_string();
        let load = || ClapEncoder::load(folder.path(), &Device::Cpu).err().unwrap();
        assert!(message(load()).contains("config.json"));
        encoder(1).save(folder.path()).unwrap();
        std::fs::write(folder.path().join("config.json"), r#"{"joint": 3}"#).unwrap();
        assert!(message(load()).contains("unknown field `joint`"));
        let wider = Config { joint_dim: 14, ..Config::tiny() };
        let json = serde_json::to_string(&wider).unwrap();
        std::fs::write(folder.path().join("config.json"), json).unwrap();
        let text = message(load());
        assert!(text.contains("`audio_projection.2.weight`: expected [14, 14], found [12, 12]"), "{text}");
        let text = encoder(1).embed_captions(&["a jig", ""]).unwrap_err().to_string();
        assert!(text.starts_with("caption 1 is empty"), "{text}");
    }

    #[test]
    fn the_tiny_preset_keeps_its_size() {
        let params = Params::new(0);
        Clap::new(&Config::tiny_music(), params.builder(DType::F32, &Device::Cpu)).unwrap();
        let n = params.len_params();
        assert!(n < 1_500_000, "{n}");
        assert_eq!(Config::tiny_music().audio.n_frames(), Config::tiny_music().audio.image_frames());
    }
}
