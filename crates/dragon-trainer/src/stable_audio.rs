//! Stable Audio Open from its published files: prompts to stereo audio.
//!
//! ```text
//! diffusers                     model_index.json; transformer/  projection_model/  vae/  text_encoder/  tokenizer/
//! stable-audio-tools            model_config.json, model.safetensors (or .ckpt), and t5-base/ with Hugging Face's files,
//!                               which that format leaves out
//! ```
//!
//! A folder with both is read as diffusers'. The sampler is the published one: exponential noise levels,
//! [`dragon_diffusion::solver::dpmpp_2m_sde`], classifier-free guidance.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dragon_audio::{Audio, SampleFormat};
use dragon_diffusion::guidance::Guided;
use dragon_diffusion::solver::{self, OnStep};
use dragon_diffusion::stable_audio::published::{self, Published};
use dragon_diffusion::{Guidance, StableAudio};
use dragon_nn::{Checkpoint, Loader, Rng};
use dragon_vae::AudioVae;
use dragon_vae::published::Layout;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bundle::{TextStates, read_json};
use crate::error::{Error, Result};
use crate::generate::{prompts_given, slug};
use crate::run::{Meter, RunContext};

/// Everything a generation by Stable Audio Open depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Seed. A prompt's noise, of all steps, comes from a hash of the prompt and this, so it is the same in every batch.
    pub seed: u64,
    /// The published folder.
    pub model: PathBuf,
    /// Length of the pieces, in seconds: what the model is told, and where its output is cut.
    pub seconds: f64,
    /// Latent frames to sample; none: as many as the model was trained on, whatever the length. Fewer take less time.
    pub n_frames: Option<usize>,
    /// Steps from noise to latents.
    pub n_steps: usize,
    /// Strength of classifier-free guidance; 1: none.
    pub guidance_scale: f64,
    /// Pieces sampled at a time; bounds memory.
    pub batch: usize,
    /// Variants of each prompt, with seeds `seed`, `seed + 1` and so on.
    pub variants: usize,
    /// The prompts.
    pub prompts: Vec<String>,
}

/// Latent frames decoded at a time: bounds memory (about 1.5 s of stereo audio at 44.1 kHz).
const CHUNK: usize = 32;

/// Whether a folder holds a published Stable Audio model.
pub fn is_published(dir: &Path) -> bool {
    dir.join("model_index.json").is_file() || dir.join("model_config.json").is_file()
}

/// The models from prompts to audio.
pub struct Pipeline {
    /// Network and number conditioners.
    pub model: StableAudio,
    /// Latents to audio and back.
    pub vae: AudioVae,
    /// Prompts to text states.
    pub text: TextStates,
    /// Latent frames that the model was trained on.
    pub n_frames: usize,
    device: Device,
}

/// How latents are sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Length that the model is told, in seconds.
    pub seconds: f64,
    /// Latent frames.
    pub n_frames: usize,
    /// Steps from noise to latents.
    pub n_steps: usize,
    /// Strength of classifier-free guidance; 1: none.
    pub guidance_scale: f64,
}

