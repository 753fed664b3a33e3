//! Stable Audio's autoencoder as its authors and diffusers publish it: configs and names of tensors.
//!
//! The network is [`Design::Oobleck`]; what differs between the files is what they call it. Sources: stable-audio-tools
//! 0.0.19 (MIT), `models/autoencoders.py`; diffusers 0.42 (Apache-2.0), `models/autoencoders/autoencoder_oobleck.py`.
//! Golden test: `oobleck_matches_its_references` in `tests/golden.rs`; the names and shapes of the whole model:
//! `stable_audio_open_asks_for_the_published_tensors`.

use std::path::Path;

use dragon_nn::Checkpoint;
use dragon_nn::json::{field, number, numbers};
use serde_json::Value;

use crate::config::{Config, Design, Output};
use crate::vae::{Error, read_json};

/// Who wrote the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// stable-audio-tools: `model_config.json` beside `model.safetensors` or a `.ckpt`.
    StableAudioTools,
    /// diffusers: `config.json` beside `diffusion_pytorch_model.safetensors`.
    Diffusers,
}

impl Layout {
    /// What a file of this layout calls the tensor `name` of [`crate::AudioVae`], without what a whole pipeline puts
    /// before it (`pretransform.model.` in stable-audio-tools).
    pub fn name(self, name: &str) -> String {
        let parts: Vec<&str> = name.split('.').collect();
        match self {
            // `encoder.block.1.block.0.block.1.bias`: the same path through lists that are all called `layers`.
            Layout::StableAudioTools => {
                let parts =
                    parts.iter().map(|&part| if matches!(part, "block" | "model") { "layers" } else { part });
                parts.collect::<Vec<_>>().join(".")
            }
            Layout::Diffusers => diffusers_name(&parts).unwrap_or_else(|| name.to_string()),
        }
    }
}

/// The names of diffusers and of Hugging Face's DAC; `None` for a name that is not of an encoder or decoder.
pub(crate) fn diffusers_name(parts: &[&str]) -> Option<String> {
    let number = |i: usize| parts.get(i)?.parse::<usize>().ok();
    let (side, stage, tensor) = (*parts.first()?, number(2)?, *parts.last()?);
    let encoder = side == "encoder";
    let path = match parts.len() {
        // `encoder.block.0.bias`: the convolutions and the snake outside of the stages.
        4 if stage == 0 => "conv1".to_string(),
        4 if matches!(tensor, "alpha" | "beta") => "snake1".to_string(),
        4 => "conv2".to_string(),
        // `encoder.block.1.block.3.alpha`: a stage's snake and its convolution that changes the rate.
        6 => {
            let layer = match (tensor, encoder) {
                ("alpha" | "beta", _) => "snake1",
                (_, true) => "conv1",
                (_, false) => "conv_t1",
            };
            format!("block.{}.{layer}", stage - 1)
        }
        // `encoder.block.1.block.0.block.1.bias`: a residual unit; the decoder's follow snake and convolution.
        8 => {
            let unit = if encoder { number(4)? + 1 } else { number(4)?.checked_sub(1)? };
            let layer = ["snake1", "conv1", "snake2", "conv2"].get(number(6)?)?;
            format!("block.{}.res_unit{unit}.{layer}", stage - 1)
        }
        _ => return None,
    };
    Some(format!("{side}.{path}.{tensor}"))
}

