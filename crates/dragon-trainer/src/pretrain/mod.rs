//! The loop that every training shares, and the pre-training tasks that plug into it.
//!
//! A [`Task`] does one step at a time; [`run`] owns everything around it: the run folder, checkpoints and exact resume,
//! validation, logs, stopping. Fine-tuning is a task too ([`crate::finetune`]).

pub mod clap;
pub mod dit;
pub mod vae;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Tensor;
use dragon_data::Entry;
use dragon_nn::{AdamWConfig, Rng};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Scalars};
use crate::error::{Error, Result};
use crate::run::{Meter, RunContext, RunFolder};

/// A training that proceeds step by step. All randomness comes from the generator it is given, and everything else it
/// needs to go on is in its state, so that a resumed run equals one that was not interrupted.
pub trait Task {
    /// One optimiser step (forward, backward, update); returns named scalars for the log. `step` counts from 0. The
    /// generator depends on the run's seed and the step alone: draw the data position from it too.
    ///
    /// # Errors
    /// If the step fails; a loss that is not finite may be reported as a scalar, the loop stops at it.
    fn step(&mut self, step: usize, rng: &mut Rng) -> Result<Vec<(&'static str, f64)>>;

    /// Scalars on held-out data; logged with the prefix `valid/`. It must not change the state.
    ///
    /// # Errors
    /// If a forward pass fails.
    fn validate(&mut self) -> Result<Vec<(String, f64)>>;

    /// What a person should know of the step and the validation just done, a sentence each; asked once a step.
    fn warnings(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Everything needed to go on bit for bit (parameters, optimiser moments, EMA), name -> tensor.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    fn state(&self) -> Result<BTreeMap<String, Tensor>>;

    /// Takes back what [`Task::state`] gave.
    ///
    /// # Errors
    /// If a tensor is missing, unused or misshapen.
    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()>;

    /// Writes the model folder (config.json, model.safetensors = EMA weights, f32).
    ///
    /// # Errors
    /// If a file cannot be written.
    fn export(&self, dir: &Path) -> Result<()>;

    /// The scalars shown on the progress line, in this order.
    fn headline(&self) -> &'static [&'static str] {
        &["loss", "grad_norm"]
    }

    /// How many examples a step handles, and what they are called; for the rate on the progress line.
    fn throughput(&self) -> (f64, &'static str) {
        (1.0, "steps")
    }
}

/// Checks that an optimiser can work; `key` is where its config stands.
///
/// # Errors
/// For the first value that is out of range.
pub(crate) fn check_optimizer(key: &str, cfg: &AdamWConfig) -> Result<()> {
    let wrong = |name: &str, expected: &str, found: f64| {
        Err(Error::config(&format!("{key}.{name}"), expected.to_owned(), found))
    };
    for (name, value) in
        [("lr", cfg.lr), ("eps", cfg.eps), ("max_grad_norm", cfg.max_grad_norm.unwrap_or(1.0))]
    {
        if !(value.is_finite() && value > 0.0) {
            return wrong(name, "a number above 0", value);
        }
    }
    for (name, value) in [("beta1", cfg.beta1), ("beta2", cfg.beta2)] {
        if !(0.0..1.0).contains(&value) {
            return wrong(name, "a number from 0 up to, not including, 1", value);
        }
    }
    if !(cfg.weight_decay.is_finite() && cfg.weight_decay >= 0.0) {
        return wrong("weight_decay", "a number of at least 0", cfg.weight_decay);
    }
    Ok(())
}

/// Scalars with owned names.
pub(crate) fn named(scalars: Vec<(&'static str, f64)>) -> Vec<(String, f64)> {
    scalars.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The items of a step among `n`: each epoch goes through all of them once, in an order keyed by seed and epoch.
pub(crate) fn items_of_step(step: usize, per_step: usize, n: usize, seed: u64) -> Vec<usize> {
    let mut epochs: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut at = |position: usize| {
        let order = epochs.entry(position / n).or_insert_with(|| {
            let mut order: Vec<usize> = (0..n).collect();
            Rng::from_key(&format!("epoch/{}", position / n), seed).shuffle(&mut order);
            order
        });
        order[position % n]
    };
    (step * per_step..(step + 1) * per_step).map(&mut at).collect()
}

/// Puts tensors into a state, each name after `prefix`.
pub(crate) fn put(state: &mut BTreeMap<String, Tensor>, prefix: &str, tensors: BTreeMap<String, Tensor>) {
    state.extend(tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
}

/// What [`put`] has put there.
pub(crate) fn take<C: FromIterator<(String, Tensor)>>(state: &BTreeMap<String, Tensor>, prefix: &str) -> C {
    let named = state.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t.clone())));
    named.collect()
}

/// Length and intervals of a training. These may change when a run continues.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoopConfig {
    /// Optimiser steps in all.
    pub steps: usize,
    /// A line on stderr every this many steps (besides one every 30 s), if there is no progress bar.
    pub log_every: usize,
    /// Validation every this many steps and at the end; 0: never.
    pub validate_every: usize,
    /// A checkpoint and an exported model every this many steps and at the end.
    pub checkpoint_every: usize,
    /// How many checkpoints stay; older ones are removed.
    pub keep_checkpoints: usize,
}

