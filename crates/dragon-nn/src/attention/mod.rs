//! Scaled dot-product attention with an additive bias.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// `softmax(scale · q kᵀ + bias) v`, head by head.
///
/// A bias of `-inf` masks a key; a query that sees no key gets zeros.
///
/// # Shapes
/// - `q`: `[B, Tq, H, D]`, `k`: `[B, Tk, H, D]`, `v`: `[B, Tk, H, Dv]`
/// - `bias`: `[B | 1, H | 1, Tq | 1, Tk]`, differentiable
/// - returns `[B, Tq, H, Dv]`
///
/// # Errors
/// If the shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    check(q, k, v, bias)?;
    let mut all = vec![q, k, v];
    all.extend(bias);
    if crate::kernels::fast(&all) {
        cpu::attention(q, k, v, bias, scale)
    } else {
        plain::attention(q, k, v, bias, scale)
    }
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (b, tq, h, d) = q.dims4()?;
    let (_, tk, _, dv) = v.dims4()?;
    if k.dims() != [b, tk, h, d] || v.dims() != [b, tk, h, dv] {
        candle_core::bail!("attention: q {:?}, k {:?} and v {:?} do not fit", q.dims(), k.dims(), v.dims())
    }
    if let Some(bias) = bias {
        let (bb, bh, bq, bk) = bias.dims4()?;
        if !([1, b].contains(&bb) && [1, h].contains(&bh) && [1, tq].contains(&bq) && bk == tk) {
            candle_core::bail!("attention: bias {:?} does not broadcast to {:?}", bias.dims(), [b, h, tq, tk])
        }
    }
    Ok(())
}
