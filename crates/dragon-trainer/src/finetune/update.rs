//! Learning from D+ and D- (paper 3.2): noise levels and noises, denoising errors of policy and reference, one step of
//! AdamW, and the numbers that show what it did.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use dragon_diffusion::{DiffusionModel, Edm, denoising_errors};
use dragon_nn::{Params, Rng};
use dragon_rewards::Demonstrations;

use super::generations::{Generations, select, select_cond};
use super::{DemonstrationsConfig, FinetuneTask};
use crate::error::{Error, Result};
use crate::losses::{Errors, Labels, kto_baseline};

/// One row of an update: a demonstration at one noise level.
pub(super) struct Row {
    song: usize,
    noise: usize,
    sigma: f64,
    drop: bool,
    sign: f64,
    advantage: f64,
}

/// What an update found.
pub(super) struct Update {
    loss: f64,
    grad_norm: f64,
    baseline: f64,
    reference: Vec<f64>,
    policy: Vec<f64>,
}

impl FinetuneTask<'_> {
    /// The rows of an update. A pair shares noise level, noise and condition dropout; unpaired songs have their own.
    pub(super) fn rows(&self, made: &Demonstrations, rng: &mut Rng) -> Result<(Vec<Row>, Tensor)> {
        let paired = self.cfg.rollout.demonstrations == DemonstrationsConfig::Paired;
        let scores = made.scores.as_deref();
        let gap = made.reward_plus - made.reward_minus;
        let advantage = |song: usize, sign: f64, split_at: Option<f64>| match (scores, split_at) {
            (Some(scores), Some(at)) if self.cfg.loss.needs_song_rewards() => scores[song] - at,
            _ => sign * gap,
        };
        // Groups of rows that share their noise.
        let groups: Vec<Vec<(usize, f64, f64)>> = if paired {
            let pairs = made.plus.iter().zip(&made.minus);
            pairs
                .filter(|(plus, minus)| scores.is_none_or(|s| s[**plus] != s[**minus])) // a tie teaches nothing
                .map(|(&plus, &minus)| {
                    let middle = scores.map(|s| 0.5 * (s[plus] + s[minus]));
                    vec![
                        (plus, 1.0, advantage(plus, 1.0, middle)),
                        (minus, -1.0, advantage(minus, -1.0, middle)),
                    ]
                })
                .collect()
        } else {
            let signed = made.plus.iter().map(|&s| (s, 1.0)).chain(made.minus.iter().map(|&s| (s, -1.0)));
            signed.map(|(song, sign)| vec![(song, sign, advantage(song, sign, made.split_at))]).collect()
        };
        let (_, channels, frames) = self.bundle.latent_shape(1);
        let count = groups.len() * self.cfg.update.draws;
        let (own, trained) = (&self.cfg.update, self.reference.edm());
        let levels = Edm {
            p_mean: own.p_mean.unwrap_or(trained.p_mean),
            p_std: own.p_std.unwrap_or(trained.p_std),
            ..*trained
        };
        let sigmas = levels.sample_sigmas_stratified(count, rng);
        let noise = rng.normal_tensor((count.max(1), channels, frames), DType::F32, &self.bundle.device)?;
        let mut rows = Vec::with_capacity(2 * count);
        for (i, &sigma) in sigmas.iter().enumerate() {
            let drop = rng.uniform() < self.cfg.update.condition_dropout;
            for &(song, sign, advantage) in &groups[i % groups.len()] {
                rows.push(Row { song, noise: i, sigma, drop, sign, advantage });
            }
        }
        Ok((rows, noise))
    }

    /// Weighted denoising errors `[B]` of `model` on some rows.
    fn errors(
        &self,
        model: &dyn DiffusionModel,
        rows: &[Row],
        generations: &Generations,
        noise: &Tensor,
    ) -> Result<Tensor> {
        let songs: Vec<usize> = rows.iter().map(|row| row.song).collect();
        let noises: Vec<usize> = rows.iter().map(|row| row.noise).collect();
        let sigmas: Vec<f64> = rows.iter().map(|row| row.sigma).collect();
        let drop: Vec<bool> = rows.iter().map(|row| row.drop).collect();
        let x0 = select(&generations.latents, &songs)?; // [B, C, T]
        let scale: Vec<f32> = sigmas.iter().map(|&sigma| sigma as f32).collect();
        let scale = Tensor::from_vec(scale, (rows.len(), 1, 1), x0.device())?;
        let x = (&x0 + select(noise, &noises)?.broadcast_mul(&scale)?)?; // [B, C, T]
        let cond = select_cond(&generations.cond, &songs)?;
        let denoised = model.with_texts(&cond, Some(&drop), x.dim(2)?)?(&x, &sigmas)?; // [B, C, T]
        Ok(denoising_errors(model.edm(), self.cfg.update.weighting, &denoised, &x0, &sigmas)?)
    }

    /// Errors without gradient, in micro-batches.
    fn values(
        &self,
        model: &dyn DiffusionModel,
        rows: &[Row],
        generations: &Generations,
        noise: &Tensor,
    ) -> Result<Vec<f64>> {
        let mut values = Vec::with_capacity(rows.len());
        for part in rows.chunks(self.cfg.update.micro_batch) {
            let errors = self.errors(model, part, generations, noise)?;
            values.extend(errors.to_vec1::<f32>()?.into_iter().map(f64::from));
        }
        Ok(values)
    }

    /// One update from the rows; gives the loss, both models' errors and the gradient norm.
    pub(super) fn update(
        &mut self,
        step: usize,
        rows: &[Row],
        generations: &Generations,
        noise: &Tensor,
    ) -> Result<Update> {
        let reference = self.values(self.reference.as_ref(), rows, generations, noise)?;
        let whole = rows.len() <= self.cfg.update.micro_batch;
        // KTO's Q is the mean gap of the whole batch: known before the first micro-batch only by a pass of its own.
        let mut baseline = 0.0;
        if self.cfg.loss.needs_baseline() && !whole {
            let frozen = self.policy.frozen(self.policy.tuned(), DType::F32)?;
            let policy = self.values(frozen.as_ref(), rows, generations, noise)?;
            baseline = kto_baseline(&gaps(&reference, &policy));
        }
        let count = if self.cfg.loss.needs_pairs() { rows.len() / 2 } else { rows.len() };
        let (mut loss, mut policy, mut total) = (0.0, Vec::with_capacity(rows.len()), None);
        for (i, part) in rows.chunks(self.cfg.update.micro_batch).enumerate() {
            let start = i * self.cfg.update.micro_batch;
            let known = &reference[start..start + part.len()];
            let errors = self.errors(self.model.as_ref(), part, generations, noise)?;
            let values: Vec<f64> = errors.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
            check_errors(step, part, &values, generations)?;
            if self.cfg.loss.needs_baseline() && whole {
                baseline = kto_baseline(&gaps(known, &values));
            }
            policy.extend(values);
            let known: Vec<f32> = known.iter().map(|&e| e as f32).collect();
            let errors =
                Errors { reference: Tensor::from_vec(known, part.len(), errors.device())?, policy: errors };
            let labels = Labels {
                signs: part.iter().map(|row| row.sign).collect(),
                advantages: part.iter().map(|row| row.advantage).collect(),
            };
            let part_loss = self.cfg.loss.evaluate(&errors, &labels, baseline, count)?;
            loss += f64::from(part_loss.to_scalar::<f32>()?);
            total = Some(add_gradients(total, dragon_nn::backward(&part_loss)?, self.policy.tuned())?);
        }
        if !loss.is_finite() {
            let what = "loss".to_owned();
            return Err(Error::NotFinite {
                what,
                value: loss,
                step,
                sigma: None,
                prompt: None,
                checkpoint: None,
            });
        }
        let grad_norm = match total {
            None => 0.0, // every pair was a tie
            Some(grads) => {
                let update = &self.cfg.update;
                let factor = update.schedule.factor(step, update.warmup_steps, self.cfg.run.steps);
                self.optimizer.set_lr(update.optimizer.lr * factor);
                self.optimizer.step(&grads)?
            }
        };
        if let Some(ema) = &self.ema {
            ema.update(self.policy.tuned())?;
        }
        Ok(Update { loss, grad_norm, baseline, reference, policy })
    }

    /// What is logged at every step.
    pub(super) fn log_of(
        &self,
        made: &Demonstrations,
        rows: &[Row],
        update: &Update,
    ) -> Vec<(&'static str, f64)> {
        let gaps = gaps(&update.reference, &update.policy);
        let scaled = rows.iter().zip(&gaps).map(|(row, g)| (self.cfg.loss.factor(row.advantage) * g).abs());
        let mut scaled: Vec<f64> = scaled.collect();
        scaled.sort_by(f64::total_cmp);
        let quantile = |q: f64| match scaled.len() {
            0 => 0.0,
            n => scaled[((n - 1) as f64 * q).round() as usize],
        };
        let mean = |values: &[f64], sign: f64| {
            let (mut sum, mut n) = (0.0, 0.0f64);
            for (_, value) in rows.iter().zip(values).filter(|(row, _)| row.sign == sign) {
                sum += value;
                n += 1.0;
            }
            sum / n.max(1.0)
        };
        // Share of (D+, D-) combinations in which the policy gained more on D+, ties counting half; of the pairs
        // themselves if paired.
        let paired = self.cfg.rollout.demonstrations == DemonstrationsConfig::Paired;
        let (mut right, mut all) = (0.0, 0.0f64);
        for (i, plus) in rows.iter().enumerate().filter(|(_, row)| row.sign > 0.0) {
            for (j, _) in rows
                .iter()
                .enumerate()
                .filter(|(_, row)| row.sign < 0.0 && (!paired || row.noise == plus.noise))
            {
                right += if gaps[i] == gaps[j] { 0.5 } else { f64::from(u8::from(gaps[i] > gaps[j])) };
                all += 1.0;
            }
        }
        vec![
            ("loss", update.loss),
            ("implicit_accuracy", right / all.max(1.0)),
            ("beta_gap_q10", quantile(0.1)),
            ("beta_gap_q50", quantile(0.5)),
            ("beta_gap_q90", quantile(0.9)),
            ("baseline", update.baseline),
            ("error_policy_plus", mean(&update.policy, 1.0)),
            ("error_policy_minus", mean(&update.policy, -1.0)),
            ("error_reference_plus", mean(&update.reference, 1.0)),
            ("error_reference_minus", mean(&update.reference, -1.0)),
            ("grad_norm", update.grad_norm),
            ("reward_d1", made.reward_first),
            ("reward_d2", made.reward_second),
            ("reward_plus", made.reward_plus),
            ("reward_minus", made.reward_minus),
            ("pairs", rows.iter().filter(|row| row.sign > 0.0).count() as f64 / self.cfg.update.draws as f64),
        ]
    }
}

fn gaps(reference: &[f64], policy: &[f64]) -> Vec<f64> {
    reference.iter().zip(policy).map(|(r, p)| r - p).collect()
}

fn check_errors(step: usize, rows: &[Row], values: &[f64], generations: &Generations) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::NotFinite {
            what: "the denoising error".to_owned(),
            value: values[i],
            step,
            sigma: Some(rows[i].sigma),
            prompt: Some(generations.captions[rows[i].song].clone()),
            checkpoint: None,
        }),
    }
}

/// Adds the gradients of a micro-batch to those before it, variable by variable in the order of their names.
fn add_gradients(total: Option<GradStore>, new: GradStore, params: &Params) -> Result<GradStore> {
    let Some(mut total) = total else { return Ok(new) };
    for (_, var) in params.names_and_vars() {
        if let Some(grad) = new.get(var.as_tensor()) {
            let sum = match total.get(var.as_tensor()) {
                Some(before) => (before + grad)?,
                None => grad.clone(),
            };
            total.insert(var.as_tensor(), sum);
        }
    }
    Ok(total)
}
