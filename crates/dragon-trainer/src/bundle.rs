//! A model folder: everything from prompts to audio.
//!
//! ```text
//! bundle.json           {"n_frames": 80, "max_tokens": 32}
//! vae/  t5/  dit/       config.json + model.safetensors each; t5/ also tokenizer.json
//! clap/                 the same, optional
//! prompts.jsonl         {"id", "caption", "split"} a line
//! stats/*.npz           reference statistics
//! ```
//!
//! A folder of Stable Audio Open as published is read too: [`mod@crate::stable_audio`].

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use dragon_audio::Audio;
use dragon_diffusion::{DiffusionModel, TextCond};
use dragon_encoders::t5::T5Encoder;
use dragon_encoders::tokenizer::{self, Tokenizer, TooLong};
use dragon_nn::Params;
use dragon_vae::{AudioVae, Design};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::diffusion::{Diffusion, tuned_dir};
use crate::error::{Error, Result};
use crate::{inputs, stable_audio};

/// What `bundle.json` holds: sizes that belong to no single model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Info {
    /// Latent frames of a generation; times the VAE's hop, its samples.
    pub n_frames: usize,
    /// Tokens to which prompts are padded or cut.
    pub max_tokens: usize,
}

/// How long the songs of a published model are; our own models have one length, and take neither.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Length {
    /// What the model is told, and where its songs are cut, in seconds; none: as long as the latents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Latent frames to sample; none: as many as the model was trained on, whatever the length. Fewer take less time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_frames: Option<usize>,
}

impl Length {
    /// Whether nothing is asked for.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The models from prompts to audio, on one device.
pub struct Bundle {
    /// The folder.
    pub dir: PathBuf,
    /// Sizes.
    pub info: Info,
    /// Prompts to text states.
    pub text: TextStates,
    /// Latents to audio and back; carries no gradient.
    pub vae: AudioVae,
    /// The base diffusion model.
    pub diffusion: Diffusion,
    /// Length of a song, in samples: its latents may be longer.
    pub n_samples: usize,
    /// Where everything runs.
    pub device: Device,
}

impl Bundle {
    /// Reads a model folder, ours or a published one.
    ///
    /// # Errors
    /// If a file is missing or broken, or the parts do not fit each other.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        Self::load_for(dir, &Length::default(), device)
    }

    /// As [`Self::load`], for songs of another length than the model was trained on.
    ///
    /// # Errors
    /// As there, and if the model has one length only, or not that many latent frames.
    pub fn load_for(dir: &Path, length: &Length, device: &Device) -> Result<Self> {
        if !dir.is_dir() {
            return Err(no_bundle(dir));
        }
        if stable_audio::is_published(dir) {
            return stable_audio::load(dir, length, device);
        }
        if !length.is_default() {
            return Err(Error::Data {
                problem: format!("`{}` makes songs of one length", dir.display()),
                hint: "leave `seconds` and `n_frames` out: they are for Stable Audio Open".into(),
            });
        }
        let info: Info = read_json(&dir.join("bundle.json"))?;
        let vae_config: dragon_vae::Config = read_json(&dir.join("vae/config.json"))?;
        let trained = Params::new(0);
        AudioVae::new(&vae_config, trained.builder(DType::F32, device))
            .map_err(Error::input(format!("`{}` does not describe a VAE", dir.join("vae").display())))?;
        load_weights(&trained, &dir.join("vae/model.safetensors"))?;
        let vae = AudioVae::new(&vae_config, frozen(&trained, device))?;
        let text = TextStates::load(&dir.join("t5"), info.max_tokens, device)?;
        let diffusion = Diffusion::load(&dir.join("dit"), device)?;
        let n_samples = info.n_frames * vae.config().hop();
        let bundle =
            Self { dir: dir.to_owned(), info, text, vae, diffusion, n_samples, device: device.clone() };
        bundle.check()?;
        Ok(bundle)
    }

