//! [`super::attention_cached`] on the CPU: one task per example and head, keys and values read where they lie.

use super::cpu::exponentials;
use crate::kernels::{Real, by_dtype, dot, dtype, filled, for_each, slice};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

pub(super) fn attention(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    seen: &[usize],
    scale: f64,
) -> Result<Tensor> {
    let op = Cached { seen: seen.to_vec(), scale };
    q.contiguous()?.apply_op3_no_bwd(&keys.contiguous()?, &values.contiguous()?, &op)
}

struct Cached {
    seen: Vec<usize>,
    scale: f64,
}

impl CustomOp3 for Cached {
    fn name(&self) -> &'static str {
        "attention_cached"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = ql.shape().clone();
        let (_, t, _) = shape.dims3()?;
        let (_, heads, n, d) = kl.shape().dims4()?;
        by_dtype!(dtype(q), T => {
            let (q, k, v) = (slice::<T>(q, ql)?, slice::<T>(k, kl)?, slice::<T>(v, vl)?);
            Ok((T::storage(self.forward(q, k, v, [t, heads, n, d])), shape))
        })
    }
}

impl Cached {
    fn forward<T: Real>(&self, q: &[T], k: &[T], v: &[T], [t, heads, n, d]: [usize; 4]) -> Vec<T> {
        let batch = self.seen.len().checked_div(t).unwrap_or(0);
        let work = self.seen.iter().sum::<usize>() * heads * d;
        let scale = T::of(self.scale);
        // SAFETY: the tasks together write all channels of all rows, each its own head's.
        unsafe {
            filled(q.len(), |y| {
                for_each(batch * heads, work, |task| {
                    let (b, h) = (task / heads, task % heads);
                    let (k, v) = (&k[task * n * d..][..n * d], &v[task * n * d..][..n * d]);
                    let mut weights = vec![T::ZERO; n];
                    for row in b * t..(b + 1) * t {
                        let start = (row * heads + h) * d;
                        let q = &q[start..start + d];
                        let weights = &mut weights[..self.seen[row]];
                        for (w, k) in weights.iter_mut().zip(k.chunks_exact(d)) {
                            *w = dot(q, k) * scale;
                        }
                        let (_, inverse) = exponentials(weights);
                        let y = y.range(start, d);
                        y.fill(T::ZERO);
                        for (&w, v) in weights.iter().zip(v.chunks_exact(d)) {
                            for (y, &v) in y.iter_mut().zip(v) {
                                *y = w.fma(v, *y);
                            }
                        }
                        y.iter_mut().for_each(|y| *y *= inverse);
                    }
                });
            })
        }
    }
}
