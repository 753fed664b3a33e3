//! The DRAGON loop (paper 3, appendix F): generate, score, split into D+ and D-, learn from them.
//!
//! A step in the order of [`FinetuneTask::step`]: prompts; two generations of each by the current policy (now and then
//! by the reference); audio, embeddings, rewards; D+ and D-; denoising errors of policy and reference on the stored
//! latents; loss, clipping, AdamW, EMA. Everything random follows from (run seed, step), so a resumed run is exact.
//!
//! Reading order: the task and its step are here; `config` says what a run depends on; `generations` makes songs and
//! splits them into D+ and D-; `update` learns from them; `watch` validates and warns.

mod config;
mod generations;
mod policy;
mod update;
mod watch;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use dragon_diffusion::DiffusionModel;
use dragon_nn::{AdamW, Ema, Params, Rng};
use dragon_rewards::{Reward, RewardSet, RunningStats};
use serde::Serialize;

pub use config::{
    DemonstrationsConfig, FinetuneConfig, RolloutConfig, RolloutDtype, UpdateConfig, ValidationConfig,
};

use crate::bundle::{self, Bundle, Prompt, Split};
use crate::embedder::Embedder;
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::pretrain::{self, Outcome, Task};
use crate::rollout::{self, TextCache};
use crate::run::RunContext;
use policy::Policy;
use watch::{Drift, Validation};

/// Fine-tunes the base model of a model folder; the tuned model goes to `OUT/model/`.
///
/// # Errors
/// If the config cannot work, a file is missing or broken, the folder is in use, or the loss stops being a number.
pub fn run(cfg: &FinetuneConfig, ctx: &RunContext) -> Result<Outcome> {
    cfg.check()?;
    let train = bundle::prompts_of(&cfg.prompts, Split::Train, cfg.rollout.prompts_per_step())?;
    let valid = match cfg.run.validate_every {
        0 => Vec::new(),
        _ => bundle::some_prompts_of(&cfg.prompts, Split::Valid, cfg.validation.n_prompts)?,
    };
    // The lock and the refusal to overwrite a run come before any weight is read.
    let resolved = Resolved { inputs: inputs_of(cfg)?, config: cfg };
    let mut folder = crate::run::RunFolder::open(ctx, "finetune", &resolved)?;
    let bundle = Bundle::load_for(&cfg.bundle, &cfg.length, &ctx.device)?;
    let sources: Vec<_> = cfg.watched().chain([&cfg.reward]).flat_map(|reward| reward.sources()).collect();
    let embedder = Embedder::load(&cfg.embed, &sources, &bundle.device)?;
    let rewards = embedder.reward(&cfg.reward, Some(&bundle), ctx)?;
    embedder.try_out(&rewards, &bundle)?;
    let mut task = FinetuneTask::new(cfg, &bundle, &embedder, rewards, train, valid, ctx)?;
    tracing::info!(
        "fine-tuning {:.2} M parameters towards {}",
        task.policy.tuned().len_params() as f64 / 1e6,
        cfg.reward.label()
    );
    pretrain::run_in(&mut folder, &mut task, &cfg.run, cfg.seed, ctx)
}

/// What goes to `run.toml`: the config, and what is in the files that it names.
struct Resolved<'a> {
    inputs: Inputs,
    config: &'a FinetuneConfig,
}

impl Serialize for Resolved<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut table = toml::Table::try_from(self.config).map_err(serde::ser::Error::custom)?;
        table.insert(crate::run::INPUTS.to_owned(), self.inputs.to_table().into());
        table.serialize(serializer)
    }
}

/// Every file that a run reads.
fn inputs_of(cfg: &FinetuneConfig) -> Result<Inputs> {
    let mut inputs = Inputs::default();
    inputs.add_bundle(&cfg.bundle)?;
    inputs.add("prompts", std::slice::from_ref(&cfg.prompts))?;
    for reward in cfg.watched().chain([&cfg.reward]) {
        inputs.add_reward(reward, &cfg.embed)?;
    }
    Ok(inputs)
}

