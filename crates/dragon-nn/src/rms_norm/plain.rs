//! [`super::rms_norm`] as candle operations.

use candle_core::{D, DType, Result, Tensor};

pub(crate) fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    if crate::is_half(x) {
        let weight = weight.map(|w| w.to_dtype(DType::F32)).transpose()?;
        return rms_norm(&x.to_dtype(DType::F32)?, weight.as_ref(), eps)?.to_dtype(x.dtype());
    }
    let y = x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?;
    match weight {
        Some(weight) => y.broadcast_mul(weight),
        None => Ok(y),
    }
}
