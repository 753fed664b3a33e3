//! How fast the parts of the main job are on this machine: what `dragon bench` prints.
//!
//! Each part does the work of one step of a fine-tuning, on the models and with the settings of its config, and is timed
//! several times; the table gives the fastest, which other work on the machine disturbs least.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Tensor};
use dragon_diffusion::{DiffusionModel, denoising_errors};
use dragon_metrics::{FrechetReference, Rows};
use dragon_nn::{AdamW, Params, Rng};
use dragon_rewards::{DatasetFad, Song, greedy};
use serde::Serialize;

use crate::bundle::{self, Bundle, Split};
use crate::embedder::{Batch, Embedder};
use crate::error::{Error, Result};
use crate::finetune::FinetuneConfig;
use crate::losses::{Errors, Labels, kto_baseline};
use crate::rollout::{self, TextCache};
use crate::run::RunContext;

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was done.
    pub part: String,
    /// How much of it, in `unit`.
    pub amount: f64,
    /// What `amount` counts: `songs`, `s of audio`, `passes`.
    pub unit: &'static str,
    /// Time of the fastest round, seconds.
    pub seconds: f64,
    /// `amount / seconds`, in `unit` per second.
    pub rate: f64,
}

/// Times the parts of a fine-tuning step with this config, `rounds` times each; ends early, with the rows so far, if
/// `ctx.stop` is set.
///
/// # Errors
/// If there is no round, the config cannot work, or a file is missing or broken.
pub fn run(cfg: &FinetuneConfig, rounds: usize, ctx: &RunContext) -> Result<Vec<Row>> {
    if rounds == 0 {
        return Err(Error::Data {
            problem: "no round was asked for".into(),
            hint: "give --rounds 1 or more".into(),
        });
    }
    cfg.check()?;
    let n_songs = cfg.rollout.songs_per_step;
    let prompts = bundle::prompts_of(&cfg.prompts, Split::Train, n_songs)?;
    let captions: Vec<&str> = prompts[..n_songs].iter().map(|p| p.caption.as_str()).collect();
    let bundle = Bundle::load_for(&cfg.bundle, &cfg.length, &ctx.device)?;
    let sources = cfg.reward.sources();
    let embedder = Embedder::load(&cfg.embed, &sources, &bundle.device)?;
    let model = bundle.diffusion.base()?;

    let keys: Vec<(&str, u64)> = captions.iter().map(|&caption| (caption, cfg.seed)).collect();
    let noise = rollout::noise(&bundle, &keys);
    let cond = TextCache::default().get(&bundle, &captions)?;
    let (songs, sampler) = (n_songs as f64, &cfg.rollout.sampler);
    let mut table = Table { rounds, rows: Vec::new(), ctx };

    let part = format!("rollout, {} steps", sampler.n_steps);
    let latents = table.time(part, songs, "songs", || {
        rollout::latents(model.as_ref(), &cond, &noise, sampler, cfg.rollout.batch, ctx, &captions)
    })?;
    let Some(latents) = latents.flatten() else { return Ok(table.rows) };

    let seconds = songs * (bundle.info.n_frames * bundle.vae.config().hop()) as f64
        / f64::from(bundle.sample_rate_hz());
    let clips = table.time("VAE decode".into(), seconds, "s of audio", || bundle.decode(&latents))?;
    let Some(clips) = clips else { return Ok(table.rows) };

    let batch = Batch {
        clips: &clips,
        sample_rate_hz: bundle.sample_rate_hz(),
        latents: Some(&latents),
        captions: Some(&captions),
        bundle: Some(&bundle),
    };
    let names: Vec<String> = sources.iter().map(|s| format!("{}/{}", s.encoder, s.setting)).collect();
    let part = format!("embed, {}", names.join(" and "));
    table.time(part, seconds, "s of audio", || embedder.songs(&sources, &batch))?;

    let mut update = Update::new(cfg, &bundle, &latents)?;
    table.time(format!("update, {}", update.name()), songs, "songs", || update.step(&cond))?;

    table.time(
        "Algorithm 1, 40 pairs x 9 embeddings of 512, one core".into(),
        1.0,
        "passes",
        algorithm_1()?,
    )?;
    Ok(table.rows)
}

/// Rows so far.
struct Table<'a> {
    rounds: usize,
    rows: Vec<Row>,
    ctx: &'a RunContext,
}

