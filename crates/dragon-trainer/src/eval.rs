//! Measuring: a tuned model against its base on held-out prompts, or two folders of audio against each other
//! (paper 5.1, B.4).
//!
//! Both systems answer the same prompts from the same noise. A reward of songs gives an instance-wise win rate with a
//! Clopper-Pearson interval; every reward gives its value on all songs and a win rate over random subsets.

use std::fs;
use std::path::{Path, PathBuf};

use dragon_audio::{Clip, SampleFormat};
use dragon_diffusion::{Model, SamplerConfig};
use dragon_metrics::bootstrap::percentile;
use dragon_metrics::{Better, WinRate, bootstrap_indices, win_rate};
use dragon_rewards::{Reward, RewardConfig, RewardSet, Song};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::bundle::{self, Bundle, Prompt, Split};
use crate::embed;
use crate::embedder::{Batch, EmbedConfig, Embedder};
use crate::error::{Error, Result};
use crate::generate::{model_of, slug, tuned_dir};
use crate::report;
use crate::rollout::{self, TextCache};
use crate::run::{Meter, RunContext, write_atomic};

/// Everything an evaluation depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// Seed of the prompts' noise and of the subsets.
    pub seed: u64,
    /// Model folder with the base model.
    pub bundle: PathBuf,
    /// Folder of the tuned diffusion model, or of the run that made it.
    pub tuned: PathBuf,
    /// Prompt file.
    pub prompts: PathBuf,
    /// Which of its prompts; `test` was not tuned on.
    pub split: Split,
    /// How many of them, from the start of the file.
    pub n_prompts: usize,
    /// How latents are sampled; paper: 40 steps.
    pub sampler: SamplerConfig,
    /// Songs sampled at a time; bounds memory and changes no number.
    pub batch: usize,
    /// Encoders and settings that the metrics name.
    pub embed: EmbedConfig,
    /// What is measured; the first is the target.
    pub metrics: Vec<MetricConfig>,
    /// Subsets for the win rates of sets.
    pub bootstrap: BootstrapConfig,
    /// Prompts whose audio goes to `samples/` and into the report.
    pub examples: usize,
}

/// A named metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricConfig {
    /// Its name in tables.
    pub name: String,
    /// The reward that computes it; not a `random_mix`.
    pub reward: RewardConfig,
}

/// Random subsets of songs, drawn with replacement, the same for both systems.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootstrapConfig {
    /// How many; paper 1000.
    pub subsets: usize,
    /// Songs in each; paper 40.
    pub songs: usize,
}

/// Two folders of audio to compare.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FoldersConfig {
    /// Seed of the subsets.
    pub seed: u64,
    /// The first folder, in the role of the base.
    pub base: PathBuf,
    /// The second folder. Songs of the same path inside both folders answer the same prompt.
    pub tuned: PathBuf,
    /// Model folder, needed for metrics on its VAE's latents only.
    pub bundle: Option<PathBuf>,
    /// Prompt file whose ids are the files' names without ending, needed for the CLAP score only.
    pub prompts: Option<PathBuf>,
    /// Encoders and settings that the metrics name.
    pub embed: EmbedConfig,
    /// What is measured; the first is the target.
    pub metrics: Vec<MetricConfig>,
    /// Subsets for the win rates of sets.
    pub bootstrap: BootstrapConfig,
    /// Songs that go into the report.
    pub examples: usize,
}

/// What an evaluation found; written to `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Name of the first system.
    pub base: String,
    /// Name of the second system.
    pub tuned: String,
    /// Songs of each system.
    pub n_songs: usize,
    /// One entry a metric, the target first.
    pub metrics: Vec<MetricResult>,
    /// Numbers that are no reward but show when one is hacked.
    pub monitors: Vec<Monitor>,
    /// One entry a song.
    pub songs: Vec<SongResult>,
}

