//! The DRAGON loop (paper 3, appendix F): generate, score, split into D+ and D-, learn from them.
//!
//! A step in the order of [`FinetuneTask::step`]: prompts; two generations of each by the current policy (now and then
//! by the reference); audio, embeddings, rewards; D+ and D-; denoising errors of policy and reference on the stored
//! latents; loss, clipping, AdamW, EMA. Everything random follows from (run seed, step), so a resumed run is exact.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use dragon_diffusion::{Model, SamplerConfig, TextCond, Weighting, denoising_errors};
use dragon_nn::{AdamW, AdamWConfig, Ema, Params, Rng};
use dragon_rewards::{
    Demonstrations, Reward, RewardConfig, RewardSet, RunningStats, Song, Split as RewardSplit,
};
use serde::{Deserialize, Serialize};

use crate::bundle::{self, Bundle, Prompt, Split};
use crate::embedder::{Batch, EmbedConfig, Embedder};
use crate::error::{Error, Result};
use crate::losses::{Errors, Labels, LossConfig, kto_baseline};
use crate::pretrain::{self, LoopConfig, Outcome, Task};
use crate::rollout::{self, TextCache};
use crate::run::RunContext;

/// Everything a fine-tuning depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneConfig {
    /// Seed of the run: prompts' order, noise of generations, noise levels, condition dropout.
    pub seed: u64,
    /// Model folder: VAE, text encoder, the base diffusion model (which is also the reference), prompts.
    pub bundle: PathBuf,
    /// Prompt file; lines of split `train` are tuned on, lines of split `valid` measured during the run.
    pub prompts: PathBuf,
    /// How demonstrations are made.
    pub rollout: RolloutConfig,
    /// What is rewarded (paper 4).
    pub reward: RewardConfig,
    /// Encoders and settings that the reward names.
    pub embed: EmbedConfig,
    /// What is learned from D+ and D- (paper 3.2, A).
    pub loss: LossConfig,
    /// How the policy is updated.
    pub update: UpdateConfig,
    /// Measuring during the run.
    pub validation: ValidationConfig,
    /// Length and intervals.
    pub run: LoopConfig,
}

/// How demonstrations are made (paper 3.1, appendix E).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// Generations per step; paired: two of each of half as many prompts (paper 80), unpaired: one of each prompt.
    pub songs_per_step: usize,
    /// Whether D+ and D- hold pairs of one prompt.
    pub demonstrations: DemonstrationsConfig,
    /// Probability that a generation comes from the reference model instead of the policy, drawn for each generation;
    /// paper value unknown.
    pub reference_probability: f64,
    /// How latents are sampled; paper: 40 steps of a second-order DPM solver with CFG++. 10 steps train as well.
    pub sampler: SamplerConfig,
    /// Songs sampled at a time; bounds memory and changes no number.
    pub batch: usize,
}

/// How D+ and D- are formed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DemonstrationsConfig {
    /// Two generations of each prompt: the better one for a reward of songs, Algorithm 1 for a reward of sets.
    Paired,
    /// One generation of each prompt, split at a threshold; needs a reward of songs and a loss without pairs.
    Unpaired {
        /// The threshold; paper: the batch mean.
        split: RewardSplit,
    },
}

/// How the policy is updated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateConfig {
    /// Weight of a squared error by its noise level.
    pub weighting: Weighting,
    /// Noise levels and noises drawn per demonstration and step: they average the loss without new generations; paper 1.
    pub draws: usize,
    /// Probability that a demonstration is learned without its prompt; paper 0.1.
    pub condition_dropout: f64,
    /// Demonstrations in memory at a time, even; changes the result by rounding only.
    pub micro_batch: usize,
    /// Optimiser; paper: Adam, constant learning rate, gradient clipping; values unknown.
    pub optimizer: AdamWConfig,
    /// Decay of the averaged weights that are exported; 0 exports the last weights (ours; the paper names none).
    pub ema_decay: f64,
}

