//! Against transformers: `fixtures/dragon-musicgen/musicgen/generate.py`.

use candle_core::{DType, Device, Tensor};
use dragon_musicgen::published::{Published, read_config};
use dragon_musicgen::{Choice, Config, MusicGen, Sampling, Texts, generate};
use dragon_nn::{Checkpoint, Loader, Rng};
use dragon_testkit::{Golden, Tol, assert_close, fixture};
use std::ops::ControlFlow;

const CPU: Device = Device::Cpu;

fn golden() -> Golden {
    Golden::fixture("dragon-musicgen/musicgen/case.safetensors")
}

fn published() -> Published {
    let path = fixture("dragon-musicgen/musicgen/case.json");
    read_config(&serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()).unwrap()
}

fn model() -> MusicGen {
    let checkpoint = Checkpoint::open(fixture("dragon-musicgen/musicgen/case.safetensors")).unwrap();
    let loader = Loader::new(checkpoint, |name| vec![format!("weights.{name}")]);
    let model = MusicGen::new(&published().config, 12, loader.builder(DType::F32, &CPU)).unwrap();
    let others = ["weights.text_encoder.", "weights.audio_encoder."];
    loader.finish(|name| others.iter().any(|other| name.starts_with(other)) || !name.contains('.')).unwrap();
    model
}

fn texts(golden: &Golden) -> Texts {
    let mask: Vec<Vec<f32>> = golden.get("mask").to_vec2().unwrap();
    let n_tokens = mask.iter().map(|row| row.iter().sum::<f32>() as usize).collect();
    Texts { states: golden.get("states"), n_tokens }
}

/// Codes `[B, K, T]` as `[B, K, n_steps]`, delayed: what the steps read.
fn delayed(model: &MusicGen, codes: &Tensor) -> Tensor {
    let codes: Vec<Vec<Vec<u32>>> = codes.to_dtype(DType::U32).unwrap().to_vec3().unwrap();
    let delay = model.config().delay(codes[0][0].len());
    let rows: Vec<u32> =
        codes.iter().flat_map(|piece| delay.delayed(piece, model.config().padding())).flatten().collect();
    let shape = (codes.len(), delay.n_codebooks, delay.n_steps() + 1);
    Tensor::from_vec(rows, shape, &CPU).unwrap().narrow(2, 0, delay.n_steps()).unwrap()
}

#[test]
fn logits_match_transformers() {
    let (golden, model) = (golden(), model());
    let read = delayed(&model, &golden.get("codes"));
    let read = Tensor::cat(&[&read, &read], 0).unwrap(); // [2 B, K, T]
    let n_steps = read.dim(2).unwrap();
    let mut state = model.start(&texts(&golden), true, n_steps).unwrap();
    let whole = model.forward(&read, &mut state).unwrap(); // [2 B, K, T, V]
    let want = golden.get("logits").permute((1, 2, 0, 3)).unwrap(); // from [T, 2 B, K, V]
    assert_close(&whole, &want, Tol { atol: 1e-4, rtol: 1e-4 });
    // Step by step, and in parts: the same bits.
    let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for steps in [1, 4] {
        let mut state = model.start(&texts(&golden), true, n_steps).unwrap();
        let parts = (0..n_steps).step_by(steps).map(|first| {
            let part = read.narrow(2, first, steps.min(n_steps - first)).unwrap();
            model.forward(&part, &mut state).unwrap()
        });
        let got = Tensor::cat(&parts.collect::<Vec<_>>(), 2).unwrap();
        assert!(bits(&got) == bits(&whole), "{steps} steps at a time");
    }
}

#[test]
fn greedy_codes_match_transformers() {
    let (golden, model) = (golden(), model());
    let want: Vec<Vec<Vec<u32>>> = golden.get("codes").to_dtype(DType::U32).unwrap().to_vec3().unwrap();
    let sampling = Sampling { guidance_scale: 3.0, choice: Choice::Greedy };
    let go_on = &mut |_| ControlFlow::Continue(());
    let mut rngs = [Rng::new(0), Rng::new(0)];
    let got = generate(&model, &texts(&golden), want[0][0].len(), &sampling, &mut rngs, go_on);
    assert_eq!(got.unwrap().unwrap().to_vec3::<u32>().unwrap(), want);
}

#[test]
fn the_published_sizes_ask_for_the_published_tensors() {
    for (name, config, n_parameters) in [
        ("small", Config::small(), 420_371_456),
        ("medium", Config::medium(), 1_838_737_920),
        ("large", Config::large(), 3_256_956_928),
    ] {
        let list =
            std::fs::read_to_string(fixture(format!("dragon-musicgen/musicgen/musicgen-{name}.shapes")))
                .unwrap();
        let checkpoint = Checkpoint::without_data(list.lines().flat_map(shapes));
        let loader = Loader::same_names(checkpoint);
        MusicGen::new(&config, 768, loader.builder(DType::F32, &CPU)).unwrap();
        let others = ["text_encoder.", "audio_encoder."];
        let tensors = loader
            .finish(|name| others.iter().any(|other| name.starts_with(other)))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tensors.values().map(Tensor::elem_count).sum::<usize>(), n_parameters, "{name}");
    }
}

/// The tensors of a line: `name.{first..last}.rest [1, 2]`.
fn shapes(line: &str) -> Vec<(String, Vec<usize>)> {
    let (name, shape) = line.split_once(' ').unwrap();
    let numbers = shape.trim_matches(['[', ']']).split(", ").filter(|n| !n.is_empty());
    let shape: Vec<usize> = numbers.map(|n| n.parse().unwrap()).collect();
    let Some((before, rest)) = name.split_once('{') else { return vec![(name.to_string(), shape)] };
    let (range, after) = rest.split_once('}').unwrap();
    let (first, last) = range.split_once("..").unwrap();
    let layers = first.parse::<usize>().unwrap()..=last.parse().unwrap();
    layers.map(|i| (format!("{before}{i}{after}"), shape.clone())).collect()
}