impl Default for LoopConfig {
    fn default() -> Self {
        Self { steps: 1000, log_every: 50, validate_every: 200, checkpoint_every: 200, keep_checkpoints: 2 }
    }
}

impl LoopConfig {
    /// Checks that the loop can run.
    ///
    /// # Errors
    /// If an interval is zero.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("run.steps", self.steps),
            ("run.log_every", self.log_every),
            ("run.checkpoint_every", self.checkpoint_every),
            ("run.keep_checkpoints", self.keep_checkpoints),
        ];
        for (key, value) in counts {
            if value == 0 {
                return Err(Error::config(key, "at least 1", value));
            }
        }
        Ok(())
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Steps done in all, those before a resume included.
    pub steps_done: usize,
    /// Whether all steps are done; false if the run was stopped and can be continued.
    pub finished: bool,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The exported model folder.
    pub model_dir: PathBuf,
}

/// Runs a task from its beginning, or from the newest checkpoint if `ctx.resume` is set, to its last step, or until
/// `ctx.stop` is set. `kind` and `config` go to `run.toml`; `config` has `cfg` as its table `run`.
///
/// # Errors
/// If the folder is in use or holds another run, a step fails, a loss is not finite, or a file cannot be written. The
/// last checkpoint stays whole in every case.
pub fn run<C: Serialize>(
    task: &mut dyn Task,
    kind: &str,
    config: &C,
    cfg: &LoopConfig,
    seed: u64,
    ctx: &RunContext,
) -> Result<Outcome> {
    cfg.check()?;
    let mut folder = RunFolder::open(ctx, kind, config)?;
    run_in(&mut folder, task, cfg, seed, ctx)
}