    /// The tuned model of `path` ([`Diffusion::tuned`]).
    ///
    /// # Errors
    /// As there, and if `path` is a run that began from another model folder.
    pub fn tuned(&self, path: &Path) -> Result<Box<dyn DiffusionModel>> {
        let dir = tuned_dir(path)?;
        if let Some(run) = dir.parent().filter(|run| run.join("run.toml").exists()) {
            inputs::check_bundle(run, &self.dir)?;
        }
        self.diffusion.tuned(&dir)
    }

    /// Whether the parts fit each other.
    pub(crate) fn check(&self) -> Result<()> {
        let model = &self.diffusion.architecture;
        let pairs = [
            (
                "channels of the VAE's latents",
                self.vae.config().latent_dim,
                "of the diffusion model's",
                model.latent_channels(),
            ),
            (
                "width of the text encoder's states",
                self.text.width(),
                "of those that the diffusion model reads",
                model.text_width(),
            ),
        ];
        for (a, x, b, y) in pairs {
            if x != y {
                return Err(Error::Content {
                    path: self.dir.clone(),
                    problem: format!("holds parts that do not fit: {a} {x}, {b} {y}"),
                    hint: "take autoencoder, text encoder and diffusion model from one training".into(),
                });
            }
        }
        if self.info.n_frames == 0 || self.info.max_tokens == 0 {
            return Err(Error::Content {
                path: self.dir.join("bundle.json"),
                problem: format!(
                    "has n_frames {} and max_tokens {}",
                    self.info.n_frames, self.info.max_tokens
                ),
                hint: "both are at least 1".into(),
            });
        }
        if self.vae.config().latent_mean.is_empty() {
            return Err(Error::Content {
                path: self.dir.join("vae/config.json"),
                problem: "has no latent statistics".into(),
                hint: "`dragon pretrain vae` measures them at its end".into(),
            });
        }
        Ok(())
    }

    /// Shape of the latents of `n` songs, `[n, C, T]`.
    pub fn latent_shape(&self, n: usize) -> (usize, usize, usize) {
        (n, self.diffusion.architecture.latent_channels(), self.info.n_frames)
    }

    /// Sample rate of the audio, Hz.
    pub fn sample_rate_hz(&self) -> u32 {
        self.vae.config().sample_rate_hz
    }

    /// Decodes normalised latents `[B, C, T]`, a few songs at a time: `[b, channels, n_samples]` each.
    fn decoded(&self, latents: &Tensor) -> Result<Vec<Tensor>> {
        // Enough to fill the cores, few enough to bound memory; pieces are of about 1.5 s of stereo audio at 44.1 kHz.
        let (songs, frames) = match self.vae.config().design {
            Design::Dac => (8, usize::MAX),
            Design::Oobleck => (1, 32),
        };
        let n = latents.dim(0)?;
        let part = |start: usize| -> Result<Tensor> {
            let part = self.vae.denormalize(&latents.narrow(0, start, songs.min(n - start))?)?;
            let audio = self.vae.decode_chunked(&part, frames)?; // [b, channels, T * hop]
            Ok(audio.narrow(2, 0, self.n_samples.min(audio.dim(2)?))?)
        };
        (0..n).step_by(songs).map(part).collect()
    }

    /// Decodes normalised latents to mono, which is what rewards hear.
    ///
    /// # Shapes
    /// - `latents`: `[B, C, T]`; returns `B` clips of [`Self::n_samples`] samples, nominally in [-1, 1].
    ///
    /// # Errors
    /// If the shape does not fit the VAE.
    pub fn decode(&self, latents: &Tensor) -> Result<Vec<Vec<f32>>> {
        let mut clips = Vec::with_capacity(latents.dim(0)?);
        for audio in self.decoded(latents)? {
            clips.extend(audio.mean(1)?.to_vec2::<f32>()?);
        }
        Ok(clips)
    }

    /// As [`Self::decode`], with all channels.
    ///
    /// # Errors
    /// As there.
    pub fn decode_audio(&self, latents: &Tensor) -> Result<Vec<Audio>> {
        let mut songs = Vec::with_capacity(latents.dim(0)?);
        for audio in self.decoded(latents)? {
            let channels = audio.to_vec3::<f32>()?.into_iter();
            songs.extend(channels.map(|channels| Audio { channels, sample_rate_hz: self.sample_rate_hz() }));
        }
        Ok(songs)
    }

