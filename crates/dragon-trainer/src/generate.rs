//! Prompts to audio files.

use std::path::{Path, PathBuf};

use dragon_audio::SampleFormat;
use dragon_diffusion::{DiffusionModel, SamplerConfig};
use serde::{Deserialize, Serialize};

use crate::bundle::{self, Bundle, Length};
use crate::diffusion::tuned_dir;
use crate::error::{Error, Result};
use crate::rollout::{Sampling, TextCache};
use crate::run::{Meter, RunContext};

/// Everything a generation depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateConfig {
    /// Model folder.
    pub bundle: PathBuf,
    /// Length of the songs of a published model.
    #[serde(default, skip_serializing_if = "Length::is_default")]
    pub length: Length,
    /// Folder of a tuned diffusion model (or of the run that made it) to use instead of the model folder's own.
    pub tuned: Option<PathBuf>,
    /// How latents are sampled.
    pub sampler: SamplerConfig,
    /// Songs sampled at a time; bounds memory and changes no number.
    pub batch: usize,
}

/// A song that a model is to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What is to be heard.
    pub prompt: String,
    /// Everything random of a song comes from a hash of the prompt and this, so it is the same in every batch.
    pub seed: u64,
    /// Name of its file in the output folder.
    pub file: String,
}

impl Wanted {
    /// Songs of each prompt with seeds `seed`, `seed + 1` and so on, as `NNN-words-of-the-prompt.wav`.
    ///
    /// # Errors
    /// If there is no prompt, one is empty, or `variants` is 0.
    pub fn variants(prompts: &[String], seed: u64, variants: usize) -> Result<Vec<Self>> {
        if variants == 0 {
            return Err(Error::config("variants", "at least 1", variants));
        }
        prompts_given(prompts)?;
        let seeds = (0..variants as u64).map(|v| seed.wrapping_add(v));
        let songs = prompts.iter().flat_map(|prompt| seeds.clone().map(move |seed| (prompt, seed)));
        let named = songs.enumerate().map(|(i, (prompt, seed))| Self {
            prompt: prompt.clone(),
            seed,
            file: format!("{i:03}-{}.wav", slug(prompt)),
        });
        Ok(named.collect())
    }

    /// What sampling needs to know.
    pub(crate) fn jobs(songs: &[Self]) -> Vec<(&str, u64)> {
        songs.iter().map(|song| (song.prompt.as_str(), song.seed)).collect()
    }
}

/// Generates the songs and writes them to the output folder, 16-bit; gives the files in order, fewer if the run was stopped.
///
/// # Errors
/// If a prompt is empty or longer than the model reads, a file is missing or broken, or nothing can be written.
pub fn run(cfg: &GenerateConfig, songs: &[Wanted], ctx: &RunContext) -> Result<Vec<PathBuf>> {
    for (key, value) in [("batch", cfg.batch), ("sampler.n_steps", cfg.sampler.n_steps)] {
        if value == 0 {
            return Err(Error::config(key, "at least 1", value));
        }
    }
    cfg.sampler.guidance.check().map_err(Error::input("sampler.guidance"))?;
    bundle::check_prompts(&cfg.bundle, songs.iter().map(|song| &song.prompt))?;
    if let Some(tuned) = &cfg.tuned {
        tuned_dir(tuned)?;
    }
    let bundle = Bundle::load_for(&cfg.bundle, &cfg.length, &ctx.device)?;
    let model = model_of(&bundle, cfg.tuned.as_deref())?;
    std::fs::create_dir_all(&ctx.out_dir).map_err(Error::io("create", &ctx.out_dir))?;
    let texts = TextCache::default();
    let sampling = Sampling { bundle: &bundle, texts: &texts, sampler: &cfg.sampler, batch: cfg.batch };
    let mut meter = Meter::new(ctx.progress, songs.len(), 0, 1.0, "songs");
    let mut files = Vec::with_capacity(songs.len());
    for part in songs.chunks(cfg.batch) {
        let Some(latents) = sampling.latents(model.as_ref(), &Wanted::jobs(part), ctx)? else {
            break; // stopped: what is written so far is whole
        };
        for (audio, song) in bundle.decode_audio(&latents)?.into_iter().zip(part) {
            if let Some(bad) = audio.channels.iter().flatten().find(|x| !x.is_finite()) {
                return Err(Error::BrokenSong { value: f64::from(*bad), prompt: song.prompt.clone() });
            }
            let path = ctx.out_dir.join(&song.file);
            dragon_audio::write_wav(&path, &audio, SampleFormat::Int16)
                .map_err(Error::input("cannot write audio"))?;
            files.push(path);
        }
        meter.update(files.len(), &[], &[], false);
    }
    meter.finish();
    Ok(files)
}

/// The model folder's diffusion model, or a tuned one, without gradients.
///
/// # Errors
/// If the tuned folder holds no model, or one of another shape.
pub fn model_of(bundle: &Bundle, tuned: Option<&Path>) -> Result<Box<dyn DiffusionModel>> {
    match tuned {
        None => bundle.diffusion.base(),
        Some(tuned) => bundle.tuned(tuned),
    }
}

/// Whether there are prompts, and none is empty.
///
/// # Errors
/// If not.
fn prompts_given(prompts: &[String]) -> Result<()> {
    if let Some(i) = prompts.iter().position(|prompt| prompt.trim().is_empty()) {
        return Err(Error::Data {
            problem: format!("prompt {} is empty", i + 1),
            hint: "say what should be heard, e.g. \"a slow harp melody\"".into(),
        });
    }
    if prompts.is_empty() {
        return Err(Error::Data {
            problem: "there is no prompt".into(),
            hint: "say what should be heard: dragon generate \"a slow harp melody\"".into(),
        });
    }
    Ok(())
}

/// Lower-case words of a prompt, for a file name: at most 48 bytes, `a-z0-9` and `-`.
pub(crate) fn slug(prompt: &str) -> String {
    let mut out = String::new();
    for c in prompt.chars() {
        if out.len() >= 48 {
            break;
        }
        if c.is_ascii_alphanumeric() {
            out.push(c.to_ascii_lowercase());
        } else if !out.is_empty() && !out.ends_with('-') {
            out.push('-');
        }
    }
    let out = out.trim_end_matches('-');
    if out.is_empty() { "prompt".to_owned() } else { out.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_is_made_of_the_words_of_a_prompt() {
        assert_eq!(slug("A slow, sad Waltz (in D)!"), "a-slow-sad-waltz-in-d");
        assert_eq!(slug("…"), "prompt");
        assert!(slug(&"word ".repeat(40)).len() <= 48);
    }
}
