//! The folder of a run: lock, `run.toml`, `metrics.jsonl`, TensorBoard events, progress on stderr.
//!
//! ```text
//! out/run.toml          resolved config, hashes of the files that it names (fine-tuning), seed, versions, commit, command
//! out/metrics.jsonl     one line a step; no times in it, so that two equal runs write equal bytes
//! out/events.out.tfevents.*   the same numbers for TensorBoard
//! out/checkpoints/step-000120/
//! out/model/            the newest exported model folder
//! ```

use std::fs::{self, File};
use std::io::{IsTerminal, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::tensorboard;

/// How progress is shown on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A bar with rate and remaining time, redrawn in place.
    Bar,
    /// A line every few steps.
    Lines,
    /// Nothing.
    Quiet,
}

impl Progress {
    /// A bar on a terminal, otherwise lines.
    pub fn auto() -> Self {
        if std::io::stderr().is_terminal() { Progress::Bar } else { Progress::Lines }
    }
}

/// What a command gives to the work it starts, besides the config.
#[derive(Debug, Clone)]
pub struct RunContext {
    /// The run folder; created if missing.
    pub out_dir: PathBuf,
    /// Set to end cleanly after the step in progress, with a checkpoint.
    pub stop: Arc<AtomicBool>,
    /// Whether to continue the run that is in the folder. Without a run there, it starts from the beginning.
    pub resume: bool,
    /// How progress is shown.
    pub progress: Progress,
    /// Where tensors live.
    pub device: Device,
    /// The command line, for `run.toml`.
    pub command: String,
    /// Commit of the program, for `run.toml`.
    pub commit: String,
}

impl RunContext {
    /// A context that writes to `out_dir`, never stops early, does not resume, and is quiet.
    pub fn new(out_dir: impl Into<PathBuf>) -> Self {
        Self {
            out_dir: out_dir.into(),
            stop: Arc::new(AtomicBool::new(false)),
            resume: false,
            progress: Progress::Quiet,
            device: Device::Cpu,
            command: String::new(),
            commit: option_env!("DRAGON_COMMIT").unwrap_or("unknown").to_owned(),
        }
    }

    /// Whether somebody asked for an end.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

#[derive(Serialize)]
struct RunToml<'a> {
    dragon: Versions<'a>,
    config: &'a toml::Table,
}

#[derive(Serialize)]
struct Versions<'a> {
    version: &'a str,
    candle: &'a str,
    commit: &'a str,
    command: &'a str,
    kind: &'a str,
}

/// An open, locked run folder. Nothing but the lock is written before [`RunFolder::rewind`] starts the run: an error on
/// the way there, such as a broken model folder, leaves no run behind that would have to be resumed or removed.
pub struct RunFolder {
    dir: PathBuf,
    run_toml: String,
    metrics_path: PathBuf,
    files: Option<Files>, // once the run has started
    config_sha256: String,
    created: bool, // whether the folder was not there before
    _lock: File,   // released when the file closes, also by a kill
}

/// What a started run writes to.
struct Files {
    metrics: File,
    events: tensorboard::Writer,
}

