//! Stable Audio Open from its published files, as a model folder.
//!
//! ```text
//! diffusers                     model_index.json; transformer/  projection_model/  vae/  text_encoder/  tokenizer/
//! stable-audio-tools            model_config.json, model.safetensors (or .ckpt), and t5-base/ with Hugging Face's files,
//!                               which that format leaves out
//! ```
//!
//! A folder with both is read as diffusers'. The published sampler has exponential noise levels
//! ([`dragon_diffusion::DiffusionModel::schedule`]), [`dragon_diffusion::solver::dpmpp_2m_sde`], and classifier-free guidance.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use dragon_diffusion::stable_audio::NumberConditioners;
use dragon_diffusion::stable_audio::published::{self, Published};
use dragon_nn::{Checkpoint, Loader};
use dragon_vae::AudioVae;
use dragon_vae::published::Layout;
use serde_json::Value;

use crate::bundle::{Bundle, Info, Length, TextStates, read_json};
use crate::diffusion::{Architecture, Diffusion, Weights};
use crate::error::{Error, Result};

/// Whether a folder holds a published Stable Audio model.
pub fn is_published(dir: &Path) -> bool {
    dir.join("model_index.json").is_file() || dir.join("model_config.json").is_file()
}

/// Reads a published folder.
///
/// # Errors
/// If a file is missing or broken, describes another model, or its tensors do not fit (all are listed), and if the model
/// cannot make songs of that length.
pub fn load(dir: &Path, length: &Length, device: &Device) -> Result<Bundle> {
    let described = Described::read(dir)?;
    let Published { n_frames: trained_frames, max_tokens, .. } = described.published;
    let n_frames = length.n_frames.unwrap_or(trained_frames);
    let (hop, sample_rate_hz) = (described.vae.hop(), described.vae.sample_rate_hz);
    let longest = (n_frames * hop) as f64 / f64::from(sample_rate_hz);
    let seconds = length.seconds.unwrap_or(longest);
    if n_frames == 0 {
        return Err(Error::config("n_frames", "at least 1", 0));
    }
    if !(seconds > 0.0 && seconds <= longest) {
        let expected = format!("above 0 and at most {longest:.3}, the length of the latents");
        return Err(Error::config("seconds", expected, seconds));
    }
    let parts = match described.layout {
        Layout::Diffusers => diffusers(dir, &described, device)?,
        Layout::StableAudioTools => stable_audio_tools(dir, &described, device)?,
    };
    let mut vae = parts.vae;
    let channels = vae.config().latent_dim;
    vae.set_latent_stats(vec![0.0; channels], vec![1.0; channels])?; // it was trained to unit variance
    let config = described.published.config;
    let architecture = Architecture::StableAudio { config, numbers: parts.numbers, seconds, trained_frames };
    let bundle = Bundle {
        dir: dir.to_owned(),
        info: Info { n_frames, max_tokens },
        text: parts.text,
        vae,
        diffusion: Diffusion::new(architecture, parts.weights, device),
        n_samples: (seconds * f64::from(sample_rate_hz)).round() as usize,
        device: device.clone(),
    };
    bundle.check()?;
    Ok(bundle)
}

/// The tokenizer's file in a published folder, and how many tokens the model reads.
///
/// # Errors
/// If a config is missing, broken, or describes another model.
pub fn tokenizer(dir: &Path) -> Result<(PathBuf, usize)> {
    let described = Described::read(dir)?;
    let path = match described.layout {
        Layout::Diffusers => "tokenizer/tokenizer.json",
        Layout::StableAudioTools => "t5-base/tokenizer.json",
    };
    Ok((dir.join(path), described.published.max_tokens))
}

/// The files that a published folder is read from.
///
/// # Errors
/// If a folder or the checkpoint is missing.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, folders) = match dir.join("model_index.json") {
        index if index.is_file() => {
            (vec![index], &["transformer", "projection_model", "vae", "text_encoder", "tokenizer"][..])
        }
        _ => (vec![dir.join("model_config.json"), Checkpoint::find(dir).map_err(weights)?], &["t5-base"][..]),
    };
    for folder in folders {
        let folder = dir.join(folder);
        let entries = std::fs::read_dir(&folder).map_err(Error::io("read", &folder))?;
        let mut inside: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        inside.retain(|path| path.is_file());
        inside.sort();
        files.append(&mut inside);
    }
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

/// What a folder holds.
struct Parts {
    /// The network's, in diffusers' names.
    weights: Weights,
    numbers: NumberConditioners,
    vae: AudioVae,
    text: TextStates,
}

/// Asks for every tensor of the network, so that the loader reads it.
fn network(
    config: &dragon_diffusion::stable_audio::Config,
    vb: candle_nn::VarBuilder,
) -> candle_core::Result<()> {
    dragon_diffusion::stable_audio::StableAudioDit::new(config, vb).map(drop)
}

fn diffusers(dir: &Path, described: &Described, device: &Device) -> Result<Parts> {
    let Described { published, vae, layout } = described;
    // Each folder's files hold the names below the folder's.
    let open = |folder: &str| Checkpoint::open(dir.join(folder)).map_err(weights);
    let below =
        |prefix: &'static str| move |name: &str| vec![name.strip_prefix(prefix).unwrap_or(name).to_string()];
    let dit = Loader::new(open("transformer")?, below("transformer."));
    network(&published.config, dit.builder(DType::F32, device)).map_err(not_described(dir))?;
    let projection = Loader::new(open("projection_model")?, below("projection_model."));
    let numbers = NumberConditioners::new(&published.config, projection.builder(DType::F32, device))
        .map_err(not_described(dir))?;
    projection.finish(|_| false).map_err(weights)?;

    let layout = *layout;
    let loader = Loader::new(open("vae")?, move |name| vec![layout.name(name)]);
    let vae = AudioVae::new(vae, loader.builder(DType::F32, device)).map_err(not_described(dir))?;
    loader.finish(|_| false).map_err(weights)?;
    let tokenizer = dir.join("tokenizer/tokenizer.json");
    let text = TextStates::load_parts(&dir.join("text_encoder"), &tokenizer, published.max_tokens, device)?;
    Ok(Parts { weights: dit.finish(|_| false).map_err(weights)?, numbers, vae, text })
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
    network(&published.config, vb.pp("transformer")).map_err(not_described(dir))?;
    let numbers =
        NumberConditioners::new(&published.config, vb.pp("projection_model")).map_err(not_described(dir))?;
    let vae = AudioVae::new(vae, vb.pp("vae")).map_err(not_described(dir))?;
    let all = loader.finish(published::is_unneeded).map_err(weights)?;
    let network =
        all.into_iter().filter_map(|(name, t)| Some((name.strip_prefix("transformer.")?.to_owned(), t)));
    let text = TextStates::load_parts(&t5, &t5.join("tokenizer.json"), published.max_tokens, device)?;
    Ok(Parts { weights: network.collect(), numbers, vae, text })
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
