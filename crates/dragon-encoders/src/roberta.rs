//! RoBERTa encoder (Liu et al. 2019, arXiv:1907.11692): the text branch of LAION-CLAP.
//!
//! Tensor names are those of Hugging Face's `RobertaModel`, which LAION-CLAP checkpoints hold under `text_branch.`
//! (reference: transformers v4.57.6, `modeling_roberta.py`, Apache-2.0; written from its formulas, no code taken).
//! Differences from the reference: no dropout. Golden test: `text_branch_matches_transformers` in [`crate::clap`].

use crate::layers::{Dense, Norm, embed, padding_bias};
use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// Hyperparameters of [`Roberta`]; names are those of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Rows of the embedding table; at least the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the states.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads; a divisor of `hidden_size`.
    pub num_attention_heads: usize,
    /// Hidden width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Rows of the position table: the longest text plus `pad_token_id + 1`.
    pub max_position_embeddings: usize,
    /// Rows of the token type table; every token has type 0.
    pub type_vocab_size: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// Id of the padding token; positions count from the one after it.
    pub pad_token_id: u32,
}

impl Config {
    /// `roberta-base`, the text branch of every LAION-CLAP checkpoint.
    pub fn base() -> Self {
        Self {
            vocab_size: 50265,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            max_position_embeddings: 514,
            type_vocab_size: 1,
            layer_norm_eps: 1e-5,
            pad_token_id: 1,
        }
    }

    /// The text branch of the tiny CLAP: reads 48 tokens.
    pub fn tiny_music() -> Self {
        Self {
            vocab_size: 2000, // what `Tokenizer::train` is asked for
            hidden_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            intermediate_size: 384,
            max_position_embeddings: 50,
            ..Self::base()
        }
    }

    /// The longest text, in tokens.
    pub fn max_tokens(&self) -> usize {
        self.max_position_embeddings.saturating_sub(self.pad_token_id as usize + 1)
    }

    fn check(&self) -> Result<()> {
        if self.num_attention_heads == 0 || !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            candle_core::bail!(
                "roberta config: hidden_size {} is not a multiple of num_attention_heads {}",
                self.hidden_size,
                self.num_attention_heads
            )
        }
        if self.max_tokens() == 0
            || self.vocab_size <= self.pad_token_id as usize
            || self.type_vocab_size == 0
        {
            candle_core::bail!("roberta config: a table is too small: {self:?}")
        }
        Ok(())
    }
}

/// Deviation of new weights, as in the reference.
const INITIAL_STD: f64 = 0.02;

/// Token ids to states and a pooled vector.
#[derive(Debug, Clone)]
pub struct Roberta {
    config: Config,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    norm: Norm,
    blocks: Vec<Block>,
    pooler: Dense,
}

impl Roberta {
    /// Reads the weights under `vb` (`embeddings.…`, `encoder.layer.N.…`, `pooler.dense`).
    ///
    /// # Errors
    /// If the config contradicts itself, or a tensor is missing or has another shape.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let tables = vb.pp("embeddings");
        let table = |rows: usize, name: &str| {
            let init = Init::Randn { mean: 0.0, stdev: INITIAL_STD };
            tables.pp(name).get_with_hints((rows, config.hidden_size), "weight", init)
        };
        let width = config.hidden_size;
        Ok(Self {
            config: config.clone(),
            word: table(config.vocab_size, "word_embeddings")?,
            position: table(config.max_position_embeddings, "position_embeddings")?,
            token_type: table(config.type_vocab_size, "token_type_embeddings")?,
            norm: Norm::new(width, config.layer_norm_eps, tables.pp("LayerNorm"))?,
            blocks: (0..config.num_hidden_layers)
                .map(|i| Block::new(config, vb.pp("encoder").pp("layer").pp(i)))
                .collect::<Result<_>>()?,
            pooler: Dense::new(width, width, INITIAL_STD, vb.pp("pooler").pp("dense"))?,
        })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// States of all tokens.
    ///
    /// # Shapes
    /// - `ids`: `[B, L]` u32, padded with `pad_token_id`; `mask`: `[B, L]`, 1 on tokens, 0 on padding.
    /// - returns `[B, L, hidden_size]`; rows at padded places are finite and mean nothing.
    ///
    /// # Errors
    /// If the shapes differ, a text is longer than [`Config::max_tokens`], or an id is not below `vocab_size`.
    pub fn forward(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let len = ids.dim(1)?;
        if len > self.config.max_tokens() {
            candle_core::bail!("text of {len} tokens, the text branch reads {}", self.config.max_tokens())
        }
        let positions = self.positions(ids)?; // [B, L]
        let h = (embed(&self.word, ids)? + embed(&self.position, &positions)?)?; // [B, L, D]
        let mut h = self.norm.forward(&h.broadcast_add(&self.token_type.get(0)?)?)?; // [B, L, D]
        let bias = padding_bias(ids, mask, h.dtype())?; // [B, 1, 1, L]
        for block in &self.blocks {
            h = block.forward(&h, &bias)?; // [B, L, D]
        }
        Ok(h)
    }