/// Measuring during the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Prompts of split `valid` to generate for; their noise is that of `generate` and `eval`.
    pub n_prompts: usize,
    /// How latents are sampled.
    pub sampler: SamplerConfig,
}

impl FinetuneConfig {
    /// Checks everything that can be checked before weights are read.
    ///
    /// # Errors
    /// For the first key that cannot work.
    pub fn check(&self) -> Result<()> {
        self.run.check()?;
        let rollout = &self.rollout;
        let counts = [
            ("rollout.songs_per_step", rollout.songs_per_step, 2),
            ("rollout.batch", rollout.batch, 1),
            ("rollout.sampler.n_steps", rollout.sampler.n_steps, 1),
            ("update.draws", self.update.draws, 1),
            ("update.micro_batch", self.update.micro_batch, 2),
        ];
        for (key, value, least) in counts {
            if value < least {
                return Err(Error::config(key, format!("at least {least}"), value));
            }
        }
        for (key, value) in [
            ("rollout.songs_per_step", rollout.songs_per_step),
            ("update.micro_batch", self.update.micro_batch),
        ] {
            if !value.is_multiple_of(2) {
                return Err(Error::config(key, "an even number", value));
            }
        }
        let shares = [
            ("rollout.reference_probability", rollout.reference_probability),
            ("update.condition_dropout", self.update.condition_dropout),
            ("update.ema_decay", self.update.ema_decay),
        ];
        for (key, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::config(key, "a number in [0, 1]", value));
            }
        }
        if self.update.ema_decay == 1.0 {
            return Err(Error::config("update.ema_decay", "a number below 1", 1.0));
        }
        let positive = [("update.optimizer.lr", self.update.optimizer.lr), ("loss.beta", self.loss.beta())];
        for (key, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::config(key, "a number above 0", value));
            }
        }
        rollout.sampler.guidance.check().map_err(Error::input("rollout.sampler.guidance"))?;
        self.validation.sampler.guidance.check().map_err(Error::input("validation.sampler.guidance"))?;
        if matches!(rollout.demonstrations, DemonstrationsConfig::Unpaired { .. }) && self.loss.needs_pairs()
        {
            return Err(Error::config(
                "rollout.demonstrations.kind",
                "paired, which this loss needs",
                "unpaired",
            ));
        }
        self.embed.check([&self.reward])
    }

    fn prompts_per_step(&self) -> usize {
        match self.rollout.demonstrations {
            DemonstrationsConfig::Paired => self.rollout.songs_per_step / 2,
            DemonstrationsConfig::Unpaired { .. } => self.rollout.songs_per_step,
        }
    }
}

/// Fine-tunes the base model of a model folder; the tuned model goes to `OUT/model/`.
///
/// # Errors
/// If the config cannot work, a file is missing or broken, the folder is in use, or the loss stops being a number.
pub fn run(cfg: &FinetuneConfig, ctx: &RunContext) -> Result<Outcome> {
    cfg.check()?;
    let train = bundle::prompts_of(&cfg.prompts, Split::Train, cfg.prompts_per_step())?;
    let valid = match cfg.run.validate_every {
        0 => Vec::new(),
        _ => bundle::prompts_of(&cfg.prompts, Split::Valid, cfg.validation.n_prompts)?,
    };
    // The lock and the refusal to overwrite a run come before any weight is read.
    let resolved = Resolved { base: base_sha256(&cfg.bundle)?, config: cfg };
    let mut folder = crate::run::RunFolder::open(ctx, "finetune", &resolved)?;
    let bundle = Bundle::load(&cfg.bundle, &ctx.device)?;
    let embedder = Embedder::load(&cfg.embed, &cfg.reward.sources(), &bundle.device)?;
    let rewards = embedder.reward(&cfg.reward, Some(&bundle), ctx)?;
    let mut task = FinetuneTask::new(cfg, &bundle, &embedder, rewards, train, valid, ctx)?;
    tracing::info!(
        "fine-tuning {:.2} M parameters towards {}",
        task.policy.len_params() as f64 / 1e6,
        cfg.reward.label()
    );
    pretrain::run_in(&mut folder, &mut task, &cfg.run, cfg.seed, ctx)
}

