//! The noise level as the network sees it.

use candle_core::{D, Result, Tensor};

/// Sinusoidal features of `c_noise = ln(sigma) / 4`: cosines, then sines, of `f_i * c_noise`.
///
/// The frequencies are spaced evenly in their logarithm from 1 to 64: `c_noise` spans about 3, so the lowest rises steadily over the whole range
/// of levels, and the highest tells levels apart that differ by a tenth.
///
/// # Shapes
/// - `c_noise`: `[B]`; returns `[B, n_features]`, `n_features` even and at least 4.
pub fn noise_features(c_noise: &Tensor, n_features: usize) -> Result<Tensor> {
    const HIGHEST: f64 = 64.0;
    let half = n_features / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|i| HIGHEST.powf(i as f64 / (half - 1) as f64) as f32).collect();
    let frequencies =
        Tensor::from_vec(frequencies, (1, half), c_noise.device())?.to_dtype(c_noise.dtype())?;
    let angles = c_noise.unsqueeze(1)?.broadcast_mul(&frequencies)?; // [B, half]
    Tensor::cat(&[angles.cos()?, angles.sin()?], D::Minus1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn noise_features_are_cosines_then_sines() -> Result<()> {
        let c_noise = Tensor::new(&[0.3f32, -1.0], &Device::Cpu)?;
        let got = noise_features(&c_noise, 4)?.to_vec2::<f32>()?;
        for (row, c) in got.iter().zip([0.3f32, -1.0]) {
            for (got, want) in row.iter().zip([c.cos(), (64.0 * c).cos(), c.sin(), (64.0 * c).sin()]) {
                assert!((got - want).abs() < 1e-5);
            }
        }
        Ok(())
    }
}
