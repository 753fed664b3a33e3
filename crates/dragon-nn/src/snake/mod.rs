//! The periodic activation of audio codecs.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// Keeps the division finite at `alpha = 0`; the value of DAC's reference code.
pub(crate) const EPS: f64 = 1e-9;

/// `x + sin²(alpha x) / (alpha + 1e-9)`, one `alpha` per channel (Ziyin et al. 2020, arXiv:2006.08195; the form of
/// descript-audio-codec).
///
/// # Shapes
/// - `x`: `[..., C]`, `alpha`: `[C]`; returns `[..., C]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn snake(x: &Tensor, alpha: &Tensor) -> Result<Tensor> {
    crate::check_last("snake", x, &[Some(alpha)])?;
    if crate::kernels::fast(&[x, alpha]) { cpu::snake(x, alpha) } else { plain::snake(x, alpha) }
}
