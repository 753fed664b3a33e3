//! Small modules shared by the encoders: what `dragon-nn` computes, with the initial weights of each reference.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// Affine map with a normal initial weight of a given deviation (the transformers here set their own; zero bias).
#[derive(Debug, Clone)]
pub(crate) struct Dense {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Dense {
    /// `weight` `[n_out, n_in]` and `bias` `[n_out]` under `vb`.
    pub(crate) fn new(n_in: usize, n_out: usize, std: f64, vb: VarBuilder) -> Result<Self> {
        let bias = Some(vb.get_with_hints(n_out, "bias", Init::Const(0.0))?);
        Ok(Self { bias, ..Self::no_bias(n_in, n_out, std, vb)? })
    }

    /// `weight` `[n_out, n_in]` under `vb`.
    pub(crate) fn no_bias(n_in: usize, n_out: usize, std: f64, vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: std };
        Ok(Self { weight: vb.get_with_hints((n_out, n_in), "weight", init)?, bias: None })
    }

    /// `[..., n_in]` to `[..., n_out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        dragon_nn::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// Layer norm over the last axis with scale and shift (`weight`, `bias`).
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl Norm {
    /// `weight` and `bias`, both `[dim]`, under `vb`.
    pub(crate) fn new(dim: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(dim, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(dim, "bias", Init::Const(0.0))?,
            eps,
        })
    }

    /// Same shape.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        dragon_nn::layer_norm(x, Some(&self.weight), Some(&self.bias), self.eps)
    }
}

/// Rows of a table by id: `table` `[V, D]`, `ids` `[B, L]` u32; returns `[B, L, D]`.
pub(crate) fn embed(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (batch, len) = ids.dims2()?;
    let dim = table.dim(1)?;
    table.index_select(&ids.flatten_all()?, 0)?.reshape((batch, len, dim)) // [B, L, D]
}

/// Attention bias of a padding mask: `[B, L]` 1/0 to `[B, 1, 1, L]`, 0 on tokens and -inf on padding.
///
/// # Errors
/// If the shape of `mask` is not that of `ids`.
pub(crate) fn padding_bias(ids: &Tensor, mask: &Tensor, dtype: DType) -> Result<Tensor> {
    if ids.dims() != mask.dims() {
        candle_core::bail!(
            "token mask: expected shape {:?} as the ids have, found {:?}",
            ids.dims(),
            mask.dims()
        )
    }
    let (batch, len) = mask.dims2()?;
    let on = mask.to_dtype(DType::F32)?.gt(0.5)?; // [B, L]
    let zero = Tensor::zeros((batch, len), dtype, mask.device())?;
    let off = Tensor::full(f32::NEG_INFINITY, (batch, len), mask.device())?.to_dtype(dtype)?;
    on.where_cond(&zero, &off)?.reshape((batch, 1, 1, len)) // [B, 1, 1, L]
}

/// A u32 index tensor from host numbers.
pub(crate) fn index(values: Vec<u32>, device: &Device) -> Result<Tensor> {
    let n = values.len();
    Tensor::from_vec(values, n, device)
}
