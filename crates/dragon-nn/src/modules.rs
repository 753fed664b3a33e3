//! Layers over a [`VarBuilder`], with PyTorch's parameter names and initialisation.

use crate::lora::Adapter;
use crate::{Conv1dSpec, ConvTranspose1dSpec, LstmWeights};
use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::init::Init;

/// PyTorch's default for linear and convolution layers: uniform in `±1/sqrt(fan_in)`.
fn default_init(fan_in: usize) -> Init {
    let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// Affine map of the last dimension, `[..., in]` to `[..., out]`; parameters `weight`, `bias`. Built over
/// [`Lora`](crate::Lora), it may have an adapter beside them.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    adapter: Option<Adapter>,
}

impl Linear {
    /// Reads `weight` and `bias`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn new(n_in: usize, n_out: usize, vb: VarBuilder) -> Result<Self> {
        let bias = vb.get_with_hints(n_out, "bias", default_init(n_in))?;
        Ok(Linear { bias: Some(bias), ..Linear::no_bias(n_in, n_out, vb)? })
    }

    /// Reads `weight` only.
    ///
    /// # Errors
    /// If the tensor is missing or misshapen.
    pub fn no_bias(n_in: usize, n_out: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((n_out, n_in), "weight", default_init(n_in))?;
        Ok(Linear { weight, bias: None, adapter: Adapter::read(n_in, n_out, &vb)? })
    }

    /// As [`Linear::new`], but created with all parameters zero (the adaptive-norm heads of a DiT).
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn zero_init(n_in: usize, n_out: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((n_out, n_in), "weight", Init::Const(0.0))?;
        let bias = Some(vb.get_with_hints(n_out, "bias", Init::Const(0.0))?);
        Ok(Linear { weight, bias, adapter: Adapter::read(n_in, n_out, &vb)? })
    }

    /// Whether weight and bias are all there is: no adapter.
    pub fn is_plain(&self) -> bool {
        self.adapter.is_none()
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = crate::linear(x, &self.weight, self.bias.as_ref())?;
        match &self.adapter {
            None => Ok(y),
            Some(adapter) => y + adapter.forward(x)?,
        }
    }
}

/// The weight of a convolution: one tensor, or direction and length (weight norm).
#[derive(Debug, Clone)]
enum Weight {
    Plain(Tensor),
    /// `weight = g · v / |v|`, the norm over all dimensions but the first (`torch.nn.utils.weight_norm`, `dim=0`).
    Normed {
        g: Tensor,
        v: Tensor,
    },
}

impl Weight {
    fn plain(shape: (usize, usize, usize), vb: &VarBuilder) -> Result<Weight> {
        Ok(Weight::Plain(vb.get_with_hints(shape, "weight", default_init(shape.1 * shape.2))?))
    }

    /// A file that holds the product instead, as `remove_weight_norm` leaves it, is read too.
    fn normed(shape: (usize, usize, usize), vb: &VarBuilder) -> Result<Weight> {
        if vb.contains_tensor("weight") && !vb.contains_tensor("weight_v") {
            return Self::plain(shape, vb);
        }
        let v = vb.get_with_hints(shape, "weight_v", default_init(shape.1 * shape.2))?;
        // A row of n numbers uniform in ±1/sqrt(n) has this length in the mean, so g ≈ |v| as in PyTorch.
        let g = vb.get_with_hints((shape.0, 1, 1), "weight_g", Init::Const(1.0 / 3f64.sqrt()))?;
        Ok(Weight::Normed { g, v })
    }

    fn value(&self) -> Result<Tensor> {
        match self {
            Weight::Plain(w) => Ok(w.clone()),
            Weight::Normed { g, v } => {
                let norm = v.sqr()?.sum_keepdim((1, 2))?.sqrt()?; // [C, 1, 1]
                v.broadcast_mul(&(g / norm)?)
            }
        }
    }
}

/// Convolution along time, `[B, T, Cin]` to `[B, T', Cout]`; see [`crate::conv1d()`].
#[derive(Debug, Clone)]
pub struct Conv1d {
    weight: Weight,
    bias: Option<Tensor>,
    spec: Conv1dSpec,
}

