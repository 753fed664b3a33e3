//! DAC's files as its authors and Hugging Face publish them: configs and names of tensors.
//!
//! Sources: descript-audio-codec 1.0.0 (MIT), whose files hold a `state_dict` and the arguments that made the model;
//! transformers 4.57 (Apache-2.0), `models/dac/`, whose folders have a `config.json`, and weight norm taken out.

use std::path::Path;

use dragon_nn::Checkpoint;
use dragon_nn::json::{field, number, numbers};
use serde_json::Value;

use super::Config;
use crate::published::{self, diffusers_name};
use crate::vae::Error;

/// Which names a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// descript-audio-codec's, which are this module's own.
    Descript,
    /// Hugging Face's.
    HuggingFace,
}

impl Names {
    /// Those of a checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        match checkpoint.names().any(|name| name == "encoder.conv1.bias") {
            true => Self::HuggingFace,
            false => Self::Descript,
        }
    }

    /// What a file calls the tensor `name` of [`super::Dac`].
    pub fn name(self, name: &str) -> String {
        let parts: Vec<&str> = name.split('.').collect();
        match self {
            Self::HuggingFace if parts[0] != "quantizer" => diffusers_name(&parts).unwrap_or(name.into()),
            _ => name.to_string(),
        }
    }
}

/// The config and weights of a file or folder.
///
/// # Errors
/// If a file is missing or damaged, or it is not a DAC.
pub fn open(path: &Path) -> Result<(Config, Checkpoint), Error> {
    published::open(path, read_config, config_of)
}

/// The hyperparameters in a `config.json` of Hugging Face.
///
/// # Errors
/// If it is of another model.
pub fn read_config(json: &Value) -> Result<Config, String> {
    let kind = field(json, "model_type")?;
    if kind != "dac" {
        return Err(format!("`model_type`: expected \"dac\", found {kind}"));
    }
    let sample_rate = number(json, "sampling_rate")?;
    let strides = numbers(json, "downsampling_ratios")?;
    let encoder_dim = number(json, "encoder_hidden_size")?;
    let cfg = Config {
        sample_rate_hz: u32::try_from(sample_rate).map_err(|e| format!("`sampling_rate`: {e}"))?,
        encoder_dim,
        // transformers computes it where a file leaves it out.
        latent_dim: number(json, "hidden_size").unwrap_or(encoder_dim << strides.len().min(8)),
        strides,
        decoder_dim: number(json, "decoder_hidden_size")?,
        n_codebooks: number(json, "n_codebooks")?,
        codebook_size: number(json, "codebook_size")?,
        codebook_dim: number(json, "codebook_dim")?,
    };
    cfg.validate()?;
    Ok(cfg)
}

/// The hyperparameters of a file of descript-audio-codec, told from its tensors. They do not say the sample rate: a hop of
/// 512 is that of the models at 44.1 kHz, one of 320 that of those at 24 kHz (32 codebooks) and 16 kHz (12).
///
/// # Errors
/// If the tensors are not those of a published DAC.
pub fn config_of(checkpoint: &Checkpoint) -> Result<Config, String> {
    let none = || {
        "expected the tensors of a DAC (`encoder.block.0.weight_v`, `quantizer.quantizers.0.…`), or a config.json beside it"
            .to_string()
    };
    let shape = |name: &str| checkpoint.shape(name).and_then(|shape| shape.first_chunk::<3>());
    let encoder_dim = shape("encoder.block.0.weight_v").ok_or_else(none)?[0];
    let mut strides = Vec::new();
    while let Some([_, _, kernel]) = shape(&format!("encoder.block.{}.block.4.weight_v", strides.len() + 1)) {
        strides.push(kernel / 2);
    }
    let latent_dim = shape(&format!("encoder.block.{}.weight_v", strides.len() + 2)).ok_or_else(none)?[0];
    let decoder_dim = shape("decoder.model.0.weight_v").ok_or_else(none)?[0];
    let codebook = |i: usize| checkpoint.shape(&format!("quantizer.quantizers.{i}.codebook.weight"));
    let &[codebook_size, codebook_dim] =
        codebook(0).and_then(|shape| shape.first_chunk::<2>()).ok_or_else(none)?;
    let n_codebooks = (0..).take_while(|&i| codebook(i).is_some()).count();
    let sample_rate_hz = match (strides.iter().product::<usize>(), n_codebooks) {
        (512, _) => 44_100,
        (320, 32) => 24_000,
        (320, 12) => 16_000,
        (hop, n) => {
            return Err(format!(
                "expected a hop of 512 samples (44.1 kHz), or 320 with 32 or 12 codebooks (24 and 16 kHz), found {hop} with {n}: \
                 the file does not say its sample rate"
            ));
        }
    };
    let cfg = Config {
        sample_rate_hz,
        encoder_dim,
        strides,
        latent_dim,
        decoder_dim,
        n_codebooks,
        codebook_size,
        codebook_dim,
    };
    cfg.validate()?;
    Ok(cfg)
}