impl RunFolder {
    /// Opens the folder of a run: takes the lock, and compares `run.toml` when the run continues. `kind` is the command
    /// (`finetune`, `pretrain dit`). The table `run` of the config (steps, intervals) may change between the parts of
    /// one run; nothing else may.
    ///
    /// # Errors
    /// If another run holds the folder, if it holds a run and `resume` is off, or if the config or the contents of the
    /// files that it names differ.
    pub fn open<C: Serialize>(ctx: &RunContext, kind: &str, config: &C) -> Result<Self> {
        let dir = ctx.out_dir.clone();
        let created = !dir.exists();
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let lock = lock(&dir)?;
        let mut config =
            toml::Table::try_from(config).map_err(|err| Error::Bug(format!("config to TOML: {err}")))?;
        let config_sha256 = config_hash(kind, &config)?;
        let run_toml = dir.join("run.toml");
        if run_toml.exists() {
            if !ctx.resume {
                return Err(Error::Exists { path: dir, what: "a run already".to_owned() });
            }
            let known = check_same(&run_toml, kind, &config)?;
            // What the run read before stays noted, though this part of it may not read it.
            if let Some(toml::Value::Table(inputs)) = config.get_mut(INPUTS) {
                for (name, hash) in known {
                    inputs.entry(name).or_insert(hash);
                }
            }
        } else if ctx.resume {
            tracing::info!("`{}` holds no run yet: one begins", dir.display());
        }
        let versions = Versions {
            version: env!("CARGO_PKG_VERSION"),
            candle: "0.11.1",
            commit: &ctx.commit,
            command: &ctx.command,
            kind,
        };
        let run_toml = toml::to_string(&RunToml { dragon: versions, config: &config })
            .map_err(|err| Error::Bug(format!("run.toml: {err}")))?;
        let metrics_path = dir.join("metrics.jsonl");
        Ok(Self { dir, run_toml, metrics_path, files: None, config_sha256, created, _lock: lock })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where checkpoints go.
    pub fn checkpoints(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }

    /// SHA-256 of kind and config without its `run` table and the contents of files, in hex.
    pub fn config_sha256(&self) -> &str {
        &self.config_sha256
    }

    /// Starts the run at step `next_step`: writes `run.toml` and cuts `metrics.jsonl` back to `len` bytes, so that what
    /// was logged after the checkpoint is logged again.
    ///
    /// # Errors
    /// If the file is shorter than that, or something cannot be written.
    pub fn rewind(&mut self, len: u64, next_step: usize) -> Result<()> {
        let io = |err| Error::io("write", &self.metrics_path)(err);
        let mut metrics = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&self.metrics_path)
            .map_err(io)?;
        let found = metrics.metadata().map_err(io)?.len();
        if found < len {
            return Err(Error::Resume {
                path: self.dir.clone(),
                reason: format!(
                    "metrics.jsonl has {found} bytes, the checkpoint was taken at {len}\nhint: restore the file, or start again in another folder"
                ),
            });
        }
        write_atomic(&self.dir.join("run.toml"), self.run_toml.as_bytes())?;
        metrics.set_len(len).map_err(io)?;
        metrics.seek(std::io::SeekFrom::End(0)).map_err(io)?;
        let events = tensorboard::Writer::create(&self.dir, next_step)?;
        self.files = Some(Files { metrics, events });
        Ok(())
    }

    fn files(&mut self) -> Result<&mut Files> {
        self.files.as_mut().ok_or_else(|| Error::Bug("a run was logged before it started".to_owned()))
    }

    /// Length of `metrics.jsonl`, in bytes.
    ///
    /// # Errors
    /// If its metadata cannot be read.
    pub fn metrics_len(&self) -> Result<u64> {
        match &self.files {
            Some(files) => Ok(files.metrics.metadata().map_err(Error::io("read", &self.metrics_path))?.len()),
            None => Ok(0),
        }
    }

    /// Logs the numbers of one step to `metrics.jsonl` and TensorBoard, and warnings, if there are any, to the first alone (key
    /// `warnings`); a number that is not finite becomes `null`.
    ///
    /// # Errors
    /// If a file cannot be written; then no half line stays in `metrics.jsonl`.
    pub fn log(&mut self, step: usize, values: &[(String, f64)], warnings: &[String]) -> Result<()> {
        let mut line = format!("{{\"step\":{step}");
        for (name, value) in values {
            let value = serde_json::to_string(value).map_err(|err| Error::Bug(err.to_string()))?;
            let name = serde_json::to_string(name).map_err(|err| Error::Bug(err.to_string()))?;
            line.push_str(&format!(",{name}:{value}"));
        }
        if !warnings.is_empty() {
            let texts = serde_json::to_string(warnings).map_err(|err| Error::Bug(err.to_string()))?;
            line.push_str(&format!(",\"warnings\":{texts}"));
        }
        line.push_str("}\n");
        let whole = self.metrics_len()?;
        let path = self.metrics_path.clone();
        let files = self.files()?;
        files.metrics.write_all(line.as_bytes()).map_err(|err| {
            let _ = files.metrics.set_len(whole); // the error that counts is the first one
            Error::io("write", &path)(err)
        })?;
        files.events.scalars(step, values.iter().map(|(name, value)| (name.as_str(), *value)))
    }

