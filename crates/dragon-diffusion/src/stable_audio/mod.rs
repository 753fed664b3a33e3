//! The diffusion transformer of Stable Audio Open 1.0 (Evans et al. 2024, arXiv:2407.14358), its number conditioners and
//! its preconditioning.
//!
//! References: diffusers 0.42 (Apache-2.0), `StableAudioDiTModel`, `StableAudioProjectionModel` and
//! `CosineDPMSolverMultistepScheduler`; stable-audio-tools 0.0.19 (MIT), `models/dit.py`. Tensors have diffusers' names;
//! [`published`] leads to those of stable-audio-tools. Golden tests: `tests/stable_audio.rs`.
//!
//! In short: a token for the noise level and the numbers comes before the latent frames; each block is self-attention with
//! rotary positions, attention to the texts and numbers, and a SwiGLU layer, all with layer norms before them and no
//! modulation. The network predicts the velocity `v`, which is EDM preconditioning with `-c_out` and another `c_noise`.

pub mod published;

use crate::dit::TextCond;
use crate::edm::Edm;
use crate::model::{Denoise, DiffusionModel};
use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::{Module, VarBuilder};
use dragon_nn::{LayerNorm, Linear, Rotary};
use serde::{Deserialize, Serialize};

/// Epsilon of all layer norms.
const NORM_EPS: f64 = 1e-5;
/// Base of the rotary angles.
const ROTARY_BASE: f64 = 10_000.0;

/// Hyperparameters of [`StableAudioDit`] and [`NumberConditioners`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Blocks.
    pub depth: usize,
    /// Heads of the self-attention, and of the queries to the texts.
    pub heads: usize,
    /// Width of a head; half of it turns with the position.
    pub head_dim: usize,
    /// Heads of the texts' keys and values, a divisor of `heads`: each serves `heads / text_heads` heads of queries.
    pub text_heads: usize,
    /// Width of a condition: a text state, a number.
    pub cond_dim: usize,
    /// Width of the conditions as the blocks see them.
    pub cross_dim: usize,
    /// Fourier features of the noise level, an even number.
    pub time_features: usize,
    /// Largest number of seconds the conditioners tell apart; larger ones count as this.
    pub max_seconds: f64,
}

impl Config {
    /// Stable Audio Open 1.0: 24 blocks of width 1536, 1057 M parameters (without the number conditioners).
    pub fn stable_audio_open() -> Self {
        Self {
            latent_channels: 64,
            depth: 24,
            heads: 24,
            head_dim: 64,
            text_heads: 12,
            cond_dim: 768,
            cross_dim: 768,
            time_features: 256,
            max_seconds: 512.0,
        }
    }

    /// Width of the blocks.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Says what is wrong with the config, if anything.
    ///
    /// # Errors
    /// If a number is 0, or does not divide another as its documentation says.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("latent_channels", self.latent_channels),
            ("depth", self.depth),
            ("heads", self.heads),
            ("head_dim", self.head_dim),
            ("text_heads", self.text_heads),
            ("cond_dim", self.cond_dim),
            ("cross_dim", self.cross_dim),
            ("time_features", self.time_features),
        ];
        for (name, value) in positive {
            if value == 0 {
                bail!("`{name}`: expected at least 1, found 0");
            }
        }
        if !self.heads.is_multiple_of(self.text_heads) {
            bail!("`text_heads`: expected a divisor of `heads`, {}, found {}", self.heads, self.text_heads);
        }
        if !self.time_features.is_multiple_of(2) || !self.head_dim.is_multiple_of(4) {
            bail!(
                "expected an even `time_features` and a `head_dim` that is a multiple of 4, found {} and {}",
                self.time_features,
                self.head_dim
            );
        }
        Ok(())
    }
}

/// Network and number conditioners as a denoiser: `D(x; sigma) = c_skip x - c_out v(c_in x, t)` with the coefficients of
/// EDM at `sigma_data` 1 ([`crate::Edm::precondition`]) and `t = atan(sigma) 2/pi`.
pub struct StableAudio {
    /// The network `v`.
    pub dit: StableAudioDit,
    /// Seconds to tokens.
    pub numbers: NumberConditioners,
    /// Length of the pieces that the network is told.
    pub seconds: f64,
}

impl StableAudio {
    /// Latents of unit variance; the published sampler's lowest and highest noise level; mean and deviation of `ln sigma` in
    /// training, where `sigma` was the tangent of an angle that is uniform in (0, pi/2).
    pub const EDM: Edm = Edm {
        sigma_data: 1.0,
        p_mean: 0.0,
        p_std: std::f64::consts::FRAC_PI_2,
        sigma_min: 0.3,
        sigma_max: 500.0,
        rho: 1.0, // its schedule is another: see `schedule`
    };

