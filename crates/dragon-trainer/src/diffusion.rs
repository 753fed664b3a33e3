//! The diffusion model of a model folder: what it is, its weights, and models built from them.
//!
//! The weights are there once, frozen. A tuned model is built over them: with other weights, or with adapters beside them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use dragon_diffusion::stable_audio::{self, NumberConditioners, published};
use dragon_diffusion::{Config, DiffusionModel, Model, StableAudio};
use dragon_nn::{Checkpoint, Loader, Lora, Params, lora};
use serde_json::Value;

use crate::bundle::read_json;
use crate::error::{Error, Result};

/// Tensors by name.
pub type Weights = BTreeMap<String, Tensor>;

/// What kind of model a folder holds.
#[derive(Clone)]
pub enum Architecture {
    /// Our own.
    Dragon(Config),
    /// Stable Audio Open. Its number conditioners stay as they are.
    StableAudio {
        /// The network.
        config: stable_audio::Config,
        /// Seconds to tokens.
        numbers: NumberConditioners,
        /// Length of the pieces that the network is told.
        seconds: f64,
        /// Latent frames that it was trained on.
        trained_frames: usize,
    },
}

impl Architecture {
    /// The model on the weights under `vb`, the network's own names.
    ///
    /// # Errors
    /// If the config is impossible, or a weight is missing or misshapen.
    pub fn build(&self, vb: VarBuilder) -> candle_core::Result<Box<dyn DiffusionModel>> {
        Ok(match self {
            Self::Dragon(config) => Box::new(Model::new(config, vb)?),
            Self::StableAudio { config, numbers, seconds, .. } => {
                Box::new(StableAudio::new(config, vb, numbers.clone(), *seconds)?)
            }
        })
    }

    /// Channels of its latents.
    pub fn latent_channels(&self) -> usize {
        match self {
            Self::Dragon(config) => config.dit.latent_channels,
            Self::StableAudio { config, .. } => config.latent_channels,
        }
    }

    /// Width of the text states that it reads.
    pub fn text_width(&self) -> usize {
        match self {
            Self::Dragon(config) => config.dit.text_dim,
            Self::StableAudio { config, .. } => config.cond_dim,
        }
    }

    /// Name of the file with its weights.
    fn weights_file(&self) -> &'static str {
        match self {
            Self::Dragon(_) => WEIGHTS_FILES[0],
            Self::StableAudio { .. } => WEIGHTS_FILES[1],
        }
    }

    /// What its `config.json` holds; for Stable Audio that of diffusers.
    fn config_json(&self) -> Result<Value> {
        match self {
            Self::Dragon(config) => serde_json::to_value(config).map_err(|err| Error::Bug(err.to_string())),
            Self::StableAudio { config, trained_frames, .. } => {
                Ok(published::diffusers_config(config, *trained_frames))
            }
        }
    }
}

/// Files with a tuned model's weights: ours, diffusers', peft's.
const WEIGHTS_FILES: [&str; 3] =
    ["model.safetensors", "diffusion_pytorch_model.safetensors", lora::WEIGHTS_FILE];

/// A base model and its weights.
pub struct Diffusion {
    /// What it is.
    pub architecture: Architecture,
    /// The weights, frozen.
    pub weights: Weights,
    device: Device,
}

impl Diffusion {
    /// Puts a model together from what was read.
    pub fn new(architecture: Architecture, weights: Weights, device: &Device) -> Self {
        Self { architecture, weights, device: device.clone() }
    }

