//! Solvers of the probability-flow ODE `dx/dsigma = (x - D(x; sigma)) / sigma`: free functions over [`Denoiser`], with the noise
//! levels as numbers that fall to 0.
//!
//! Under CFG++ the clean estimate `G` and the estimate `U` that the noise is computed from differ. Each solver then takes
//! its usual step with `U` and adds the shift `G - U`: at first order that is `G + sigma_next * (x - U) / sigma`
//! (Chung et al. 2024), and with `C = U` every solver is its plain form.

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

use crate::guidance::{Denoiser, Estimate};

/// Which solver runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Solver {
    /// [`dpmpp_2m`]: one network call a step, second order. The default.
    #[serde(rename = "dpmpp_2m")]
    Dpmpp2m,
    /// [`dpmpp_2s`]: two network calls a step, second order.
    #[serde(rename = "dpmpp_2s")]
    Dpmpp2s,
    /// [`heun`]: two network calls a step, second order, in `sigma` instead of `ln sigma`.
    #[serde(rename = "heun")]
    Heun,
    /// [`dpmpp_2m_sde`]: one network call and fresh noise a step, second order. Stable Audio Open's.
    #[serde(rename = "dpmpp_2m_sde")]
    Dpmpp2mSde,
}

impl Solver {
    /// Network calls of a step, not counting the second call of guidance.
    pub fn calls_per_step(self) -> usize {
        match self {
            Self::Dpmpp2m | Self::Dpmpp2mSde => 1,
            Self::Dpmpp2s | Self::Heun => 2,
        }
    }

    /// Runs the solver. See [`dpmpp_2m`] and [`dpmpp_2m_sde`] for the arguments; `noise` is not asked by the others.
    pub fn run(
        self,
        model: &dyn Denoiser,
        x: Tensor,
        sigmas: &[f64],
        noise: &mut dyn FnMut() -> Result<Tensor>,
        on_step: &mut OnStep<'_>,
    ) -> Result<Option<Tensor>> {
        match self {
            Self::Dpmpp2mSde => dpmpp_2m_sde(model, x, sigmas, noise, on_step),
            Self::Dpmpp2m => dpmpp_2m(model, x, sigmas, on_step),
            Self::Dpmpp2s => dpmpp_2s(model, x, sigmas, on_step),
            Self::Heun => heun(model, x, sigmas, on_step),
        }
    }
}

/// What a solver tells after a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps done, from 1 to `n_steps`.
    pub step_idx: usize,
    /// Steps of the run.
    pub n_steps: usize,
    /// Noise level reached.
    pub sigma: f64,
}

/// Called after each step; `Break` ends the run, which then returns `None`.
pub type OnStep<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// For runs that nobody watches.
pub fn keep_going(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// DPM-Solver++(2M) in data prediction (Lu et al. 2022, arXiv:2211.01095, Algorithm 2), and its CFG++ form.
///
/// The first and the last step, and a step before which guidance went on or off, are first order.
///
/// # Shapes
/// - `x`: `[B, C, T]`, noise of standard deviation `sigmas[0]` (plus data, if any is left at that level); returns clean latents.
/// - `sigmas`: levels that fall, the last may be 0.
///
/// Returns `None` if `on_step` ended the run.
///
/// # Errors
/// If the levels do not fall, or the model fails.
pub fn dpmpp_2m(
    model: &dyn Denoiser,
    mut x: Tensor,
    sigmas: &[f64],
    on_step: &mut OnStep<'_>,
) -> Result<Option<Tensor>> {
    check_levels(sigmas)?;
    let mut last: Option<(Estimate, f64)> = None; // previous (estimate, h)
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, sigma_next) = (pair[0], pair[1]);
        let h = lambda(sigma_next) - lambda(sigma); // infinite in a step to 0
        let estimate = model.estimate(&x, sigma)?;
        let d = match &last {
            Some((previous, h_last)) if 0.0 < sigma_next && previous.guided == estimate.guided => {
                let w = 0.5 * h / h_last;
                ((estimate.anchor() * (1.0 + w))? - (previous.anchor() * w)?)?
            }
            _ => estimate.anchor().clone(),
        };
        x = exponential_step(&x, &d, sigma, sigma_next)?;
        if let Some(shift) = estimate.shift()? {
            x = (x + shift)?;
        }
        last = Some((estimate, h));
        if stopped(on_step, i, sigmas) {
            return Ok(None);
        }
    }
    Ok(Some(x))
}

