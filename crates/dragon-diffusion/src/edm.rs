//! EDM: noise levels, preconditioning, schedule and loss weights (Karras et al. 2022, arXiv:2206.00364, Table 1).
//!
//! Everything about one noise level is plain `f64` on the host; tensors appear only in [`denoising_errors`].

use candle_core::{D, DType, Result, Tensor, bail};
use dragon_nn::Rng;
use serde::{Deserialize, Serialize};

/// The constants of an EDM diffusion. They belong to a trained model and are stored in its `config.json`.
///
/// The paper's values are lost in its text; [`Edm::default`] has those of Karras et al.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edm {
    /// Standard deviation of the latents the network sees, above 0.
    pub sigma_data: f64,
    /// Mean of `ln sigma` in training.
    pub p_mean: f64,
    /// Standard deviation of `ln sigma` in training, above 0.
    pub p_std: f64,
    /// Lowest noise level of the sampling schedule, above 0.
    pub sigma_min: f64,
    /// Highest noise level of the sampling schedule, above `sigma_min`.
    pub sigma_max: f64,
    /// Curvature of the sampling schedule: 1 spaces the levels evenly, larger values put more of them at low noise.
    pub rho: f64,
}

impl Default for Edm {
    /// The constants of Karras et al. 2022 (`P_mean` -0.4 and `P_std` 1.0 instead of -1.2 and 1.2, which were tuned
    /// for images: latents of music are decided at higher noise).
    fn default() -> Self {
        Self { sigma_data: 0.5, p_mean: -0.4, p_std: 1.0, sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }
    }
}

/// The four coefficients of `D(x; sigma) = c_skip * x + c_out * F(c_in * x, c_noise)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preconditioning {
    /// `sigma_data² / (sigma² + sigma_data²)`.
    pub c_skip: f64,
    /// `sigma * sigma_data / sqrt(sigma² + sigma_data²)`.
    pub c_out: f64,
    /// `1 / sqrt(sigma² + sigma_data²)`.
    pub c_in: f64,
    /// `ln(sigma) / 4`, what the network is told about the noise level.
    pub c_noise: f64,
}

impl Edm {
    /// For latents normalised to unit variance: `sigma_data` 1, and training levels for latents of music.
    ///
    /// Such latents have little redundancy: below sigma 0.5 their noise cannot be told from detail, and a text is of use above
    /// sigma 4 only, where the default's levels, scaled to `sigma_data` 1, hardly reach. With `P_mean` 0.2 the shipped model gained 2 % of the loss
    /// at sigma 15 from its captions after 760 steps; with 1.2, 15 % after 100 more (the text projections had been rescaled and
    /// the batch doubled shortly before, so the levels alone are not proved to be the cause). The schedule ends at 0.01, where the remaining
    /// noise is 40 dB below the latents.
    pub fn unit_variance() -> Self {
        Self { sigma_data: 1.0, p_mean: 1.2, p_std: 1.2, sigma_min: 0.01, sigma_max: 80.0, rho: 7.0 }
    }

    /// Says what is wrong with the constants, if anything.
    ///
    /// # Errors
    /// If a constant is not finite, or outside the range its documentation gives.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("sigma_data", self.sigma_data),
            ("p_std", self.p_std),
            ("sigma_min", self.sigma_min),
            ("sigma_max", self.sigma_max),
            ("rho", self.rho),
        ];
        for (name, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                bail!("`{name}` must be a number above 0, found {value}");
            }
        }
        if !self.p_mean.is_finite() {
            bail!("`p_mean` must be a finite number, found {}", self.p_mean);
        }
        if self.sigma_max <= self.sigma_min {
            bail!("`sigma_max` must be above `sigma_min` ({}), found {}", self.sigma_min, self.sigma_max);
        }
        Ok(())
    }

    /// The coefficients at noise level `sigma`, above 0 (EDM, Table 1, last column).
    pub fn precondition(&self, sigma: f64) -> Preconditioning {
        let total = sigma * sigma + self.sigma_data * self.sigma_data;
        Preconditioning {
            c_skip: self.sigma_data * self.sigma_data / total,
            c_out: sigma * self.sigma_data / total.sqrt(),
            c_in: 1.0 / total.sqrt(),
            c_noise: sigma.ln() / 4.0,
        }
    }

    /// The `n_steps + 1` noise levels of a sampling run, from `sigma_max` down to `sigma_min` and then 0 (EDM, eq. 5):
    /// `(sigma_max^(1/rho) + i/(N-1) * (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho`.
    ///
    /// One step goes from `sigma_max` straight to 0; no step gives an empty list.
    pub fn schedule(&self, n_steps: usize) -> Vec<f64> {
        if n_steps == 0 {
            return Vec::new();
        }
        let (high, low) = (self.sigma_max.powf(1.0 / self.rho), self.sigma_min.powf(1.0 / self.rho));
        let last = (n_steps - 1).max(1) as f64;
        let mut sigmas: Vec<f64> =
            (0..n_steps).map(|i| (high + i as f64 / last * (low - high)).powf(self.rho)).collect();
        sigmas.push(0.0);
        sigmas
    }

    /// A training noise level: `ln sigma ~ N(p_mean, p_std²)`.
    pub fn sample_sigma(&self, rng: &mut Rng) -> f64 {
        (self.p_mean + self.p_std * rng.normal()).exp()
    }

    /// `n` training noise levels, one from each of `n` equally likely ranges, in shuffled order.
    ///
    /// Each level alone has the distribution of [`Self::sample_sigma`]; together they cover it evenly, so the loss of a batch
    /// varies less from step to step.
    pub fn sample_sigmas_stratified(&self, n: usize, rng: &mut Rng) -> Vec<f64> {
        let mut sigmas: Vec<f64> = (0..n)
            .map(|i| {
                let quantile = ((i as f64 + rng.uniform()) / n as f64).clamp(1e-9, 1.0 - 1e-9);
                (self.p_mean + self.p_std * normal_quantile(quantile)).exp()
            })
            .collect();
        rng.shuffle(&mut sigmas);
        sigmas
    }
}

