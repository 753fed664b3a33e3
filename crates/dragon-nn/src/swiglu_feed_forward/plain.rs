//! [`super::swiglu_feed_forward`] as its three operations.

use crate::swiglu::Halves::GateFirst;
use candle_core::{Result, Tensor};

pub(crate) fn swiglu_feed_forward(x: &Tensor, w_in: &Tensor, w_out: &Tensor) -> Result<Tensor> {
    let hidden = crate::linear::plain::linear(x, w_in, None)?;
    crate::linear::plain::linear(&crate::swiglu::plain::swiglu(&hidden, GateFirst)?, w_out, None)
}