    /// Reads the network under `vb`, in diffusers' names.
    ///
    /// # Errors
    /// If the config contradicts itself, or a tensor is missing or misshapen.
    pub fn new(cfg: &Config, vb: VarBuilder, numbers: NumberConditioners, seconds: f64) -> Result<Self> {
        Ok(Self { dit: StableAudioDit::new(cfg, vb)?, numbers, seconds })
    }

    /// The denoised estimates of a batch with a noise level for each example. Carries gradients.
    ///
    /// # Shapes
    /// - `x`: `[B, C, T]`, `x0 + sigma * n`; `sigmas`: `B` levels above 0. Returns `[B, C, T]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn denoise_with(&self, x: &Tensor, sigmas: &[f64], context: &Context) -> Result<Tensor> {
        let batch = x.dim(0)?;
        if sigmas.len() != batch {
            bail!("expected one noise level for each of {batch} examples, found {}", sigmas.len());
        }
        let column = |f: &dyn Fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = sigmas.iter().map(|&sigma| f(sigma)).collect();
            Tensor::from_vec(values, (batch, 1, 1), &Device::Cpu)?.to_device(x.device())?.to_dtype(x.dtype())
        };
        let total = |sigma: f64| sigma * sigma + 1.0;
        let t = column(&|sigma| sigma.atan() * std::f64::consts::FRAC_2_PI)?.reshape(batch)?;
        let scaled = x.broadcast_mul(&column(&|sigma| total(sigma).sqrt().recip())?)?;
        let v = self.dit.forward(&scaled, &t, context)?;
        let kept = x.broadcast_mul(&column(&|sigma| total(sigma).recip())?)?;
        kept - v.broadcast_mul(&column(&|sigma| sigma / total(sigma).sqrt())?)?
    }

    /// What the network is told of a batch of texts: their states, and that each piece is whole and lasts [`Self::seconds`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn conditions(&self, cond: &TextCond) -> Result<Conditions> {
        let seconds = vec![(0.0, self.seconds); cond.states.dim(0)?];
        self.numbers.conditions(&cond.states, &cond.mask, &seconds)
    }

    fn prepared(&self, conditions: &Conditions, n_frames: usize) -> Result<Denoise<'_>> {
        let context = self.dit.context(conditions, n_frames)?;
        Ok(Box::new(move |x, sigmas| self.denoise_with(x, sigmas, &context)))
    }
}

impl DiffusionModel for StableAudio {
    fn edm(&self) -> &Edm {
        &Self::EDM
    }

    /// Evenly spaced logarithms, then 0: the published sampler's.
    fn schedule(&self, n_steps: usize) -> Vec<f64> {
        let (low, high) = (Self::EDM.sigma_min.ln(), Self::EDM.sigma_max.ln());
        let last = n_steps.saturating_sub(1).max(1) as f64;
        let levels = (0..n_steps).map(|i| (high + i as f64 / last * (low - high)).exp());
        levels.chain(std::iter::once(0.0)).collect()
    }

    /// That of noisy latents of unit variance.
    fn start_deviation(&self, sigma: f64) -> f64 {
        (sigma.powi(2) + 1.0).sqrt()
    }

    fn with_texts(&self, cond: &TextCond, drop: Option<&[bool]>, n_frames: usize) -> Result<Denoise<'_>> {
        let conditions = self.conditions(cond)?;
        let Some(drop) = drop else { return self.prepared(&conditions, n_frames) };
        let batch = cond.states.dim(0)?;
        if drop.len() != batch {
            bail!("expected one drop flag for each of {batch} examples, found {}", drop.len());
        }
        let kept: Vec<f32> = drop.iter().map(|&drop| if drop { 0.0 } else { 1.0 }).collect();
        let kept = Tensor::from_vec(kept, (batch, 1, 1), cond.states.device())?;
        let tokens = conditions.tokens.broadcast_mul(&kept.to_dtype(conditions.tokens.dtype())?)?;
        self.prepared(&Conditions { tokens, ..conditions }, n_frames)
    }

    /// The tokens are zeros, those of the numbers too; the numbers still come before the frames.
    fn without_texts(&self, cond: &TextCond, n_frames: usize) -> Result<Denoise<'_>> {
        let conditions = self.conditions(cond)?;
        self.prepared(&Conditions { tokens: conditions.tokens.zeros_like()?, ..conditions }, n_frames)
    }
}