/// As [`run`], in a folder that is already open.
///
/// # Errors
/// As [`run`], except for those of opening the folder.
pub fn run_in(
    folder: &mut RunFolder,
    task: &mut dyn Task,
    cfg: &LoopConfig,
    seed: u64,
    ctx: &RunContext,
) -> Result<Outcome> {
    cfg.check()?;
    let mut last = None;
    let mut next_step = 0;
    match checkpoint::list(&folder.checkpoints())?.pop() {
        Some((_, path)) if ctx.resume => {
            let (scalars, tensors) = checkpoint::load(&path)?;
            if scalars.config_sha256 != folder.config_sha256() || scalars.seed != seed {
                return Err(Error::Resume {
                    path,
                    reason: "its checkpoint was taken under another config, or by an older version\nhint: use the config and the version of the run"
                        .to_owned(),
                });
            }
            if scalars.next_step > cfg.steps {
                return Err(Error::Resume {
                    path,
                    reason: format!(
                        "it has done {} steps, and run.steps is {}\nhint: a run cannot go back; start another in its own folder",
                        scalars.next_step, cfg.steps
                    ),
                });
            }
            task.load_state(&tensors)?;
            folder.rewind(scalars.metrics_len, scalars.next_step)?;
            next_step = scalars.next_step;
            tracing::info!("continuing at step {next_step} from `{}`", path.display());
            last = Some(path);
        }
        _ => folder.rewind(0, 0)?,
    }
    let model_dir = folder.dir().join("model");
    let (per_step, unit) = task.throughput();
    let mut meter = Meter::new(ctx.progress, cfg.steps, next_step, per_step, unit);
    let mut saved = next_step;
    while next_step < cfg.steps && !ctx.stopped() {
        let step = next_step;
        let started = Instant::now();
        let mut rng = Rng::from_key(&format!("step/{step}"), seed);
        let scalars = task.step(step, &mut rng).map_err(|err| in_step(err, step, &last))?;
        let mut values = named(scalars);
        check_finite(step, &values, &last)?;
        next_step += 1;
        let at_end = next_step == cfg.steps;
        if cfg.validate_every > 0 && (next_step.is_multiple_of(cfg.validate_every) || at_end) {
            let found = task.validate().map_err(|err| in_step(err, step, &last))?;
            values.extend(found.into_iter().map(|(name, v)| (format!("valid/{name}"), v)));
        }
        let warnings = task.warnings();
        for warning in &warnings {
            tracing::warn!("step {next_step}: {warning}");
        }
        folder.log(step, &values, &warnings)?;
        folder.log_timing(step, &[("time/step_s", started.elapsed().as_secs_f64())])?;
        if next_step.is_multiple_of(cfg.checkpoint_every) {
            last = Some(save(folder, task, next_step, seed, cfg.keep_checkpoints)?);
            export(task, &model_dir)?;
            saved = next_step;
        }
        meter.update(next_step, &values, task.headline(), next_step.is_multiple_of(cfg.log_every));
    }
    meter.finish();
    // The end, or a stop, which may come at any moment.
    if saved < next_step {
        last = Some(save(folder, task, next_step, seed, cfg.keep_checkpoints)?);
        export(task, &model_dir)?;
    }
    if !model_dir.exists() {
        export(task, &model_dir)?;
    }
    Ok(Outcome { steps_done: next_step, finished: next_step >= cfg.steps, checkpoint: last, model_dir })
}

/// Refuses a clip whose sample rate is below the model's: resampled, it would lack the treble that the model should learn.
///
/// # Errors
/// If it is; `key` is the model's rate in the config.
pub fn check_rate(entry: &Entry, manifest: &Path, rate: u32, key: &str) -> Result<()> {
    if entry.sample_rate_hz >= rate {
        return Ok(());
    }
    let (id, found) = (&entry.id, entry.sample_rate_hz);
    Err(Error::config(
        key,
        format!("at most {found} Hz, the rate of the clip `{id}` of `{}`", manifest.display()),
        format!("{rate} Hz"),
    ))
}

fn save(folder: &RunFolder, task: &dyn Task, next_step: usize, seed: u64, keep: usize) -> Result<PathBuf> {
    let scalars = Scalars {
        version: 1,
        next_step,
        seed,
        config_sha256: folder.config_sha256().to_owned(),
        metrics_len: folder.metrics_len()?,
        tensors_len: 0,
        tensors_crc32: 0,
    };
    checkpoint::save(&folder.checkpoints(), &scalars, &task.state()?, keep)
}