/// SDE-DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv:2211.01095, Appendix; the sampler of Stable Audio Open): takes
/// more noise away in each step than [`dpmpp_2m`], and adds fresh noise instead.
///
/// Arguments, result and errors as in [`dpmpp_2m`]; `noise` gives the standard normal noise of the next step, of the shape of `x`.
/// The first and the last step, and a step before which guidance went on or off, are first order.
pub fn dpmpp_2m_sde(
    model: &dyn Denoiser,
    mut x: Tensor,
    sigmas: &[f64],
    noise: &mut dyn FnMut() -> Result<Tensor>,
    on_step: &mut OnStep<'_>,
) -> Result<Option<Tensor>> {
    check_levels(sigmas)?;
    let mut last: Option<(Estimate, f64)> = None; // previous (estimate, h)
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, sigma_next) = (pair[0], pair[1]);
        let h = lambda(sigma_next) - lambda(sigma); // infinite in a step to 0
        let estimate = model.estimate(&x, sigma)?;
        let ratio = (sigma_next / sigma).powi(2); // exp(-2h)
        let mut next = ((&x * ratio)? + (estimate.anchor() * (1.0 - ratio))?)?;
        if let Some((previous, h_last)) = &last
            && sigma_next > 0.0
            && previous.guided == estimate.guided
        {
            let slope = ((estimate.anchor() - previous.anchor())? * (h / h_last))?;
            next = (next + (slope * (0.5 * (1.0 - ratio)))?)?;
        }
        if let Some(shift) = estimate.shift()? {
            next = (next + shift)?;
        }
        if sigma_next > 0.0 {
            next = (next + (noise()? * (sigma_next * (1.0 - ratio).sqrt()))?)?;
        }
        x = next;
        last = Some((estimate, h));
        if stopped(on_step, i, sigmas) {
            return Ok(None);
        }
    }
    Ok(Some(x))
}

/// DPM-Solver++(2S) in data prediction with the midpoint in `ln sigma` (Lu et al. 2022, Algorithm 1, `r` = 1/2), and its CFG++ form.
///
/// Arguments, result and errors as in [`dpmpp_2m`]; a step to 0 is first order and takes one call. Under CFG++ the shift is that
/// of the start of the step, added once.
pub fn dpmpp_2s(
    model: &dyn Denoiser,
    mut x: Tensor,
    sigmas: &[f64],
    on_step: &mut OnStep<'_>,
) -> Result<Option<Tensor>> {
    check_levels(sigmas)?;
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, sigma_next) = (pair[0], pair[1]);
        let first = model.estimate(&x, sigma)?;
        let d = if sigma_next > 0.0 {
            let sigma_mid = (sigma * sigma_next).sqrt();
            let mid = exponential_step(&x, first.anchor(), sigma, sigma_mid)?;
            model.estimate(&mid, sigma_mid)?.anchor().clone()
        } else {
            first.anchor().clone()
        };
        x = exponential_step(&x, &d, sigma, sigma_next)?;
        if let Some(shift) = first.shift()? {
            x = (x + shift)?;
        }
        if stopped(on_step, i, sigmas) {
            return Ok(None);
        }
    }
    Ok(Some(x))
}

