//! MusicGen from its published folder: prompts to mono audio.
//!
//! ```text
//! config.json, model.safetensors (also in parts) or pytorch_model.bin, tokenizer.json: as Hugging Face has it;
//! one checkpoint holds text encoder (T5), decoder and codec (EnCodec)
//! ```

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dragon_audio::{Audio, SampleFormat};
use dragon_encoders::t5::{self, T5Encoder};
use dragon_encoders::tokenizer::{Tokenizer, TooLong};
use dragon_musicgen::published;
use dragon_musicgen::{Choice, MusicGen, Sampling, Texts, generate};
use dragon_nn::{Checkpoint, Loader, Rng};
use dragon_vae::encodec::{self, Encodec};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bundle::read_json;
use crate::error::{Error, Result};
use crate::generate::Wanted;
use crate::run::{Meter, RunContext};

/// Everything a generation by MusicGen depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The published folder.
    pub model: PathBuf,
    /// Length of the pieces, in seconds.
    pub seconds: f64,
    /// Strength of classifier-free guidance; 1: none.
    pub guidance_scale: f64,
    /// Each code is drawn from this many likeliest; 1: always the likeliest.
    pub top_k: usize,
    /// Above 1 evens the probabilities of codes out, below 1 sharpens them.
    pub temperature: f64,
    /// Pieces written at a time; bounds memory and changes no number.
    pub batch: usize,
}

/// Tokens at which prompts are cut: what T5 was trained on.
const MAX_TOKENS: usize = 512;
/// Length of the pieces that MusicGen was trained on, in seconds.
const TRAINED_S: f64 = 30.0;

/// Whether a folder holds a published MusicGen.
pub fn is_published(dir: &Path) -> bool {
    let config = std::fs::read(dir.join("config.json")).unwrap_or_default();
    let json: Option<Value> = serde_json::from_slice(&config).ok();
    json.is_some_and(|json| published::is_musicgen(&json)) || is_audiocraft(dir)
}

/// The files of a published folder.
///
/// # Errors
/// If the folder cannot be read.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![dir.join("config.json"), dir.join("tokenizer.json")];
    let entries = std::fs::read_dir(dir).map_err(Error::io("read", dir))?;
    let weights = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| {
        path.extension().is_some_and(|ending| ending == "safetensors" || ending == "bin") && path.is_file()
    });
    files.extend(weights);
    files.sort();
    Ok(files)
}

/// Whether a folder holds a MusicGen as audiocraft keeps it, whose text encoder and codec lie elsewhere.
fn is_audiocraft(dir: &Path) -> bool {
    dir.join("state_dict.bin").is_file() && dir.join("compression_state_dict.bin").is_file()
}

/// The models from prompts to audio.
pub struct Pipeline {
    /// The language model.
    pub model: MusicGen,
    /// Codes to audio.
    pub codec: Encodec,
    tokenizer: Tokenizer,
    t5: T5Encoder,
    device: Device,
}