/// The hyperparameters in a config file of diffusers (`AutoencoderOobleck`) or stable-audio-tools (an autoencoder, or a
/// diffusion model with one as its `pretransform`), and which of them it is.
///
/// # Errors
/// If the file is neither, or describes layers that Stable Audio Open does not have.
pub fn read_config(json: &Value) -> Result<(Config, Layout), String> {
    if let Some(class) = json.get("_class_name") {
        if class != "AutoencoderOobleck" {
            return Err(format!("`_class_name`: expected \"AutoencoderOobleck\", found {class}"));
        }
        return Ok((from_diffusers(json)?, Layout::Diffusers));
    }
    let Some(model) = json.get("model") else {
        return Err(
            "expected a config of stable-audio-tools (with `model`) or diffusers (with `_class_name`)".into(),
        );
    };
    let autoencoder = match model.get("pretransform") {
        Some(pretransform) => {
            expect(pretransform, "type", "autoencoder")?;
            if pretransform.get("scale").is_some_and(|scale| scale.as_f64() != Some(1.0)) {
                return Err("`pretransform.scale`: expected 1, as in Stable Audio Open".into());
            }
            field(pretransform, "config")?
        }
        None => model,
    };
    Ok((from_stable_audio_tools(json, autoencoder)?, Layout::StableAudioTools))
}

fn from_diffusers(json: &Value) -> Result<Config, String> {
    let strides = numbers(json, "downsampling_ratios")?;
    let multiples = numbers(json, "channel_multiples")?;
    let latent_dim = number(json, "decoder_input_channels")?;
    let (encoder, decoder) = (number(json, "encoder_hidden_size")?, number(json, "decoder_channels")?);
    if encoder != 2 * latent_dim {
        return Err(format!(
            "`encoder_hidden_size`: expected {}, twice `decoder_input_channels` (mean and deviation), found {encoder}",
            2 * latent_dim
        ));
    }
    let (sample_rate, channels) = (number(json, "sampling_rate")?, number(json, "audio_channels")?);
    let widths = |first: usize| std::iter::once(first).chain(multiples.iter().map(|m| m * first)).collect();
    oobleck(sample_rate, channels, latent_dim, strides, widths(encoder), widths(decoder), Output::Linear)
}

fn from_stable_audio_tools(json: &Value, autoencoder: &Value) -> Result<Config, String> {
    let (encoder, decoder) = (field(autoencoder, "encoder")?, field(autoencoder, "decoder")?);
    for part in [encoder, decoder, field(autoencoder, "bottleneck")?] {
        let want = if std::ptr::eq(part, encoder) || std::ptr::eq(part, decoder) { "oobleck" } else { "vae" };
        expect(part, "type", want)?;
    }
    let (encoder, decoder) = (field(encoder, "config")?, field(decoder, "config")?);
    for part in [encoder, decoder] {
        let is = |key: &str| part.get(key).and_then(Value::as_bool).unwrap_or(false);
        if !is("use_snake") || is("antialias_activation") || is("use_nearest_upsample") {
            return Err(
                "`use_snake` must be true, `antialias_activation` and `use_nearest_upsample` false: other layers are \
                 not built here"
                    .into(),
            );
        }
    }
    let latent_dim = number(decoder, "latent_dim")?;
    let (strides, up) = (numbers(encoder, "strides")?, numbers(decoder, "strides")?);
    if number(encoder, "latent_dim")? != 2 * latent_dim || strides != up {
        return Err(format!(
            "encoder and decoder do not fit: expected `latent_dim` {} in the encoder (mean and deviation) and the same `strides`",
            2 * latent_dim
        ));
    }
    let widths = |part: &Value| -> Result<Vec<usize>, String> {
        let channels = number(part, "channels")?;
        Ok(std::iter::once(channels).chain(numbers(part, "c_mults")?.iter().map(|m| m * channels)).collect())
    };
    let tanh = decoder.get("final_tanh").and_then(Value::as_bool).unwrap_or(true);
    let output = if tanh { Output::Tanh } else { Output::Linear };
    let (sample_rate, channels) = (number(json, "sample_rate")?, number(decoder, "out_channels")?);
    oobleck(sample_rate, channels, latent_dim, strides, widths(encoder)?, widths(decoder)?, output)
}

