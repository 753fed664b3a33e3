//! T5 encoder (Raffel et al. 2020, arXiv:1910.10683; v1.1 gated feed-forward: Shazeer 2020, arXiv:2002.05202).
//!
//! Reads Hugging Face checkpoints: `config.json`, `model.safetensors` with the names of `T5EncoderModel`
//! (reference: transformers v4.57.6, `modeling_t5.py`, Apache-2.0; written from its formulas, no code taken).
//! Differences from the reference: no dropout (the tiny model trains together with a denoiser that drops its text).
//! Golden tests: `relu_encoder_matches_transformers`, `gated_encoder_matches_transformers`; names and shapes of the
//! published sizes: `every_tensor_of_the_published_encoders_is_read`.

use crate::layers::{Dense, embed, index, padding_bias};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use dragon_nn::{Checkpoint, LoadError, Loader};
use std::path::{Path, PathBuf};

/// What goes wrong when a T5 is read from a folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.json` is missing or does not parse.
    #[error("T5 config `{}`: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        reason: String,
    },
    /// The weights do not fit.
    #[error(transparent)]
    Weights(#[from] LoadError),
    /// f16 was asked for, which this size overflows.
    #[error(
        "T5 `{}`: states of width {d_model} overflow in f16\nhint: take bf16 (as small) or f32", path.display()
    )]
    Half {
        /// The folder.
        path: PathBuf,
        /// Width of its states.
        d_model: usize,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Kind of feed-forward layer; the names are those of Hugging Face's `feed_forward_proj`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum FeedForwardKind {
    /// `wo(relu(wi(x)))`: the first T5.
    #[serde(rename = "relu")]
    Relu,
    /// `wo(gelu_tanh(wi_0(x)) * wi_1(x))`: T5 v1.1 and FLAN-T5.
    #[serde(rename = "gated-gelu")]
    GatedGelu,
}

/// Hyperparameters of [`T5Encoder`], with the names of Hugging Face's `config.json`. Keys that the encoder has no
/// use for (decoder, dropout, generation) are allowed in the file, since every published one has them.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Config {
    /// Rows of the embedding table; at least the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the states.
    pub d_model: usize,
    /// Width of one head; `num_heads * d_kv` need not be `d_model`.
    pub d_kv: usize,
    /// Hidden width of the feed-forward layer.
    pub d_ff: usize,
    /// Number of encoder blocks.
    pub num_layers: usize,
    /// Number of attention heads.
    pub num_heads: usize,
    /// Buckets of the relative position bias, both directions together.
    #[serde(default = "default_buckets")]
    pub relative_attention_num_buckets: usize,
    /// Distance in tokens from which all positions share the last bucket.
    #[serde(default = "default_max_distance")]
    pub relative_attention_max_distance: usize,
    /// Epsilon of the root mean square norms.
    pub layer_norm_epsilon: f64,
    /// Kind of feed-forward layer.
    #[serde(default = "default_feed_forward")]
    pub feed_forward_proj: FeedForwardKind,
}

/// Value of configs older than the key (T5 1.0).
fn default_feed_forward() -> FeedForwardKind {
    FeedForwardKind::Relu
}

/// Value of configs older than the key (T5 1.0).
fn default_buckets() -> usize {
    32
}

/// Value of configs older than the key (all T5 models use it).
fn default_max_distance() -> usize {
    128
}

impl Config {
    /// The text encoder of the tiny text-to-music model: 1.7 M parameters, read at 32 tokens.
    pub fn tiny_music() -> Self {
        Self {
            vocab_size: 2000, // what `Tokenizer::train` is asked for
            d_model: 192,     // the DiT's width: no projection in between
            d_kv: 48,
            d_ff: 384,
            num_layers: 3,
            num_heads: 4,
            relative_attention_num_buckets: 16, // a 32-token text has no distances beyond 31
            relative_attention_max_distance: 32,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: FeedForwardKind::GatedGelu,
        }
    }

