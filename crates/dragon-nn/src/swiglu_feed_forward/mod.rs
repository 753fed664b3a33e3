//! The SwiGLU feed-forward layer of a transformer as one operation.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// `W_out swiglu(W_in x)` on the last dimension (Shazeer 2020, arXiv:2002.05202); the first half of the rows of `W_in`
/// gives the gate, see [`crate::swiglu`].
///
/// Equal to the three operations in a row, bit for bit. As one it keeps only `W_in x` for the backward pass, and the
/// gradients in between do not pass through candle's sums.
///
/// # Shapes
/// - `x`: `[..., C]`, `w_in`: `[2 F, C]`, `w_out`: `[D, F]`; returns `[..., D]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn swiglu_feed_forward(x: &Tensor, w_in: &Tensor, w_out: &Tensor) -> Result<Tensor> {
    let ((n_hidden, n_in), (_, n_gated)) = (w_in.dims2()?, w_out.dims2()?);
    if x.dims().last() != Some(&n_in) || n_hidden != 2 * n_gated {
        candle_core::bail!(
            "swiglu_feed_forward: x {:?}, w_in {:?} and w_out {:?} do not fit",
            x.dims(),
            w_in.dims(),
            w_out.dims()
        )
    }
    if crate::kernels::fast(&[x, w_in, w_out]) {
        cpu::swiglu_feed_forward(x, w_in, w_out)
    } else {
        plain::swiglu_feed_forward(x, w_in, w_out)
    }
}
