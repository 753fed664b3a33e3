//! Generations: prompts and noise to latents, audio and what rewards see. Shared by fine-tuning, evaluation and
//! `generate`.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Mutex;

use candle_core::Tensor;
use dragon_diffusion::{DiffusionModel, Noise, SamplerConfig, TextCond, sample_in_batches};

use crate::bundle::Bundle;
use crate::error::{Error, Result};
use crate::run::RunContext;

/// Text states of prompts, encoded once each. A prompt's states do not depend on what it is encoded with.
#[derive(Default)]
pub struct TextCache(Mutex<HashMap<String, (Tensor, Tensor)>>);

impl TextCache {
    /// States and mask of the prompts, `[B, L, text_dim]` and `[B, L]`.
    ///
    /// # Errors
    /// If a prompt is empty.
    pub fn get(&self, bundle: &Bundle, prompts: &[&str]) -> Result<TextCond> {
        let mut known = self.0.lock().unwrap_or_else(|err| err.into_inner());
        let mut missing: Vec<&str> = prompts.iter().copied().filter(|p| !known.contains_key(*p)).collect();
        missing.sort_unstable();
        missing.dedup();
        if !missing.is_empty() {
            let cond = bundle.text.encode(&missing)?;
            for (i, prompt) in missing.iter().enumerate() {
                // Copies: a view would keep the whole batch alive.
                let row = (cond.states.narrow(0, i, 1)?.copy()?, cond.mask.narrow(0, i, 1)?.copy()?);
                known.insert((*prompt).to_owned(), row);
            }
        }
        let states: Vec<&Tensor> = prompts.iter().map(|p| &known[*p].0).collect();
        let masks: Vec<&Tensor> = prompts.iter().map(|p| &known[*p].1).collect();
        Ok(TextCond { states: Tensor::cat(&states, 0)?, mask: Tensor::cat(&masks, 0)? })
    }
}

/// Noise for each `(key, seed)`, of the latents' shape.
pub fn noise(bundle: &Bundle, keys: &[(&str, u64)]) -> Noise {
    let (_, channels, frames) = bundle.latent_shape(1);
    Noise::new(keys, channels, frames, &bundle.device)
}

/// What it takes to generate songs of prompts, besides a model.
pub struct Sampling<'a> {
    /// Text encoder, VAE and sizes.
    pub bundle: &'a Bundle,
    /// States of the prompts seen before.
    pub texts: &'a TextCache,
    /// How latents are sampled.
    pub sampler: &'a SamplerConfig,
    /// Songs sampled at a time; bounds memory and changes no number.
    pub batch: usize,
}

/// Generated songs.
pub struct Songs {
    /// Normalised latents `[B, C, T]`.
    pub latents: Tensor,
    /// `B` clips, nominally in [-1, 1].
    pub clips: Vec<Vec<f32>>,
}

impl Sampling<'_> {
    /// Normalised latents `[B, C, T]` of each `(prompt, seed)`, from the noise that belongs to the two; `None` if `ctx.stop`
    /// was set meanwhile.
    ///
    /// # Errors
    /// If there is no prompt or one is empty, and as the function [`latents`].
    pub fn latents(
        &self,
        model: &dyn DiffusionModel,
        prompts: &[(&str, u64)],
        ctx: &RunContext,
    ) -> Result<Option<Tensor>> {
        let captions: Vec<&str> = prompts.iter().map(|prompt| prompt.0).collect();
        let noise = noise(self.bundle, prompts);
        let cond = self.texts.get(self.bundle, &captions)?;
        latents(model, &cond, &noise, self.sampler, self.batch, ctx, &captions)
    }

    /// [`Self::latents`] and their audio.
    ///
    /// # Errors
    /// As there.
    pub fn songs(
        &self,
        model: &dyn DiffusionModel,
        prompts: &[(&str, u64)],
        ctx: &RunContext,
    ) -> Result<Option<Songs>> {
        let Some(latents) = self.latents(model, prompts, ctx)? else { return Ok(None) };
        let clips = self.bundle.decode(&latents)?;
        Ok(Some(Songs { latents, clips }))
    }
}

/// Samples latents `[B, C, T]`, at most `batch` at a time; `None` if `ctx.stop` was set meanwhile. A row does not
/// depend on its batch.
///
/// # Errors
/// If the sampler's settings are out of range, or the model gives latents that are not finite.
pub fn latents(
    model: &dyn DiffusionModel,
    cond: &TextCond,
    noise: &Noise,
    sampler: &SamplerConfig,
    batch: usize,
    ctx: &RunContext,
    prompts: &[&str],
) -> Result<Option<Tensor>> {
    let mut on_step = |_| if ctx.stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let Some(latents) = sample_in_batches(model, cond, noise, sampler, batch, &mut on_step)? else {
        return Ok(None);
    };
    let sums = latents.abs()?.flatten_from(1)?.sum(1)?.to_vec1::<f32>()?; // [B]
    if let Some(i) = sums.iter().position(|sum| !sum.is_finite()) {
        return Err(Error::BrokenSong {
            value: f64::from(sums[i]),
            prompt: prompts.get(i).map_or(String::new(), |p| (*p).to_owned()),
        });
    }
    Ok(Some(latents))
}

/// What is measured of a clip's sound: no part of any reward, it shows when one is hacked. Key in logs, name in tables.
pub const MONITORS: [(&str, &str); 4] = [
    ("loudness_lufs", "loudness, LUFS"),
    ("level_dbfs", "level, dBFS"),
    ("peak_dbfs", "peak, dBFS"),
    ("centroid_hz", "spectral centroid, Hz"),
];

/// The [`MONITORS`] of a clip. Silence has no level; -120 dB keeps means numbers.
pub fn monitors(clip: &[f32], sample_rate_hz: u32) -> [f64; 4] {
    [
        dragon_audio::lufs(&[clip], sample_rate_hz).max(-120.0),
        dragon_audio::rms_dbfs(clip).max(-120.0),
        (20.0 * f64::from(dragon_audio::peak(clip)).log10()).max(-120.0),
        dragon_audio::spectral_centroid_hz(clip, sample_rate_hz),
    ]
}

/// Means of the [`MONITORS`] over clips.
pub fn mean_monitors(clips: &[Vec<f32>], sample_rate_hz: u32) -> [f64; 4] {
    use rayon::prelude::*;
    let each: Vec<[f64; 4]> = clips.par_iter().map(|clip| monitors(clip, sample_rate_hz)).collect();
    let n = each.len().max(1) as f64;
    std::array::from_fn(|k| each.iter().map(|values| values[k]).sum::<f64>() / n)
}