    /// Encodes clips to normalised latents `[B, C, T]`: what the VAE embedding setting of the paper sees.
    ///
    /// # Errors
    /// If the clips differ in length or are no multiple of the hop.
    pub fn encode(&self, clips: &[&[f32]]) -> Result<Tensor> {
        /// Songs at a time: enough to fill the cores, few enough to bound memory.
        const SONGS: usize = 8;
        let channels = self.vae.config().audio_channels;
        let mut parts = Vec::new();
        for part in clips.chunks(SONGS) {
            let samples = part.first().map_or(0, |clip| clip.len());
            let audio = Tensor::from_vec(part.concat(), (part.len(), 1, samples), &self.device)?;
            let audio = audio.broadcast_as((part.len(), channels, samples))?.contiguous()?;
            parts.push(self.vae.encode_normalized(&audio)?.detach());
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// A builder over the current values of `params` that carries no gradient, so that no history is kept.
pub fn frozen(params: &Params, device: &Device) -> VarBuilder<'static> {
    let tensor = |(name, var): (String, Var)| (name, var.as_tensor().detach());
    let tensors: HashMap<String, Tensor> = params.names_and_vars().into_iter().map(tensor).collect();
    VarBuilder::from_tensors(tensors, DType::F32, device)
}

fn load_weights(params: &Params, path: &Path) -> Result<()> {
    if !path.exists() {
        return Err(Error::missing(path));
    }
    params.load(path).map_err(Error::input(
        "cannot load weights\nhint: take config.json and model.safetensors from one training",
    ))
}

/// Reads a JSON file into `T`.
///
/// # Errors
/// If it cannot be read, or has an unknown, missing or wrong key.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|err| Error::Content {
        path: path.to_owned(),
        problem: format!("is not valid: {err}"),
        hint: "check the file against the one in fixtures/tiny".into(),
    })
}

/// Prompts to the states that condition the diffusion model.
pub struct TextStates {
    tokenizer: Tokenizer,
    t5: T5Encoder,
    max_tokens: usize,
    device: Device,
}

impl TextStates {
    /// Reads `config.json`, `model.safetensors` and `tokenizer.json`.
    ///
    /// # Errors
    /// If a file is missing or broken, or they do not fit each other.
    pub fn load(dir: &Path, max_tokens: usize, device: &Device) -> Result<Self> {
        Self::load_parts(dir, &dir.join("tokenizer.json"), max_tokens, device)
    }

    /// As [`Self::load`], with the tokenizer in a file of its own: T5 as diffusers' folders have it.
    ///
    /// # Errors
    /// As there.
    pub fn load_parts(dir: &Path, tokenizer: &Path, max_tokens: usize, device: &Device) -> Result<Self> {
        let tokenizer = Tokenizer::load(tokenizer).map_err(Error::input(
            "cannot load the tokenizer\nhint: take tokenizer.json from the model's own training",
        ))?;
        let t5 =
            T5Encoder::load(dir, DType::F32, device).map_err(Error::input("cannot load the text encoder"))?;
        if tokenizer.vocab_size() > t5.config().vocab_size {
            return Err(Error::Content {
                path: dir.to_owned(),
                problem: format!(
                    "has {} tokens in tokenizer.json, but vocab_size {}",
                    tokenizer.vocab_size(),
                    t5.config().vocab_size
                ),
                hint: "take both files from one training".into(),
            });
        }
        Ok(Self { tokenizer, t5, max_tokens, device: device.clone() })
    }

    /// Width of a state.
    pub fn width(&self) -> usize {
        self.t5.config().d_model
    }