/// Fine-tuning as a task of the common loop.
pub struct FinetuneTask<'a> {
    cfg: &'a FinetuneConfig,
    bundle: &'a Bundle,
    embedder: &'a Embedder,
    rewards: RewardSet,
    train: Vec<Prompt>,
    validation: Option<Validation>,
    drift: Drift,
    warnings: Vec<String>,
    texts: TextCache,
    policy: Policy<'a>,
    /// The policy with gradients.
    model: Box<dyn DiffusionModel>,
    reference: Box<dyn DiffusionModel>,
    optimizer: AdamW,
    ema: Option<Ema>,
    ctx: RunContext,
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
            if of_sets && needs_songs(cfg) {
                return Err(Error::config(
                    "reward.kind",
                    "a reward of single songs, which this loss or `unpaired` demonstrations need",
                    "a reward of sets",
                ));
            }
        }
        let policy = Policy::new(&cfg.update, &bundle.diffusion, cfg.seed)?;
        let model = policy.model()?;
        let optimizer = AdamW::new(policy.tuned(), cfg.update.optimizer.clone())?;
        let ema = match cfg.update.ema_decay {
            0.0 => None,
            decay => Some(Ema::new(policy.tuned(), decay)?),
        };
        let reference = bundle.diffusion.base()?;
        let validation = match valid.is_empty() {
            true => None,
            false => Some(Validation::new(cfg, bundle, embedder, valid, ctx)?),
        };
        let (texts, drift, ctx) = (TextCache::default(), Drift::default(), ctx.clone());
        Ok(Self {
            cfg,
            bundle,
            embedder,
            rewards,
            train,
            validation,
            drift,
            warnings: Vec::new(),
            texts,
            policy,
            model,
            reference,
            optimizer,
            ema,
            ctx,
        })
    }

    /// The variables that are tuned.
    pub fn tuned(&self) -> &Params {
        self.policy.tuned()
    }

    /// The values that are exported: averaged ones, if there are any.
    fn exported(&self) -> &Params {
        self.ema.as_ref().map_or(self.policy.tuned(), Ema::shadow)
    }

    /// The prompts of a step: all training prompts in a new order each epoch.
    fn prompts_at(&self, step: usize) -> Vec<usize> {
        pretrain::items_of_step(step, self.cfg.rollout.prompts_per_step(), self.train.len(), self.cfg.seed)
    }
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
            ("latent_rms", generations.latent_rms),
        ]);
        log.extend(rollout::MONITORS.iter().map(|(key, _)| *key).zip(generations.monitors));
        self.warnings.extend(self.drift.after(&log));
        Ok(log)
    }

    fn validate(&mut self) -> Result<Vec<(String, f64)>> {
        match self.validation.take() {
            None => Ok(Vec::new()),
            Some(mut validation) => {
                let found = validation.run(self);
                self.validation = Some(validation);
                let (log, warnings) = found?;
                self.warnings.extend(warnings);
                Ok(log)
            }
        }
    }

    fn warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        pretrain::put(&mut state, "policy/", self.policy.tuned().tensors()?);
        pretrain::put(&mut state, "optimizer/", self.optimizer.state()?);
        if let Some(ema) = &self.ema {
            pretrain::put(&mut state, "ema/", ema.shadow().tensors()?);
        }
        for (i, stats) in self.rewards.state().iter().enumerate() {
            let flat: Vec<f64> = stats.iter().flat_map(|s| [s.n as f64, s.mean, s.scatter]).collect();
            state.insert(format!("reward/{i}"), Tensor::from_vec(flat, (stats.len(), 3), &Device::Cpu)?);
        }
        let drift = self.drift.state();
        state.insert("drift".into(), Tensor::new(drift, &Device::Cpu)?);
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        const WRONG: &str = "the checkpoint does not fit this run";
        self.policy
            .tuned()
            .load_tensors(&pretrain::take(state, "policy/"), "")
            .map_err(Error::input(WRONG))?;
        self.optimizer.load_state(&pretrain::take(state, "optimizer/")).map_err(Error::input(WRONG))?;
        if let Some(ema) = &self.ema {
            ema.shadow().load_tensors(&pretrain::take(state, "ema/"), "").map_err(Error::input(WRONG))?;
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
        if let Some(drift) = state.get("drift") {
            self.drift = Drift::of_state(&drift.to_vec1::<f64>()?);
        }
        self.rewards.load_state(&stats).map_err(Error::input(WRONG))
    }

    fn export(&self, dir: &Path) -> Result<()> {
        self.policy.export(dir, self.exported())
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

fn needs_songs(cfg: &FinetuneConfig) -> bool {
    cfg.loss.needs_song_rewards()
        || matches!(cfg.rollout.demonstrations, DemonstrationsConfig::Unpaired { .. })
}