    /// Reads the folder of one of our own models: its config and its weights.
    ///
    /// # Errors
    /// If a file is missing or broken, or weights and config do not fit; every tensor in question is listed.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let config: Config = read_json(&dir.join("config.json"))?;
        let architecture = Architecture::Dragon(config);
        let weights = read_weights(&architecture, &dir.join(WEIGHTS_FILES[0]), device)?;
        Ok(Self::new(architecture, weights, device))
    }

    /// The weights as a source for [`Architecture::build`], with others in the place of some: variables, or their values.
    pub fn builder<'a>(&self, others: impl IntoIterator<Item = (&'a String, Tensor)>) -> VarBuilder<'static> {
        self.builder_in(DType::F32, others)
    }

    /// [`Self::builder`] for a model that computes in another type: each weight is converted when it is asked for.
    pub fn builder_in<'a>(
        &self,
        dtype: DType,
        others: impl IntoIterator<Item = (&'a String, Tensor)>,
    ) -> VarBuilder<'static> {
        let mut tensors: HashMap<String, Tensor> =
            self.weights.iter().map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        tensors.extend(others.into_iter().map(|(name, tensor)| (name.clone(), tensor)));
        VarBuilder::from_tensors(tensors, dtype, &self.device)
    }

    /// The base, without gradients.
    ///
    /// # Errors
    /// If the config is impossible.
    pub fn base(&self) -> Result<Box<dyn DiffusionModel>> {
        self.base_in(DType::F32)
    }

    /// [`Self::base`], computing in another type.
    ///
    /// # Errors
    /// If the config is impossible.
    pub fn base_in(&self, dtype: DType) -> Result<Box<dyn DiffusionModel>> {
        Ok(self.architecture.build(self.builder_in(dtype, []))?)
    }

    /// The tuned model in `dir`, without gradients: other weights, or adapters over the base's.
    ///
    /// # Errors
    /// If the folder holds no model, or one of another shape.
    pub fn tuned(&self, dir: &Path) -> Result<Box<dyn DiffusionModel>> {
        let dir = tuned_dir(dir)?;
        if dir.join(lora::WEIGHTS_FILE).exists() {
            let refused = |err: String| {
                let hint = "hint: name the model folder that these adapters were trained on";
                Error::input("cannot load the adapters")(candle_core::Error::msg(format!("{err}\n{hint}")))
            };
            let config = Lora::read_config(&dir).map_err(Error::input("cannot read the adapters"))?;
            let lora = Lora::new(config, 0)?;
            self.architecture.build(lora.over(self.builder([])))?; // makes the adapters
            lora.load(&dir).map_err(|err| refused(err.to_string()))?;
            return Ok(self.architecture.build(lora.frozen_over(self.builder([])))?);
        }
        if self.architecture.config_json()? != read_json::<Value>(&dir.join("config.json"))? {
            return Err(Error::Content {
                path: dir.join("config.json"),
                problem: "describes another diffusion model than that of the model folder".into(),
                hint: "name the model folder that this model was tuned from".into(),
            });
        }
        let path = dir.join(self.architecture.weights_file());
        let weights = read_weights(&self.architecture, &path, &self.device)?;
        let model = Self::new(self.architecture.clone(), weights, &self.device);
        model.base()
    }

    /// Writes the folder of a tuned model: the base's weights with `tuned` in the place of some, in f32; those of Stable Audio
    /// as diffusers has its `transformer`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path, tuned: &Params) -> Result<()> {
        let mut tensors = self.weights.clone();
        tensors
            .extend(tuned.names_and_vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor())));
        write_model(dir, &self.architecture, &tensors)
    }
}

/// Writes the folder of one of our own models, weights in f32.
///
/// # Errors
/// If a file cannot be written.
pub fn save_dit(dir: &Path, config: &Config, params: &Params) -> Result<()> {
    write_model(dir, &Architecture::Dragon(config.clone()), &params.tensors()?)
}

fn write_model(dir: &Path, architecture: &Architecture, weights: &Weights) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let json =
        serde_json::to_vec_pretty(&architecture.config_json()?).map_err(|err| Error::Bug(err.to_string()))?;
    crate::run::write_atomic(&dir.join("config.json"), &json)?;
    let path = dir.join(architecture.weights_file());
    let failed = Error::input(format!("cannot write `{}`", path.display()));
    let f32s = weights.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(DType::F32)?)));
    let f32s: Weights = f32s.collect::<candle_core::Result<_>>()?;
    dragon_nn::write_safetensors(&path, &f32s, &BTreeMap::new()).map_err(failed)
}

/// The weights in a file with the model's own names.
fn read_weights(architecture: &Architecture, path: &Path, device: &Device) -> Result<Weights> {
    if !path.exists() {
        return Err(Error::missing(path));
    }
    let refused = "cannot load weights\nhint: take config and weights from one training";
    let loader = Loader::same_names(Checkpoint::open(path).map_err(Error::input(refused))?);
    architecture.build(loader.builder(DType::F32, device)).map_err(Error::input(format!(
        "`{}` does not describe a diffusion model",
        path.with_file_name("config.json").display()
    )))?;
    loader.finish(|_| false).map_err(Error::input(refused))
}

/// Where the tuned model of `path` lies: the folder itself, the `model/` of a run, or the `dit/` of a model folder.
///
/// # Errors
/// If there is none.
pub fn tuned_dir(path: &Path) -> Result<PathBuf> {
    let candidates = [path.to_owned(), path.join("model"), path.join("dit")];
    candidates.into_iter().find(|dir| weights_path(dir).is_some()).ok_or_else(|| Error::Data {
        problem: format!("`{}` holds no diffusion model", path.display()),
        hint: "name a run folder with model/, a model folder with dit/, or a folder with config.json and model.safetensors, \
               or with adapters (adapter_config.json and adapter_model.safetensors)"
            .into(),
    })
}

/// The file with the weights, or the adapters, of a tuned model in `dir`, if there is one.
pub fn weights_path(dir: &Path) -> Option<PathBuf> {
    WEIGHTS_FILES.iter().map(|name| dir.join(name)).find(|path| path.exists())
}
