//! Sampling: noise of each prompt, and the run from noise to latents.

use candle_core::{DType, Device, Result, Tensor, bail};
use dragon_nn::Rng;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

use crate::dit::TextCond;
use crate::guidance::{Guidance, Guided};
use crate::model::{Conditioned, DiffusionModel};
use crate::solver::{OnStep, Progress, Solver, keep_going};

/// How latents are sampled.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerConfig {
    /// Which solver. Paper: a second-order DPM solver.
    pub solver: Solver,
    /// Steps, at least 1. Paper: 40.
    pub n_steps: usize,
    /// Guidance. Paper: CFG++ in selected steps; its weight and interval are unknown.
    pub guidance: Guidance,
}

impl Default for SamplerConfig {
    /// DPM-Solver++(2M), 40 steps, CFG++ with scale 0.6 at noise levels between 0.1 and 10 (paper values of scale and interval unknown).
    fn default() -> Self {
        Self {
            solver: Solver::Dpmpp2m,
            n_steps: 40,
            guidance: Guidance::cfg_plus_plus(0.6).within(0.1, 10.0),
        }
    }
}

/// Standard normal noise for a batch, from a generator for each row: a row's noise follows from its key and seed, not from
/// its batch, and is the same for every model and machine.
#[derive(Debug, Clone)]
pub struct Noise {
    rows: Vec<Rng>,
    channels: usize,
    n_frames: usize,
    device: Device,
}

impl Noise {
    /// Noise of latents of `channels` channels and `n_frames` frames, for each `(key, seed)`; a song's key is its prompt.
    pub fn new(keys: &[(&str, u64)], channels: usize, n_frames: usize, device: &Device) -> Self {
        let rows = keys.iter().map(|(key, seed)| Rng::from_key(key, *seed)).collect();
        Self { rows, channels, n_frames, device: device.clone() }
    }

    /// The next noise of all rows, `[B, C, T]`, f32, drawn on the CPU.
    ///
    /// # Errors
    /// If there is no row.
    pub fn draw(&mut self) -> Result<Tensor> {
        let shape = (1, self.channels, self.n_frames);
        let row = |rng: &mut Rng| rng.normal_tensor(shape, DType::F32, &Device::Cpu);
        let rows: Vec<Tensor> = self.rows.iter_mut().map(row).collect::<Result<_>>()?;
        Tensor::cat(&rows, 0)?.to_device(&self.device)
    }

    /// The noise of some rows.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn select(&self, rows: impl IntoIterator<Item = usize>) -> Self {
        Self { rows: rows.into_iter().map(|row| self.rows[row].clone()).collect(), ..self.clone() }
    }
}

/// Samples latents for a batch of texts.
///
/// A row's result depends on its text and noise only, bit for bit, not on the rest of the batch or its size.
///
/// # Shapes
/// - `cond`: `B` texts; `noise`: of as many rows. Returns latents `[B, C, T]` without gradient.
///
/// # Errors
/// If settings are out of range or shapes do not fit.
pub fn sample(
    model: &dyn DiffusionModel,
    cond: &TextCond,
    noise: &Noise,
    cfg: &SamplerConfig,
) -> Result<Tensor> {
    let mut noise = noise.clone();
    let latents = sample_with(model, cond, &mut || noise.draw(), cfg, &mut keep_going)?;
    Ok(latents.expect("a run whose callback never breaks has a result"))
}

/// [`sample`] with noise from anywhere, `[B, C, T]`: that of the start, then, under [`Solver::Dpmpp2mSde`], that of each step;
/// and with a callback after every step: where it breaks, the run ends and gives `None`.
///
/// # Errors
/// As [`sample`].
pub fn sample_with(
    model: &dyn DiffusionModel,
    cond: &TextCond,
    noise: &mut dyn FnMut() -> Result<Tensor>,
    cfg: &SamplerConfig,
    on_step: &mut OnStep<'_>,
) -> Result<Option<Tensor>> {
    if cfg.n_steps == 0 {
        bail!("`n_steps` must be at least 1, found 0");
    }
    cfg.guidance.check()?;
    let start = noise()?.detach();
    let (batch, _, n_frames) = start.dims3()?;
    if cond.states.dim(0)? != batch {
        bail!("expected one text for each of {batch} noises, found {:?}", cond.states.dims());
    }
    let conditioned = Conditioned::new(model, cond, n_frames)?;
    let guided = Guided { model: &conditioned, guidance: cfg.guidance };
    let sigmas = model.schedule(cfg.n_steps);
    let x = (start * model.start_deviation(sigmas[0]))?;
    cfg.solver.run(&guided, x, &sigmas, noise, on_step)
}

