//! The diffusion transformer (paper Appendix E; Peebles and Xie 2023, arXiv:2212.09748): one attention and one gated feed-forward per
//! block, both modulated by the noise level, with the text in the keys and values of every attention.
//!
//! What the paper leaves open, and our choice:
//! - *Positions*: rotary, on the first `rotary_dim` channels of each head's queries and audio keys. The other channels carry none, so a frame
//!   can look for a text token or a timbre wherever it stands. Text keys are not turned: the text encoder has put its own positions in.
//! - *Text*: each block has its own key and value projection for text tokens. They see no noise level, so a sampling run
//!   computes them once ([`Dit::context`]).
//! - *No text*: one learned token takes the place of an empty or dropped text.
//! - *Biases*: none inside blocks, as in Llama; the modulation has shifts.
//!
//! Golden test: `dit_matches_an_independent_implementation`.

use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use dragon_nn::{Linear, Rotary};
use serde::{Deserialize, Serialize};

use crate::noise_features::noise_features;

/// Added to the variance in the layer norms.
const NORM_EPS: f64 = 1e-6;

/// Hyperparameters of [`Dit`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of a token inside the transformer; a multiple of `heads`.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads per block.
    pub heads: usize,
    /// Channels of the gated feed-forward, after the gate.
    pub ffn_hidden: usize,
    /// Channels of the text states.
    pub text_dim: usize,
    /// Sinusoidal features of the noise level, even and at least 4.
    pub noise_features: usize,
    /// Channels of each head that carry the position: even, at most `width / heads`.
    pub rotary_dim: usize,
    /// Ratio between the highest and about the lowest rotary frequency.
    pub rotary_base: f64,
    /// Rank of each block's map from the noise level to its shifts, scales and gates; without it a full matrix per block, which is
    /// a third of all parameters.
    pub adaln_rank: Option<usize>,
}

impl Config {
    /// The paper's size, that of DiT-XL: about 0.5 G parameters. The feed-forward is 8/3 of the width, which in the gated form has as many
    /// parameters as 4 times the width without a gate. Text states of T5-base.
    pub fn presto() -> Self {
        Self {
            latent_channels: 32,
            width: 1152,
            depth: 28,
            heads: 16,
            ffn_hidden: 3072,
            text_dim: 768,
            noise_features: 256,
            rotary_dim: 36,
            rotary_base: 10_000.0,
            adaln_rank: None,
        }
    }

    /// The embedded default: 80 frames of 32 channels, about 4 M parameters.
    pub fn tiny_music() -> Self {
        Self {
            latent_channels: 32,
            width: 192,
            depth: 6,
            heads: 6,
            ffn_hidden: 512,
            text_dim: 192,
            noise_features: 64,
            rotary_dim: 16,
            rotary_base: 500.0,
            adaln_rank: Some(48),
        }
    }

    /// The smallest valid model, for tests.
    pub fn tiny() -> Self {
        Self {
            latent_channels: 4,
            width: 16,
            depth: 2,
            heads: 2,
            ffn_hidden: 24,
            text_dim: 8,
            noise_features: 8,
            rotary_dim: 4,
            rotary_base: 100.0,
            adaln_rank: None,
        }
    }

    /// Channels per head.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads.max(1)
    }

    /// Says what is wrong with the sizes, if anything.
    ///
    /// # Errors
    /// If a size is 0 or outside the range its documentation gives.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("latent_channels", self.latent_channels),
            ("width", self.width),
            ("depth", self.depth),
            ("heads", self.heads),
            ("ffn_hidden", self.ffn_hidden),
            ("text_dim", self.text_dim),
            ("adaln_rank", self.adaln_rank.unwrap_or(1)),
        ];
        for (name, size) in sizes {
            if size == 0 {
                bail!("`{name}` must be at least 1, found 0");
            }
        }
        if !self.width.is_multiple_of(self.heads) {
            bail!("`width` must be a multiple of `heads` ({}), found {}", self.heads, self.width);
        }
        if !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > self.head_dim() {
            bail!("`rotary_dim` must be even and at most {}, found {}", self.head_dim(), self.rotary_dim);
        }
        if !(self.rotary_base.is_finite() && self.rotary_base >= 1.0) {
            bail!("`rotary_base` must be at least 1, found {}", self.rotary_base);
        }
        if self.noise_features < 4 || !self.noise_features.is_multiple_of(2) {
            bail!("`noise_features` must be even and at least 4, found {}", self.noise_features);
        }
        Ok(())
    }
}

