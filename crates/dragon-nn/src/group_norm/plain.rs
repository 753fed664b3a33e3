//! [`super::group_norm`] as candle operations.

use candle_core::{Result, Tensor};

pub(crate) fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (_, frames, channels) = x.dims3()?;
    let n = (frames * channels) as f64;
    let centred = x.broadcast_sub(&(x.sum_keepdim((1, 2))? / n)?)?;
    let var = (centred.sqr()?.sum_keepdim((1, 2))? / n)?; // [B, 1, 1]
    let normed = centred.broadcast_div(&(var + eps)?.sqrt()?)?;
    normed.broadcast_mul(weight)?.broadcast_add(bias)
}