    /// States and mask of prompts; prompts with too many tokens are cut, with a warning.
    ///
    /// # Shapes
    /// - returns states `[B, max_tokens, text_dim]` and mask `[B, max_tokens]`.
    ///
    /// # Errors
    /// If a prompt is empty.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<TextCond> {
        /// Prompts encoded at a time.
        const PROMPTS: usize = 64;
        let (mut states, mut masks) = (Vec::new(), Vec::new());
        for part in prompts.chunks(PROMPTS) {
            let tokens = self
                .tokenizer
                .encode_batch(part, self.max_tokens, TooLong::Truncate, &self.device)
                .map_err(Error::input("cannot read a prompt"))?;
            for &i in &tokens.truncated {
                tracing::warn!("prompt cut at {} tokens: {:?}", self.max_tokens, part[i].as_ref());
            }
            states.push(self.t5.forward(&tokens.ids, &tokens.mask)?.detach());
            masks.push(tokens.mask);
        }
        Ok(TextCond { states: Tensor::cat(&states, 0)?, mask: Tensor::cat(&masks, 0)? })
    }
}

/// Checks that a model folder's text encoder reads each prompt whole; reads its tokenizer only, no weights.
///
/// # Errors
/// For the first prompt that is empty or has more tokens than the model reads, and if a file is missing or broken.
pub fn check_prompts<S: AsRef<str>>(bundle: &Path, prompts: impl IntoIterator<Item = S>) -> Result<()> {
    if !bundle.is_dir() {
        return Err(no_bundle(bundle));
    }
    let (tokenizer, max_tokens) = match stable_audio::is_published(bundle) {
        true => stable_audio::tokenizer(bundle)?,
        false if !bundle.join("bundle.json").exists() => return Err(no_bundle(bundle)),
        false => {
            (bundle.join("t5/tokenizer.json"), read_json::<Info>(&bundle.join("bundle.json"))?.max_tokens)
        }
    };
    let tokenizer = Tokenizer::load(tokenizer).map_err(Error::input(
        "cannot load the tokenizer\nhint: take tokenizer.json from the model's own training",
    ))?;
    for (i, prompt) in prompts.into_iter().enumerate() {
        let prompt = prompt.as_ref();
        if prompt.trim().is_empty() {
            return Err(Error::Data {
                problem: format!("prompt {} is empty", i + 1),
                hint: "say what should be heard, e.g. \"a slow harp melody\"".into(),
            });
        }
        match tokenizer.encode(prompt, max_tokens, TooLong::Error) {
            Ok(_) => {}
            Err(tokenizer::Error::TooLong { n_tokens, max_tokens, .. }) => {
                return Err(Error::Data {
                    problem: format!(
                        "prompt {} is too long: expected at most {max_tokens} tokens, found {n_tokens}\n  {prompt:?}",
                        i + 1
                    ),
                    hint: "shorten it: a token is about a word, and the model would not see the end".into(),
                });
            }
            Err(err) => return Err(Error::input(format!("prompt {}", i + 1))(err)),
        }
    }
    Ok(())
}

fn no_bundle(dir: &Path) -> Error {
    Error::Data {
        problem: match dir.is_dir() {
            true => format!("`{}` is no model folder: it has no bundle.json", dir.display()),
            false => format!("there is no model folder `{}`", dir.display()),
        },
        hint: "a model folder holds vae/, t5/, dit/ and bundle.json (the shipped one is fixtures/tiny), or Stable Audio Open \
               as published"
            .into(),
    }
}

/// Which part of the prompts a line belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Fine-tuned on.
    Train,
    /// For looking at during training.
    Valid,
    /// Held out for evaluation.
    Test,
}

/// A line of a prompt file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Unique name.
    pub id: String,
    /// The text.
    pub caption: String,
    /// Which part it belongs to.
    pub split: Split,
}

