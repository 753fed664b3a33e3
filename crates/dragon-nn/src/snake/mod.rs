//! The periodic activations of audio codecs.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// Keeps the division finite at 0; the value of DAC's reference code.
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
    snake_beta(x, alpha, alpha)
}

/// `x + sin²(alpha x) / (beta + 1e-9)`, one `alpha` and `beta` per channel (the SnakeBeta of BigVGAN, Lee et al. 2023,
/// arXiv:2206.04658; the form of stable-audio-tools).
///
/// # Shapes
/// - `x`: `[..., C]`, `alpha`, `beta`: `[C]`; returns `[..., C]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn snake_beta(x: &Tensor, alpha: &Tensor, beta: &Tensor) -> Result<Tensor> {
    crate::check_last("snake", x, &[Some(alpha), Some(beta)])?;
    if crate::kernels::fast(&[x, alpha, beta]) {
        cpu::snake(x, alpha, beta)
    } else {
        plain::snake(x, alpha, beta)
    }
}
