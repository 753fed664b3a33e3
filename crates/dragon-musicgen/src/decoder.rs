//! The network: a decoder of pre-norm layers with self-attention and cross-attention to text states (reference: transformers
//! v4.57.6, `modeling_musicgen.py`, Apache-2.0; written from its formulas, no code taken).
//!
//! Differences from the reference: no dropout, inference only. Keys and values of earlier steps lie in buffers made once for the
//! whole piece; those of the text are computed once. A text has as many states as tokens: nothing is padded and masked. The
//! empty text of guidance, zeros without a mask in the reference, is a text of no tokens: its cross-attention is zero in both.
//! The products are [`dragon_nn::linear_few_rows`], the attention [`dragon_nn::attention_cached`], in which no row depends on
//! others: a piece is the same in every batch, and a sequence read at once gives what it gives step by step, bit for bit.
//! Golden tests: `logits_match_transformers`, `greedy_codes_match_transformers`.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use dragon_nn::{Embedding, LayerNorm, Linear, attention_cached, linear_few_rows};
use serde::{Deserialize, Serialize};

use crate::delay::Delay;

/// Hyperparameters of the decoder; names, and the values of keys that are left out, are those of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Codes of a codebook; the one after the last is the padding.
    pub vocab_size: usize,
    /// Codebooks.
    pub num_codebooks: usize,
    /// Width.
    pub hidden_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of each attention.
    pub num_attention_heads: usize,
    /// Hidden width of the feed-forward layers.
    pub ffn_dim: usize,
    /// Steps that the model may be asked for.
    pub max_position_embeddings: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self::small()
    }
}

impl Config {
    /// `facebook/musicgen-small`.
    pub fn small() -> Self {
        Self {
            vocab_size: 2048,
            num_codebooks: 4,
            hidden_size: 1024,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            ffn_dim: 4096,
            max_position_embeddings: 2048,
        }
    }

    /// `facebook/musicgen-medium`.
    pub fn medium() -> Self {
        Self {
            hidden_size: 1536,
            num_hidden_layers: 48,
            num_attention_heads: 24,
            ffn_dim: 6144,
            ..Self::small()
        }
    }

    /// `facebook/musicgen-large`.
    pub fn large() -> Self {
        Self {
            hidden_size: 2048,
            num_hidden_layers: 48,
            num_attention_heads: 32,
            ffn_dim: 8192,
            ..Self::small()
        }
    }

    /// The smallest valid model, for tests.
    pub fn tiny() -> Self {
        Self {
            vocab_size: 11,
            hidden_size: 8,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            ffn_dim: 12,
            max_position_embeddings: 64,
            ..Self::small()
        }
    }

    /// The code that stands where a codebook has none yet, or none any more.
    pub fn padding(&self) -> u32 {
        self.vocab_size as u32
    }

    /// The delay pattern of a piece.
    pub fn delay(&self, n_frames: usize) -> Delay {
        Delay { n_codebooks: self.num_codebooks, n_frames }
    }

    /// # Errors
    /// If a size is zero, or the width does not divide into heads and into pairs of sine and cosine.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            self.vocab_size,
            self.num_codebooks,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.ffn_dim,
            self.max_position_embeddings,
        ];
        if sizes.contains(&0) {
            candle_core::bail!("musicgen config: a size is 0: {self:?}")
        }
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        if width < 4 || !width.is_multiple_of(2) || !width.is_multiple_of(heads) {
            candle_core::bail!(
                "musicgen config: hidden_size {width} must be even, at least 4, and divide into {heads} heads"
            )
        }
        Ok(())
    }
}

/// States of texts: each row has its own number of tokens; what lies behind them means nothing.
#[derive(Debug, Clone)]
pub struct Texts {
    /// `[B, L, text width]`.
    pub states: Tensor,
    /// Tokens of each text.
    pub n_tokens: Vec<usize>,
}

/// Codes and text states to logits.
#[derive(Debug, Clone)]
pub struct MusicGen {
    config: Config,
    /// From the text's width to the decoder's; none where they are equal.
    projection: Option<Linear>,
    embeddings: Vec<Embedding>,
    layers: Vec<Layer>,
    norm: LayerNorm,
    heads: Vec<Tensor>,
    dtype: DType,
    device: Device,
}

