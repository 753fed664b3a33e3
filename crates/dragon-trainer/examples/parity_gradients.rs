//! Our side of `cargo xtask parity gradients`: a loss on denoising errors of Stable Audio Open and its gradients.
//!
//! Usage: parity_gradients FOLDER ADAPTERS|- LOSS BETA GIVEN OUT
//! ADAPTERS: a folder as peft writes it, whose adapters are tuned; `-`: all weights are. LOSS: `dpo` or `kto`. GIVEN: a
//! safetensors file with text `states` `[B, L, 768]` and `mask` `[B, L]`, latents `x0` and `noise` `[B, C, T]`, `sigmas` `[B]`,
//! rows in turn from D+ and D-; without adapters also `reference`, the reference's errors `[B]`. OUT: one with `policy` and
//! `reference` errors, `loss`, `norms` of all gradients by name, and the gradients: of all adapters, or of the first and
//! the last block and what is in no block. With adapters, they are written again to the folder `OUT.adapters`.

use candle_core::{DType, Device, Tensor};
use dragon_diffusion::{DiffusionModel, TextCond, Weighting, denoising_errors};
use dragon_nn::{Lora, Params};
use dragon_trainer::bundle::{Bundle, Length};
use dragon_trainer::losses::{Errors, Labels, LossConfig, kto_baseline};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, adapters, loss, beta, given, out] = arguments.as_slice() else {
        return Err("expected FOLDER ADAPTERS|- LOSS BETA GIVEN OUT".into());
    };
    // As the `dragon` binary does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    let given = candle_core::safetensors::load(given, &Device::Cpu)?;
    let (x0, noise) = (&given["x0"], &given["noise"]);
    let sigmas: Vec<f64> = given["sigmas"].to_vec1::<f32>()?.into_iter().map(f64::from).collect();
    let cond = TextCond { states: given["states"].clone(), mask: given["mask"].clone() };
    let n_frames = x0.dim(2)?;
    let length = Length { seconds: None, n_frames: Some(n_frames) };
    let mut bundle = Bundle::load_for(Path::new(folder), &length, &Device::Cpu)?;

    let x = (x0 + noise.broadcast_mul(&given["sigmas"].reshape(((), 1, 1))?)?)?;
    let errors = |model: &dyn DiffusionModel| -> candle_core::Result<Tensor> {
        let denoised = model.with_texts(&cond, None, n_frames)?(&x, &sigmas)?;
        denoising_errors(model.edm(), Weighting::Edm, &denoised, x0, &sigmas)
    };
    let architecture = bundle.diffusion.architecture.clone();
    let (params, lora, reference) = match adapters.as_str() {
        "-" => {
            let params = Params::of(&bundle.diffusion.weights)?;
            bundle.diffusion.weights.clear(); // the variables are copies: both would not fit everywhere
            (params, None, None)
        }
        dir => {
            let lora = Lora::new(Lora::read_config(Path::new(dir))?, 0)?;
            architecture.build(lora.over(bundle.diffusion.builder([])))?; // makes the adapters
            lora.load(Path::new(dir))?;
            let again = format!("{out}.adapters");
            std::fs::create_dir_all(&again)?;
            lora.save(Path::new(&again))?;
            (lora.params().clone(), Some(lora), Some(bundle.diffusion.base()?))
        }
    };
    let model = match &lora {
        Some(lora) => architecture.build(lora.over(bundle.diffusion.builder([])))?,
        None => architecture.build(params.builder(DType::F32, &Device::Cpu))?,
    };
    let beta: f64 = beta.parse()?;
    let (loss, count) = match loss.as_str() {
        "dpo" => (LossConfig::Dpo { beta }, sigmas.len() / 2),
        _ => (LossConfig::Kto { beta, weight_plus: 1.0, weight_minus: 1.0 }, sigmas.len()),
    };
    println!("peak_before_mib {:.0}", dragon_nn::peak_mib().unwrap_or(0.0));
    // The first pass finds memory and threads cold.
    let mut seconds = f64::INFINITY;
    let mut last = None;
    for _ in 0..2 {
        drop(last.take()); // the gradients of the first pass need not fit beside those of the second
        let start = Instant::now();
        let reference = match &reference {
            Some(model) => errors(model.as_ref())?,
            None => given["reference"].clone(),
        };
        let errors = Errors { policy: errors(model.as_ref())?, reference };
        let gaps: Vec<f64> = errors.gap()?.detach().to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        let signs: Vec<f64> = (0..gaps.len()).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let labels = Labels { advantages: signs.clone(), signs };
        let value = loss.evaluate(&errors, &labels, kto_baseline(&gaps), count)?;
        let grads = dragon_nn::backward(&value)?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
        last = Some((errors, value, grads));
    }
    let (errors, value, grads) = last.ok_or("no pass")?;
    println!("step_s {seconds:.3}");
    println!("peak_mib {:.0}", dragon_nn::peak_mib().unwrap_or(0.0));
    let mut tensors = BTreeMap::from([
        ("policy".to_owned(), errors.policy.detach()),
        ("reference".to_owned(), errors.reference.detach()),
        ("loss".to_owned(), value.detach()),
    ]);
    let names = params.names_and_vars();
    let deepest = names.iter().filter_map(|(name, _)| block(name)).max();
    let mut norms = Vec::with_capacity(names.len());
    for (name, var) in &names {
        let grad = grads.get(var).ok_or(format!("`{name}` has no gradient"))?;
        norms.push(grad.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt());
        if lora.is_some() || block(name).is_none_or(|i| i == 0 || Some(i) == deepest) {
            tensors.insert(format!("grad.{name}"), grad.clone());
        }
    }
    tensors.insert("norms".into(), Tensor::new(norms, &Device::Cpu)?);
    Ok(dragon_nn::write_safetensors(out, &tensors, &BTreeMap::new())?)
}

/// The number of the block that a tensor belongs to.
fn block(name: &str) -> Option<usize> {
    name.strip_prefix("transformer_blocks.")?.split('.').next()?.parse().ok()
}