    /// `tanh` of a linear map of the first token's state: `[B, L, hidden_size]` to `[B, hidden_size]`.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn pool(&self, states: &Tensor) -> Result<Tensor> {
        let first = states.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?; // [B, D]
        self.pooler.forward(&first)?.tanh()
    }

    /// Tokens count from `pad_token_id + 1`, padding stays at `pad_token_id`; told by the ids, not by the mask.
    fn positions(&self, ids: &Tensor) -> Result<Tensor> {
        let pad = self.config.pad_token_id;
        let rows = ids.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        let (batch, len) = ids.dims2()?;
        let mut positions = Vec::with_capacity(batch * len);
        for row in rows {
            let mut n_tokens = 0;
            positions.extend(row.into_iter().map(|id| {
                if id == pad {
                    return pad;
                }
                n_tokens += 1;
                pad + n_tokens
            }));
        }
        Tensor::from_vec(positions, (batch, len), ids.device())
    }
}

/// Self-attention and feed-forward, each followed by residual and norm.
#[derive(Debug, Clone)]
struct Block {
    query: Dense,
    key: Dense,
    value: Dense,
    attention_out: Dense,
    attention_norm: Norm,
    intermediate: Dense,
    out: Dense,
    norm: Norm,
    n_heads: usize,
}

impl Block {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let (width, hidden, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let attention = vb.pp("attention");
        let projection = |name: &str| Dense::new(width, width, INITIAL_STD, attention.pp("self").pp(name));
        Ok(Self {
            query: projection("query")?,
            key: projection("key")?,
            value: projection("value")?,
            attention_out: Dense::new(width, width, INITIAL_STD, attention.pp("output").pp("dense"))?,
            attention_norm: Norm::new(width, eps, attention.pp("output").pp("LayerNorm"))?,
            intermediate: Dense::new(width, hidden, INITIAL_STD, vb.pp("intermediate").pp("dense"))?,
            out: Dense::new(hidden, width, INITIAL_STD, vb.pp("output").pp("dense"))?,
            norm: Norm::new(width, eps, vb.pp("output").pp("LayerNorm"))?,
            n_heads: config.num_attention_heads,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (self.query.forward(x)?, self.key.forward(x)?, self.value.forward(x)?); // [B, L, D]
        let scale = ((x.dim(2)? / self.n_heads) as f64).powf(-0.5);
        let mixed = dragon_nn::attention(&q, &k, &v, self.n_heads, Some(bias), scale)?; // [B, L, D]
        let x = self.attention_norm.forward(&(self.attention_out.forward(&mixed)? + x)?)?; // [B, L, D]
        let h = dragon_nn::gelu(&self.intermediate.forward(&x)?)?; // [B, L, intermediate]
        self.norm.forward(&(self.out.forward(&h)? + &x)?) // [B, L, D]
    }
}