/// A metric of both systems. Distances are printed as distances: lower is better for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricResult {
    /// Its name.
    pub name: String,
    /// The reward that computed it.
    pub reward: String,
    /// Whether it is a distance.
    pub lower_is_better: bool,
    /// Value of the base: the mean over songs, or that of the whole set.
    pub base: f64,
    /// Value of the tuned model.
    pub tuned: f64,
    /// 95 % interval of `tuned - base` over the subsets, scaled to the number of songs only by the subsets' own size.
    pub difference_95: (f64, f64),
    /// Share of the songs on which the tuned model is better; `None` for a metric of sets, or songs without partners.
    pub song_win_rate: Option<WinRate>,
    /// Share of the subsets on which the tuned model is better.
    pub set_win_rate: f64,
    /// Mean difference over the standard deviation of the base's songs, positive where tuned is better.
    pub effect_size: Option<f64>,
    /// Values of the base's songs.
    pub base_songs: Option<Vec<f64>>,
    /// Values of the tuned model's songs.
    pub tuned_songs: Option<Vec<f64>>,
}

/// Means of a number over all songs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Monitor {
    /// Its name and unit.
    pub name: String,
    /// Mean over the base's songs.
    pub base: f64,
    /// Mean over the tuned model's songs.
    pub tuned: f64,
}

/// One song of the evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SongResult {
    /// Id of the prompt, or path of the file in its folder.
    pub id: String,
    /// The prompt, if there is one.
    pub caption: Option<String>,
}

/// The songs of one system.
struct System {
    songs: Vec<Song>,
    /// Loudness in LUFS, level in dBFS and spectral centroid in Hz of each song.
    monitors: Vec<[f64; 3]>,
    examples: Vec<Clip>,
}

impl EvalConfig {
    /// Checks everything that can be checked before weights are read.
    ///
    /// # Errors
    /// For the first key that cannot work.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("n_prompts", self.n_prompts, 2),
            ("batch", self.batch, 1),
            ("sampler.n_steps", self.sampler.n_steps, 1),
        ];
        for (key, value, least) in counts {
            if value < least {
                return Err(Error::config(key, format!("at least {least}"), value));
            }
        }
        self.sampler.guidance.check().map_err(Error::input("sampler.guidance"))?;
        check_metrics(&self.metrics, &self.embed, self.bootstrap)
    }
}

fn check_metrics(metrics: &[MetricConfig], embed: &EmbedConfig, bootstrap: BootstrapConfig) -> Result<()> {
    if metrics.is_empty() {
        return Err(Error::config("metrics", "at least one metric", "none"));
    }
    for (key, value) in [("bootstrap.subsets", bootstrap.subsets), ("bootstrap.songs", bootstrap.songs)] {
        if value < 2 {
            return Err(Error::config(key, "at least 2", value));
        }
    }
    for metric in metrics {
        if matches!(metric.reward, RewardConfig::RandomMix { .. }) {
            return Err(Error::config("metrics.reward.kind", "one reward a metric", "random_mix"));
        }
    }
    embed.check(metrics.iter().map(|metric| &metric.reward))
}

/// Measures a tuned model against its base; writes `report.json`, `report.html` and `samples/` to `ctx.out_dir`.
///
/// # Errors
/// If the config cannot work, a file is missing or broken, a song cannot be scored, or `ctx.stop` was set.
pub fn run(cfg: &EvalConfig, ctx: &RunContext) -> Result<Summary> {
    cfg.check()?;
    let prompts = bundle::prompts_of(&cfg.prompts, cfg.split, cfg.n_prompts)?;
    let prompts = &prompts[..cfg.n_prompts];
    let tuned = tuned_dir(&cfg.tuned)?;
    let bundle = Bundle::load(&cfg.bundle, &ctx.device)?;
    let models = [bundle.base_model()?, model_of(&bundle, Some(&tuned))?];
    let (embedder, rewards) = rewards_of(&cfg.embed, &cfg.metrics, Some(&bundle), ctx)?;
    let mut meter = Meter::new(ctx.progress, 2 * prompts.len(), 0, 1.0, "songs");
    let texts = TextCache::default();
    let mut systems = Vec::with_capacity(2);
    for (i, model) in models.iter().enumerate() {
        let generator =
            Generator { cfg, bundle: &bundle, embedder: &embedder, rewards: &rewards, texts: &texts, ctx };
        systems.push(generator.system(model, prompts, i * prompts.len(), &mut meter)?);
    }
    meter.finish();
    let songs =
        prompts.iter().map(|p| SongResult { id: p.id.clone(), caption: Some(p.caption.clone()) }).collect();
    let names = ["base".to_owned(), "tuned".to_owned()];
    let summary = compare(&cfg.metrics, &rewards, cfg.bootstrap, cfg.seed, &systems, songs, names, true)?;
    let mut page = page(&summary, &systems, "Tuned against base");
    page.facts = vec![
        ("command".into(), ctx.command.clone()),
        ("commit".into(), ctx.commit.clone()),
        ("base".into(), cfg.bundle.display().to_string()),
        ("tuned".into(), tuned.display().to_string()),
        (
            "prompts".into(),
            format!("{} of `{}`, not tuned on unless split is train", prompts.len(), cfg.prompts.display()),
        ),
        ("sampler".into(), format!("{:?}, {} steps", cfg.sampler.solver, cfg.sampler.n_steps)),
        ("seed".into(), cfg.seed.to_string()),
    ];
    if let Some(run) = tuned.parent().map(|dir| dir.join("metrics.jsonl")).filter(|path| path.exists()) {
        page.charts.splice(0..0, training_charts(&run)?);
    }
    write(&summary, &page, &systems, ctx)?;
    Ok(summary)
}

