//! Trains the embedded DiT for a given time.
//!
//! `try_dit MANIFEST VAE CACHE OUT SECONDS [key=value …]`; keys: batch, lr, steps_per_checkpoint, validate, ema, init (checkpoint folder), depth, schedule_steps

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dragon_trainer::pretrain::{self, Task, dit};
use dragon_trainer::{Progress, RunContext, checkpoint};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    tracing_lines();
    if args[0] == "sample" {
        return sample(Path::new(&args[1]), Path::new(&args[2]), Path::new(&args[3]), args[4].parse()?, args[5].parse()?);
    }
    let path = |i: usize| PathBuf::from(&args[i]);
    let seconds: u64 = args[4].parse()?;
    let keys: HashMap<&str, &str> = args[5..].iter().filter_map(|a| a.split_once('=')).collect();
    let number = |key: &str, default: f64| keys.get(key).map_or(default, |v| v.parse().expect("a number"));
    let mut cfg = dit::Config::tiny_music(path(0), path(1), path(2));
    cfg.train.batch = number("batch", 64.0) as usize;
    cfg.train.lr = number("lr", 1e-3);
    cfg.train.ema_decay = number("ema", 0.999);
    cfg.train.warmup_steps = number("warmup", 100.0) as usize;
    cfg.model.dit.depth = number("depth", 6.0) as usize;
    cfg.model.edm.p_mean = number("p_mean", cfg.model.edm.p_mean);
    cfg.run.steps = number("schedule_steps", 100_000.0) as usize;
    if keys.contains_key("schedule_steps") {
        cfg.train.schedule = dit::Schedule::Cosine;
    }
    cfg.run.checkpoint_every = number("checkpoint", 50.0) as usize;
    cfg.run.validate_every = number("validate", 100.0) as usize;
    cfg.run.log_every = 10;
    cfg.data.valid_clips = 64;
    let mut ctx = RunContext::new(path(3));
    ctx.progress = Progress::Lines;
    ctx.resume = true;
    let device = candle_core::Device::Cpu;
    let start = Instant::now();
    let mut task = dit::prepare(&cfg, &device, &ctx)?;
    println!("prepared in {:.1} s", start.elapsed().as_secs_f64());
    if let Some(init) = keys.get("init") {
        let (_, tensors) = checkpoint::load(Path::new(init))?;
        task.load_state(&tensors)?;
        println!("weights of {init}");
    }
    let stop = ctx.stop.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(seconds));
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    let outcome = pretrain::run(&mut task, "pretrain dit", &cfg, &cfg.run, cfg.seed, &ctx)?;
    println!("{outcome:?}");
    Ok(())
}

/// Samples for captions of the held-out pieces, their originals and reconstructions, as WAV files; prints latent statistics.
fn sample(bundle: &Path, manifest: &Path, out: &Path, n: usize, scale: f64) -> Result<(), Box<dyn std::error::Error>> {
    use dragon_diffusion::{Guidance, SamplerConfig};
    let device = candle_core::Device::Cpu;
    let bundle = dragon_trainer::bundle::Bundle::load(bundle, &device)?;
    let entries = dragon_data::read_manifest(manifest)?;
    let valid: Vec<_> = entries.iter().filter(|e| e.split == dragon_data::Split::Valid).collect();
    let stride = valid.len() / n;
    let chosen: Vec<_> = (0..n).map(|i| valid[i * stride]).collect();
    let captions: Vec<&str> = chosen.iter().map(|e| e.caption.as_str()).collect();
    let cond = bundle.text.encode(&captions)?;
    let (_, channels, frames) = bundle.latent_shape(n);
    let prompts: Vec<(&str, u64)> = captions.iter().map(|c| (*c, 0)).collect();
    let noise = dragon_diffusion::prompts_noise(&prompts, channels, frames)?;
    let guidance = if scale <= 0.0 { Guidance::none() } else { Guidance::cfg_plus_plus(scale).within(0.1, 10.0) };
    let settings = SamplerConfig { guidance, ..SamplerConfig::default() };
    let start = Instant::now();
    let latents = dragon_diffusion::sample(&bundle.base_model()?, &cond, &noise, &settings)?;
    println!("sampled {n} in {:.1} s", start.elapsed().as_secs_f64());
    let clips: Vec<Vec<f32>> = chosen
        .iter()
        .map(|e| {
            let path = manifest.parent().unwrap().join(&e.path);
            dragon_audio::read_mono(&path, bundle.sample_rate_hz()).map(|c| c.samples[..81920].to_vec())
        })
        .collect::<Result<_, _>>()?;
    let rows: Vec<&[f32]> = clips.iter().map(Vec::as_slice).collect();
    let real = bundle.encode(&rows)?;
    for (name, t) in [("generated", &latents), ("real", &real)] {
        let std: f32 = (t.sqr()?.mean_all()?.to_scalar::<f32>()? - t.mean_all()?.to_scalar::<f32>()?.powi(2)).sqrt();
        let diff = (t.narrow(2, 1, frames - 1)? - t.narrow(2, 0, frames - 1)?)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
        let channel = t.sqr()?.mean(2)?.mean(0)?.sqrt()?.to_vec1::<f32>()?;
        println!("{name}: std {std:.3}, frame-to-frame msq {diff:.3}, channel rms {channel:.2?}");
    }
    let start = Instant::now();
    let generated = bundle.decode(&latents)?;
    println!("decoded {n} in {:.1} s", start.elapsed().as_secs_f64());
    let reconstructed = bundle.decode(&real)?;
    for (i, caption) in captions.iter().enumerate() {
        println!("{i}: {caption}");
        for (name, samples) in [("gen", &generated[i]), ("real", &clips[i]), ("rec", &reconstructed[i])] {
            let clip = dragon_audio::Clip { samples: samples.clone(), sample_rate_hz: bundle.sample_rate_hz() };
            dragon_audio::write_wav(&out.join(format!("{i:02}_{name}.wav")), &clip, dragon_audio::SampleFormat::Float32)?;
        }
    }
    Ok(())
}

/// Log lines on stderr.
fn tracing_lines() {
    use tracing::{Event, Metadata, Subscriber, field::Visit, span};
    struct Lines(Instant);
    struct Text(String);
    impl Visit for Text {
        fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
            self.0.push_str(&format!("{value:?} "));
        }
    }
    impl Subscriber for Lines {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, event: &Event<'_>) {
            let mut text = Text(String::new());
            event.record(&mut text);
            eprintln!("{:7.1} {}", self.0.elapsed().as_secs_f64(), text.0);
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }
    let _ = tracing::subscriber::set_global_default(Lines(Instant::now()));
}