/// Encoded texts, one per example.
#[derive(Debug, Clone)]
pub struct TextCond {
    /// `[B, L, text_dim]`; what stands at padded places is never seen.
    pub states: Tensor,
    /// `[B, L]`, 1 for a token and 0 for padding. A row of zeros is an empty text: the learned null token takes its place.
    pub mask: Tensor,
}

impl TextCond {
    /// Rows `start .. start + len` of the batch.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self { states: self.states.narrow(0, start, len)?, mask: self.mask.narrow(0, start, len)? })
    }
}

/// Texts as the blocks see them, for one batch and one number of frames. Made by [`Dit::context`] and [`Dit::null_context`].
pub struct Context {
    /// Keys and values of each block, `[B, M, width]`, `M` the number of text tokens with the null token.
    keys_values: Vec<(Tensor, Tensor)>,
    /// Added to the attention's logits: 0 or -inf, `[B, 1, 1, T + M]`; `None` where everything is seen.
    bias: Option<Tensor>,
    rotary: Rotary,
}

impl Context {
    /// The same texts without their history: no gradient flows back to the encoder.
    pub fn detach(self) -> Self {
        let keys_values = self.keys_values.iter().map(|(k, v)| (k.detach(), v.detach())).collect();
        Self { keys_values, ..self }
    }
}

/// The diffusion transformer: the network `F` of the preconditioned denoiser.
pub struct Dit {
    cfg: Config,
    latent_in: Linear,
    text_in: Linear,
    null_text: Tensor,
    noise_level: NoiseLevel,
    blocks: Vec<Block>,
    final_modulation: Modulation,
    latent_out: (Tensor, Tensor),
}

