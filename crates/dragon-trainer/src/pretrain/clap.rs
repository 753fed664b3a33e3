//! Pre-training of the tiny CLAP on captioned clips with the symmetric contrastive loss ([`dragon_encoders::clap`]).
//!
//! The spectrograms of all clips are computed once and stay in memory (16 bits per value, 33 kB per clip of 5.12 s);
//! each clip is peak-normalised first, as the embedding settings do. A batch holds one clip per piece and no caption
//! twice. Validation is retrieval with the averaged weights: which caption belongs to this clip, and the reverse.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dragon_data::{Entry, Split, read_manifest};
use dragon_encoders::clap::{self, ClapEncoder};
use dragon_encoders::htsat::LogMel;
use dragon_encoders::settings::peak_normalize;
use dragon_encoders::tokenizer::Tokenizer;
use dragon_nn::{AdamW, AdamWConfig, Ema, Rng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Task;
use crate::error::{Error, Result};

/// Settings of the pre-training of CLAP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClapConfig {
    /// Manifests of the clips; the model trains on their training split.
    pub manifests: Vec<PathBuf>,
    /// `tokenizer.json` to use; none: one is trained on the captions of the training split.
    pub tokenizer: Option<PathBuf>,
    /// Clips per step: each caption is told apart from `batch - 1` others.
    pub batch: usize,
    /// Clips of the validation split that captions are retrieved among, spread evenly over it.
    pub n_valid_clips: usize,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup_steps: usize,
    /// Step at which the learning rate has fallen to a twentieth, by a half cosine; constant from there.
    pub decay_steps: usize,
    /// Decay of the moving average of the weights, which is what validation and export use.
    pub ema_decay: f64,
    /// Random roll in time, one masked stretch of frames and one of mel bands per clip.
    pub augment: bool,
    /// The optimiser; `lr` is the highest learning rate.
    pub optimizer: AdamWConfig,
    /// The model; `text.vocab_size` bounds the tokenizer.
    pub model: clap::Config,
}

/// Fraction of the highest learning rate that is left at the end.
const LAST_LR: f64 = 0.05;
/// Cap of the logarithm of the factor on the cosines, as in CLIP: beyond 100 the loss only sharpens.
const MAX_LOGIT_SCALE: f64 = 4.605_170_185_988_092; // ln 100
/// Steps of the 16-bit spectrograms per dB: ±163 dB in steps of 0.005.
const STEPS_PER_DB: f32 = 200.0;

impl ClapConfig {
    /// Settings for the next training of the tiny default. The shipped one was trained with earlier ones: its folder's
    /// `config.json` and `fixtures/tiny/README.md` say which.
    pub fn tiny_music(manifests: Vec<PathBuf>) -> Self {
        Self {
            manifests,
            tokenizer: None,
            batch: 64,
            n_valid_clips: 288,
            warmup_steps: 100,
            decay_steps: 4000,
            ema_decay: 0.995,
            augment: true,
            optimizer: AdamWConfig {
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.98,
                eps: 1e-6,
                weight_decay: 0.05,
                max_grad_norm: Some(1.0),
            },
            model: clap::Config::tiny_music(),
        }
    }

    /// Checks what can be checked before a file is read.
    ///
    /// # Errors
    /// The first key that cannot work.
    pub fn check(&self) -> Result<()> {
        for (key, value, least) in [
            ("clap.manifests", self.manifests.len(), 1),
            ("clap.batch", self.batch, 2),
            ("clap.n_valid_clips", self.n_valid_clips, 2),
            ("clap.decay_steps", self.decay_steps, self.warmup_steps + 1),
        ] {
            if value < least {
                return Err(Error::config(key, format!("at least {least}"), value));
            }
        }
        if !(0.0..1.0).contains(&self.ema_decay) {
            return Err(Error::config("clap.ema_decay", "0 or more, below 1", self.ema_decay));
        }
        Ok(())
    }

