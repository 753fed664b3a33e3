//! Whole fine-tunings of the smallest models: every loss, exact resume after a kill, thread counts, mistakes.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{bundle_in, metric, same_bytes, tiny_bundle};
use dragon_metrics::GaussianStats;
use dragon_nn::LoraConfig;
use dragon_rewards::{RewardConfig, Split as RewardSplit};
use dragon_trainer::eval::MetricConfig;
use dragon_trainer::finetune::{DemonstrationsConfig, FinetuneConfig, run};
use dragon_trainer::losses::LossConfig;
use dragon_trainer::{Error, RunContext};

/// Set in the process that `a_killed_run_continues_bit_for_bit` kills.
const CHILD: &str = "DRAGON_TEST_CHILD";

#[test]
fn the_first_step_starts_where_the_losses_must_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    cfg.run.steps = 1;
    for (i, (loss, want)) in [
        (LossConfig::Kto { beta: 5000.0, weight_plus: 1.0, weight_minus: 1.0 }, 0.5),
        (LossConfig::Dpo { beta: 5000.0 }, std::f64::consts::LN_2),
    ]
    .into_iter()
    .enumerate()
    {
        cfg.loss = loss;
        let out = dir.path().join(format!("run{i}"));
        run(&cfg, &RunContext::new(&out)).unwrap();
        let got = metric(&out, "loss")[0].unwrap();
        assert!((got - want).abs() < 1e-6, "{:?} starts at {got}", cfg.loss);
        assert_eq!(
            metric(&out, "beta_gap_q90")[0],
            Some(0.0),
            "policy and reference agree before the first update"
        );
        assert_eq!(metric(&out, "implicit_accuracy")[0], Some(0.5), "ties count half");
        assert!(metric(&out, "grad_norm")[0].unwrap() > 0.0);
        let (plus, minus) =
            (metric(&out, "reward_plus")[0].unwrap(), metric(&out, "reward_minus")[0].unwrap());
        let best = metric(&out, "reward_d1")[0].unwrap().max(metric(&out, "reward_d2")[0].unwrap());
        assert!(plus >= best && plus > minus, "{plus} {minus} {best}");
    }
}

#[test]
fn every_loss_and_kind_of_demonstration_runs() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    cfg.run.steps = 2;
    let statistics = cfg.bundle.join("stats/latents.npz");
    let set_reward = toml::from_str(&format!(
        "kind='dataset_fad'\nencoder='vae'\nsetting='round_trip'\nexemplars={{kind='statistics', path='{}'}}",
        statistics.display()
    ))
    .unwrap();
    let mix: RewardConfig = toml::from_str(
        "kind='random_mix'\n[[rewards]]\nkind='vendi'\nencoder='vae'\nsetting='frames'\npooling='song_mean'\n\
         [[rewards]]\nkind='vendi'\nencoder='vae'\nsetting='frames'\npooling='windows'",
    )
    .unwrap();
    let paired = DemonstrationsConfig::Paired;
    let unpaired = DemonstrationsConfig::Unpaired { split: RewardSplit::Mean };
    let song_reward = cfg.reward.clone();
    let kto = LossConfig::Kto { beta: 50.0, weight_plus: 1.0, weight_minus: 0.5 };
    for (i, (loss, demonstrations, reward)) in [
        (kto.clone(), unpaired, &song_reward),
        (kto, paired, &set_reward),
        (LossConfig::Dpo { beta: 50.0 }, paired, &mix),
        (LossConfig::RewardWeighted, unpaired, &song_reward),
        (LossConfig::ContinuousKto { beta: 50.0 }, paired, &song_reward),
        (LossConfig::Distributional { beta: 50.0 }, paired, &set_reward),
        (LossConfig::Mapo { b: 0.1 }, paired, &song_reward),
    ]
    .into_iter()
    .enumerate()
    {
        cfg.loss = loss;
        cfg.rollout.demonstrations = demonstrations;
        cfg.rollout.songs_per_prompt = (i % 2 == 1).then_some(4);
        cfg.reward = reward.clone();
        let out = dir.path().join(format!("run{i}"));
        run(&cfg, &RunContext::new(&out))
            .unwrap_or_else(|err| panic!("{:?} {demonstrations:?}: {err}", cfg.loss));
        assert!(metric(&out, "loss").iter().all(|v| v.is_some()));
        // Validations show every reward of a mix, the first one as `reward`.
        let other = format!("valid/{}", mix.parts()[1].label());
        assert_eq!(metric(&out, &other)[1].is_some(), *reward == mix, "{other}");
    }
}

