//! What is tuned: weights of the network, or adapters beside them. The reference is the base alone: it and the policy
//! share every weight that is not tuned.

use std::path::Path;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use dragon_diffusion::DiffusionModel;
use dragon_nn::{Lora, Params};

use super::UpdateConfig;
use crate::diffusion::Diffusion;
use crate::error::{Error, Result};

/// The policy's variables, and how models are built with them.
pub(super) struct Policy<'a> {
    base: &'a Diffusion,
    kind: Kind,
}

enum Kind {
    /// Variables in the place of weights of the base.
    Weights(Params),
    Adapters(Lora),
}

impl<'a> Policy<'a> {
    /// A policy at the base's weights.
    ///
    /// # Errors
    /// If nothing would be tuned.
    pub fn new(cfg: &UpdateConfig, base: &'a Diffusion, seed: u64) -> Result<Self> {
        let Some(config) = &cfg.lora else {
            let words = &cfg.parameters;
            let tuned = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word));
            let params = Params::of(base.weights.iter().filter(|(name, _)| tuned(name)))?;
            if params.len_params() == 0 {
                let names: Vec<&str> = base.weights.keys().map(String::as_str).collect();
                let expected = format!("parts of names of variables, which are {}", names.join(", "));
                return Err(Error::config("update.parameters", expected, format!("{words:?}")));
            }
            return Ok(Self { base, kind: Kind::Weights(params) });
        };
        let lora = Lora::new(config.clone(), seed)?;
        base.architecture.build(lora.over(base.builder([])))?; // makes the adapters
        for target in &config.targets {
            let mut layers = lora.params().names_and_vars().into_iter();
            if !layers.any(|(name, _)| name.contains(&format!("{target}.lora_"))) {
                let expected =
                    format!("ends of names of linear layers; the weights are {}", ends_of(base).join(", "));
                return Err(Error::config("update.lora.targets", expected, target));
            }
        }
        Ok(Self { base, kind: Kind::Adapters(lora) })
    }

    /// The variables that are tuned.
    pub fn tuned(&self) -> &Params {
        match &self.kind {
            Kind::Weights(params) => params,
            Kind::Adapters(lora) => lora.params(),
        }
    }

    /// The policy, with gradients for its variables.
    ///
    /// # Errors
    /// If the network cannot be built.
    pub fn model(&self) -> Result<Box<dyn DiffusionModel>> {
        let vb = match &self.kind {
            Kind::Weights(params) => self.over_base(params, DType::F32, |var| var),
            Kind::Adapters(lora) => lora.over(self.base.builder([])),
        };
        Ok(self.base.architecture.build(vb)?)
    }

    /// The policy at the values of `tuned`, its own variables or as many others (their averages), computing in `dtype`: no
    /// gradients.
    ///
    /// # Errors
    /// If the network cannot be built.
    pub fn frozen(&self, tuned: &Params, dtype: DType) -> Result<Box<dyn DiffusionModel>> {
        let vb = match &self.kind {
            Kind::Weights(_) => self.over_base(tuned, dtype, |var| var.detach()),
            Kind::Adapters(lora) => lora.with(tuned.clone()).frozen_over(self.base.builder_in(dtype, [])),
        };
        Ok(self.base.architecture.build(vb)?)
    }

    /// Writes the folder of the model at the values of `tuned`: all weights, or the adapters alone.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn export(&self, dir: &Path, tuned: &Params) -> Result<()> {
        match &self.kind {
            Kind::Weights(_) => self.base.save(dir, tuned),
            Kind::Adapters(lora) => {
                std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
                lora.with(tuned.clone()).save(dir).map_err(Error::input("cannot write the adapters"))
            }
        }
    }

    fn over_base(
        &self,
        tuned: &Params,
        dtype: DType,
        value: impl Fn(Tensor) -> Tensor,
    ) -> VarBuilder<'static> {
        let vars = tuned.names_and_vars();
        self.base.builder_in(dtype, vars.iter().map(|(name, var)| (name, value(var.as_tensor().clone()))))
    }
}

/// The last parts of the names of the base's matrices, each once: what `targets` may name.
fn ends_of(base: &Diffusion) -> Vec<&str> {
    let matrices = base.weights.iter().filter(|(_, tensor)| tensor.rank() == 2);
    let mut ends: Vec<&str> = matrices
        .filter_map(|(name, _)| name.strip_suffix(".weight"))
        .map(|layer| match layer.rsplit_once('.') {
            // `to_out.0`: a number says nothing alone.
            Some((before, last)) if last.parse::<usize>().is_ok() => {
                before.rfind('.').map_or(layer, |dot| &layer[dot + 1..])
            }
            Some((_, last)) => last,
            None => layer,
        })
        .collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}
