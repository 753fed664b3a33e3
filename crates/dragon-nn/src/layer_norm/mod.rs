//! Layer norm over the last dimension.

pub(crate) mod cpu;
pub(crate) mod plain;

use crate::kernels::{self, norm::Norm};
use candle_core::{Result, Tensor};

/// `(x - mean) / sqrt(var + eps) · weight + bias` over the last dimension, with the biased variance (as PyTorch).
///
/// # Shapes
/// - `x`: `[..., C]`, `weight`, `bias`: `[C]`; returns `[..., C]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    crate::check_last("layer_norm", x, &[weight, bias])?;
    let mut all = vec![x];
    all.extend(weight);
    all.extend(bias);
    if kernels::fast(&all) && (weight.is_some() || bias.is_none()) {
        cpu::apply(x, weight, bias, Norm { centred: true, eps, one_plus: false })
    } else {
        plain::layer_norm(x, weight, bias, eps)
    }
}
