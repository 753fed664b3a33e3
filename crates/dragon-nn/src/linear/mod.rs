//! `y = x Wᵀ + b` on the last dimension.

mod cpu;
mod few_rows;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// Affine map of the last dimension: `x Wᵀ + b`.
///
/// Each row of the result depends on its row of `x` only, bit for bit: the number of rows does not matter.
///
/// # Shapes
/// - `x`: `[..., in]`, `weight`: `[out, in]`, `bias`: `[out]`; returns `[..., out]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    check(x, weight, bias)?;
    let mut all = vec![x, weight];
    all.extend(bias);
    if crate::kernels::fast(&all) { cpu::linear(x, weight, bias) } else { plain::linear(x, weight, bias) }
}

/// [`linear`] without bias and without gradient, for a few rows at a time, where the time goes into reading the weights: a
/// language model that makes one token after the other. Reads them once, where they lie.
///
/// Each row of the result depends on its row of `x` only, bit for bit; the sums have another order than those of [`linear`].
///
/// # Shapes
/// - `x`: `[..., in]`, `weight`: `[out, in]`; returns `[..., out]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn linear_few_rows(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    check(x, weight, None)?;
    let (x, weight) = (x.detach(), weight.detach());
    if crate::kernels::fast(&[&x, &weight]) {
        few_rows::linear(&x, &weight)
    } else {
        plain::linear(&x, &weight, None)
    }
}

fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (n_out, n_in) = weight.dims2()?;
    if x.dims().last() != Some(&n_in) {
        candle_core::bail!(
            "linear: x {:?} does not end in the {n_in} inputs of weight {:?}",
            x.dims(),
            weight.dims()
        )
    }
    if let Some(bias) = bias
        && bias.dims() != [n_out]
    {
        candle_core::bail!("linear: bias {:?} does not fit weight {:?}", bias.dims(), weight.dims())
    }
    Ok(())
}
