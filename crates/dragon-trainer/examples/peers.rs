//! Our side of `cargo xtask bench --peers`: runs named cases on request, so that the script can alternate with
//! PyTorch in one go.
//!
//! Reads lines `CASE SECONDS` from standard input and answers each with `CASE BEST_SECONDS PEAK_MIB PARAMETERS`: the
//! shortest of the runs that fit into that time (two at least), the peak of the process's resident memory so far, and
//! the number of trained parameters, which the script compares between the two sides.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use dragon_diffusion::{Model, TextCond, Weighting, denoising_errors, dit};
use dragon_nn::{
    AdamW, AdamWConfig, Conv1dSpec, ConvTranspose1dSpec, Params, Rng, attention, conv_transpose1d, conv1d,
    linear,
};
use dragon_vae::AudioVae;
use std::io::{BufRead, Write};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CPU: Device = Device::Cpu;

fn noise(key: &str, shape: &[usize]) -> Result<Tensor> {
    Rng::from_key(key, 0).normal_tensor(shape, DType::F32, &CPU)
}

fn var(key: &str, shape: &[usize]) -> Result<Tensor> {
    Ok(candle_core::Var::from_tensor(&(noise(key, shape)? * 0.05)?)?.into_inner())
}

/// What one run of a case does.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    /// The forward pass on constants.
    Forward,
    /// Forward and backward, down to the gradients of all parameters (of single layers: of the input too).
    Backward,
    /// [`Pass::Backward`], clipping and the optimiser's update.
    Step,
}

/// One run, and the number of parameters.
type Case = (Box<dyn FnMut() -> Result<()>>, usize);

/// Ends a graph with a given gradient: the layer before it is timed alone, without a loss.
struct Upstream(Tensor);

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// A single layer, its input among the arguments.
fn operation(
    pass: Pass,
    shapes: &[&[usize]],
    f: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
) -> Result<Case> {
    let backward = pass != Pass::Forward;
    let inputs: Vec<Tensor> = shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| if backward { var(&i.to_string(), shape) } else { noise(&i.to_string(), shape) })
        .collect::<Result<_>>()?;
    let n_parameters = inputs[1..].iter().map(Tensor::elem_count).sum();
    let gradient = noise("gradient", f(&inputs)?.dims())?;
    let run = move || {
        let y = f(&inputs)?;
        if backward {
            dragon_nn::backward(&y.apply_op1(Upstream(gradient.clone()))?)?;
        }
        Ok(())
    };
    Ok((Box::new(run), n_parameters))
}

/// A network under a loss: `build` reads its weights and gives the function from nothing to the loss.
fn network<F: Fn() -> Result<Tensor> + 'static>(
    pass: Pass,
    build: impl Fn(VarBuilder) -> Result<F>,
) -> Result<Case> {
    let params = Params::new(0);
    build(params.builder(DType::F32, &CPU))?;
    // Weights that start at zero would leave half of a network without gradient.
    for (name, var) in params.names_and_vars() {
        let shift = (noise(&name, var.dims())? * 0.02)?;
        var.set(&(var.as_tensor().detach() + shift)?)?;
    }
    let loss = match pass {
        Pass::Forward => build(dragon_trainer::bundle::frozen(&params, &CPU))?,
        _ => build(params.builder(DType::F32, &CPU))?,
    };
    let clipped = AdamWConfig { max_grad_norm: Some(1.0), ..Default::default() };
    let mut optimiser = if pass == Pass::Step { Some(AdamW::new(&params, clipped)?) } else { None };
    let n_parameters = params.len_params();
    let run = move || {
        let loss = loss()?;
        if pass == Pass::Forward {
            return Ok(());
        }
        let grads = dragon_nn::backward(&loss)?;
        if let Some(optimiser) = &mut optimiser {
            optimiser.step(&grads)?;
        }
        Ok(())
    };
    Ok((Box::new(run), n_parameters))
}

/// The diffusion transformer under its training loss: noised latents of 80 frames with 24 text tokens each.
fn diffusion(pass: Pass, dit: dit::Config, batch: usize) -> Result<Case> {
    let cfg = dragon_diffusion::Config { dit, ..dragon_diffusion::Config::tiny_music() };
    network(pass, |vb| {
        let model = Model::new(&cfg, vb)?;
        let x0 = noise("x0", &[batch, cfg.dit.latent_channels, 80])?;
        let sigmas: Vec<f64> = (0..batch).map(|i| 0.1 * 1.4f64.powi(i as i32)).collect();
        let levels = Tensor::from_vec(sigmas.iter().map(|&s| s as f32).collect(), (batch, 1, 1), &CPU)?;
        let x = (&x0 + noise("noise", x0.dims())?.broadcast_mul(&levels)?)?;
        let cond = TextCond {
            states: noise("text", &[batch, 24, cfg.dit.text_dim])?,
            mask: Tensor::ones((batch, 24), DType::F32, &CPU)?,
        };
        Ok(move || {
            let denoised = model.denoise_with(&x, &sigmas, &model.dit.context(&cond, None, 80)?)?;
            denoising_errors(&model.edm, Weighting::Edm, &denoised, &x0, &sigmas)?.mean_all()
        })
    })
}