    /// Learning rate of a step: linear rise, half a cosine down, constant.
    fn lr(&self, step: usize) -> f64 {
        let rise = (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        let fall =
            step.saturating_sub(self.warmup_steps) as f64 / (self.decay_steps - self.warmup_steps) as f64;
        let cosine = 0.5 + 0.5 * (std::f64::consts::PI * fall.min(1.0)).cos();
        self.optimizer.lr * rise.min(1.0) * (LAST_LR + (1.0 - LAST_LR) * cosine)
    }
}

/// Spectrograms and captions of one split, in memory.
#[derive(Default)]
struct Songs {
    /// Of each clip, one spectrogram a window.
    log_mel: Vec<Vec<Vec<i16>>>,
    captions: Vec<String>,
    pieces: Vec<String>,
}

impl Songs {
    fn push(&mut self, entry: Entry, log_mel: Vec<Vec<i16>>) {
        self.log_mel.push(log_mel);
        self.captions.push(entry.caption);
        self.pieces.push(entry.piece);
    }

    fn spectrogram(&self, i: usize, window: usize) -> Vec<f32> {
        self.log_mel[i][window].iter().map(|x| f32::from(*x) / STEPS_PER_DB).collect()
    }
}

/// Windows that a clip longer than the audio branch's is cut into, from its start to its end.
const WINDOWS: usize = 3;

/// Reads a clip and computes the 16-bit log-mel spectrograms of its windows, each peak-normalised as in the MA setting.
fn spectrograms(
    path: &Path,
    config: &clap::Config,
    front_end: &LogMel,
) -> std::result::Result<Vec<Vec<i16>>, String> {
    let clip = dragon_audio::read_mono(path, config.audio.sample_rate_hz).map_err(|e| e.to_string())?;
    let (found, expected) = (clip.samples.len(), config.audio.clip_samples);
    if found < expected {
        return Err(format!("`{}` has {found} samples, the audio branch reads {expected}", path.display()));
    }
    let n = if found == expected { 1 } else { WINDOWS };
    let window = |i: usize| {
        let start = (found - expected) * i / (n - 1).max(1);
        let mut samples = clip.samples[start..start + expected].to_vec();
        peak_normalize(&mut samples);
        let log_mel = front_end.compute(&samples).map_err(|e| format!("`{}`: {e}", path.display()))?;
        Ok(log_mel.into_iter().map(|db| (db * STEPS_PER_DB) as i16).collect())
    };
    (0..n).map(window).collect()
}

/// The task of [`super::run`].
pub struct ClapTask {
    cfg: ClapConfig,
    trained: ClapEncoder,
    averaged: ClapEncoder,
    ema: Ema,
    optimizer: AdamW,
    train: Songs,
    valid: Songs,
    band_means: Vec<f32>,
    device: Device,
}

impl ClapTask {
    /// Reads the clips, trains the tokenizer if none is given, and builds the model with weights drawn from `seed`.
    ///
    /// # Errors
    /// If a setting cannot work, a manifest or clip cannot be read, a clip is too short, a caption is empty, or a
    /// split has too little.
    pub fn new(cfg: &ClapConfig, seed: u64, device: &Device) -> Result<Self> {
        cfg.check()?;
        let context = || "the training data of CLAP".to_owned();
        let front_end = LogMel::new(&cfg.model.audio).map_err(Error::input("the front end of CLAP"))?;
        let (mut train, mut valid) = (Songs::default(), Songs::default());
        for manifest in &cfg.manifests {
            let entries = read_manifest(manifest).map_err(Error::input(context()))?;
            let folder = manifest.parent().unwrap_or(Path::new("."));
            let entries: Vec<Entry> = entries.into_iter().filter(|e| e.split != Split::Test).collect();
            let windows: Vec<_> = entries
                .par_iter()
                .map(|e| spectrograms(&folder.join(&e.path), &cfg.model, &front_end))
                .collect::<std::result::Result<_, String>>()
                .map_err(Error::input(context()))?;
            for (entry, log_mel) in entries.into_iter().zip(windows) {
                let songs = if entry.split == Split::Train { &mut train } else { &mut valid };
                songs.push(entry, log_mel);
            }
        }
        let n_pieces = train.pieces.iter().collect::<HashSet<_>>().len();
        if n_pieces < 2 * cfg.batch || valid.captions.len() < 2 {
            return Err(Error::Data {
                problem: format!(
                    "{n_pieces} pieces in the training split and {} clips in the validation split; a batch of {} needs twice \
                     as many pieces, and validation 2 clips",
                    valid.captions.len(),
                    cfg.batch
                ),
                hint: "add clips, or lower `clap.batch`".to_owned(),
            });
        }
        let tokenizer = match &cfg.tokenizer {
            Some(path) => Tokenizer::load(path),
            None => Tokenizer::train(&train.captions, cfg.model.text.vocab_size),
        };
        let tokenizer = tokenizer.map_err(Error::input("the tokenizer of CLAP"))?;
        let trained = ClapEncoder::new(&cfg.model, tokenizer.clone(), seed, device)
            .map_err(Error::input("building CLAP"))?;
        let cut = trained.tokens(&train.captions).map_err(Error::input(context()))?.truncated;
        trained.tokens(&valid.captions).map_err(Error::input(context()))?;
        if let Some(first) = cut.first() {
            let (n, text) = (cut.len(), &train.captions[*first]);
            tracing::warn!(
                "{n} captions exceed {} tokens and are cut, the first: {text:?}",
                cfg.model.max_tokens
            );
        }
        let band_means = set_statistics(&trained, &train)?;
        let ema = Ema::new(&trained.params, cfg.ema_decay)?;
        let averaged = ClapEncoder::with_params(&cfg.model, tokenizer, ema.shadow().clone(), device)
            .map_err(Error::input("building CLAP"))?;
        let optimizer = AdamW::new(&trained.params, cfg.optimizer.clone())?;
        let every = valid.captions.len().div_ceil(cfg.n_valid_clips);
        let valid = Songs {
            log_mel: valid.log_mel.into_iter().step_by(every).collect(),
            captions: valid.captions.into_iter().step_by(every).collect(),
            pieces: valid.pieces.into_iter().step_by(every).collect(),
        };
        let device = device.clone();
        Ok(Self { cfg: cfg.clone(), trained, averaged, ema, optimizer, train, valid, band_means, device })
    }