/// What goes to `run.toml`: the config, and which base weights it started from.
struct Resolved<'a> {
    base: String,
    config: &'a FinetuneConfig,
}

impl Serialize for Resolved<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut table = toml::Table::try_from(self.config).map_err(serde::ser::Error::custom)?;
        table.insert("base_sha256".to_owned(), self.base.clone().into());
        table.serialize(serializer)
    }
}

fn base_sha256(bundle: &Path) -> Result<String> {
    use sha2::{Digest, Sha256};
    let path = bundle.join("dit/model.safetensors");
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    Ok(crate::run::hex(&Sha256::digest(&bytes)))
}

/// Fine-tuning as a task of the common loop.
pub struct FinetuneTask<'a> {
    cfg: &'a FinetuneConfig,
    bundle: &'a Bundle,
    embedder: &'a Embedder,
    rewards: RewardSet,
    train: Vec<Prompt>,
    valid: Vec<Prompt>,
    texts: TextCache,
    policy: Params,
    model: Model,
    reference: Model,
    optimizer: AdamW,
    ema: Option<Ema>,
    valid_base: Option<Vec<Song>>,
    ctx: RunContext,
}

/// One row of an update: a demonstration at one noise level.
struct Row {
    song: usize,
    noise: usize,
    sigma: f64,
    drop: bool,
    sign: f64,
    advantage: f64,
}

impl<'a> FinetuneTask<'a> {
    /// A task at the base model's weights.
    ///
    /// # Errors
    /// If the loss and the reward do not fit each other, or memory for the optimiser is missing.
    pub fn new(
        cfg: &'a FinetuneConfig,
        bundle: &'a Bundle,
        embedder: &'a Embedder,
        rewards: RewardSet,
        train: Vec<Prompt>,
        valid: Vec<Prompt>,
        ctx: &RunContext,
    ) -> Result<Self> {
        for reward in rewards.iter() {
            let of_sets = matches!(reward, Reward::Distribution(_));
            if of_sets && self::needs_songs(cfg) {
                return Err(Error::config(
                    "reward.kind",
                    "a reward of single songs, which this loss or `unpaired` demonstrations need",
                    "a reward of sets",
                ));
            }
        }
        let policy = bundle.dit.deep_clone()?;
        let model = Model::new(&bundle.dit_config, policy.builder(DType::F32, &bundle.device))?;
        let optimizer = AdamW::new(&policy, cfg.update.optimizer.clone())?;
        let ema = match cfg.update.ema_decay {
            0.0 => None,
            decay => Some(Ema::new(&policy, decay)?),
        };
        let reference = bundle.base_model()?;
        let (texts, valid_base) = (TextCache::default(), None);
        let ctx = ctx.clone();
        Ok(Self {
            cfg,
            bundle,
            embedder,
            rewards,
            train,
            valid,
            texts,
            policy,
            model,
            reference,
            optimizer,
            ema,
            valid_base,
            ctx,
        })
    }

    /// The policy's current weights.
    pub fn policy(&self) -> &Params {
        &self.policy
    }

    /// The weights that are exported: averaged ones, if there are any.
    fn exported(&self) -> &Params {
        self.ema.as_ref().map_or(&self.policy, Ema::shadow)
    }

    /// The prompts of a step: all training prompts in a new order each epoch.
    fn prompts_at(&self, step: usize) -> Vec<usize> {
        let (count, n) = (self.cfg.prompts_per_step(), self.train.len());
        let mut epochs: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut at = |position: usize| {
            let order = epochs.entry(position / n).or_insert_with(|| {
                let mut order: Vec<usize> = (0..n).collect();
                Rng::from_key(&format!("epoch/{}", position / n), self.cfg.seed).shuffle(&mut order);
                order
            });
            order[position % n]
        };
        (step * count..(step + 1) * count).map(&mut at).collect()
    }