/// [`sample`] in batches of at most `batch_size` rows, so that memory stays bounded; the callback sees the steps of all batches as one run.
///
/// # Errors
/// As [`sample`], and if `batch_size` is 0.
pub fn sample_in_batches(
    model: &dyn DiffusionModel,
    cond: &TextCond,
    noise: &Noise,
    cfg: &SamplerConfig,
    batch_size: usize,
    on_step: &mut OnStep<'_>,
) -> Result<Option<Tensor>> {
    if batch_size == 0 {
        bail!("the batch size must be at least 1, found 0");
    }
    let n = cond.states.dim(0)?;
    if noise.rows.len() != n {
        bail!("expected noise for each of {n} texts, found {} rows", noise.rows.len());
    }
    let n_batches = n.div_ceil(batch_size);
    let mut latents = Vec::with_capacity(n_batches);
    for i in 0..n_batches {
        let start = i * batch_size;
        let len = batch_size.min(n - start);
        let mut on_batch_step = |progress: Progress| -> ControlFlow<()> {
            on_step(Progress {
                step_idx: i * progress.n_steps + progress.step_idx,
                n_steps: n_batches * progress.n_steps,
                sigma: progress.sigma,
            })
        };
        let mut noise = noise.select(start..start + len);
        let cond = cond.narrow(start, len)?;
        match sample_with(model, &cond, &mut || noise.draw(), cfg, &mut on_batch_step)? {
            Some(batch) => latents.push(batch),
            None => return Ok(None),
        }
    }
    Ok(Some(Tensor::cat(&latents, 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guidance::GuidanceKind;
    use crate::model::{Config, Model};
    use dragon_nn::Params;
    use dragon_testkit::{Tol, assert_close};

    const PROMPTS: [(&str, u64); 5] =
        [("a slow air", 0), ("a slow air", 1), ("a jig", 0), ("", 0), ("a reel", 7)];

    /// A model whose zero initialisations are replaced by noise, texts of several lengths, the prompts' noise.
    fn setup(cfg: &Config, n_frames: usize) -> (Model, TextCond, Noise) {
        let params = Params::new(1);
        let model = Model::new(cfg, params.builder(DType::F32, &Device::Cpu)).unwrap();
        let mut rng = Rng::new(2);
        for (_, var) in params.names_and_vars() {
            let noise = rng.normal_tensor(var.shape().clone(), DType::F32, &Device::Cpu).unwrap();
            var.set(&(var.as_tensor().detach() + (noise * 0.05).unwrap()).unwrap()).unwrap();
        }
        let (n, length) = (PROMPTS.len(), 6);
        let states = rng.normal_tensor((n, length, cfg.dit.text_dim), DType::F32, &Device::Cpu).unwrap();
        let mask: Vec<f32> = (0..n * length).map(|i| f32::from(i % length < (i / length * 2) % 7)).collect();
        let cond = TextCond { states, mask: Tensor::from_vec(mask, (n, length), &Device::Cpu).unwrap() };
        let noise = Noise::new(&PROMPTS, cfg.dit.latent_channels, n_frames, &Device::Cpu);
        (model, cond, noise)
    }

    #[test]
    fn a_prompts_sample_does_not_depend_on_its_batch() -> Result<()> {
        // The embedded model's shapes, so that the fast paths of all layers are taken; fewer blocks for time.
        let mut cfg = Config::tiny_music();
        cfg.dit.depth = 2;
        let (model, cond, noise) = setup(&cfg, 80);
        let settings = SamplerConfig { n_steps: 4, ..SamplerConfig::default() };
        let together = sample(&model, &cond, &noise, &settings)?;
        assert!(together.abs()?.mean_all()?.to_scalar::<f32>()?.is_finite());
        for i in 0..PROMPTS.len() {
            let alone = sample(&model, &cond.narrow(i, 1)?, &noise.select([i]), &settings)?;
            assert_close(&together.narrow(0, i, 1)?, &alone, Tol::EXACT);
        }
        let mut n_calls = 0;
        let mut on_step = |progress: Progress| {
            n_calls += 1;
            assert_eq!((progress.step_idx, progress.n_steps), (n_calls, 12));
            ControlFlow::Continue(())
        };
        let chunked =
            sample_in_batches(&model, &cond, &noise, &settings, 2, &mut on_step)?.expect("not stopped");
        assert_close(&chunked, &together, Tol::EXACT);
        assert_eq!(n_calls, 12);
        Ok(())
    }

    #[test]
    fn every_solver_and_guidance_gives_finite_latents_that_differ() -> Result<()> {
        let (model, cond, noise) = setup(&Config::tiny(), 10);
        let mut seen: Vec<Vec<f32>> = Vec::new();
        for solver in [Solver::Dpmpp2m, Solver::Dpmpp2s, Solver::Heun, Solver::Dpmpp2mSde] {
            for guidance in
                [Guidance::none(), Guidance::cfg(3.0), Guidance::cfg_plus_plus(0.6).within(0.1, 10.0)]
            {
                let cfg = SamplerConfig { solver, n_steps: 6, guidance };
                let latents = sample(&model, &cond, &noise, &cfg)?;
                assert_eq!(latents.dims(), [PROMPTS.len(), noise.channels, noise.n_frames]);
                let values = latents.flatten_all()?.to_vec1::<f32>()?;
                assert!(values.iter().all(|v| v.is_finite()), "{cfg:?}");
                assert!(!seen.contains(&values), "{cfg:?} changes nothing");
                seen.push(values);
            }
        }
        Ok(())
    }

    #[test]
    fn noise_belongs_to_prompt_and_seed() -> Result<()> {
        let noise = |prompt: &str, seed| -> Result<Vec<f32>> {
            Noise::new(&[(prompt, seed)], 32, 80, &Device::Cpu).draw()?.flatten_all()?.to_vec1()
        };
        let first = noise("a slow air", 0)?;
        assert_eq!(first, noise("a slow air", 0)?);
        assert_ne!(first, noise("a slow air", 1)?);
        assert_ne!(first, noise("a slow air.", 0)?);
        let mean = first.iter().sum::<f32>() / first.len() as f32;
        let var = first.iter().map(|v| v * v).sum::<f32>() / first.len() as f32;
        assert!(mean.abs() < 0.08 && (var - 1.0).abs() < 0.15, "{mean} {var}");
        Ok(())
    }

    #[test]
    fn a_run_can_be_stopped_and_bad_settings_are_refused() -> Result<()> {
        let (model, cond, noise) = setup(&Config::tiny(), 10);
        let cfg = SamplerConfig { n_steps: 3, ..SamplerConfig::default() };
        let mut stop = |_: Progress| ControlFlow::Break(());
        let mut rows = noise.clone();
        assert!(sample_with(&model, &cond, &mut || rows.draw(), &cfg, &mut stop)?.is_none());
        assert!(sample_in_batches(&model, &cond, &noise, &cfg, 2, &mut stop)?.is_none());
        assert!(sample(&model, &cond, &noise, &SamplerConfig { n_steps: 0, ..cfg }).is_err());
        assert!(sample(&model, &cond.narrow(0, 2)?, &noise, &cfg).is_err());
        let guidance = Guidance { kind: GuidanceKind::CfgPlusPlus, scale: 3.0, ..Guidance::none() };
        assert!(sample(&model, &cond, &noise, &SamplerConfig { guidance, ..cfg }).is_err());
        Ok(())
    }

    #[test]
    fn sampling_leaves_no_gradient_history() -> Result<()> {
        let (model, cond, noise) = setup(&Config::tiny(), 10);
        let latents = sample(&model, &cond, &noise, &SamplerConfig::default())?;
        assert!(!latents.track_op(), "the latents carry a history");
        Ok(())
    }
}
