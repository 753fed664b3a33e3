//! In-place updates of contiguous f32 tensors on the CPU, multi-threaded.

use super::Update;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, Var};
use rayon::prelude::*;
use std::cell::RefCell;

/// Elements per task: reductions add these chunks up in order, so the result does not depend on the threads.
const CHUNK: usize = 1 << 14;

/// Whether the functions of this module take `t`.
pub(crate) fn supported(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32 && t.is_contiguous()
}

/// Reads a contiguous f32 CPU tensor in place.
pub(crate) fn with_slice<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(data)), Some((start, end))) => Ok(f(&data[start..end])),
        _ => candle_core::bail!("expected a contiguous f32 tensor on the CPU"),
    }
}

/// Changes a contiguous f32 CPU tensor in place.
fn with_slice_mut(t: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    struct Change<F>(RefCell<Option<F>>);

    impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Change<F> {
        fn name(&self) -> &'static str {
            "update in place"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let f = self.0.take().expect("candle applies an operation once");
            match (storage, layout.contiguous_offsets()) {
                (CpuStorage::F32(data), Some((start, end))) => f(&mut data[start..end]),
                _ => candle_core::bail!("expected a contiguous f32 tensor on the CPU"),
            }
        }
    }

    t.inplace_op1(&Change(RefCell::new(Some(f))))
}

/// Sum of squares in f64.
pub(crate) fn sum_of_squares(t: &Tensor) -> Result<f64> {
    let partial: Vec<f64> = with_slice(t, |data| {
        data.par_chunks(CHUNK)
            .map(|chunk| {
                let mut sums = [0f64; 8];
                for eight in chunk.chunks(8) {
                    for (s, &x) in sums.iter_mut().zip(eight) {
                        *s += f64::from(x) * f64::from(x);
                    }
                }
                sums.iter().sum()
            })
            .collect()
    })?;
    Ok(partial.iter().sum())
}

/// One AdamW update of `var` and its moments.
pub(crate) fn update(var: &Var, exp_avg: &Var, exp_avg_sq: &Var, grad: &Tensor, u: Update) -> Result<()> {
    with_slice(grad, |g| {
        with_slice_mut(var, |w| {
            with_slice_mut(exp_avg, |m| {
                with_slice_mut(exp_avg_sq, |v| {
                    w.par_chunks_mut(CHUNK)
                        .zip(m.par_chunks_mut(CHUNK))
                        .zip(v.par_chunks_mut(CHUNK))
                        .zip(g.par_chunks(CHUNK))
                        .for_each(|(((w, m), v), g)| update_chunk(w, m, v, g, u));
                    Ok(())
                })
            })
        })
    })?
}

fn update_chunk(w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], u: Update) {
    let (beta1, beta2, eps) = (u.beta1 as f32, u.beta2 as f32, u.eps as f32);
    let (rest1, rest2) = ((1.0 - u.beta1) as f32, (1.0 - u.beta2) as f32);
    let (keep, step_size, scale) = (u.keep as f32, u.step_size as f32, u.grad_scale as f32);
    let inverse_root = (1.0 / u.bias2_sqrt) as f32;
    for (((w, m), v), &g) in w.iter_mut().zip(m).zip(v).zip(g) {
        let g = g * scale;
        *m = beta1 * *m + rest1 * g;
        *v = beta2 * *v + rest2 * (g * g);
        *w = keep * *w - step_size * *m / (v.sqrt() * inverse_root + eps);
    }
}

/// `to = decay · to + (1 - decay) · from`.
pub(crate) fn lerp(to: &Var, from: &Tensor, decay: f64) -> Result<()> {
    let (keep, rest) = (decay as f32, (1.0 - decay) as f32);
    with_slice(from, |from| {
        with_slice_mut(to, |to| {
            to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| {
                for (to, &from) in to.iter_mut().zip(from) {
                    *to = keep * *to + rest * from;
                }
            });
            Ok(())
        })
    })?
}
