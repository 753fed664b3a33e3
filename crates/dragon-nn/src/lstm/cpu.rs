//! [`super::lstm`] on the CPU, forward only.

use super::LstmWeights;
use crate::kernels::{Real, Shared, by_dtype, filled, for_each, shared, tensor, view};
use candle_core::{Result, Tensor};

/// Frames whose products with the input weights are made at a time: bounds memory, whatever the length.
const FRAMES: usize = 256;
/// Hidden units of one task: their rows of four gates and 512 numbers are 256 KiB of f32.
const UNITS: usize = 32;

pub(crate) fn lstm(x: &Tensor, weights: &LstmWeights) -> Result<Tensor> {
    let hidden = weights.hidden.contiguous()?;
    let (batch, frames, _) = x.dims3()?;
    let size = hidden.dim(1)?;
    by_dtype!(x.dtype(), T => {
        let hidden = view::<T>(&hidden)?;
        let mut state = State { c: vec![T::ZERO; batch * size], h: vec![T::ZERO; batch * size], size };
        let mut out = vec![T::ZERO; batch * frames * size];
        for start in (0..frames).step_by(FRAMES) {
            let n = FRAMES.min(frames - start);
            let x = x.narrow(1, start, n)?.contiguous()?; // [B, n, C]
            let gates = crate::linear(&x, &weights.input, Some(&weights.bias))?; // [B, n, 4 H]
            let gates = view::<T>(&gates)?;
            for frame in 0..n {
                state.step(&hidden, |b| &gates[(b * n + frame) * 4 * size..][..4 * size]);
                for (b, h) in state.h.chunks_exact(size).enumerate() {
                    out[(b * frames + start + frame) * size..][..size].copy_from_slice(h);
                }
            }
        }
        tensor(out, (batch, frames, size))
    })
}

/// Cell and hidden state, `[B, H]` each.
struct State<T> {
    c: Vec<T>,
    h: Vec<T>,
    size: usize,
}

impl<T: Real> State<T> {
    /// One frame; `gates(b)` is what the input gives to the gates of clip `b`.
    fn step<'a>(&mut self, hidden: &[T], gates: impl Fn(usize) -> &'a [T] + Sync + Send)
    where
        T: 'a,
    {
        let size = self.size;
        let batch = self.c.len() / size;
        let c = shared(&mut self.c);
        let before = &self.h;
        let task = |task: usize, h: Shared<T>| {
            for j in task * UNITS..((task + 1) * UNITS).min(size) {
                let rows: [&[T]; 4] = std::array::from_fn(|gate| &hidden[(gate * size + j) * size..][..size]);
                for b in 0..batch {
                    let given = gates(b);
                    let sums = dots(rows, &before[b * size..][..size]);
                    let gate = |i: usize| sums[i] + given[i * size + j];
                    // SAFETY: each task has units of its own.
                    let (c, h) = unsafe { (&mut c.range(b * size + j, 1)[0], h.range(b * size + j, 1)) };
                    *c = gate(1).sigmoid() * *c + gate(0).sigmoid() * tanh(gate(2));
                    h[0] = gate(3).sigmoid() * tanh(*c);
                }
            }
        };
        // SAFETY: the tasks cover the units of every clip.
        self.h = unsafe {
            filled(batch * size, |h| {
                // Threads that meet after each frame wait for one another, on a busy machine for whole time slices:
                // only long frames are split.
                for_each(size.div_ceil(UNITS), batch * size * size * 4 / 64, |i| task(i, h));
            })
        };
    }
}

/// `2 σ(2 x) - 1`; the error is that of the sigmoid, below 2e-7.
#[inline(always)]
fn tanh<T: Real>(x: T) -> T {
    let two = T::of(2.0);
    two * (two * x).sigmoid() - T::ONE
}

/// The products of four rows with a vector, side by side: each in sixteen interleaved sums, added up pairwise.
#[inline(always)]
fn dots<T: Real>(rows: [&[T]; 4], x: &[T]) -> [T; 4] {
    let mut lanes = [[T::ZERO; 16]; 4];
    let whole = x.len() / 16 * 16;
    for start in (0..whole).step_by(16) {
        let x: &[T; 16] = x[start..start + 16].try_into().expect("sixteen elements");
        for (lanes, row) in lanes.iter_mut().zip(&rows) {
            let row: &[T; 16] = row[start..start + 16].try_into().expect("sixteen elements");
            for j in 0..16 {
                lanes[j] = row[j].fma(x[j], lanes[j]);
            }
        }
    }
    for (lanes, row) in lanes.iter_mut().zip(&rows) {
        for i in whole..x.len() {
            lanes[i - whole] = row[i].fma(x[i], lanes[i - whole]);
        }
    }
    lanes.map(crate::kernels::fold)
}