/// Measures two folders of audio against each other; writes `report.json` and `report.html` to `ctx.out_dir`.
///
/// # Errors
/// As [`run`].
pub fn run_folders(cfg: &FoldersConfig, ctx: &RunContext) -> Result<Summary> {
    check_metrics(&cfg.metrics, &cfg.embed, cfg.bootstrap)?;
    let folders = [&cfg.base, &cfg.tuned];
    let mut files = [embed::audio_files(&cfg.base)?, embed::audio_files(&cfg.tuned)?];
    let names: Vec<Vec<PathBuf>> = files
        .iter()
        .zip(folders)
        .map(|(files, dir)| {
            files.iter().map(|f| f.strip_prefix(dir).unwrap_or(f).with_extension("")).collect()
        })
        .collect();
    // Songs with partners are compared one to one; folders without common names as two sets.
    let common: Vec<PathBuf> = names[0].iter().filter(|name| names[1].contains(name)).cloned().collect();
    let paired = common.len() >= 2;
    if paired {
        for (files, names) in files.iter_mut().zip(&names) {
            let dropped = files.len() - common.len();
            if dropped > 0 {
                tracing::warn!(
                    "{dropped} files of `{}` have no partner and are left out",
                    files[0].display()
                );
            }
            *files = common
                .iter()
                .filter_map(|c| names.iter().position(|n| n == c).map(|i| files[i].clone()))
                .collect();
        }
    }
    let captions = match &cfg.prompts {
        Some(path) => Some(bundle::read_prompts(path)?),
        None => None,
    };
    let bundle = match &cfg.bundle {
        Some(dir) => Some(Bundle::load(dir, &ctx.device)?),
        None => None,
    };
    let (embedder, rewards) = rewards_of(&cfg.embed, &cfg.metrics, bundle.as_ref(), ctx)?;
    let needs_text = cfg.metrics.iter().any(|m| m.reward.sources().iter().any(|s| m.reward.needs_text(s)));
    let mut meter = Meter::new(ctx.progress, files[0].len() + files[1].len(), 0, 1.0, "songs");
    let mut systems = Vec::with_capacity(2);
    let mut done = 0;
    for files in &files {
        let mut system = System { songs: Vec::new(), monitors: Vec::new(), examples: Vec::new() };
        for file in files {
            if ctx.stopped() {
                return Err(stopped());
            }
            let audio = dragon_audio::read(file).map_err(Error::input("cannot read a song"))?;
            let clip = audio.to_mono();
            let caption = match (&captions, needs_text) {
                (_, false) => None,
                (captions, true) => Some(caption_of(file, captions.as_deref())?),
            };
            let captions = caption.as_deref().map(|c| vec![c]);
            let clips = [clip.samples];
            let batch = Batch {
                clips: &clips,
                sample_rate_hz: clip.sample_rate_hz,
                latents: None,
                captions: captions.as_deref(),
                bundle: bundle.as_ref(),
            };
            let context = format!("cannot embed `{}`", file.display());
            let songs = embedder.songs(rewards.sources(), &batch).map_err(Error::input(context))?;
            system.songs.extend(songs);
            system.monitors.push(monitors_of(&clips[0], clip.sample_rate_hz));
            if system.examples.len() < cfg.examples {
                let [samples] = clips;
                system.examples.push(Clip { samples, sample_rate_hz: clip.sample_rate_hz });
            }
            done += 1;
            meter.update(done, &[], &[], false);
        }
        systems.push(system);
    }
    meter.finish();
    let songs = files[0]
        .iter()
        .map(|file| SongResult {
            id: file.strip_prefix(&cfg.base).unwrap_or(file).display().to_string(),
            caption: None,
        })
        .collect();
    let names = folders.map(|dir| dir.display().to_string());
    let summary = compare(&cfg.metrics, &rewards, cfg.bootstrap, cfg.seed, &systems, songs, names, paired)?;
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

fn caption_of(file: &Path, prompts: Option<&[Prompt]>) -> Result<String> {
    let id = file.file_stem().unwrap_or_default().to_string_lossy();
    let found = prompts.and_then(|prompts| prompts.iter().find(|p| p.id == id));
    found.map(|p| p.caption.clone()).ok_or_else(|| Error::Data {
        problem: format!(
            "a metric needs the prompt of `{}`, and no prompt has the id `{id}`",
            file.display()
        ),
        hint: "name a prompt file whose ids are the files' names, or leave the CLAP score out".into(),
    })
}

fn stopped() -> Error {
    Error::Data {
        problem: "stopped before the end".into(),
        hint: "nothing was written; start the command again".into(),
    }
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

/// What generating the songs of a system takes.
struct Generator<'a> {
    cfg: &'a EvalConfig,
    bundle: &'a Bundle,
    embedder: &'a Embedder,
    rewards: &'a RewardSet,
    texts: &'a TextCache,
    ctx: &'a RunContext,
}

impl Generator<'_> {
    fn system(&self, model: &Model, prompts: &[Prompt], before: usize, meter: &mut Meter) -> Result<System> {
        let mut system = System { songs: Vec::new(), monitors: Vec::new(), examples: Vec::new() };
        let rate = self.bundle.sample_rate_hz();
        for part in prompts.chunks(self.cfg.batch) {
            let captions: Vec<&str> = part.iter().map(|p| p.caption.as_str()).collect();
            let keys: Vec<(&str, u64)> = captions.iter().map(|&caption| (caption, self.cfg.seed)).collect();
            let noise = rollout::noise(self.bundle, &keys)?;
            let cond = self.texts.get(self.bundle, &captions)?;
            let sampler = &self.cfg.sampler;
            let latents =
                rollout::latents(model, &cond, &noise, sampler, self.cfg.batch, self.ctx, &captions)?
                    .ok_or_else(stopped)?;
            let clips = self.bundle.decode(&latents)?;
            let batch = Batch {
                clips: &clips,
                sample_rate_hz: rate,
                latents: Some(&latents),
                captions: Some(&captions),
                bundle: Some(self.bundle),
            };
            system.songs.extend(self.embedder.songs(self.rewards.sources(), &batch)?);
            system.monitors.par_extend(clips.par_iter().map(|clip| monitors_of(clip, rate)));
            for samples in clips {
                if system.examples.len() < self.cfg.examples {
                    system.examples.push(Clip { samples, sample_rate_hz: rate });
                }
            }
            meter.update(before + system.songs.len(), &[], &[], false);
        }
        Ok(system)
    }
}

