//! MusicGen as Hugging Face publishes it (`facebook/musicgen-small`, `-medium`, `-large`): `config.json` and names of tensors.

use dragon_nn::json::field;
use serde_json::Value;

use crate::Config;

/// What `config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// The decoder's hyperparameters.
    pub config: Config,
    /// Those of the text encoder, a T5.
    pub text_encoder: Value,
    /// Those of the codec, an EnCodec.
    pub audio_encoder: Value,
}

/// Whether `config.json` calls itself that of a MusicGen, also of one that [`read_config`] refuses (`musicgen_melody`).
pub fn is_musicgen(json: &Value) -> bool {
    json.get("model_type").and_then(Value::as_str).is_some_and(|kind| kind.starts_with("musicgen"))
}

/// Reads `config.json`.
///
/// # Errors
/// A message with the key, if one is missing or describes what is not built here.
pub fn read_config(json: &Value) -> Result<Published, String> {
    let (decoder, text_encoder, audio_encoder) =
        (field(json, "decoder")?, field(json, "text_encoder")?, field(json, "audio_encoder")?);
    let config: Config = serde_json::from_value(decoder.clone()).map_err(|e| format!("`decoder`: {e}"))?;
    let codes = Value::from(config.vocab_size);
    let (mono, gelu) = (Value::from(1), Value::from("gelu"));
    // A key that older files leave out has the value that is built here.
    for (name, at, key, want) in [
        ("", json, "model_type", &Value::from("musicgen")),
        ("decoder.", decoder, "audio_channels", &mono),
        ("decoder.", decoder, "activation_function", &gelu),
        ("decoder.", decoder, "cross_attention_hidden_size", &Value::Null),
        ("text_encoder.", text_encoder, "model_type", &Value::from("t5")),
        ("audio_encoder.", audio_encoder, "model_type", &Value::from("encodec")),
        ("audio_encoder.", audio_encoder, "codebook_size", &codes),
        ("audio_encoder.", audio_encoder, "audio_channels", &mono),
    ] {
        if let Some(found) = at.get(key).filter(|found| *found != want) {
            return Err(format!("`{name}{key}`: expected {want}, found {found}"));
        }
    }
    config.check().map_err(|e| e.to_string())?;
    Ok(Published { config, text_encoder: text_encoder.clone(), audio_encoder: audio_encoder.clone() })
}

/// Whether a file may have a tensor of the decoder that is computed here: the positions.
pub fn is_unneeded(name: &str) -> bool {
    name == "decoder.model.decoder.embed_positions.weights"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_config_is_read_with_its_extra_keys_and_another_models_is_refused() {
        let mut json = json!({
            "model_type": "musicgen", "is_encoder_decoder": true,
            "decoder": {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "ffn_dim": 6144,
                "audio_channels": 1, "activation_function": "gelu", "dropout": 0.1, "vocab_size": 2048},
            "text_encoder": {"model_type": "t5", "d_model": 768},
            "audio_encoder": {"model_type": "encodec", "codebook_size": 2048, "sampling_rate": 32000}
        });
        assert!(is_musicgen(&json));
        let got = read_config(&json).unwrap();
        assert_eq!(got.config, Config::medium());
        assert_eq!(got.text_encoder["d_model"], 768);
        json["model_type"] = "musicgen_melody".into();
        assert!(is_musicgen(&json));
        assert!(read_config(&json).unwrap_err().contains("musicgen_melody"));
        json["model_type"] = "musicgen".into();
        json["decoder"]["audio_channels"] = 2.into();
        assert_eq!(read_config(&json).unwrap_err(), "`decoder.audio_channels`: expected 1, found 2");
        json["decoder"]["audio_channels"] = 1.into();
        json["decoder"]["num_attention_heads"] = 7.into();
        assert!(read_config(&json).unwrap_err().contains("1536"));
        json.as_object_mut().unwrap().remove("decoder");
        assert_eq!(read_config(&json).unwrap_err(), "`decoder` is missing");
    }
}
