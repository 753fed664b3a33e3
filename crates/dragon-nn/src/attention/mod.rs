//! Scaled dot-product attention with an additive bias.

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
