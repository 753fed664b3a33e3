//! Root-mean-square norm over the last dimension.

pub(crate) mod plain;

use crate::kernels::{self, norm::Norm};
use candle_core::{Result, Tensor};

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension.
///
/// # Shapes
/// - `x`: `[..., C]`, `weight`: `[C]`; returns `[..., C]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    crate::check_last("rms_norm", x, &[weight])?;
    let mut all = vec![x];
    all.extend(weight);
    if kernels::fast(&all) {
        crate::layer_norm::cpu::apply(x, weight, None, Norm { centred: false, eps, one_plus: false })
    } else {
        plain::rms_norm(x, weight, eps)
    }
}
