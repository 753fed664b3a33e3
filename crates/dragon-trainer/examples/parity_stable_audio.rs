//! Our side of `cargo xtask parity stable_audio`: every stage of the published pipeline on given noise.
//!
//! Usage: parity_stable_audio FOLDER PROMPTS SECONDS STEPS SCALE NOISE OUT
//! PROMPTS: a prompt a line; NOISE: a safetensors file with `noise` `[STEPS + 1, B, C, T]`, `x` `[B, C, T]`, `t` `[B]` and
//! `audio` `[B, 2, N]`; OUT: one with `states`, `tokens`, `network`, `latents`, `decoded` and `encoded`.

use candle_core::{DType, Device, Tensor};
use dragon_diffusion::solver::keep_going;
use dragon_diffusion::stable_audio::StableAudioDit;
use dragon_diffusion::{Guidance, SamplerConfig, Solver, sample_with};
use dragon_trainer::bundle::{Bundle, Length};
use dragon_trainer::diffusion::Architecture;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompts, seconds, steps, scale, noise, out] = arguments.as_slice() else {
        return Err("expected FOLDER PROMPTS SECONDS STEPS SCALE NOISE OUT".into());
    };
    // As the `dragon` binary does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    let given = candle_core::safetensors::load(noise, &Device::Cpu)?;
    let n_frames = given["x"].dim(2)?;
    let start = Instant::now();
    let length = Length { seconds: Some(seconds.parse()?), n_frames: Some(n_frames) };
    let bundle = Bundle::load_for(Path::new(folder), &length, &Device::Cpu)?;
    println!("load_s {:.3}", start.elapsed().as_secs_f64());
    println!("load_peak_mib {:.0}", dragon_nn::peak_mib().unwrap_or(0.0));
    let prompts = std::fs::read_to_string(prompts)?;
    let prompts: Vec<&str> = prompts.lines().collect();
    let guidance = Guidance::cfg(scale.parse()?);
    let sampler = SamplerConfig { solver: Solver::Dpmpp2mSde, n_steps: steps.parse()?, guidance };
    let mut tensors = BTreeMap::new();

    let text = bundle.text.encode(&prompts)?;
    let Architecture::StableAudio { config, numbers, seconds, .. } = &bundle.diffusion.architecture else {
        return Err("the folder holds another model".into());
    };
    let conditions = numbers.conditions(&text.states, &text.mask, &vec![(0.0, *seconds); prompts.len()])?;
    tensors.insert("states".into(), text.states.clone());
    tensors.insert("tokens".into(), conditions.tokens.clone());
    let dit = StableAudioDit::new(config, bundle.diffusion.builder([]))?;
    let context = dit.context(&conditions, n_frames)?;
    let start = Instant::now();
    let network = dit.forward(&given["x"], &given["t"], &context)?;
    println!("network_s {:.3}", start.elapsed().as_secs_f64());
    tensors.insert("network".into(), network);

    let mut rows = 0..given["noise"].dim(0)?;
    let mut noise = || given["noise"].get(rows.next().expect("noise for every step"));
    let start = Instant::now();
    let model = bundle.diffusion.base()?;
    let latents =
        sample_with(model.as_ref(), &text, &mut noise, &sampler, &mut keep_going)?.expect("nobody stops it");
    println!("sampling_s {:.3}", start.elapsed().as_secs_f64());
    let start = Instant::now();
    // The same latents as the reference decodes: an error is then the decoder's own.
    let decoded = bundle.vae.decode(&given["latents"])?;
    println!("decode_s {:.3}", start.elapsed().as_secs_f64());
    let start = Instant::now();
    let encoded = bundle.vae.encode(&given["audio"])?;
    println!("encode_s {:.3}", start.elapsed().as_secs_f64());
    println!("peak_mib {:.0}", dragon_nn::peak_mib().unwrap_or(0.0));
    tensors.insert("latents".into(), latents);
    tensors.insert("decoded".into(), decoded);
    let std = (encoded.log_var * 0.5)?.exp()?;
    tensors.insert("encoded".into(), Tensor::cat(&[encoded.mean, std], 1)?);
    let tensors = tensors.into_iter().map(|(name, t)| Ok((name, t.to_dtype(DType::F32)?)));
    let tensors: BTreeMap<String, Tensor> = tensors.collect::<candle_core::Result<_>>()?;
    Ok(dragon_nn::write_safetensors(out, &tensors, &BTreeMap::new())?)
}