/// How squared denoising errors at different noise levels are weighed against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// `(sigma² + sigma_data²) / (sigma * sigma_data)²`: unit error of the network's own output at every level (EDM).
    #[default]
    Edm,
    /// `1 / sigma²`: the error of the noise estimate, as in Diffusion-DPO and Diffusion-KTO.
    Eps,
    /// 1: the error of the clean estimate.
    X0,
    /// `1 / mean |D - x0|`, detached, per example: every example pulls about equally (DiffusionNFT).
    Adaptive,
}

impl Weighting {
    /// The weight at noise level `sigma`; `None` for [`Weighting::Adaptive`], which depends on the error itself.
    pub fn at(self, edm: &Edm, sigma: f64) -> Option<f64> {
        let sd = edm.sigma_data;
        match self {
            Self::Edm => Some((sigma * sigma + sd * sd) / (sigma * sd).powi(2)),
            Self::Eps => Some(1.0 / (sigma * sigma)),
            Self::X0 => Some(1.0),
            Self::Adaptive => None,
        }
    }
}

/// Smallest mean absolute error that [`Weighting::Adaptive`] divides by (DiffusionNFT).
const ADAPTIVE_FLOOR: f64 = 1e-5;

/// Weighted mean squared errors, one per example: `w(sigma) * mean over C, T of (denoised - x0)²` (paper eq. 7), in f32.
///
/// # Shapes
/// - `denoised`, `x0`: `[B, C, T]`; `sigmas`: `B` levels above 0. Returns `[B]`.
///
/// # Errors
/// If the shapes differ or `sigmas` does not have `B` elements.
pub fn denoising_errors(
    edm: &Edm,
    weighting: Weighting,
    denoised: &Tensor,
    x0: &Tensor,
    sigmas: &[f64],
) -> Result<Tensor> {
    let (batch, channels, frames) = denoised.dims3()?;
    if sigmas.len() != batch {
        bail!("expected one noise level for each of {batch} examples, found {}", sigmas.len());
    }
    let shape = (batch, channels * frames);
    let difference =
        (denoised.to_dtype(DType::F32)?.reshape(shape)? - x0.to_dtype(DType::F32)?.reshape(shape)?)?; // [B, C*T]
    let errors = difference.sqr()?.mean(D::Minus1)?; // [B]
    let weights: Option<Vec<f32>> =
        sigmas.iter().map(|&sigma| weighting.at(edm, sigma).map(|w| w as f32)).collect();
    match weights {
        Some(weights) => errors * Tensor::from_vec(weights, batch, denoised.device())?,
        None => errors / difference.detach().abs()?.mean(D::Minus1)?.maximum(ADAPTIVE_FLOOR)?,
    }
}

