//! Stable Audio Open's diffusion transformer as its authors and diffusers publish it: configs and names of tensors.

use super::Config;
use dragon_nn::Source;
use dragon_nn::json::{field, number};
use serde_json::Value;

/// What a published model says beyond its hyperparameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// The hyperparameters.
    pub config: Config,
    /// Latent frames that the model was trained on: texts, numbers and silence after a short piece are part of what it learned.
    pub n_frames: usize,
    /// Tokens to which prompts are padded or cut.
    pub max_tokens: usize,
}

/// Reads diffusers' `transformer/config.json` and `projection_model/config.json`.
///
/// # Errors
/// A message with the key, if one is missing or describes what is not built here.
pub fn from_diffusers(transformer: &Value, projection: &Value) -> Result<Published, String> {
    let n = |key: &str| number(transformer, key);
    let cond_dim = number(projection, "conditioning_dim")?;
    let same = [
        ("projection_model's `text_encoder_dim`", number(projection, "text_encoder_dim")?, cond_dim),
        ("`cross_attention_input_dim`", n("cross_attention_input_dim")?, cond_dim),
        ("`global_states_input_dim`", n("global_states_input_dim")?, 2 * cond_dim),
        ("`out_channels`", n("out_channels")?, n("in_channels")?),
        ("projection_model's `min_value`", number(projection, "min_value")?, 0),
    ];
    for (key, found, want) in same {
        if found != want {
            return Err(format!("{key}: expected {want}, as in Stable Audio Open, found {found}"));
        }
    }
    let config = Config {
        latent_channels: n("in_channels")?,
        depth: n("num_layers")?,
        heads: n("num_attention_heads")?,
        head_dim: n("attention_head_dim")?,
        text_heads: n("num_key_value_attention_heads")?,
        cond_dim,
        cross_dim: n("cross_attention_dim")?,
        time_features: n("time_proj_dim")?,
        max_seconds: number(projection, "max_value")? as f64,
    };
    config.check().map_err(|e| e.to_string())?;
    Ok(Published { config, n_frames: n("sample_size")?, max_tokens: 128 })
}

/// What diffusers has in `transformer/config.json` for a network trained on `n_frames` latent frames.
pub fn diffusers_config(cfg: &Config, n_frames: usize) -> Value {
    serde_json::json!({
        "_class_name": "StableAudioDiTModel",
        "attention_head_dim": cfg.head_dim,
        "cross_attention_dim": cfg.cross_dim,
        "cross_attention_input_dim": cfg.cond_dim,
        "global_states_input_dim": 2 * cfg.cond_dim,
        "in_channels": cfg.latent_channels,
        "num_attention_heads": cfg.heads,
        "num_key_value_attention_heads": cfg.text_heads,
        "num_layers": cfg.depth,
        "out_channels": cfg.latent_channels,
        "sample_size": n_frames,
        "time_proj_dim": cfg.time_features,
    })
}

/// Reads stable-audio-tools' `model_config.json` of a `diffusion_cond` model; `hop` is the autoencoder's.
///
/// # Errors
/// A message with the key, if one is missing or describes what is not built here.
pub fn from_stable_audio_tools(json: &Value, hop: usize) -> Result<Published, String> {
    let model = field(json, "model")?;
    let diffusion = field(model, "diffusion")?;
    let dit = field(diffusion, "config")?;
    let expect = |at: &Value, key: &str, want: Value| match at.get(key) {
        Some(found) if *found == want => Ok(()),
        found => Err(format!(
            "`{key}`: expected {want}, as in Stable Audio Open, found {}",
            found.unwrap_or(&Value::Null)
        )),
    };
    expect(diffusion, "type", "dit".into())?;
    expect(dit, "project_cond_tokens", false.into())?;
    expect(
        diffusion,
        "cross_attention_cond_ids",
        serde_json::json!(["prompt", "seconds_start", "seconds_total"]),
    )?;
    expect(diffusion, "global_cond_ids", serde_json::json!(["seconds_start", "seconds_total"]))?;
    let conditioning = field(model, "conditioning")?;
    let conditioners = field(conditioning, "configs")?.as_array().ok_or("`configs`: expected a list")?;
    let conditioner = |id: &str| {
        let found = conditioners.iter().find(|c| c.get("id").is_some_and(|found| found == id));
        found.and_then(|c| c.get("config")).ok_or(format!("`conditioning.configs`: there is no `{id}`"))
    };
    let (width, heads) = (number(dit, "embed_dim")?, number(dit, "num_heads")?);
    let cond_dim = number(dit, "cond_token_dim")?;
    if heads == 0 || width % heads != 0 || cond_dim % (width / heads) != 0 {
        return Err(format!(
            "`num_heads` {heads} does not divide `embed_dim` {width} and `cond_token_dim` {cond_dim} into heads"
        ));
    }
    let config = Config {
        latent_channels: number(dit, "io_channels")?,
        depth: number(dit, "depth")?,
        heads,
        head_dim: width / heads,
        text_heads: cond_dim / (width / heads),
        cond_dim,
        cross_dim: cond_dim,
        time_features: 256,
        max_seconds: number(conditioner("seconds_total")?, "max_val")? as f64,
    };
    config.check().map_err(|e| e.to_string())?;
    Ok(Published {
        config,
        n_frames: number(json, "sample_size")? / hop.max(1),
        max_tokens: number(conditioner("prompt")?, "max_length")?,
    })
}

