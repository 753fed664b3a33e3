//! [`super::gated_add`] as candle operations.

use candle_core::{Result, Tensor};

pub(crate) fn gated_add(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    x + y.broadcast_mul(&gate.unsqueeze(1)?)?
}