impl Pipeline {
    /// Reads a published folder.
    ///
    /// # Errors
    /// If a file is missing or broken, describes another model, or its tensors do not fit (all are listed).
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let described = Described::read(dir)?;
        let n_frames = described.published.n_frames;
        let (model, vae, text) = match described.layout {
            Layout::Diffusers => diffusers(dir, &described, device)?,
            Layout::StableAudioTools => stable_audio_tools(dir, &described, device)?,
        };
        let (theirs, ours) = (vae.config().latent_dim, model.dit.config().latent_channels);
        if theirs != ours || text.width() != model.dit.config().cond_dim {
            return Err(Error::Content {
                path: dir.to_owned(),
                problem: format!(
                    "holds parts that do not fit: latents of {theirs} and {ours} channels, texts of width {} and {}",
                    text.width(),
                    model.dit.config().cond_dim
                ),
                hint: "download the folder again".into(),
            });
        }
        Ok(Self { model, vae, text, n_frames, device: device.clone() })
    }

    /// Samples latents `[B, C, n_frames]` for a batch of prompts; `None` if `on_step` ended the run.
    ///
    /// `noise` gives standard normal noise of their shape: first that of the start, then that of each step.
    ///
    /// # Errors
    /// If a prompt is empty, or a tensor operation fails.
    pub fn sample(
        &self,
        prompts: &[&str],
        sampling: &Sampling,
        noise: &mut dyn FnMut() -> candle_core::Result<Tensor>,
        on_step: &mut OnStep<'_>,
    ) -> Result<Option<Tensor>> {
        let text = self.text.encode(prompts)?;
        let seconds = vec![(0.0, sampling.seconds); prompts.len()];
        let conditions = self.model.numbers.conditions(&text.states, &text.mask, &seconds)?;
        let conditioned = self.model.with_conditions(&conditions, sampling.n_frames)?;
        let guided = Guided { model: &conditioned, guidance: Guidance::cfg(sampling.guidance_scale) };
        let sigmas = StableAudio::schedule(sampling.n_steps);
        // The published sampler starts with the deviation of noisy latents of unit variance.
        let x = (noise()? * (StableAudio::SIGMAS.1.powi(2) + 1.0).sqrt())?;
        Ok(solver::dpmpp_2m_sde(&guided, x, &sigmas, &mut |_| noise(), on_step)?)
    }

    /// Decodes latents `[B, C, T]`, a clip and a chunk at a time: audio of `T * hop` samples.
    ///
    /// # Errors
    /// If the shape does not fit the autoencoder.
    pub fn decode(&self, latents: &Tensor) -> Result<Vec<Audio>> {
        let sample_rate_hz = self.vae.config().sample_rate_hz;
        let clip = |i: usize| -> Result<Audio> {
            let audio = self.vae.decode_chunked(&latents.narrow(0, i, 1)?, CHUNK)?.squeeze(0)?; // [channels, T * hop]
            Ok(Audio { channels: audio.to_vec2::<f32>()?, sample_rate_hz })
        };
        (0..latents.dim(0)?).map(clip).collect()
    }

    /// A piece for each prompt and seed; `None` if the run was stopped.
    fn pieces(&self, jobs: &[(&str, u64)], cfg: &Config, ctx: &RunContext) -> Result<Option<Vec<Audio>>> {
        let n_frames = cfg.n_frames.unwrap_or(self.n_frames);
        let prompts: Vec<&str> = jobs.iter().map(|job| job.0).collect();
        let channels = self.model.dit.config().latent_channels;
        let mut rngs: Vec<Rng> = jobs.iter().map(|(prompt, seed)| Rng::from_key(prompt, *seed)).collect();
        let mut noise = || {
            let rows: candle_core::Result<Vec<Tensor>> = rngs
                .iter_mut()
                .map(|rng| rng.normal_tensor((1, channels, n_frames), DType::F32, &Device::Cpu))
                .collect();
            Tensor::cat(&rows?, 0)?.to_device(&self.device)
        };
        let sampling = Sampling {
            seconds: cfg.seconds,
            n_frames,
            n_steps: cfg.n_steps,
            guidance_scale: cfg.guidance_scale,
        };
        let mut on_step = |_| if ctx.stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let Some(latents) = self.sample(&prompts, &sampling, &mut noise, &mut on_step)? else {
            return Ok(None);
        };
        let mut pieces = self.decode(&latents)?;
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

/// Generates the prompts and writes `OUT/NNN-words-of-the-prompt.wav`, 16-bit; gives the files in order.
///
/// # Errors
/// If a setting or prompt is impossible, a file is missing or broken, or nothing can be written.
pub fn run(cfg: &Config, ctx: &RunContext) -> Result<Vec<PathBuf>> {
    for (key, value) in [
        ("batch", cfg.batch),
        ("variants", cfg.variants),
        ("sampler.n_steps", cfg.n_steps),
        ("n_frames", cfg.n_frames.unwrap_or(1)),
    ] {
        if value == 0 {
            return Err(Error::config(key, "at least 1", value));
        }
    }
    if !(cfg.guidance_scale.is_finite() && cfg.guidance_scale >= 1.0) {
        return Err(Error::config("sampler.guidance_scale", "a number of at least 1", cfg.guidance_scale));
    }
    prompts_given(&cfg.prompts)?;
    let pipeline = Pipeline::load(&cfg.model, &ctx.device)?;
    let vae = pipeline.vae.config();
    let longest =
        (cfg.n_frames.unwrap_or(pipeline.n_frames) * vae.hop()) as f64 / f64::from(vae.sample_rate_hz);
    if !(cfg.seconds > 0.0 && cfg.seconds <= longest) {
        let expected = format!("above 0 and at most {longest:.3}, the length of the latents");
        return Err(Error::config("seconds", expected, cfg.seconds));
    }
    std::fs::create_dir_all(&ctx.out_dir).map_err(Error::io("create", &ctx.out_dir))?;
    let variants = 0..cfg.variants as u64;
    let jobs: Vec<(&str, u64)> = cfg
        .prompts
        .iter()
        .flat_map(|prompt| variants.clone().map(move |v| (prompt.as_str(), cfg.seed.wrapping_add(v))))
        .collect();
    let mut meter = Meter::new(ctx.progress, jobs.len(), 0, 1.0, "songs");
    let mut files = Vec::with_capacity(jobs.len());
    for part in jobs.chunks(cfg.batch) {
        let Some(pieces) = pipeline.pieces(part, cfg, ctx)? else {
            break; // stopped: what is written so far is whole
        };
        for (audio, (prompt, _)) in pieces.into_iter().zip(part) {
            let path = ctx.out_dir.join(format!("{:03}-{}.wav", files.len(), slug(prompt)));
            dragon_audio::write_wav(&path, &audio, SampleFormat::Int16)
                .map_err(Error::input("cannot write audio"))?;
            files.push(path);
        }
        meter.update(files.len(), &[], &[], false);
    }
    meter.finish();
    Ok(files)
}

/// What the configs of a folder say.
struct Described {
    published: Published,
    vae: dragon_vae::Config,
    layout: Layout,
}

impl Described {
    fn read(dir: &Path) -> Result<Self> {
        let index = dir.join("model_index.json");
        if !index.is_file() {
            let path = dir.join("model_config.json");
            let json: Value = read_json(&path)?;
            let (vae, layout) = dragon_vae::published::read_config(&json).map_err(refuse(path.clone()))?;
            let published = published::from_stable_audio_tools(&json, vae.hop()).map_err(refuse(path))?;
            return Ok(Self { published, vae, layout });
        }
        let class = &read_json::<Value>(&index)?["_class_name"];
        if class != "StableAudioPipeline" {
            let problem = format!("`_class_name`: expected \"StableAudioPipeline\", found {class}");
            return Err(refuse(index)(problem));
        }
        let path = |folder: &str| dir.join(folder).join("config.json");
        let config = |folder: &str| read_json::<Value>(&path(folder));
        let published = published::from_diffusers(&config("transformer")?, &config("projection_model")?)
            .map_err(refuse(path("transformer")))?;
        let (vae, layout) =
            dragon_vae::published::read_config(&config("vae")?).map_err(refuse(path("vae")))?;
        Ok(Self { published, vae, layout })
    }
}

type Parts = (StableAudio, AudioVae, TextStates);

fn diffusers(dir: &Path, described: &Described, device: &Device) -> Result<Parts> {
    let Described { published, vae, layout } = described;
    // Each folder's files hold the names below the folder's.
    let open = |folder: &str| Checkpoint::open(dir.join(folder)).map_err(weights);
    let below =
        |prefix: &'static str| move |name: &str| vec![name.strip_prefix(prefix).unwrap_or(name).to_string()];
    let dit = Loader::new(open("transformer")?, below("transformer."));
    let numbers = Loader::new(open("projection_model")?, below("projection_model."));
    let model = StableAudio::from_parts(
        &published.config,
        dit.builder(DType::F32, device).pp("transformer"),
        numbers.builder(DType::F32, device).pp("projection_model"),
    )
    .map_err(not_described(dir))?;
    dit.finish(|_| false).map_err(weights)?;
    numbers.finish(|_| false).map_err(weights)?;

    let layout = *layout;
    let loader = Loader::new(open("vae")?, move |name| vec![layout.name(name)]);
    let vae = AudioVae::new(vae, loader.builder(DType::F32, device)).map_err(not_described(dir))?;
    loader.finish(|_| false).map_err(weights)?;
    let tokenizer = dir.join("tokenizer/tokenizer.json");
    let text = TextStates::load_parts(&dir.join("text_encoder"), &tokenizer, published.max_tokens, device)?;
    Ok((model, vae, text))
}

fn stable_audio_tools(dir: &Path, described: &Described, device: &Device) -> Result<Parts> {
    let Described { published, vae, layout } = described;
    let t5 = dir.join("t5-base");
    if !t5.is_dir() {
        return Err(Error::Data {
            problem: format!("there is no text encoder `{}`", t5.display()),
            hint: "stable-audio-tools leaves T5 out of its files: put config.json, model.safetensors and tokenizer.json \
                   of t5-base there, or take the folder as diffusers has it"
                .into(),
        });
    }
    // One file holds network, conditioners and autoencoder.
    let layout = *layout;
    let checkpoint = Checkpoint::open(dir).map_err(weights)?;
    let loader = Loader::new(checkpoint, move |name| match name.strip_prefix("vae.") {
        Some(name) => vec![format!("pretransform.model.{}", layout.name(name)).into()],
        None => vec![published::stable_audio_tools(name)],
    });
    let vb = loader.builder(DType::F32, device);
    let model = StableAudio::new(&published.config, vb.clone()).map_err(not_described(dir))?;
    let vae = AudioVae::new(vae, vb.pp("vae")).map_err(not_described(dir))?;
    loader.finish(published::is_unneeded).map_err(weights)?;
    let text = TextStates::load_parts(&t5, &t5.join("tokenizer.json"), published.max_tokens, device)?;
    Ok((model, vae, text))
}

fn refuse(path: PathBuf) -> impl FnOnce(String) -> Error {
    move |problem| Error::Content {
        path,
        problem: format!("does not describe Stable Audio Open: {problem}"),
        hint: "Stable Audio Open 1.0, and models of the same layers, can be read".into(),
    }
}

fn not_described(dir: &Path) -> impl Fn(candle_core::Error) -> Error {
    let dir = dir.to_owned();
    move |err| Error::input(format!("`{}` does not hold Stable Audio Open", dir.display()))(err)
}

fn weights(err: dragon_nn::LoadError) -> Error {
    Error::input("cannot load the weights")(err)
}
