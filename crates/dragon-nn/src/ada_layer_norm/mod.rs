//! Layer norm whose scale and shift come from a condition (adaptive layer norm of DiT).

pub(crate) mod plain;

use crate::kernels::{self, norm::Norm};
use candle_core::{Result, Tensor};

/// `layer_norm(x) · (1 + scale) + shift`, one scale and shift per example (Peebles & Xie 2023, arXiv:2212.09748).
///
/// # Shapes
/// - `x`: `[B, T, C]`, `shift`, `scale`: `[B, C]`; returns `[B, T, C]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn ada_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let (b, _, c) = x.dims3()?;
    if shift.dims() != [b, c] || scale.dims() != [b, c] {
        candle_core::bail!(
            "ada_layer_norm: shift {:?} and scale {:?} do not fit x {:?}",
            shift.dims(),
            scale.dims(),
            x.dims()
        )
    }
    if kernels::fast(&[x, shift, scale]) {
        crate::layer_norm::cpu::apply(
            x,
            Some(scale),
            Some(shift),
            Norm { centred: true, eps, one_plus: true },
        )
    } else {
        plain::ada_layer_norm(x, shift, scale, eps)
    }
}
