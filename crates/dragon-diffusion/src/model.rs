//! The preconditioned model: [`Dit`] and [`Edm`] together, for training ([`Model::denoise_batch`]) and for sampling ([`Conditioned`]).

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::dit::{self, Context, Dit, TextCond};
use crate::edm::Edm;
use crate::guidance::{ConditionalDenoiser, Denoiser};

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

    /// The model with fixed texts, as a denoiser for sampling.
    ///
    /// # Errors
    /// If the shapes of `cond` do not fit the config.
    pub fn with_texts(&self, cond: &TextCond, n_frames: usize) -> Result<Conditioned<'_>> {
        let batch = cond.states.dim(0)?;
        Ok(Conditioned {
            model: self,
            text: self.dit.context(cond, None, n_frames)?.detach(),
            null: self.dit.null_context(batch, n_frames)?.detach(),
        })
    }
}

/// A [`Model`] with the texts of a batch. Its estimates carry no gradient, so a sampling run keeps no history.
pub struct Conditioned<'a> {
    model: &'a Model,
    text: Context,
    null: Context,
}

impl Conditioned<'_> {
    fn run(&self, x: &Tensor, sigma: f64, context: &Context) -> Result<Tensor> {
        let sigmas = vec![sigma; x.dim(0)?];
        Ok(self.model.denoise_with(&x.detach(), &sigmas, context)?.detach())
    }
}

impl ConditionalDenoiser for Conditioned<'_> {
    fn conditional(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        self.run(x, sigma, &self.text)
    }

    fn unconditional(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        self.run(x, sigma, &self.null)
    }
}

impl Denoiser for Conditioned<'_> {
    fn denoise(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        self.conditional(x, sigma)
    }
}
