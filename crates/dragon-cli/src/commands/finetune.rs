//! `dragon finetune`: DRAGON, and the comparison with the base.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use dragon_trainer::eval::{self, EvalConfig, Summary};
use dragon_trainer::finetune::{self, FinetuneConfig};
use toml::{Table, Value};

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
    #[arg(long, default_value = "per-song-fad", conflicts_with = "config")]
    preset: String,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Run folder: run.toml, metrics.jsonl, checkpoints/, model/, report.html [default: runs/finetune-PRESET, or -FILE]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// A fine-tuning preset: the config of the run, and how its result is measured.
#[derive(Debug)]
struct Preset {
    finetune: FinetuneConfig,
    eval: EvalPreset,
}

/// Reads a preset. Its table `eval` is laid over the preset that it extends (`eval/default`), the rest is the run. The run's seed, encoders and
/// length of songs hold for the evaluation too; its reward is the evaluation's target, and validations watch all the others.
fn resolve(preset: &str, config: &ConfigArgs) -> Result<Preset> {
    let (preset, file, overrides) = (format!("finetune/{preset}"), config.path(), config.overrides());
    let origin = settings::origin(&preset, file, &overrides);
    let mut table = settings::table(&preset, file, &overrides)?;
    let mut own = match table.remove("eval") {
        Some(Value::Table(eval)) => eval,
        None => Table::new(),
        Some(other) => bail!("{origin}: `eval` is {other}, not a table\nhint: write [eval]"),
    };
    let below = own.remove("extends");
    let mut eval =
        settings::table(below.as_ref().and_then(Value::as_str).unwrap_or("eval/default"), None, &[])?;
    for key in ["seed", "embed", "length"] {
        if let Some(value) = table.get(key) {
            settings::overlay(&mut eval, Table::from_iter([(key.to_owned(), value.clone())]));
        }
    }
    settings::overlay(&mut eval, own);
    let mut finetune: FinetuneConfig = settings::read(table, &origin)?;
    let mut eval: EvalPreset = settings::read(eval, &format!("the table `eval` of {origin}"))?;
    let (targets, others) = eval::target_first(&finetune.reward, eval.metrics);
    // Watching takes the evaluation's encoders too; what the run itself names keeps its own meaning.
    for (name, encoder) in &eval.embed.encoders {
        finetune.embed.encoders.entry(name.clone()).or_insert_with(|| encoder.clone());
    }
    for (name, setting) in &eval.embed.settings {
        finetune.embed.settings.entry(name.clone()).or_insert(*setting);
    }
    finetune.validation.monitors.get_or_insert_with(|| others.clone());
    eval.metrics = [targets, others].concat();
    Ok(Preset { finetune, eval })
}

/// The config of a run, without its evaluation.
pub fn config(preset: &str, config: &ConfigArgs) -> Result<FinetuneConfig> {
    Ok(resolve(preset, config)?.finetune)
}

/// Checks what can be checked before weights are read, of the run and of the evaluation after it.
///
/// # Errors
/// For the first thing that cannot work.
pub fn check(preset: &str, config: &ConfigArgs) -> Result<()> {
    let Preset { finetune, eval } = resolve(preset, config)?;
    check_all(&finetune, &eval.of_model(finetune.bundle.clone(), PathBuf::new(), finetune.prompts.clone()))
}

fn check_all(config: &FinetuneConfig, measure: &EvalConfig) -> Result<()> {
    config.check()?;
    measure.check()?;
    check_prompts(&config.bundle, &config.prompts)?;
    measure.check_prompts().context("the evaluation after the last step (`eval.split`, `eval.n_prompts`)")
}

/// Fine-tunes by a preset in the folder `out` and measures the result there; `None` if it was stopped. With
/// `run.resume` it goes on where the folder's run stopped, and what is measured already is not measured again.
pub fn run_preset(
    preset: &str,
    config: &ConfigArgs,
    run: &RunArgs,
    out: &Path,
    stop: &Arc<AtomicBool>,
) -> Result<Option<Summary>> {
    let Preset { finetune: config, eval } = resolve(preset, config)?;
    let measure = eval.of_model(config.bundle.clone(), out.to_owned(), config.prompts.clone());
    check_all(&config, &measure)?;
    let mut ctx = context(out.to_owned(), run.resume, stop);
    ctx.device = dragon_trainer::device(&run.device)?;
    let outcome = finetune::run(&config, &ctx)?;
    if !outcome.finished {
        let how = if run.resume { "the same command" } else { "--resume" };
        println!("{}: stopped after {} steps; {how} goes on", out.display(), outcome.steps_done);
        return Ok(None);
    }
    match eval::known(&measure, out)? {
        Some(summary) if ctx.resume => Ok(Some(summary)),
        _ => Ok(Some(eval::run(&measure, &ctx)?)),
    }
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let name = args.config.path().and_then(Path::file_stem).map(|stem| stem.to_string_lossy().into_owned());
    let name = name.unwrap_or_else(|| args.preset.clone());
    let out = args.out.unwrap_or_else(|| PathBuf::from(format!("runs/finetune-{name}")));
    if let Some(summary) = run_preset(&args.preset, &args.config, &args.run, &out, stop)? {
        print!("{}", summary.table());
        println!("{}", out.join("report.html").display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use dragon_trainer::embedder::{EmbedConfig, EncoderConfig};

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
    fn validations_watch_what_the_evaluation_measures_unless_told_otherwise() {
        let monitors = |overrides: &[&str]| {
            let overrides = overrides.iter().map(|set| (*set).to_owned()).collect();
            let config = ConfigArgs { config: None, overrides, seed: None };
            resolve("vendi", &config).unwrap().finetune.validation.monitors.unwrap()
        };
        assert_eq!(monitors(&[]).len(), 9, "all of the evaluation but the target");
        assert!(monitors(&["validation.monitors=[]"]).is_empty());
    }

    #[test]
    fn an_encoder_of_the_evaluation_alone_does_not_change_the_reward() {
        let set = "eval.embed.encoders.musicnn.weights=other.safetensors".to_owned();
        let config = ConfigArgs { config: None, overrides: vec![set], seed: None };
        let Preset { finetune, eval } = resolve("per-song-fad", &config).unwrap();
        let weights = |embed: &EmbedConfig| match &embed.encoders["musicnn"] {
            EncoderConfig::Musicnn { weights } => weights.clone(),
            other => panic!("{other:?}"),
        };
        assert!(weights(&finetune.embed).ends_with("mtt_musicnn.safetensors"));
        assert!(weights(&eval.embed).ends_with("other.safetensors"));
        assert!(finetune.embed.encoders.contains_key("clap"), "validations watch by it");
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
