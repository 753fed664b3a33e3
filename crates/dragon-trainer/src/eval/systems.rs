//! The songs of the two systems: generated from prompts, or read from folders.

use std::path::{Path, PathBuf};

use dragon_audio::Clip;
use dragon_diffusion::DiffusionModel;
use dragon_rewards::{RewardSet, Song};
use rayon::prelude::*;

use super::{EvalConfig, FoldersConfig};
use crate::bundle::{Bundle, Prompt};
use crate::embed;
use crate::embedder::{Batch, Embedder};
use crate::error::{Error, Result};
use crate::rollout::{self, Sampling};
use crate::run::{Meter, RunContext};

/// The songs of one system.
pub(super) struct System {
    pub songs: Vec<Song>,
    /// [`rollout::MONITORS`] of each song.
    pub monitors: Vec<[f64; 4]>,
    pub examples: Vec<Clip>,
}

/// What generating the songs of a system takes.
pub(super) struct Generator<'a> {
    pub cfg: &'a EvalConfig,
    pub sampling: Sampling<'a>,
    pub embedder: &'a Embedder,
    pub rewards: &'a RewardSet,
    pub ctx: &'a RunContext,
}

impl Generator<'_> {
    /// The songs of `model`, after `before` others.
    pub fn system(
        &self,
        model: &dyn DiffusionModel,
        prompts: &[Prompt],
        before: usize,
        meter: &mut Meter,
    ) -> Result<System> {
        let mut system = System { songs: Vec::new(), monitors: Vec::new(), examples: Vec::new() };
        let rate = self.sampling.bundle.sample_rate_hz();
        for part in prompts.chunks(self.cfg.batch) {
            let captions: Vec<&str> = part.iter().map(|p| p.caption.as_str()).collect();
            let keys: Vec<(&str, u64)> = captions.iter().map(|&caption| (caption, self.cfg.seed)).collect();
            let made = self.sampling.songs(model, &keys, self.ctx)?.ok_or_else(stopped)?;
            let batch = Batch {
                clips: &made.clips,
                sample_rate_hz: rate,
                latents: Some(&made.latents),
                captions: Some(&captions),
                bundle: Some(self.sampling.bundle),
            };
            system.songs.extend(self.embedder.songs(self.rewards.sources(), &batch)?);
            system.monitors.par_extend(made.clips.par_iter().map(|clip| rollout::monitors(clip, rate)));
            for samples in made.clips {
                if system.examples.len() < self.cfg.examples {
                    system.examples.push(Clip { samples, sample_rate_hz: rate });
                }
            }
            meter.update(before + system.songs.len(), &[], &[], false);
        }
        Ok(system)
    }
}

/// What hearing the songs of a folder takes.
pub(super) struct Listener<'a> {
    pub cfg: &'a FoldersConfig,
    /// Whether a metric needs the songs' captions, which are then looked for in `prompts`.
    pub needs_text: bool,
    pub prompts: Option<&'a [Prompt]>,
    pub bundle: Option<&'a Bundle>,
    pub embedder: &'a Embedder,
    pub rewards: &'a RewardSet,
    pub ctx: &'a RunContext,
}

impl Listener<'_> {
    /// The songs in `files`, after `before` others.
    pub fn system(&self, files: &[PathBuf], before: usize, meter: &mut Meter) -> Result<System> {
        let mut system = System { songs: Vec::new(), monitors: Vec::new(), examples: Vec::new() };
        for file in files {
            if self.ctx.stopped() {
                return Err(stopped());
            }
            let audio = dragon_audio::read(file).map_err(Error::input("cannot read a song"))?;
            let clip = audio.to_mono();
            clip.check_sound(file).map_err(Error::input("cannot compare a song"))?;
            let caption = self.needs_text.then(|| caption_of(file, self.prompts)).transpose()?;
            let captions = caption.map(|caption| [caption]);
            let clips = [clip.samples];
            let batch = Batch {
                clips: &clips,
                sample_rate_hz: clip.sample_rate_hz,
                latents: None,
                captions: captions.as_ref().map(<[&str; 1]>::as_slice),
                bundle: self.bundle,
            };
            let context = format!("cannot embed `{}`", file.display());
            let songs = self.embedder.songs(self.rewards.sources(), &batch).map_err(Error::input(context))?;
            system.songs.extend(songs);
            system.monitors.push(rollout::monitors(&clips[0], clip.sample_rate_hz));
            if system.examples.len() < self.cfg.examples {
                let [samples] = clips;
                system.examples.push(Clip { samples, sample_rate_hz: clip.sample_rate_hz });
            }
            meter.update(before + system.songs.len(), &[], &[], false);
        }
        Ok(system)
    }
}

/// The audio files of both folders, and whether they are pairs: songs with partners of the same name are compared one
/// to one, folders without common names as two sets.
pub(super) fn files_of(cfg: &FoldersConfig) -> Result<([Vec<PathBuf>; 2], bool)> {
    let folders = [&cfg.base, &cfg.tuned];
    let mut files = [embed::audio_files(&cfg.base)?, embed::audio_files(&cfg.tuned)?];
    let names: Vec<Vec<PathBuf>> = files
        .iter()
        .zip(folders)
        .map(|(files, dir)| {
            files.iter().map(|f| f.strip_prefix(dir).unwrap_or(f).with_extension("")).collect()
        })
        .collect();
    let common: Vec<PathBuf> = names[0].iter().filter(|name| names[1].contains(name)).cloned().collect();
    let paired = common.len() >= 2;
    if paired {
        for ((files, names), dir) in files.iter_mut().zip(&names).zip(folders) {
            if let Some(i) = (1..names.len()).find(|&i| names[..i].contains(&names[i])) {
                return Err(Error::Data {
                    problem: format!("another song than `{}` has its name too", files[i].display()),
                    hint: "songs are paired by their path without the ending; leave one of the two out"
                        .into(),
                });
            }
            let dropped = files.len() - common.len();
            if dropped > 0 {
                tracing::warn!("{dropped} files of `{}` have no partner and are left out", dir.display());
            }
            *files = common
                .iter()
                .filter_map(|c| names.iter().position(|n| n == c).map(|i| files[i].clone()))
                .collect();
        }
    }
    Ok((files, paired))
}

/// The caption whose id is the name of a song without its ending.
///
/// # Errors
/// If there is none.
pub(crate) fn caption_of<'a>(file: &Path, prompts: Option<&'a [Prompt]>) -> Result<&'a str> {
    let id = file.file_stem().unwrap_or_default().to_string_lossy();
    let found = prompts.and_then(|prompts| prompts.iter().find(|p| p.id == id));
    found.map(|p| p.caption.as_str()).ok_or_else(|| Error::Data {
        problem: format!(
            "a metric needs the prompt of `{}`, and no prompt has the id `{id}`",
            file.display()
        ),
        hint: "name a prompt file whose ids are the files' names, or leave the CLAP score out".into(),
    })
}

fn stopped() -> Error {
    Error::Data {
        problem: "stopped before the end".into(),
        hint: "nothing was measured; start the command again (a fine-tuning with --resume)".into(),
    }
}