#[test]
fn only_the_named_variables_change() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    cfg.update.parameters = vec!["text_".into()];
    let out = dir.path().join("run");
    run(&cfg, &RunContext::new(&out)).unwrap();
    let weights = |dir: &Path| {
        candle_core::safetensors::load(dir.join("model.safetensors"), &candle_core::Device::Cpu).unwrap()
    };
    let (before, after) = (weights(&cfg.bundle.join("dit")), weights(&out.join("model")));
    for (name, tensor) in &before {
        let flat = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let changed = flat(tensor) != flat(&after[name]);
        assert_eq!(changed, name.contains("text_"), "{name}");
    }
}

#[test]
fn our_own_model_takes_adapters_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    // The feed-forward is one operation without adapters, and another with them.
    let targets = vec!["query".into(), "ffn_in".into()];
    cfg.update.lora = Some(LoraConfig { rank: 2, alpha: 2.0, targets });
    let out = dir.path().join("run");
    run(&cfg, &RunContext::new(&out)).unwrap();
    let tensors = candle_core::safetensors::load(
        out.join("model/adapter_model.safetensors"),
        &candle_core::Device::Cpu,
    );
    for (name, tensor) in tensors.unwrap().iter().filter(|(name, _)| name.contains("lora_B")) {
        let size = tensor.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(size > 0.0, "{name} learned nothing");
    }
}

#[test]
fn a_killed_run_continues_bit_for_bit() {
    if let Ok(dir) = std::env::var(CHILD) {
        // This is the process to be killed: it runs until it is.
        let mut cfg = config_of(Path::new(&dir));
        cfg.run.steps = 10_000;
        run(&cfg, &RunContext::new(Path::new(&dir).join("killed"))).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    let toml = toml::to_string(&cfg).unwrap();
    std::fs::write(dir.path().join("config.toml"), toml).unwrap();
    let killed = dir.path().join("killed");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_run_continues_bit_for_bit"])
        .env(CHILD, dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let lines =
        || std::fs::read_to_string(killed.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    while lines() < 5 {
        assert!(started.elapsed() < Duration::from_secs(300), "the child makes no progress");
        assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap(); // SIGKILL: nothing is cleaned up
    child.wait().unwrap();
    let done = lines();

    let whole = dir.path().join("whole");
    cfg.run.steps = done + 4;
    run(&cfg, &RunContext::new(&whole)).unwrap();
    let ctx = RunContext { resume: true, ..RunContext::new(&killed) };
    let outcome = run(&cfg, &ctx).unwrap();
    assert_eq!((outcome.steps_done, outcome.finished), (cfg.run.steps, true));
    same_bytes(&whole, &killed, cfg.run.steps);
}

fn config_of(dir: &Path) -> FinetuneConfig {
    toml::from_str(&std::fs::read_to_string(dir.join("config.toml")).unwrap()).unwrap()
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    cfg.run.steps = 2;
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let out = dir.path().join(format!("threads{threads}"));
        pool.install(|| run(&cfg, &RunContext::new(&out))).unwrap();
    }
    same_bytes(&dir.path().join("threads1"), &dir.path().join("threads3"), 2);
}

#[test]
fn a_stop_request_ends_with_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = tiny_bundle(&bundle_in(&dir));
    let ctx = RunContext::new(dir.path().join("run"));
    ctx.stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let outcome = run(&cfg, &ctx).unwrap();
    assert_eq!((outcome.steps_done, outcome.finished), (0, false));
    assert!(outcome.model_dir.join("model.safetensors").exists());
}

#[test]
fn a_run_does_not_go_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    let ctx = RunContext { resume: true, ..RunContext::new(dir.path().join("run")) };
    cfg.run.steps = 2;
    run(&cfg, &ctx).unwrap();
    cfg.run.steps = 1;
    let text = run(&cfg, &ctx).unwrap_err().to_string();
    assert!(text.contains("it has done 2 steps, and run.steps is 1"), "{text}");
    assert!(std::fs::read_to_string(ctx.out_dir.join("run.toml")).unwrap().contains("steps = 2"));
}

#[test]
fn a_diverging_run_stops_with_step_and_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    cfg.update.optimizer.lr = 1e30;
    cfg.update.ema_decay = 0.0;
    cfg.run.checkpoint_every = 1;
    let err = run(&cfg, &RunContext::new(dir.path().join("run"))).unwrap_err();
    assert!(matches!(err, Error::NotFinite { step: 1, checkpoint: Some(_), .. }), "{err}");
    assert_eq!(err.exit_code(), 1);
    assert!(err.to_string().contains("step-000001") && err.to_string().contains("hint"), "{err}");
}