    /// Logs numbers for TensorBoard alone: times and rates, which differ between two equal runs.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn log_timing(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        self.files()?.events.scalars(step, values.iter().copied())
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if self.files.is_none() && !self.dir.join("run.toml").exists() {
            // The run never started: the folder is left as it was found. What cannot be removed does no harm.
            let _ = fs::remove_file(self.dir.join(".lock"));
            if fs::metadata(&self.metrics_path).is_ok_and(|file| file.len() == 0) {
                let _ = fs::remove_file(&self.metrics_path);
            }
            if self.created {
                let _ = fs::remove_dir(&self.dir);
            }
        }
    }
}

/// Takes the lock of a folder, which ends with the process even if it is killed.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(".lock");
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(Error::io("open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            let holder = fs::read_to_string(&path).unwrap_or_default();
            let holder = match holder.trim() {
                "" => "another run".to_owned(),
                pid => format!("process {pid}"),
            };
            return Err(Error::Locked { path: dir.to_owned(), holder });
        }
        Err(fs::TryLockError::Error(err)) => return Err(Error::io("lock", &path)(err)),
    }
    let pid = format!("{}\n", std::process::id());
    file.set_len(0).and_then(|()| file.write_all(pid.as_bytes())).map_err(Error::io("write", &path))?;
    // A process that gives up before its run starts removes its lock file. If that happened meanwhile, this lock is on
    // a file that nobody else will find.
    if fs::read_to_string(&path).is_ok_and(|text| text == pid) { Ok(file) } else { lock(dir) }
}

/// The table of a config that holds the hashes of what the run reads ([`crate::inputs`]), if its command notes them.
pub(crate) const INPUTS: &str = "inputs_sha256";

fn config_hash(kind: &str, config: &toml::Table) -> Result<String> {
    let mut config = config.clone();
    config.remove("run");
    config.remove(INPUTS); // compared by `check_same`: which files are read depends on the table `run` too
    let text = toml::to_string(&config).map_err(|err| Error::Bug(format!("config to TOML: {err}")))?;
    Ok(hex(&Sha256::digest(format!("{kind}\n{text}"))))
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compares the config of the run in the folder with the one of this command and names each differing key; gives the hashes
/// of what the run has read.
fn check_same(run_toml: &Path, kind: &str, config: &toml::Table) -> Result<toml::Table> {
    let text = fs::read_to_string(run_toml).map_err(Error::io("read", run_toml))?;
    let old: toml::Table = text.parse().map_err(|err| Error::Content {
        path: run_toml.to_owned(),
        problem: format!("is not valid TOML: {err}"),
        hint: "start again in another folder".to_owned(),
    })?;
    let old_kind = old.get("dragon").and_then(|d| d.get("kind")).and_then(|k| k.as_str()).unwrap_or("");
    let resume =
        |reason: String| Error::Resume { path: run_toml.parent().unwrap_or(run_toml).to_owned(), reason };
    if old_kind != kind {
        return Err(resume(format!(
            "it is a run of `{old_kind}`, not of `{kind}`\nhint: give another folder with --out"
        )));
    }
    let empty = toml::Table::new();
    let (mut old, mut new) =
        (old.get("config").and_then(|c| c.as_table()).unwrap_or(&empty).clone(), config.clone());
    let (old_inputs, new_inputs) = (old.remove(INPUTS), new.remove(INPUTS));
    if old_inputs.is_none() && new_inputs.is_some() {
        return Err(resume(
            "it was begun by an older version, which did not note the contents of all files that it reads\nhint: start again in another folder with --out; what it learned so far is in its folder `model/`"
                .to_owned(),
        ));
    }
    let mut differences = Vec::new();
    compare("", &old, &new, &mut differences);
    differences.retain(|line| !line.trim_start().starts_with("run."));
    if differences.is_empty() {
        warn_of_another_cosine(&old, &new);
        let table = |inputs: Option<toml::Value>| match inputs {
            Some(toml::Value::Table(table)) => table,
            _ => toml::Table::new(),
        };
        let (old, new) = (table(old_inputs), table(new_inputs));
        // A file that the run had not read so far, such as a monitor's before it validated, cannot have changed.
        let changed: Vec<String> = new
            .iter()
            .filter(|(name, hash)| old.get(*name).is_some_and(|old| old != *hash))
            .map(|(name, _)| format!("  {name}"))
            .collect();
        if changed.is_empty() {
            return Ok(old);
        }
        return Err(resume(format!(
            "files that it reads have other contents than when it began\n{}\nhint: bring them back, or start again in another folder with --out",
            changed.join("\n")
        )));
    }
    Err(resume(format!(
        "its config differs\n{}\nhint: use the config of the run (only `run.*` may change), or give another folder with --out",
        differences.join("\n")
    )))
}

/// Says so when a learning rate that falls along a cosine to `run.steps` gets another end: it jumps where the run goes on.
fn warn_of_another_cosine(old: &toml::Table, new: &toml::Table) {
    let steps = |config: &toml::Table| config.get("run")?.get("steps")?.as_integer();
    let schedule = |section: &str| new.get(section)?.get("schedule")?.as_str();
    let falls = ["train", "update"].into_iter().any(|section| schedule(section) == Some("cosine"));
    if let (true, Some(before), Some(now)) = (falls && steps(old) != steps(new), steps(old), steps(new)) {
        tracing::warn!(
            "the learning rate falls along a cosine to `run.steps`, which was {before} and is {now}: it jumps to the new curve"
        );
    }
}

fn compare(prefix: &str, old: &toml::Table, new: &toml::Table, out: &mut Vec<String>) {
    let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
    keys.sort();
    keys.dedup();
    for key in keys {
        let path = format!("{prefix}{key}");
        match (old.get(key), new.get(key)) {
            (Some(toml::Value::Table(a)), Some(toml::Value::Table(b))) => {
                compare(&format!("{path}."), a, b, out)
            }
            (a, b) if a == b => {}
            (a, b) => {
                let show = |v: Option<&toml::Value>| v.map_or("nothing".to_owned(), |v| v.to_string());
                out.push(format!("  {path}: the run has {}, this command {}", show(a), show(b)));
            }
        }
    }
}

/// Writes a file whole or not at all: beside its place, synced, renamed.
///
/// # Errors
/// If it cannot be written; then an older file of that name is unchanged.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    dragon_nn::write_atomically(path, bytes).map_err(Error::io("write", path))
}

