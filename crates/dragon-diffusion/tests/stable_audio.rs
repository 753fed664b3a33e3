//! Against diffusers and stable-audio-tools: `fixtures/dragon-diffusion/stable_audio/generate.py`.

use candle_core::{DType, Device, Tensor};
use dragon_diffusion::solver::keep_going;
use dragon_diffusion::stable_audio::published::{is_unneeded, stable_audio_tools};
use dragon_diffusion::stable_audio::{Config, NumberConditioners, StableAudio};
use dragon_diffusion::{DiffusionModel, Guidance, SamplerConfig, Solver, TextCond, sample_with};
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

fn build(cfg: &Config, loader: &Loader) -> StableAudio {
    let vb = loader.builder(DType::F32, &CPU);
    let numbers = NumberConditioners::new(cfg, vb.pp("projection_model")).unwrap();
    StableAudio::new(cfg, vb.pp("transformer"), numbers, 30.0).unwrap()
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
    let model = build(&config(), &loader);
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
    let want: Vec<f32> = golden.get("sigmas").to_vec1().unwrap();
    for (got, want) in model.schedule(20).iter().zip(&want) {
        assert!((got - f64::from(*want)).abs() <= 1e-4 * got, "{got} {want}");
    }
    let row = |name: &str| golden.get(name).narrow(0, 0, 1).unwrap();
    let cond = TextCond { states: row("states"), mask: row("mask") }; // seconds: 0 to 30
    let drawn = golden.get("drawn");
    let mut noises = (0..20).map(|i| drawn.narrow(0, i, 1));
    let mut first = Some(golden.get("first"));
    let mut noise = || first.take().map_or_else(|| noises.next().expect("noise for every step"), Ok);
    let cfg = SamplerConfig { solver: Solver::Dpmpp2mSde, n_steps: 20, guidance: Guidance::cfg(7.0) };
    let sampled = sample_with(&model, &cond, &mut noise, &cfg, &mut keep_going).unwrap().unwrap();
    let want = golden.get("sampled");
    let spread = |t: &Tensor| t.flatten_all().unwrap().var(0).unwrap().to_scalar::<f32>().unwrap().sqrt();
    let worst = (&sampled - &want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(worst < 1e-3 * spread(&want), "{worst} of {}", spread(&want));
}

#[test]
fn dropped_texts_are_those_that_guidance_leaves_out() {
    let golden = Golden::read(fixture("case.safetensors"));
    let model = model("diffusers");
    let cond = TextCond { states: golden.get("states"), mask: golden.get("mask") };
    let x = golden.get("x");
    let run =
        |drop: Option<&[bool]>| model.with_texts(&cond, drop, x.dim(2).unwrap()).unwrap()(&x, &[2.0, 0.7]);
    let (kept, dropped) = (run(None).unwrap(), run(Some(&[false, true])).unwrap());
    let null = model.without_texts(&cond, x.dim(2).unwrap()).unwrap()(&x, &[2.0, 0.7]).unwrap();
    let row = |t: &Tensor, i: usize| t.get(i).unwrap();
    assert_close(&row(&dropped, 0), &row(&kept, 0), Tol::EXACT);
    assert_close(&row(&dropped, 1), &row(&null, 1), Tol::EXACT);
    let worst = (row(&kept, 1) - row(&null, 1)).unwrap().abs().unwrap().max_all().unwrap();
    assert!(worst.to_scalar::<f32>().unwrap() > 1e-3);
    assert!(model.with_texts(&cond, Some(&[true]), 9).is_err());
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
    build(&cfg, &loader);
    let tensors = loader.finish(|_| false).unwrap();
    let n: usize =
        tensors.iter().filter(|(k, _)| k.starts_with("transformer")).map(|(_, t)| t.elem_count()).sum();
    assert_eq!(n, 1_056_939_136);

    let checkpoint = Checkpoint::without_data(list("stable_audio_tools.shapes"));
    let loader = Loader::new(checkpoint, |name| vec![stable_audio_tools(name)]);
    build(&cfg, &loader);
    loader.finish(is_unneeded).unwrap();
}
