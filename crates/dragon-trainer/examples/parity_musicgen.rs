//! Our side of `cargo xtask parity musicgen`: text states, logits along given codes, greedy codes, audio of given codes.
//!
//! Usage: parity_musicgen FOLDER PROMPTS SCALE GIVEN OUT
//! PROMPTS: a prompt a line; GIVEN: a safetensors file with `codes` `[B, K, T]`; OUT: one with `states`, `logits`
//! `[T + K - 1, 2 B, K, V]`, `codes` and `audio`.

use candle_core::{DType, Device, Tensor};
use dragon_musicgen::{Choice, Sampling, generate};
use dragon_nn::Rng;
use dragon_trainer::musicgen::Pipeline;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompts, scale, given, out] = arguments.as_slice() else {
        return Err("expected FOLDER PROMPTS SCALE GIVEN OUT".into());
    };
    // As the `dragon` binary does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    let start = Instant::now();
    let pipeline = Pipeline::load(Path::new(folder), &Device::Cpu)?;
    println!("load_s {:.3}", start.elapsed().as_secs_f64());
    println!("load_peak_mib {:.0}", dragon_nn::peak_mib().unwrap_or(0.0));
    let model = &pipeline.model;
    let codes = candle_core::safetensors::load(given, &Device::Cpu)?["codes"].to_dtype(DType::U32)?;
    let prompts = std::fs::read_to_string(prompts)?;
    let prompts: Vec<&str> = prompts.lines().collect();
    let (n, _, n_frames) = codes.dims3()?;
    let delay = model.config().delay(n_frames);
    let mut tensors = BTreeMap::new();

    let texts = pipeline.texts(&prompts)?;
    tensors.insert("states", texts.states.clone());
    let start = Instant::now();
    let sampling = Sampling { guidance_scale: scale.parse()?, choice: Choice::Greedy };
    let mut rngs = vec![Rng::new(0); n];
    let mut go_on = |_| ControlFlow::Continue(());
    let greedy = generate(model, &texts, n_frames, &sampling, &mut rngs, &mut go_on)?;
    println!("steps_s {:.3}", start.elapsed().as_secs_f64());
    tensors.insert("codes", greedy.expect("nobody stops it"));

    // What the reference wrote, step by step, with text and without: errors then do not add up over codes.
    let written: Vec<Vec<Vec<u32>>> = codes.to_vec3()?;
    let padding = model.config().padding();
    let rows: Vec<u32> = written.iter().flat_map(|codes| delay.delayed(codes, padding)).flatten().collect();
    let read = Tensor::from_vec(rows, (n, delay.n_codebooks, delay.n_steps() + 1), &Device::Cpu)?;
    let read = Tensor::cat(&[&read, &read], 0)?; // [2 B, K, T]
    let mut state = model.start(&texts, true, delay.n_steps())?;
    let steps = (0..delay.n_steps()).map(|i| model.forward(&read.narrow(2, i, 1)?, &mut state)?.squeeze(2));
    tensors.insert("logits", Tensor::stack(&steps.collect::<candle_core::Result<Vec<_>>>()?, 0)?);

    let start = Instant::now();
    let clips = pipeline.decode(&codes)?;
    println!("decode_s {:.3}", start.elapsed().as_secs_f64());
    println!("peak_mib {:.0}", dragon_nn::peak_mib().unwrap_or(0.0));
    let samples: Vec<f32> = clips.iter().flat_map(|clip| clip.channels[0].clone()).collect();
    let n_samples = samples.len() / n;
    tensors.insert("audio", Tensor::from_vec(samples, (n, 1, n_samples), &Device::Cpu)?);
    let tensors = tensors.into_iter().map(|(name, t)| Ok((name.to_string(), t.to_dtype(DType::F32)?)));
    let tensors: BTreeMap<String, Tensor> = tensors.collect::<candle_core::Result<_>>()?;
    Ok(dragon_nn::write_safetensors(out, &tensors, &BTreeMap::new())?)
}