/// Heun's method (Karras et al. 2022, Algorithm 1), and its CFG++ form.
///
/// Arguments, result and errors as in [`dpmpp_2m`]; a step to 0 is an Euler step. Under CFG++ the shift is that of the
/// start of the step, added once.
pub fn heun(
    model: &dyn Denoiser,
    mut x: Tensor,
    sigmas: &[f64],
    on_step: &mut OnStep<'_>,
) -> Result<Option<Tensor>> {
    check_levels(sigmas)?;
    for (i, pair) in sigmas.windows(2).enumerate() {
        let (sigma, sigma_next) = (pair[0], pair[1]);
        let first = model.estimate(&x, sigma)?;
        let slope = ((&x - first.anchor())? / sigma)?;
        let euler = (&x + (&slope * (sigma_next - sigma))?)?;
        let shift = first.shift()?;
        let next = if sigma_next > 0.0 {
            let slope_next = ((&euler - model.estimate(&euler, sigma_next)?.anchor())? / sigma_next)?;
            (&x + ((slope + slope_next)? * (0.5 * (sigma_next - sigma)))?)?
        } else {
            euler
        };
        x = match shift {
            Some(shift) => (next + shift)?,
            None => next,
        };
        if stopped(on_step, i, sigmas) {
            return Ok(None);
        }
    }
    Ok(Some(x))
}

/// Half the logarithm of the signal-to-noise ratio.
fn lambda(sigma: f64) -> f64 {
    -sigma.ln()
}

/// The exact solution from `sigma` to `sigma_next` where the clean estimate `d` is constant:
/// `sigma_next / sigma * x + (1 - sigma_next / sigma) * d`.
fn exponential_step(x: &Tensor, d: &Tensor, sigma: f64, sigma_next: f64) -> Result<Tensor> {
    let ratio = sigma_next / sigma;
    (x * ratio)? + (d * (1.0 - ratio))?
}

fn check_levels(sigmas: &[f64]) -> Result<()> {
    let falls = sigmas.windows(2).all(|pair| pair[1] < pair[0] && pair[1] >= 0.0);
    if !falls || sigmas.iter().any(|sigma| !sigma.is_finite()) {
        bail!("the noise levels of a sampling run must fall and not go below 0, found {sigmas:?}");
    }
    Ok(())
}