impl MusicGen {
    /// Reads the weights under `vb`: `enc_to_dec_proj`, `decoder.model.decoder. …`, `decoder.lm_heads`, as in
    /// transformers' `MusicgenForConditionalGeneration`.
    ///
    /// # Errors
    /// If the config contradicts itself, or a tensor is missing or has another shape.
    pub fn new(config: &Config, text_width: usize, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let width = config.hidden_size;
        let projection = match text_width == width {
            true => None,
            false => Some(Linear::new(text_width, width, vb.pp("enc_to_dec_proj"))?),
        };
        let (heads, decoder) = (vb.pp("decoder.lm_heads"), vb.pp("decoder.model.decoder"));
        let embedding = |k| Embedding::new(config.vocab_size + 1, width, decoder.pp("embed_tokens").pp(k));
        Ok(Self {
            projection,
            embeddings: (0..config.num_codebooks).map(embedding).collect::<Result<_>>()?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::new(config, decoder.pp("layers").pp(i)))
                .collect::<Result<_>>()?,
            norm: LayerNorm::new(width, EPS, decoder.pp("layer_norm"))?,
            heads: (0..config.num_codebooks)
                .map(|k| matrix(width, config.vocab_size, heads.pp(k)))
                .collect::<Result<_>>()?,
            config: config.clone(),
            dtype: vb.dtype(),
            device: vb.device().clone(),
        })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the model lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Makes room for pieces of `n_steps` steps, one for each text; `guided` adds as many without a text behind them.
    ///
    /// # Errors
    /// If there is no text, their number or length does not fit, or there are more steps than the model can be asked for.
    pub fn start(&self, texts: &Texts, guided: bool, n_steps: usize) -> Result<State> {
        let (n_texts, n_states, _) = texts.states.dims3()?;
        if n_texts == 0 || texts.n_tokens.len() != n_texts || texts.n_tokens.iter().any(|&n| n > n_states) {
            candle_core::bail!(
                "musicgen: texts of {:?} tokens do not fit states {:?}",
                texts.n_tokens,
                texts.states.dims()
            )
        }
        if n_steps > self.config.max_position_embeddings {
            let most = self.config.max_position_embeddings;
            candle_core::bail!("musicgen: {n_steps} steps, the model has {most}")
        }
        let mut states = texts.states.to_dtype(self.dtype)?;
        if let Some(projection) = &self.projection {
            states = candle_core::Module::forward(projection, &states)?; // [B, L, D]
        }
        let copies = if guided { 2 } else { 1 };
        let mut n_tokens = texts.n_tokens.clone();
        n_tokens.resize(copies * n_texts, 0);
        let layers = self.layers.iter().map(|layer| layer.start(&states, copies, n_steps));
        Ok(State { layers: layers.collect::<Result<_>>()?, n_tokens, len: 0, most: n_steps })
    }

    /// Reads the next codes of every piece; gives the logits of those that follow each.
    ///
    /// # Shapes
    /// - `codes`: `[B, num_codebooks, T]` u32, delayed (see [`Delay`]), for the `B` pieces of `state`
    /// - returns `[B, num_codebooks, T, vocab_size]`.
    ///
    /// # Errors
    /// If the shape does not fit `state`, there is no room left, or a code is above the padding.
    pub fn forward(&self, codes: &Tensor, state: &mut State) -> Result<Tensor> {
        let (batch, n_codebooks, t) = codes.dims3()?;
        if batch != state.n_tokens.len() || n_codebooks != self.config.num_codebooks || t == 0 {
            let want = [state.n_tokens.len(), self.config.num_codebooks];
            candle_core::bail!("musicgen: codes {:?}, expected {want:?} and at least one step", codes.dims())
        }
        if state.len + t > state.most {
            candle_core::bail!("musicgen: {} steps in room for {}", state.len + t, state.most)
        }
        let mut h = positions(state.len, t, self.config.hidden_size, &self.device)?.to_dtype(self.dtype)?; // [T, D]
        for (k, embedding) in self.embeddings.iter().enumerate() {
            let ids = codes.narrow(1, k, 1)?.flatten_all()?;
            let rows = embedding.weight.index_select(&ids, 0)?.reshape((batch, t, ()))?;
            h = rows.broadcast_add(&h)?; // [B, T, D]
        }
        let past = state.len;
        let earlier: Vec<usize> = (0..batch).flat_map(|_| (past + 1)..=(past + t)).collect();
        let text: Vec<usize> = state.n_tokens.iter().flat_map(|&n| std::iter::repeat_n(n, t)).collect();
        for (layer, kept) in self.layers.iter().zip(&state.layers) {
            h = layer.forward(&h, kept, past, &earlier, &text)?;
        }
        state.len += t;
        let h = apply(&self.norm, &h)?;
        let logits: Vec<Tensor> =
            self.heads.iter().map(|head| linear_few_rows(&h, head)).collect::<Result<_>>()?;
        Tensor::stack(&logits, 1) // [B, K, T, V]
    }
}

/// What is kept of the pieces from step to step.
pub struct State {
    layers: Vec<Kept>,
    /// Text tokens that each piece sees.
    n_tokens: Vec<usize>,
    /// Steps read.
    len: usize,
    /// Steps there is room for.
    most: usize,
}

impl State {
    /// Pieces, those without a text included.
    pub fn batch(&self) -> usize {
        self.n_tokens.len()
    }
}

/// Keys and values of a layer, `[B, H, N, D/H]`.
struct Kept {
    keys: Tensor,
    values: Tensor,
    text_keys: Tensor,
    text_values: Tensor,
}

/// PyTorch's default, which the reference leaves.
const EPS: f64 = 1e-5;

