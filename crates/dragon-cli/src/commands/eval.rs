//! `dragon eval`: a tuned model against its base, or two folders against each other.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use dragon_trainer::SamplerConfig;
use dragon_trainer::bundle::{Length, Split};
use dragon_trainer::embedder::{EmbedConfig, EncoderConfig};
use dragon_trainer::eval::{self, BootstrapConfig, EvalConfig, FoldersConfig, MetricConfig};
use dragon_trainer::stable_audio;
use serde::{Deserialize, Serialize};

use super::{ConfigArgs, check_prompts, context};
use crate::settings;

/// Compare a tuned model with its base on held-out prompts, or two folders of audio
///
/// Writes report.json, report.html and samples/ and prints the table.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon eval runs/finetune-per-song-fad             the run's model against its base
  dragon eval runs/finetune-per-song-fad --set n_prompts=256 --out runs/eval-256
  dragon eval songs-a songs-b --out runs/a-or-b      two folders of audio; equal names are partners")]
pub struct Args {
    /// A fine-tuning run (or the folder of a diffusion model); or two folders of audio
    #[arg(required = true, num_args = 1..=2, value_name = "RUN or FOLDER")]
    what: Vec<PathBuf>,
    #[command(flatten)]
    config: ConfigArgs,
    /// Model folder with the base, ours or Stable Audio Open as published
    #[arg(long, value_name = "DIR", default_value = "builtin:tiny")]
    model: String,
    /// Prompt file
    #[arg(long, value_name = "FILE", default_value = "builtin:tiny/prompts.jsonl")]
    prompts: String,
    /// Output folder [default: RUN/eval, or runs/eval for two folders]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print the whole summary as JSON on stdout instead of the table
    #[arg(long)]
    json: bool,
    /// Where tensors live: `cpu` or `cuda`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// What is measured and how: a preset of presets/eval, or the table `eval` of a fine-tuning preset.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalPreset {
    /// Seed of the prompts' noise and of the subsets.
    pub seed: u64,
    /// Which prompts; `test` was not tuned on.
    pub split: Split,
    /// How many.
    pub n_prompts: usize,
    /// Length of the songs of a published model.
    #[serde(default, skip_serializing_if = "Length::is_default")]
    pub length: Length,
    /// How latents are sampled.
    pub sampler: SamplerConfig,
    /// Songs sampled at a time.
    pub batch: usize,
    /// Encoders and settings that the metrics name.
    pub embed: EmbedConfig,
    /// What is measured; the first is the target.
    pub metrics: Vec<MetricConfig>,
    /// Subsets for the win rates of sets.
    pub bootstrap: BootstrapConfig,
    /// Prompts whose audio goes into the report.
    pub examples: usize,
}

impl EvalPreset {
    /// The evaluation of a tuned model.
    pub fn of_model(&self, bundle: PathBuf, tuned: PathBuf, prompts: PathBuf) -> EvalConfig {
        EvalConfig {
            seed: self.seed,
            bundle,
            length: self.length,
            tuned,
            prompts,
            split: self.split,
            n_prompts: self.n_prompts,
            sampler: self.sampler,
            batch: self.batch,
            embed: self.embed.clone(),
            metrics: self.metrics.clone(),
            bootstrap: self.bootstrap,
            examples: self.examples,
        }
    }
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let name = match stable_audio::is_published(&settings::path(&args.model)) {
        true => "eval/stable-audio",
        false => "eval/default",
    };
    let preset: EvalPreset = settings::resolve(name, args.config.path(), &args.config.overrides())?;
    for path in &args.what {
        if !path.is_dir() {
            bail!(
                "there is no folder `{}`\nhint: give the folder of a run, or two folders of audio",
                path.display()
            );
        }
    }
    let (model, prompts) = (settings::path(&args.model), settings::path(&args.prompts));
    let default = if args.what.len() == 1 { args.what[0].join("eval") } else { "runs/eval".into() };
    let mut ctx = context(args.out.unwrap_or(default), false, stop);
    ctx.device = dragon_trainer::device(&args.device)?;
    let summary = match &args.what[..] {
        [run] => {
            check_prompts(&model, &prompts)?;
            eval::run(&preset.of_model(model, run.clone(), prompts), &ctx)?
        }
        [base, tuned] => {
            let (metrics, left_out) = of_audio_alone(preset.metrics, &preset.embed);
            if !left_out.is_empty() {
                tracing::info!(
                    "left out, since folders of audio have no captions and latents: {}",
                    left_out.join("; ")
                );
            }
            let config = FoldersConfig {
                seed: preset.seed,
                base: base.clone(),
                tuned: tuned.clone(),
                bundle: None,
                prompts: None,
                embed: preset.embed,
                metrics,
                bootstrap: preset.bootstrap,
                examples: preset.examples,
            };
            eval::run_folders(&config, &ctx)?
        }
        _ => unreachable!("the parser takes one or two folders"),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print!("{}", summary.table());
        println!("{}", ctx.out_dir.join("report.html").display());
    }
    Ok(())
}

/// The metrics that need nothing but audio, and the names of the others.
fn of_audio_alone(metrics: Vec<MetricConfig>, embed: &EmbedConfig) -> (Vec<MetricConfig>, Vec<String>) {
    let (kept, left_out): (Vec<_>, Vec<_>) = metrics.into_iter().partition(|metric| {
        metric.reward.sources().iter().all(|source| {
            let latents = matches!(embed.encoders.get(&source.encoder), Some(EncoderConfig::Vae));
            !latents && !metric.reward.needs_text(source)
        })
    });
    (kept, left_out.into_iter().map(|metric| metric.name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preset_is_a_valid_config() {
        let preset: EvalPreset = settings::resolve("eval/default", None, &[]).unwrap();
        preset.of_model("m".into(), "t".into(), "p".into()).check().unwrap();
        let preset: EvalPreset = settings::resolve("eval/stable-audio", None, &[]).unwrap();
        preset.of_model("m".into(), "t".into(), "p".into()).check().unwrap();
    }

    #[test]
    fn the_preset_shows_every_key() {
        for name in ["eval/default", "eval/stable-audio"] {
            settings::assert_every_key_is_shown(name, |set| {
                settings::resolve::<EvalPreset>(name, None, set).map(drop)
            });
        }
    }
}
