//! Our side of `cargo xtask bench --peers models`: published models at their published sizes.
//!
//! Usage: peers_models KIND PATH GIVEN PASSES
//! KIND: what `case` lists; PATH: the model's file or folder; GIVEN: a safetensors file with the inputs. Prints the shortest
//! of PASSES passes after one to warm up, in seconds, the peak of this process's resident memory in MiB, and the mean
//! absolute value of what the last pass computed, which the script compares.

use candle_core::{DType, Device, Result, Tensor};
use dragon_diffusion::guidance::Guided;
use dragon_diffusion::stable_audio::published::from_diffusers;
use dragon_diffusion::stable_audio::{NumberConditioners, StableAudioDit};
use dragon_diffusion::{
    Conditioned, Denoiser, DiffusionModel, Guidance, TextCond, Weighting, denoising_errors,
};
use dragon_encoders::clap::ClapEncoder;
use dragon_encoders::t5::T5Encoder;
use dragon_nn::{AdamW, AdamWConfig, Checkpoint, Loader, Lora, LoraConfig, Params};
use dragon_trainer::diffusion::{Architecture, Diffusion};
use dragon_trainer::losses::{Errors, Labels, LossConfig};
use dragon_vae::AudioVae;
use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CPU: Device = Device::Cpu;
type Given = HashMap<String, Tensor>;
type Pass = Box<dyn FnMut() -> Result<Tensor>>;
type Anything = Box<dyn std::error::Error>;

fn main() -> std::result::Result<(), Anything> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, path, given, passes] = arguments.as_slice() else {
        return Err("expected KIND PATH GIVEN PASSES".into());
    };
    // As the `dragon` binary does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    let given = candle_core::safetensors::load(given, &CPU)?;
    let mut pass = case(kind, Path::new(path), given)?;
    let mut result = pass()?;
    let mut best = f64::INFINITY;
    for _ in 0..passes.parse()? {
        drop(result);
        let start = Instant::now();
        result = pass()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    let mean = result.to_dtype(DType::F32)?.abs()?.mean_all()?.to_scalar::<f32>()?;
    println!("{best} {:.0} {mean}", dragon_nn::peak_mib().unwrap_or(0.0));
    Ok(())
}

/// Loads what a case needs; the weights of everything that is given a path are read once.
fn case(kind: &str, path: &Path, given: Given) -> std::result::Result<Pass, Anything> {
    Ok(match kind {
        "clap" => {
            let encoder = ClapEncoder::load(path, &CPU)?;
            let clips = given["clips"].to_vec2::<f32>()?;
            Box::new(move || {
                let clips: Vec<&[f32]> = clips.iter().map(Vec::as_slice).collect();
                Tensor::new(encoder.embed_clips(&clips)?, &CPU)
            })
        }
        "t5" => {
            let encoder = T5Encoder::load(path, DType::F32, &CPU)?;
            let (ids, mask) = (given["ids"].to_dtype(DType::U32)?, given["mask"].to_dtype(DType::F32)?);
            Box::new(move || encoder.forward(&ids, &mask)?.broadcast_mul(&mask.unsqueeze(2)?))
        }
        "decode" => {
            let (cfg, layout) = dragon_vae::published::read_config(&json(path, "vae")?)?;
            let loader =
                Loader::new(Checkpoint::open(path.join("vae"))?, move |name| vec![layout.name(name)]);
            let vae = AudioVae::new(&cfg, loader.builder(DType::F32, &CPU))?;
            loader.finish(|_| false)?;
            Box::new(move || vae.decode(&given["x"]))
        }
        "guided" => {
            let model: &'static dyn DiffusionModel = Box::leak(network(path, &given["x"])?.base()?);
            let texts = Conditioned::new(model, &texts(&given), given["x"].dim(2)?)?;
            Box::new(move || {
                let guided = Guided { model: &texts, guidance: Guidance::cfg(7.0) };
                guided.denoise(&given["x"], 1.0)
            })
        }
        "adapters" | "all_weights" => step(kind == "adapters", path, given)?,
        _ => return Err(format!("there is no kind `{kind}`").into()),
    })
}