    /// Positions of a batch: one clip per piece, no caption twice.
    fn draw(&self, rng: &mut Rng) -> Vec<usize> {
        let (mut pieces, mut captions) = (HashSet::new(), HashSet::new());
        let mut batch = Vec::with_capacity(self.cfg.batch);
        // Few captions may repeat so much that a batch cannot be filled: then it stays smaller.
        for _ in 0..100 * self.cfg.batch {
            let i = rng.below(self.train.captions.len());
            if pieces.contains(&self.train.pieces[i]) || captions.contains(&self.train.captions[i]) {
                continue;
            }
            pieces.insert(&self.train.pieces[i]);
            captions.insert(&self.train.captions[i]);
            batch.push(i);
            if batch.len() == self.cfg.batch {
                break;
            }
        }
        batch
    }

    /// Rolls a spectrogram in time, and sets one stretch of frames and one of bands to the bands' means.
    fn augment(&self, log_mel: &mut [f32], rng: &mut Rng) {
        let n_bands = self.band_means.len();
        let n_frames = log_mel.len() / n_bands;
        log_mel.rotate_left(rng.below(n_frames) * n_bands);
        let mut stretch = |n: usize| {
            let length = rng.below(n / 8 + 1);
            let start = rng.below(n - length + 1);
            start..start + length
        };
        let (frames, bands) = (stretch(n_frames), stretch(n_bands));
        for (i, frame) in log_mel.chunks_exact_mut(n_bands).enumerate() {
            let bands = if frames.contains(&i) { 0..n_bands } else { bands.clone() };
            frame[bands.clone()].copy_from_slice(&self.band_means[bands]);
        }
    }

