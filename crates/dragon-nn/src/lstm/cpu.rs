//! [`super::lstm`] on the CPU, forward only.

use super::LstmWeights;
use crate::kernels::{Real, by_dtype, tensor, view};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// Frames of a block. Layers work side by side, each a block behind the one before, and meet after each block: after each
/// frame would cost whole time slices on a busy machine. Longer blocks leave a layer idle at both ends of a short clip.
const FRAMES: usize = 32;

pub(crate) fn lstm(x: &Tensor, weights: &[LstmWeights]) -> Result<Tensor> {
    let (batch, frames, _) = x.dims3()?;
    by_dtype!(x.dtype(), T => {
        let layers = weights.iter().map(|weights| Layer::<T>::new(weights, batch));
        let mut layers = layers.collect::<Result<Vec<_>>>()?;
        let n_blocks = frames.div_ceil(FRAMES);
        // What each layer gave last.
        let mut given: Vec<Option<Tensor>> = vec![None; layers.len()];
        let mut out = Vec::with_capacity(n_blocks);
        for wave in 0..n_blocks + layers.len() - 1 {
            let work = |(i, layer): (usize, &mut Layer<T>)| -> Result<Option<Tensor>> {
                let block = wave.checked_sub(i).filter(|&block| block < n_blocks);
                let Some(start) = block.map(|block| block * FRAMES) else { return Ok(None) };
                match i.checked_sub(1) {
                    None => layer.block(&x.narrow(1, start, FRAMES.min(frames - start))?).map(Some),
                    Some(before) => given[before].as_ref().map(|x| layer.block(x)).transpose(),
                }
            };
            given = layers.par_iter_mut().enumerate().map(work).collect::<Result<_>>()?;
            out.extend(given.last().cloned().flatten());
        }
        Tensor::cat(&out, 1) // [B, T, H]
    })
}

/// A layer and its state.
struct Layer<'a, T> {
    weights: &'a LstmWeights,
    hidden: Tensor,
    /// Cell and hidden state, `[B, H]` each.
    c: Vec<T>,
    h: Vec<T>,
    size: usize,
}

impl<'a, T: Real> Layer<'a, T> {
    fn new(weights: &'a LstmWeights, batch: usize) -> Result<Self> {
        let hidden = weights.hidden.contiguous()?;
        let size = hidden.dim(1)?;
        let zeros = vec![T::ZERO; batch * size];
        Ok(Self { weights, hidden, c: zeros.clone(), h: zeros, size })
    }

    /// The next frames, `[B, n, C]` to `[B, n, H]`.
    fn block(&mut self, x: &Tensor) -> Result<Tensor> {
        let (batch, n, _) = x.dims3()?;
        let gates = crate::linear(&x.contiguous()?, &self.weights.input, Some(&self.weights.bias))?; // [B, n, 4 H]
        let gates = view::<T>(&gates)?;
        let hidden = self.hidden.clone();
        let hidden = view::<T>(&hidden)?;
        let size = self.size;
        let mut out = vec![T::ZERO; batch * n * size];
        for frame in 0..n {
            self.step(&hidden, |b| &gates[(b * n + frame) * 4 * size..][..4 * size]);
            for (b, h) in self.h.chunks_exact(size).enumerate() {
                out[(b * n + frame) * size..][..size].copy_from_slice(h);
            }
        }
        tensor(out, (batch, n, size))
    }

    /// One frame; `gates(b)` is what the input gives to the gates of clip `b`.
    fn step<'b>(&mut self, hidden: &[T], gates: impl Fn(usize) -> &'b [T])
    where
        T: 'b,
    {
        let size = self.size;
        let mut after = vec![T::ZERO; self.h.len()];
        for j in 0..size {
            let rows: [&[T]; 4] = std::array::from_fn(|gate| &hidden[(gate * size + j) * size..][..size]);
            for (b, h) in self.h.chunks_exact(size).enumerate() {
                let (given, sums) = (gates(b), dots(rows, h));
                let gate = |i: usize| sums[i] + given[i * size + j];
                let c = &mut self.c[b * size + j];
                *c = gate(1).sigmoid() * *c + gate(0).sigmoid() * tanh(gate(2));
                after[b * size + j] = gate(3).sigmoid() * tanh(*c);
            }
        }
        self.h = after;
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
