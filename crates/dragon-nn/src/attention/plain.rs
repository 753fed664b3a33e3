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

/// [`super::attention_cached`] as candle operations: keys that a query does not see are masked.
pub(crate) fn attention_cached(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    seen: &[usize],
    scale: f64,
) -> Result<Tensor> {
    let (batch, t, _) = q.dims3()?;
    let heads = keys.dim(1)?;
    let n = seen.iter().copied().max().unwrap_or(0);
    if n == 0 {
        return q.zeros_like();
    }
    // [B, H, N, D] -> [B, n, H·D]
    let channels_last = |x: &Tensor| x.narrow(2, 0, n)?.transpose(1, 2)?.flatten_from(2);
    let mask = |&seen: &usize| (0..n).map(move |i| if i < seen { 0.0 } else { f32::NEG_INFINITY });
    let bias: Vec<f32> = seen.iter().flat_map(mask).collect();
    let bias = Tensor::from_vec(bias, (batch, 1, t, n), q.device())?.to_dtype(q.dtype())?;
    attention(q, &channels_last(keys)?, &channels_last(values)?, heads, Some(&bias), scale)
}
