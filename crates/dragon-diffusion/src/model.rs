//! What training and sampling need of a diffusion model ([`DiffusionModel`]), and our own: [`Dit`] and [`Edm`] together.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::dit::{self, Context, Dit, TextCond};
use crate::edm::Edm;
use crate::guidance::ConditionalDenoiser;

/// Denoised estimates `[B, C, T]` of noisy latents `x0 + sigma * n`, `[B, C, T]`, with a noise level above 0 for each of `B`
/// examples: a model with the texts of a batch. Carries gradients.
pub type Denoise<'a> = Box<dyn Fn(&Tensor, &[f64]) -> Result<Tensor> + 'a>;

/// A text-to-music diffusion model, as training and sampling see it.
pub trait DiffusionModel {
    /// Its noise levels: those it was trained at, and what a loss weighs errors by.
    fn edm(&self) -> &Edm;

    /// The `n_steps + 1` noise levels of a sampling run; the last is 0.
    fn schedule(&self, n_steps: usize) -> Vec<f64> {
        self.edm().schedule(n_steps)
    }

    /// Standard deviation of what a run from noise level `sigma` starts with.
    fn start_deviation(&self, sigma: f64) -> f64 {
        sigma
    }

    /// The model with the texts of a batch; where `drop` is true, without.
    ///
    /// # Errors
    /// If the shapes do not fit the model.
    fn with_texts(&self, cond: &TextCond, drop: Option<&[bool]>, n_frames: usize) -> Result<Denoise<'_>>;

    /// The model without the texts of a batch: all of [`Self::with_texts`] dropped.
    ///
    /// # Errors
    /// As there.
    fn without_texts(&self, cond: &TextCond, n_frames: usize) -> Result<Denoise<'_>>;
}

/// A model with the texts of a batch, for sampling: its estimates carry no gradient, so that a run keeps no history.
pub struct Conditioned<'a> {
    text: Denoise<'a>,
    null: Denoise<'a>,
}

impl<'a> Conditioned<'a> {
    /// Prepares the texts.
    ///
    /// # Errors
    /// If the shapes of `cond` do not fit the model.
    pub fn new(model: &'a dyn DiffusionModel, cond: &TextCond, n_frames: usize) -> Result<Self> {
        Ok(Self { text: model.with_texts(cond, None, n_frames)?, null: model.without_texts(cond, n_frames)? })
    }
}

fn without_history(denoise: &Denoise, x: &Tensor, sigma: f64) -> Result<Tensor> {
    Ok(denoise(&x.detach(), &vec![sigma; x.dim(0)?])?.detach())
}

impl ConditionalDenoiser for Conditioned<'_> {
    fn conditional(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        without_history(&self.text, x, sigma)
    }

    fn unconditional(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        without_history(&self.null, x, sigma)
    }
}

/// What `config.json` of a model folder holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The network.
    pub dit: dit::Config,
    /// The diffusion.
    pub edm: Edm,
}

impl Config {
    /// The paper's size ([`dit::Config::presto`]) for latents of unit variance.
    pub fn presto() -> Self {
        Self { dit: dit::Config::presto(), edm: Edm::unit_variance() }
    }

    /// The embedded default ([`dit::Config::tiny_music`]) for latents of unit variance.
    pub fn tiny_music() -> Self {
        Self { dit: dit::Config::tiny_music(), edm: Edm::unit_variance() }
    }

    /// The smallest valid model, for tests.
    pub fn tiny() -> Self {
        Self { dit: dit::Config::tiny(), edm: Edm::unit_variance() }
    }
}

/// `D(x; sigma, c) = c_skip * x + c_out * F(c_in * x, c_noise, c)`.
pub struct Model {
    /// The network `F`.
    pub dit: Dit,
    /// The diffusion it was trained for.
    pub edm: Edm,
}

impl Model {
    /// Reads or creates the weights under `vb`; the network's names have no prefix.
    ///
    /// # Errors
    /// If the config is impossible or weights are missing.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        cfg.edm.check()?;
        Ok(Self { dit: Dit::new(&cfg.dit, vb)?, edm: cfg.edm })
    }

    /// What the model was built from.
    pub fn config(&self) -> Config {
        Config { dit: self.dit.config().clone(), edm: self.edm }
    }

    /// The denoised estimates of a batch with a noise level for each example. Carries gradients: the training path.
    ///
    /// # Shapes
    /// - `x`: `[B, C, T]`, `x0 + sigma * n`; `sigma`: `[B]`, above 0; `cond`, `drop`: as in [`Dit::forward`]. Returns `[B, C, T]`.
    pub fn denoise_batch(
        &self,
        x: &Tensor,
        sigma: &Tensor,
        cond: &TextCond,
        drop: Option<&[bool]>,
    ) -> Result<Tensor> {
        let context = self.dit.context(cond, drop, x.dim(2)?)?;
        self.denoise_with(x, &sigma.to_dtype(candle_core::DType::F64)?.to_vec1::<f64>()?, &context)
    }

    /// [`Self::denoise_batch`] with the levels on the host and the texts prepared.
    pub fn denoise_with(&self, x: &Tensor, sigmas: &[f64], context: &Context) -> Result<Tensor> {
        let batch = x.dim(0)?;
        if sigmas.len() != batch {
            bail!("expected one noise level for each of {batch} examples, found {}", sigmas.len());
        }
        let c: Vec<_> = sigmas.iter().map(|&sigma| self.edm.precondition(sigma)).collect();
        let column = |values: Vec<f64>| -> Result<Tensor> {
            Tensor::from_vec(values, (batch, 1, 1), &Device::Cpu)?.to_device(x.device())?.to_dtype(x.dtype())
        };
        let c_in = column(c.iter().map(|c| c.c_in).collect())?;
        let c_skip = column(c.iter().map(|c| c.c_skip).collect())?;
        let c_out = column(c.iter().map(|c| c.c_out).collect())?;
        let c_noise = column(c.iter().map(|c| c.c_noise).collect())?.reshape(batch)?;
        let f = self.dit.forward_with(&x.broadcast_mul(&c_in)?, &c_noise, context)?;
        x.broadcast_mul(&c_skip)? + f.broadcast_mul(&c_out)?
    }
}

impl DiffusionModel for Model {
    fn edm(&self) -> &Edm {
        &self.edm
    }

    fn with_texts(&self, cond: &TextCond, drop: Option<&[bool]>, n_frames: usize) -> Result<Denoise<'_>> {
        let context = self.dit.context(cond, drop, n_frames)?;
        Ok(Box::new(move |x, sigmas| self.denoise_with(x, sigmas, &context)))
    }

    fn without_texts(&self, cond: &TextCond, n_frames: usize) -> Result<Denoise<'_>> {
        let context = self.dit.null_context(cond.states.dim(0)?, n_frames)?;
        Ok(Box::new(move |x, sigmas| self.denoise_with(x, sigmas, &context)))
    }
}