fn oobleck(
    sample_rate: usize,
    audio_channels: usize,
    latent_dim: usize,
    strides: Vec<usize>,
    encoder_channels: Vec<usize>,
    decoder_channels: Vec<usize>,
    output: Output,
) -> Result<Config, String> {
    let units = vec![3; strides.len()];
    let config = Config {
        design: Design::Oobleck,
        sample_rate_hz: u32::try_from(sample_rate).map_err(|e| format!("the sample rate: {e}"))?,
        audio_channels,
        latent_dim,
        frames_per_latent: 1,
        strides,
        encoder_channels,
        decoder_channels,
        encoder_units: units.clone(),
        decoder_units: units,
        output,
        latent_mean: Vec::new(),
        latent_std: Vec::new(),
    };
    config.validate()?;
    Ok(config)
}

/// A codec's config and weights: of a folder with a `config.json`, else of a file whose tensors tell the config.
pub(crate) fn open<C>(
    path: &Path,
    read_config: fn(&Value) -> Result<C, String>,
    config_of: fn(&Checkpoint) -> Result<C, String>,
) -> Result<(C, Checkpoint), Error> {
    let refuse = |path: &Path| {
        let path = path.to_path_buf();
        move |message| Error::Config { path, message }
    };
    let config = path.join("config.json");
    if config.is_file() {
        let cfg = read_config(&read_json(&config)?).map_err(refuse(&config))?;
        return Ok((cfg, Checkpoint::open(path).map_err(Box::new)?));
    }
    let checkpoint = Checkpoint::open(path).map_err(Box::new)?;
    let cfg = config_of(&checkpoint).map_err(refuse(checkpoint.path()))?;
    Ok((cfg, checkpoint))
}

fn expect(json: &Value, key: &str, want: &str) -> Result<(), String> {
    let found = field(json, key)?;
    if found == want { Ok(()) } else { Err(format!("`{key}`: expected \"{want}\", found {found}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_configs_of_stable_audio_open_are_its_preset() {
        let diffusers = json!({
            "_class_name": "AutoencoderOobleck", "audio_channels": 2, "channel_multiples": [1, 2, 4, 8, 16],
            "decoder_channels": 128, "decoder_input_channels": 64, "downsampling_ratios": [2, 4, 4, 8, 8],
            "encoder_hidden_size": 128, "sampling_rate": 44100
        });
        let part = |more: Value| {
            let mut config = json!({
                "channels": 128, "c_mults": [1, 2, 4, 8, 16], "strides": [2, 4, 4, 8, 8], "use_snake": true
            });
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"type": "oobleck", "config": config})
        };
        let tools = json!({
            "model_type": "diffusion_cond", "sample_rate": 44100, "audio_channels": 2,
            "model": {"pretransform": {"type": "autoencoder", "config": {
                "encoder": part(json!({"in_channels": 2, "latent_dim": 128})),
                "decoder": part(json!({"out_channels": 2, "latent_dim": 64, "final_tanh": false})),
                "bottleneck": {"type": "vae"}, "latent_dim": 64, "downsampling_ratio": 2048, "io_channels": 2
            }}}
        });
        let preset = Config::stable_audio_open();
        assert_eq!(preset.hop(), 2048);
        assert_eq!(read_config(&diffusers), Ok((preset.clone(), Layout::Diffusers)));
        assert_eq!(read_config(&tools), Ok((preset, Layout::StableAudioTools)));
    }

    #[test]
    fn configs_of_other_models_are_refused_with_the_key() {
        for (config, says) in [
            (json!({"_class_name": "AutoencoderKL"}), "AutoencoderKL"),
            (json!({"sample_rate": 44100}), "stable-audio-tools"),
            (json!({"model": {"pretransform": {"type": "wavelet"}}}), "wavelet"),
            (json!({"model": {"encoder": {"type": "dac"}, "decoder": {}, "bottleneck": {}}}), "oobleck"),
        ] {
            let message = read_config(&config).unwrap_err();
            assert!(message.contains(says), "{message}");
        }
    }
}
