//! Element-wise activations and the softmax.

pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// `x Φ(x)`, with the error function (PyTorch's default GELU).
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    plain::gelu(x)
}

/// `x σ(x)`.
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    plain::silu(x)
}

/// `x` where positive, else `slope · x`.
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    plain::leaky_relu(x, slope)
}

/// Softmax over the last dimension.
///
/// # Errors
/// If `x` is not of a float dtype or a scalar.
pub fn softmax_last(x: &Tensor) -> Result<Tensor> {
    plain::softmax_last(x)
}
