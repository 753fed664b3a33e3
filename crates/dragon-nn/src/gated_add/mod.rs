//! The gated residual sum of a DiT block.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// `x + gate · y`, the gate the same for all frames of an example (Peebles & Xie 2023, arXiv:2212.09748).
///
/// # Shapes
/// - `x`, `y`: `[B, T, C]`; `gate`: `[B, C]`; returns `[B, T, C]`.
///
/// # Errors
/// If the shapes do not fit each other.
pub fn gated_add(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (batch, _, channels) = x.dims3()?;
    if y.dims() != x.dims() || gate.dims() != [batch, channels] {
        candle_core::bail!(
            "gated_add: x {:?}, gate {:?} and y {:?} do not fit",
            x.dims(),
            gate.dims(),
            y.dims()
        )
    }
    if crate::kernels::fast(&[x, gate, y]) {
        cpu::gated_add(x, gate, y)
    } else {
        plain::gated_add(x, gate, y)
    }
}
