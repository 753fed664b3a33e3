//! Scaled dot-product attention with an additive bias.

mod cached;
mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// `softmax(scale · q kᵀ + bias) v`, head by head: head `h` has channels `h D` to `(h + 1) D`.
///
/// A bias of `-inf` masks a key; a query that sees no key gets zeros.
///
/// # Shapes
/// - `q`: `[B, Tq, H·D]`, `k`: `[B, Tk, H·D]`, `v`: `[B, Tk, H·Dv]`, with `H = heads`
/// - `bias`: `[B | 1, H | 1, Tq | 1, Tk]`, differentiable
/// - returns `[B, Tq, H·Dv]`
///
/// # Errors
/// If the shapes do not fit.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    bias: Option<&Tensor>,
    scale: f64,
) -> Result<Tensor> {
    check(q, k, v, heads, bias)?;
    let mut all = vec![q, k, v];
    all.extend(bias);
    if crate::kernels::fast(&all) {
        cpu::attention(q, k, v, heads, bias, scale)
    } else {
        plain::attention(q, k, v, heads, bias, scale)
    }
}

/// Attention of a language model to the keys and values of earlier steps, which lie in buffers of `N` rows, without gradient:
/// query `t` of example `b` sees the first `seen[b·T + t]` of them; one that sees none gets zeros.
///
/// Each row of the result depends on its own example only, bit for bit, and on no row that it does not see.
///
/// # Shapes
/// - `q`: `[B, T, H·D]`, `keys`, `values`: `[B, H, N, D]`, `seen`: `B·T` numbers; returns `[B, T, H·D]`.
///
/// # Errors
/// If the shapes do not fit, or a query would see more than `N` keys.
pub fn attention_cached(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    seen: &[usize],
    scale: f64,
) -> Result<Tensor> {
    let (batch, t, channels) = q.dims3()?;
    let (b, heads, n, d) = keys.dims4()?;
    if b != batch || heads * d != channels || values.dims() != keys.dims() || seen.len() != batch * t {
        candle_core::bail!(
            "attention: q {:?}, keys {:?}, values {:?} and {} numbers of keys do not fit",
            q.dims(),
            keys.dims(),
            values.dims(),
            seen.len()
        )
    }
    if let Some(more) = seen.iter().find(|&&seen| seen > n) {
        candle_core::bail!("attention: a query sees {more} keys, there are {n}")
    }
    let (q, keys, values) = (q.detach(), keys.detach(), values.detach());
    if crate::kernels::fast(&[&q, &keys, &values]) {
        cached::attention(&q, &keys, &values, seen, scale)
    } else {
        plain::attention_cached(&q, &keys, &values, seen, scale)
    }
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, bias: Option<&Tensor>) -> Result<()> {
    let ((b, tq, c), (_, tk, cv)) = (q.dims3()?, v.dims3()?);
    if k.dims() != [b, tk, c] || v.dim(0)? != b {
        candle_core::bail!("attention: q {:?}, k {:?} and v {:?} do not fit", q.dims(), k.dims(), v.dims())
    }
    if heads == 0 || !c.is_multiple_of(heads) || !cv.is_multiple_of(heads) {
        candle_core::bail!("attention: {c} and {cv} channels do not divide into {heads} heads")
    }
    if let Some(bias) = bias {
        let (bb, bh, bq, bk) = bias.dims4()?;
        if !([1, b].contains(&bb) && [1, heads].contains(&bh) && [1, tq].contains(&bq) && bk == tk) {
            let want = [b, heads, tq, tk];
            candle_core::bail!("attention: bias {:?} does not broadcast to {want:?}", bias.dims())
        }
    }
    Ok(())
}
