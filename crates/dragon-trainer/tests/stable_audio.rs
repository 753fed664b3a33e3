//! Prompts to audio by a tiny Stable Audio in both published layouts, put together from the golden files.

mod common;

use candle_core::{DType, Device, Tensor};
use dragon_diffusion::{Guidance, GuidanceKind, SamplerConfig, Solver};
use dragon_encoders::t5::{self, T5Encoder};
use dragon_nn::{LoraConfig, Params, Rng, write_safetensors};
use dragon_trainer::bundle::{Bundle, Length};
use dragon_trainer::finetune::{self, FinetuneConfig, RolloutDtype};
use dragon_trainer::generate::{self, GenerateConfig, Wanted};
use dragon_trainer::rollout::TextCache;
use dragon_trainer::stable_audio::is_published;
use dragon_trainer::{Result, RunContext, eval};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

const CPU: Device = Device::Cpu;

const SAMPLER: SamplerConfig = SamplerConfig {
    solver: Solver::Dpmpp2mSde,
    n_steps: 4,
    guidance: Guidance { kind: GuidanceKind::Cfg, scale: 7.0, sigma_lo: 0.0, sigma_hi: 500.0 },
};

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

fn config(model: &Path) -> GenerateConfig {
    GenerateConfig {
        bundle: model.to_owned(),
        length: Length { seconds: Some(0.02), n_frames: None },
        tuned: None,
        sampler: SAMPLER,
        batch: 2,
    }
}

