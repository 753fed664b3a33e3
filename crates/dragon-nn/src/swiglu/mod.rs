//! The gate of a SwiGLU feed-forward layer.

pub(crate) mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// `silu(gate) · value`, where the last dimension holds the gate and then the value (Shazeer 2020, arXiv:2002.05202).
///
/// # Shapes
/// - `x`: `[..., 2 C]`; returns `[..., C]`.
///
/// # Errors
/// If the last dimension is odd or missing.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    match x.dims().last() {
        Some(c) if c.is_multiple_of(2) && crate::kernels::fast(&[x]) => cpu::swiglu(x),
        Some(c) if c.is_multiple_of(2) => plain::swiglu(x),
        _ => candle_core::bail!("swiglu: the last dimension of {:?} must be even", x.dims()),
    }
}