fn monitors_of(samples: &[f32], sample_rate_hz: u32) -> [f64; 3] {
    // Silence has no loudness; -120 keeps the means numbers.
    [
        dragon_audio::lufs(&[samples], sample_rate_hz).max(-120.0),
        dragon_audio::rms_dbfs(samples).max(-120.0),
        dragon_audio::spectral_centroid_hz(samples, sample_rate_hz),
    ]
}

#[allow(clippy::too_many_arguments)] // the parts of two evaluations that differ in how songs are made
fn compare(
    metrics: &[MetricConfig],
    rewards: &RewardSet,
    bootstrap: BootstrapConfig,
    seed: u64,
    systems: &[System],
    songs: Vec<SongResult>,
    names: [String; 2],
    paired: bool,
) -> Result<Summary> {
    let failed = |err: dragon_metrics::Error| Error::input("cannot compare the systems")(err);
    let sizes: Vec<usize> = systems.iter().map(|system| system.songs.len()).collect();
    let subsets: Vec<Vec<Vec<usize>>> = sizes
        .iter()
        .enumerate()
        // Unpaired systems draw their own subsets.
        .map(|(i, &n)| {
            bootstrap_indices(seed + if paired { 0 } else { i as u64 }, bootstrap.subsets, bootstrap.songs, n)
        })
        .collect::<std::result::Result<_, _>>()
        .map_err(failed)?;
    let all: Vec<Vec<&Song>> = systems.iter().map(|system| system.songs.iter().collect()).collect();
    let mut results = Vec::with_capacity(metrics.len());
    for (i, metric) in metrics.iter().enumerate() {
        let reward = rewards.get(i).ok_or_else(|| Error::Bug(format!("no reward {i}")))?;
        let refused = |err: dragon_rewards::Error| Error::input(format!("metric `{}`", metric.name))(err);
        let full: Vec<f64> = all
            .iter()
            .map(|songs| reward.set_score(songs))
            .collect::<std::result::Result<_, _>>()
            .map_err(refused)?;
        let scores: Vec<Option<Vec<f64>>> = all
            .iter()
            .map(|songs| reward.song_scores(songs))
            .collect::<std::result::Result<_, _>>()
            .map_err(refused)?;
        let on_subsets: Vec<Vec<f64>> = (0..2)
            .map(|s| match &scores[s] {
                Some(scores) => Ok(subsets[s].iter().map(|members| mean_of(scores, members)).collect()),
                None => subset_scores(reward, &all[s], &subsets[s]).map_err(refused),
            })
            .collect::<Result<_>>()?;
        let sign = if is_distance(&metric.reward) { -1.0 } else { 1.0 };
        let differences: Vec<f64> =
            on_subsets[1].iter().zip(&on_subsets[0]).map(|(t, b)| sign * (t - b)).collect();
        let set_win_rate = win_rate(&on_subsets[1], &on_subsets[0], Better::Higher).map_err(failed)?.rate;
        let (mut song_win_rate, mut effect_size) = (None, None);
        if let (Some(base), Some(tuned)) = (&scores[0], &scores[1]) {
            if paired {
                song_win_rate = Some(win_rate(tuned, base, Better::Higher).map_err(failed)?);
            }
            let (mean, n) = (base.iter().sum::<f64>() / base.len() as f64, base.len() as f64);
            let std = (base.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
            effect_size = (std > 0.0).then(|| (full[1] - full[0]) / std);
        }
        let printed =
            |scores: &Option<Vec<f64>>| scores.as_ref().map(|s| s.iter().map(|x| sign * x).collect());
        results.push(MetricResult {
            name: metric.name.clone(),
            reward: metric.reward.label(),
            lower_is_better: sign < 0.0,
            base: sign * full[0],
            tuned: sign * full[1],
            difference_95: (
                percentile(&differences, 0.025).map_err(failed)?,
                percentile(&differences, 0.975).map_err(failed)?,
            ),
            song_win_rate,
            set_win_rate,
            effect_size,
            base_songs: printed(&scores[0]),
            tuned_songs: printed(&scores[1]),
        });
    }
    let mean = |s: usize, k: usize| systems[s].monitors.iter().map(|m| m[k]).sum::<f64>() / sizes[s] as f64;
    let monitors = ["loudness, LUFS", "level, dBFS", "spectral centroid, Hz"]
        .iter()
        .enumerate()
        .map(|(k, name)| Monitor { name: (*name).to_owned(), base: mean(0, k), tuned: mean(1, k) })
        .collect();
    let [base, tuned] = names;
    Ok(Summary { base, tuned, n_songs: sizes[0], metrics: results, monitors, songs })
}

fn mean_of(scores: &[f64], members: &[usize]) -> f64 {
    members.iter().map(|&m| scores[m]).sum::<f64>() / members.len().max(1) as f64
}

/// A reward of sets on many subsets, in parallel, in order.
fn subset_scores(
    reward: &Reward,
    songs: &[&Song],
    subsets: &[Vec<usize>],
) -> std::result::Result<Vec<f64>, dragon_rewards::Error> {
    let one = |members: &Vec<usize>| reward.set_score(&members.iter().map(|&m| songs[m]).collect::<Vec<_>>());
    let scores: Vec<std::result::Result<f64, _>> = subsets.par_iter().map(one).collect();
    scores.into_iter().collect()
}

fn is_distance(reward: &RewardConfig) -> bool {
    matches!(reward, RewardConfig::PerSongFad { .. } | RewardConfig::DatasetFad { .. })
}

impl Summary {
    /// The target's result.
    pub fn target(&self) -> &MetricResult {
        &self.metrics[0]
    }

    /// The table for a terminal.
    pub fn table(&self) -> String {
        let (head, rows) = self.cells();
        let all: Vec<&Vec<String>> = std::iter::once(&head).chain(&rows).collect();
        let widths: Vec<usize> = (0..head.len())
            .map(|c| all.iter().map(|row| row[c].chars().count()).max().unwrap_or(0))
            .collect();
        let mut out = String::new();
        for row in all {
            for (c, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[c] - cell.chars().count());
                out.push_str(&if c == 0 { format!("{cell}{pad}") } else { format!("  {pad}{cell}") });
            }
            while out.ends_with(' ') {
                out.pop();
            }
            out.push('\n');
        }
        out
    }

    /// Head and rows of the table of metrics and monitors.
    fn cells(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let head = [
            "metric",
            "better",
            "base",
            "tuned",
            "difference",
            "95 % of subsets",
            "songs won (95 %)",
            "sets won",
        ];
        let mut rows = Vec::new();
        for m in &self.metrics {
            let won = m.song_win_rate.as_ref().map_or("-".to_owned(), |w| {
                format!("{:.1} % ({:.1} to {:.1})", 100.0 * w.rate, 100.0 * w.lower, 100.0 * w.upper)
            });
            rows.push(vec![
                m.name.clone(),
                if m.lower_is_better { "lower" } else { "higher" }.to_owned(),
                number(m.base),
                number(m.tuned),
                format!("{:+}", Short(m.tuned - m.base)),
                format!("{:+} to {:+}", Short(m.difference_95.0), Short(m.difference_95.1)),
                won,
                format!("{:.1} %", 100.0 * m.set_win_rate),
            ]);
        }
        for m in &self.monitors {
            let difference = format!("{:+}", Short(m.tuned - m.base));
            let cells = [
                m.name.clone(),
                "-".into(),
                number(m.base),
                number(m.tuned),
                difference,
                "-".into(),
                "-".into(),
                "-".into(),
            ];
            rows.push(cells.into());
        }
        (head.map(str::to_owned).into(), rows)
    }
}

