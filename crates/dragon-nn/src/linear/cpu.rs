//! [`super::linear`] on the CPU, forward and backward.

use crate::backward::hand_over;
use crate::kernels::gemm::{Packed, Rows, product, weight_gradient};
use crate::kernels::{Real, by_dtype, column_sums, dtype, filled, slice, tensor, view};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, Linear),
        None => x.apply_op2(&weight, Linear),
    }
}

struct Linear;

fn rows(n_rows: usize, n_in: usize, n_out: usize) -> Rows<'static> {
    Rows {
        batch: 1,
        in_batch: 0,
        out_batch: 0,
        n_rows,
        in_step: 1,
        in_rows: n_rows,
        taps: &[0],
        width: n_in,
        in_stride: n_in,
        out_step: n_out,
        out_start: 0,
        parallel: true,
    }
}

/// `x Wᵀ + b`, with `w` as `[n_out, n_in]`.
fn forward<T: Real>(x: &[T], w: &[T], bias: Option<&[T]>, n_in: usize, n_out: usize) -> Vec<T> {
    let n = x.len() / n_in;
    let packed = Packed::new(w, (1, n_in, n_out), |_| 0, (1, n_in));
    // SAFETY: every row and column is written.
    unsafe { filled(n * n_out, |out| product(x, &packed, bias, out, &rows(n, n_in, n_out))) }
}

/// `g W`.
fn input_gradient<T: Real>(g: &[T], w: &[T], n_in: usize, n_out: usize) -> Vec<T> {
    let n = g.len() / n_out;
    let packed = Packed::new(w, (1, n_out, n_in), |_| 0, (n_in, 1));
    // SAFETY: every row and column is written.
    unsafe { filled(n * n_in, |out| product(g, &packed, None, out, &rows(n, n_out, n_in))) }
}

fn cpu_forward<T: Real>(
    x: (&CpuStorage, &Layout),
    w: (&CpuStorage, &Layout),
    bias: Option<(&CpuStorage, &Layout)>,
) -> Result<(CpuStorage, Shape)> {
    let (n_out, n_in) = w.1.shape().dims2()?;
    let bias = bias.map(|(s, l)| slice::<T>(s, l)).transpose()?;
    let y = forward(slice::<T>(x.0, x.1)?, slice(w.0, w.1)?, bias, n_in, n_out);
    let mut dims = x.1.dims().to_vec();
    *dims.last_mut().expect("rank checked") = n_out;
    Ok((T::storage(y), Shape::from(dims)))
}

fn backward<T: Real>(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let (n_out, n_in) = w.dims2()?;
    let grad = grad.contiguous()?;
    let g = view::<T>(&grad)?;
    let dx = if x.track_op() {
        Some(tensor(input_gradient(&g, &view::<T>(w)?, n_in, n_out), x.shape())?)
    } else {
        None
    };
    let dw = if w.track_op() {
        let x = view::<T>(x)?;
        let n = x.len() / n_in;
        // Rows and columns change places: `[n_out, n_in]` comes out in the weight's own layout.
        let rows = Rows { out_step: n_in, width: n_out, in_stride: n_out, ..rows(n, n_out, n_in) };
        // SAFETY: both matrices have `n` rows.
        let dw = unsafe { weight_gradient(&g, &x, n_in, &rows) };
        hand_over(w, tensor(dw, w.shape())?)?
    } else {
        None
    };
    let db = match bias {
        Some(bias) if bias.track_op() => hand_over(bias, tensor(column_sums(&g, n_out), bias.shape())?)?,
        _ => None,
    };
    Ok((dx, dw, db))
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(w), T => cpu_forward::<T>((x, xl), (w, wl), None))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = by_dtype!(w.dtype(), T => backward::<T>(x, w, None, grad))?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(w), T => cpu_forward::<T>((x, xl), (w, wl), Some((b, bl))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        by_dtype!(w.dtype(), T => backward::<T>(x, w, Some(b), grad))
    }
}
