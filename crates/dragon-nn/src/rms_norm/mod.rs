//! Root-mean-square norm over the last dimension.

pub(crate) mod plain;

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
    plain::rms_norm(x, weight, eps)
}