impl Table<'_> {
    /// Does the work `rounds` times and adds its row; gives the last result, `None` if a stop was asked for before.
    fn time<T>(
        &mut self,
        part: String,
        amount: f64,
        unit: &'static str,
        mut work: impl FnMut() -> Result<T>,
    ) -> Result<Option<T>> {
        let (mut last, mut seconds) = (None, f64::INFINITY);
        for _ in 0..self.rounds {
            if self.ctx.stopped() {
                return Ok(None);
            }
            let start = Instant::now();
            last = Some(work()?);
            self.ctx.device.synchronize()?; // a GPU works on after a call returns
            seconds = seconds.min(start.elapsed().as_secs_f64());
        }
        self.rows.push(Row { part, amount, unit, seconds, rate: amount / seconds.max(1e-9) });
        Ok(last)
    }
}

/// The update of a fine-tuning step on songs of one step, every other one in D+: errors of the reference and of the policy,
/// loss, backward pass, optimiser.
struct Update<'a> {
    cfg: &'a FinetuneConfig,
    x0: &'a Tensor,
    noise: Tensor,
    sigmas: Vec<f64>,
    reference: Box<dyn DiffusionModel>,
    policy: Box<dyn DiffusionModel>,
    optimizer: AdamW,
}

impl<'a> Update<'a> {
    fn new(cfg: &'a FinetuneConfig, bundle: &Bundle, x0: &'a Tensor) -> Result<Self> {
        let params = Params::of(&bundle.diffusion.weights)?;
        let reference = bundle.diffusion.base()?;
        let mut rng = Rng::from_key("bench", cfg.seed);
        let shape = x0.dims3()?;
        Ok(Self {
            cfg,
            x0,
            noise: rng.normal_tensor(shape, DType::F32, x0.device())?,
            sigmas: reference.edm().sample_sigmas_stratified(shape.0, &mut rng),
            reference,
            policy: bundle.diffusion.architecture.build(params.builder(DType::F32, &bundle.device))?,
            optimizer: AdamW::new(&params, cfg.update.optimizer.clone())?,
        })
    }

    fn name(&self) -> String {
        let loss = format!("{:?}", self.cfg.loss);
        loss.split([' ', '{']).next().unwrap_or_default().to_uppercase()
    }

    fn errors(&self, model: &dyn DiffusionModel, cond: &dragon_diffusion::TextCond) -> Result<Tensor> {
        let scale: Vec<f32> = self.sigmas.iter().map(|&sigma| sigma as f32).collect();
        let scale = Tensor::from_vec(scale, (self.sigmas.len(), 1, 1), self.x0.device())?;
        let x = (self.x0 + self.noise.broadcast_mul(&scale)?)?; // [B, C, T]
        let denoised = model.with_texts(cond, None, x.dim(2)?)?(&x, &self.sigmas)?; // [B, C, T]
        Ok(denoising_errors(model.edm(), self.cfg.update.weighting, &denoised, self.x0, &self.sigmas)?)
    }

    fn step(&mut self, cond: &dragon_diffusion::TextCond) -> Result<f64> {
        let errors = Errors {
            reference: self.errors(self.reference.as_ref(), cond)?,
            policy: self.errors(self.policy.as_ref(), cond)?,
        };
        let gaps: Vec<f64> = errors.gap()?.detach().to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        let signs: Vec<f64> = (0..gaps.len()).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let labels = Labels { advantages: signs.clone(), signs };
        let count = if self.cfg.loss.needs_pairs() { gaps.len() / 2 } else { gaps.len() };
        let loss = self.cfg.loss.evaluate(&errors, &labels, kto_baseline(&gaps), count)?;
        Ok(self.optimizer.step(&dragon_nn::backward(&loss)?)?)
    }
}

/// A greedy pass for dataset FAD on random embeddings with a decaying spectrum, on one thread.
fn algorithm_1() -> Result<impl FnMut() -> Result<f64>> {
    const DIM: usize = 512;
    const PAIRS: usize = 40;
    let mut rng = Rng::from_key("bench/algorithm 1", 0);
    let mut rows = |n: usize| {
        let data = (0..n * DIM).map(|i| rng.normal() * 0.99f64.powi((i % DIM) as i32)).collect();
        Rows::new(n, DIM, data).map_err(Error::input("random embeddings"))
    };
    let reference = FrechetReference::from_rows(&rows(1024)?).map_err(Error::input("random embeddings"))?;
    let reward = DatasetFad { slot: 0, reference: Arc::new(reference) };
    let songs = (0..2 * PAIRS).map(|_| rows(9).map(Song::new)).collect::<Result<Vec<Song>>>()?;
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(Error::input("one thread"))?;
    Ok(move || {
        let songs: Vec<&Song> = songs.iter().collect();
        let pass = one.install(|| greedy(&reward, &[&songs[..PAIRS], &songs[PAIRS..]], 0..PAIRS));
        Ok(pass.map_err(Error::input("Algorithm 1"))?.reward_plus)
    })
}
