//! [`super::layer_norm`] as candle operations.

use candle_core::{D, DType, Result, Tensor};

pub(crate) fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    if crate::is_half(x) {
        let wide = |t: Option<&Tensor>| t.map(|t| t.to_dtype(DType::F32)).transpose();
        let (weight, bias) = (wide(weight)?, wide(bias)?);
        let y = layer_norm(&x.to_dtype(DType::F32)?, weight.as_ref(), bias.as_ref(), eps)?;
        return y.to_dtype(x.dtype());
    }
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let mut y = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(weight)?;
    }
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}
