//! A layer of [`super::lstm`] as candle operations.

use super::LstmWeights;
use candle_core::{Result, Tensor};

pub(crate) fn layer(x: &Tensor, weights: &LstmWeights) -> Result<Tensor> {
    let (batch, frames, _) = x.dims3()?;
    let size = weights.hidden.dim(1)?;
    let mut c = Tensor::zeros((batch, size), x.dtype(), x.device())?;
    let mut h = c.clone();
    let sigmoid = |x: &Tensor| (x.neg()?.exp()? + 1.0)?.recip();
    let mut out = Vec::with_capacity(frames);
    for frame in 0..frames {
        let x = x.narrow(1, frame, 1)?.squeeze(1)?.contiguous()?; // [B, C]
        let gates = (x.matmul(&weights.input.t()?)? + h.matmul(&weights.hidden.t()?)?)?;
        let gates = gates.broadcast_add(&weights.bias)?; // [B, 4 H]
        let gate = |i: usize| gates.narrow(1, i * size, size);
        let kept = (sigmoid(&gate(1)?)? * c)?;
        c = (kept + (sigmoid(&gate(0)?)? * gate(2)?.tanh()?)?)?; // [B, H]
        h = (sigmoid(&gate(3)?)? * c.tanh()?)?; // [B, H]
        out.push(h.clone());
    }
    Tensor::stack(&out, 1) // [B, T, H]
}