/// The paper's proportions at width 512.
fn dit_512x8() -> dit::Config {
    dit::Config {
        width: 512,
        depth: 8,
        heads: 8,
        ffn_hidden: 1376,
        text_dim: 512,
        noise_features: 256,
        rotary_dim: 32,
        adaln_rank: None,
        ..dit::Config::tiny_music()
    }
}

/// Encoder or decoder of the tiny music VAE, on two clips of 2.56 s.
fn autoencoder(pass: Pass, decode: bool) -> Result<Case> {
    let params = Params::new(0);
    let cfg = dragon_vae::Config::tiny_music();
    let vae = |vb: VarBuilder| {
        // The other half of the model stays outside of the parameters that are counted and trained.
        let other = params.builder(DType::F32, &CPU);
        let (encoder, decoder) = if decode { (other, vb) } else { (vb, other) };
        AudioVae::from_parts(&cfg, encoder, decoder)
    };
    if decode {
        network(pass, |vb| {
            let (vae, z) = (vae(vb)?, noise("z", &[2, 32, 40])?);
            Ok(move || vae.decode(&z)?.sqr()?.mean_all())
        })
    } else {
        network(pass, |vb| {
            let (vae, audio) = (vae(vb)?, noise("audio", &[2, 1, 40960])?);
            Ok(move || vae.encode(&audio)?.kl())
        })
    }
}

fn case(name: &str) -> Result<Case> {
    let (kind, pass) = match (name.strip_suffix("+bwd"), name.strip_suffix("_step")) {
        (Some(kind), _) => (kind, Pass::Backward),
        (_, Some(kind)) => (kind, Pass::Step),
        _ => (name, Pass::Forward),
    };
    let conv = |shapes: &[&[usize]], stride, padding, dilation| {
        let spec = Conv1dSpec { stride, padding, dilation, groups: 1 };
        operation(pass, shapes, move |t| conv1d(&t[0], &t[1], Some(&t[2]), spec))
    };
    let conv_transpose = |shapes: &[&[usize]], stride, padding| {
        let spec = ConvTranspose1dSpec { stride, padding, ..Default::default() };
        operation(pass, shapes, move |t| conv_transpose1d(&t[0], &t[1], Some(&t[2]), spec))
    };
    let dense = |shapes: &[&[usize]]| operation(pass, shapes, |t| linear(&t[0], &t[1], Some(&t[2])));
    let mix = |shape: &[usize], heads: usize| {
        operation(pass, &[shape; 3], move |t| attention(&t[0], &t[1], &t[2], heads, None, 0.2))
    };
    match kind {
        "linear_192_768" => dense(&[&[1280, 192], &[768, 192], &[768]]),
        "linear_512_2048" => dense(&[&[640, 512], &[2048, 512], &[2048]]),
        "conv1d_16_k7" => conv(&[&[2, 81920, 16], &[16, 16, 7], &[16]], 1, 3, 1),
        "conv1d_64_k7" => conv(&[&[4, 8192, 64], &[64, 64, 7], &[64]], 1, 3, 1),
        "conv1d_64_k7_d9" => conv(&[&[4, 8192, 64], &[64, 64, 7], &[64]], 1, 27, 9),
        "conv1d_64_s4" => conv(&[&[4, 8192, 64], &[128, 64, 8], &[128]], 4, 2, 1),
        "conv1d_512_k7" => conv(&[&[4, 320, 512], &[512, 512, 7], &[512]], 1, 3, 1),
        "conv_transpose1d_s4" => conv_transpose(&[&[4, 2048, 128], &[128, 64, 8], &[64]], 4, 2),
        "conv_transpose1d_s8" => conv_transpose(&[&[4, 80, 512], &[512, 256, 16], &[256]], 8, 4),
        "attention_80" => mix(&[16, 80, 6 * 32], 6),
        "attention_1024" => mix(&[2, 1024, 8 * 64], 8),
        "dit_tiny" => diffusion(pass, dit::Config::tiny_music(), 16),
        "dit_512x8" => diffusion(pass, dit_512x8(), 8),
        "vae_encode" => autoencoder(pass, false),
        "vae_decode" => autoencoder(pass, true),
        _ => candle_core::bail!("no case `{name}`"),
    }
}

fn main() -> Result<()> {
    // As in the `dragon` binary.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global().map_err(candle_core::Error::wrap)?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(candle_core::Error::wrap)?;
        let mut words = line.split_whitespace();
        let (Some(name), Some(seconds)) = (words.next(), words.next().and_then(|s| s.parse::<f64>().ok()))
        else {
            candle_core::bail!("expected `CASE SECONDS`, got `{line}`")
        };
        let (mut run, n_parameters) = case(name)?;
        run()?;
        let (start, mut best, mut n_runs) = (Instant::now(), f64::INFINITY, 0);
        while n_runs < 2 || start.elapsed().as_secs_f64() < seconds {
            let begin = Instant::now();
            run()?;
            best = best.min(begin.elapsed().as_secs_f64());
            n_runs += 1;
        }
        println!("{name} {best} {:.0} {n_parameters}", dragon_nn::peak_mib().unwrap_or(0.0));
        std::io::stdout().flush().map_err(candle_core::Error::wrap)?;
    }
    Ok(())
}
