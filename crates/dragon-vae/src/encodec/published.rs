//! EnCodec's files as its authors and Hugging Face publish them: configs and names of tensors.
//!
//! Sources: encodec 0.1.1 (MIT), whose files hold a `state_dict` and no config; transformers 4.57 (Apache-2.0),
//! `models/encodec/`, whose folders have a `config.json`.

use std::path::Path;

use dragon_nn::Checkpoint;
use dragon_nn::json::{field, number, numbers};
use serde_json::Value;

use super::config::{Config, Norm};
use crate::published;
use crate::vae::Error;

/// Which names a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// encodec's, which are this module's own; also those of audiocraft.
    Encodec,
    /// Hugging Face's.
    HuggingFace {
        /// Whether weight norm is stored as newer versions of PyTorch do (`parametrizations.weight.original0`).
        parametrized: bool,
    },
}

impl Names {
    /// Those of a checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let mut names = checkpoint.names().peekable();
        match names.any(|name| name.contains("encoder.layers.") || name.contains("quantizer.layers.")) {
            true => Self::HuggingFace {
                parametrized: checkpoint
                    .names()
                    .any(|name| name.ends_with(".parametrizations.weight.original0")),
            },
            false => Self::Encodec,
        }
    }

    /// What a file calls the tensor `name` of [`super::Encodec`].
    pub fn name(self, name: &str) -> String {
        let Self::HuggingFace { parametrized } = self else { return name.to_string() };
        let mut out = name
            .replace("coder.model.", "coder.layers.")
            .replace(".conv.conv.", ".conv.")
            .replace(".convtr.convtr.", ".conv.")
            .replace(".conv.norm.", ".norm.")
            .replace(".convtr.norm.", ".norm.")
            .replace("quantizer.vq.layers.", "quantizer.layers.")
            .replace("._codebook.", ".codebook.");
        if parametrized {
            for (old, new) in [("weight_g", "original0"), ("weight_v", "original1")] {
                out = out.replace(old, &format!("parametrizations.weight.{new}"));
            }
        }
        out
    }
}

/// Whether a file may hold a tensor that no model needs: what training left in the codebooks.
pub fn is_unneeded(name: &str) -> bool {
    ["inited", "cluster_size", "embed_avg"].iter().any(|end| name.ends_with(&format!("codebook.{end}")))
}

/// The config and weights of a file or folder.
///
/// # Errors
/// If a file is missing or damaged, or it is not an EnCodec.
pub fn open(path: &Path) -> Result<(Config, Checkpoint), Error> {
    published::open(path, read_config, config_of)
}