    fn tensor(&self, rows: Vec<Vec<f32>>) -> Result<Tensor> {
        let audio = &self.cfg.model.audio;
        let shape = (rows.len(), audio.n_frames(), audio.mel_bins);
        Ok(Tensor::from_vec(rows.concat(), shape, &self.device)?) // [B, n_frames, mel_bins]
    }
}

/// Mean and variance of every mel band over the training clips go into `bn0`; returns the means.
fn set_statistics(encoder: &ClapEncoder, songs: &Songs) -> Result<Vec<f32>> {
    let n_bands = encoder.model.config().audio.mel_bins;
    let mut sums = vec![(0f64, 0f64); n_bands];
    let mut n_frames = 0;
    for log_mel in &songs.log_mel {
        for frame in log_mel.iter().flat_map(|window| window.chunks_exact(n_bands)) {
            for ((sum, squares), x) in sums.iter_mut().zip(frame) {
                let db = f64::from(*x) / f64::from(STEPS_PER_DB);
                *sum += db;
                *squares += db * db;
            }
            n_frames += 1;
        }
    }
    let n = n_frames as f64;
    let means: Vec<f32> = sums.iter().map(|(sum, _)| (sum / n) as f32).collect();
    // a band that never sounds has no variance; 1 dB² keeps it at zero rather than at noise
    let vars: Vec<f32> = sums.iter().map(|(s, q)| (q / n - (s / n).powi(2)).max(1.0) as f32).collect();
    for (name, values) in [("running_mean", &means), ("running_var", &vars)] {
        let name = format!("audio_branch.bn0.{name}");
        let var = encoder.params.get(&name).ok_or_else(|| Error::Bug(format!("CLAP has no `{name}`")))?;
        var.set(&Tensor::from_slice(values, n_bands, var.device())?)?;
    }
    Ok(means)
}

impl Task for ClapTask {
    fn step(&mut self, step: usize, rng: &mut Rng) -> Result<Vec<(&'static str, f64)>> {
        let batch = self.draw(rng);
        let mut rows: Vec<Vec<f32>> = batch
            .iter()
            .map(|&i| self.train.spectrogram(i, rng.below(self.train.log_mel[i].len())))
            .collect();
        if self.cfg.augment {
            for row in &mut rows {
                self.augment(row, rng);
            }
        }
        let captions: Vec<&str> = batch.iter().map(|&i| self.train.captions[i].as_str()).collect();
        let tokens =
            self.trained.tokens(&captions).map_err(Error::input("a caption of the training split"))?;
        let model = &self.trained.model;
        let audio = model.embed_log_mel(&self.tensor(rows)?)?; // [B, joint]
        // columns of padding alone change nothing and cost as much as words
        let longest = tokens.mask.sum(1)?.max(0)?.to_scalar::<f32>()? as usize;
        let (ids, mask) = (tokens.ids.narrow(1, 0, longest)?, tokens.mask.narrow(1, 0, longest)?);
        let text = model.embed_tokens(&ids, &mask)?; // [B, joint]
        let loss = clap::contrastive_loss(&audio, &text, model.logit_scale(), None)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Ok(vec![("loss", value)]);
        }
        let lr = self.cfg.lr(step);
        self.optimizer.set_lr(lr);
        let grad_norm = self.optimizer.step(&loss.backward()?)?;
        let name = "logit_scale_a";
        let scale =
            self.trained.params.get(name).ok_or_else(|| Error::Bug(format!("CLAP has no `{name}`")))?;
        scale.set(&scale.as_tensor().detach().clamp(0.0, MAX_LOGIT_SCALE)?)?;
        self.ema.update(&self.trained.params)?;
        let logit_scale = f64::from(scale.as_tensor().to_scalar::<f32>()?.exp());
        Ok(vec![("loss", value), ("grad_norm", grad_norm), ("lr", lr), ("logit_scale", logit_scale)])
    }

