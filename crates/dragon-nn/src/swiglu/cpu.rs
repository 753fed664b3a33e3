//! [`super::swiglu`] on the CPU, forward and backward.

use super::Halves;
use crate::kernels::{Real, by_dtype, dtype, filled, for_each, rows_per_task, slice, tensor, view};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

pub(crate) fn swiglu(x: &Tensor, halves: Halves) -> Result<Tensor> {
    x.contiguous()?.apply_op1(SwiGlu(halves))
}

struct SwiGlu(Halves);

/// `[rows, 2 c]` to `[rows, c]`.
pub(crate) fn forward<T: Real>(x: &[T], c: usize, halves: Halves) -> Vec<T> {
    let rows = x.len() / (2 * c);
    let block = rows_per_task(c);
    // SAFETY: the blocks cover the rows.
    unsafe {
        filled(rows * c, |out| {
            for_each(rows.div_ceil(block), x.len() * 8, |task| {
                for r in task * block..((task + 1) * block).min(rows) {
                    let (gate, value) = halves.order(x[r * 2 * c..(r + 1) * 2 * c].split_at(c));
                    let y = out.range(r * c, c);
                    for ((y, &gate), &value) in y.iter_mut().zip(gate).zip(value) {
                        *y = gate * gate.sigmoid() * value;
                    }
                }
            });
        })
    }
}

/// The gradient of [`forward`] in `x`, given that of its result.
pub(crate) fn backward<T: Real>(x: &[T], g: &[T], c: usize, halves: Halves) -> Vec<T> {
    let rows = x.len() / (2 * c);
    let block = rows_per_task(c);
    // SAFETY: the blocks cover the rows.
    unsafe {
        filled(x.len(), |out| {
            for_each(rows.div_ceil(block), x.len() * 8, |task| {
                for r in task * block..((task + 1) * block).min(rows) {
                    let (gate, value) = halves.order(x[r * 2 * c..(r + 1) * 2 * c].split_at(c));
                    let g = &g[r * c..(r + 1) * c];
                    let (d_gate, d_value) = halves.order(out.range(r * 2 * c, 2 * c).split_at_mut(c));
                    for i in 0..c {
                        let s = gate[i].sigmoid();
                        let silu = gate[i] * s;
                        d_value[i] = g[i] * silu;
                        d_gate[i] = g[i] * value[i] * (s + silu * (T::ONE - s));
                    }
                }
            });
        })
    }
}

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut dims = xl.dims().to_vec();
        let last = dims.last_mut().expect("rank checked");
        *last /= 2;
        let c = *last;
        by_dtype!(dtype(x), T => Ok((T::storage(forward(slice::<T>(x, xl)?, c, self.0)), Shape::from(dims))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let c = x.dims().last().expect("rank checked") / 2;
        let grad = grad.contiguous()?;
        let dx = by_dtype!(x.dtype(), T => tensor(backward(&view::<T>(x)?, &view::<T>(&grad)?, c, self.0), x.shape()))?;
        Ok(Some(dx))
    }
}
