//! [`super::snake`] on the CPU, forward and backward.

use crate::backward::hand_over;
use crate::kernels::{
    Real, by_dtype, dtype, filled, for_each, ordered_sum, rows_per_task, slice, tensor, view,
};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

pub(crate) fn snake(x: &Tensor, alpha: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&alpha.contiguous()?, Snake)
}

struct Snake;

fn inverse<T: Real>(alpha: &[T]) -> Vec<T> {
    alpha.iter().map(|&a| T::ONE / (a + T::of(super::EPS))).collect()
}

fn forward<T: Real>(x: &[T], alpha: &[T]) -> Vec<T> {
    let c = alpha.len();
    let rows = x.len() / c;
    let block = rows_per_task(c);
    let inverse = inverse(alpha);
    // SAFETY: the blocks cover the rows.
    unsafe {
        filled(x.len(), |out| {
            for_each(rows.div_ceil(block), x.len() * 8, |task| {
                for r in task * block..((task + 1) * block).min(rows) {
                    let (x, y) = (&x[r * c..(r + 1) * c], out.range(r * c, c));
                    let (alpha, inverse) = (&alpha[..c], &inverse[..c]);
                    for i in 0..c {
                        let (s, _) = (alpha[i] * x[i]).sin_cos_();
                        y[i] = (s * s).fma(inverse[i], x[i]);
                    }
                }
            });
        })
    }
}

/// Gradients with respect to `x` and `alpha`, in one pass.
fn backward<T: Real>(x: &[T], alpha: &[T], g: &[T]) -> (Vec<T>, Vec<T>) {
    let c = alpha.len();
    let rows = x.len() / c;
    let block = rows.div_ceil(64).max(rows_per_task(c).min(256));
    let inverse = inverse(alpha);
    let two = T::of(2.0);
    let mut d_alpha = Vec::new();
    // SAFETY: the blocks cover the rows.
    let dx = unsafe {
        filled(x.len(), |out| {
            d_alpha = ordered_sum(rows.div_ceil(block), c, x.len() * 16, |task, sum| {
                for r in task * block..((task + 1) * block).min(rows) {
                    let (x, g, dx) = (&x[r * c..(r + 1) * c], &g[r * c..(r + 1) * c], out.range(r * c, c));
                    let (alpha, inverse, sum) = (&alpha[..c], &inverse[..c], &mut sum[..c]);
                    for i in 0..c {
                        let (s, co) = (alpha[i] * x[i]).sin_cos_();
                        let slope = two * s * co * inverse[i]; // d/d(alpha x) of sin²/(alpha + eps)
                        dx[i] = g[i] * slope.fma(alpha[i], T::ONE);
                        let scaled = s * inverse[i];
                        sum[i] += g[i] * (slope * x[i] - scaled * scaled);
                    }
                }
            });
        })
    };
    (dx, d_alpha)
}

impl CustomOp2 for Snake {
    fn name(&self) -> &'static str {
        "snake"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        a: &CpuStorage,
        al: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(x), T => {
            Ok((T::storage(forward(slice::<T>(x, xl)?, slice(a, al)?)), xl.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        alpha: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        by_dtype!(x.dtype(), T => {
            let (dx, d_alpha) = backward(&view::<T>(x)?, &view::<T>(alpha)?, &view::<T>(&grad)?);
            let d_alpha = if alpha.track_op() { hand_over(alpha, tensor(d_alpha, alpha.shape())?)? } else { None };
            Ok((Some(tensor(dx, x.shape())?), d_alpha))
        })
    }
}