impl Dit {
    /// Reads or creates the weights under `vb`.
    ///
    /// New blocks start as the identity and the output as 0: gates, shifts, scales and the output projection are zero (adaLN-Zero).
    ///
    /// # Errors
    /// If the config is impossible ([`Config::check`]) or weights are missing.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.check()?;
        let (width, channels) = (cfg.width, cfg.latent_channels);
        let blocks = (0..cfg.depth).map(|i| Block::new(cfg, vb.pp("blocks").pp(i))).collect::<Result<_>>()?;
        let out = vb.pp("latent_out");
        Ok(Self {
            cfg: cfg.clone(),
            latent_in: Linear::new(channels, width, vb.pp("latent_in"))?,
            text_in: {
                let vb = vb.pp("text_in");
                text_weight(cfg.text_dim, width, &vb)?;
                Linear::new(cfg.text_dim, width, vb)?
            },
            // The size of a projected text token.
            null_text: vb.get_with_hints(width, "null_text", Init::Randn { mean: 0.0, stdev: 1.0 })?,
            noise_level: NoiseLevel::new(cfg, vb.pp("noise_level"))?,
            blocks,
            final_modulation: Modulation::new(cfg, 2, vb.pp("final_modulation"))?,
            latent_out: (
                out.get_with_hints((channels, width), "weight", Init::Const(0.0))?,
                out.get_with_hints(channels, "bias", Init::Const(0.0))?,
            ),
        })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.cfg
    }

    /// The network's output for noisy latents.
    ///
    /// # Shapes
    /// - `x`: `[B, C, T]`, unit variance (`c_in * x`); `c_noise`: `[B]`; `cond`: `B` texts; `drop`: `B` flags, true replaces the text by the null
    ///   token. Returns `[B, C, T]`.
    ///
    /// # Errors
    /// If a shape does not fit the config or the batch.
    pub fn forward(
        &self,
        x: &Tensor,
        c_noise: &Tensor,
        cond: &TextCond,
        drop: Option<&[bool]>,
    ) -> Result<Tensor> {
        let context = self.context(cond, drop, x.dim(2)?)?;
        self.forward_with(x, c_noise, &context)
    }

    /// That of the weights. Latents and texts of another come in and go out as they are.
    fn dtype(&self) -> DType {
        self.latent_in.weight.dtype()
    }

    /// [`Self::forward`] with texts prepared by [`Self::context`] for the same batch and number of frames.
    pub fn forward_with(&self, x: &Tensor, c_noise: &Tensor, context: &Context) -> Result<Tensor> {
        let (batch, channels, _) = x.dims3()?;
        if channels != self.cfg.latent_channels {
            bail!("expected latents with {} channels, found {:?}", self.cfg.latent_channels, x.dims());
        }
        if c_noise.dims() != [batch] {
            bail!("expected one noise level for each of {batch} examples, found {:?}", c_noise.dims());
        }
        let level = self.noise_level.forward(c_noise)?; // [B, rank or width]
        let frames = x.transpose(1, 2)?.contiguous()?.to_dtype(self.dtype())?; // [B, T, C]
        let mut h = self.latent_in.forward(&frames)?; // [B, T, width]
        for (block, text) in self.blocks.iter().zip(&context.keys_values) {
            h = block.forward(&h, &level, text, context)?;
        }
        let modulation = self.final_modulation.forward(&level)?;
        let h = dragon_nn::ada_layer_norm(&h, &modulation[0], &modulation[1], NORM_EPS)?;
        let (weight, bias) = &self.latent_out;
        dragon_nn::linear(&h, weight, Some(bias))?.to_dtype(x.dtype())?.transpose(1, 2)?.contiguous() // [B, C, T]
    }

    /// Prepares texts for a batch: their keys and values in every block. Differentiable.
    ///
    /// # Errors
    /// If the shapes of `cond` and `drop` do not fit each other or the config.
    pub fn context(&self, cond: &TextCond, drop: Option<&[bool]>, n_frames: usize) -> Result<Context> {
        let (batch, length, text_dim) = cond.states.dims3()?;
        if text_dim != self.cfg.text_dim || cond.mask.dims() != [batch, length] {
            bail!(
                "expected text states [B, L, {}] and a mask [B, L], found {:?} and {:?}",
                self.cfg.text_dim,
                cond.states.dims(),
                cond.mask.dims()
            );
        }
        if let Some(drop) = drop
            && drop.len() != batch
        {
            bail!("expected one drop flag for each of {batch} examples, found {}", drop.len());
        }
        // Token 0 is the null token, seen only where there is no text; tokens 1 to L are the text.
        let mask = cond.mask.to_dtype(candle_core::DType::F32)?.to_vec2::<f32>()?;
        let mut bias = vec![0f32; batch * (n_frames + 1 + length)];
        for (b, row) in bias.chunks_mut(n_frames + 1 + length).enumerate() {
            let dropped = drop.is_some_and(|drop| drop[b]);
            let text = &mut row[n_frames..];
            text.fill(f32::NEG_INFINITY);
            for (slot, &m) in text[1..].iter_mut().zip(&mask[b]) {
                if m > 0.5 && !dropped {
                    *slot = 0.0;
                }
            }
            if text[1..].iter().all(|&slot| slot < 0.0) {
                text[0] = 0.0;
            }
        }
        let states = &cond.states;
        let bias = Tensor::from_vec(bias, (batch, 1, 1, n_frames + 1 + length), states.device())?
            .to_dtype(self.dtype())?;
        // Encoders differ in the scale of their states; padding may hold anything finite.
        let states = dragon_nn::rms_norm(states, None, NORM_EPS)?.to_dtype(self.dtype())?;
        let tokens = self.text_in.forward(&states)?; // [B, L, width]
        let null =
            self.null_text.reshape((1, 1, self.cfg.width))?.broadcast_as((batch, 1, self.cfg.width))?;
        let tokens = Tensor::cat(&[null.contiguous()?, tokens], 1)?; // [B, 1 + L, width]
        self.context_of(&tokens, Some(bias), n_frames)
    }

    /// The context of `batch` examples without text: what [`Self::context`] gives with all texts dropped, but with one text token only.
    pub fn null_context(&self, batch: usize, n_frames: usize) -> Result<Context> {
        let tokens = self.null_text.reshape((1, 1, self.cfg.width))?;
        let mut context = self.context_of(&tokens, None, n_frames)?;
        for (key, value) in &mut context.keys_values {
            let shape = (batch, 1, self.cfg.width);
            *key = key.broadcast_as(shape)?.contiguous()?;
            *value = value.broadcast_as(shape)?.contiguous()?;
        }
        Ok(context)
    }

    fn context_of(&self, tokens: &Tensor, bias: Option<Tensor>, n_frames: usize) -> Result<Context> {
        let keys_values =
            self.blocks.iter().map(|block| block.text_keys_values(tokens)).collect::<Result<_>>()?;
        let rotary = Rotary::new(self.cfg.rotary_dim, self.cfg.rotary_base, n_frames);
        Ok(Context { keys_values, bias, rotary })
    }
}

