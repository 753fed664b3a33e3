//! `dragon finetune`: DRAGON, and the comparison with the base.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use dragon_trainer::eval;
use dragon_trainer::finetune::{self, FinetuneConfig};
use toml::Value;

use super::eval::EvalPreset;
use super::{ConfigArgs, RunArgs, check_prompts, context};
use crate::settings;

/// Fine-tune the diffusion model towards a reward (DRAGON), then compare it with its base
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon finetune                                    the default: per-song FAD (musicnn) to recorded music
  dragon finetune --set run.steps=60 --out runs/longer
  dragon finetune --set reward.exemplars.kind=audio --set reward.exemplars.path=my-songs
  dragon finetune --resume                           continue where it stopped")]
pub struct Args {
    /// What to optimise: a preset of presets/finetune
    #[arg(long, default_value = "per-song-fad")]
    preset: String,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Run folder: run.toml, metrics.jsonl, checkpoints/, model/, report.html [default: runs/finetune-PRESET]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// A fine-tuning preset: the config of the run, and how its result is measured.
#[derive(Debug)]
struct Preset {
    finetune: FinetuneConfig,
    eval: EvalPreset,
}

/// Reads a preset: the table `eval` is the evaluation, the rest the run. What both need is written once: the encoders
/// of `[embed]` and the seed hold for the evaluation too.
fn resolve(preset: &str, config: &ConfigArgs) -> Result<Preset> {
    let (preset, file, overrides) = (format!("finetune/{preset}"), config.path(), config.overrides());
    let origin = settings::origin(&preset, file, &overrides);
    let mut table = settings::table(&preset, file, &overrides)?;
    let mut eval = match table.remove("eval") {
        Some(Value::Table(eval)) => eval,
        _ => bail!("the config has no table `[eval]`\nhint: copy it from presets/finetune/per-song-fad.toml"),
    };
    for key in ["seed", "embed"] {
        if let Some(value) = table.get(key) {
            eval.entry(key).or_insert(value.clone());
        }
    }
    Ok(Preset {
        finetune: settings::read(table, &origin)?,
        eval: settings::read(eval, &format!("the table `eval` of {origin}"))?,
    })
}

/// The config of a run, without its evaluation.
pub fn config(preset: &str, config: &ConfigArgs) -> Result<FinetuneConfig> {
    Ok(resolve(preset, config)?.finetune)
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let Preset { finetune: config, eval } = resolve(&args.preset, &args.config)?;
    config.check()?;
    let out = args.out.unwrap_or_else(|| PathBuf::from(format!("runs/finetune-{}", args.preset)));
    let measure = eval.of_model(config.bundle.clone(), out.clone(), config.prompts.clone());
    measure.check()?;
    check_prompts(&config.bundle, &config.prompts)?;
    let mut ctx = context(out.clone(), args.run.resume, stop);
    ctx.device = dragon_trainer::device(&args.run.device)?;
    let outcome = finetune::run(&config, &ctx)?;
    if !outcome.finished {
        println!("{}: stopped after {} steps; --resume goes on", out.display(), outcome.steps_done);
        return Ok(());
    }
    let summary = eval::run(&measure, &ctx)?;
    print!("{}", summary.table());
    println!("{}", out.join("report.html").display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_a_valid_config() {
        let none = ConfigArgs { config: None, overrides: Vec::new(), seed: None };
        for name in settings::PRESETS.iter().filter_map(|(name, _)| name.strip_prefix("finetune/")) {
            let preset = resolve(name, &none).unwrap_or_else(|err| panic!("{name}: {err:#}"));
            preset.finetune.check().unwrap_or_else(|err| panic!("{name}: {err}"));
        }
    }

    #[test]
    fn every_preset_shows_every_key() {
        for (path, _) in settings::PRESETS {
            let Some(name) = path.strip_prefix("finetune/") else { continue };
            settings::assert_every_key_is_shown(path, |set| {
                let config = ConfigArgs { config: None, overrides: set.to_vec(), seed: None };
                resolve(name, &config).map(drop)
            });
        }
    }
}
