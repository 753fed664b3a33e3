//! [`super::gated_add`] on the CPU, forward and backward.

use crate::kernels::{Real, by_dtype, dtype, filled, for_each, rows_per_task, slice, tensor, view};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

pub(crate) fn gated_add(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&gate.contiguous()?, &y.contiguous()?, GatedAdd)
}

struct GatedAdd;

fn forward<T: Real>(x: &[T], gate: &[T], y: &[T], frames: usize, c: usize) -> Vec<T> {
    let rows = x.len() / c.max(1);
    let block = rows_per_task(c);
    // SAFETY: the blocks cover the rows.
    unsafe {
        filled(x.len(), |out| {
            for_each(rows.div_ceil(block), x.len() * 2, |task| {
                for r in task * block..((task + 1) * block).min(rows) {
                    let gate = &gate[r / frames * c..][..c];
                    let (x, y, out) = (&x[r * c..][..c], &y[r * c..][..c], out.range(r * c, c));
                    for i in 0..c {
                        out[i] = gate[i].fma(y[i], x[i]);
                    }
                }
            });
        })
    }
}

/// Gradients of the gate, a sum over the frames in their order, and of `y`.
fn backward<T: Real>(gate: &[T], y: &[T], g: &[T], frames: usize, c: usize) -> (Vec<T>, Vec<T>) {
    let mut d_gate = vec![T::ZERO; gate.len()];
    let d_gate_pointer = crate::kernels::shared(&mut d_gate);
    // SAFETY: each example has rows of its own, and together they are all.
    let d_y = unsafe {
        filled(y.len(), |d_y| {
            for_each(gate.len() / c.max(1), y.len() * 4, |b| {
                let (gate, d_gate) = (&gate[b * c..][..c], d_gate_pointer.range(b * c, c));
                for r in b * frames..(b + 1) * frames {
                    let (y, g, d_y) = (&y[r * c..][..c], &g[r * c..][..c], d_y.range(r * c, c));
                    for i in 0..c {
                        d_gate[i] = g[i].fma(y[i], d_gate[i]);
                        d_y[i] = g[i] * gate[i];
                    }
                }
            });
        })
    };
    (d_gate, d_y)
}

impl CustomOp3 for GatedAdd {
    fn name(&self) -> &'static str {
        "gated_add"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        gate: &CpuStorage,
        gate_layout: &Layout,
        y: &CpuStorage,
        yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, frames, c) = xl.shape().dims3()?;
        by_dtype!(dtype(x), T => {
            let sum = forward(slice::<T>(x, xl)?, slice(gate, gate_layout)?, slice(y, yl)?, frames, c);
            Ok((T::storage(sum), xl.shape().clone()))
        })
    }

    fn bwd(
        &self,
        _: &Tensor,
        gate: &Tensor,
        y: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, frames, c) = y.dims3()?;
        let grad = grad.contiguous()?;
        by_dtype!(y.dtype(), T => {
            let (d_gate, d_y) =
                backward(&view::<T>(gate)?, &view::<T>(y)?, &view::<T>(&grad)?, frames, c);
            let (d_gate, d_y) = (tensor(d_gate, gate.shape())?, tensor(d_y, y.shape())?);
            Ok((Some(grad), Some(d_gate), Some(d_y)))
        })
    }
}
