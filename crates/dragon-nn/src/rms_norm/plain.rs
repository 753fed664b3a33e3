//! [`super::rms_norm`] as candle operations.

use candle_core::{D, Result, Tensor};

pub(crate) fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let y = x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?;
    match weight {
        Some(weight) => y.broadcast_mul(weight),
        None => Ok(y),
    }
}
