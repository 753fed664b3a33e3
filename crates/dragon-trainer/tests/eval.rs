//! Generation and evaluation of the smallest models, and of folders of audio.

mod common;

use common::{bundle_in, tiny_bundle};
use dragon_audio::{Clip, SampleFormat};
use dragon_rewards::{RewardConfig, Term};
use dragon_trainer::bundle::Split;
use dragon_trainer::eval::{self, BootstrapConfig, EvalConfig, FoldersConfig, MetricConfig};
use dragon_trainer::finetune::{self, FinetuneConfig};
use dragon_trainer::generate::{self, GenerateConfig, Wanted};
use dragon_trainer::{RunContext, bundle};

fn metrics(cfg: &FinetuneConfig) -> Vec<MetricConfig> {
    let vendi = "kind='vendi'\nencoder='vae'\nsetting='round_trip'\npooling='song_mean'";
    let statistics = cfg.bundle.join("stats/latents.npz");
    let fad = format!(
        "kind='dataset_fad'\nencoder='vae'\nsetting='frames'\nexemplars={{kind='statistics', path='{}'}}",
        statistics.display()
    );
    vec![
        MetricConfig { name: "per-song FAD".into(), reward: cfg.reward.clone() },
        MetricConfig { name: "dataset FAD".into(), reward: toml::from_str(&fad).unwrap() },
        MetricConfig { name: "Vendi".into(), reward: toml::from_str(vendi).unwrap() },
    ]
}

fn eval_config(cfg: &FinetuneConfig, tuned: &std::path::Path) -> EvalConfig {
    EvalConfig {
        length: Default::default(),
        seed: 3,
        bundle: cfg.bundle.clone(),
        tuned: tuned.to_owned(),
        prompts: cfg.prompts.clone(),
        split: Split::Test,
        n_prompts: 6,
        sampler: cfg.rollout.sampler,
        batch: 4,
        embed: cfg.embed.clone(),
        metrics: metrics(cfg),
        bootstrap: BootstrapConfig { subsets: 20, songs: 4 },
        examples: 2,
    }
}

#[test]
fn the_base_against_itself_is_a_draw() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = tiny_bundle(&bundle_in(&dir));
    let out = dir.path().join("eval");
    let summary = eval::run(&eval_config(&cfg, &cfg.bundle), &RunContext::new(&out)).unwrap();
    assert_eq!(summary.n_songs, 6);
    for metric in &summary.metrics {
        assert_eq!(metric.base, metric.tuned, "{}", metric.name);
        assert_eq!(metric.set_win_rate, 0.5, "{}", metric.name);
        assert_eq!(metric.difference_95, (0.0, 0.0));
    }
    let won = summary.target().song_win_rate.unwrap();
    assert_eq!((won.wins, won.ties, won.rate), (0, 6, 0.5));
    assert!(summary.target().base > 0.0, "a distance is printed as a distance");
    assert!(summary.metrics[2].song_win_rate.is_none() && !summary.metrics[2].lower_is_better);

    let table = summary.table();
    assert!(table.lines().next().unwrap().starts_with("metric") && table.contains("50.0 %"), "{table}");
    let json: eval::Summary =
        serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
    // serde_json reads floats to the last digit but one.
    assert!((json.target().base - summary.target().base).abs() < 1e-12 && json.songs == summary.songs);
    let html = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(html.contains("per-song FAD") && html.contains("data:audio/wav") && !html.contains("http://"));
    assert_eq!(std::fs::read_dir(out.join("samples")).unwrap().count(), 4);
}