/// Shows how far the work is, with rate and remaining time.
pub struct Meter {
    bar: Option<ProgressBar>,
    lines: bool,
    unit: &'static str,
    total: usize,
    done_before: usize,
    per_step: f64,
    started: Instant,
    last_line: Instant,
}

impl Meter {
    /// A meter over `total` steps, `done` of which are done; a step handles `per_step` of `unit`.
    pub fn new(progress: Progress, total: usize, done: usize, per_step: f64, unit: &'static str) -> Self {
        let bar = (progress == Progress::Bar).then(|| {
            let bar = ProgressBar::new(total as u64).with_position(done as u64);
            let style = ProgressStyle::with_template("step {pos}/{len} {wide_bar} {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        let now = Instant::now();
        let last_line = now.checked_sub(Duration::from_secs(3600)).unwrap_or(now);
        let lines = progress == Progress::Lines;
        Self { bar, lines, unit, total, done_before: done, per_step, started: now, last_line }
    }

    /// Reports that `done` steps are done. `line` asks for a line now; else lines come at most every 30 s.
    pub fn update(&mut self, done: usize, values: &[(String, f64)], headline: &[&str], line: bool) {
        let elapsed_s = self.started.elapsed().as_secs_f64().max(1e-9);
        let rate = (done - self.done_before) as f64 / elapsed_s;
        let mut text = String::new();
        for name in headline {
            if let Some((_, value)) = values.iter().find(|(n, _)| n == name) {
                text.push_str(&format!("{name} {}  ", short(*value)));
            }
        }
        let eta = duration((self.total.saturating_sub(done)) as f64 / rate.max(1e-9));
        text.push_str(&format!("{:.3} {}/s  eta {eta}", rate * self.per_step, self.unit));
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            bar.set_message(text);
        } else if self.lines && (line || self.last_line.elapsed().as_secs() >= 30 || done == self.total) {
            self.last_line = Instant::now();
            tracing::info!("step {done}/{}  {text}", self.total);
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Four significant digits.
fn short(value: f64) -> String {
    if value != 0.0 && (value.abs() < 1e-3 || value.abs() >= 1e5) {
        return format!("{value:.3e}");
    }
    let digits = (3 - value.abs().max(1e-9).log10().floor() as i32).clamp(0, 6) as usize;
    format!("{value:.digits$}")
}

/// `1h12m`, `3m05s`, `8s`.
pub(crate) fn duration(seconds: f64) -> String {
    let s = seconds.min(1e8).round() as u64;
    match s {
        3600.. => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        60.. => format!("{}m{:02}s", s / 60, s % 60),
        _ => format!("{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Clone)]
    struct Config {
        lr: f64,
        run: Steps,
    }
    #[derive(Serialize, Clone)]
    struct Steps {
        steps: usize,
    }

    fn config() -> Config {
        Config { lr: 0.5, run: Steps { steps: 3 } }
    }

    #[test]
    fn two_runs_in_one_folder_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let ctx = RunContext::new(dir.path());
        let first = RunFolder::open(&ctx, "finetune", &config()).unwrap();
        let err = RunFolder::open(&ctx, "finetune", &config()).err().unwrap();
        assert_eq!(err.exit_code(), 1);
        let text = err.to_string();
        assert!(text.contains(&format!("in use by process {}", std::process::id())), "{text}");
        assert!(text.contains("--out"), "{text}");
        drop(first);
        assert!(
            fs::read_dir(dir.path()).unwrap().next().is_none(),
            "a run that never started leaves nothing"
        );
        let again = RunContext { resume: true, ..ctx };
        RunFolder::open(&again, "finetune", &config()).unwrap();
    }

    #[test]
    fn a_folder_with_a_run_is_not_overwritten_and_a_changed_config_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut ctx = RunContext::new(dir.path());
        RunFolder::open(&ctx, "finetune", &config()).unwrap().rewind(0, 0).unwrap();
        let text = RunFolder::open(&ctx, "finetune", &config()).err().unwrap().to_string();
        assert!(text.contains("holds a run already") && text.contains("--resume"), "{text}");
        ctx.resume = true;
        let longer = Config { run: Steps { steps: 9 }, ..config() };
        let open = RunFolder::open(&ctx, "finetune", &longer).unwrap();
        let hash = open.config_sha256().to_owned();
        drop(open);
        assert_eq!(RunFolder::open(&ctx, "finetune", &config()).unwrap().config_sha256(), hash);
        let other = Config { lr: 0.25, ..config() };
        let text = RunFolder::open(&ctx, "finetune", &other).err().unwrap().to_string();
        assert!(text.contains("lr: the run has 0.5, this command 0.25"), "{text}");
        let text = RunFolder::open(&ctx, "pretrain vae", &config()).err().unwrap().to_string();
        assert!(text.contains("a run of `finetune`"), "{text}");
    }

    #[test]
    fn metrics_are_cut_back_on_resume() {
        let dir = tempfile::tempdir().unwrap();
        let mut run = RunFolder::open(&RunContext::new(dir.path()), "finetune", &config()).unwrap();
        run.rewind(0, 0).unwrap();
        run.log(0, &[("loss".to_owned(), 0.5)], &[]).unwrap();
        let len = run.metrics_len().unwrap();
        run.log(1, &[("loss".to_owned(), f64::NAN)], &[]).unwrap();
        run.rewind(len, 1).unwrap();
        run.log(1, &[("loss".to_owned(), 1e-9)], &["it \"grows\"".to_owned()]).unwrap();
        let text = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        let lines =
            ["{\"step\":0,\"loss\":0.5}", "{\"step\":1,\"loss\":1e-9,\"warnings\":[\"it \\\"grows\\\"\"]}"];
        assert_eq!(text.lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn numbers_and_times_are_short() {
        assert_eq!(short(0.69312), "0.6931");
        assert_eq!(short(-12.3456), "-12.35");
        assert_eq!(short(1.2e-5), "1.200e-5");
        assert_eq!(
            (duration(8.2), duration(185.0), duration(4320.0)),
            ("8s".into(), "3m05s".into(), "1h12m".into())
        );
    }
}