    /// The smallest valid model, for tests.
    pub fn tiny() -> Self {
        Self {
            vocab_size: 40,
            d_model: 16,
            d_kv: 4,
            d_ff: 24,
            num_layers: 2,
            num_heads: 3,
            ..Self::tiny_music()
        }
    }

    /// # Errors
    /// If a size is zero or the bucket count is not a multiple of 4 (half per direction, half of those exact).
    fn check(&self) -> Result<()> {
        let sizes = [self.vocab_size, self.d_model, self.d_kv, self.d_ff, self.num_layers, self.num_heads];
        if sizes.contains(&0) {
            candle_core::bail!("t5 config: a size is 0: {self:?}")
        }
        let buckets = self.relative_attention_num_buckets;
        if buckets == 0 || !buckets.is_multiple_of(4) || self.relative_attention_max_distance <= buckets / 4 {
            candle_core::bail!(
                "t5 config: relative_attention_num_buckets {buckets} must be a multiple of 4 and \
                 relative_attention_max_distance {} above a quarter of it",
                self.relative_attention_max_distance
            )
        }
        Ok(())
    }
}

/// Token ids to text states.
#[derive(Debug, Clone)]
pub struct T5Encoder {
    config: Config,
    embedding: Tensor,
    relative_bias: Tensor,
    blocks: Vec<Block>,
    final_norm: Tensor,
}

impl T5Encoder {
    /// Reads the weights under `vb` (`shared.weight`, `encoder.block.N. …`, `encoder.final_layer_norm.weight`).
    ///
    /// New weights are drawn as the reference draws them: attention has no `1/sqrt(d_kv)`, so the query weights
    /// carry it in their deviation.
    ///
    /// # Errors
    /// If the config contradicts itself, or a tensor is missing or has another shape.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let normal = |stdev: f64| Init::Randn { mean: 0.0, stdev };
        let encoder = vb.pp("encoder");
        let first =
            encoder.pp("block").pp(0).pp("layer").pp(0).pp("SelfAttention").pp("relative_attention_bias");
        let table = (config.relative_attention_num_buckets, config.num_heads);
        Ok(Self {
            config: config.clone(),
            embedding: vb.pp("shared").get_with_hints(
                (config.vocab_size, config.d_model),
                "weight",
                normal(1.0),
            )?,
            relative_bias: first.get_with_hints(
                table,
                "weight",
                normal((config.d_model as f64).powf(-0.5)),
            )?,
            blocks: (0..config.num_layers)
                .map(|i| Block::new(config, encoder.pp("block").pp(i).pp("layer")))
                .collect::<Result<_>>()?,
            final_norm: norm_weight(config, encoder.pp("final_layer_norm"))?,
        })
    }

    /// Reads the encoder of a Hugging Face folder: `config.json` and `model.safetensors` (also in parts) or
    /// `pytorch_model.bin`, of an encoder alone or of a whole T5 (t5-small to flan-t5-xxl); the weights are frozen.
    ///
    /// # Errors
    /// If a file is missing or broken, weights and config do not fit (every tensor in question is listed), or `dtype`
    /// is f16 for a model of the width of `large` or above: its states leave f16's range.
    pub fn load(folder: impl AsRef<Path>, dtype: DType, device: &Device) -> std::result::Result<Self, Error> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let fail = |reason: String| Error::Config { path: path.clone(), reason };
        let text = std::fs::read_to_string(&path).map_err(|e| fail(e.to_string()))?;
        let config: Config = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
        if dtype == DType::F16 && config.d_model >= LARGE {
            return Err(Error::Half { path: folder.into(), d_model: config.d_model });
        }
        let loader = loader(Checkpoint::open(folder)?);
        let encoder = Self::new(&config, loader.builder(dtype, device))?;
        loader.finish(is_unneeded)?;
        Ok(encoder)
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Text states.
    ///
    /// # Shapes
    /// - `ids`: `[B, L]` u32 token ids, padded; `mask`: `[B, L]`, 1 on tokens, 0 on padding. Each row needs a token.
    /// - returns `[B, L, d_model]`; rows at padded places are finite and mean nothing.
    ///
    /// # Errors
    /// If the shapes differ, or an id is not below `vocab_size`.
    pub fn forward(&self, ids: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let mut h = embed(&self.embedding, ids)?; // [B, L, d_model]
        let padding = padding_bias(ids, mask, h.dtype())?; // [B, 1, 1, L]
        let bias = self.position_bias(ids.dim(1)?)?.broadcast_add(&padding)?; // [B, H, L, L]
        for block in &self.blocks {
            h = block.forward(&h, &bias)?; // [B, L, d_model]
        }
        dragon_nn::rms_norm(&h, Some(&self.final_norm), self.config.layer_norm_epsilon)
    }

    /// `[1, H, L, L]`: the learned bias of (query, key) by the bucket of `key - query`; all blocks share it.
    fn position_bias(&self, len: usize) -> Result<Tensor> {
        let buckets = self.config.relative_attention_num_buckets;
        let far = self.config.relative_attention_max_distance;
        let pairs = (0..len as i64).flat_map(|query| (0..len as i64).map(move |key| key - query));
        let ids =
            index(pairs.map(|delta| bucket(delta, buckets, far)).collect(), self.relative_bias.device())?;
        let rows = self.relative_bias.index_select(&ids, 0)?; // [L*L, H]
        rows.t()?.contiguous()?.reshape((1, self.config.num_heads, len, len)) // [1, H, L, L]
    }
}