    fn validate(&mut self) -> Result<Vec<(&'static str, f64)>> {
        let n = self.valid.captions.len();
        let mut audio = Vec::with_capacity(n);
        for start in (0..n).step_by(16) {
            let rows = (start..n.min(start + 16)).map(|i| self.valid.spectrogram(i, 0)).collect();
            audio.extend(self.averaged.model.embed_log_mel(&self.tensor(rows)?)?.detach().to_vec2::<f32>()?);
        }
        let text = self
            .averaged
            .embed_captions(&self.valid.captions)
            .map_err(Error::input("a validation caption"))?;
        let scores = Retrieval::of(&audio, &text, &self.valid.captions);
        Ok(scores.scalars())
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        let parts = [
            ("model", self.trained.params.tensors()?),
            ("ema", self.ema.shadow().tensors()?),
            ("optimizer", self.optimizer.state()?),
        ];
        for (prefix, tensors) in parts {
            state.extend(tensors.into_iter().map(|(name, t)| (format!("{prefix}.{name}"), t)));
        }
        let bytes = self.trained.tokenizer.to_json().into_bytes();
        state.insert("tokenizer".to_owned(), Tensor::from_slice(&bytes, bytes.len(), &Device::Cpu)?);
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let part = |prefix: &str| -> HashMap<String, Tensor> {
            let prefix = format!("{prefix}.");
            let own = state.iter().filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?, t)));
            own.map(|(name, t)| (name.to_owned(), t.clone())).collect()
        };
        let stored = match state.get("tokenizer") {
            Some(bytes) => bytes.to_dtype(DType::U8)?.to_vec1::<u8>()?,
            None => vec![],
        };
        if stored != self.trained.tokenizer.to_json().into_bytes() {
            return Err(Error::Data {
                problem: "the captions gave another tokenizer than when the run began".to_owned(),
                hint: "continue with the manifests of the run, or begin another run".to_owned(),
            });
        }
        let context = "the state of a CLAP training";
        self.trained.params.load_tensors(&part("model"), "").map_err(Error::input(context))?;
        self.ema.shadow().load_tensors(&part("ema"), "").map_err(Error::input(context))?;
        self.optimizer.load_state(&part("optimizer").into_iter().collect())?;
        Ok(())
    }

    fn export(&self, dir: &Path) -> Result<()> {
        self.averaged.save(dir).map_err(Error::input(format!("writing the CLAP folder `{}`", dir.display())))
    }

    fn headline(&self) -> &'static [&'static str] {
        &["loss", "grad_norm", "valid/text_r10", "valid/audio_r10"]
    }

    fn throughput(&self) -> (f64, &'static str) {
        (self.cfg.batch as f64, "clips")
    }
}

/// How well clips and captions find each other: recall in [0, 1] and median rank from 1, both ways.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Retrieval {
    /// Number of pairs; by chance, recall at `k` is about `k / n` and the median rank `n / 2`.
    pub n: usize,
    /// From a clip to its caption.
    pub text: Recall,
    /// From a caption to its clip.
    pub audio: Recall,
}

/// Recall at 1, 5 and 10, and the median rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Share of queries whose own item comes first.
    pub at_1: f64,
    /// Share of queries whose own item is among the first five.
    pub at_5: f64,
    /// Share of queries whose own item is among the first ten.
    pub at_10: f64,
    /// Median rank of the own item, from 1.
    pub median_rank: f64,
}

impl Recall {
    fn of(mut ranks: Vec<usize>) -> Self {
        ranks.sort_unstable();
        let at = |k: usize| ranks.iter().filter(|r| **r <= k).count() as f64 / ranks.len().max(1) as f64;
        let median_rank = ranks.get(ranks.len() / 2).map_or(0.0, |r| *r as f64);
        Self { at_1: at(1), at_5: at(5), at_10: at(10), median_rank }
    }
}