/// What a generation is told: texts and numbers.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// Text states, zero at padded places, then one token for each number, `[B, L + 2, cond_dim]`.
    pub tokens: Tensor,
    /// The numbers' tokens side by side, `[B, 2 * cond_dim]`.
    pub global: Tensor,
}

/// Seconds of silence before the piece in the longer one it was cut from (`seconds_start`) and length of that
/// (`seconds_total`), as tokens. For whole pieces: 0 and the length.
#[derive(Debug, Clone)]
pub struct NumberConditioners {
    start: NumberConditioner,
    total: NumberConditioner,
    max_seconds: f64,
}

impl NumberConditioners {
    /// Reads `start_number_conditioner` and `end_number_conditioner`.
    ///
    /// # Errors
    /// If tensors are missing or misshapen.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        Ok(Self {
            start: NumberConditioner::new(cfg.cond_dim, vb.pp("start_number_conditioner"))?,
            total: NumberConditioner::new(cfg.cond_dim, vb.pp("end_number_conditioner"))?,
            max_seconds: cfg.max_seconds,
        })
    }

    /// Conditions of a batch.
    ///
    /// # Shapes
    /// - `states`: `[B, L, cond_dim]`, `mask`: `[B, L]`, 1 for a token and 0 for padding; `seconds`: start and total of each
    ///   example.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn conditions(&self, states: &Tensor, mask: &Tensor, seconds: &[(f64, f64)]) -> Result<Conditions> {
        let (batch, length, _) = states.dims3()?;
        if mask.dims() != [batch, length] || seconds.len() != batch {
            bail!(
                "conditions: states {:?}, mask {:?} and seconds of {} examples do not fit",
                states.dims(),
                mask.dims(),
                seconds.len()
            );
        }
        let states = states.broadcast_mul(&mask.to_dtype(states.dtype())?.unsqueeze(2)?)?;
        let fraction = |s: f64| (s.clamp(0.0, self.max_seconds) / self.max_seconds) as f32;
        let column = |pick: fn(&(f64, f64)) -> f64| -> Result<Tensor> {
            let values: Vec<f32> = seconds.iter().map(|pair| fraction(pick(pair))).collect();
            Tensor::from_vec(values, (batch, 1), states.device())?.to_dtype(states.dtype())
        };
        let start = self.start.forward(&column(|s| s.0)?)?; // [B, cond_dim]
        let total = self.total.forward(&column(|s| s.1)?)?;
        Ok(Conditions {
            tokens: Tensor::cat(&[states, start.unsqueeze(1)?, total.unsqueeze(1)?], 1)?,
            global: Tensor::cat(&[start, total], 1)?,
        })
    }
}

/// A number in [0, 1] as a vector: itself, its sines and cosines, and an affine map.
#[derive(Debug, Clone)]
struct NumberConditioner {
    /// Frequencies, `[n]`.
    weights: Tensor,
    map: Linear,
}

impl NumberConditioner {
    /// Frequencies of the published models.
    const N: usize = 128;

    fn new(dim: usize, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("time_positional_embedding");
        let random = candle_nn::Init::Randn { mean: 0.0, stdev: 1.0 };
        Ok(Self {
            weights: vb.pp(0).get_with_hints(Self::N, "weights", random)?,
            map: Linear::new(2 * Self::N + 1, dim, vb.pp(1))?,
        })
    }

    /// `[B, 1]` to `[B, dim]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let angles = (x.broadcast_mul(&self.weights.unsqueeze(0)?)? * (2.0 * std::f64::consts::PI))?; // [B, n]
        self.map.forward(&Tensor::cat(&[x, &angles.sin()?, &angles.cos()?], 1)?)
    }
}

/// Two affine maps with SiLU between them.
#[derive(Debug, Clone)]
struct Mlp {
    first: Linear,
    second: Linear,
}

impl Mlp {
    fn no_bias(n_in: usize, n_out: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            first: Linear::no_bias(n_in, n_out, vb.pp(0))?,
            second: Linear::no_bias(n_out, n_out, vb.pp(2))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.second.forward(&dragon_nn::silu(&self.first.forward(x)?)?)
    }
}

/// The conditions of a batch as the blocks see them, for one number of frames. Made by [`StableAudioDit::context`].
pub struct Context {
    /// Keys and values of each block, `[B, M, width]`.
    keys_values: Vec<(Tensor, Tensor)>,
    /// `[B, width]`.
    global: Tensor,
    rotary: Rotary,
}

