//! The activations as candle operations.

use candle_core::{D, Result, Tensor};

pub(crate) fn gelu(x: &Tensor) -> Result<Tensor> {
    x.gelu_erf()
}

pub(crate) fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    x.gelu() // candle's is the tanh form
}

pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    x.silu()
}

pub(crate) fn relu(x: &Tensor) -> Result<Tensor> {
    x.relu()
}

pub(crate) fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    x.relu()? - (x.neg()?.relu()? * slope)?
}

pub(crate) fn elu(x: &Tensor) -> Result<Tensor> {
    x.elu(1.0)
}

pub(crate) fn softmax_last(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}
