//! How a model folder makes songs: ours, Stable Audio Open's or MusicGen's, each by its preset.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use dragon_trainer::bundle::Length;
use dragon_trainer::generate::{self, GenerateConfig, Wanted};
use dragon_trainer::{RunContext, SamplerConfig, musicgen, stable_audio};
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::settings;

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
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// Stable Audio Open.
    StableAudio,
    /// MusicGen.
    MusicGen,
}

impl Published {
    /// What a folder holds, if it is one of them.
    pub fn of(dir: &Path) -> Option<Self> {
        if stable_audio::is_published(dir) {
            Some(Self::StableAudio)
        } else {
            musicgen::is_published(dir).then_some(Self::MusicGen)
        }
    }
}

/// A model folder with the settings of its preset.
#[derive(Debug)]
pub enum Generator {
    /// Ours, and Stable Audio Open.
    Diffusion(GenerateConfig),
    /// MusicGen.
    MusicGen(musicgen::Config),
}

impl Generator {
    /// Reads the preset of the folder that `overrides` (or `file`) name; gives the seed and the variants too.
    ///
    /// # Errors
    /// If a key is wrong, or means nothing to that kind of model.
    pub fn resolve(file: Option<&Path>, overrides: &[String]) -> Result<(Self, u64, usize)> {
        let table = settings::table("generate/default", file, overrides)?;
        let model = table.get("model").and_then(|model| model.as_str()).map(PathBuf::from);
        let given = |key: &str| overrides.iter().any(|item| item.starts_with(&format!("{key}=")));
        match model.and_then(|dir| Published::of(&dir)) {
            None => {
                let preset: GeneratePreset = settings::resolve("generate/default", file, overrides)?;
                let config = GenerateConfig {
                    bundle: preset.model,
                    length: Length::default(),
                    tuned: preset.tuned,
                    sampler: preset.sampler,
                    batch: preset.batch,
                };
                Ok((Self::Diffusion(config), preset.seed, preset.variants))
            }
            Some(Published::StableAudio) => {
                let preset: StableAudioPreset = settings::resolve("generate/stable-audio", file, overrides)?;
                let config = GenerateConfig {
                    bundle: preset.model,
                    length: Length { seconds: Some(preset.seconds), n_frames: preset.n_frames },
                    tuned: preset.tuned,
                    sampler: preset.sampler,
                    batch: preset.batch,
                };
                Ok((Self::Diffusion(config), preset.seed, preset.variants))
            }
            Some(Published::MusicGen) if given("tuned") => {
                bail!("MusicGen cannot be tuned here\nhint: leave --tuned out, or name another model folder")
            }
            Some(Published::MusicGen) if given("sampler.n_steps") => bail!(
                "MusicGen has no number of steps: it takes one for every frame\nhint: leave --steps out; \
                 --set seconds=10 makes shorter pieces"
            ),
            Some(Published::MusicGen) => {
                let preset: MusicGenPreset = settings::resolve("generate/musicgen", file, overrides)?;
                let config = musicgen::Config {
                    model: preset.model,
                    seconds: preset.seconds,
                    guidance_scale: preset.sampler.guidance_scale,
                    top_k: preset.sampler.top_k,
                    temperature: preset.sampler.temperature,
                    batch: preset.batch,
                };
                Ok((Self::MusicGen(config), preset.seed, preset.variants))
            }
        }
    }

    /// All that its songs depend on, but the files of the model.
    ///
    /// # Errors
    /// If a setting has no form in TOML.
    pub fn settings(&self) -> Result<Table> {
        let mut table = match self {
            Self::Diffusion(config) => Table::try_from(config)?,
            Self::MusicGen(config) => Table::try_from(config)?,
        };
        // Songs do not depend on how many are made at a time.
        table.remove("batch");
        Ok(table)
    }

    /// Writes the songs to the output folder; gives the files in order, fewer if the run was stopped.
    ///
    /// # Errors
    /// If a file is missing or broken, or nothing can be written.
    pub fn run(&self, songs: &[Wanted], ctx: &RunContext) -> Result<Vec<PathBuf>> {
        Ok(match self {
            Self::Diffusion(config) => generate::run(config, songs, ctx)?,
            Self::MusicGen(config) => musicgen::run(config, songs, ctx)?,
        })
    }
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
