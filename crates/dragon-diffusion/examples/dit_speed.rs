//! Speed of the embedded DiT on this machine: training steps and sampling, in clips per second.
//!
//! `cargo run --release -p dragon-diffusion --example dit_speed [batch] [rounds]`

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use dragon_diffusion::{Config, Model, Noise, SamplerConfig, TextCond, Weighting, denoising_errors, sample};
use dragon_nn::{AdamW, AdamWConfig, Params, Rng};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>().expect("a number"));
    let (batch, rounds) = (args.next().unwrap_or(64), args.next().unwrap_or(3));
    let (n_frames, n_tokens) = (80, 24);
    let cfg = Config::tiny_music();
    let params = Params::new(0);
    let model = Model::new(&cfg, params.builder(DType::F32, &Device::Cpu))?;
    let mut rng = Rng::new(0);
    let keys: Vec<String> = (0..batch).map(|i| i.to_string()).collect();
    let keys: Vec<(&str, u64)> = keys.iter().map(|key| (key.as_str(), 0)).collect();
    let noise = Noise::new(&keys, cfg.dit.latent_channels, n_frames, &Device::Cpu);
    let x0 = noise.clone().draw()?;
    let cond = TextCond {
        states: rng.normal_tensor((batch, n_tokens, cfg.dit.text_dim), DType::F32, &Device::Cpu)?,
        mask: Tensor::ones((batch, n_tokens), DType::F32, &Device::Cpu)?,
    };
    let sigmas = model.edm.sample_sigmas_stratified(batch, &mut rng);
    let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
    println!("{} parameters, batch {batch}, {n_frames} frames, {n_tokens} tokens", params.len_params());
    let seconds = |since: Instant| since.elapsed().as_secs_f64();
    for round in 0..rounds {
        let start = Instant::now();
        let context = model.dit.context(&cond, None, n_frames)?;
        let denoised = model.denoise_with(&x0, &sigmas, &context)?;
        let loss = denoising_errors(&model.edm, Weighting::Edm, &denoised, &x0, &sigmas)?.mean_all()?;
        let forward = seconds(start);
        let gradients = dragon_nn::backward(&loss)?;
        let backward = seconds(start) - forward;
        optimizer.step(&gradients)?;
        let all = seconds(start);
        println!(
            "round {round}: forward {forward:.3} s  backward {backward:.3} s  update {:.3} s  {:.1} clips/s",
            all - forward - backward,
            batch as f64 / all
        );
    }
    let settings = SamplerConfig { n_steps: 10, ..SamplerConfig::default() };
    let start = Instant::now();
    sample(&model, &cond, &noise, &settings)?;
    println!("sampling, 10 steps of CFG++: {:.2} clips/s", batch as f64 / seconds(start));
    Ok(())
}