#[test]
fn terms_of_a_weighted_sum_are_on_the_scale_of_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let mut cfg = tiny_bundle(&bundle_in(&dir));
    let metrics = metrics(&cfg);
    let sum = |terms: [(f64, &MetricConfig); 2]| RewardConfig::WeightedSum {
        terms: terms.map(|(weight, metric)| Term { weight, reward: metric.reward.clone() }).to_vec(),
    };
    // Of songs: 1 and -3 times the same reward, which makes -2 times it. Of sets: a distance and a diversity.
    let (of_songs, of_sets) =
        (sum([(1.0, &metrics[0]), (-3.0, &metrics[0])]), sum([(1.0, &metrics[1]), (1.0, &metrics[2])]));
    let named =
        |name: &str, reward: &RewardConfig| MetricConfig { name: name.into(), reward: reward.clone() };
    let sums = vec![named("of songs", &of_songs), named("of sets", &of_sets)];
    cfg.validation.monitors = Some(sums.clone());
    let run = dir.path().join("run");
    finetune::run(&cfg, &RunContext::new(&run)).unwrap();
    let mut eval_cfg = eval_config(&cfg, &run);
    eval_cfg.metrics = [metrics, sums].concat();
    let found = eval::run(&eval_cfg, &RunContext::new(dir.path().join("eval"))).unwrap().metrics;
    let (one, songs, sets) = (&found[0], &found[3], &found[4]);
    // The base's songs have a mean of 0 and a deviation of 2.
    let deviation = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (x.len() - 1) as f64).sqrt()
    };
    assert!(songs.base.abs() < 1e-9, "{}", songs.base);
    assert!((deviation(songs.base_songs.as_ref().unwrap()) - 2.0).abs() < 1e-9);
    // The reward is the negated distance that the table prints, so the sum is 2 times that distance over its deviation.
    let expected = 2.0 * (one.tuned - one.base) / deviation(one.base_songs.as_ref().unwrap());
    assert!((songs.tuned - expected).abs() < 1e-9, "{} of {expected}", songs.tuned);
    // Over subsets of the base both terms of the sum of sets have a mean of 0.
    assert!(sets.subset_means.0.abs() < 1e-9, "{:?}", sets.subset_means);
    // Validations have such a scale too.
    let logged = common::metric(&run, "valid/of songs (base)");
    assert!(
        logged.iter().flatten().all(|x| x.abs() < 1e-9) && logged.iter().flatten().count() == 2,
        "{logged:?}"
    );
}

#[test]
fn a_tuned_run_is_measured_with_its_curves_and_reproduces() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = tiny_bundle(&bundle_in(&dir));
    let run = dir.path().join("run");
    finetune::run(&cfg, &RunContext::new(&run)).unwrap();
    let eval_cfg = eval_config(&cfg, &run);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let summary = eval::run(&eval_cfg, &RunContext::new(&a)).unwrap();
    assert_ne!(summary.target().base, summary.target().tuned);
    // Another batch size changes no number.
    eval::run(&EvalConfig { batch: 5, ..eval_cfg }, &RunContext::new(&b)).unwrap();
    for file in ["report.json", "samples/000-a-fast-waltz-flute-3.tuned.wav"] {
        let read = |dir: &std::path::Path| std::fs::read(dir.join(file)).unwrap_or_default();
        assert!(read(&a) == read(&b), "{file} differs");
    }
    let html = std::fs::read_to_string(a.join("report.html")).unwrap();
    assert!(html.contains("Reward while learning") && html.contains("Denoising errors"));
    // A model folder that has changed since is another base.
    let path = cfg.bundle.join("bundle.json");
    std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + "\n").unwrap();
    let c = RunContext::new(dir.path().join("c"));
    let text = eval::run(&eval_config(&cfg, &run), &c).unwrap_err().to_string();
    assert!(text.contains("was tuned from another model folder"), "{text}");
    assert!(!c.out_dir.exists());
}

#[test]
fn a_generation_does_not_depend_on_its_batch() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = tiny_bundle(&bundle_in(&dir));
    let mut generate_cfg = GenerateConfig {
        length: Default::default(),
        bundle: cfg.bundle.clone(),
        tuned: None,
        sampler: cfg.rollout.sampler,
        batch: 8,
    };
    let wanted =
        |prompts: &[&str]| Wanted::variants(&prompts.iter().map(|p| p.to_string()).collect::<Vec<_>>(), 1, 2);
    let in_dir = |name: &str| RunContext::new(dir.path().join(name));
    let songs = wanted(&["a slow waltz", "a fast reel", "a slow waltz"]).unwrap();
    let files = generate::run(&generate_cfg, &songs, &in_dir("many")).unwrap();
    let bytes: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).unwrap()).collect();
    assert_eq!(files.len(), 6);
    assert!(bytes[0] == bytes[4] && bytes[0] != bytes[1] && bytes[0] != bytes[2]);
    generate_cfg.batch = 1;
    let songs = wanted(&["a fast reel", "a slow waltz"]).unwrap();
    let alone = generate::run(&generate_cfg, &songs, &in_dir("alone")).unwrap();
    assert!(std::fs::read(&alone[2]).unwrap() == bytes[0]);

    let err = wanted(&["  ", "a slow waltz"]).unwrap_err();
    assert_eq!(err.exit_code(), 1);
    assert!(err.to_string().contains("prompt 1 is empty"), "{err}");
    assert!(wanted(&[]).unwrap_err().to_string().contains("no prompt"));
    generate_cfg.tuned = Some(dir.path().join("nothing"));
    let err = generate::run(&generate_cfg, &songs, &in_dir("none")).unwrap_err();
    assert!(err.to_string().contains("holds no diffusion model"), "{err}");
}

