//! Measuring: a tuned model against its base on held-out prompts, or two folders of audio against each other
//! (paper 5.1, B.4).
//!
//! Both systems answer the same prompts from the same noise. A reward of songs gives an instance-wise win rate with a
//! Clopper-Pearson interval; every reward gives its value on all songs and a win rate over random subsets.
//!
//! Reading order: `config` says what an evaluation depends on; `systems` makes or reads
//! the songs; `compare` measures them; `summary` holds what was found and prints it; `tables` puts several side by side;
//! `page` makes the report.

mod compare;
mod config;
mod page;
mod summary;
mod systems;
mod tables;

use std::path::{Path, PathBuf};

use dragon_rewards::{RewardConfig, RewardSet};
use sha2::{Digest, Sha256};

pub(crate) use compare::scale_by_base;
pub use config::{BootstrapConfig, EvalConfig, FoldersConfig, MetricConfig, target_first};
pub(crate) use summary::number;
pub use summary::{MetricResult, Monitor, SongResult, Summary};
pub(crate) use systems::caption_of;
pub use tables::{appendix_tables, win_rates};

use crate::bundle::{self, Bundle};
use crate::diffusion::{tuned_dir, weights_path};
use crate::embedder::{EmbedConfig, Embedder};
use crate::error::{Error, Result};
use crate::report::as_in_config;
use crate::rollout::{Sampling, TextCache};
use crate::run::{Meter, RunContext, hex};
use compare::Comparison;
use config::check_metrics;
use page::{page, read_log, training_charts, training_warnings, write};
use systems::{Generator, Listener, files_of};

/// Measures a tuned model against its base; writes `report.json`, `report.html` and `samples/` to `ctx.out_dir`.
///
/// # Errors
/// If the config cannot work, a file is missing or broken, a song cannot be scored, or `ctx.stop` was set.
pub fn run(cfg: &EvalConfig, ctx: &RunContext) -> Result<Summary> {
    cfg.check()?;
    let prompts = bundle::some_prompts_of(&cfg.prompts, cfg.split, cfg.n_prompts)?;
    let tuned_dir = tuned_dir(&cfg.tuned)?;
    let bundle = Bundle::load_for(&cfg.bundle, &cfg.length, &ctx.device)?;
    let (base, tuned) = (bundle.diffusion.base()?, bundle.tuned(&tuned_dir)?);
    let (embedder, mut rewards) = rewards_of(&cfg.embed, &cfg.metrics, Some(&bundle), ctx)?;
    embedder.try_out(&rewards, &bundle)?;
    let mut meter = Meter::new(ctx.progress, 2 * prompts.len(), 0, 1.0, "songs");
    let texts = TextCache::default();
    let sampling = Sampling { bundle: &bundle, texts: &texts, sampler: &cfg.sampler, batch: cfg.batch };
    let generator = Generator { cfg, sampling, embedder: &embedder, rewards: &rewards, ctx };
    let systems = [
        generator.system(base.as_ref(), &prompts, 0, &mut meter)?,
        generator.system(tuned.as_ref(), &prompts, prompts.len(), &mut meter)?,
    ];
    meter.finish();
    let songs =
        prompts.iter().map(|p| SongResult { id: p.id.clone(), caption: Some(p.caption.clone()) }).collect();
    let names = ["base".to_owned(), "tuned".to_owned()];
    let comparison = Comparison {
        metrics: &cfg.metrics,
        rewards: &mut rewards,
        bootstrap: cfg.bootstrap,
        seed: cfg.seed,
        paired: true,
    };
    let mut summary = comparison.summary(&systems, songs, names)?;
    summary.inputs_sha256 = inputs_sha256(cfg)?;
    let mut page = page(&summary, &systems, "Tuned against base");
    page.facts = vec![
        ("command".into(), ctx.command.clone()),
        ("commit".into(), ctx.commit.clone()),
        ("base".into(), cfg.bundle.display().to_string()),
        ("tuned".into(), tuned_dir.display().to_string()),
        (
            "prompts".into(),
            format!("{} of `{}`, not tuned on unless split is train", prompts.len(), cfg.prompts.display()),
        ),
        ("sampler".into(), as_in_config(&cfg.sampler)),
        ("seed".into(), cfg.seed.to_string()),
    ];
    if let Some(run) = tuned_dir.parent().map(|dir| dir.join("metrics.jsonl")).filter(|path| path.exists()) {
        let log = read_log(&run)?;
        page.facts.extend(training_warnings(&log));
        page.charts.splice(0..0, training_charts(&log));
    }
    write(&summary, &page, &systems, ctx)?;
    Ok(summary)
}