/// Exports beside the place and swaps the folders.
fn export(task: &dyn Task, dir: &Path) -> Result<()> {
    let (new, old) = (dir.with_file_name(".model.new"), dir.with_file_name(".model.old"));
    for leftover in [&new, &old] {
        if leftover.exists() {
            fs::remove_dir_all(leftover).map_err(Error::io("remove", leftover))?;
        }
    }
    let written =
        fs::create_dir_all(&new).map_err(Error::io("create", &new)).and_then(|()| task.export(&new));
    if written.is_err() {
        let _ = fs::remove_dir_all(&new); // the error that counts is the one above
    }
    written?;
    if dir.exists() {
        fs::rename(dir, &old).map_err(Error::io("replace", dir))?;
    }
    fs::rename(&new, dir).map_err(Error::io("create", dir))?;
    if old.exists() {
        fs::remove_dir_all(&old).map_err(Error::io("remove", &old))?;
    }
    Ok(())
}

fn check_finite(step: usize, values: &[(String, f64)], last: &Option<PathBuf>) -> Result<()> {
    match values.iter().find(|(name, v)| (name.ends_with("loss") || name == "grad_norm") && !v.is_finite()) {
        None => Ok(()),
        Some((name, value)) => Err(Error::NotFinite {
            what: name.clone(),
            value: *value,
            step,
            sigma: None,
            prompt: None,
            checkpoint: last.clone(),
        }),
    }
}

