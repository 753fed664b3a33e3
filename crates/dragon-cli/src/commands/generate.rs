//! `dragon generate`: prompts to WAV files.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use dragon_trainer::SamplerConfig;
use dragon_trainer::bundle::Length;
use dragon_trainer::generate::{self, GenerateConfig};
use dragon_trainer::{musicgen, stable_audio};
use serde::{Deserialize, Serialize};

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
  dragon generate \"a slow harp melody\" --model stable-audio-open-1.0 --set seconds=20
  dragon generate \"a slow harp melody\" --model musicgen-small --set sampler.top_k=50")]
pub struct Args {
    /// The prompts
    prompts: Vec<String>,
    /// A text file with one more prompt a line
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

/// A preset of presets/generate.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GeneratePreset {
    seed: u64,
    model: PathBuf,
    tuned: Option<PathBuf>,
    variants: usize,
    batch: usize,
    sampler: SamplerConfig,
}

/// The preset presets/generate/stable-audio, for a published folder of Stable Audio Open.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StableAudioPreset {
    seed: u64,
    model: PathBuf,
    tuned: Option<PathBuf>,
    seconds: f64,
    n_frames: Option<usize>,
    variants: usize,
    batch: usize,
    sampler: SamplerConfig,
}

/// The preset presets/generate/musicgen, for a published folder of MusicGen.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MusicGenPreset {
    seed: u64,
    model: PathBuf,
    seconds: f64,
    variants: usize,
    batch: usize,
    sampler: MusicGenSampler,
}

/// See [`MusicGenPreset`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MusicGenSampler {
    guidance_scale: f64,
    top_k: usize,
    temperature: f64,
}

/// A model folder that others have published.
enum Published {
    StableAudio,
    MusicGen,
}

impl Published {
    fn of(dir: &Path) -> Option<Self> {
        if stable_audio::is_published(dir) {
            Some(Self::StableAudio)
        } else {
            musicgen::is_published(dir).then_some(Self::MusicGen)
        }
    }
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let mut overrides = args.config.overrides();
    overrides.extend(args.model.map(|dir| format!("model={}", settings::quoted(&dir))));
    overrides.extend(args.tuned.map(|dir| format!("tuned={}", settings::quoted(&dir))));
    overrides.extend(args.variants.map(|n| format!("variants={n}")));
    overrides.extend(args.steps.map(|n| format!("sampler.n_steps={n}")));
    let table = settings::table("generate/default", args.config.path(), &overrides)?;
    let published = table.get("model").and_then(|model| model.as_str()).map(PathBuf::from);
    let mut prompts = args.prompts;
    if let Some(file) = &args.file {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read `{}`\nhint: check the path", file.display()))?;
        prompts.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
    }
    let mut ctx = context(args.out, false, stop);
    ctx.device = dragon_trainer::device(&args.device)?;
    let given = |key: &str| overrides.iter().any(|item| item.starts_with(&format!("{key}=")));
    let published = published.and_then(|dir| Published::of(&dir));
    if matches!(published, Some(Published::MusicGen)) {
        if given("tuned") {
            anyhow::bail!(
                "MusicGen cannot be tuned here\nhint: leave --tuned out, or name another model folder"
            );
        }
        if given("sampler.n_steps") {
            anyhow::bail!(
                "MusicGen has no number of steps: it takes one for every frame\nhint: leave --steps out; \
                 --set seconds=10 makes shorter pieces"
            );
        }
        let preset: MusicGenPreset = settings::resolve("generate/musicgen", args.config.path(), &overrides)?;
        let config = musicgen::Config {
            seed: preset.seed,
            model: preset.model,
            seconds: preset.seconds,
            guidance_scale: preset.sampler.guidance_scale,
            top_k: preset.sampler.top_k,
            temperature: preset.sampler.temperature,
            batch: preset.batch,
            variants: preset.variants,
            prompts,
        };
        return print(musicgen::run(&config, &ctx)?);
    }
    let config = if published.is_some() {
        let preset: StableAudioPreset =
            settings::resolve("generate/stable-audio", args.config.path(), &overrides)?;
        GenerateConfig {
            seed: preset.seed,
            bundle: preset.model,
            length: Length { seconds: Some(preset.seconds), n_frames: preset.n_frames },
            tuned: preset.tuned,
            sampler: preset.sampler,
            batch: preset.batch,
            variants: preset.variants,
            prompts,
        }
    } else {
        let preset: GeneratePreset = settings::resolve("generate/default", args.config.path(), &overrides)?;
        GenerateConfig {
            seed: preset.seed,
            bundle: preset.model,
            length: Length::default(),
            tuned: preset.tuned,
            sampler: preset.sampler,
            batch: preset.batch,
            variants: preset.variants,
            prompts,
        }
    };
    print(generate::run(&config, &ctx)?)
}

fn print(files: Vec<PathBuf>) -> Result<()> {
    for file in files {
        println!("{}", file.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_presets_are_valid_configs() {
        let preset: GeneratePreset = settings::resolve("generate/default", None, &[]).unwrap();
        assert!(preset.variants > 0 && preset.tuned.is_none());
        settings::assert_every_key_is_shown("generate/default", |set| {
            settings::resolve::<GeneratePreset>("generate/default", None, set).map(drop)
        });
        let preset: StableAudioPreset = settings::resolve("generate/stable-audio", None, &[]).unwrap();
        assert!(preset.variants > 0 && preset.n_frames.is_none());
        settings::assert_every_key_is_shown("generate/stable-audio", |set| {
            settings::resolve::<StableAudioPreset>("generate/stable-audio", None, set).map(drop)
        });
        let preset: MusicGenPreset = settings::resolve("generate/musicgen", None, &[]).unwrap();
        assert!(preset.variants > 0 && preset.sampler.top_k == 250);
        settings::assert_every_key_is_shown("generate/musicgen", |set| {
            settings::resolve::<MusicGenPreset>("generate/musicgen", None, set).map(drop)
        });
    }
}
