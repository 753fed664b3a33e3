//! Pre-training of the tiny CLAP on captioned clips with the symmetric contrastive loss ([`dragon_encoders::clap`]).
//!
//! The spectrograms of all clips are computed once and stay in memory (16 bits per value, 33 kB per clip of 5.12 s);
//! each clip is peak-normalised first, as the embedding settings do. A batch holds one clip per piece and no caption
//! twice. Validation is retrieval with the averaged weights: which caption belongs to this clip, and the reverse.
//!
//! Reading order: `config`; the task is here; `songs` holds the spectrograms; `retrieval` is the validation.

mod config;
mod retrieval;
mod songs;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use dragon_data::{Entry, Split, read_manifest};
use dragon_encoders::clap::{self, ClapEncoder};
use dragon_encoders::htsat::LogMel;
use dragon_encoders::tokenizer::Tokenizer;
use dragon_nn::{AdamW, Ema, Rng};
use rayon::prelude::*;

pub use config::ClapConfig;
pub use retrieval::{Recall, Retrieval};

use super::Task;
use crate::error::{Error, Result};
use songs::{Songs, set_statistics, spectrograms};

/// Cap of the logarithm of the factor on the cosines, as in CLIP: beyond 100 the loss only sharpens.
const MAX_LOGIT_SCALE: f64 = 4.605_170_185_988_092; // ln 100

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
        let front_end = LogMel::new(&cfg.model.audio)
            .map_err(Error::input("the front end of CLAP\nhint: correct `clap.model.audio`"))?;
        let (mut train, mut valid) = (Songs::default(), Songs::default());
        for manifest in &cfg.manifests {
            let entries = read_manifest(manifest).map_err(Error::input(context()))?;
            let folder = manifest.parent().unwrap_or(Path::new("."));
            let entries: Vec<Entry> = entries.into_iter().filter(|e| e.split != Split::Test).collect();
            let (rate, key) = (cfg.model.audio.sample_rate_hz, "clap.model.audio.sample_rate_hz");
            entries.iter().try_for_each(|entry| super::check_rate(entry, manifest, rate, key))?;
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

    fn validate(&mut self) -> Result<Vec<(String, f64)>> {
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
        Ok(super::named(scores.scalars()))
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        super::put(&mut state, "model.", self.trained.params.tensors()?);
        super::put(&mut state, "ema.", self.ema.shadow().tensors()?);
        super::put(&mut state, "optimizer.", self.optimizer.state()?);
        let bytes = self.trained.tokenizer.to_json().into_bytes();
        state.insert("tokenizer".to_owned(), Tensor::from_slice(&bytes, bytes.len(), &Device::Cpu)?);
        Ok(state)
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
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
        self.trained.params.load_tensors(&super::take(state, "model."), "").map_err(Error::input(context))?;
        self.ema.shadow().load_tensors(&super::take(state, "ema."), "").map_err(Error::input(context))?;
        self.optimizer.load_state(&super::take(state, "optimizer."))?;
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