    /// Generates the songs of a step: first one of each prompt, then, if paired, a second.
    fn rollout(&self, step: usize, prompts: &[usize], rng: &mut Rng) -> Result<Generations> {
        let members = match self.cfg.rollout.demonstrations {
            DemonstrationsConfig::Paired => 2,
            DemonstrationsConfig::Unpaired { .. } => 1,
        };
        let ids: Vec<usize> = (0..members).flat_map(|_| prompts.iter().copied()).collect();
        let captions: Vec<&str> = ids.iter().map(|&i| self.train[i].caption.as_str()).collect();
        let keys: Vec<String> = ids
            .iter()
            .enumerate()
            .map(|(row, &i)| format!("rollout/{step}/{}/{}", self.train[i].id, row / prompts.len()))
            .collect();
        let seeded: Vec<(&str, u64)> = keys.iter().map(|key| (key.as_str(), self.cfg.seed)).collect();
        let noise = rollout::noise(self.bundle, &seeded)?;
        let cond = self.texts.get(self.bundle, &captions)?;
        let by_reference: Vec<bool> =
            ids.iter().map(|_| rng.uniform() < self.cfg.rollout.reference_probability).collect();
        let frozen = Model::new(&self.bundle.dit_config, bundle::frozen(&self.policy, &self.bundle.device))?;
        let mut rows: Vec<Option<Tensor>> = vec![None; ids.len()];
        for (model, reference) in [(&frozen, false), (&self.reference, true)] {
            let mine: Vec<usize> = (0..ids.len()).filter(|&row| by_reference[row] == reference).collect();
            if mine.is_empty() {
                continue;
            }
            let (noise, cond) = (select(&noise, &mine)?, select_cond(&cond, &mine)?);
            let prompts: Vec<&str> = mine.iter().map(|&row| captions[row]).collect();
            // A stop request waits for the end of the step: the step in progress is kept.
            let quiet = RunContext { stop: Default::default(), ..self.ctx.clone() };
            let sampler = &self.cfg.rollout.sampler;
            let latents =
                rollout::latents(model, &cond, &noise, sampler, self.cfg.rollout.batch, &quiet, &prompts)
                    .map_err(|err| at_step(err, step))?
                    .ok_or_else(|| Error::Bug("sampling stopped without being asked".into()))?;
            for (i, row) in mine.into_iter().enumerate() {
                rows[row] = Some(latents.narrow(0, i, 1)?);
            }
        }
        let rows: Vec<Tensor> = rows.into_iter().flatten().collect();
        let latents = Tensor::cat(&rows, 0)?;
        let clips = self.bundle.decode(&latents)?;
        let songs = self.embedder.songs(self.rewards.sources(), &self.batch(&latents, &clips, &captions))?;
        let (loudness_dbfs, centroid_hz) = rollout::monitors(&clips, self.bundle.sample_rate_hz());
        let captions = captions.into_iter().map(str::to_owned).collect();
        Ok(Generations { latents, cond, songs, captions, by_reference, loudness_dbfs, centroid_hz })
    }

