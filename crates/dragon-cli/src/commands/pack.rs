//! `dragon pack`: trained parts to one model folder.

use std::path::PathBuf;

use anyhow::{Context, Result};
use dragon_trainer::pack::copy_part;

/// Put trained parts together into one model folder, weights in f16
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  dragon pack --vae runs/pretrain-vae/model --dit runs/pretrain-dit/model --clap runs/pretrain-clap/model --out my-model")]
pub struct Args {
    /// Model folder of `pretrain vae`
    #[arg(long)]
    vae: PathBuf,
    /// Model folder of `pretrain dit`: dit/, t5/, bundle.json
    #[arg(long)]
    dit: PathBuf,
    /// Model folder of `pretrain clap`
    #[arg(long)]
    clap: Option<PathBuf>,
    /// Output folder
    #[arg(short, long)]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let mut parts = vec![("vae", args.vae), ("dit", args.dit.join("dit")), ("t5", args.dit.join("t5"))];
    parts.extend(args.clap.map(|dir| ("clap", dir)));
    let info = args.dit.join("bundle.json");
    let text = std::fs::read(&info).with_context(|| format!("cannot read `{}`", info.display()))?;
    let mut sum = 0;
    for (name, from) in parts {
        let bytes = copy_part(&from, &args.out.join(name))?;
        println!("{:>6} KiB  {name}  from {}", bytes / 1024, from.display());
        sum += bytes;
    }
    std::fs::write(args.out.join("bundle.json"), text)
        .with_context(|| format!("cannot write to `{}`", args.out.display()))?;
    println!("{:>6} KiB  {}", sum / 1024, args.out.display());
    Ok(())
}
