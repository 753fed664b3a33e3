//! A layer of long short-term memory (Hochreiter and Schmidhuber 1997), as `torch.nn.LSTM` computes it.

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

/// `i, f, g, o = σ, σ, tanh, σ of (input x_t + hidden h + bias)`, `c = f c + i g`, `h = o tanh(c)`, from states of zeros.
///
/// # Shapes
/// - `x`: `[B, T, C]`; returns `h` of every frame, `[B, T, H]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn lstm(x: &Tensor, weights: &LstmWeights) -> Result<Tensor> {
    let LstmWeights { input, hidden, bias } = weights;
    let (_, frames, c) = x.dims3()?;
    let (gates, h) = hidden.dims2()?;
    if gates != 4 * h || input.dims() != [gates, c] || bias.dims() != [gates] || frames == 0 {
        candle_core::bail!(
            "lstm: weights {:?}, {:?} and {:?} do not fit x {:?}",
            input.dims(),
            hidden.dims(),
            bias.dims(),
            x.dims()
        )
    }
    let all = [x, input, hidden, bias];
    // The fast form has no gradient: the codecs that have such a layer are frozen.
    if crate::kernels::fast(&all) && !all.iter().any(|t| t.track_op()) {
        cpu::lstm(x, weights)
    } else {
        plain::lstm(x, weights)
    }
}
