//! [`super::swiglu`] as candle operations.

use super::Halves;
use candle_core::{D, Result, Tensor};

pub(crate) fn swiglu(x: &Tensor, halves: Halves) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (gate, value) = halves.order((x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?));
    gate.silu()? * value
}