/// Width of the states from which on f16 overflows: that of `large`.
const LARGE: usize = 1024;

/// A loader for both names of the embedding table: `encoder.embed_tokens.weight` stands alone in some files of encoders.
fn loader(checkpoint: Checkpoint) -> Loader {
    const SHARED: &str = "shared.weight";
    let name = if checkpoint.shape(SHARED).is_some() { SHARED } else { "encoder.embed_tokens.weight" };
    let name = if checkpoint.shape(name).is_some() { name } else { SHARED };
    Loader::new(checkpoint, move |ours| vec![if ours == SHARED { name.into() } else { ours.to_string() }])
}

/// Whether a tensor belongs to the decoder, or is the embedding table once more.
fn is_unneeded(name: &str) -> bool {
    name.starts_with("decoder.") || ["lm_head.weight", "encoder.embed_tokens.weight"].contains(&name)
}

/// Bucket of a relative position (key - query): a half of the buckets for each direction; in a half, the first half
/// is exact and the rest grows with the logarithm up to `max_distance`.
fn bucket(delta: i64, n_buckets: usize, max_distance: usize) -> u32 {
    let half = n_buckets / 2;
    let exact = half / 2;
    let distance = delta.unsigned_abs() as usize;
    let within = if distance < exact {
        distance
    } else {
        // f32 like the reference: at distances that are powers of `exact` the rounding decides the bucket.
        let position =
            (distance as f32 / exact as f32).ln() / (max_distance as f64 / exact as f64).ln() as f32;
        (exact + (position * (half - exact) as f32) as usize).min(half - 1)
    };
    (within + if delta > 0 { half } else { 0 }) as u32
}

fn norm_weight(config: &Config, vb: VarBuilder) -> Result<Tensor> {
    vb.get_with_hints(config.d_model, "weight", Init::Const(1.0))
}

/// Self-attention and feed-forward, each behind a norm and around a residual.
#[derive(Debug, Clone)]
struct Block {
    attention_norm: Tensor,
    q: Dense,
    k: Dense,
    v: Dense,
    o: Dense,
    feed_forward_norm: Tensor,
    feed_forward: FeedForward,
    num_heads: usize,
    eps: f64,
}

