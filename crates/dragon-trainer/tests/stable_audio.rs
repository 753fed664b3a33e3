//! Prompts to audio by a tiny Stable Audio in both published layouts, put together from the golden files.

use candle_core::{DType, Device, Tensor};
use dragon_encoders::t5::{self, T5Encoder};
use dragon_nn::{Params, write_safetensors};
use dragon_trainer::RunContext;
use dragon_trainer::stable_audio::{Config, is_published, run};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

const CPU: Device = Device::Cpu;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn write_json(path: &Path, value: Value) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, value.to_string()).unwrap();
}

/// The tensors below `prefix`, with another one in its place.
fn renamed(from: &HashMap<String, Tensor>, prefix: &str, to: &str) -> BTreeMap<String, Tensor> {
    from.iter().filter_map(|(k, v)| Some((format!("{to}{}", k.strip_prefix(prefix)?), v.clone()))).collect()
}

fn write(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_safetensors(path, tensors, &BTreeMap::new()).unwrap();
}

/// A text encoder of width 16 with random weights, and the tokenizer of the shipped model.
fn write_text_encoder(folder: &Path, tokenizer: &Path) {
    let config = t5::Config { d_model: 16, vocab_size: 2000, ..t5::Config::tiny() };
    let params = Params::new(0);
    T5Encoder::new(&config, params.builder(DType::F32, &CPU)).unwrap();
    std::fs::create_dir_all(folder).unwrap();
    params.save(folder.join("model.safetensors"), DType::F32).unwrap();
    write_json(&folder.join("config.json"), serde_json::to_value(config).unwrap());
    std::fs::create_dir_all(tokenizer.parent().unwrap()).unwrap();
    std::fs::copy(fixtures().join("tiny/t5/tokenizer.json"), tokenizer).unwrap();
}

fn load(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixtures().join(name), &CPU).unwrap()
}

fn write_diffusers(dir: &Path) {
    let (network, vae) =
        (load("dragon-diffusion/stable_audio/case.safetensors"), load("dragon-vae/oobleck/case.safetensors"));
    write_json(&dir.join("model_index.json"), json!({"_class_name": "StableAudioPipeline"}));
    write_json(
        &dir.join("transformer/config.json"),
        json!({
            "attention_head_dim": 16, "cross_attention_dim": 16, "cross_attention_input_dim": 16,
            "global_states_input_dim": 32, "in_channels": 4, "num_attention_heads": 2,
            "num_key_value_attention_heads": 1, "num_layers": 2, "out_channels": 4, "sample_size": 24,
            "time_proj_dim": 256
        }),
    );
    write_json(
        &dir.join("projection_model/config.json"),
        json!({"conditioning_dim": 16, "max_value": 512, "min_value": 0, "text_encoder_dim": 16}),
    );
    write_json(
        &dir.join("vae/config.json"),
        json!({
            "_class_name": "AutoencoderOobleck", "audio_channels": 2, "channel_multiples": [1, 2],
            "decoder_channels": 8, "decoder_input_channels": 4, "downsampling_ratios": [2, 4],
            "encoder_hidden_size": 8, "sampling_rate": 8000
        }),
    );
    let file = "diffusion_pytorch_model.safetensors";
    write(&dir.join("transformer").join(file), &renamed(&network, "diffusers.transformer.", ""));
    write(&dir.join("projection_model").join(file), &renamed(&network, "diffusers.projection_model.", ""));
    write(&dir.join("vae").join(file), &renamed(&vae, "diffusers.", ""));
    write_text_encoder(&dir.join("text_encoder"), &dir.join("tokenizer/tokenizer.json"));
}

