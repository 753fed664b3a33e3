//! The commands, one module each.

mod bench;
mod card;
mod data;
mod embed;
mod eval;
mod fetch;
mod finetune;
mod generate;
mod generator;
mod models;
mod pack;
mod pretrain;
mod reproduce;
mod score;
mod songs;
mod stats;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use dragon_trainer::{Progress, RunContext, bundle};

/// What `dragon` can do.
#[derive(Subcommand)]
pub enum Command {
    /// Make a manifest of music and captions: fetch packages, render scores, import your own files
    #[command(subcommand)]
    Data(data::Command),
    /// Download a published model: CLAP, T5, Stable Audio Open, codecs, MusicGen
    Fetch(fetch::Args),
    /// Train the parts of a text-to-music model: vae, vae-decoder, vae-joint, clap, dit
    Pretrain(pretrain::Args),
    /// Put trained parts together into one model folder, weights in f16
    Pack(pack::Args),
    /// Turn prompts into WAV files
    Generate(generate::Args),
    /// Turn a folder of audio into embeddings
    Embed(embed::Args),
    /// Write reference statistics, mean and covariance, of audio, texts or embeddings
    Stats(stats::Args),
    /// Measure systems against a reference: distances, diversity, intervals, ranks
    Score(score::Args),
    /// Fine-tune the diffusion model towards a reward (DRAGON), then compare it with its base
    Finetune(finetune::Args),
    /// Fine-tune by several presets and print their win rates over the base as the paper's Table 1 does
    Reproduce(reproduce::Args),
    /// Compare a tuned model with its base on held-out prompts, or two folders of audio
    Eval(eval::Args),
    /// Measure a model folder on held-out music: reconstructions, generations, captions, retrieval
    Card(card::Args),
    /// Time the parts of a fine-tuning step on this machine
    Bench(bench::Args),
}

impl Command {
    /// Runs the command to its end, or until `stop` is set.
    pub fn run(self, stop: &Arc<AtomicBool>) -> Result<()> {
        match self {
            Command::Data(command) => data::run(command, stop),
            Command::Fetch(args) => fetch::run(args),
            Command::Pretrain(args) => pretrain::run(args, stop),
            Command::Pack(args) => pack::run(args),
            Command::Generate(args) => generate::run(args, stop),
            Command::Embed(args) => embed::run(args, stop),
            Command::Stats(args) => stats::run(args, stop),
            Command::Score(args) => score::run(args, stop),
            Command::Finetune(args) => finetune::run(args, stop),
            Command::Reproduce(args) => reproduce::run(args, stop),
            Command::Eval(args) => eval::run(args, stop),
            Command::Card(args) => card::run(args, stop),
            Command::Bench(args) => bench::run(args, stop),
        }
    }
}

/// Where the config of something without a seed comes from.
#[derive(Args)]
pub struct FileArgs {
    /// Read this TOML file instead of a preset
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Change one key of the config (docs/config.md lists them); may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

/// Where the config of something random comes from.
#[derive(Args)]
pub struct ConfigArgs {
    /// Read this TOML file instead of a preset
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Change one key of the config (docs/config.md lists them); may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Seed of everything random; short for --set seed=N
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl ConfigArgs {
    /// The overrides in order, `--seed` last.
    fn overrides(&self) -> Vec<String> {
        self.overrides.iter().cloned().chain(self.seed.map(|seed| format!("seed={seed}"))).collect()
    }

    /// The config file, if one is given.
    fn path(&self) -> Option<&Path> {
        self.config.as_deref()
    }
}

/// Where and how a run takes place.
#[derive(Args)]
pub struct RunArgs {
    /// Continue the run in the output folder from its newest checkpoint, bit for bit as if it had not stopped
    #[arg(long)]
    resume: bool,
    /// Where tensors live: `cpu` or `cuda` (`cuda:1` for the second GPU)
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Checks that the model reads every prompt of a file whole.
fn check_prompts(bundle: &Path, file: &Path) -> Result<()> {
    let prompts = bundle::read_prompts(file)?;
    bundle::check_prompts(bundle, [""; 0])?; // the model folder itself
    bundle::check_prompts(bundle, prompts.iter().map(|prompt| &prompt.caption))
        .with_context(|| format!("the prompts of `{}` cannot be used", file.display()))
}

/// The context of a run in `out_dir`, with progress on stderr.
fn context(out_dir: PathBuf, resume: bool, stop: &Arc<AtomicBool>) -> RunContext {
    RunContext {
        stop: stop.clone(),
        resume,
        progress: Progress::auto(),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        ..RunContext::new(out_dir)
    }
}