impl Retrieval {
    /// Of unit-length embeddings, where row `i` of `audio` belongs to row `i` of `text`. Items with the same caption
    /// as the query's are not counted against it, other ties are.
    pub fn of(audio: &[Vec<f32>], text: &[Vec<f32>], captions: &[String]) -> Self {
        let n = audio.len();
        let cosine = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let rank = |own: usize, query: &[f32], items: &[Vec<f32>]| {
            let score = cosine(query, &items[own]);
            let ahead = (0..n).filter(|&j| captions[j] != captions[own] && cosine(query, &items[j]) >= score);
            1 + ahead.count()
        };
        Self {
            n,
            text: Recall::of((0..n).into_par_iter().map(|i| rank(i, &audio[i], text)).collect()),
            audio: Recall::of((0..n).into_par_iter().map(|i| rank(i, &text[i], audio)).collect()),
        }
    }

    /// Measures a model on clips of a manifest: one per piece of the given splits, at most `n_pieces`.
    ///
    /// # Errors
    /// If the manifest or a clip cannot be read, or a caption is empty.
    pub fn on_pieces(
        encoder: &ClapEncoder,
        manifest: &Path,
        splits: &[Split],
        n_pieces: usize,
    ) -> Result<Self> {
        let context = "the data of the CLAP evaluation";
        let mut seen = HashSet::new();
        let entries = read_manifest(manifest).map_err(Error::input(context))?;
        let entries =
            entries.into_iter().filter(|e| splits.contains(&e.split) && seen.insert(e.piece.clone()));
        let folder = manifest.parent().unwrap_or(Path::new("."));
        let (mut clips, mut captions) = (vec![], vec![]);
        let audio = &encoder.model.config().audio;
        for entry in entries.take(n_pieces) {
            let path = folder.join(&entry.path);
            let mut clip =
                dragon_audio::read_mono(&path, audio.sample_rate_hz).map_err(Error::input(context))?;
            clip.samples.truncate(audio.clip_samples);
            peak_normalize(&mut clip.samples);
            clips.push(clip.samples);
            captions.push(entry.caption);
        }
        let views: Vec<&[f32]> = clips.iter().map(Vec::as_slice).collect();
        let text = encoder.embed_captions(&captions).map_err(Error::input(context))?;
        Ok(Self::of(&encoder.embed_clips(&views)?, &text, &captions))
    }

    fn scalars(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("text_r1", self.text.at_1),
            ("text_r5", self.text.at_5),
            ("text_r10", self.text.at_10),
            ("text_median_rank", self.text.median_rank),
            ("audio_r1", self.audio.at_1),
            ("audio_r5", self.audio.at_5),
            ("audio_r10", self.audio.at_10),
            ("audio_median_rank", self.audio.median_rank),
            ("n_pairs", self.n as f64),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dragon_data::{CaptionSource, Corpus, write_manifest};

    /// Sixty pieces of two clips: sines of three pitches, said in words.
    fn corpus(dir: &Path) -> PathBuf {
        let names = ["low", "middle", "high"];
        let mut entries = vec![];
        for i in 0..120usize {
            let pitch = names[i % 3];
            let hz = [200.0, 600.0, 1800.0][i % 3] * (1.0 + 0.003 * i as f32);
            let samples =
                (0..6000).map(|t| 0.3 * (std::f32::consts::TAU * hz * t as f32 / 8000.0).sin()).collect();
            let path = format!("{i:03}.wav");
            let clip = dragon_audio::Clip { samples, sample_rate_hz: 8000 };
            dragon_audio::write_wav(&dir.join(&path), &clip, dragon_audio::SampleFormat::Int16).unwrap();
            let split = if i / 2 < 50 { Split::Train } else { Split::Valid };
            entries.push(Entry {
                id: format!("{i}"),
                piece: format!("piece-{}", i / 2),
                path,
                start_s: 0.0,
                duration_s: 0.75,
                sample_rate_hz: 8000,
                caption: format!("a {pitch} tone number {i}"),
                caption_source: CaptionSource::User,
                split,
                corpus: Corpus::Import,
                attributes: Default::default(),
            });
        }
        let manifest = dir.join("manifest.jsonl");
        write_manifest(&manifest, &entries).unwrap();
        manifest
    }

    fn config(manifest: PathBuf) -> ClapConfig {
        let mut cfg = ClapConfig::tiny_music(vec![manifest]);
        cfg.model = clap::Config::tiny();
        cfg.model.text.vocab_size = 80;
        cfg.batch = 8;
        cfg.warmup_steps = 3;
        cfg.decay_steps = 100;
        cfg.ema_decay = 0.8;
        cfg.optimizer.lr = 1e-3;
        cfg
    }

    fn bits(task: &ClapTask) -> Vec<u32> {
        let state = task.state().unwrap();
        let floats = state.values().filter(|t| t.dtype() == DType::F32);
        floats.flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).map(f32::to_bits).collect()
    }

