use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use dragon_data::{CaptionSource, Corpus, Entry, Split, write_manifest};
use dragon_encoders::clap::{self, ClapEncoder};
use dragon_nn::Rng;

use super::{ClapConfig, ClapTask, Retrieval};
use crate::pretrain::Task;

/// Sixty pieces of two clips: sines of three pitches, said in words.
fn corpus(dir: &Path) -> PathBuf {
    let names = ["low", "middle", "high"];
    let mut entries = vec![];
    for i in 0..120usize {
        let pitch = names[i % 3];
        let hz = [200.0, 600.0, 1800.0][i % 3] * (1.0 + 0.003 * i as f32);
        let samples =
            (0..6000).map(|t| 0.3 * (std::f32::consts::TAU * hz * t as f32 / 8000.0).sin()).collect();
        let path = format!("{i:03}.wav");
        let clip = dragon_audio::Clip { samples, sample_rate_hz: 8000 };
        dragon_audio::write_wav(&dir.join(&path), &clip, dragon_audio::SampleFormat::Int16).unwrap();
        let split = if i / 2 < 50 { Split::Train } else { Split::Valid };
        entries.push(Entry {
            id: format!("{i}"),
            piece: format!("piece-{}", i / 2),
            path,
            start_s: 0.0,
            duration_s: 0.75,
            sample_rate_hz: 8000,
            caption: format!("a {pitch} tone number {i}"),
            caption_source: CaptionSource::User,
            split,
            corpus: Corpus::Import,
            attributes: Default::default(),
        });
    }
    let manifest = dir.join("manifest.jsonl");
    write_manifest(&manifest, &entries).unwrap();
    manifest
}

fn config(manifest: PathBuf) -> ClapConfig {
    let mut cfg = ClapConfig::tiny_music(vec![manifest]);
    cfg.model = clap::Config::tiny();
    cfg.model.text.vocab_size = 80;
    cfg.batch = 8;
    cfg.warmup_steps = 3;
    cfg.decay_steps = 100;
    cfg.ema_decay = 0.8;
    cfg.optimizer.lr = 1e-3;
    cfg
}

fn bits(task: &ClapTask) -> Vec<u32> {
    let state = task.state().unwrap();
    let floats = state.values().filter(|t| t.dtype() == DType::F32);
    floats.flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).map(f32::to_bits).collect()
}

#[test]
fn a_resumed_training_equals_one_that_ran_through_and_the_model_learns() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = config(corpus(dir.path()));
    let mut a = ClapTask::new(&cfg, 1, &Device::Cpu).unwrap();
    let run = |task: &mut ClapTask, steps: std::ops::Range<usize>| -> Vec<f64> {
        steps
            .map(|step| {
                let mut rng = Rng::from_key(&format!("step/{step}"), 3);
                task.step(step, &mut rng).unwrap()[0].1
            })
            .collect()
    };
    let first = run(&mut a, 0..10);
    let state = a.state().unwrap();
    let mut losses = run(&mut a, 10..12);
    let mut b = ClapTask::new(&cfg, 1, &Device::Cpu).unwrap();
    b.load_state(&state).unwrap();
    assert_eq!(losses, run(&mut b, 10..12));
    assert_eq!(bits(&a), bits(&b));
    losses.extend(run(&mut a, 12..80));
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (start, end) = (mean(&first[..4]), mean(&losses[losses.len() - 8..]));
    assert!(end < 0.75 * start, "loss {start:.3} -> {end:.3}"); // ln 8 = 2.08; telling three pitches apart: 1.1
    let scores: HashMap<_, _> = a.validate().unwrap().into_iter().collect();
    assert_eq!(scores["n_pairs"], 20.0);
    a.export(&dir.path().join("model")).unwrap();
    let read = ClapEncoder::load(dir.path().join("model"), &Device::Cpu).unwrap();
    let again = Retrieval::on_pieces(&read, &cfg.manifests[0], &[Split::Valid], 100).unwrap();
    assert_eq!(again.n, 10);
}

#[test]
fn impossible_settings_are_named() {
    let base = ClapConfig::tiny_music(vec![]);
    assert!(base.check().unwrap_err().to_string().contains("clap.manifests"));
    let mut cfg = ClapConfig::tiny_music(vec!["clips.jsonl".into()]);
    cfg.optimizer.eps = 0.0;
    assert!(cfg.check().unwrap_err().to_string().contains("clap.optimizer.eps"));
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = config(corpus(dir.path()));
    cfg.batch = 40;
    let message = ClapTask::new(&cfg, 1, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains("lower `clap.batch`"), "{message}");
    cfg = config(dir.path().join("manifest.jsonl"));
    cfg.model.audio.clip_samples = 6_300;
    let message = ClapTask::new(&cfg, 1, &Device::Cpu).err().unwrap().to_string();
    assert!(message.contains("is too short: expected at least 0.79 s, found 0.75 s"), "{message}");
}