/// The hyperparameters in a `config.json` of Hugging Face.
///
/// # Errors
/// If it is of another model, or describes layers that the published models do not have.
pub fn read_config(json: &Value) -> Result<Config, String> {
    let kind = field(json, "model_type")?;
    if kind != "encodec" {
        return Err(format!("`model_type`: expected \"encodec\", found {kind}"));
    }
    let flag = |key: &str, default: bool| json.get(key).and_then(Value::as_bool).unwrap_or(default);
    if json.get("pad_mode").is_some_and(|mode| mode != "reflect") {
        return Err("`pad_mode`: expected \"reflect\", as in the published models".into());
    }
    if json.get("trim_right_ratio").is_some_and(|ratio| ratio.as_f64() != Some(1.0)) {
        return Err("`trim_right_ratio`: expected 1, as in the published models".into());
    }
    let norm = match field(json, "norm_type")?.as_str() {
        Some("weight_norm") => Norm::Weight,
        Some("time_group_norm") => Norm::TimeGroup,
        other => {
            return Err(format!("`norm_type`: expected weight_norm or time_group_norm, found {other:?}"));
        }
    };
    let sample_rate = number(json, "sampling_rate")?;
    let codebook_size = number(json, "codebook_size")?;
    let latent_dim = number(json, "hidden_size")?;
    if json.get("codebook_dim").and_then(Value::as_u64).is_some_and(|n| n as usize != latent_dim) {
        return Err("`codebook_dim`: expected `hidden_size`, as in the published models".into());
    }
    let ratios = numbers(json, "upsampling_ratios")?;
    let hop: usize = ratios.iter().product();
    let bandwidths = field(json, "target_bandwidths")?.as_array().and_then(|list| list.last()?.as_f64());
    let Some(bandwidth) = bandwidths else {
        return Err("`target_bandwidths`: expected numbers of kbit/s".into());
    };
    // As many codebooks as the largest bandwidth has place for.
    let bits = sample_rate.div_ceil(hop.max(1)) * codebook_size.next_power_of_two().trailing_zeros() as usize;
    let cfg = Config {
        sample_rate_hz: u32::try_from(sample_rate).map_err(|e| format!("`sampling_rate`: {e}"))?,
        audio_channels: number(json, "audio_channels")?,
        n_filters: number(json, "num_filters")?,
        ratios,
        latent_dim,
        kernel: number(json, "kernel_size")?,
        last_kernel: number(json, "last_kernel_size")?,
        residual_kernel: number(json, "residual_kernel_size")?,
        residual_units: number(json, "num_residual_layers")?,
        dilation_base: number(json, "dilation_growth_rate")?,
        compress: number(json, "compress")?,
        conv_shortcut: flag("use_conv_shortcut", true),
        lstm_layers: number(json, "num_lstm_layers")?,
        causal: flag("use_causal_conv", true),
        norm,
        codebook_size,
        n_codebooks: (1000.0 * bandwidth / bits.max(1) as f64) as usize,
        segment_s: json.get("chunk_length_s").and_then(Value::as_f64),
    };
    cfg.validate()?;
    Ok(cfg)
}

/// The hyperparameters of a file of encodec, which has none: told from its tensors. A mono model with weight norm is that of
/// 24 kHz, a stereo model with a norm over time that of 48 kHz; other combinations were not published.
///
/// # Errors
/// If the tensors are not those of an EnCodec.
pub fn config_of(checkpoint: &Checkpoint) -> Result<Config, String> {
    let none = || {
        "expected the tensors of an EnCodec (`encoder.model.0.conv.conv.…`), or a config.json beside it"
            .to_string()
    };
    let weight = |layer: usize| {
        let name = format!("encoder.model.{layer}.conv.conv");
        checkpoint.shape(&format!("{name}.weight_v")).or_else(|| checkpoint.shape(&format!("{name}.weight")))
    };
    let (&[n_filters, channels, kernel], n) = (
        weight(0).and_then(|shape| shape.first_chunk::<3>()).ok_or_else(none)?,
        // Each stage has a residual unit, an activation and a convolution.
        (1..=8)
            .find(|n| checkpoint.shape(&format!("encoder.model.{}.lstm.weight_ih_l0", 3 * n + 1)).is_some())
            .ok_or_else(none)?,
    );
    let normed = checkpoint.shape("encoder.model.0.conv.norm.weight").is_some();
    let published = match (channels, normed) {
        (1, false) => Config::encodec_24khz(),
        (2, true) => Config::encodec_48khz(),
        _ => {
            let norm = if normed { "a norm over time" } else { "weight norm" };
            return Err(format!(
                "expected a mono model with weight norm (24 kHz) or a stereo model with a norm over time (48 kHz), found {channels} \
                 channels and {norm}"
            ));
        }
    };
    let mut ratios =
        (1..=n).map(|i| Some(weight(3 * i)?.last()? / 2)).collect::<Option<Vec<_>>>().ok_or_else(none)?;
    ratios.reverse();
    let last = weight(3 * n + 3).and_then(|shape| shape.first_chunk::<3>()).ok_or_else(none)?;
    let codebook = |i: usize| checkpoint.shape(&format!("quantizer.vq.layers.{i}._codebook.embed"));
    let cfg = Config {
        n_filters,
        kernel,
        ratios,
        latent_dim: last[0],
        last_kernel: last[2],
        codebook_size: *codebook(0).and_then(<[usize]>::first).ok_or_else(none)?,
        n_codebooks: (0..).take_while(|&i| codebook(i).is_some()).count(),
        ..published
    };
    cfg.validate()?;
    Ok(cfg)
}