fn write_stable_audio_tools(dir: &Path) {
    let (network, vae) =
        (load("dragon-diffusion/stable_audio/case.safetensors"), load("dragon-vae/oobleck/case.safetensors"));
    let numbers = |id: &str| json!({"id": id, "type": "number", "config": {"min_val": 0, "max_val": 512}});
    let part = |key: &str, latent_dim: usize| {
        let mut config = json!({
            "channels": 8, "c_mults": [1, 2], "strides": [2, 4], "use_snake": true, "latent_dim": latent_dim
        });
        config[key] = 2.into();
        config["final_tanh"] = false.into();
        json!({"type": "oobleck", "config": config})
    };
    write_json(
        &dir.join("model_config.json"),
        json!({
            "model_type": "diffusion_cond", "sample_size": 24 * 8, "sample_rate": 8000,
            "model": {
                "pretransform": {"type": "autoencoder", "config": {
                    "encoder": part("in_channels", 8), "decoder": part("out_channels", 4), "bottleneck": {"type": "vae"}
                }},
                "conditioning": {"configs": [
                    {"id": "prompt", "type": "t5", "config": {"t5_model_name": "t5-base", "max_length": 128}},
                    numbers("seconds_start"), numbers("seconds_total")
                ]},
                "diffusion": {
                    "cross_attention_cond_ids": ["prompt", "seconds_start", "seconds_total"],
                    "global_cond_ids": ["seconds_start", "seconds_total"], "type": "dit",
                    "config": {
                        "io_channels": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": 16,
                        "global_cond_dim": 32, "project_cond_tokens": false
                    }
                }
            }
        }),
    );
    let mut all = renamed(&network, "stable_audio_tools.", "");
    all.extend(renamed(&vae, "stable_audio_tools.", "pretransform.model."));
    for (ours, theirs) in [("start", "seconds_start"), ("end", "seconds_total")] {
        let prefix =
            format!("diffusers.projection_model.{ours}_number_conditioner.time_positional_embedding.");
        all.extend(renamed(
            &network,
            &prefix,
            &format!("conditioner.conditioners.{theirs}.embedder.embedding."),
        ));
    }
    write(&dir.join("model.safetensors"), &all);
    let t5 = dir.join("t5-base");
    write_text_encoder(&t5, &t5.join("tokenizer.json"));
}

fn config(model: &Path) -> Config {
    Config {
        seed: 3,
        model: model.to_owned(),
        seconds: 0.02,
        n_frames: None,
        n_steps: 4,
        guidance_scale: 7.0,
        batch: 2,
        variants: 1,
        prompts: ["a slow harp melody", "a jig on a violin", "drums"].map(str::to_owned).into(),
    }
}

#[test]
fn both_layouts_give_the_same_pieces_whatever_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let (diffusers, tools) = (dir.path().join("diffusers"), dir.path().join("tools"));
    write_diffusers(&diffusers);
    write_stable_audio_tools(&tools);
    assert!(is_published(&diffusers) && is_published(&tools) && !is_published(dir.path()));
    let files = run(&config(&diffusers), &RunContext::new(dir.path().join("a"))).unwrap();
    let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["000-a-slow-harp-melody.wav", "001-a-jig-on-a-violin.wav", "002-drums.wav"]);
    let audio = dragon_audio::read(&files[0]).unwrap();
    assert_eq!((audio.channels.len(), audio.channels[0].len(), audio.sample_rate_hz), (2, 160, 8000));
    assert_ne!(audio.channels[0], audio.channels[1]);
    let others = run(&config(&tools), &RunContext::new(dir.path().join("b"))).unwrap();
    let alone =
        run(&Config { batch: 1, ..config(&diffusers) }, &RunContext::new(dir.path().join("c"))).unwrap();
    for ((one, other), alone) in files.iter().zip(&others).zip(&alone) {
        let bytes = std::fs::read(one).unwrap();
        assert_eq!(bytes, std::fs::read(other).unwrap());
        assert_eq!(bytes, std::fs::read(alone).unwrap());
    }
    assert_ne!(std::fs::read(&files[0]).unwrap(), std::fs::read(&files[1]).unwrap());
}

#[test]
fn what_cannot_work_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    write_stable_audio_tools(&model);
    let message = |cfg: Config| {
        let err = run(&cfg, &RunContext::new(&out)).unwrap_err();
        assert_eq!(err.exit_code(), 1);
        err.to_string()
    };
    let said = message(Config { seconds: 0.025, ..config(&model) });
    assert!(said.contains("seconds") && said.contains("0.024"), "{said}");
    let said = message(Config { prompts: vec![], ..config(&model) });
    assert!(said.contains("no prompt"), "{said}");
    std::fs::rename(model.join("t5-base"), model.join("t5")).unwrap();
    let said = message(config(&model));
    assert!(said.contains("t5-base") && said.contains("hint"), "{said}");
    // Another model's weights: everything that does not fit, by the file's names.
    std::fs::rename(model.join("t5"), model.join("t5-base")).unwrap();
    write(
        &model.join("model.safetensors"),
        &BTreeMap::from([("w".into(), Tensor::zeros(1, DType::F32, &CPU).unwrap())]),
    );
    let said = message(config(&model));
    assert!(
        said.contains("`w`: not used") && said.contains("model.model.transformer.project_in.weight"),
        "{said}"
    );
    write_json(&model.join("model_config.json"), json!({"model": {"pretransform": {"type": "wavelet"}}}));
    let said = message(config(&model));
    assert!(said.contains("model_config.json") && said.contains("wavelet"), "{said}");
    write_json(&model.join("model_index.json"), json!({"_class_name": "AudioLDMPipeline"}));
    let said = message(config(&model));
    assert!(said.contains("AudioLDMPipeline"), "{said}");
    assert!(!out.exists());
}
