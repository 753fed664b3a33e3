//! [`super::group_norm`] on the CPU, forward only.

use crate::kernels::{CHUNK, Real, by_dtype, filled, for_each, lane_sum, shared, tensor, view};
use candle_core::{Result, Tensor};

pub(crate) fn group_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    let (batch, frames, channels) = x.dims3()?;
    by_dtype!(x.dtype(), T => {
        let (values, weight, bias) = (view::<T>(&x)?, view::<T>(&weight)?, view::<T>(&bias)?);
        let n = frames * channels;
        let moments: Vec<(f64, f64)> =
            (0..batch).map(|b| mean_and_variance(&values[b * n..][..n])).collect();
        let rows = (CHUNK / channels.max(1)).max(1);
        // SAFETY: the blocks cover the rows.
        let out = unsafe {
            filled(values.len(), |out| {
                for_each((batch * frames).div_ceil(rows), values.len() * 4, |task| {
                    for row in task * rows..((task + 1) * rows).min(batch * frames) {
                        let (mean, var) = moments[row / frames];
                        let (mean, scale) = (T::of(mean), T::of(1.0 / (var + eps).sqrt()));
                        let (x, y) = (&values[row * channels..][..channels], out.range(row * channels, channels));
                        let (weight, bias) = (&weight[..channels], &bias[..channels]);
                        for i in 0..channels {
                            y[i] = ((x[i] - mean) * scale).fma(weight[i], bias[i]);
                        }
                    }
                });
            })
        };
        tensor(out, x.shape())
    })
}

/// Mean and variance of all elements: those of chunks, each small enough to stay in the cache between the two, put
/// together in f64 (Chan, Golub and LeVeque 1983).
fn mean_and_variance<T: Real>(x: &[T]) -> (f64, f64) {
    let mut parts = vec![(0.0f64, 0.0f64); x.len().div_ceil(CHUNK)];
    let pointer = shared(&mut parts);
    for_each(x.len().div_ceil(CHUNK), x.len() * 4, |i| {
        let x = &x[i * CHUNK..((i + 1) * CHUNK).min(x.len())];
        let mean = lane_sum(x.len(), |j| x[j]) / T::of(x.len() as f64);
        let squares = lane_sum(x.len(), |j| (x[j] - mean) * (x[j] - mean));
        // SAFETY: each task has a place of its own.
        unsafe { pointer.range(i, 1)[0] = (mean.to_f64(), squares.to_f64()) };
    });
    let (mut n, mut mean, mut squares) = (0.0, 0.0, 0.0);
    for (i, (part_mean, part_squares)) in parts.into_iter().enumerate() {
        let m = CHUNK.min(x.len() - i * CHUNK) as f64;
        let gap = part_mean - mean;
        squares += part_squares + gap * gap * n * m / (n + m);
        mean += gap * m / (n + m);
        n += m;
    }
    (mean, squares / n)
}
