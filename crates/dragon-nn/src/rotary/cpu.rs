//! [`super::Rotary::apply`] on the CPU: a pass over the rows, whose gradient is the turn back.

use super::Rotary;
use crate::kernels::{Real, by_dtype, dtype, filled, for_each, rows_per_task, slice};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

pub(crate) fn rotary(angles: &Rotary, x: &Tensor, heads: usize) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Turn { angles: angles.clone(), heads, sign: 1.0 })
}

/// Turns by the angles (`sign` 1) or back (`sign` -1).
struct Turn {
    angles: Rotary,
    heads: usize,
    sign: f64,
}

impl Turn {
    fn run<T: Real>(&self, x: &[T], frames: usize, channels: usize) -> Vec<T> {
        let (half, head_dim) = (self.angles.half, channels / self.heads);
        let rows = x.len() / channels;
        let block = rows_per_task(channels);
        let (cos, sin) = (&self.angles.cos, &self.angles.sin);
        // SAFETY: the blocks cover the rows.
        unsafe {
            filled(x.len(), |out| {
                for_each(rows.div_ceil(block), x.len() * 2, |task| {
                    for r in task * block..((task + 1) * block).min(rows) {
                        let t = r % frames;
                        let (cos, sin) = (&cos[t * half..][..half], &sin[t * half..][..half]);
                        let (x, out) = (&x[r * channels..][..channels], out.range(r * channels, channels));
                        for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
                            for i in 0..half {
                                let (c, s) = (T::of(cos[i].into()), T::of(self.sign * f64::from(sin[i])));
                                out[i] = x[i] * c - x[half + i] * s;
                                out[half + i] = x[half + i] * c + x[i] * s;
                            }
                            out[2 * half..].copy_from_slice(&x[2 * half..]);
                        }
                    }
                });
            })
        }
    }
}

impl CustomOp1 for Turn {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, frames, channels) = layout.shape().dims3()?;
        by_dtype!(dtype(x), T => {
            Ok((T::storage(self.run(slice::<T>(x, layout)?, frames, channels)), layout.shape().clone()))
        })
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Turn { angles: self.angles.clone(), heads: self.heads, sign: -self.sign };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&back)?))
    }
}