impl Conv1d {
    /// Reads `weight` `[Cout, Cin/groups, K]` and `bias` `[Cout]`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn new(c_in: usize, c_out: usize, kernel: usize, spec: Conv1dSpec, vb: VarBuilder) -> Result<Self> {
        let bias = vb.get_with_hints(c_out, "bias", default_init(c_in / spec.groups * kernel))?;
        Ok(Conv1d { bias: Some(bias), ..Conv1d::no_bias(c_in, c_out, kernel, spec, vb)? })
    }

    /// Reads `weight` only.
    ///
    /// # Errors
    /// If the tensor is missing or misshapen.
    pub fn no_bias(
        c_in: usize,
        c_out: usize,
        kernel: usize,
        spec: Conv1dSpec,
        vb: VarBuilder,
    ) -> Result<Self> {
        Ok(Conv1d { weight: Weight::plain((c_out, c_in / spec.groups, kernel), &vb)?, bias: None, spec })
    }

    /// Reads `weight_g` `[Cout, 1, 1]`, `weight_v` `[Cout, Cin/groups, K]` and `bias` `[Cout]`, as
    /// `torch.nn.utils.weight_norm` stores them.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn weight_norm(
        c_in: usize,
        c_out: usize,
        kernel: usize,
        spec: Conv1dSpec,
        vb: VarBuilder,
    ) -> Result<Self> {
        let bias = vb.get_with_hints(c_out, "bias", default_init(c_in / spec.groups * kernel))?;
        Ok(Conv1d { bias: Some(bias), ..Conv1d::weight_norm_no_bias(c_in, c_out, kernel, spec, vb)? })
    }

    /// Reads `weight_g` and `weight_v` only.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn weight_norm_no_bias(
        c_in: usize,
        c_out: usize,
        kernel: usize,
        spec: Conv1dSpec,
        vb: VarBuilder,
    ) -> Result<Self> {
        Ok(Conv1d { weight: Weight::normed((c_out, c_in / spec.groups, kernel), &vb)?, bias: None, spec })
    }

    /// The same with its weight computed once, for models that are not trained.
    ///
    /// # Errors
    /// If the device fails.
    pub fn frozen(self) -> Result<Self> {
        Ok(Conv1d { weight: Weight::Plain(self.weight.value()?), ..self })
    }

    /// The weight in use, `[Cout, Cin/groups, K]`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn weight(&self) -> Result<Tensor> {
        self.weight.value()
    }

    /// The bias, `[Cout]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The geometry.
    pub fn spec(&self) -> Conv1dSpec {
        self.spec
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::conv1d(x, &self.weight.value()?, self.bias.as_ref(), self.spec)
    }
}

/// Transposed convolution along time, `[B, T, Cin]` to `[B, T', Cout]`; see [`crate::conv_transpose1d()`].
#[derive(Debug, Clone)]
pub struct ConvTranspose1d {
    weight: Weight,
    bias: Option<Tensor>,
    spec: ConvTranspose1dSpec,
}

impl ConvTranspose1d {
    /// Reads `weight` `[Cin, Cout/groups, K]` and `bias` `[Cout]`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn new(
        c_in: usize,
        c_out: usize,
        kernel: usize,
        spec: ConvTranspose1dSpec,
        vb: VarBuilder,
    ) -> Result<Self> {
        let bias = vb.get_with_hints(c_out, "bias", default_init(c_out / spec.groups * kernel))?;
        Ok(ConvTranspose1d {
            weight: Weight::plain((c_in, c_out / spec.groups, kernel), &vb)?,
            bias: Some(bias),
            spec,
        })
    }

    /// Reads `weight_g` `[Cin, 1, 1]`, `weight_v` `[Cin, Cout/groups, K]` and `bias` `[Cout]`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn weight_norm(
        c_in: usize,
        c_out: usize,
        kernel: usize,
        spec: ConvTranspose1dSpec,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weight = Weight::normed((c_in, c_out / spec.groups, kernel), &vb)?;
        let bias = vb.get_with_hints(c_out, "bias", default_init(c_out / spec.groups * kernel))?;
        Ok(ConvTranspose1d { weight, bias: Some(bias), spec })
    }

    /// The same with its weight computed once, for models that are not trained.
    ///
    /// # Errors
    /// If the device fails.
    pub fn frozen(self) -> Result<Self> {
        Ok(ConvTranspose1d { weight: Weight::Plain(self.weight.value()?), ..self })
    }

    /// The weight in use, `[Cin, Cout/groups, K]`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn weight(&self) -> Result<Tensor> {
        self.weight.value()
    }
}

impl Module for ConvTranspose1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::conv_transpose1d(x, &self.weight.value()?, self.bias.as_ref(), self.spec)
    }
}

