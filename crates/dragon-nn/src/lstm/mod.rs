//! Layers of long short-term memory (Hochreiter and Schmidhuber 1997), as `torch.nn.LSTM` computes them.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// The weights of one layer; the four gates lie one above the other, in PyTorch's order: input, forget, cell, output.
#[derive(Debug, Clone)]
pub struct LstmWeights {
    /// From the input, `[4 H, C]`.
    pub input: Tensor,
    /// From the state before, `[4 H, H]`.
    pub hidden: Tensor,
    /// `[4 H]`; PyTorch keeps it as a sum of two.
    pub bias: Tensor,
}

/// Layers one after the other, each `i, f, g, o = σ, σ, tanh, σ of (input x_t + hidden h + bias)`, `c = f c + i g`,
/// `h = o tanh(c)`, from states of zeros.
///
/// # Shapes
/// - `x`: `[B, T, C]`; returns `h` of every frame of the last layer, `[B, T, H]`.
///
/// # Errors
/// If there is no layer or no frame, or the shapes do not fit.
pub fn lstm(x: &Tensor, layers: &[LstmWeights]) -> Result<Tensor> {
    let (_, frames, mut width) = x.dims3()?;
    if frames == 0 || layers.is_empty() {
        candle_core::bail!(
            "lstm: expected at least one frame and one layer, got {frames} and {}",
            layers.len()
        )
    }
    let mut all = vec![x];
    for LstmWeights { input, hidden, bias } in layers {
        let (gates, h) = hidden.dims2()?;
        if gates != 4 * h || input.dims() != [gates, width] || bias.dims() != [gates] {
            candle_core::bail!(
                "lstm: weights {:?}, {:?} and {:?} do not fit an input of width {width}",
                input.dims(),
                hidden.dims(),
                bias.dims()
            )
        }
        all.extend([input, hidden, bias]);
        width = h;
    }
    // The fast form has no gradient: the codecs that have such layers are frozen.
    if crate::kernels::fast(&all) && !all.iter().any(|t| t.track_op()) {
        cpu::lstm(x, layers)
    } else {
        layers.iter().try_fold(x.clone(), |h, weights| plain::layer(&h, weights))
    }
}
