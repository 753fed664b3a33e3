//! The paper's own base model at its size (44.1 kHz mono, 32 s, 32 channels at 57 Hz, a transformer of XL size), with random
//! weights: how many parameters its parts have, and what a step takes on this machine.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use dragon_diffusion::{
    Config, DiffusionModel, Guidance, Model, Noise, SamplerConfig, Solver, TextCond, Weighting,
    denoising_errors, sample,
};
use dragon_nn::{AdamW, AdamWConfig, Params, Rng};
use dragon_vae::AudioVae;
use serde::Serialize;

use crate::error::Result;

/// Length of the paper's songs, in seconds.
const SECONDS: f64 = 32.0;
/// Tokens of a prompt; the paper names no number.
const TOKENS: usize = 64;

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Presto {
    /// Parameters of each part, by name.
    pub parameters: BTreeMap<String, usize>,
    /// Latent frames of a song.
    pub n_frames: usize,
    /// What was done, its time in seconds, and the largest resident memory of the process so far in MiB (`None` where the
    /// system does not tell).
    pub steps: Vec<(String, f64, Option<f64>)>,
}

/// Builds the models, counts, and runs one step of sampling with guidance, one of training on one song, and decodes a song.
/// Takes about 16 GB.
///
/// # Errors
/// If memory is missing.
pub fn run(device: &Device) -> Result<Presto> {
    let mut found = Presto { parameters: BTreeMap::new(), n_frames: 0, steps: Vec::new() };
    let vae_config = dragon_vae::Config::presto();
    found.n_frames = (SECONDS * vae_config.frame_rate_hz()).floor() as usize;
    let (cfg, start) = (Config::presto(), Instant::now());
    let params = Params::new(0);
    let model = Model::new(&cfg, params.builder(DType::F32, device))?;
    found.count("transformer, ", &params, |name| {
        let part = name.split('.').find(|part| part.parse::<usize>().is_err() && *part != "blocks");
        part.unwrap_or(name).to_owned()
    });
    found.done("build the transformer", start);

    let mut rng = Rng::from_key("presto", 0);
    let shape = (1, TOKENS, cfg.dit.text_dim);
    let cond = TextCond {
        states: rng.normal_tensor(shape, DType::F32, device)?,
        mask: Tensor::ones((1, TOKENS), DType::F32, device)?,
    };
    let mut noise = Noise::new(&[("a song", 0)], cfg.dit.latent_channels, found.n_frames, device);
    let guidance = Guidance::cfg_plus_plus(0.6);
    let sampler = SamplerConfig { solver: Solver::Dpmpp2m, n_steps: 1, guidance };
    let start = Instant::now();
    let latents = sample(&model, &cond, &noise, &sampler)?;
    device.synchronize()?;
    found.done("one sampling step of one song, with guidance", start);

    let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
    let start = Instant::now();
    let sigmas = [cfg.edm.sample_sigma(&mut rng)];
    let x = (&latents + (noise.draw()? * sigmas[0])?)?;
    let denoised = model.with_texts(&cond, None, found.n_frames)?(&x, &sigmas)?;
    let loss = denoising_errors(&cfg.edm, Weighting::Edm, &denoised, &latents, &sigmas)?.mean_all()?;
    optimizer.step(&dragon_nn::backward(&loss)?)?;
    device.synchronize()?;
    found.done("one training step on one song: forward, backward, AdamW", start);
    drop((optimizer, model, params, denoised, loss));

    let params = Params::new(0);
    let vae = AudioVae::new(&vae_config, params.builder(DType::F32, device))?;
    found.count("autoencoder, ", &params, |name| name.split('.').next().unwrap_or(name).to_owned());
    let vae = AudioVae::new(vae.config(), crate::bundle::frozen(&params, device))?;
    let start = Instant::now();
    vae.decode_chunked(&latents, 128)?;
    device.synchronize()?;
    found.done("decode the song", start);
    Ok(found)
}

impl Presto {
    fn count(&mut self, of: &str, params: &Params, part: impl Fn(&str) -> String) {
        for (name, var) in params.names_and_vars() {
            *self.parameters.entry(format!("{of}{}", part(&name))).or_default() += var.elem_count();
        }
    }

    fn done(&mut self, what: &str, start: Instant) {
        self.steps.push((what.to_owned(), start.elapsed().as_secs_f64(), dragon_nn::peak_mib()));
    }
}