    fn batch<'b>(&'b self, latents: &'b Tensor, clips: &'b [Vec<f32>], captions: &'b [&'b str]) -> Batch<'b> {
        Batch {
            clips,
            sample_rate_hz: self.bundle.sample_rate_hz(),
            latents: Some(latents),
            captions: Some(captions),
            bundle: Some(self.bundle),
        }
    }

    /// Splits the songs of a step; gives the reward's index too.
    fn demonstrations(&mut self, generations: &Generations, random: u64) -> Result<(Demonstrations, usize)> {
        let pick = self.rewards.pick(random);
        let songs: Vec<&Song> = generations.songs.iter().collect();
        let refused = |err: dragon_rewards::Error| Error::input("cannot score the generations")(err);
        let reward = self.rewards.get_mut(pick).ok_or_else(|| Error::Bug(format!("no reward {pick}")))?;
        let (first, second) = songs.split_at(songs.len() / 2);
        reward.observe(first, second).map_err(refused)?;
        let made = match self.cfg.rollout.demonstrations {
            DemonstrationsConfig::Paired => dragon_rewards::demonstrations::paired(reward, first, second),
            DemonstrationsConfig::Unpaired { split } => {
                dragon_rewards::demonstrations::unpaired(reward, &songs, split)
            }
        };
        Ok((made.map_err(refused)?, pick))
    }

    /// The rows of an update. A pair shares noise level, noise and condition dropout; unpaired songs have their own.
    fn rows(&self, made: &Demonstrations, rng: &mut Rng) -> Result<(Vec<Row>, Tensor)> {
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
        let sigmas = self.bundle.dit_config.edm.sample_sigmas_stratified(count, rng);
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
        model: &Model,
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
        let context = model.dit.context(&cond, Some(&drop), x.dim(2)?)?;
        let denoised = model.denoise_with(&x, &sigmas, &context)?; // [B, C, T]
        Ok(denoising_errors(&model.edm, self.cfg.update.weighting, &denoised, &x0, &sigmas)?)
    }

    /// Errors without gradient, in micro-batches.
    fn values(
        &self,
        model: &Model,
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
    fn update(
        &mut self,
        step: usize,
        rows: &[Row],
        generations: &Generations,
        noise: &Tensor,
    ) -> Result<Update> {
        let reference = self.values(&self.reference, rows, generations, noise)?;
        let whole = rows.len() <= self.cfg.update.micro_batch;
        // KTO's Q is the mean gap of the whole batch: known before the first micro-batch only by a pass of its own.
        let mut baseline = 0.0;
        if self.cfg.loss.needs_baseline() && !whole {
            let frozen =
                Model::new(&self.bundle.dit_config, bundle::frozen(&self.policy, &self.bundle.device))?;
            let policy = self.values(&frozen, rows, generations, noise)?;
            baseline = kto_baseline(&gaps(&reference, &policy));
        }
        let count = if self.cfg.loss.needs_pairs() { rows.len() / 2 } else { rows.len() };
        let (mut loss, mut policy, mut total) = (0.0, Vec::with_capacity(rows.len()), None);
        for (i, part) in rows.chunks(self.cfg.update.micro_batch).enumerate() {
            let start = i * self.cfg.update.micro_batch;
            let known = &reference[start..start + part.len()];
            let errors = self.errors(&self.model, part, generations, noise)?;
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
            total = Some(add_gradients(total, dragon_nn::backward(&part_loss)?, &self.policy)?);
        }
        let not_finite = |what: &str, value: f64| Error::NotFinite {
            what: what.to_owned(),
            value,
            step,
            sigma: None,
            prompt: None,
            checkpoint: None,
        };
        if !loss.is_finite() {
            return Err(not_finite("loss", loss));
        }
        let grad_norm = match total {
            None => 0.0, // every pair was a tie
            Some(grads) => match self.optimizer.step(&grads) {
                Ok(norm) => norm,
                Err(err) if err.to_string().contains("gradient norm") => {
                    return Err(not_finite("gradient norm", f64::NAN));
                }
                Err(err) => return Err(err.into()),
            },
        };
        if let Some(ema) = &self.ema {
            ema.update(&self.policy)?;
        }
        Ok(Update { loss, grad_norm, baseline, reference, policy })
    }

    /// Songs of the validation prompts by a model, with the noise that `generate` and `eval` use.
    fn valid_songs(&self, model: &Model) -> Result<Vec<Song>> {
        let prompts = &self.valid[..self.cfg.validation.n_prompts.min(self.valid.len())];
        let captions: Vec<&str> = prompts.iter().map(|p| p.caption.as_str()).collect();
        let keys: Vec<(&str, u64)> = captions.iter().map(|&caption| (caption, self.cfg.seed)).collect();
        let noise = rollout::noise(self.bundle, &keys)?;
        let cond = self.texts.get(self.bundle, &captions)?;
        let quiet = RunContext { stop: Default::default(), ..self.ctx.clone() };
        let sampler = &self.cfg.validation.sampler;
        let latents =
            rollout::latents(model, &cond, &noise, sampler, self.cfg.rollout.batch, &quiet, &captions)?
                .ok_or_else(|| Error::Bug("sampling stopped without being asked".into()))?;
        let clips = self.bundle.decode(&latents)?;
        self.embedder.songs(self.rewards.sources(), &self.batch(&latents, &clips, &captions))
    }
}

