//! `dragon bench`: how fast the main job's parts are here.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use dragon_trainer::{bench, presto};

use super::{ConfigArgs, context, finetune};

/// Time the parts of a fine-tuning step on this machine: rollout, decoding, embedding, update, Algorithm 1
///
/// Each part is done several times and the fastest round counts. `cargo xtask bench --peers` compares our layers with
/// PyTorch's instead.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon bench
  dragon bench --rounds 10 --json
  dragon bench --set rollout.sampler.n_steps=40
  dragon bench --presto                              the paper's base model at its size, random weights; 16 GB")]
pub struct Args {
    /// Whose settings: a preset of presets/finetune
    #[arg(long, default_value = "per-song-fad", conflicts_with = "config")]
    preset: String,
    #[command(flatten)]
    config: ConfigArgs,
    /// How often each part is done
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// Build the paper's base model at its size (44.1 kHz, 32 s, a transformer of XL size) with random weights instead: parameters
    /// of its parts, one sampling step, one training step, decoding
    #[arg(long, conflicts_with_all = ["preset", "config", "rounds"])]
    presto: bool,
    /// Print the rows as JSON
    #[arg(long)]
    json: bool,
    /// Where tensors live: `cpu` or `cuda`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    if args.presto {
        return paper_size(&args);
    }
    let config = finetune::config(&args.preset, &args.config)?;
    let mut ctx = context(".".into(), false, stop);
    ctx.device = dragon_trainer::device(&args.device)?;
    let rows = bench::run(&config, args.rounds, &ctx)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let width = rows.iter().map(|row| row.part.chars().count()).max().unwrap_or(0);
    for row in &rows {
        println!(
            "{:width$}  {:>9.1} {}/s  ({:.1} {} in {:.3} s)",
            row.part, row.rate, row.unit, row.amount, row.unit, row.seconds
        );
    }
    Ok(())
}

fn paper_size(args: &Args) -> Result<()> {
    let found = presto::run(&dragon_trainer::device(&args.device)?)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    for (part, n) in &found.parameters {
        println!("{part:40}{:>9.2} M parameters", *n as f64 / 1e6);
    }
    println!("{:40}{:>9.2} M parameters", "all", found.parameters.values().sum::<usize>() as f64 / 1e6);
    println!("{} latent frames", found.n_frames);
    for (step, seconds, peak) in &found.steps {
        let peak =
            peak.map_or(String::new(), |mib| format!(", at most {:.1} GiB resident so far", mib / 1024.0));
        println!("{step}: {seconds:.1} s{peak}");
    }
    Ok(())
}