impl Block {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let (d_model, inner) = (config.d_model, config.num_heads * config.d_kv);
        let std_in = (d_model as f64).powf(-0.5);
        let attention = vb.pp(0).pp("SelfAttention");
        let std_q = ((d_model * config.d_kv) as f64).powf(-0.5);
        Ok(Self {
            attention_norm: norm_weight(config, vb.pp(0).pp("layer_norm"))?,
            q: Dense::no_bias(d_model, inner, std_q, attention.pp("q"))?,
            k: Dense::no_bias(d_model, inner, std_in, attention.pp("k"))?,
            v: Dense::no_bias(d_model, inner, std_in, attention.pp("v"))?,
            o: Dense::no_bias(inner, d_model, (inner as f64).powf(-0.5), attention.pp("o"))?,
            feed_forward_norm: norm_weight(config, vb.pp(1).pp("layer_norm"))?,
            feed_forward: FeedForward::new(config, vb.pp(1).pp("DenseReluDense"))?,
            num_heads: config.num_heads,
            eps: config.layer_norm_epsilon,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let h = dragon_nn::rms_norm(x, Some(&self.attention_norm), self.eps)?; // [B, L, d_model]
        let (q, k, v) = (self.q.forward(&h)?, self.k.forward(&h)?, self.v.forward(&h)?); // [B, L, H*d_kv]
        let mixed = dragon_nn::attention(&q, &k, &v, self.num_heads, Some(bias), 1.0)?; // [B, L, H*d_kv]
        let x = (x + self.o.forward(&mixed)?)?; // [B, L, d_model]
        let h = dragon_nn::rms_norm(&x, Some(&self.feed_forward_norm), self.eps)?;
        &x + self.feed_forward.forward(&h)?
    }
}

#[derive(Debug, Clone)]
enum FeedForward {
    Relu { wi: Dense, wo: Dense },
    GatedGelu { wi_0: Dense, wi_1: Dense, wo: Dense },
}

impl FeedForward {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let (d_model, d_ff) = (config.d_model, config.d_ff);
        let wide = |name: &str| Dense::no_bias(d_model, d_ff, (d_model as f64).powf(-0.5), vb.pp(name));
        let wo = Dense::no_bias(d_ff, d_model, (d_ff as f64).powf(-0.5), vb.pp("wo"))?;
        Ok(match config.feed_forward_proj {
            FeedForwardKind::Relu => Self::Relu { wi: wide("wi")?, wo },
            FeedForwardKind::GatedGelu => Self::GatedGelu { wi_0: wide("wi_0")?, wi_1: wide("wi_1")?, wo },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Relu { wi, wo } => wo.forward(&dragon_nn::relu(&wi.forward(x)?)?),
            Self::GatedGelu { wi_0, wi_1, wo } => {
                wo.forward(&(dragon_nn::gelu_tanh(&wi_0.forward(x)?)? * wi_1.forward(x)?)?)
            }
        }
    }
}

/// Mean of the states over the tokens of each text: `states` `[B, L, D]`, `mask` `[B, L]`; returns `[B, D]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn mean_over_tokens(states: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mask = mask.to_dtype(states.dtype())?; // [B, L]
    let sum = states.broadcast_mul(&mask.unsqueeze(D::Minus1)?)?.sum(1)?; // [B, D]
    sum.broadcast_div(&mask.sum_keepdim(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use dragon_testkit::{Golden, Tol, assert_close};

    fn golden(name: &str, feed_forward_proj: FeedForwardKind) {
        let golden = Golden::fixture(format!("dragon-encoders/t5/{name}.safetensors"));
        let config = Config {
            vocab_size: 60,
            d_model: 24,
            d_kv: 10,
            d_ff: 40,
            num_layers: 3,
            num_heads: 3,
            relative_attention_num_buckets: 8,
            relative_attention_max_distance: 12,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj,
        };
        let params = dragon_nn::Params::new(0);
        let encoder = T5Encoder::new(&config, params.builder(DType::F32, &Device::Cpu)).unwrap();
        params.load_tensors(&golden.with_prefix("weights."), "").unwrap();
        let mask = golden.get("mask");
        let got = encoder.forward(&golden.get("ids"), &mask).unwrap();
        let real = mask.to_dtype(DType::F32).unwrap().unsqueeze(2).unwrap();
        let masked = |t: &Tensor| t.broadcast_mul(&real).unwrap(); // padded places mean nothing
        assert_close(&masked(&got), &masked(&golden.get("states")), Tol { atol: 1e-4, rtol: 1e-3 });
    }

    #[test]
    fn relu_encoder_matches_transformers() {
        golden("relu", FeedForwardKind::Relu);
    }

    #[test]
    fn gated_encoder_matches_transformers() {
        golden("gated", FeedForwardKind::GatedGelu);
    }

    #[test]
    fn half_precision_stays_close() {
        for kind in [FeedForwardKind::Relu, FeedForwardKind::GatedGelu] {
            let name = if kind == FeedForwardKind::Relu { "relu" } else { "gated" };
            let golden = Golden::fixture(format!("dragon-encoders/t5/{name}.safetensors"));
            let dir = folder(name);
            let encoder = T5Encoder::load(dir.path(), DType::BF16, &Device::Cpu).unwrap();
            let states = encoder.forward(&golden.get("ids"), &golden.get("mask")).unwrap();
            assert_eq!(states.dtype(), DType::BF16);
            let mask = golden.get("mask");
            let mean = |t: &Tensor| mean_over_tokens(&t.to_dtype(DType::F32).unwrap(), &mask).unwrap();
            let error = (mean(&states) - mean(&golden.get("states"))).unwrap();
            let rms = error.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            // PyTorch's bf16 is 0.021 and 0.022 from its f32: the weights are four times as large as usual
            assert!(rms < 0.035, "{name}: {rms}");
        }
    }

    /// A Hugging Face folder with the weights of a fixture.
    fn folder(name: &str) -> tempfile::TempDir {
        let golden = Golden::fixture(format!("dragon-encoders/t5/{name}.safetensors"));
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            vocab_size: 60,
            d_model: 24,
            d_kv: 10,
            d_ff: 40,
            num_layers: 3,
            num_heads: 3,
            relative_attention_num_buckets: 8,
            relative_attention_max_distance: 12,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: match name {
                "relu" => FeedForwardKind::Relu,
                _ => FeedForwardKind::GatedGelu,
            },
        };
        std::fs::write(dir.path().join("config.json"), serde_json::to_string(&config).unwrap()).unwrap();
        let tensors = golden.with_prefix("weights.");
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        dir
    }

    #[test]
    fn a_folder_of_hugging_face_gives_the_states_of_transformers() {
        let golden = Golden::fixture("dragon-encoders/t5/gated.safetensors");
        let dir = folder("gated");
        let states = |dir: &Path| {
            let encoder = T5Encoder::load(dir, DType::F32, &Device::Cpu).unwrap();
            let mask = golden.get("mask");
            mean_over_tokens(&encoder.forward(&golden.get("ids"), &mask).unwrap(), &mask).unwrap()
        };
        let want = mean_over_tokens(&golden.get("states"), &golden.get("mask")).unwrap();
        assert_close(&states(dir.path()), &want, Tol { atol: 1e-4, rtol: 1e-3 });
        // the table under its other name, and a decoder beside
        let path = dir.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let table = tensors.remove("shared.weight").unwrap();
        tensors.insert("decoder.block.0.layer.0.SelfAttention.q.weight".into(), table.clone());
        tensors.insert("encoder.embed_tokens.weight".into(), table);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        assert_close(&states(dir.path()), &want, Tol { atol: 1e-4, rtol: 1e-3 });
        // what does not fit is listed
        tensors.remove("encoder.final_layer_norm.weight").unwrap();
        tensors.insert("adapter.weight".into(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let message = T5Encoder::load(dir.path(), DType::F32, &Device::Cpu).unwrap_err().to_string();
        for part in ["`encoder.final_layer_norm.weight`: missing", "`adapter.weight`: not used"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn f16_is_refused_where_it_overflows() {
        let dir = folder("gated");
        T5Encoder::load(dir.path(), DType::F16, &Device::Cpu).unwrap();
        let path = dir.path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap().replace("\"d_model\":24", "\"d_model\":1024");
        std::fs::write(&path, text).unwrap();
        let message = T5Encoder::load(dir.path(), DType::F16, &Device::Cpu).unwrap_err().to_string();
        assert!(message.contains("overflow in f16") && message.contains("hint: take bf16"), "{message}");
    }

    #[test]
    fn every_tensor_of_the_published_encoders_is_read() {
        for name in ["t5-small", "t5-base", "t5-large", "flan-t5-small", "flan-t5-base", "flan-t5-large"] {
            let read = |ending: &str| {
                let path = dragon_testkit::fixture(format!("dragon-encoders/t5/{name}.{ending}"));
                std::fs::read_to_string(path).unwrap()
            };
            let config: Config = serde_json::from_str(&read("json")).unwrap();
            let shapes = read("shapes");
            let shapes = shapes.lines().map(|line| {
                let (name, sizes) = line.split_once('\t').unwrap();
                (name.to_string(), sizes.split(',').map(|s| s.parse().unwrap()).collect())
            });
            let loader = loader(Checkpoint::without_data(shapes));
            T5Encoder::new(&config, loader.builder(DType::F32, &Device::Cpu)).unwrap();
            loader.finish(is_unneeded).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    #[test]
    fn a_config_of_hugging_face_reads_with_its_extra_keys() {
        let text = r#"{"architectures": ["T5EncoderModel"], "d_ff": 1024, "d_kv": 64, "d_model": 512,
            "dropout_rate": 0.1, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06, "num_heads": 6,
            "num_layers": 8, "vocab_size": 32128, "relative_attention_num_buckets": 32}"#;
        let config: Config = serde_json::from_str(text).unwrap();
        assert_eq!(config.relative_attention_max_distance, 128);
        assert_eq!(config.feed_forward_proj, FeedForwardKind::GatedGelu);
    }

    #[test]
    fn padding_does_not_change_the_states_of_the_tokens() {
        let params = dragon_nn::Params::new(7);
        let encoder = T5Encoder::new(&Config::tiny(), params.builder(DType::F32, &Device::Cpu)).unwrap();
        let run = |ids: &[u32], mask: &[f32]| {
            let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
            let mask = Tensor::from_slice(mask, (1, mask.len()), &Device::Cpu).unwrap();
            encoder.forward(&ids, &mask).unwrap().narrow(1, 0, 3).unwrap()
        };
        let short = run(&[0, 5, 2], &[1., 1., 1.]);
        let long = run(&[0, 5, 2, 1, 1, 1], &[1., 1., 1., 0., 0., 0.]);
        assert_close(&long, &short, Tol { atol: 1e-5, rtol: 1e-4 });
    }

    #[test]
    fn every_parameter_gets_a_gradient() {
        for kind in [FeedForwardKind::Relu, FeedForwardKind::GatedGelu] {
            let params = dragon_nn::Params::new(3);
            let config = Config { feed_forward_proj: kind, ..Config::tiny() };
            let encoder = T5Encoder::new(&config, params.builder(DType::F32, &Device::Cpu)).unwrap();
            let ids = Tensor::from_slice(&[0u32, 5, 9, 2, 0, 7, 2, 1], (2, 4), &Device::Cpu).unwrap();
            let mask = Tensor::from_slice(&[1f32, 1., 1., 1., 1., 1., 1., 0.], (2, 4), &Device::Cpu).unwrap();
            let pooled = mean_over_tokens(&encoder.forward(&ids, &mask).unwrap(), &mask).unwrap();
            let weights = Tensor::arange(0f32, 32f32, &Device::Cpu).unwrap().reshape((2, 16)).unwrap();
            let grads = (pooled * weights).unwrap().sum_all().unwrap().backward().unwrap();
            for (name, var) in params.names_and_vars() {
                let grad = grads.get(&var).unwrap_or_else(|| panic!("`{name}` has no gradient"));
                let size = grad.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(size.is_finite() && size > 0.0, "`{name}`: gradient sum {size}");
            }
        }
    }

    #[test]
    fn an_id_beyond_the_vocabulary_is_an_error() {
        let params = dragon_nn::Params::new(3);
        let encoder = T5Encoder::new(&Config::tiny(), params.builder(DType::F32, &Device::Cpu)).unwrap();
        let ids = Tensor::from_slice(&[0u32, 99], (1, 2), &Device::Cpu).unwrap();
        let mask = Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap();
        assert!(encoder.forward(&ids, &mask).is_err());
    }
}