/// The network.
pub struct StableAudioDit {
    cfg: Config,
    /// Frequencies of the noise level, `[time_features / 2]`.
    time_weight: Tensor,
    time: Mlp,
    global: Mlp,
    cross: Mlp,
    /// `[C, C, 1]`, on top of the identity.
    preprocess: Tensor,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
    /// As `preprocess`.
    postprocess: Tensor,
}

impl StableAudioDit {
    /// Reads the weights under `vb`, in diffusers' names.
    ///
    /// # Errors
    /// If the config contradicts itself, or a tensor is missing or misshapen.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        let (channels, width) = (cfg.latent_channels, cfg.width());
        let random = candle_nn::Init::Randn { mean: 0.0, stdev: 1.0 };
        let zero = candle_nn::Init::Const(0.0);
        let time = vb.pp("timestep_proj");
        // Rounded frequencies would be other ones.
        let dtype = if matches!(vb.dtype(), DType::BF16 | DType::F16) { DType::F32 } else { vb.dtype() };
        Ok(Self {
            time_weight: vb.pp("time_proj").get_with_hints_dtype(
                cfg.time_features / 2,
                "weight",
                random,
                dtype,
            )?,
            time: Mlp {
                first: Linear::new(cfg.time_features, width, time.pp(0))?,
                second: Linear::new(width, width, time.pp(2))?,
            },
            global: Mlp::no_bias(2 * cfg.cond_dim, width, vb.pp("global_proj"))?,
            cross: Mlp::no_bias(cfg.cond_dim, cfg.cross_dim, vb.pp("cross_attention_proj"))?,
            preprocess: vb.pp("preprocess_conv").get_with_hints((channels, channels, 1), "weight", zero)?,
            proj_in: Linear::no_bias(channels, width, vb.pp("proj_in"))?,
            blocks: (0..cfg.depth)
                .map(|i| Block::new(cfg, vb.pp("transformer_blocks").pp(i)))
                .collect::<Result<_>>()?,
            proj_out: Linear::no_bias(width, channels, vb.pp("proj_out"))?,
            postprocess: vb.pp("postprocess_conv").get_with_hints((channels, channels, 1), "weight", zero)?,
            cfg: cfg.clone(),
        })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.cfg
    }

    /// That of the weights. Latents and conditions of another come in and go out as they are.
    fn dtype(&self) -> DType {
        self.proj_in.weight.dtype()
    }

    /// Prepares the conditions of a batch: their keys and values in every block. Differentiable.
    ///
    /// # Errors
    /// If the shapes do not fit the config.
    pub fn context(&self, conditions: &Conditions, n_frames: usize) -> Result<Context> {
        let tokens = self.cross.forward(&conditions.tokens.to_dtype(self.dtype())?)?; // [B, M, cross_dim]
        let keys_values =
            self.blocks.iter().map(|block| block.cross.keys_values(&tokens)).collect::<Result<_>>()?;
        Ok(Context {
            keys_values,
            global: self.global.forward(&conditions.global.to_dtype(self.dtype())?)?,
            rotary: Rotary::new(self.cfg.head_dim / 2, ROTARY_BASE, n_frames + 1),
        })
    }

    /// One evaluation.
    ///
    /// # Shapes
    /// - `x`: `[B, C, T]`; `t`: `[B]`, what the network is told of the noise level; `context`: of the same batch and `T`.
    ///   Returns `[B, C, T]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward(&self, x: &Tensor, t: &Tensor, context: &Context) -> Result<Tensor> {
        let (batch, channels, frames) = x.dims3()?;
        if channels != self.cfg.latent_channels || t.dims() != [batch] || context.global.dim(0)? != batch {
            bail!(
                "expected latents of {} channels, and a noise level and conditions for each, found {:?}, {:?} and {}",
                self.cfg.latent_channels,
                x.dims(),
                t.dims(),
                context.global.dim(0)?
            );
        }
        let (outer, inner) = (x.dtype(), self.dtype());
        let angles = t.unsqueeze(1)?.broadcast_mul(&self.time_weight.unsqueeze(0)?)?;
        let angles = (angles * (2.0 * std::f64::consts::PI))?;
        let features = Tensor::cat(&[angles.cos()?, angles.sin()?], D::Minus1)?.to_dtype(inner)?;
        let level = self.time.forward(&features)?; // [B, width]
        let first = (&context.global + level)?.unsqueeze(1)?; // [B, 1, width]
        let x = x.transpose(1, 2)?.contiguous()?.to_dtype(inner)?; // [B, T, C]
        let x = (dragon_nn::linear(&x, &self.preprocess.squeeze(2)?, None)? + &x)?;
        let mut h = Tensor::cat(&[&first, &self.proj_in.forward(&x)?], 1)?; // [B, 1 + T, width]
        for (block, text) in self.blocks.iter().zip(&context.keys_values) {
            h = block.forward(&h, text, &context.rotary)?;
        }
        let y = self.proj_out.forward(&h.narrow(1, 1, frames)?.contiguous()?)?; // [B, T, C]
        let y = (dragon_nn::linear(&y, &self.postprocess.squeeze(2)?, None)? + &y)?;
        y.to_dtype(outer)?.transpose(1, 2)?.contiguous() // [B, C, T]
    }
}

