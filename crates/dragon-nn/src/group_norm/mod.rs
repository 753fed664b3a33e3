//! Group norm with all channels in one group.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// `(x - mean) / sqrt(var + eps) · weight + bias`, mean and variance over all frames and channels of a clip
/// (`torch.nn.GroupNorm(1, C)`).
///
/// # Shapes
/// - `x`: `[B, T, C]`, `weight`, `bias`: `[C]`; returns `[B, T, C]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    crate::check_last("group_norm", x, &[Some(weight), Some(bias)])?;
    let all = [x, weight, bias];
    // The fast form has no gradient: the codecs that have such a layer are frozen.
    if crate::kernels::fast(&all) && !all.iter().any(|t| t.track_op()) {
        cpu::group_norm(x, weight, bias, eps)
    } else {
        plain::group_norm(x, weight, bias, eps)
    }
}