/// Creates the weight of a projection on the way of the text with unit gain, where there is none yet.
///
/// The usual initialisation has a gain of 1/sqrt(3). Three of them in a row leave a text at a fifth of its size, and a text is one in six of
/// the tokens that a frame sees: the first steps of training then learn from the audio alone, and the text stays unheard for long.
fn text_weight(inputs: usize, outputs: usize, vb: &VarBuilder) -> Result<()> {
    let stdev = 1.0 / (inputs as f64).sqrt();
    vb.get_with_hints((outputs, inputs), "weight", Init::Randn { mean: 0.0, stdev })?;
    Ok(())
}

/// From the noise level to the input of every [`Modulation`].
struct NoiseLevel {
    n_features: usize,
    fc1: Linear,
    fc2: Linear,
    /// With a low rank: the map down to it, shared by all blocks.
    down: Option<Linear>,
}

impl NoiseLevel {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            n_features: cfg.noise_features,
            fc1: Linear::new(cfg.noise_features, cfg.width, vb.pp("fc1"))?,
            fc2: Linear::new(cfg.width, cfg.width, vb.pp("fc2"))?,
            down: cfg.adaln_rank.map(|rank| Linear::new(cfg.width, rank, vb.pp("down"))).transpose()?,
        })
    }

    fn forward(&self, c_noise: &Tensor) -> Result<Tensor> {
        let features = noise_features(c_noise, self.n_features)?.to_dtype(self.fc1.weight.dtype())?; // [B, n_features]
        let h = dragon_nn::silu(&self.fc1.forward(&features)?)?; // [B, width]
        let h = dragon_nn::silu(&self.fc2.forward(&h)?)?; // [B, width]
        match &self.down {
            Some(down) => down.forward(&h), // [B, rank]
            None => Ok(h),
        }
    }
}

/// Shifts, scales and gates from the noise level; zero at the start.
struct Modulation {
    weight: Tensor,
    bias: Tensor,
    n: usize,
}

impl Modulation {
    fn new(cfg: &Config, n: usize, vb: VarBuilder) -> Result<Self> {
        let inputs = cfg.adaln_rank.unwrap_or(cfg.width);
        Ok(Self {
            weight: vb.get_with_hints((n * cfg.width, inputs), "weight", Init::Const(0.0))?,
            bias: vb.get_with_hints(n * cfg.width, "bias", Init::Const(0.0))?,
            n,
        })
    }

    /// `n` tensors `[B, width]`.
    fn forward(&self, level: &Tensor) -> Result<Vec<Tensor>> {
        let all = dragon_nn::linear(level, &self.weight, Some(&self.bias))?; // [B, n * width]
        all.chunk(self.n, 1)?.iter().map(Tensor::contiguous).collect()
    }
}

/// `h + gate * attention(norm(h))`, then `h + gate * feed_forward(norm(h))`.
struct Block {
    heads: usize,
    modulation: Modulation,
    query: Linear,
    key: Linear,
    value: Linear,
    text_key: Linear,
    text_value: Linear,
    attention_out: Linear,
    ffn_in: Linear,
    ffn_out: Linear,
}