fn run(cfg: &GenerateConfig, ctx: &RunContext) -> Result<Vec<PathBuf>> {
    let prompts = ["a slow harp melody", "a jig on a violin", "drums"].map(str::to_owned);
    generate::run(cfg, &Wanted::variants(&prompts, 3, 1)?, ctx)
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
        run(&GenerateConfig { batch: 1, ..config(&diffusers) }, &RunContext::new(dir.path().join("c")))
            .unwrap();
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
    let message = |cfg: GenerateConfig| {
        let err = run(&cfg, &RunContext::new(&out)).unwrap_err();
        assert_eq!(err.exit_code(), 1);
        err.to_string()
    };
    let said =
        message(GenerateConfig { length: Length { seconds: Some(0.025), n_frames: None }, ..config(&model) });
    assert!(said.contains("seconds") && said.contains("0.024"), "{said}");
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

/// Fine-tuning towards statistics of latents, in the folder `dir`.
fn tuning(dir: &Path, lora: Option<LoraConfig>) -> FinetuneConfig {
    let mut cfg = common::tiny_bundle(&dir.join("ours"));
    cfg.bundle = dir.join("model");
    cfg.length = Length { seconds: None, n_frames: Some(12) };
    cfg.rollout.sampler = SAMPLER;
    cfg.validation.sampler = SAMPLER;
    cfg.update.lora = lora;
    cfg.run.steps = 4;
    cfg
}

fn adapters() -> LoraConfig {
    let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(str::to_owned).into();
    LoraConfig { rank: 2, alpha: 4.0, targets }
}

#[test]
fn adapters_are_tuned_exported_as_peft_and_generate() {
    let dir = tempfile::tempdir().unwrap();
    write_diffusers(&dir.path().join("model"));
    let cfg = tuning(dir.path(), Some(adapters()));
    let out = dir.path().join("run");
    assert!(finetune::run(&cfg, &RunContext::new(&out)).unwrap().finished);
    // Every attention's four maps in two blocks, twice: to the frames and to the texts.
    let tuned = candle_core::safetensors::load(out.join("model/adapter_model.safetensors"), &CPU).unwrap();
    assert_eq!(tuned.len(), 2 * 2 * 4 * 2);
    let b = &tuned["base_model.model.transformer_blocks.1.attn2.to_out.0.lora_B.weight"];
    assert_eq!(b.dims(), [32, 2]);
    assert!(b.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() > 0.0, "nothing was learned");
    let json: Value =
        serde_json::from_slice(&std::fs::read(out.join("model/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&json["r"], &json["lora_alpha"]), (&json!(2), &json!(4.0)));

    // A run that was stopped and continued ends in the same bytes.
    let again = dir.path().join("again");
    let half =
        FinetuneConfig { run: dragon_trainer::pretrain::LoopConfig { steps: 2, ..cfg.run }, ..cfg.clone() };
    finetune::run(&half, &RunContext::new(&again)).unwrap();
    finetune::run(&cfg, &RunContext { resume: true, ..RunContext::new(&again) }).unwrap();
    let bytes = |run: &Path| std::fs::read(run.join("model/adapter_model.safetensors")).unwrap();
    assert!(bytes(&out) == bytes(&again));

    let generate = |tuned: Option<PathBuf>, to: &str| {
        let cfg = GenerateConfig { tuned, ..config(&cfg.bundle) };
        std::fs::read(&run(&cfg, &RunContext::new(dir.path().join(to))).unwrap()[0]).unwrap()
    };
    assert_ne!(generate(None, "plain"), generate(Some(out.clone()), "tuned"));

    // The base of the evaluation is the model without them.
    let measure = eval::EvalConfig {
        seed: 0,
        bundle: cfg.bundle.clone(),
        length: cfg.length,
        tuned: out.clone(),
        prompts: cfg.prompts.clone(),
        split: dragon_trainer::bundle::Split::Test,
        n_prompts: 4,
        sampler: SAMPLER,
        batch: 2,
        embed: cfg.embed.clone(),
        metrics: vec![eval::MetricConfig { name: "target".into(), reward: cfg.reward.clone() }],
        bootstrap: eval::BootstrapConfig { subsets: 9, songs: 3 },
        examples: 1,
    };
    let summary = eval::run(&measure, &RunContext::new(out.clone())).unwrap();
    assert_ne!(summary.metrics[0].base, summary.metrics[0].tuned);

    // Adapters of another model are refused by names and shapes.
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::copy(out.join("model/adapter_config.json"), other.join("adapter_config.json")).unwrap();
    write(
        &other.join("adapter_model.safetensors"),
        &BTreeMap::from([(
            "base_model.model.w.lora_A.weight".into(),
            Tensor::zeros(1, DType::F32, &CPU).unwrap(),
        )]),
    );
    let err = run(&GenerateConfig { tuned: Some(other), ..config(&cfg.bundle) }, &RunContext::new("no"))
        .unwrap_err();
    let said = err.to_string();
    assert!(
        said.contains("`w.lora_A.weight`: not used") && said.contains("attn1.to_q.lora_A.weight"),
        "{said}"
    );
}

#[test]
fn all_weights_are_tuned_and_exported_as_diffusers_transformer() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_stable_audio_tools(&model);
    let cfg = tuning(dir.path(), None);
    let out = dir.path().join("run");
    finetune::run(&cfg, &RunContext::new(&out)).unwrap();
    let read = |path: PathBuf| candle_core::safetensors::load(path, &CPU).unwrap();
    let tuned = read(out.join("model/diffusion_pytorch_model.safetensors"));
    let base = renamed(&load("dragon-diffusion/stable_audio/case.safetensors"), "diffusers.transformer.", "");
    assert_eq!(tuned.keys().collect::<std::collections::BTreeSet<_>>(), base.keys().collect());
    for (name, before) in &base {
        let moved =
            (before.to_dtype(DType::F32).unwrap() - &tuned[name]).unwrap().abs().unwrap().sum_all().unwrap();
        assert!(moved.to_scalar::<f32>().unwrap() > 0.0, "{name} stayed as it was");
    }
    // In the place of the network that it was tuned from it makes the same pieces.
    let diffusers = dir.path().join("diffusers");
    write_diffusers(&diffusers);
    let tune = GenerateConfig { tuned: Some(out.clone()), ..config(&model) };
    let want = run(&tune, &RunContext::new(dir.path().join("a"))).unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        std::fs::copy(out.join("model").join(file), diffusers.join("transformer").join(file)).unwrap();
    }
    let got = run(&config(&diffusers), &RunContext::new(dir.path().join("b"))).unwrap();
    assert_eq!(std::fs::read(&got[0]).unwrap(), std::fs::read(&want[0]).unwrap());

    let refused = |cfg: FinetuneConfig, part: &str| {
        let err = finetune::run(&cfg, &RunContext::new(dir.path().join("refused"))).unwrap_err();
        assert_eq!(err.exit_code(), 1);
        assert!(err.to_string().contains(part), "{part}: {err}");
    };
    let lora = |change: fn(&mut LoraConfig)| {
        let mut lora = adapters();
        change(&mut lora);
        FinetuneConfig {
            update: finetune::UpdateConfig { lora: Some(lora), ..cfg.update.clone() },
            ..cfg.clone()
        }
    };
    refused(lora(|lora| lora.rank = 0), "`rank`");
    refused(lora(|lora| lora.targets = vec!["to_qq".into()]), "to_k, to_out.0, to_q, to_v");
    let mut both = lora(|_| ());
    both.update.parameters = vec!["attn1".into()];
    refused(both, "update.lora");
    refused(
        FinetuneConfig { length: Length { seconds: Some(3.0), n_frames: None }, ..cfg.clone() },
        "seconds",
    );
    let ours = FinetuneConfig { bundle: dir.path().join("ours"), ..cfg.clone() };
    refused(ours, "makes songs of one length");
}

#[test]
fn in_bf16_both_kinds_of_model_denoise_almost_as_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    write_diffusers(dir.path());
    let published = Length { seconds: Some(0.02), n_frames: None };
    for (folder, length) in [(dir.path().to_owned(), published), (fixtures().join("tiny"), Length::default())]
    {
        let bundle = Bundle::load_for(&folder, &length, &CPU).unwrap();
        let texts = TextCache::default();
        let cond = texts.get(&bundle, &["a slow harp melody", "drums"]).unwrap();
        let shape = (2, bundle.diffusion.architecture.latent_channels(), 8);
        let x = Rng::new(7).normal_tensor(shape, DType::F32, &CPU).unwrap();
        let denoised = |dtype: DType| {
            let model = bundle.diffusion.base_in(dtype).unwrap();
            let denoise = model.with_texts(&cond, Some(&[false, true]), 8).unwrap();
            denoise(&(&x * 3.0).unwrap(), &[3.0, 1.0]).unwrap()
        };
        let (wide, half) = (denoised(DType::F32), denoised(DType::BF16));
        assert_eq!(half.dtype(), DType::F32, "latents stay as they are");
        let size = |t: &Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let relative = size(&(&wide - &half).unwrap()) / size(&wide);
        assert!(relative > 1e-5 && relative < 0.02, "{}: {relative}", folder.display());
    }
    assert_eq!(RolloutDtype::Bf16.on(&CPU), DType::F32, "the CPU has no bf16");
}