/// Where a checkpoint of stable-audio-tools (`model.safetensors` beside `model_config.json`) has the tensor `transformer.…` or
/// `projection_model.…` of [`super::StableAudio`], named as diffusers' folders and files; it keeps queries, keys and values in one tensor. For names of other parts: the name itself.
pub fn stable_audio_tools(name: &str) -> Source {
    tools_source(name).unwrap_or_else(|| Source::from(name.to_string()))
}

/// What such a checkpoint has that is computed here: the frequencies of the rotary positions.
pub fn is_unneeded(name: &str) -> bool {
    name.ends_with("rotary_pos_emb.inv_freq")
}

fn tools_source(name: &str) -> Option<Source> {
    if let Some(rest) = name.strip_prefix("projection_model.") {
        let (which, rest) = rest.split_once("_number_conditioner.time_positional_embedding.")?;
        let which = if which == "start" { "seconds_start" } else { "seconds_total" };
        return Some(format!("conditioner.conditioners.{which}.embedder.embedding.{rest}").into());
    }
    let (part, rest) = name.strip_prefix("transformer.")?.split_once('.')?;
    let path = match part {
        "time_proj" => "timestep_features",
        "timestep_proj" => "to_timestep_embed",
        "global_proj" => "to_global_embed",
        "cross_attention_proj" => "to_cond_embed",
        "proj_in" => "transformer.project_in",
        "proj_out" => "transformer.project_out",
        "transformer_blocks" => return block_source(rest),
        other => other, // the convolutions
    };
    Some(format!("model.model.{path}.{rest}").into())
}

fn block_source(name: &str) -> Option<Source> {
    let (index, rest) = name.split_once('.')?;
    let (part, rest) = rest.split_once('.')?;
    let layer = format!("model.model.transformer.layers.{index}");
    let norm = |which: &str| {
        let tensor = if rest == "weight" { "gamma" } else { "beta" };
        Some(Source::from(format!("{layer}.{which}.{tensor}")))
    };
    let (attention, fused) = match part {
        "norm1" => return norm("pre_norm"),
        "norm2" => return norm("cross_attend_norm"),
        "norm3" => return norm("ff_norm"),
        "ff" => return Some(format!("{layer}.ff.ff.{}", rest.strip_prefix("net.")?).into()),
        "attn1" => ("self_attn", ["to_q.weight", "to_k.weight", "to_v.weight"].as_slice()),
        "attn2" => ("cross_attn", ["to_k.weight", "to_v.weight"].as_slice()),
        _ => return None,
    };
    if let Some(i) = fused.iter().position(|name| *name == rest) {
        let together = if part == "attn1" { "to_qkv" } else { "to_kv" };
        return Some(Source::part(format!("{layer}.{attention}.{together}.weight"), i, fused.len()));
    }
    Some(format!("{layer}.{attention}.{}", rest.replace("to_out.0", "to_out")).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_configs_of_stable_audio_open_are_its_preset() {
        let transformer = json!({
            "_class_name": "StableAudioDiTModel", "attention_head_dim": 64, "cross_attention_dim": 768,
            "cross_attention_input_dim": 768, "global_states_input_dim": 1536, "in_channels": 64,
            "num_attention_heads": 24, "num_key_value_attention_heads": 12, "num_layers": 24, "out_channels": 64,
            "sample_size": 1024, "time_proj_dim": 256
        });
        let projection =
            json!({"conditioning_dim": 768, "max_value": 512, "min_value": 0, "text_encoder_dim": 768});
        let got = from_diffusers(&transformer, &projection).unwrap();
        let want = Published { config: Config::stable_audio_open(), n_frames: 1024, max_tokens: 128 };
        assert_eq!(got, want);
        assert_eq!(diffusers_config(&got.config, got.n_frames), transformer);
        let numbers =
            |id: &str| json!({"id": id, "type": "number", "config": {"min_val": 0, "max_val": 512}});
        let mut tools = json!({
            "model_type": "diffusion_cond", "sample_size": 2097152, "sample_rate": 44100,
            "model": {
                "conditioning": {"cond_dim": 768, "configs": [
                    {"id": "prompt", "type": "t5", "config": {"t5_model_name": "t5-base", "max_length": 128}},
                    numbers("seconds_start"), numbers("seconds_total")
                ]},
                "diffusion": {
                    "cross_attention_cond_ids": ["prompt", "seconds_start", "seconds_total"],
                    "global_cond_ids": ["seconds_start", "seconds_total"], "type": "dit",
                    "config": {
                        "io_channels": 64, "embed_dim": 1536, "depth": 24, "num_heads": 24, "cond_token_dim": 768,
                        "global_cond_dim": 1536, "project_cond_tokens": false
                    }
                }
            }
        });
        assert_eq!(from_stable_audio_tools(&tools, 2048).unwrap(), want);
        tools["model"]["diffusion"]["type"] = "unet".into();
        let message = from_stable_audio_tools(&tools, 2048).unwrap_err();
        assert!(message.contains("unet"), "{message}");
    }

    #[test]
    fn what_is_kept_together_is_found_in_its_parts() {
        let key = stable_audio_tools("transformer.transformer_blocks.3.attn1.to_k.weight");
        let want = Source::part("model.model.transformer.layers.3.self_attn.to_qkv.weight", 1, 3);
        assert_eq!(key, want);
        let value = stable_audio_tools("transformer.transformer_blocks.0.attn2.to_v.weight");
        assert_eq!(value, Source::part("model.model.transformer.layers.0.cross_attn.to_kv.weight", 1, 2));
        let number =
            stable_audio_tools("projection_model.end_number_conditioner.time_positional_embedding.0.weights");
        let want = "conditioner.conditioners.seconds_total.embedder.embedding.0.weights";
        assert_eq!(number, Source::from(want.to_string()));
    }
}