fn stopped(on_step: &mut OnStep<'_>, i: usize, sigmas: &[f64]) -> bool {
    let progress = Progress { step_idx: i + 1, n_steps: sigmas.len() - 1, sigma: sigmas[i + 1] };
    on_step(progress).is_break()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edm::Edm;
    use crate::guidance::{ConditionalDenoiser, Guidance, Guided};
    use candle_core::{DType, Device};
    use dragon_nn::Rng;
    use dragon_testkit::{Golden, Tol, assert_close};
    use std::cell::Cell;

    const SOLVERS: [Solver; 3] = [Solver::Dpmpp2m, Solver::Dpmpp2s, Solver::Heun];

    /// The exact denoiser of data `N(0, s²)`.
    struct Gaussian(f64);

    impl Denoiser for Gaussian {
        fn denoise(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
            let s2 = self.0 * self.0;
            x * (s2 / (s2 + sigma * sigma))
        }
    }

    /// Conditional: data around `mean`; unconditional: around 0. Counts the unconditional calls.
    struct Pair {
        mean: f64,
        unconditional_calls: Cell<usize>,
    }

    impl Pair {
        fn new(mean: f64) -> Self {
            Self { mean, unconditional_calls: Cell::new(0) }
        }
    }

    impl ConditionalDenoiser for Pair {
        fn conditional(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
            Gaussian(1.0).denoise(&(x - self.mean)?, sigma)? + self.mean
        }

        fn unconditional(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
            self.unconditional_calls.set(self.unconditional_calls.get() + 1);
            Gaussian(1.0).denoise(x, sigma)
        }
    }

    fn noise() -> Tensor {
        Rng::new(5).normal_tensor((2, 3, 4), DType::F64, &Device::Cpu).unwrap()
    }

    fn run(solver: Solver, model: &dyn Denoiser, start: &Tensor, sigmas: &[f64]) -> Tensor {
        solver.run(model, start.clone(), sigmas, &mut no_noise, &mut keep_going).unwrap().unwrap()
    }

    fn no_noise() -> Result<Tensor> {
        panic!("a solver of the ODE takes no noise")
    }

    fn max_error(got: &Tensor, want: &Tensor) -> f64 {
        (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn error_on_gaussian_data_falls_fourfold_when_steps_double() -> Result<()> {
        let edm = Edm::default();
        let s = edm.sigma_data;
        for solver in SOLVERS {
            let errors: Vec<f64> = [32, 64, 128]
                .iter()
                .map(|&n| {
                    // Without the last step to 0, which is first order by design.
                    let sigmas = &edm.schedule(n)[..n];
                    let start = (noise() * sigmas[0])?;
                    let end = sigmas[n - 1];
                    let ratio = ((s * s + end * end) / (s * s + sigmas[0] * sigmas[0])).sqrt();
                    Ok(max_error(&run(solver, &Gaussian(s), &start, sigmas), &(&start * ratio)?))
                })
                .collect::<Result<_>>()?;
            for pair in errors.windows(2) {
                let ratio = pair[0] / pair[1];
                assert!((3.4..4.9).contains(&ratio), "{solver:?}: errors {errors:?}, ratio {ratio}");
            }
        }
        Ok(())
    }

    #[test]
    fn whole_runs_end_near_the_closed_form() -> Result<()> {
        let edm = Edm::default();
        let sigmas = edm.schedule(40);
        let start = (noise() * sigmas[0])?;
        let s = edm.sigma_data;
        let want = (&start * (s / (s * s + sigmas[0] * sigmas[0]).sqrt()))?;
        for (solver, atol) in SOLVERS.into_iter().zip([2e-2; 3]) {
            assert_close(&run(solver, &Gaussian(s), &start, &sigmas), &want, Tol { atol, rtol: 0.0 });
        }
        Ok(())
    }

    #[test]
    fn solvers_match_the_formulas_of_k_diffusion() -> Result<()> {
        struct TwoPoints(Tensor);
        impl Denoiser for TwoPoints {
            fn denoise(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
                &self.0 + ((x - &self.0)? / (sigma * sigma))?.tanh()?
            }
        }
        let golden = Golden::fixture("dragon-diffusion/solvers/solvers.safetensors");
        let edm = Edm { sigma_min: 0.02, sigma_max: 10.0, ..Edm::default() };
        let sigmas = edm.schedule(12);
        let want_sigmas = golden.get("sigmas");
        assert_close(&Tensor::new(&sigmas[..], &Device::Cpu)?, &want_sigmas, Tol::STATISTICS);
        let start = (golden.get("noise") * sigmas[0])?;
        for (solver, name) in SOLVERS.into_iter().zip(["dpmpp_2m", "dpmpp_2s", "heun"]) {
            let got = run(solver, &TwoPoints(golden.get("shift")), &start, &sigmas);
            assert_close(&got, &golden.get(name), Tol { atol: 1e-8, rtol: 1e-8 });
        }
        Ok(())
    }

    #[test]
    fn cfg_plus_plus_is_the_plain_solver_when_both_estimates_agree() -> Result<()> {
        let sigmas = Edm::default().schedule(12);
        let start = (noise() * sigmas[0])?;
        for solver in SOLVERS {
            let plain = run(solver, &Gaussian(1.0), &start, &sigmas);
            let model = Pair::new(0.0);
            let guided = Guided { model: &model, guidance: Guidance::cfg_plus_plus(0.6) };
            assert_close(&run(solver, &guided, &start, &sigmas), &plain, Tol::STATISTICS);
        }
        Ok(())
    }

    #[test]
    fn cfg_plus_plus_with_scale_zero_is_the_unconditional_run() -> Result<()> {
        let sigmas = Edm::default().schedule(12);
        let start = (noise() * sigmas[0])?;
        for solver in SOLVERS {
            let model = Pair::new(2.0);
            let guided = Guided { model: &model, guidance: Guidance::cfg_plus_plus(0.0) };
            let plain = run(solver, &Gaussian(1.0), &start, &sigmas);
            assert_close(&run(solver, &guided, &start, &sigmas), &plain, Tol::STATISTICS);
        }
        Ok(())
    }

    #[test]
    fn one_cfg_plus_plus_step_is_its_definition() -> Result<()> {
        let model = Pair::new(2.0);
        let (sigma, sigma_next, w) = (3.0, 1.2, 0.6);
        let x = noise();
        let (c, u) = model.both(&x, sigma)?;
        let g = (&u + ((&c - &u)? * w)?)?;
        let want = (&g + ((&x - &u)? * (sigma_next / sigma))?)?;
        let guided = Guided { model: &model, guidance: Guidance::cfg_plus_plus(w) };
        let got = run(Solver::Dpmpp2m, &guided, &x, &[sigma, sigma_next]);
        assert_close(&got, &want, Tol::STATISTICS);
        // The last step lands on the guided estimate itself.
        for solver in SOLVERS {
            assert_close(&run(solver, &guided, &x, &[sigma, 0.0]), &g, Tol::STATISTICS);
        }
        Ok(())
    }

    #[test]
    fn guidance_scale_one_equals_the_conditional_run() -> Result<()> {
        let sigmas = Edm::default().schedule(12);
        let start = (noise() * sigmas[0])?;
        for solver in SOLVERS {
            let model = Pair::new(2.0);
            let guided = |guidance| Guided { model: &model, guidance };
            let want = run(solver, &guided(Guidance::none()), &start, &sigmas);
            assert_close(&run(solver, &guided(Guidance::cfg(1.0)), &start, &sigmas), &want, Tol::STATISTICS);
            let stronger = run(solver, &guided(Guidance::cfg(2.0)), &start, &sigmas);
            assert!(stronger.mean_all()?.to_scalar::<f64>()? > want.mean_all()?.to_scalar::<f64>()? + 0.5);
        }
        Ok(())
    }

    #[test]
    fn outside_the_interval_there_is_no_second_call() -> Result<()> {
        let sigmas = Edm::default().schedule(12);
        let start = (noise() * sigmas[0])?;
        let inside = sigmas.iter().filter(|&&s| (0.1..=10.0).contains(&s)).count();
        assert!(inside > 1 && inside < 11);
        let model = Pair::new(2.0);
        let guidance = Guidance::cfg_plus_plus(0.6).within(0.1, 10.0);
        run(Solver::Dpmpp2m, &Guided { model: &model, guidance }, &start, &sigmas);
        assert_eq!(model.unconditional_calls.get(), inside);
        // An interval that holds no level at all is the conditional run.
        let model = Pair::new(2.0);
        let never = Guided { model: &model, guidance: guidance.within(1e3, 1e4) };
        let got = run(Solver::Dpmpp2m, &never, &start, &sigmas);
        let conditional = Guided { model: &model, guidance: Guidance::none() };
        assert_close(&got, &run(Solver::Dpmpp2m, &conditional, &start, &sigmas), Tol::EXACT);
        assert_eq!(model.unconditional_calls.get(), 0);
        Ok(())
    }

    #[test]
    fn a_callback_ends_the_run() -> Result<()> {
        let sigmas = Edm::default().schedule(10);
        for solver in SOLVERS {
            let mut seen = Vec::new();
            let mut on_step = |progress: Progress| {
                seen.push(progress.step_idx);
                if progress.step_idx == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            assert!(solver.run(&Gaussian(1.0), noise(), &sigmas, &mut no_noise, &mut on_step)?.is_none());
            assert_eq!(seen, [1, 2, 3]);
        }
        Ok(())
    }

    #[test]
    fn levels_that_do_not_fall_are_refused() {
        for sigmas in [[1.0, 1.0], [1.0, -0.1], [f64::NAN, 0.0], [f64::INFINITY, 0.0]] {
            assert!(
                Solver::Heun.run(&Gaussian(1.0), noise(), &sigmas, &mut no_noise, &mut keep_going).is_err()
            );
        }
    }
}
