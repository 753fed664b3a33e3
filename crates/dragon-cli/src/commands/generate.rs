//! `dragon generate`: prompts to WAV files.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use dragon_trainer::generate::{self, GenerateConfig};

use super::context;
use crate::settings;

/// Turn prompts into WAV files
///
/// A prompt's noise comes from a hash of the prompt and the seed: the same prompt gives the same music in every batch.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon generate \"a slow harp melody\" \"a fast jig on a violin with drums\"
  dragon generate --prompts prompts.txt --variants 4 --out songs
  dragon generate \"a slow harp melody\" --tuned runs/finetune-per-song-fad")]
pub struct Args {
    /// The prompts
    prompts: Vec<String>,
    /// A text file with one more prompt a line
    #[arg(long = "prompts", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Model folder: vae/, t5/, dit/, bundle.json
    #[arg(long, value_name = "DIR", default_value = "builtin:tiny")]
    model: String,
    /// Use this tuned diffusion model (or that of this run) instead of the model folder's own
    #[arg(long, value_name = "DIR")]
    tuned: Option<PathBuf>,
    /// Output folder
    #[arg(short, long, value_name = "DIR", default_value = "generated")]
    out: PathBuf,
    /// Variants of each prompt, with seeds SEED, SEED + 1 and so on
    #[arg(long, default_value_t = 1)]
    variants: usize,
    /// Seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Sampling steps
    #[arg(long, default_value_t = 40)]
    steps: usize,
    /// Songs sampled at a time; bounds memory and changes no sample
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Where tensors live: `cpu` or `cuda`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let mut prompts = args.prompts;
    if let Some(file) = &args.file {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read `{}`", file.display()))?;
        prompts.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
    }
    if let Some(i) = prompts.iter().position(|prompt| prompt.trim().is_empty()) {
        bail!("prompt {} is empty\nhint: say what should be heard, e.g. \"a slow harp melody\"", i + 1);
    }
    let mut ctx = context(args.out, false, stop);
    ctx.device = dragon_trainer::device(&args.device)?;
    let mut config = GenerateConfig {
        seed: args.seed,
        bundle: settings::path(&args.model),
        tuned: args.tuned,
        sampler: Default::default(),
        batch: args.batch,
        variants: args.variants,
        prompts,
    };
    config.sampler.n_steps = args.steps;
    for file in generate::run(&config, &ctx)? {
        println!("{}", file.display());
    }
    Ok(())
}
