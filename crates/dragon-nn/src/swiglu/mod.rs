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
    apply(x, Halves::GateFirst)
}

/// [`swiglu`] where the last dimension holds the value and then the gate, as in Stable Audio and diffusers.
///
/// # Errors
/// As [`swiglu`].
pub fn swiglu_value_first(x: &Tensor) -> Result<Tensor> {
    apply(x, Halves::ValueFirst)
}

/// Which half of a row is the gate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Halves {
    GateFirst,
    ValueFirst,
}

impl Halves {
    /// Gate and value of a row's halves, or the halves of a gate and a value.
    fn order<T>(self, (first, second): (T, T)) -> (T, T) {
        match self {
            Halves::GateFirst => (first, second),
            Halves::ValueFirst => (second, first),
        }
    }
}

fn apply(x: &Tensor, halves: Halves) -> Result<Tensor> {
    match x.dims().last() {
        Some(c) if c.is_multiple_of(2) && crate::kernels::fast(&[x]) => cpu::swiglu(x, halves),
        Some(c) if c.is_multiple_of(2) => plain::swiglu(x, halves),
        _ => candle_core::bail!("swiglu: the last dimension of {:?} must be even", x.dims()),
    }
}