/// The songs of a step.
struct Generations {
    latents: Tensor,
    cond: TextCond,
    songs: Vec<Song>,
    captions: Vec<String>,
    by_reference: Vec<bool>,
    loudness_dbfs: f64,
    centroid_hz: f64,
}

/// What an update found.
struct Update {
    loss: f64,
    grad_norm: f64,
    baseline: f64,
    reference: Vec<f64>,
    policy: Vec<f64>,
}

impl Task for FinetuneTask<'_> {
    fn step(&mut self, step: usize, rng: &mut Rng) -> Result<Vec<(&'static str, f64)>> {
        let prompts = self.prompts_at(step);
        let generations = self.rollout(step, &prompts, &mut rng.fork("rollout"))?;
        let (made, pick) = self.demonstrations(&generations, rng.fork("reward").next_u64())?;
        let (rows, noise) = self.rows(&made, &mut rng.fork("noise"))?;
        let update = self.update(step, &rows, &generations, &noise)?;
        let mut log = self.log_of(&made, &rows, &update);
        let own: Vec<usize> =
            (0..generations.songs.len()).filter(|&i| !generations.by_reference[i]).collect();
        let reward = match &made.scores {
            Some(scores) if !own.is_empty() => own.iter().map(|&i| scores[i]).sum::<f64>() / own.len() as f64,
            _ => 0.5 * (made.reward_first + made.reward_second),
        };
        let shared = 1.0 - own.len() as f64 / generations.songs.len() as f64;
        log.extend([
            ("reward", reward),
            ("reference_share", shared),
            ("reward_index", pick as f64),
            ("loudness_dbfs", generations.loudness_dbfs),
            ("centroid_hz", generations.centroid_hz),
        ]);
        Ok(log)
    }

    fn validate(&mut self) -> Result<Vec<(&'static str, f64)>> {
        if self.valid.is_empty() {
            return Ok(Vec::new());
        }
        if self.valid_base.is_none() {
            self.valid_base = Some(self.valid_songs(&self.reference)?);
        }
        let tuned =
            Model::new(&self.bundle.dit_config, bundle::frozen(self.exported(), &self.bundle.device))?;
        let tuned = self.valid_songs(&tuned)?;
        let base = self.valid_base.as_deref().unwrap_or_default();
        let refused = |err: dragon_rewards::Error| Error::input("cannot score the validation songs")(err);
        let (tuned, base): (Vec<&Song>, Vec<&Song>) = (tuned.iter().collect(), base.iter().collect());
        let reward = self.rewards.get(0).ok_or_else(|| Error::Bug("no reward".into()))?;
        let mut out = vec![
            ("reward", reward.set_score(&tuned).map_err(refused)?),
            ("reward_base", reward.set_score(&base).map_err(refused)?),
        ];
        let scores =
            (reward.song_scores(&tuned).map_err(refused)?, reward.song_scores(&base).map_err(refused)?);
        if let (Some(tuned), Some(base)) = scores {
            let rate = dragon_metrics::win_rate(&tuned, &base, dragon_metrics::Better::Higher);
            out.push(("win_rate", rate.map_err(Error::input("validation"))?.rate));
        }
        Ok(out)
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        let mut put = |prefix: &str, tensors: BTreeMap<String, Tensor>| {
            state.extend(tensors.into_iter().map(|(name, t)| (format!("{prefix}/{name}"), t)));
        };
        put("policy", self.policy.tensors()?);
        put("optimizer", self.optimizer.state()?);
        if let Some(ema) = &self.ema {
            put("ema", ema.shadow().tensors()?);
        }
        for (i, stats) in self.rewards.state().iter().enumerate() {
            let flat: Vec<f64> = stats.iter().flat_map(|s| [s.n as f64, s.mean, s.scatter]).collect();
            state.insert(format!("reward/{i}"), Tensor::from_vec(flat, (stats.len(), 3), &Device::Cpu)?);
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let part = |prefix: &str| -> BTreeMap<String, Tensor> {
            let named =
                state.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t.clone())));
            named.collect()
        };
        const WRONG: &str = "the checkpoint does not fit this run";
        self.policy.load_tensors(&part("policy/").into_iter().collect(), "").map_err(Error::input(WRONG))?;
        self.optimizer.load_state(&part("optimizer/")).map_err(Error::input(WRONG))?;
        if let Some(ema) = &self.ema {
            ema.shadow()
                .load_tensors(&part("ema/").into_iter().collect(), "")
                .map_err(Error::input(WRONG))?;
        }
        let mut stats = Vec::with_capacity(self.rewards.len());
        for i in 0..self.rewards.len() {
            let rows = match state.get(&format!("reward/{i}")) {
                Some(tensor) if tensor.elem_count() > 0 => tensor.to_vec2::<f64>()?,
                _ => Vec::new(),
            };
            let one = |row: Vec<f64>| RunningStats { n: row[0] as u64, mean: row[1], scatter: row[2] };
            stats.push(rows.into_iter().map(one).collect());
        }
        self.rewards.load_state(&stats).map_err(Error::input(WRONG))
    }

    fn export(&self, dir: &Path) -> Result<()> {
        bundle::save_dit(dir, &self.bundle.dit_config, self.exported())
    }

    fn headline(&self) -> &'static [&'static str] {
        &[
            "loss",
            "reward",
            "valid/reward",
            "valid/win_rate",
            "beta_gap_q50",
            "implicit_accuracy",
            "grad_norm",
        ]
    }

    fn throughput(&self) -> (f64, &'static str) {
        (self.cfg.rollout.songs_per_step as f64, "songs")
    }
}