impl Pipeline {
    /// Reads a published folder.
    ///
    /// # Errors
    /// If a file is missing or broken, describes another model, or its tensors do not fit (all are listed).
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let described = Described::read(dir)?;
        let path = dir.join("tokenizer.json");
        let tokenizer = Tokenizer::load(&path).map_err(Error::input(
            "cannot load the tokenizer\nhint: take tokenizer.json of the model's folder, or t5-base's",
        ))?;
        if tokenizer.vocab_size() > described.t5.vocab_size {
            let problem =
                format!("has {} tokens, the model {}", tokenizer.vocab_size(), described.t5.vocab_size);
            return Err(Error::Content {
                path,
                problem,
                hint: "take the tokenizer of the model's folder".into(),
            });
        }
        let checkpoint = Checkpoint::open(dir).map_err(weights)?;
        let names = encodec::published::Names::of(&checkpoint);
        // Some files hold the table of T5 under its second name only.
        let table = if checkpoint.shape(SHARED).is_some() { SHARED } else { TIED };
        let loader = Loader::new(checkpoint, move |name| {
            vec![match name.strip_prefix("audio_encoder.") {
                Some(name) => format!("audio_encoder.{}", names.name(name)),
                None if name == SHARED => table.to_string(),
                None => name.to_string(),
            }]
        });
        let vb = loader.builder(DType::F32, device);
        let fails = |err| Error::input(format!("`{}` does not hold MusicGen", dir.display()))(err);
        let t5 = T5Encoder::new(&described.t5, vb.pp("text_encoder")).map_err(fails)?;
        let model = MusicGen::new(&described.decoder, described.t5.d_model, vb.clone()).map_err(fails)?;
        let codec = Encodec::new(&described.codec, vb.pp("audio_encoder")).map_err(fails)?;
        let unneeded = |name: &str| {
            name == TIED || published::is_unneeded(name) || encodec::published::is_unneeded(name)
        };
        loader.finish(unneeded).map_err(weights)?;
        Ok(Self { model, codec, tokenizer, t5, device: device.clone() })
    }

    /// States of prompts, each encoded on its own; prompts with too many tokens are cut, with a warning.
    ///
    /// # Errors
    /// If a prompt is empty, or a tensor operation fails.
    pub fn texts<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Texts> {
        let (mut rows, mut n_tokens) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let prompt = prompt.as_ref();
            let (ids, cut) = self
                .tokenizer
                .encode(prompt, MAX_TOKENS, TooLong::Truncate)
                .map_err(Error::input("cannot read a prompt"))?;
            if cut {
                tracing::warn!("prompt cut at {MAX_TOKENS} tokens: {prompt:?}");
            }
            let n = ids.len();
            let ids = Tensor::from_vec(ids, (1, n), &self.device)?;
            let mask = Tensor::ones((1, n), DType::F32, &self.device)?;
            rows.push(self.t5.forward(&ids, &mask)?.detach()); // [1, n, W]
            n_tokens.push(n);
        }
        let longest = n_tokens.iter().copied().max().unwrap_or(0);
        let rows = rows.iter().zip(&n_tokens).map(|(row, n)| row.pad_with_zeros(1, 0, longest - n));
        let states = Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?; // [B, L, W]
        Ok(Texts { states, n_tokens })
    }

    /// Codes `[B, num_codebooks, n_frames]` to audio, a clip at a time.
    ///
    /// # Errors
    /// If the codes are not the codec's.
    pub fn decode(&self, codes: &Tensor) -> Result<Vec<Audio>> {
        let sample_rate_hz = self.codec.config().sample_rate_hz;
        let clip = |i: usize| -> Result<Audio> {
            let codes = codes.narrow(0, i, 1)?.to_device(&self.device)?;
            let audio = self.codec.decode_codes(&codes)?.squeeze(0)?; // [channels, n_frames * hop]
            Ok(Audio { channels: audio.to_vec2::<f32>()?, sample_rate_hz })
        };
        (0..codes.dim(0)?).map(clip).collect()
    }

    /// A piece for each prompt and seed; `None` if the run was stopped.
    fn pieces(
        &self,
        jobs: &[(&str, u64)],
        n_frames: usize,
        cfg: &Config,
        on_step: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<Audio>>> {
        let prompts: Vec<&str> = jobs.iter().map(|job| job.0).collect();
        let mut rngs: Vec<Rng> = jobs.iter().map(|(prompt, seed)| Rng::from_key(prompt, *seed)).collect();
        let texts = self.texts(&prompts)?;
        let codes = generate(&self.model, &texts, n_frames, &cfg.sampling(), &mut rngs, on_step)?;
        let Some(codes) = codes else { return Ok(None) };
        let mut pieces = self.decode(&codes)?;
        for (audio, prompt) in pieces.iter_mut().zip(prompts) {
            if let Some(bad) = audio.channels.iter().flatten().find(|x| !x.is_finite()) {
                return Err(Error::BrokenSong { value: f64::from(*bad), prompt: prompt.to_owned() });
            }
            let n_samples = (cfg.seconds * f64::from(audio.sample_rate_hz)).round() as usize;
            audio.channels.iter_mut().for_each(|samples| samples.truncate(n_samples));
        }
        Ok(Some(pieces))
    }
}

impl Config {
    fn sampling(&self) -> Sampling {
        let choice = match self.top_k {
            1 => Choice::Greedy,
            k => Choice::TopK { k, temperature: self.temperature },
        };
        Sampling { guidance_scale: self.guidance_scale, choice }
    }