/// The summary in `dir`, if it is there and of this evaluation: the same config and the same tuned weights.
///
/// # Errors
/// If a file cannot be read.
pub fn known(cfg: &EvalConfig, dir: &Path) -> Result<Option<Summary>> {
    let path = dir.join("report.json");
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let Ok(summary) = serde_json::from_slice::<Summary>(&text) else { return Ok(None) };
    Ok((summary.inputs_sha256 == inputs_sha256(cfg)?).then_some(summary))
}

fn inputs_sha256(cfg: &EvalConfig) -> Result<String> {
    // Where the weights lie and how many songs are sampled at a time change no number.
    let config = EvalConfig { tuned: PathBuf::new(), batch: 0, ..cfg.clone() };
    let mut config = serde_json::to_vec(&config).map_err(|err| Error::Bug(err.to_string()))?;
    if cfg.metrics.iter().any(|metric| matches!(metric.reward, RewardConfig::WeightedSum { .. })) {
        config.extend(b"on the base's scale"); // reports of before had no scale
    }
    let dir = tuned_dir(&cfg.tuned)?;
    let path = weights_path(&dir).unwrap_or(dir);
    let weights = std::fs::read(&path).map_err(Error::io("read", &path))?;
    Ok(hex(&Sha256::new().chain_update(config).chain_update(weights).finalize()))
}

/// Measures two folders of audio against each other; writes `report.json` and `report.html` to `ctx.out_dir`.
///
/// # Errors
/// As [`run`].
pub fn run_folders(cfg: &FoldersConfig, ctx: &RunContext) -> Result<Summary> {
    check_metrics(&cfg.metrics, &cfg.embed, cfg.bootstrap)?;
    let (files, paired) = files_of(cfg)?;
    let prompts = match &cfg.prompts {
        Some(path) => Some(bundle::read_prompts(path)?),
        None => None,
    };
    let bundle = match &cfg.bundle {
        Some(dir) => Some(Bundle::load(dir, &ctx.device)?),
        None => None,
    };
    let (embedder, mut rewards) = rewards_of(&cfg.embed, &cfg.metrics, bundle.as_ref(), ctx)?;
    let needs_text = cfg.metrics.iter().any(|m| m.reward.sources().iter().any(|s| m.reward.needs_text(s)));
    let mut meter = Meter::new(ctx.progress, files[0].len() + files[1].len(), 0, 1.0, "songs");
    let listener = Listener {
        cfg,
        needs_text,
        prompts: prompts.as_deref(),
        bundle: bundle.as_ref(),
        embedder: &embedder,
        rewards: &rewards,
        ctx,
    };
    let systems =
        [listener.system(&files[0], 0, &mut meter)?, listener.system(&files[1], files[0].len(), &mut meter)?];
    meter.finish();
    let songs = files[0]
        .iter()
        .map(|file| SongResult {
            id: file.strip_prefix(&cfg.base).unwrap_or(file).display().to_string(),
            caption: None,
        })
        .collect();
    let names = [&cfg.base, &cfg.tuned].map(|dir| dir.display().to_string());
    let comparison = Comparison {
        metrics: &cfg.metrics,
        rewards: &mut rewards,
        bootstrap: cfg.bootstrap,
        seed: cfg.seed,
        paired,
    };
    let summary = comparison.summary(&systems, songs, names)?;
    let mut page = page(&summary, &systems, "Two folders of audio");
    page.facts = vec![
        ("command".into(), ctx.command.clone()),
        ("base".into(), format!("{} ({} songs)", summary.base, systems[0].songs.len())),
        ("tuned".into(), format!("{} ({} songs)", summary.tuned, systems[1].songs.len())),
        (
            "pairs".into(),
            if paired { "songs of the same name".into() } else { "none: no common names".into() },
        ),
        ("seed".into(), cfg.seed.to_string()),
    ];
    write(&summary, &page, &[], ctx)?;
    Ok(summary)
}

/// All metrics as one reward set with shared embeddings.
fn rewards_of(
    embed: &EmbedConfig,
    metrics: &[MetricConfig],
    bundle: Option<&Bundle>,
    ctx: &RunContext,
) -> Result<(Embedder, RewardSet)> {
    let all =
        RewardConfig::RandomMix { rewards: metrics.iter().map(|metric| metric.reward.clone()).collect() };
    let embedder = Embedder::load(embed, &all.sources(), &ctx.device)?;
    let rewards = embedder.reward(&all, bundle, ctx)?;
    Ok((embedder, rewards))
}