fn json(path: &Path, folder: &str) -> std::result::Result<serde_json::Value, Anything> {
    Ok(serde_json::from_slice(&std::fs::read(path.join(folder).join("config.json"))?)?)
}

/// Network and number conditioners of a folder of diffusers, without what is not timed: `Bundle` would load all of it.
fn network(path: &Path, latents: &Tensor) -> std::result::Result<Diffusion, Anything> {
    let published = from_diffusers(&json(path, "transformer")?, &json(path, "projection_model")?)?;
    let open = |folder: &str| Checkpoint::open(path.join(folder)).map(Loader::same_names);
    let (dit, projection) = (open("transformer")?, open("projection_model")?);
    StableAudioDit::new(&published.config, dit.builder(DType::F32, &CPU))?; // asks for every tensor
    let numbers = NumberConditioners::new(&published.config, projection.builder(DType::F32, &CPU))?;
    let architecture = Architecture::StableAudio {
        config: published.config,
        numbers,
        seconds: (latents.dim(2)? * 2048) as f64 / 44_100.0,
        trained_frames: published.n_frames,
    };
    Ok(Diffusion::new(architecture, dit.finish(|_| false)?, &CPU))
}

fn texts(given: &Given) -> TextCond {
    TextCond { states: given["states"].clone(), mask: given["mask"].clone() }
}

/// DPO on denoising errors: forward, backward, and of adapters the reference's errors and the update. All weights get their
/// gradients only: AdamW's moments would not fit into 20 GB beside them.
fn step(adapters: bool, path: &Path, given: Given) -> std::result::Result<Pass, Anything> {
    let mut base = network(path, &given["x0"])?;
    let architecture = base.architecture.clone();
    let (params, model, reference) = if adapters {
        let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(String::from).to_vec();
        let lora = Lora::new(LoraConfig { rank: 16, alpha: 16.0, targets }, 0)?;
        let model = architecture.build(lora.over(base.builder([])))?;
        (lora.params().clone(), model, Some(base.base()?))
    } else {
        let params = Params::of(&base.weights)?;
        base.weights.clear(); // the variables are copies
        let model = architecture.build(params.builder(DType::F32, &CPU))?;
        (params, model, None)
    };
    let clipped = AdamWConfig { lr: 1e-4, max_grad_norm: Some(1.0), ..Default::default() };
    let mut optimiser = if adapters { Some(AdamW::new(&params, clipped)?) } else { None };
    let sigmas: Vec<f64> = given["sigmas"].to_vec1::<f32>()?.into_iter().map(f64::from).collect();
    let x = (&given["x0"] + given["noise"].broadcast_mul(&given["sigmas"].reshape(((), 1, 1))?)?)?;
    let cond = texts(&given);
    let signs: Vec<f64> = (0..sigmas.len()).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let labels = Labels { advantages: signs.clone(), signs };
    let errors = move |model: &dyn DiffusionModel| -> Result<Tensor> {
        let denoised = model.with_texts(&cond, None, x.dim(2)?)?(&x, &sigmas)?;
        denoising_errors(model.edm(), Weighting::Edm, &denoised, &given["x0"], &sigmas)
    };
    Ok(Box::new(move || {
        let policy = errors(model.as_ref())?;
        let reference = match &reference {
            Some(model) => errors(model.as_ref())?,
            None => (policy.detach() * 1.01)?,
        };
        let errors = Errors { policy, reference };
        let n_pairs = labels.signs.len() / 2;
        let loss = LossConfig::Dpo { beta: 20.0 }.evaluate(&errors, &labels, 0.0, n_pairs)?;
        let grads = dragon_nn::backward(&loss)?;
        match &mut optimiser {
            Some(optimiser) => optimiser.step(&grads).map(drop)?,
            None => assert!(params.names_and_vars().iter().all(|(_, var)| grads.get(var).is_some())),
        }
        Ok(errors.policy.detach())
    }))
}