/// Four significant digits.
struct Short(f64);

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = (3 - self.0.abs().max(1e-9).log10().floor() as i32).clamp(0, 6) as usize;
        if f.sign_plus() { write!(f, "{:+.digits$}", self.0) } else { write!(f, "{:.digits$}", self.0) }
    }
}

pub(crate) fn number(value: f64) -> String {
    Short(value).to_string()
}

/// The report without the facts of its command.
fn page(summary: &Summary, systems: &[System], title: &str) -> report::Report {
    let target = summary.target();
    let (head, rows) = summary.cells();
    let won = target.song_win_rate.as_ref().map_or(String::new(), |w| {
        format!(
            " It wins {} of {} songs ({:.1} %, 95 % interval {:.1} to {:.1} %).",
            w.wins,
            w.n,
            100.0 * w.rate,
            100.0 * w.lower,
            100.0 * w.upper
        )
    });
    let lead = format!(
        "{}: {} for {}, {} for {}; {} is better.{won}",
        target.name,
        number(target.base),
        summary.base,
        number(target.tuned),
        summary.tuned,
        if target.lower_is_better { "lower" } else { "higher" }
    );
    let charts = summary
        .metrics
        .iter()
        .filter_map(|m| match (&m.base_songs, &m.tuned_songs) {
            (Some(base), Some(tuned)) => Some(report::Chart::Histogram {
                title: format!("{} of the songs", m.name),
                x_label: m.name.clone(),
                series: vec![(summary.base.clone(), base.clone()), (summary.tuned.clone(), tuned.clone())],
            }),
            _ => None,
        })
        .collect();
    let n = systems.iter().map(|s| s.examples.len()).min().unwrap_or(0);
    let note = |songs: &Option<Vec<f64>>, i: usize| {
        songs
            .as_ref()
            .and_then(|s| s.get(i))
            .map_or(String::new(), |v| format!("{} {}", target.name, number(*v)))
    };
    let take = |s: usize, i: usize, label: &str, note: String| report::Take {
        label: label.to_owned(),
        samples: systems[s].examples[i].samples.clone(),
        sample_rate_hz: systems[s].examples[i].sample_rate_hz,
        note,
    };
    let songs = (0..n)
        .map(|i| {
            let song = &summary.songs[i];
            report::Song {
                caption: song.caption.clone().unwrap_or_else(|| song.id.clone()),
                takes: vec![
                    take(0, i, &summary.base, note(&target.base_songs, i)),
                    take(1, i, &summary.tuned, note(&target.tuned_songs, i)),
                ],
            }
        })
        .collect();
    let table = report::Table {
        title: "Metrics".into(),
        note: "Songs won: prompts on which the tuned model is better, with a Clopper-Pearson interval. Sets won: random \
               subsets, drawn with replacement, the same for both. The last rows are no reward: they show hacking."
            .into(),
        head,
        rows,
    };
    report::Report { title: title.into(), lead, facts: Vec::new(), tables: vec![table], charts, songs }
}