#[test]
fn a_run_does_not_continue_with_other_files_of_the_same_names() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    cfg.run.steps = 1;
    let out = dir.path().join("run");
    run(&cfg, &RunContext::new(&out)).unwrap();
    cfg.run.steps = 2;
    let resume = || run(&cfg, &RunContext { resume: true, ..RunContext::new(&out) });
    let statistics = format!("reward.exemplars: {}", cfg.bundle.join("stats/latents.npz").display());
    for (file, name) in [
        ("prompts.jsonl", "prompts"),
        ("bundle.json", "bundle: bundle.json"),
        ("dit/model.safetensors", "bundle: dit"),
        ("vae/model.safetensors", "bundle: vae"),
        ("vae/config.json", "bundle: vae"),
        ("t5/model.safetensors", "bundle: t5"),
        ("t5/tokenizer.json", "bundle: t5"),
        ("stats/latents.npz", statistics.as_str()),
    ] {
        let path = cfg.bundle.join(file);
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&good[..], b" "].concat()).unwrap();
        let err = resume().unwrap_err();
        let text = err.to_string();
        let want = format!("files that it reads have other contents than when it began\n  {name}\nhint:");
        assert!(text.contains(&want) && err.exit_code() == 1, "{file}: {text}");
        std::fs::write(&path, good).unwrap();
    }

    // A run from the time when the base weights alone were noted.
    let path = out.join("run.toml");
    let noted = std::fs::read_to_string(&path).unwrap();
    let mut old: toml::Table = noted.parse().unwrap();
    let config = old["config"].as_table_mut().unwrap();
    config.remove("inputs_sha256").unwrap();
    config.insert("base_sha256".into(), "00".into());
    std::fs::write(&path, old.to_string()).unwrap();
    let text = resume().unwrap_err().to_string();
    assert!(text.contains("begun by an older version") && text.contains("--out"), "{text}");

    std::fs::write(&path, noted).unwrap();
    assert_eq!(resume().unwrap().steps_done, 2);
}

#[test]
fn validations_may_end_and_begin_where_a_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    // Watched by a file that the reward does not read.
    let (own, other) = (cfg.bundle.join("stats/latents.npz"), cfg.bundle.join("stats/other.npz"));
    std::fs::copy(&own, &other).unwrap();
    let text = toml::to_string(&cfg.reward).unwrap().replace("latents.npz", "other.npz");
    let reward = toml::from_str(&text).unwrap();
    cfg.validation.monitors = Some(vec![MetricConfig { name: "other".into(), reward }]);
    let out = dir.path().join("run");
    for (steps, validate_every) in [(1, 1), (2, 0), (3, 1)] {
        (cfg.run.steps, cfg.run.validate_every) = (steps, validate_every);
        run(&cfg, &RunContext { resume: true, ..RunContext::new(&out) }).unwrap();
    }
    // What was read is remembered through a part of the run that does not read it.
    (cfg.run.steps, cfg.run.validate_every) = (4, 0);
    run(&cfg, &RunContext { resume: true, ..RunContext::new(&out) }).unwrap();
    std::fs::write(&other, [std::fs::read(&own).unwrap(), b" ".to_vec()].concat()).unwrap();
    (cfg.run.steps, cfg.run.validate_every) = (5, 1);
    let text = run(&cfg, &RunContext { resume: true, ..RunContext::new(&out) }).unwrap_err().to_string();
    assert!(text.contains("other contents than when it began") && text.contains("other.npz"), "{text}");
    let watched: Vec<bool> = metric(&out, "valid/other").iter().map(Option::is_some).collect();
    assert_eq!(watched, [true, false, true, false]);
}