impl Block {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let width = cfg.width;
        let square = |name: &str| Linear::no_bias(width, width, vb.pp(name));
        for name in ["text_key", "text_value"] {
            text_weight(width, width, &vb.pp(name))?;
        }
        Ok(Self {
            heads: cfg.heads,
            modulation: Modulation::new(cfg, 6, vb.pp("modulation"))?,
            query: square("query")?,
            key: square("key")?,
            value: square("value")?,
            text_key: square("text_key")?,
            text_value: square("text_value")?,
            attention_out: square("attention_out")?,
            ffn_in: Linear::no_bias(width, 2 * cfg.ffn_hidden, vb.pp("ffn_in"))?,
            ffn_out: Linear::no_bias(cfg.ffn_hidden, width, vb.pp("ffn_out"))?,
        })
    }

    fn forward(
        &self,
        h: &Tensor,
        level: &Tensor,
        (text_key, text_value): &(Tensor, Tensor),
        context: &Context,
    ) -> Result<Tensor> {
        let m = self.modulation.forward(level)?; // shift, scale, gate of the attention; the same of the feed-forward
        let x = dragon_nn::ada_layer_norm(h, &m[0], &m[1], NORM_EPS)?; // [B, T, width]
        let query = context.rotary.apply(&self.query.forward(&x)?, self.heads)?; // [B, T, width]
        let key = context.rotary.apply(&self.key.forward(&x)?, self.heads)?;
        let key = Tensor::cat(&[&key, text_key], 1)?; // [B, T + M, width]
        let value = Tensor::cat(&[&self.value.forward(&x)?, text_value], 1)?;
        let scale = 1.0 / ((h.dim(2)? / self.heads) as f64).sqrt();
        let bias = context.bias.as_ref();
        let mixed = dragon_nn::attention(&query, &key, &value, self.heads, bias, scale)?; // [B, T, width]
        let h = dragon_nn::gated_add(h, &m[2], &self.attention_out.forward(&mixed)?)?;
        let x = dragon_nn::ada_layer_norm(&h, &m[3], &m[4], NORM_EPS)?;
        dragon_nn::gated_add(&h, &m[5], &self.feed_forward(&x)?)
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.ffn_in.is_plain() && self.ffn_out.is_plain() {
            return dragon_nn::swiglu_feed_forward(x, &self.ffn_in.weight, &self.ffn_out.weight);
        }
        self.ffn_out.forward(&dragon_nn::swiglu(&self.ffn_in.forward(x)?)?)
    }

    fn text_keys_values(&self, tokens: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.text_key.forward(tokens)?, self.text_value.forward(tokens)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edm::{Weighting, denoising_errors};
    use crate::model::{self, Model};
    use candle_core::Device;
    use dragon_nn::{Params, Rng};
    use dragon_testkit::{Golden, Tol, assert_close};

    const CPU: Device = Device::Cpu;

    /// A tiny model whose zero initialisations are replaced by noise.
    fn perturbed(cfg: &Config, seed: u64) -> (Params, Dit) {
        let params = Params::new(seed);
        let dit = Dit::new(cfg, params.builder(DType::F32, &CPU)).unwrap();
        let mut rng = Rng::new(seed + 1);
        for (_, var) in params.names_and_vars() {
            let noise = rng.normal_tensor(var.shape().clone(), DType::F32, &CPU).unwrap();
            var.set(&(var.as_tensor().detach() + (noise * 0.2).unwrap()).unwrap()).unwrap();
        }
        (params, dit)
    }

    fn texts(rng: &mut Rng, mask: &[&[f32]], dim: usize) -> TextCond {
        let (batch, length) = (mask.len(), mask[0].len());
        TextCond {
            states: rng.normal_tensor((batch, length, dim), DType::F32, &CPU).unwrap(),
            mask: Tensor::new(mask.concat(), &CPU).unwrap().reshape((batch, length)).unwrap(),
        }
    }

    fn golden(name: &str) -> Golden {
        Golden::fixture(format!("dragon-diffusion/dit/{name}.safetensors"))
    }

    #[test]
    fn dit_matches_an_independent_implementation() -> Result<()> {
        for (name, adaln_rank) in [("full", None), ("low_rank", Some(3))] {
            let golden = golden(name);
            let params = Params::new(0);
            let cfg = model::Config { dit: Config { adaln_rank, ..Config::tiny() }, ..model::Config::tiny() };
            let model = Model::new(&cfg, params.builder(DType::F32, &CPU))?;
            params.load_tensors(&golden.with_prefix("weights."), "").unwrap();
            let cond = TextCond { states: golden.get("states"), mask: golden.get("mask") };
            let sigma = golden.get("sigma");
            let sigmas = sigma.to_dtype(DType::F64)?.to_vec1::<f64>()?;

            let denoised = model.denoise_batch(&golden.get("x"), &sigma, &cond, None)?;
            assert_close(&denoised, &golden.get("denoised"), Tol::MODEL);

            let c_in: Vec<f32> = sigmas.iter().map(|&s| model.edm.precondition(s).c_in as f32).collect();
            let c_noise =
                Tensor::new(sigmas.iter().map(|s| (s.ln() / 4.0) as f32).collect::<Vec<_>>(), &CPU)?;
            let x = golden.get("x").broadcast_mul(&Tensor::from_vec(c_in, (3, 1, 1), &CPU)?)?;
            assert_close(&model.dit.forward(&x, &c_noise, &cond, None)?, &golden.get("raw"), Tol::MODEL);
            let dropped = model.dit.forward(&x, &c_noise, &cond, Some(&[true; 3]))?;
            assert_close(&dropped, &golden.get("dropped"), Tol::MODEL);

            let errors = denoising_errors(&model.edm, Weighting::Edm, &denoised, &golden.get("x0"), &sigmas)?;
            let loss = errors.mean_all()?;
            assert_close(&loss, &golden.get("loss"), Tol::MODEL);
            let gradients = loss.backward()?;
            for (name, var) in params.names_and_vars() {
                let got = gradients.get(&var).unwrap_or_else(|| panic!("`{name}` gets no gradient"));
                assert_close(got, &golden.get(&format!("gradients.{name}")), Tol::MODEL);
            }
        }
        Ok(())
    }

    #[test]
    fn every_parameter_gets_a_finite_gradient_that_is_not_zero() -> Result<()> {
        for adaln_rank in [None, Some(3)] {
            let cfg = Config { adaln_rank, ..Config::tiny() };
            let (params, dit) = perturbed(&cfg, 11);
            let mut rng = Rng::new(12);
            let cond = texts(&mut rng, &[&[1.0, 1.0, 0.0], &[1.0, 1.0, 1.0]], cfg.text_dim);
            let x = rng.normal_tensor((2, cfg.latent_channels, 6), DType::F32, &CPU)?;
            let c_noise = Tensor::new(&[-0.4f32, 0.3], &CPU)?;
            let out = dit.forward(&x, &c_noise, &cond, Some(&[false, true]))?;
            let gradients = out.sqr()?.mean_all()?.backward()?;
            for (name, var) in params.names_and_vars() {
                let gradient = gradients.get(&var).unwrap_or_else(|| panic!("`{name}` gets no gradient"));
                let size = gradient.abs()?.sum_all()?.to_scalar::<f32>()?;
                assert!(size.is_finite() && size > 0.0, "`{name}`: sum of |gradient| is {size}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_new_model_denoises_to_the_skip_connection() -> Result<()> {
        let cfg = model::Config::tiny();
        let model = Model::new(&cfg, Params::new(1).builder(DType::F32, &CPU))?;
        let mut rng = Rng::new(2);
        let x = rng.normal_tensor((1, 4, 6), DType::F32, &CPU)?;
        let cond = texts(&mut rng, &[&[1.0, 1.0]], 8);
        let got = model.denoise_batch(&x, &Tensor::new(&[2.0f32], &CPU)?, &cond, None)?;
        assert_close(&got, &(x * model.edm.precondition(2.0).c_skip)?, Tol::LAYER);
        Ok(())
    }

    #[test]
    fn longer_padding_changes_nothing() -> Result<()> {
        let cfg = Config::tiny();
        let (_, dit) = perturbed(&cfg, 3);
        let mut rng = Rng::new(4);
        let short = texts(&mut rng, &[&[1.0, 1.0, 1.0], &[1.0, 0.0, 0.0]], cfg.text_dim);
        let padding = (rng.normal_tensor((2, 4, cfg.text_dim), DType::F32, &CPU)? * 50.0)?;
        let long = TextCond {
            states: Tensor::cat(&[&short.states, &padding], 1)?,
            mask: Tensor::cat(&[&short.mask, &Tensor::zeros((2, 4), DType::F32, &CPU)?], 1)?,
        };
        let x = rng.normal_tensor((2, cfg.latent_channels, 6), DType::F32, &CPU)?;
        let c_noise = Tensor::new(&[-0.4f32, 0.3], &CPU)?;
        let got = dit.forward(&x, &c_noise, &long, None)?;
        assert_close(&got, &dit.forward(&x, &c_noise, &short, None)?, Tol { atol: 1e-6, rtol: 1e-5 });
        Ok(())
    }

    #[test]
    fn dropped_text_and_empty_text_and_no_text_are_one_thing() -> Result<()> {
        let cfg = Config::tiny();
        let (_, dit) = perturbed(&cfg, 5);
        let mut rng = Rng::new(6);
        let cond = texts(&mut rng, &[&[1.0, 1.0, 1.0]], cfg.text_dim);
        let empty = TextCond { mask: cond.mask.zeros_like()?, states: cond.states.clone() };
        let x = rng.normal_tensor((1, cfg.latent_channels, 6), DType::F32, &CPU)?;
        let c_noise = Tensor::new(&[0.1f32], &CPU)?;
        let dropped = dit.forward(&x, &c_noise, &cond, Some(&[true]))?;
        assert_close(&dit.forward(&x, &c_noise, &empty, None)?, &dropped, Tol::EXACT);
        let null = dit.forward_with(&x, &c_noise, &dit.null_context(1, 6)?)?;
        assert_close(&null, &dropped, Tol { atol: 1e-6, rtol: 1e-5 });
        let with_text = dit.forward(&x, &c_noise, &cond, None)?;
        let change = (with_text - dropped)?.abs()?.mean_all()?.to_scalar::<f32>()?;
        assert!(change > 1e-3, "the text changes the output by {change} only");
        Ok(())
    }

    #[test]
    fn presets_have_the_stated_sizes() -> Result<()> {
        let params = Params::new(0);
        Dit::new(&Config::tiny_music(), params.builder(DType::F32, &CPU))?;
        let n = params.len_params();
        assert!((3_500_000..4_500_000).contains(&n), "tiny_music has {n} parameters");
        Config::presto().check()?;
        let c = Config::presto();
        let per_block = 6 * c.width * c.width + 3 * c.width * c.ffn_hidden + 6 * c.width * (c.width + 1);
        assert!((600e6..750e6).contains(&((per_block * c.depth) as f64)), "{}", per_block * c.depth);
        Ok(())
    }

    #[test]
    fn impossible_sizes_and_shapes_are_named() -> Result<()> {
        let with = |cfg: Config| cfg.check().unwrap_err().to_string();
        assert!(with(Config { heads: 3, ..Config::tiny() }).contains("`width`"));
        assert!(with(Config { depth: 0, ..Config::tiny() }).contains("`depth`"));
        assert!(with(Config { rotary_dim: 10, ..Config::tiny() }).contains("`rotary_dim`"));
        assert!(with(Config { noise_features: 7, ..Config::tiny() }).contains("`noise_features`"));
        assert!(with(Config { adaln_rank: Some(0), ..Config::tiny() }).contains("`adaln_rank`"));
        let (_, dit) = perturbed(&Config::tiny(), 7);
        let mut rng = Rng::new(8);
        let x = rng.normal_tensor((2, 4, 6), DType::F32, &CPU)?;
        let c_noise = Tensor::zeros(2, DType::F32, &CPU)?;
        let cond = texts(&mut rng, &[&[1.0], &[1.0]], 8);
        assert!(dit.forward(&x.narrow(1, 0, 3)?, &c_noise, &cond, None).is_err());
        assert!(dit.forward(&x, &c_noise.narrow(0, 0, 1)?, &cond, None).is_err());
        assert!(dit.forward(&x, &c_noise, &cond, Some(&[true])).is_err());
        assert!(dit.forward(&x, &c_noise, &texts(&mut rng, &[&[1.0], &[1.0]], 7), None).is_err());
        Ok(())
    }
}