impl FinetuneTask<'_> {
    /// What is logged at every step.
    fn log_of(&self, made: &Demonstrations, rows: &[Row], update: &Update) -> Vec<(&'static str, f64)> {
        let gaps = gaps(&update.reference, &update.policy);
        let mut scaled: Vec<f64> = gaps.iter().map(|g| (self.cfg.loss.beta() * g).abs()).collect();
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
        // Share of (D+, D-) combinations in which the policy gained more on D+; of the pairs themselves if paired.
        let paired = self.cfg.rollout.demonstrations == DemonstrationsConfig::Paired;
        let (mut right, mut all) = (0.0, 0.0f64);
        for (i, plus) in rows.iter().enumerate().filter(|(_, row)| row.sign > 0.0) {
            for (j, _) in rows
                .iter()
                .enumerate()
                .filter(|(_, row)| row.sign < 0.0 && (!paired || row.noise == plus.noise))
            {
                right += f64::from(u8::from(gaps[i] > gaps[j]));
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

fn needs_songs(cfg: &FinetuneConfig) -> bool {
    cfg.loss.needs_song_rewards()
        || matches!(cfg.rollout.demonstrations, DemonstrationsConfig::Unpaired { .. })
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

fn at_step(err: Error, at: usize) -> Error {
    match err {
        Error::NotFinite { what, value, sigma, prompt, checkpoint, .. } => {
            Error::NotFinite { what, value, step: at, sigma, prompt, checkpoint }
        }
        other => other,
    }
}

/// Rows of `x` by index, `[B, …]`.
fn select(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let ids: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Ok(x.index_select(&Tensor::from_vec(ids, rows.len(), x.device())?, 0)?)
}

fn select_cond(cond: &TextCond, rows: &[usize]) -> Result<TextCond> {
    Ok(TextCond { states: select(&cond.states, rows)?, mask: select(&cond.mask, rows)? })
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
