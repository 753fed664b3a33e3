//! From prompts to D+ and D- (paper 3.1): sampling, decoding, embedding, the split.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use dragon_diffusion::TextCond;
use dragon_nn::Rng;
use dragon_rewards::{Demonstrations, Song};

use super::{DemonstrationsConfig, FinetuneTask};
use crate::embedder::Batch;
use crate::error::{Error, Result};
use crate::rollout;
use crate::run::RunContext;

/// The songs of a step.
pub(super) struct Generations {
    pub latents: Tensor,
    pub cond: TextCond,
    pub songs: Vec<Song>,
    pub captions: Vec<String>,
    pub by_reference: Vec<bool>,
    /// Means of [`rollout::MONITORS`].
    pub monitors: [f64; 4],
    /// Root mean square of the latents.
    pub latent_rms: f64,
}

impl FinetuneTask<'_> {
    /// Generates the songs of a step: first one of each prompt, then a second of each, and so on.
    pub(super) fn rollout(&self, step: usize, prompts: &[usize], rng: &mut Rng) -> Result<Generations> {
        let ids: Vec<usize> =
            (0..self.cfg.rollout.songs_per_prompt()).flat_map(|_| prompts.iter().copied()).collect();
        let captions: Vec<&str> = ids.iter().map(|&i| self.train[i].caption.as_str()).collect();
        let keys = noise_keys(step, ids.iter().map(|&i| self.train[i].id.as_str()));
        let seeded: Vec<(&str, u64)> = keys.iter().map(|key| (key.as_str(), self.cfg.seed)).collect();
        let noise = rollout::noise(self.bundle, &seeded);
        let cond = self.texts.get(self.bundle, &captions)?;
        let by_reference: Vec<bool> =
            ids.iter().map(|_| rng.uniform() < self.cfg.rollout.reference_probability).collect();
        let dtype = self.cfg.rollout.dtype.on(&self.ctx.device);
        let mut rows: Vec<Option<Tensor>> = vec![None; ids.len()];
        for reference in [false, true] {
            let mine: Vec<usize> = (0..ids.len()).filter(|&row| by_reference[row] == reference).collect();
            if mine.is_empty() {
                continue;
            }
            let built = match (reference, dtype) {
                (true, DType::F32) => None,
                (true, _) => Some(self.bundle.diffusion.base_in(dtype)?),
                (false, _) => Some(self.policy.frozen(self.policy.tuned(), dtype)?),
            };
            let model = built.as_ref().unwrap_or(&self.reference).as_ref();
            let (noise, cond) = (noise.select(mine.iter().copied()), select_cond(&cond, &mine)?);
            let prompts: Vec<&str> = mine.iter().map(|&row| captions[row]).collect();
            let ctx = self.unstoppable();
            let sampler = &self.cfg.rollout.sampler;
            let latents =
                rollout::latents(model, &cond, &noise, sampler, self.cfg.rollout.batch, &ctx, &prompts)?
                    .ok_or_else(not_asked_to_stop)?;
            for (i, row) in mine.into_iter().enumerate() {
                rows[row] = Some(latents.narrow(0, i, 1)?);
            }
        }
        let rows: Vec<Tensor> = rows.into_iter().flatten().collect();
        let latents = Tensor::cat(&rows, 0)?;
        let clips = self.bundle.decode(&latents)?;
        let songs = self.embedder.songs(self.rewards.sources(), &self.batch(&latents, &clips, &captions))?;
        let monitors = rollout::mean_monitors(&clips, self.bundle.sample_rate_hz());
        let latent_rms = f64::from(latents.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt();
        let captions = captions.into_iter().map(str::to_owned).collect();
        Ok(Generations { latents, cond, songs, captions, by_reference, monitors, latent_rms })
    }

    /// A stop request waits for the end of the step: the step in progress is kept.
    pub(super) fn unstoppable(&self) -> RunContext {
        RunContext { stop: Default::default(), ..self.ctx.clone() }
    }

    pub(super) fn batch<'b>(
        &'b self,
        latents: &'b Tensor,
        clips: &'b [Vec<f32>],
        captions: &'b [&'b str],
    ) -> Batch<'b> {
        Batch {
            clips,
            sample_rate_hz: self.bundle.sample_rate_hz(),
            latents: Some(latents),
            captions: Some(captions),
            bundle: Some(self.bundle),
        }
    }

    /// Splits the songs of a step; gives the reward's index too.
    pub(super) fn demonstrations(
        &mut self,
        generations: &Generations,
        random: u64,
    ) -> Result<(Demonstrations, usize)> {
        let pick = self.rewards.pick(random);
        let songs: Vec<&Song> = generations.songs.iter().collect();
        let refused = |err: dragon_rewards::Error| Error::input("cannot score the generations")(err);
        let reward = self.rewards.get_mut(pick).ok_or_else(|| Error::Bug(format!("no reward {pick}")))?;
        let sets: Vec<&[&Song]> = songs.chunks(self.cfg.rollout.prompts_per_step()).collect();
        reward.observe(&sets).map_err(refused)?;
        let made = match self.cfg.rollout.demonstrations {
            DemonstrationsConfig::Paired => dragon_rewards::demonstrations::paired(reward, &sets),
            DemonstrationsConfig::Unpaired { split } => {
                dragon_rewards::demonstrations::unpaired(reward, &songs, split)
            }
        };
        Ok((made.map_err(refused)?, pick))
    }
}

/// What the noise of each generation follows from: the step, the prompt, and how often the prompt came before in this
/// step. Besides the two of a pair that happens where a step ends one epoch and begins the next.
fn noise_keys<'a>(step: usize, prompts: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let key = |id| {
        let n = seen.entry(id).or_default();
        *n += 1;
        format!("rollout/{step}/{id}/{}", *n - 1)
    };
    prompts.map(key).collect()
}

pub(super) fn not_asked_to_stop() -> Error {
    Error::Bug("sampling stopped without being asked".into())
}

/// Rows of `x` by index, `[B, …]`.
pub(super) fn select(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Ok(x.index_select(&Tensor::from_vec(ids, rows.len(), x.device())?, 0)?)
}

pub(super) fn select_cond(cond: &TextCond, rows: &[usize]) -> Result<TextCond> {
    Ok(TextCond { states: select(&cond.states, rows)?, mask: select(&cond.mask, rows)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_a_step_meets_in_two_epochs_gets_new_noise_each_time() {
        let keys = noise_keys(7, ["a", "b", "a", "a", "b", "a"].into_iter());
        assert_eq!(keys[1..3], ["rollout/7/b/0", "rollout/7/a/1"]);
        let different: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(different.len(), 6);
    }
}
