//! [`super::snake_beta`] on the CPU, forward and backward.

use crate::backward::hand_over;
use crate::kernels::{
    Real, by_dtype, dtype, filled, for_each, ordered_sum, rows_per_task, slice, tensor, view,
};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

pub(crate) fn snake(x: &Tensor, alpha: &Tensor, beta: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&alpha.contiguous()?, &beta.contiguous()?, Snake)
}

struct Snake;

fn inverse<T: Real>(beta: &[T]) -> Vec<T> {
    beta.iter().map(|&b| T::ONE / (b + T::of(super::EPS))).collect()
}

fn forward<T: Real>(x: &[T], alpha: &[T], beta: &[T]) -> Vec<T> {
    let c = alpha.len();
    let rows = x.len() / c;
    let block = rows_per_task(c);
    let inverse = inverse(beta);
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

/// Gradients with respect to `x`, `alpha` and `beta`, in one pass.
fn backward<T: Real>(x: &[T], alpha: &[T], beta: &[T], g: &[T]) -> [Vec<T>; 3] {
    let c = alpha.len();
    let rows = x.len() / c;
    let block = rows.div_ceil(64).max(rows_per_task(c).min(256));
    let inverse = inverse(beta);
    let two = T::of(2.0);
    let mut sums = Vec::new();
    // SAFETY: the blocks cover the rows.
    let dx = unsafe {
        filled(x.len(), |out| {
            sums = ordered_sum(rows.div_ceil(block), 2 * c, x.len() * 16, |task, sums| {
                let (d_alpha, d_beta) = sums.split_at_mut(c);
                for r in task * block..((task + 1) * block).min(rows) {
                    let (x, g, dx) = (&x[r * c..(r + 1) * c], &g[r * c..(r + 1) * c], out.range(r * c, c));
                    let (alpha, inverse) = (&alpha[..c], &inverse[..c]);
                    let (d_alpha, d_beta) = (&mut d_alpha[..c], &mut d_beta[..c]);
                    for i in 0..c {
                        let (s, co) = (alpha[i] * x[i]).sin_cos_();
                        let slope = two * s * co * inverse[i]; // d/d(alpha x) of sin²/(beta + eps)
                        dx[i] = g[i] * slope.fma(alpha[i], T::ONE);
                        let scaled = s * inverse[i];
                        d_alpha[i] += g[i] * (slope * x[i]);
                        d_beta[i] += -(g[i] * (scaled * scaled));
                    }
                }
            });
        })
    };
    let d_beta = sums.split_off(c);
    [dx, sums, d_beta]
}

impl CustomOp3 for Snake {
    fn name(&self) -> &'static str {
        "snake"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(x), T => {
            Ok((T::storage(forward(slice::<T>(x, xl)?, slice(a, al)?, slice(b, bl)?)), xl.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        alpha: &Tensor,
        beta: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        by_dtype!(x.dtype(), T => {
            let [dx, d_alpha, d_beta] =
                backward(&view::<T>(x)?, &view::<T>(alpha)?, &view::<T>(beta)?, &view::<T>(&grad)?);
            let wanted = |param: &Tensor, data: Vec<T>| match param.track_op() {
                true => hand_over(param, tensor(data, param.shape())?),
                false => Ok(None),
            };
            Ok((Some(tensor(dx, x.shape())?), wanted(alpha, d_alpha)?, wanted(beta, d_beta)?))
        })
    }
}
