//! [`super::swiglu`] as candle operations.

use candle_core::{D, Result, Tensor};

pub(crate) fn swiglu(x: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    x.narrow(D::Minus1, 0, half)?.silu()? * x.narrow(D::Minus1, half, half)?
}
