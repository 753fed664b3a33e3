//! Trains the embedded VAE on the clips of manifests; goes on from the newest checkpoint of its output folder.
//!
//! `cargo run --release -p dragon-vae --example train_vae -- OUT STEPS SECONDS MANIFEST...`

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use candle_core::Device;
use dragon_nn::Rng;
use dragon_vae::Config;
use dragon_vae::training::{Clips, Training, TrainingConfig};

type AnyResult<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> AnyResult<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [out, steps, seconds, manifests @ ..] = args.as_slice() else {
        return Err("usage: train_vae OUT STEPS SECONDS MANIFEST...".into());
    };
    let (out, n_steps, seconds) = (Path::new(out), steps.parse::<usize>()?, seconds.parse::<f64>()?);
    let setting = |name: &str, default: f64| -> f64 {
        std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
    };
    let (mut train, mut held_out) = (Clips::default(), Clips::default());
    for manifest in manifests {
        let folder = Path::new(manifest).parent().unwrap_or(Path::new("."));
        for line in std::fs::read_to_string(manifest)?.lines() {
            let entry: serde_json::Value = serde_json::from_str(line)?;
            let clips = match entry["split"].as_str() {
                Some("train") => &mut train,
                Some("valid") => &mut held_out,
                _ => continue,
            };
            let path = entry["path"].as_str().ok_or("a manifest line without a path")?;
            clips.push(&dragon_audio::read_mono(&folder.join(path), 16_000)?.samples);
        }
    }
    let device = Device::Cpu;
    let model = Config::tiny_music();
    let mut cfg = TrainingConfig { n_steps, ..TrainingConfig::tiny_music() };
    cfg.lr = setting("LR", cfg.lr);
    cfg.weights.waveform = setting("W_WAVE", cfg.weights.waveform);
    cfg.weights.kl = setting("W_KL", cfg.weights.kl);
    cfg.freeze_encoder = setting("FREEZE", 0.0) > 0.0;
    let adversarial = setting("ADV_FROM", -1.0);
    cfg.adversarial_from = (adversarial >= 0.0).then_some(adversarial as usize);
    let batch = setting("BATCH", 6.0) as usize;
    let crop = setting("CROP_FRAMES", 16.0) as usize * model.hop();
    let hop = model.hop();
    let mut training = Training::new(&model, &cfg, 1, &device)?;
    if let Ok(dir) = std::env::var("INIT") {
        training.load_weights(Path::new(&dir))?;
    }
    let mut step = 0;
    let checkpoint = out.join("checkpoint.safetensors");
    let progress = out.join("progress.json");
    std::fs::create_dir_all(out)?;
    if checkpoint.exists() {
        let state: BTreeMap<_, _> = candle_core::safetensors::load(&checkpoint, &device)?.into_iter().collect();
        training.load_state(&state)?;
        step = serde_json::from_str(&std::fs::read_to_string(&progress)?)?;
    }
    println!(
        "clips {} held out {}  parameters {}  GFLOP per second of audio {:.2}  from step {step}",
        train.len(),
        held_out.len(),
        training.len_params(),
        3.0 * model.flops_per_second() / 1e9
    );
    let every = (held_out.len() / 12).max(1);
    let valid: Vec<_> = (0..held_out.len())
        .step_by(every)
        .take(setting("N_VALID", 12.0) as usize)
        .map(|i| held_out.whole(i, hop, &device))
        .collect::<Result<_, _>>()?;
    let stats: Vec<_> = (0..train.len())
        .step_by((train.len() / 60).max(1))
        .map(|i| train.whole(i, hop, &device))
        .collect::<Result<_, _>>()?;
    let save = |training: &Training, step: usize| -> AnyResult<()> {
        dragon_nn::write_safetensors(&checkpoint, &training.state()?, &BTreeMap::new())?;
        std::fs::write(&progress, serde_json::to_string(&step)?)?;
        Ok(())
    };
    let export_after = setting("EXPORT_AFTER", 500.0) as usize;
    let begin = Instant::now();
    let mut last_save = Instant::now();
    let mut sums: BTreeMap<&'static str, (f64, usize)> = BTreeMap::new();
    let log_every = setting("LOG_EVERY", 20.0) as usize;
    let valid_every = setting("VALID_EVERY", 250.0) as usize;
    while step < n_steps && begin.elapsed().as_secs_f64() < seconds {
        // As the loop of `dragon pretrain` draws it.
        let mut rng = Rng::from_key(&format!("step/{step}"), 1);
        let audio = train.crops(batch, crop, &mut rng, &device)?;
        let noise = rng.normal_tensor((batch, model.latent_dim, crop / hop), candle_core::DType::F32, &device)?;
        for (name, value) in training.step(step, &audio, &noise)? {
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + value, sum.1 + 1);
        }
        step += 1;
        if step % log_every == 0 {
            let line: Vec<String> = sums.iter().map(|(k, (s, n))| format!("{k} {:.4}", s / *n as f64)).collect();
            println!("step {step} t {:.0}s  {}", begin.elapsed().as_secs_f64(), line.join("  "));
            sums.clear();
        }
        if step % valid_every == 0 && !valid.is_empty() {
            let line: Vec<String> =
                training.validate(&valid)?.iter().map(|(k, v)| format!("{k} {v:.4}")).collect();
            println!("VALID step {step} t {:.0}s  {}", begin.elapsed().as_secs_f64(), line.join("  "));
        }
        if last_save.elapsed().as_secs() > 180 {
            save(&training, step)?;
            if step > export_after {
                training.export(&out.join("model"), &stats)?;
            }
            last_save = Instant::now();
        }
    }
    save(&training, step)?;
    training.export(&out.join("model"), &stats)?;
    if !valid.is_empty() {
        let line: Vec<String> = training.validate(&valid)?.iter().map(|(k, v)| format!("{k} {v:.4}")).collect();
        println!("VALID step {step} t {:.0}s  {}", begin.elapsed().as_secs_f64(), line.join("  "));
    }
    Ok(())
}