/// Curves of the run that made a tuned model.
fn training_charts(path: &Path) -> Result<Vec<report::Chart>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let lines: Vec<serde_json::Value> =
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let series = |name: &str, label: &str| report::Series {
        name: label.to_owned(),
        points: lines
            .iter()
            .filter_map(|line| Some((line.get("step")?.as_f64()?, line.get(name)?.as_f64()?)))
            .collect(),
    };
    let chart = |title: &str, y_label: &str, log_y: bool, names: &[(&str, &str)]| {
        let series: Vec<report::Series> =
            names.iter().map(|(name, label)| series(name, label)).filter(|s| !s.points.is_empty()).collect();
        (!series.is_empty()).then(|| report::Chart::Lines {
            title: title.into(),
            x_label: "step".into(),
            y_label: y_label.into(),
            series,
            log_y,
        })
    };
    let charts = [
        chart(
            "Reward while learning",
            "reward",
            false,
            &[("reward", "policy"), ("reward_plus", "D+"), ("reward_minus", "D-")],
        ),
        chart(
            "Reward on validation prompts",
            "reward",
            false,
            &[("valid/reward", "tuned"), ("valid/reward_base", "base")],
        ),
        chart("Loss", "loss", false, &[("loss", "loss")]),
        chart("Implicit accuracy", "share", false, &[("implicit_accuracy", "g+ above g-")]),
        chart(
            "Size of the gaps",
            "|beta g|",
            true,
            &[("beta_gap_q10", "10 %"), ("beta_gap_q50", "median"), ("beta_gap_q90", "90 %")],
        ),
        chart(
            "Denoising errors",
            "weighted error",
            false,
            &[
                ("error_policy_plus", "policy, D+"),
                ("error_reference_plus", "reference, D+"),
                ("error_policy_minus", "policy, D-"),
                ("error_reference_minus", "reference, D-"),
            ],
        ),
        chart("Gradient norm", "norm before clipping", true, &[("grad_norm", "norm")]),
        chart("Level of the generations", "dBFS", false, &[("loudness_dbfs", "level")]),
        chart("Brightness of the generations", "Hz", false, &[("centroid_hz", "spectral centroid")]),
    ];
    Ok(charts.into_iter().flatten().collect())
}

/// Writes `report.json`, `report.html` and the examples of the systems.
fn write(summary: &Summary, page: &report::Report, systems: &[System], ctx: &RunContext) -> Result<()> {
    let dir = &ctx.out_dir;
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let samples = dir.join("samples");
    for (system, label) in systems.iter().zip(["base", "tuned"]) {
        for (i, clip) in system.examples.iter().enumerate() {
            fs::create_dir_all(&samples).map_err(Error::io("create", &samples))?;
            let song = &summary.songs[i];
            let name = slug(song.caption.as_deref().unwrap_or(&song.id));
            let path = samples.join(format!("{i:03}-{name}.{label}.wav"));
            dragon_audio::write_wav(&path, clip, SampleFormat::Int16)
                .map_err(Error::input("cannot write audio"))?;
        }
    }
    let json = serde_json::to_vec_pretty(summary).map_err(|err| Error::Bug(err.to_string()))?;
    write_atomic(&dir.join("report.json"), &json)?;
    page.write(&dir.join("report.html"))
}