#[test]
fn what_cannot_be_scored_is_found_before_the_run_begins() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    let stats =
        GaussianStats::new(vec![0.0; 3], vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], None).unwrap();
    dragon_metrics::files::write_stats(&cfg.bundle.join("stats/three.npz"), "three", &stats).unwrap();
    let text = toml::to_string(&cfg.reward).unwrap().replace("latents.npz", "three.npz");
    cfg.reward = toml::from_str(&text).unwrap();
    let out = dir.path().join("run");
    let text = run(&cfg, &RunContext::new(&out)).unwrap_err().to_string();
    assert!(text.contains("cannot score a song of this model") && text.contains("same encoder"), "{text}");
    assert!(!out.exists(), "nothing to resume or to remove");
}

#[test]
fn mistakes_are_named_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let good = tiny_bundle(&bundle_in(&dir));
    let missing = dir.path().join("nothing.jsonl");
    let set_reward = "kind='vendi'\nencoder='vae'\nsetting='frames'\npooling='song_mean'";
    type Mistake = Box<dyn Fn(&mut FinetuneConfig)>;
    let cases: Vec<(&str, Mistake)> = vec![
        ("rollout.songs_per_step", Box::new(|c| c.rollout.songs_per_step = 0)),
        ("a multiple of the 2 songs of each prompt", Box::new(|c| c.rollout.songs_per_step = 7)),
        ("rollout.songs_per_prompt", Box::new(|c| c.rollout.songs_per_prompt = Some(1))),
        ("rollout.reference_probability", Box::new(|c| c.rollout.reference_probability = 1.5)),
        ("text_value", Box::new(|c| c.update.parameters = vec!["nothing".into()])),
        ("update.optimizer.lr", Box::new(|c| c.update.optimizer.lr = 0.0)),
        ("update.optimizer.beta2", Box::new(|c| c.update.optimizer.beta2 = 1.0)),
        ("update.optimizer.max_grad_norm", Box::new(|c| c.update.optimizer.max_grad_norm = Some(0.0))),
        ("validation.n_prompts", Box::new(|c| c.validation.n_prompts = 0)),
        ("validation.sampler.n_steps", Box::new(|c| c.validation.sampler.n_steps = 0)),
        ("loss.b", Box::new(|c| c.loss = LossConfig::Mapo { b: f64::NAN })),
        (
            "loss.weight_minus",
            Box::new(|c| c.loss = LossConfig::Kto { beta: 1.0, weight_plus: 1.0, weight_minus: -1.0 }),
        ),
        ("are needed", Box::new(|c| c.rollout.songs_per_step = 400)),
        ("nothing.jsonl", Box::new(move |c| c.prompts = missing.clone())),
        (
            "a reward of single songs",
            Box::new(|c| {
                c.reward = toml::from_str(set_reward).unwrap();
                c.loss = LossConfig::RewardWeighted;
            }),
        ),
        (
            "one of `frames`",
            Box::new(|c| {
                c.reward = toml::from_str(&set_reward.replace("frames", "frame")).unwrap();
            }),
        ),
        (
            "paired, which this loss needs",
            Box::new(|c| {
                c.loss = LossConfig::Dpo { beta: 1.0 };
                c.rollout.demonstrations = DemonstrationsConfig::Unpaired { split: RewardSplit::Median };
            }),
        ),
        ("dit/model.safetensors", Box::new(|c| c.bundle = "/nowhere".into())),
    ];
    for (i, (part, change)) in cases.iter().enumerate() {
        let mut cfg = good.clone();
        change(&mut cfg);
        let err = run(&cfg, &RunContext::new(dir.path().join(format!("run{i}")))).unwrap_err();
        assert_eq!(err.exit_code(), 1, "{err}");
        assert!(err.to_string().contains(part), "{part}: {err}");
    }
    let unknown = toml::to_string(&good).unwrap().replace("ema_decay", "ema_dekay");
    assert!(toml::from_str::<FinetuneConfig>(&unknown).unwrap_err().to_string().contains("ema_dekay"));
}

#[test]
fn weights_of_another_shape_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = tiny_bundle(&bundle_in(&dir));
    let path = cfg.bundle.join("dit/config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"ffn_hidden\": 24", "\"ffn_hidden\": 28")).unwrap();
    let err = run(&cfg, &RunContext::new(dir.path().join("run"))).unwrap_err();
    assert_eq!(err.exit_code(), 1);
    let text = err.to_string();
    assert!(
        text.contains("does not fit") && text.contains("blocks.1") && text.contains("expected"),
        "{text}"
    );
}