/// Reads a prompt file: JSON lines with `id`, `caption` and `split`. Other keys are allowed, so a manifest serves too.
///
/// # Errors
/// If it cannot be read, a line is not valid, a caption is empty, or an id comes twice; the line is named.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let wrong = |line: usize, problem: String| Error::Content {
        path: path.to_owned(),
        problem: format!("line {}: {problem}", line + 1),
        hint: r#"a line is {"id": "p1", "caption": "a slow waltz on a harp", "split": "train"}"#.into(),
    };
    let mut prompts = Vec::new();
    let mut seen = HashSet::new();
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let prompt: Prompt = serde_json::from_str(line).map_err(|err| wrong(i, err.to_string()))?;
        if prompt.caption.trim().is_empty() {
            return Err(wrong(i, format!("the caption of `{}` is empty", prompt.id)));
        }
        if !seen.insert(prompt.id.clone()) {
            return Err(wrong(i, format!("the id `{}` comes twice", prompt.id)));
        }
        prompts.push(prompt);
    }
    Ok(prompts)
}

/// The prompts of one split, in the order of the file.
///
/// # Errors
/// If there are fewer than `at_least`.
pub fn prompts_of(path: &Path, split: Split, at_least: usize) -> Result<Vec<Prompt>> {
    let prompts: Vec<Prompt> = read_prompts(path)?.into_iter().filter(|p| p.split == split).collect();
    if prompts.len() < at_least {
        let name = format!("{split:?}").to_lowercase();
        return Err(Error::Data {
            problem: format!(
                "`{}` has {} prompts of split `{name}`, {at_least} are needed",
                path.display(),
                prompts.len()
            ),
            hint: "add prompts, or ask for fewer".into(),
        });
    }
    Ok(prompts)
}

/// `n` prompts of one split, spread evenly over it: neighbours in a file are often alike.
///
/// # Errors
/// If there are fewer than `n`.
pub fn some_prompts_of(path: &Path, split: Split, n: usize) -> Result<Vec<Prompt>> {
    let all = prompts_of(path, split, n)?;
    Ok((0..n).map(|i| all[i * all.len() / n].clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_prompts_are_spread_over_their_split() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts.jsonl");
        let line = |i: usize, split: &str| {
            format!("{{\"id\":\"{split}{i}\",\"caption\":\"x\",\"split\":\"{split}\"}}\n")
        };
        let text: String = (0..10).map(|i| line(i, "test") + &line(i, "train")).collect();
        std::fs::write(&path, text).unwrap();
        let ids = |n: usize| -> Vec<String> {
            some_prompts_of(&path, Split::Test, n).unwrap().into_iter().map(|p| p.id).collect()
        };
        assert_eq!(ids(4), ["test0", "test2", "test5", "test7"]);
        assert_eq!(ids(10).len(), 10);
        assert!(ids(0).is_empty());
        let text = some_prompts_of(&path, Split::Test, 11).unwrap_err().to_string();
        assert!(text.contains("has 10 prompts of split `test`, 11 are needed"), "{text}");
    }

    #[test]
    fn a_bad_prompt_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts.jsonl");
        let good = r#"{"id":"a","caption":"x","split":"train","more":1}"#;
        for (line, part) in [
            (r#"{"id":"b","caption":" ","split":"train"}"#, "line 2: the caption of `b` is empty"),
            (r#"{"id":"a","caption":"y","split":"test"}"#, "line 2: the id `a` comes twice"),
            (r#"{"id":"b","split":"test"}"#, "line 2: missing field `caption`"),
            (r#"{"id":"b","caption":"y","split":"tets"}"#, "line 2: unknown variant `tets`"),
        ] {
            std::fs::write(&path, format!("{good}\n{line}\n")).unwrap();
            let text = read_prompts(&path).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
        std::fs::write(&path, format!("{good}\n\n")).unwrap();
        assert_eq!(read_prompts(&path).unwrap().len(), 1);
        let text = prompts_of(&path, Split::Test, 4).unwrap_err().to_string();
        assert!(text.contains("has 0 prompts of split `test`, 4 are needed"), "{text}");
    }

    #[test]
    fn a_missing_folder_is_named_with_a_hint() {
        let err = Bundle::load(Path::new("/nowhere"), &Device::Cpu).err().unwrap();
        assert_eq!(err.exit_code(), 1);
        assert!(err.to_string().contains("/nowhere") && err.to_string().contains("hint"), "{err}");
    }
}
