use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use dragon_encoders::t5;
use dragon_nn::Rng;

use super::{Config, DitTask, LatentSet, TrainConfig};
use crate::bundle::Info;
use crate::pretrain::Task;
use crate::schedule::Schedule;

/// Latents whose mean follows their caption: `loud` +0.8 in the first channel, `soft` -0.8, each with waves at random phases.
fn toy(n: usize, seed: u64) -> LatentSet {
    let (channels, n_frames) = (4, 8);
    let mut rng = Rng::new(seed);
    let mut latents = Vec::new();
    let mut captions = Vec::new();
    for i in 0..n {
        // Half the set away, as the validation looks for another text, is always the other kind.
        let loud = i < n / 2;
        captions.push(if loud { "a loud song" } else { "a soft song" }.to_owned());
        for channel in 0..channels {
            let phase = rng.uniform() * 6.0;
            for t in 0..n_frames {
                let mean = if channel == 0 { if loud { 0.8 } else { -0.8 } } else { 0.0 };
                latents.push((mean + 0.8 * (phase + t as f64 * 0.7).sin()) as f32);
            }
        }
    }
    LatentSet { latents, channels, n_frames, captions }
}

fn toy_config() -> Config {
    let none = PathBuf::new();
    let mut cfg = Config::tiny_music(none.clone(), none.clone(), none);
    cfg.model = dragon_diffusion::Config::tiny();
    cfg.model.edm.p_mean = 0.5; // between the levels that caption and waves are learned at
    cfg.text = t5::Config { d_model: cfg.model.dit.text_dim, ..t5::Config::tiny() };
    cfg.data.n_frames = 8;
    cfg.data.max_tokens = 8;
    cfg.train = TrainConfig { batch: 16, lr: 5e-3, warmup_steps: 5, ema_decay: 0.9, ..cfg.train };
    cfg
}

fn task() -> DitTask {
    DitTask::new(&toy_config(), toy(64, 1), toy(16, 2), &Device::Cpu).unwrap()
}

fn go(task: &mut DitTask, steps: std::ops::Range<usize>) -> Vec<f64> {
    steps.map(|step| task.step(step, &mut Rng::from_key(&format!("step/{step}"), 0)).unwrap()[0].1).collect()
}

#[test]
fn the_loss_falls_and_the_caption_helps() {
    let mut task = task();
    let before: BTreeMap<_, _> = task.validate().unwrap().into_iter().collect();
    go(&mut task, 0..200);
    let after: BTreeMap<_, _> = task.validate().unwrap().into_iter().collect();
    assert!(after["loss"] < 0.9 * before["loss"], "{} -> {}", before["loss"], after["loss"]);
    assert!(after["loss_sigma_4"] < 0.9 * after["loss_other_text_sigma_4"], "{after:?}");
    assert!(after["loss_sigma_4"] < after["loss_no_text"], "{after:?}");
    assert!(before["text_gain"].abs() < 1e-9 && after["text_gain"] > 0.02, "{after:?}");
}

#[test]
fn a_restored_state_goes_on_bit_for_bit() {
    let mut whole = task();
    let losses = go(&mut whole, 0..9);
    let mut first = task();
    go(&mut first, 0..5);
    let state = first.state().unwrap();
    let mut second = task();
    second.load_state(&state).unwrap();
    assert_eq!(go(&mut second, 5..9), losses[5..]);
    let (a, b) = (whole.state().unwrap(), second.state().unwrap());
    assert_eq!(a.len(), b.len());
    for (name, tensor) in &a {
        let values =
            |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(values(tensor), values(&b[name]), "{name}");
    }
}

#[test]
fn the_export_holds_the_average_and_loads_again() {
    let mut task = task();
    go(&mut task, 0..3);
    let dir = tempfile::tempdir().unwrap();
    task.export(dir.path()).unwrap();
    let diffusion = crate::diffusion::Diffusion::load(&dir.path().join("dit"), &Device::Cpu).unwrap();
    let text = crate::bundle::TextStates::load(&dir.path().join("t5"), 8, &Device::Cpu).unwrap();
    let info: Info = crate::bundle::read_json(&dir.path().join("bundle.json")).unwrap();
    assert_eq!((info.n_frames, info.max_tokens), (8, 8));
    let model = diffusion.base().unwrap();
    let cond = text.encode(&["a loud song", "a soft song"]).unwrap();
    let noise = dragon_diffusion::Noise::new(&[("a", 0), ("b", 0)], 4, 8, &Device::Cpu);
    let settings = dragon_diffusion::SamplerConfig { n_steps: 3, ..Default::default() };
    let latents = dragon_diffusion::sample(model.as_ref(), &cond, &noise, &settings).unwrap();
    assert_eq!(latents.dims(), [2, 4, 8]);
    // The same from the task in memory.
    let last = task.valid.len() - 1; // the first is loud, the last is soft
    let rows = task.valid_captions.batch(&[0, last], &Device::Cpu).unwrap();
    let cond = task.averaged.texts(rows).unwrap();
    let want = dragon_diffusion::sample(&task.averaged.model, &cond, &noise, &settings).unwrap();
    dragon_testkit::assert_close(&latents, &want, dragon_testkit::Tol::LAYER);
}

#[test]
fn an_epoch_shows_every_clip_once() {
    let task = task();
    let mut seen: Vec<usize> = (0..4).flat_map(|step| task.rows(step)).collect();
    let next: Vec<usize> = (4..8).flat_map(|step| task.rows(step)).collect();
    assert_ne!(seen, next);
    seen.sort_unstable();
    assert_eq!(seen, (0..64).collect::<Vec<_>>());
    // A step's clips do not depend on what was asked before.
    let again = task.rows(5);
    assert_eq!(again, next[16..32]);
}

#[test]
fn configs_that_cannot_work_are_refused_by_their_key() {
    let refused = |change: &dyn Fn(&mut Config)| {
        let mut cfg = toy_config();
        change(&mut cfg);
        cfg.check().unwrap_err().to_string()
    };
    assert!(refused(&|c| c.train.batch = 0).contains("train.batch"));
    assert!(refused(&|c| c.train.lr = f64::NAN).contains("train.lr"));
    assert!(refused(&|c| c.train.caption_dropout = 1.0).contains("train.caption_dropout"));
    assert!(refused(&|c| c.model.dit.text_dim = 7).contains("model.dit.text_dim"));
    assert!(refused(&|c| c.model.edm.sigma_data = 0.0).contains("sigma_data"));
}

#[test]
fn the_learning_rate_warms_up_and_falls_along_a_cosine() {
    let mut task = task();
    assert!((task.lr(0) - 1e-3).abs() < 1e-12 && task.lr(4) == 5e-3 && task.lr(5000) == 5e-3);
    task.cfg.train.schedule = Schedule::Cosine;
    task.cfg.run.steps = 105;
    assert!((task.lr(105) - 5e-4).abs() < 1e-12 && (task.lr(55) - 0.55 * 5e-3).abs() < 1e-9);
}
