//! CLAP: contrastive language-audio pre-training (Wu et al. 2023, arXiv:2211.06687) in the structure of LAION-CLAP.
//!
//! HTS-AT and RoBERTa, a two-layer head each, unit-length embeddings in one space. Reference: LAION-AI/CLAP@46cce9a,
//! `clap_module/model.py` (CC0), without fusion; tensor names are those of its checkpoints after `module.`. Of these
//! `audio_transform`, `text_transform` and `logit_scale_t` are not read: the embeddings do not pass through them.
//! Golden tests: `audio_branch_matches_laion_clap`, `text_branch_matches_transformers`.
//!
//! The model and its loss are here; `encoder` is the model with its tokenizer and front end; `published` knows the
//! layouts in which it lies on disk.

mod encoder;
mod published;
#[cfg(test)]
mod tests;

pub use encoder::{COLLAPSED_COSINE, ClapEncoder, Error};
pub use published::files;

use crate::htsat::{self, Htsat};
use crate::layers::Dense;
use crate::roberta::{self, Roberta};
use candle_core::{D, Result, Tensor};
use candle_nn::{Init, VarBuilder};

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

    /// Embeddings of log-mel spectrograms: `[B, n_frames, mel_bins]` dB (from [`LogMel`](crate::htsat::LogMel)) to `[B, joint_dim]`, rows of
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