fn matrix(n_in: usize, n_out: usize, vb: VarBuilder) -> Result<Tensor> {
    let stdev = (n_in as f64).powf(-0.5);
    vb.get_with_hints((n_out, n_in), "weight", Init::Randn { mean: 0.0, stdev })
}

fn apply(norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
    candle_core::Module::forward(norm, x)
}

/// Cosines, then sines, of the positions from `first` on: `[T, width]`; computed in f32, as the reference does.
fn positions(first: usize, t: usize, width: usize, device: &Device) -> Result<Tensor> {
    let half = width / 2;
    let step = (10_000f64.ln() / (half - 1) as f64) as f32;
    let frequency = |i: usize| (i as f32 * -step).exp();
    let row = |p: usize| {
        let angles = (0..half).map(move |i| p as f32 * frequency(i));
        angles.clone().map(f32::cos).chain(angles.map(f32::sin))
    };
    Tensor::from_vec((first..first + t).flat_map(row).collect::<Vec<f32>>(), (t, width), device)
}

#[derive(Debug, Clone)]
struct Attention {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    heads: usize,
}

impl Attention {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let get = |name: &str| matrix(config.hidden_size, config.hidden_size, vb.pp(name));
        Ok(Self {
            q: get("q_proj")?,
            k: get("k_proj")?,
            v: get("v_proj")?,
            out: get("out_proj")?,
            heads: config.num_attention_heads,
        })
    }

    /// Keys and values of `[B, T, D]`, each `[B, H, T, D/H]`.
    fn keys_and_values(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let heads_first = |weight: &Tensor| {
            let y = linear_few_rows(x, weight)?; // [B, T, D]
            let (batch, t, width) = y.dims3()?;
            y.reshape((batch, t, self.heads, width / self.heads))?.transpose(1, 2)?.contiguous()
        };
        Ok((heads_first(&self.k)?, heads_first(&self.v)?))
    }

    fn forward(&self, x: &Tensor, keys: &Tensor, values: &Tensor, seen: &[usize]) -> Result<Tensor> {
        let q = linear_few_rows(x, &self.q)?; // [B, T, D]
        let scale = (keys.dim(3)? as f64).powf(-0.5);
        linear_few_rows(&attention_cached(&q, keys, values, seen, scale)?, &self.out)
    }
}

/// Self-attention, cross-attention and feed-forward, each behind a norm and around a residual.
#[derive(Debug, Clone)]
struct Layer {
    self_norm: LayerNorm,
    self_attention: Attention,
    text_norm: LayerNorm,
    text_attention: Attention,
    norm: LayerNorm,
    fc1: Tensor,
    fc2: Tensor,
}

impl Layer {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let (width, hidden) = (config.hidden_size, config.ffn_dim);
        let norm = |name: &str| LayerNorm::new(width, EPS, vb.pp(name));
        Ok(Self {
            self_norm: norm("self_attn_layer_norm")?,
            self_attention: Attention::new(config, vb.pp("self_attn"))?,
            text_norm: norm("encoder_attn_layer_norm")?,
            text_attention: Attention::new(config, vb.pp("encoder_attn"))?,
            norm: norm("final_layer_norm")?,
            fc1: matrix(width, hidden, vb.pp("fc1"))?,
            fc2: matrix(hidden, width, vb.pp("fc2"))?,
        })
    }

    /// Room for `n_steps` steps, and keys and values of the texts; those of the copies without a text are zeros, never seen.
    fn start(&self, states: &Tensor, copies: usize, n_steps: usize) -> Result<Kept> {
        let (text_keys, text_values) = self.text_attention.keys_and_values(states)?; // [B, H, L, D/H]
        let (batch, heads, _, depth) = text_keys.dims4()?;
        let room = || {
            let shape = (copies * batch, heads, n_steps, depth);
            Tensor::zeros(shape, states.dtype(), states.device())
        };
        let with_copies =
            |x: Tensor| if copies == 1 { Ok(x) } else { Tensor::cat(&[&x, &x.zeros_like()?], 0) };
        Ok(Kept {
            keys: room()?,
            values: room()?,
            text_keys: with_copies(text_keys)?,
            text_values: with_copies(text_values)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        kept: &Kept,
        past: usize,
        earlier: &[usize],
        text: &[usize],
    ) -> Result<Tensor> {
        let h = apply(&self.self_norm, x)?; // [B, T, D]
        let (keys, values) = self.self_attention.keys_and_values(&h)?;
        kept.keys.slice_set(&keys, 2, past)?;
        kept.values.slice_set(&values, 2, past)?;
        let x = (x + self.self_attention.forward(&h, &kept.keys, &kept.values, earlier)?)?;
        let h = apply(&self.text_norm, &x)?;
        let x = (&x + self.text_attention.forward(&h, &kept.text_keys, &kept.text_values, text)?)?;
        let h = apply(&self.norm, &x)?;
        let hidden = dragon_nn::gelu(&linear_few_rows(&h, &self.fc1)?)?; // [B, T, ffn_dim]
        x + linear_few_rows(&hidden, &self.fc2)?
    }
}