/// Quantile of the standard normal distribution for `p` in (0, 1), to a relative 1.2e-9 (P. J. Acklam's rational fit).
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e1,
        2.209460984245205e2,
        -2.759285104469687e2,
        1.38357751867269e2,
        -3.066479806614716e1,
        2.506628277459239,
    ];
    const B: [f64; 5] = [
        -5.447609879822406e1,
        1.615858368580409e2,
        -1.556989798598866e2,
        6.680131188771972e1,
        -1.328068155288572e1,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-3,
        -3.223964580411365e-1,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ];
    const D: [f64; 4] = [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416];
    let polynomial = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    let tail = |q: f64| polynomial(&C, q) / (polynomial(&D, q) * q + 1.0);
    if p < 0.02425 {
        tail((-2.0 * p.ln()).sqrt())
    } else if p > 1.0 - 0.02425 {
        -tail((-2.0 * (1.0 - p).ln()).sqrt())
    } else {
        let q = p - 0.5;
        let r = q * q;
        polynomial(&A, r) * q / (polynomial(&B, r) * r + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn preconditioning_keeps_unit_variance() {
        let edm = Edm::default();
        for sigma in [0.002, 0.1, 0.5, 3.0, 80.0] {
            let c = edm.precondition(sigma);
            let input_var = c.c_in * c.c_in * (edm.sigma_data.powi(2) + sigma * sigma);
            assert!((input_var - 1.0).abs() < 1e-12);
            // The network's target (x0 - c_skip * x) / c_out has unit variance too (EDM, eq. 114 to 131).
            let target_var = ((1.0 - c.c_skip).powi(2) * edm.sigma_data.powi(2) + (c.c_skip * sigma).powi(2))
                / c.c_out.powi(2);
            assert!((target_var - 1.0).abs() < 1e-12);
            let weight = Weighting::Edm.at(&edm, sigma).unwrap();
            assert!((weight * c.c_out * c.c_out - 1.0).abs() < 1e-12);
            assert_eq!(c.c_noise, sigma.ln() / 4.0);
        }
    }

    #[test]
    fn schedule_runs_from_sigma_max_over_sigma_min_to_zero() {
        let edm = Edm::default();
        let sigmas = edm.schedule(40);
        assert_eq!(sigmas.len(), 41);
        assert!((sigmas[0] - 80.0).abs() < 1e-9 && (sigmas[39] - 0.002).abs() < 1e-12 && sigmas[40] == 0.0);
        assert!(sigmas.windows(2).all(|pair| pair[1] < pair[0]));
        // k-diffusion `get_sigmas_karras(5, 0.002, 80., 7.)`.
        let want = [80.0, 17.5278, 2.5152, 0.1698, 0.002, 0.0];
        for (got, want) in edm.schedule(5).iter().zip(want) {
            assert!((got - want).abs() < 1e-3 * (1.0 + want), "{got} {want}");
        }
        assert_eq!(edm.schedule(1).len(), 2);
        assert!(edm.schedule(0).is_empty());
    }

    #[test]
    fn training_levels_have_the_stated_mean_and_spread() {
        let edm = Edm::default();
        let mut rng = Rng::new(3);
        let n = 20_000;
        let single: Vec<f64> = (0..n).map(|_| edm.sample_sigma(&mut rng).ln()).collect();
        let stratified: Vec<f64> = edm.sample_sigmas_stratified(n, &mut rng).iter().map(|s| s.ln()).collect();
        for (logs, tolerance) in [(single, 0.03), (stratified, 0.003)] {
            let mean = logs.iter().sum::<f64>() / n as f64;
            let std = (logs.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
            assert!((mean - edm.p_mean).abs() < tolerance, "{mean}");
            assert!((std - edm.p_std).abs() < tolerance, "{std}");
        }
    }

    #[test]
    fn normal_quantile_meets_tabulated_values() {
        for (p, z) in
            [(0.5, 0.0), (0.975, 1.959963984540054), (0.001, -3.090232306167813), (0.2, -0.8416212335729143)]
        {
            assert!((normal_quantile(p) - z).abs() < 1e-8, "{p}");
        }
    }

    #[test]
    fn weightings_agree_with_their_definitions() -> Result<()> {
        let edm = Edm { sigma_data: 0.7, ..Edm::default() };
        let dev = Device::Cpu;
        let x0 = Tensor::new(&[[[1f32, -1.0], [0.5, 2.0]], [[0.0, 0.25], [1.0, 1.0]]], &dev)?;
        let denoised = Tensor::new(&[[[1.5f32, -1.0], [0.5, 1.0]], [[0.0, 0.25], [1.0, 3.0]]], &dev)?;
        let sigmas = [0.3, 2.0];
        let mse = [1.25 / 4.0, 4.0 / 4.0];
        let mae = [1.5 / 4.0, 2.0 / 4.0];
        for weighting in [Weighting::Edm, Weighting::Eps, Weighting::X0, Weighting::Adaptive] {
            let got = denoising_errors(&edm, weighting, &denoised, &x0, &sigmas)?.to_vec1::<f32>()?;
            for i in 0..2 {
                let want = mse[i] * weighting.at(&edm, sigmas[i]).unwrap_or(1.0 / mae[i]);
                assert!((f64::from(got[i]) - want).abs() < 1e-5 * want, "{weighting:?} {i}");
            }
        }
        assert!(denoising_errors(&edm, Weighting::Edm, &denoised, &x0, &sigmas[..1]).is_err());
        Ok(())
    }

    #[test]
    fn impossible_constants_are_named() {
        let message = Edm { sigma_max: 0.001, ..Edm::default() }.check().unwrap_err().to_string();
        assert!(message.contains("sigma_max"), "{message}");
        assert!(Edm { sigma_data: f64::NAN, ..Edm::default() }.check().is_err());
        assert!(Edm::default().check().is_ok() && Edm::unit_variance().check().is_ok());
    }
}