    fn check(&self) -> Result<()> {
        for (key, value) in [("batch", self.batch), ("sampler.top_k", self.top_k)] {
            if value == 0 {
                return Err(Error::config(key, "at least 1", value));
            }
        }
        if !(self.guidance_scale.is_finite() && self.guidance_scale >= 1.0) {
            return Err(Error::config(
                "sampler.guidance_scale",
                "a number of at least 1",
                self.guidance_scale,
            ));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::config("sampler.temperature", "a number above 0", self.temperature));
        }
        Ok(())
    }

    /// Frames of a piece.
    fn n_frames(&self, described: &Described) -> Result<usize> {
        let codec = &described.codec;
        let rate = f64::from(codec.sample_rate_hz) / codec.hop() as f64;
        let decoder = &described.decoder;
        let most = (decoder.max_position_embeddings + 1).saturating_sub(decoder.num_codebooks);
        let n_frames = (self.seconds * rate).ceil();
        if !(self.seconds > 0.0 && n_frames <= most as f64) {
            let expected =
                format!("above 0 and at most {:.2}, the positions of the model", most as f64 / rate);
            return Err(Error::config("seconds", expected, self.seconds));
        }
        if self.seconds > TRAINED_S {
            tracing::warn!(
                "MusicGen was trained on pieces of {TRAINED_S} s, {} s are asked for",
                self.seconds
            );
        }
        Ok(n_frames as usize)
    }
}

/// Generates the songs and writes them to the output folder, 16-bit; gives the files in order, fewer if the run was stopped.
///
/// # Errors
/// If a setting or prompt is impossible, a file is missing or broken, or nothing can be written.
pub fn run(cfg: &Config, songs: &[Wanted], ctx: &RunContext) -> Result<Vec<PathBuf>> {
    cfg.check()?;
    let n_frames = cfg.n_frames(&Described::read(&cfg.model)?)?;
    let pipeline = Pipeline::load(&cfg.model, &ctx.device)?;
    std::fs::create_dir_all(&ctx.out_dir).map_err(Error::io("create", &ctx.out_dir))?;
    let n_steps = pipeline.model.config().delay(n_frames).n_steps();
    let mut meter = Meter::new(ctx.progress, songs.len() * n_steps, 0, 1.0, "frames");
    let mut files = Vec::with_capacity(songs.len());
    for part in songs.chunks(cfg.batch) {
        let before = files.len() * n_steps;
        let mut on_step = |step: usize| {
            if step > 0 {
                meter.update(before + step * part.len(), &[], &[], false);
            }
            if ctx.stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let Some(pieces) = pipeline.pieces(&Wanted::jobs(part), n_frames, cfg, &mut on_step)? else {
            break; // stopped: what is written so far is whole
        };
        for (audio, song) in pieces.into_iter().zip(part) {
            let path = ctx.out_dir.join(&song.file);
            dragon_audio::write_wav(&path, &audio, SampleFormat::Int16)
                .map_err(Error::input("cannot write audio"))?;
            files.push(path);
        }
        meter.update(files.len() * n_steps, &[], &[], false);
    }
    meter.finish();
    Ok(files)
}

/// What `config.json` says.
struct Described {
    decoder: dragon_musicgen::Config,
    t5: t5::Config,
    codec: encodec::Config,
}

impl Described {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        if !path.is_file() && is_audiocraft(dir) {
            return Err(Error::Content {
                path: dir.to_owned(),
                problem: "holds MusicGen as audiocraft keeps it, without text encoder and codec".into(),
                hint: "download facebook/musicgen-… as transformers reads it: config.json, model.safetensors and tokenizer.json"
                    .into(),
            });
        }
        let refuse = |problem: String| Error::Content {
            path: path.clone(),
            problem: format!("does not describe MusicGen: {problem}"),
            hint: "facebook/musicgen-small, -medium and -large, and models of the same layers, can be read"
                .into(),
        };
        let published = published::read_config(&read_json(&path)?).map_err(refuse)?;
        let t5: t5::Config = serde_json::from_value(published.text_encoder)
            .map_err(|err| refuse(format!("`text_encoder`: {err}")))?;
        let codec = encodec::published::read_config(&published.audio_encoder)
            .map_err(|problem| refuse(format!("`audio_encoder`: {problem}")))?;
        let decoder = published.config;
        if (codec.n_codebooks, codec.codebook_size) != (decoder.num_codebooks, decoder.vocab_size) {
            return Err(refuse(format!(
                "the decoder writes {} codebooks of {}, the codec reads {} of {}",
                decoder.num_codebooks, decoder.vocab_size, codec.n_codebooks, codec.codebook_size
            )));
        }
        Ok(Self { decoder, t5, codec })
    }
}

/// T5's table of embeddings.
const SHARED: &str = "text_encoder.shared.weight";
/// The same table once more.
const TIED: &str = "text_encoder.encoder.embed_tokens.weight";

fn weights(err: dragon_nn::LoadError) -> Error {
    Error::input("cannot load the weights")(err)
}
