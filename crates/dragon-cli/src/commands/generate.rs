//! `dragon generate`: prompts to WAV files.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use dragon_trainer::bundle;
use dragon_trainer::embed::is_audio;
use dragon_trainer::generate::Wanted;

use super::generator::Generator;
use super::{ConfigArgs, context};
use crate::settings;

/// Turn prompts into WAV files
///
/// A prompt's noise comes from a hash of the prompt and the seed: the same prompt gives the same music in every batch.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon generate \"a slow harp melody\" \"a fast jig on a violin with drums\"
  dragon generate --prompts prompts.txt --variants 4 --out songs
  dragon generate \"a slow harp melody\" --tuned runs/finetune-per-song-fad
  dragon generate \"a slow harp melody\" --seed 7 --set sampler.guidance.scale=0.8
  dragon generate \"a slow harp melody\" --model models/stable-audio-open-1.0 --set seconds=20
  dragon generate \"a slow harp melody\" --model models/musicgen-small --set sampler.top_k=50")]
pub struct Args {
    /// The prompts
    prompts: Vec<String>,
    /// More prompts: a text file with one a line, or a prompt file (.jsonl), whose captions are taken
    #[arg(long = "prompts", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Use this tuned diffusion model (or that of this run); short for --set tuned=DIR
    #[arg(long, value_name = "DIR")]
    tuned: Option<PathBuf>,
    /// Model folder: vae/, t5/, dit/, bundle.json, or Stable Audio Open or MusicGen as published; short for --set model=DIR
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Songs of each prompt, with seeds N, N + 1 and so on; short for --set variants=N
    #[arg(long, value_name = "N")]
    variants: Option<usize>,
    /// Sampling steps; short for --set sampler.n_steps=N
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    #[command(flatten)]
    config: ConfigArgs,
    /// Output folder
    #[arg(short, long, value_name = "DIR", default_value = "generated")]
    out: PathBuf,
    /// Where tensors live: `cpu` or `cuda` (`cuda:1` for the second GPU)
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let mut overrides = args.config.overrides();
    overrides.extend(args.model.map(|dir| format!("model={}", settings::quoted(&dir))));
    overrides.extend(args.tuned.map(|dir| format!("tuned={}", settings::quoted(&dir))));
    overrides.extend(args.variants.map(|n| format!("variants={n}")));
    overrides.extend(args.steps.map(|n| format!("sampler.n_steps={n}")));
    let (generator, seed, variants) = Generator::resolve(args.config.path(), &overrides)?;
    let mut prompts = args.prompts;
    if let Some(file) = args.file.as_deref().filter(|file| file.extension().is_some_and(|e| e == "jsonl")) {
        prompts.extend(bundle::read_prompts(file)?.into_iter().map(|prompt| prompt.caption));
    } else if let Some(file) = &args.file {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read `{}`\nhint: check the path", file.display()))?;
        prompts.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
    }
    let mut ctx = context(args.out, false, stop);
    ctx.device = dragon_trainer::device(&args.device)?;
    let wanted = Wanted::variants(&prompts, seed, variants)?;
    let others = others_in(&ctx.out_dir, &wanted);
    if others > 0 {
        tracing::warn!("`{}` holds other songs too, {others} of them, which stay", ctx.out_dir.display());
    }
    for file in generator.run(&wanted, &ctx)? {
        println!("{}", file.display());
    }
    Ok(())
}

/// Songs in the folder that are not among the wanted ones; 0 if it cannot be read.
fn others_in(dir: &Path, wanted: &[Wanted]) -> usize {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let other = |path: &Path| is_audio(path) && !wanted.iter().any(|song| path.ends_with(&song.file));
    entries.filter(|entry| other(&entry.path())).count()
}