/// Layer norm of the last dimension; parameters `weight` (ones at first) and `bias` (zeros).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, `[C]`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn new(channels: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(channels, "weight", Init::Const(1.0))?;
        Ok(LayerNorm {
            weight: Some(weight),
            bias: Some(vb.get_with_hints(channels, "bias", Init::Const(0.0))?),
            eps,
        })
    }

    /// No parameters.
    pub fn no_affine(eps: f64) -> Self {
        LayerNorm { weight: None, bias: None, eps }
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::layer_norm(x, self.weight.as_ref(), self.bias.as_ref(), self.eps)
    }
}

/// Root-mean-square norm of the last dimension; parameter `weight` (ones at first).
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Reads `weight`, `[C]`.
    ///
    /// # Errors
    /// If the tensor is missing or misshapen.
    pub fn new(channels: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(RmsNorm { weight: vb.get_with_hints(channels, "weight", Init::Const(1.0))?, eps })
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::rms_norm(x, Some(&self.weight), self.eps)
    }
}

/// Group norm with all channels in one group; parameters `weight` (ones at first) and `bias` (zeros).
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl GroupNorm {
    /// Reads `weight` and `bias`, `[C]`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn new(channels: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(channels, "weight", Init::Const(1.0))?;
        Ok(GroupNorm { weight, bias: vb.get_with_hints(channels, "bias", Init::Const(0.0))?, eps })
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::group_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// Layers of long short-term memory, `[B, T, C]` to `[B, T, C]`; see [`crate::lstm()`].
#[derive(Debug, Clone)]
pub struct Lstm {
    layers: Vec<LstmWeights>,
}

impl Lstm {
    /// Reads `weight_ih_l0` `[4 C, C]`, `weight_hh_l0` `[4 C, C]`, `bias_ih_l0`, `bias_hh_l0` `[4 C]` and so on, for each
    /// layer, as `torch.nn.LSTM` stores them.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn new(channels: usize, n_layers: usize, vb: VarBuilder) -> Result<Self> {
        let init = default_init(channels);
        let layer = |i: usize| {
            let matrix =
                |name: &str| vb.get_with_hints((4 * channels, channels), &format!("{name}_l{i}"), init);
            let bias = |name: &str| vb.get_with_hints(4 * channels, &format!("{name}_l{i}"), init);
            Ok(LstmWeights {
                input: matrix("weight_ih")?,
                hidden: matrix("weight_hh")?,
                bias: (bias("bias_ih")? + bias("bias_hh")?)?,
            })
        };
        Ok(Lstm { layers: (0..n_layers).map(layer).collect::<Result<_>>()? })
    }
}

impl Module for Lstm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::lstm(x, &self.layers)
    }
}

/// Table of vectors, indices `[...]` to `[..., C]`; parameter `weight` (standard normal at first).
#[derive(Debug, Clone)]
pub struct Embedding {
    /// `[N, C]`.
    pub weight: Tensor,
}

impl Embedding {
    /// Reads `weight` `[N, C]`.
    ///
    /// # Errors
    /// If the tensor is missing or misshapen.
    pub fn new(n: usize, channels: usize, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints((n, channels), "weight", Init::Randn { mean: 0.0, stdev: 1.0 })?;
        Ok(Embedding { weight })
    }
}

impl Module for Embedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mut dims = ids.dims().to_vec();
        dims.push(self.weight.dim(1)?);
        self.weight.index_select(&ids.flatten_all()?, 0)?.reshape(dims)
    }
}

/// Snake activation of the last dimension.
#[derive(Debug, Clone)]
pub enum Snake {
    /// [`crate::snake`]; parameter `alpha`, stored `[1, C, 1]` as in descript-audio-codec.
    Plain(Tensor),
    /// [`crate::snake_beta`]; parameters `alpha` and `beta`, stored `[C]` and as logarithms, as in stable-audio-tools.
    Beta(Tensor, Tensor),
}

impl Snake {
    /// Reads `alpha` (ones at first).
    ///
    /// # Errors
    /// If the tensor is missing or misshapen.
    pub fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Snake::Plain(vb.get_with_hints((1, channels, 1), "alpha", Init::Const(1.0))?))
    }

    /// Reads `alpha` and `beta` (logarithms, zeros at first).
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn beta(channels: usize, vb: VarBuilder) -> Result<Self> {
        let get = |name| vb.get_with_hints(channels, name, Init::Const(0.0));
        Ok(Snake::Beta(get("alpha")?, get("beta")?))
    }
}

impl Module for Snake {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Snake::Plain(alpha) => crate::snake(x, &alpha.flatten_all()?),
            Snake::Beta(alpha, beta) => crate::snake_beta(x, &alpha.exp()?, &beta.exp()?),
        }
    }
}
