//! Against diffusers and stable-audio-tools: `fixtures/dragon-diffusion/stable_audio/generate.py`.

use candle_core::{DType, Device, Tensor};
use dragon_diffusion::solver::{dpmpp_2m_sde, keep_going};
use dragon_diffusion::stable_audio::published::{is_unneeded, stable_audio_tools};
use dragon_diffusion::stable_audio::{Conditions, Config, StableAudio};
use dragon_diffusion::{Guidance, GuidanceKind, guidance::Guided};
use dragon_nn::{Checkpoint, Loader, Source};
use dragon_testkit::{Golden, Tol, assert_close};
use std::path::{Path, PathBuf};

const CPU: Device = Device::Cpu;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/dragon-diffusion/stable_audio").join(name)
}

fn config() -> Config {
    Config {
        latent_channels: 4,
        depth: 2,
        heads: 2,
        head_dim: 16,
        text_heads: 1,
        cond_dim: 16,
        cross_dim: 16,
        ..Config::stable_audio_open()
    }
}

/// The model on the weights of one layout; of the other it needs nothing.
fn model(layout: &str) -> StableAudio {
    let checkpoint = Checkpoint::open(fixture("case.safetensors")).unwrap();
    let tools = layout == "stable_audio_tools";
    let loader = Loader::new(checkpoint, move |name| {
        if tools && !name.starts_with("projection_model") {
            vec![stable_audio_tools(name).prefixed("stable_audio_tools.")]
        } else {
            vec![Source::from(format!("diffusers.{name}"))]
        }
    });
    let model = StableAudio::new(&config(), loader.builder(DType::F32, &CPU)).unwrap();
    let other = if tools { "diffusers.transformer." } else { "stable_audio_tools." };
    loader.finish(|name| name.starts_with(other) || !name.contains('.')).unwrap();
    model
}

#[test]
fn network_and_conditions_match_both_references() {
    let golden = Golden::read(fixture("case.safetensors"));
    for layout in ["diffusers", "stable_audio_tools"] {
        let model = model(layout);
        let seconds: Vec<Vec<f32>> = golden.get("seconds").to_vec2().unwrap();
        let seconds: Vec<(f64, f64)> =
            seconds.iter().map(|row| (f64::from(row[0]), f64::from(row[1]))).collect();
        let conditions =
            model.numbers.conditions(&golden.get("states"), &golden.get("mask"), &seconds).unwrap();
        assert_close(&conditions.tokens, &golden.get("tokens"), Tol::LAYER);
        assert_close(&conditions.global, &golden.get("glob"), Tol::LAYER);
        let x = golden.get("x");
        let context = model.dit.context(&conditions, x.dim(2).unwrap()).unwrap();
        let got = model.dit.forward(&x, &golden.get("t"), &context).unwrap();
        assert_close(&got, &golden.get("output"), Tol { atol: 1e-4, rtol: 1e-4 });
    }
}

#[test]
fn twenty_guided_steps_match_the_sampler_of_diffusers() {
    let golden = Golden::read(fixture("case.safetensors"));
    let model = model("diffusers");
    let sigmas = StableAudio::schedule(20);
    let want: Vec<f32> = golden.get("sigmas").to_vec1().unwrap();
    for (got, want) in sigmas.iter().zip(&want) {
        assert!((got - f64::from(*want)).abs() <= 1e-4 * got, "{got} {want}");
    }
    let tokens = golden.get("tokens").narrow(0, 0, 1).unwrap();
    let global = golden.get("glob").narrow(0, 0, 1).unwrap();
    let conditions = Conditions { tokens, global };
    let first = golden.get("first");
    let conditioned = model.with_conditions(&conditions, first.dim(2).unwrap()).unwrap();
    let guidance = Guidance { kind: GuidanceKind::Cfg, scale: 7.0, ..Guidance::cfg_plus_plus(1.0) };
    let guidance = guidance.within(0.0, f64::INFINITY);
    let guided = Guided { model: &conditioned, guidance };
    // The reference starts from noise of this size, not of `sigmas[0]`.
    let x = (first * (sigmas[0].powi(2) + 1.0).sqrt()).unwrap();
    let drawn = golden.get("drawn");
    let sampled =
        dpmpp_2m_sde(&guided, x, &sigmas, &mut |i| drawn.narrow(0, i, 1), &mut keep_going).unwrap().unwrap();
    let want = golden.get("sampled");
    let spread = |t: &Tensor| t.flatten_all().unwrap().var(0).unwrap().to_scalar::<f32>().unwrap().sqrt();
    let worst = (&sampled - &want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(worst < 1e-3 * spread(&want), "{worst} of {}", spread(&want));
}

#[test]
fn the_full_model_asks_for_the_published_tensors() {
    let list = |name: &str| -> Vec<(String, Vec<usize>)> {
        let text = std::fs::read_to_string(fixture(name)).unwrap();
        let parse = |line: &str| {
            let (name, shape) = line.split_once(' ').unwrap();
            let numbers = shape.trim_matches(['[', ']']).split(", ").filter(|n| !n.is_empty());
            (name.to_string(), numbers.map(|n| n.parse().unwrap()).collect())
        };
        text.lines().map(parse).collect()
    };
    let cfg = Config::stable_audio_open();
    let loader = Loader::same_names(Checkpoint::without_data(list("diffusers.shapes")));
    StableAudio::new(&cfg, loader.builder(DType::F32, &CPU)).unwrap();
    let tensors = loader.finish(|_| false).unwrap();
    let n: usize =
        tensors.iter().filter(|(k, _)| k.starts_with("transformer")).map(|(_, t)| t.elem_count()).sum();
    assert_eq!(n, 1_056_939_136);

    let checkpoint = Checkpoint::without_data(list("stable_audio_tools.shapes"));
    let loader = Loader::new(checkpoint, |name| vec![stable_audio_tools(name)]);
    StableAudio::new(&cfg, loader.builder(DType::F32, &CPU)).unwrap();
    loader.finish(is_unneeded).unwrap();
}
