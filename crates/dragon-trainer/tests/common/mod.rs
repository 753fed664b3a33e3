//! A model folder of the smallest valid models with random weights, and a config that fine-tunes it.

#![allow(dead_code)] // each test binary uses a part of this

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use dragon_diffusion::{Guidance, Model, SamplerConfig, Solver, Weighting};
use dragon_encoders::t5::{self, T5Encoder};
use dragon_encoders::tokenizer::Tokenizer;
use dragon_metrics::GaussianStats;
use dragon_nn::{AdamWConfig, Params, Rng};
use dragon_trainer::bundle::Length;
use dragon_trainer::diffusion::save_dit;
use dragon_trainer::finetune::{
    DemonstrationsConfig, FinetuneConfig, RolloutConfig, RolloutDtype, UpdateConfig, ValidationConfig,
};
use dragon_trainer::losses::LossConfig;
use dragon_trainer::pretrain::LoopConfig;
use dragon_vae::AudioVae;

/// Latent frames of the tiny generations: 16 of 8 samples.
pub const FRAMES: usize = 16;

/// Random values for all parameters, also for those that start at zero.
fn randomize(params: &Params, scale: f64) {
    for (name, var) in params.names_and_vars() {
        let noise = Rng::from_key(&name, 77).normal_tensor(var.dims(), DType::F32, &Device::Cpu).unwrap();
        var.set(&((noise * scale).unwrap() + var.as_tensor()).unwrap()).unwrap();
    }
}

/// Writes a model folder with prompts and reference statistics; gives a config that runs on it.
pub fn tiny_bundle(dir: &Path) -> FinetuneConfig {
    let cpu = Device::Cpu;
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("bundle.json"), format!("{{\"n_frames\": {FRAMES}, \"max_tokens\": 8}}"))
        .unwrap();

    let vae = dragon_vae::Config {
        latent_mean: vec![0.0; 4],
        latent_std: vec![1.0; 4],
        ..dragon_vae::Config::tiny()
    };
    let params = Params::new(1);
    AudioVae::new(&vae, params.builder(DType::F32, &cpu)).unwrap();
    dragon_vae::vae::save(&dir.join("vae"), &vae, &params.tensors().unwrap()).unwrap();

    let words = ["slow", "fast", "waltz", "reel", "harp", "flute", "loud", "soft"];
    let captions: Vec<String> =
        (0..24).map(|i| format!("a {} {} {}", words[i % 2], words[2 + i % 3], words[4 + i % 4])).collect();
    let tokenizer = Tokenizer::train(&captions, 60).unwrap();
    let config = t5::Config { vocab_size: tokenizer.vocab_size(), ..t5::Config::tiny() };
    let params = Params::new(2);
    T5Encoder::new(&config, params.builder(DType::F32, &cpu)).unwrap();
    std::fs::create_dir_all(dir.join("t5")).unwrap();
    std::fs::write(dir.join("t5/config.json"), serde_json::to_string(&config).unwrap()).unwrap();
    params.save(dir.join("t5/model.safetensors"), DType::F32).unwrap();
    tokenizer.save(dir.join("t5/tokenizer.json")).unwrap();

    let mut dit = dragon_diffusion::Config::tiny();
    dit.dit.text_dim = config.d_model;
    let params = Params::new(3);
    Model::new(&dit, params.builder(DType::F32, &cpu)).unwrap();
    randomize(&params, 0.05);
    save_dit(&dir.join("dit"), &dit, &params).unwrap();

    let lines: Vec<String> = captions
        .iter()
        .enumerate()
        .map(|(i, caption)| {
            let split = ["train", "train", "valid", "test"][i % 4];
            format!(r#"{{"id":"p{i}","caption":"{caption} {i}","split":"{split}"}}"#)
        })
        .collect();
    std::fs::write(dir.join("prompts.jsonl"), lines.join("\n")).unwrap();

    std::fs::create_dir_all(dir.join("stats")).unwrap();
    let mut cov = vec![0.0; 16];
    (0..4).for_each(|i| cov[5 * i] = 0.25);
    let stats = GaussianStats::new(vec![0.5, -0.5, 0.2, 0.0], cov, Some(100)).unwrap();
    dragon_metrics::files::write_stats(&dir.join("stats/latents.npz"), "latents", &stats).unwrap();
    config_for(dir)
}

fn config_for(dir: &Path) -> FinetuneConfig {
    let statistics = dir.join("stats/latents.npz");
    let reward = format!(
        "kind='per_song_fad'\nencoder='vae'\nsetting='frames'\nexemplars={{kind='statistics', path='{}'}}",
        statistics.display()
    );
    let embed = "[encoders.vae]\nkind='vae'\n[settings.frames]\nkind='vae'\nlatent_direct=true\n\
                 [settings.round_trip]\nkind='vae'\nlatent_direct=false\n";
    let sampler = SamplerConfig { solver: Solver::Dpmpp2m, n_steps: 3, guidance: Guidance::none() };
    FinetuneConfig {
        seed: 5,
        bundle: dir.to_owned(),
        length: Length::default(),
        prompts: dir.join("prompts.jsonl"),
        rollout: RolloutConfig {
            songs_per_step: 8,
            songs_per_prompt: None,
            demonstrations: DemonstrationsConfig::Paired,
            reference_probability: 0.2,
            dtype: RolloutDtype::F32,
            sampler,
            batch: 3,
        },
        reward: toml::from_str(&reward).unwrap(),
        embed: toml::from_str(embed).unwrap(),
        loss: LossConfig::Kto { beta: 50.0, weight_plus: 1.0, weight_minus: 1.0 },
        update: UpdateConfig {
            weighting: Weighting::Edm,
            parameters: Vec::new(),
            lora: None,
            draws: 2,
            warmup_steps: 2,
            schedule: Default::default(),
            p_mean: Some(0.5),
            p_std: None,
            condition_dropout: 0.1,
            micro_batch: 6,
            optimizer: AdamWConfig {
                lr: 1e-3,
                weight_decay: 0.0,
                max_grad_norm: Some(1.0),
                ..AdamWConfig::default()
            },
            ema_decay: 0.5,
        },
        validation: ValidationConfig { n_prompts: 4, sampler, monitors: None },
        run: LoopConfig {
            steps: 6,
            log_every: 1,
            validate_every: 3,
            checkpoint_every: 2,
            keep_checkpoints: 2,
        },
    }
}

/// The files of a finished run that two equal runs share byte for byte.
pub fn same_bytes(a: &Path, b: &Path, steps: usize) {
    let checkpoint = format!("checkpoints/step-{steps:06}/state.safetensors");
    for file in ["metrics.jsonl", "run.toml", "model/model.safetensors", "model/config.json", &checkpoint] {
        let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap_or_else(|err| panic!("{file}: {err}"));
        assert!(read(a) == read(b), "{file} differs");
    }
}

/// One number of each line of `metrics.jsonl`; `None` where a line has it not.
pub fn metric(dir: &Path, name: &str) -> Vec<Option<f64>> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.map(|line| line.get(name).and_then(|v| v.as_f64())).collect()
}

/// The folder of the tiny models inside a temporary folder.
pub fn bundle_in(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("bundle")
}