/// Adds to an error what the loop knows: the step and the last good checkpoint.
fn in_step(err: Error, step: usize, last: &Option<PathBuf>) -> Error {
    let checkpoint = last.clone();
    match err {
        Error::NotFinite { what, value, sigma, prompt, .. } => {
            Error::NotFinite { what, value, step, sigma, prompt, checkpoint }
        }
        Error::BrokenSong { value, prompt } => {
            let what = "a generation's latents".to_owned();
            Error::NotFinite { what, value, step, sigma: None, prompt: Some(prompt), checkpoint }
        }
        // The optimiser refuses such gradients before it changes anything.
        Error::Tensor(err) if err.to_string().contains("gradient norm is") => {
            let what = "gradient norm".to_owned();
            Error::NotFinite { what, value: f64::NAN, step, sigma: None, prompt: None, checkpoint }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use candle_core::Device;

    use super::*;

    /// Adds a random number to one weight at each step.
    struct Walk {
        weight: f32,
        stop_at: Option<(usize, Arc<AtomicBool>)>,
        nan_at: Option<usize>,
        validation_fails: bool,
    }

    impl Walk {
        fn new() -> Self {
            Self { weight: 0.0, stop_at: None, nan_at: None, validation_fails: false }
        }
    }

    impl Task for Walk {
        fn step(&mut self, step: usize, rng: &mut Rng) -> Result<Vec<(&'static str, f64)>> {
            if let Some((at, stop)) = &self.stop_at
                && *at == step
            {
                stop.store(true, Ordering::SeqCst);
            }
            self.weight += rng.normal() as f32;
            let loss = if self.nan_at == Some(step) { f64::NAN } else { self.weight as f64 };
            Ok(vec![("loss", loss)])
        }
        fn validate(&mut self) -> Result<Vec<(String, f64)>> {
            if self.validation_fails {
                return Err(Error::BrokenSong { value: f64::NAN, prompt: "a waltz".into() });
            }
            Ok(named(vec![("loss", 2.0 * self.weight as f64)]))
        }
        fn state(&self) -> Result<BTreeMap<String, Tensor>> {
            Ok([("weight".to_owned(), Tensor::new(self.weight, &Device::Cpu)?)].into())
        }
        fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
            self.weight = state["weight"].to_scalar()?;
            Ok(())
        }
        fn export(&self, dir: &Path) -> Result<()> {
            crate::run::write_atomic(&dir.join("weight.txt"), self.weight.to_string().as_bytes())
        }
    }

    fn config(steps: usize) -> LoopConfig {
        LoopConfig { steps, log_every: 1, validate_every: 3, checkpoint_every: 4, keep_checkpoints: 2 }
    }

    fn go(task: &mut Walk, ctx: &RunContext, steps: usize) -> Result<Outcome> {
        let table: toml::Table = "lr = 1.0".parse().unwrap();
        run(task, "walk", &table, &config(steps), 5, ctx)
    }

    #[test]
    fn a_stopped_and_resumed_run_writes_the_same_bytes_as_an_uninterrupted_one() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        go(&mut Walk::new(), &RunContext::new(a.path()), 11).unwrap();
        let mut ctx = RunContext::new(b.path());
        let mut first = Walk { stop_at: Some((5, ctx.stop.clone())), ..Walk::new() };
        let outcome = go(&mut first, &ctx, 11).unwrap();
        assert_eq!((outcome.steps_done, outcome.finished), (6, false));
        // What a kill leaves after the last checkpoint: one more line, and half of another.
        let metrics = b.path().join("metrics.jsonl");
        let mut text = fs::read(&metrics).unwrap();
        text.extend_from_slice(b"{\"step\":6,\"loss\":1.0}\n{\"step\":7,\"lo");
        fs::write(&metrics, text).unwrap();
        ctx.stop.store(false, Ordering::SeqCst);
        ctx.resume = true;
        let outcome = go(&mut Walk::new(), &ctx, 11).unwrap();
        assert_eq!((outcome.steps_done, outcome.finished), (11, true));
        for file in ["metrics.jsonl", "checkpoints/step-000011/state.safetensors", "model/weight.txt"] {
            assert_eq!(
                fs::read(a.path().join(file)).unwrap(),
                fs::read(b.path().join(file)).unwrap(),
                "{file}"
            );
        }
    }

    #[test]
    fn a_loss_that_is_no_number_stops_with_the_step_and_the_last_good_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let mut task = Walk { nan_at: Some(9), ..Walk::new() };
        let err = go(&mut task, &RunContext::new(dir.path()), 11).unwrap_err();
        let text = err.to_string();
        assert!(text.contains("loss is NaN at step 9") && text.contains("step-000008"), "{text}");
        assert_eq!(err.exit_code(), 1);
        let ctx = RunContext { resume: true, ..RunContext::new(dir.path()) };
        assert!(go(&mut Walk::new(), &ctx, 11).unwrap().finished);
    }

    #[test]
    fn a_broken_song_of_a_validation_is_reported_with_the_step() {
        let dir = tempfile::tempdir().unwrap();
        let mut task = Walk { validation_fails: true, ..Walk::new() };
        let text = go(&mut task, &RunContext::new(dir.path()), 11).unwrap_err().to_string();
        assert!(text.contains("latents is NaN at step 2, prompt \"a waltz\""), "{text}");
    }

    #[test]
    fn a_gradient_that_is_no_number_is_the_users_to_mend() {
        let params = dragon_nn::Params::new(0);
        let weight = params.builder(candle_core::DType::F32, &Device::Cpu).get(1, "w").unwrap();
        let mut optimizer = dragon_nn::AdamW::new(&params, AdamWConfig::default()).unwrap();
        let loss = (weight * f64::INFINITY).unwrap().sum_all().unwrap();
        let refused: Error = optimizer.step(&loss.backward().unwrap()).unwrap_err().into();
        let err = in_step(refused, 6, &Some("checkpoints/step-000004".into()));
        assert!(matches!(err, Error::NotFinite { step: 6, checkpoint: Some(_), .. }), "{err}");
        assert_eq!(err.exit_code(), 1);
    }

    #[test]
    fn a_zero_interval_is_refused_by_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let text = go(&mut Walk::new(), &RunContext::new(dir.path()), 0).unwrap_err().to_string();
        assert!(text.contains("run.steps") && text.contains("at least 1"), "{text}");
        assert!(!dir.path().join("run.toml").exists(), "nothing is written before the check");
    }
}