struct Block {
    norm1: LayerNorm,
    attention: SelfAttention,
    norm2: LayerNorm,
    cross: CrossAttention,
    norm3: LayerNorm,
    ffn_in: Linear,
    ffn_out: Linear,
}

impl Block {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let width = cfg.width();
        let ffn = vb.pp("ff").pp("net");
        Ok(Self {
            norm1: LayerNorm::new(width, NORM_EPS, vb.pp("norm1"))?,
            attention: SelfAttention::new(cfg, vb.pp("attn1"))?,
            norm2: LayerNorm::new(width, NORM_EPS, vb.pp("norm2"))?,
            cross: CrossAttention::new(cfg, vb.pp("attn2"))?,
            norm3: LayerNorm::new(width, NORM_EPS, vb.pp("norm3"))?,
            ffn_in: Linear::new(width, 8 * width, ffn.pp(0).pp("proj"))?,
            ffn_out: Linear::new(4 * width, width, ffn.pp(2))?,
        })
    }

    fn forward(&self, h: &Tensor, text: &(Tensor, Tensor), rotary: &Rotary) -> Result<Tensor> {
        let h = (h + self.attention.forward(&self.norm1.forward(h)?, rotary)?)?; // [B, 1 + T, width]
        let h = (&h + self.cross.forward(&self.norm2.forward(&h)?, text)?)?;
        let gated = dragon_nn::swiglu_value_first(&self.ffn_in.forward(&self.norm3.forward(&h)?)?)?;
        &h + self.ffn_out.forward(&gated)?
    }
}

struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    heads: usize,
    scale: f64,
}

impl SelfAttention {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let square = |name: &str| Linear::no_bias(cfg.width(), cfg.width(), vb.pp(name));
        Ok(Self {
            query: square("to_q")?,
            key: square("to_k")?,
            value: square("to_v")?,
            out: square("to_out.0")?,
            heads: cfg.heads,
            scale: (cfg.head_dim as f64).powf(-0.5),
        })
    }

    fn forward(&self, x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
        let query = rotary.apply(&self.query.forward(x)?, self.heads)?;
        let key = rotary.apply(&self.key.forward(x)?, self.heads)?;
        let value = self.value.forward(x)?;
        self.out.forward(&dragon_nn::attention(&query, &key, &value, self.heads, None, self.scale)?)
    }
}

struct CrossAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    heads: usize,
    text_heads: usize,
    scale: f64,
}

impl CrossAttention {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let (width, text_width) = (cfg.width(), cfg.text_heads * cfg.head_dim);
        Ok(Self {
            query: Linear::no_bias(width, width, vb.pp("to_q"))?,
            key: Linear::no_bias(cfg.cross_dim, text_width, vb.pp("to_k"))?,
            value: Linear::no_bias(cfg.cross_dim, text_width, vb.pp("to_v"))?,
            out: Linear::no_bias(width, width, vb.pp("to_out.0"))?,
            heads: cfg.heads,
            text_heads: cfg.text_heads,
            scale: (cfg.head_dim as f64).powf(-0.5),
        })
    }

    /// Keys and values of the tokens, each head repeated for the heads of queries that it serves: `[B, M, width]`.
    fn keys_values(&self, tokens: &Tensor) -> Result<(Tensor, Tensor)> {
        let repeat = |x: Tensor| {
            let (batch, length, width) = x.dims3()?;
            let (times, head_dim) = (self.heads / self.text_heads, width / self.text_heads);
            x.reshape((batch, length, self.text_heads, 1, head_dim))?
                .broadcast_as((batch, length, self.text_heads, times, head_dim))?
                .contiguous()?
                .flatten_from(2)
        };
        Ok((repeat(self.key.forward(tokens)?)?, repeat(self.value.forward(tokens)?)?))
    }

    fn forward(&self, x: &Tensor, (key, value): &(Tensor, Tensor)) -> Result<Tensor> {
        let query = self.query.forward(x)?;
        self.out.forward(&dragon_nn::attention(&query, key, value, self.heads, None, self.scale)?)
    }
}