    #[test]
    fn a_resumed_training_equals_one_that_ran_through_and_the_model_learns() {
        let dir = tempfile::tempdir().unwrap();
        let cfg = config(corpus(dir.path()));
        let mut a = ClapTask::new(&cfg, 1, &Device::Cpu).unwrap();
        let run = |task: &mut ClapTask, steps: std::ops::Range<usize>| -> Vec<f64> {
            steps
                .map(|step| {
                    let mut rng = Rng::from_key(&format!("step/{step}"), 3);
                    task.step(step, &mut rng).unwrap()[0].1
                })
                .collect()
        };
        let first = run(&mut a, 0..10);
        let state = a.state().unwrap();
        let mut losses = run(&mut a, 10..12);
        let mut b = ClapTask::new(&cfg, 1, &Device::Cpu).unwrap();
        b.load_state(&state).unwrap();
        assert_eq!(losses, run(&mut b, 10..12));
        assert_eq!(bits(&a), bits(&b));
        losses.extend(run(&mut a, 12..80));
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let (start, end) = (mean(&first[..4]), mean(&losses[losses.len() - 8..]));
        assert!(end < 0.75 * start, "loss {start:.3} -> {end:.3}"); // ln 8 = 2.08; telling three pitches apart: 1.1
        let scores: HashMap<_, _> = a.validate().unwrap().into_iter().collect();
        assert_eq!(scores["n_pairs"], 20.0);
        a.export(&dir.path().join("model")).unwrap();
        let read = ClapEncoder::load(dir.path().join("model"), &Device::Cpu).unwrap();
        let again = Retrieval::on_pieces(&read, &cfg.manifests[0], &[Split::Valid], 100).unwrap();
        assert_eq!(again.n, 10);
    }

    #[test]
    fn perfect_and_reversed_embeddings_have_the_ranks_they_should() {
        let rows: Vec<Vec<f32>> =
            (0..4).map(|i| (0..4).map(|j| f32::from(u8::from(i == j))).collect()).collect();
        let captions: Vec<String> = (0..4).map(|i| format!("{i}")).collect();
        let perfect = Retrieval::of(&rows, &rows, &captions);
        assert_eq!((perfect.text.at_1, perfect.audio.median_rank), (1.0, 1.0));
        let swapped: Vec<Vec<f32>> = rows.iter().rev().cloned().collect();
        assert_eq!(Retrieval::of(&rows, &swapped, &captions).text.at_1, 0.0);
        let same = vec!["x".to_string(); 4];
        assert_eq!(Retrieval::of(&rows, &swapped, &same).text.at_1, 1.0);
    }

    #[test]
    fn impossible_settings_are_named() {
        let base = ClapConfig::tiny_music(vec![]);
        assert!(base.check().unwrap_err().to_string().contains("clap.manifests"));
        let dir = tempfile::tempdir().unwrap();
        let mut cfg = config(corpus(dir.path()));
        cfg.batch = 40;
        let message = ClapTask::new(&cfg, 1, &Device::Cpu).err().unwrap().to_string();
        assert!(message.contains("lower `clap.batch`"), "{message}");
        cfg = config(dir.path().join("manifest.jsonl"));
        cfg.model.audio.clip_samples = 6_300;
        let message = ClapTask::new(&cfg, 1, &Device::Cpu).err().unwrap().to_string();
        assert!(message.contains("6000 samples") && message.contains("6300"), "{message}");
    }
}
