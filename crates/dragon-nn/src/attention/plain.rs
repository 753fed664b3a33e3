//! [`super::attention`] as candle operations; stores the logits of all heads.

use candle_core::{D, DType, Result, Tensor};

pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    bias: Option<&Tensor>,
    scale: f64,
) -> Result<Tensor> {
    let heads_first = |t: &Tensor| {
        let (batch, len, channels) = t.dims3()?;
        t.reshape((batch, len, heads, channels / heads))?.transpose(1, 2)?.contiguous() // [B, H, T, D]
    };
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let logits = (q.matmul(&k.t()?)? * scale)?; // [B, H, Tq, Tk]
    let wide = |t: &Tensor| if crate::is_half(t) { t.to_dtype(DType::F32) } else { Ok(t.clone()) };
    let logits = wide(&logits)?;
    let logits = match bias {
        Some(bias) => logits.broadcast_add(&wide(bias)?)?,
        None => logits,
    };
    // A row of which every key is masked has no maximum; the floor makes its weights exp(-inf) = 0.
    let max = logits.max_keepdim(D::Minus1)?.detach().maximum(-1e30)?;
    let weights = logits.broadcast_sub(&max)?.exp()?;
    let total = weights.sum_keepdim(D::Minus1)?;
    let total = total.maximum(&total.ones_like()?.affine(1e-30, 0.0)?)?;
    let mixed = weights.broadcast_div(&total)?.to_dtype(v.dtype())?.matmul(&v)?; // [B, H, Tq, Dv]
    mixed.transpose(1, 2)?.flatten_from(2) // [B, Tq, H·Dv]
}