#[test]
fn two_folders_are_compared_song_by_song() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = tiny_bundle(&bundle_in(&dir));
    for (folder, gain) in [("a", 0.1f32), ("b", 0.9)] {
        let folder = dir.path().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        for i in 0..4 {
            let pitch = 0.2 + 0.1 * i as f32;
            let samples = (0..800).map(|n| gain * (n as f32 * pitch).sin()).collect();
            let clip = Clip { samples, sample_rate_hz: 1000 };
            dragon_audio::write_wav(&folder.join(format!("{i}.wav")), &clip, SampleFormat::Int16).unwrap();
        }
    }
    let config = FoldersConfig {
        seed: 1,
        base: dir.path().join("a"),
        tuned: dir.path().join("b"),
        bundle: Some(cfg.bundle.clone()),
        prompts: None,
        embed: cfg.embed.clone(),
        metrics: metrics(&cfg),
        bootstrap: BootstrapConfig { subsets: 10, songs: 3 },
        examples: 1,
    };
    let out = dir.path().join("eval");
    let summary = eval::run_folders(&config, &RunContext::new(&out)).unwrap();
    assert_eq!(summary.n_songs, 4);
    assert_eq!(summary.target().song_win_rate.unwrap().n, 4);
    assert!(summary.monitors[1].tuned > summary.monitors[1].base + 15.0, "19 dB louder");
    assert!(out.join("report.html").exists());

    // Two songs of one name have no one partner.
    std::fs::copy(dir.path().join("a/1.wav"), dir.path().join("a/0.mp2")).unwrap();
    let err = eval::run_folders(&config, &RunContext::new(dir.path().join("twice"))).unwrap_err();
    assert_eq!(err.exit_code(), 1);
    assert!(err.to_string().contains("a/0.wav") && err.to_string().contains("leave one"), "{err}");
    std::fs::remove_file(dir.path().join("a/0.mp2")).unwrap();

    // Without common names the folders are two sets.
    std::fs::rename(dir.path().join("b/0.wav"), dir.path().join("b/x.wav")).unwrap();
    for i in 1..4 {
        std::fs::remove_file(dir.path().join(format!("b/{i}.wav"))).unwrap();
        std::fs::copy(dir.path().join(format!("a/{i}.wav")), dir.path().join(format!("b/y{i}.wav"))).unwrap();
    }
    let summary = eval::run_folders(&config, &RunContext::new(dir.path().join("sets"))).unwrap();
    assert!(summary.target().song_win_rate.is_none() && summary.target().base_songs.is_some());

    let none = FoldersConfig { bundle: None, ..config };
    let err = eval::run_folders(&none, &RunContext::new(dir.path().join("none"))).unwrap_err();
    assert!(err.to_string().contains("needs a model folder"), "{err}");
}

#[test]
fn mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let cfg = tiny_bundle(&bundle_in(&dir));
    let good = eval_config(&cfg, &cfg.bundle);
    let out = RunContext::new(dir.path().join("eval"));
    for (part, bad) in [
        ("n_prompts", EvalConfig { n_prompts: 0, ..good.clone() }),
        ("has 6 prompts of split `test`, 600 are needed", EvalConfig { n_prompts: 600, ..good.clone() }),
        ("at least one metric", EvalConfig { metrics: Vec::new(), ..good.clone() }),
        ("holds no diffusion model", EvalConfig { tuned: dir.path().join("nothing"), ..good.clone() }),
        (
            "bootstrap.songs",
            EvalConfig { bootstrap: BootstrapConfig { subsets: 9, songs: 0 }, ..good.clone() },
        ),
    ] {
        let err = eval::run(&bad, &out).unwrap_err();
        assert_eq!(err.exit_code(), 1);
        assert!(err.to_string().contains(part), "{part}: {err}");
    }
    // A model of another shape is not compared.
    let other = dir.path().join("other");
    let mut config: dragon_diffusion::Config =
        bundle::read_json(&cfg.bundle.join("dit/config.json")).unwrap();
    config.dit.depth += 1;
    let params = dragon_nn::Params::new(0);
    dragon_diffusion::Model::new(&config, params.builder(candle_core::DType::F32, &candle_core::Device::Cpu))
        .unwrap();
    dragon_trainer::diffusion::save_dit(&other, &config, &params).unwrap();
    let err = eval::run(&EvalConfig { tuned: other, ..good }, &out).unwrap_err();
    assert!(err.to_string().contains("another diffusion model"), "{err}");
}
