//! [`super::ada_layer_norm`] as candle operations.

use candle_core::{Result, Tensor};

pub(crate) fn ada_layer_norm(x: &Tensor, shift: &Tensor, scale: &Tensor, eps: f64) -> Result<Tensor> {
    let y = crate::layer_norm::plain::layer_norm(x, None, None, eps)?;
    y.broadcast_mul(&(scale + 1.0)?.unsqueeze(1)?)?.broadcast_add(&shift.unsqueeze(1)?)
}
