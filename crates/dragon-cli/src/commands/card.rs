//! `dragon card`: what the parts of a model folder are worth on held-out music.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use dragon_trainer::card::{self, CardConfig};

use super::{ConfigArgs, context};
use crate::settings;

/// Measure a model folder on held-out music: reconstructions, generations, captions, retrieval
///
/// The distance of the generations to held-out music stands beside that of other real music, of the VAE's round trip,
/// of an untrained network and of decoded noise. Writes card.json and card.html and prints the tables.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon card --data data/scores/manifest.jsonl
  dragon card --data data/scores/manifest.jsonl --model my-model --set n_songs=100 --out runs/card-my-model")]
pub struct Args {
    /// Manifest with the held-out clips, see `dragon data`
    #[arg(long, value_name = "FILE", default_value = "data/scores/manifest.jsonl")]
    data: PathBuf,
    /// Model folder
    #[arg(long, value_name = "DIR", default_value = "builtin:tiny")]
    model: String,
    #[command(flatten)]
    config: ConfigArgs,
    /// Output folder
    #[arg(long, value_name = "DIR", default_value = "runs/card")]
    out: PathBuf,
    /// Print the card as JSON on stdout instead of the tables
    #[arg(long)]
    json: bool,
    /// Where tensors live: `cpu` or `cuda`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let config: CardConfig =
        settings::resolve("card/default", args.config.config.as_deref(), &args.config.overrides())?;
    let mut ctx = context(args.out, false, stop);
    ctx.device = dragon_trainer::device(&args.device)?;
    let card = card::run(&config, &settings::path(&args.model), &args.data, &ctx)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&card)?);
    } else {
        print!("{}", card.text(&config));
        println!("{}", ctx.out_dir.join("card.html").display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preset_is_a_valid_config() {
        let config: CardConfig = settings::resolve("card/default", None, &[]).unwrap();
        config.check().unwrap();
        settings::assert_every_key_is_shown("card/default", |set| {
            settings::resolve::<CardConfig>("card/default", None, set).map(drop)
        });
    }
}
