//! Element-wise activations and the softmax.

pub(crate) mod cpu;
pub(crate) mod plain;

use crate::kernels::fast;
use candle_core::{Result, Tensor};
use cpu::Activation;

/// `x Φ(x)`, with the error function (PyTorch's default GELU).
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { cpu::apply(x, Activation::Gelu) } else { plain::gelu(x) }
}

/// `x (1 + tanh(sqrt(2 / π) (x + 0.044715 x³))) / 2`, GELU without the error function (`gelu_new` of transformers).
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { cpu::apply(x, Activation::GeluTanh) } else { plain::gelu_tanh(x) }
}

/// `x σ(x)`.
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { cpu::apply(x, Activation::Silu) } else { plain::silu(x) }
}

/// `x` where positive, else 0.
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { cpu::apply(x, Activation::Relu) } else { plain::relu(x) }
}

/// `x` where positive, else `slope · x`.
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    if fast(&[x]) { cpu::apply(x, Activation::LeakyRelu(slope)) } else { plain::leaky_relu(x, slope) }
}

/// `x` where positive, else `exp(x) - 1`.
///
/// # Errors
/// If `x` is not of a float dtype.
pub fn elu(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { cpu::apply(x, Activation::Elu) } else { plain::elu(x) }
}

/// Softmax over the last dimension.
///
/// # Errors
/// If `x` is not of a float dtype or a scalar.
pub fn softmax_last(x: &Tensor) -> Result<Tensor> {
    if fast(&[x]) { cpu::softmax_last(x) } else { plain::softmax_last(x) }
}
