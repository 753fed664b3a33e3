//! From generations to what a reward sees: named encoders and settings, resolved and loaded once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use dragon_encoders::clap::{self, ClapEncoder};
use dragon_encoders::codec::{self, Codec};
use dragon_encoders::musicnn::Musicnn;
use dragon_encoders::settings::latent_rows;
use dragon_encoders::vggish::Vggish;
use dragon_encoders::{AudioEncoder, Embeddings, TextEncoder};
pub use dragon_encoders::{Setting, Tail};
use dragon_metrics::{FrechetReference, GaussianStats, Rows};
use dragon_nn::Rng;
use dragon_rewards::{Exemplars, References, RewardConfig, RewardSet, Song, Source, View};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::embed;
use crate::error::{Error, Result};
use crate::run::RunContext;
use crate::sets::{Unit, check_several};

/// A CLAP that cannot be read; says what would do, unless the reason has a hint of its own.
pub(crate) fn no_clap(err: clap::Error) -> Error {
    let hint = match err.to_string().contains("hint:") {
        true => "",
        false => {
            "\nhint: name a folder with config.json, model.safetensors and tokenizer.json (ours or Hugging Face's), \
             or LAION's .pt file"
        }
    };
    Error::input(format!("cannot load CLAP{hint}"))(err)
}

/// An encoder that rewards and metrics may name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum EncoderConfig {
    /// musicnn, a music tagger; 200 dimensions, windows of 3 s at 16 kHz.
    Musicnn {
        /// Its weights, a safetensors file.
        weights: PathBuf,
    },
    /// A CLAP, the only encoder with a text branch.
    Clap {
        /// Folder with `config.json`, `model.safetensors` and `tokenizer.json`, ours or Hugging Face's; or LAION's `.pt`
        /// file, with roberta-base's `tokenizer.json` beside it.
        dir: PathBuf,
    },
    /// A neural codec: EnCodec, DAC or Stable Audio's autoencoder, whose latents before quantisation are the embeddings, a row a
    /// frame. Goes with a setting of kind `frames`.
    Codec {
        /// As published: encodec's or descript's file, or a folder of Hugging Face, diffusers or stable-audio-tools.
        path: PathBuf,
    },
    /// VGGish; 128 dimensions, windows of 0.975 s at 16 kHz; with a setting of kind `frames` as the program fadtk cuts songs.
    Vggish {
        /// Its weights, torchvggish's file.
        weights: PathBuf,
    },
    /// The model folder's own VAE: each latent frame is an embedding. Goes with a setting of kind `vae`.
    Vae,
}

impl EncoderConfig {
    /// The encoder that a published file or folder holds, told from what is in it. What is not known is taken for a CLAP, whose
    /// loading says what is wrong.
    pub fn of_path(path: &Path) -> Self {
        let path = path.to_path_buf();
        match codec::Kind::of(&path) {
            Some(codec::Kind::Vggish) => Self::Vggish { weights: path },
            Some(_) => Self::Codec { path },
            None => Self::Clap { dir: path },
        }
    }

    /// The name of its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Musicnn { .. } => "musicnn",
            Self::Clap { .. } => "clap",
            Self::Codec { .. } => "codec",
            Self::Vggish { .. } => "vggish",
            Self::Vae => "vae",
        }
    }

    /// Whether it goes with a setting.
    ///
    /// # Errors
    /// The settings that it goes with.
    pub fn check_setting(&self, setting: &Setting) -> std::result::Result<(), &'static str> {
        let (fits, expected) = match (self, setting) {
            (Self::Vae, setting) => {
                (matches!(setting, Setting::Vae { .. }), "a setting of kind `vae` for the encoder `vae`")
            }
            (Self::Codec { .. }, setting) => {
                (*setting == Setting::Frames, "a setting of kind `frames` for an encoder of kind `codec`")
            }
            (Self::Vggish { .. }, setting) => {
                (!matches!(setting, Setting::Vae { .. }), "a setting of kind `frames`, `ma` or `fadtk`")
            }
            (_, setting) => (
                !matches!(setting, Setting::Vae { .. } | Setting::Frames),
                "a setting of kind `ma` or `fadtk` (`vae` is for the encoder `vae`, `frames` for kinds `codec` and `vggish`)",
            ),
        };
        if fits { Ok(()) } else { Err(expected) }
    }
}

/// The encoders and settings that rewards and metrics name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbedConfig {
    /// Encoders by name.
    pub encoders: BTreeMap<String, EncoderConfig>,
    /// How a song becomes embeddings, by name (paper B.2, C.2).
    pub settings: BTreeMap<String, Setting>,
}

impl EmbedConfig {
    /// Checks that what the rewards name exists and goes together.
    ///
    /// # Errors
    /// If a name is unknown, an encoder and a setting do not fit, or a text branch is missing where one is needed.
    pub fn check<'a>(&self, rewards: impl IntoIterator<Item = &'a RewardConfig>) -> Result<()> {
        for reward in rewards {
            reward.validate().map_err(Error::input("the reward makes no sense"))?;
            for source in reward.sources() {
                let encoder = self.encoders.get(&source.encoder).ok_or_else(|| {
                    Error::config("encoder", format!("one of {}", names(&self.encoders)), &source.encoder)
                })?;
                let setting = self.settings.get(&source.setting).ok_or_else(|| {
                    Error::config("setting", format!("one of {}", names(&self.settings)), &source.setting)
                })?;
                encoder.check_setting(setting).map_err(|expected| {
                    let found = format!("`{}` with encoder `{}`", source.setting, source.encoder);
                    Error::config("setting", expected, found)
                })?;
                if reward.needs_text(&source) && !matches!(encoder, EncoderConfig::Clap { .. }) {
                    return Err(Error::config(
                        "encoder",
                        "an encoder of kind `clap`, which reads text",
                        &source.encoder,
                    ));
                }
            }
            for (_, exemplars) in reward.references() {
                let (Exemplars::Audio { path }
                | Exemplars::Texts { path }
                | Exemplars::Statistics { path, .. }) = &exemplars;
                if !path.exists() {
                    return Err(Error::missing(path));
                }
                match exemplars {
                    // looks at each file
                    Exemplars::Audio { .. } => {
                        check_several(path, embed::audio_files(path)?.len(), Unit::Song)?
                    }
                    Exemplars::Texts { .. } => {
                        check_several(path, embed::read_texts(path)?.len(), Unit::Text)?
                    }
                    Exemplars::Statistics { .. } if path.is_dir() => {
                        return Err(Error::Data {
                            problem: format!("`{}` is a folder, not a file of statistics", path.display()),
                            hint: "a folder of audio needs --set reward.exemplars.kind=audio".into(),
                        });
                    }
                    Exemplars::Statistics { .. } => {}
                }
            }
        }
        Ok(())
    }
}

/// Fewer songs than these give a covariance that is mostly chance: musicnn's has 200 dimensions, a song nine or so windows.
const FEW_EXEMPLARS: usize = 100;

fn names<T>(map: &BTreeMap<String, T>) -> String {
    if map.is_empty() {
        return "none: the table is empty".to_owned();
    }
    map.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
}

/// A loaded encoder.
pub enum Encoder {
    /// Reads audio.
    Audio(Box<dyn AudioEncoder>),
    /// Reads audio and text.
    Clap(Box<ClapEncoder>),
    /// The latents of the model folder's VAE.
    Vae,
}

impl Encoder {
    /// Loads it.
    ///
    /// # Errors
    /// If a file is missing or broken.
    pub fn load(cfg: &EncoderConfig, device: &Device) -> Result<Self> {
        Ok(match cfg {
            EncoderConfig::Musicnn { weights } => {
                Encoder::Audio(Box::new(Musicnn::load(weights).map_err(Error::input(
                    "cannot load musicnn\nhint: the shipped weights are builtin:musicnn/mtt_musicnn.safetensors",
                ))?))
            }
            EncoderConfig::Clap { dir } => Encoder::Clap(Box::new(
                ClapEncoder::load(dir, device).map_err(no_clap)?,
            )),
            EncoderConfig::Codec { path } => Encoder::Audio(Box::new(
                Codec::load(path, device).map_err(Error::input("cannot load the codec"))?,
            )),
            EncoderConfig::Vggish { weights } => Encoder::Audio(Box::new(
                Vggish::load(weights, device).map_err(Error::input("cannot load VGGish"))?,
            )),
            EncoderConfig::Vae => Encoder::Vae,
        })
    }

    /// The part that reads audio in windows; the VAE has none.
    pub fn audio(&self) -> Option<&dyn AudioEncoder> {
        match self {
            Encoder::Audio(encoder) => Some(encoder.as_ref()),
            Encoder::Clap(encoder) => Some(encoder.as_ref()),
            Encoder::Vae => None,
        }
    }
}

/// Loaded encoders and settings, by name.
pub struct Embedder {
    /// Encoders.
    pub encoders: BTreeMap<String, Encoder>,
    /// Settings.
    pub settings: BTreeMap<String, Setting>,
    /// The references made so far: a run and its monitors often share their exemplars, and embedding takes minutes.
    made: Mutex<References>,
}

impl Embedder {
    /// Loads the encoders that `sources` name; call [`EmbedConfig::check`] before.
    ///
    /// # Errors
    /// If a file is missing or broken.
    pub fn load(cfg: &EmbedConfig, sources: &[Source], device: &Device) -> Result<Self> {
        let mut encoders = BTreeMap::new();
        for source in sources {
            let Some(encoder) = cfg.encoders.get(&source.encoder) else {
                return Err(Error::config(
                    "encoder",
                    format!("one of {}", names(&cfg.encoders)),
                    &source.encoder,
                ));
            };
            if encoders.contains_key(&source.encoder) {
                continue;
            }
            let loaded = Encoder::load(encoder, device)?;
            encoders.insert(source.encoder.clone(), loaded);
        }
        Ok(Self { encoders, settings: cfg.settings.clone(), made: Mutex::default() })
    }

    fn resolve(&self, source: &Source) -> Result<(&Encoder, &Setting)> {
        let encoder = self.encoders.get(&source.encoder);
        let setting = self.settings.get(&source.setting);
        encoder
            .zip(setting)
            .ok_or_else(|| Error::Bug(format!("{}/{} was not loaded", source.encoder, source.setting)))
    }

    /// What the rewards see of a batch of songs: one view a source, with the prompt's text embedding for encoders that
    /// read text.
    ///
    /// # Errors
    /// If a clip is too short or not finite for an encoder, or a source needs the model folder or captions and has none.
    pub fn songs(&self, sources: &[Source], batch: &Batch) -> Result<Vec<Song>> {
        let mut songs: Vec<Song> = batch.clips.iter().map(|_| Song { views: Vec::new() }).collect();
        for source in sources {
            let (encoder, setting) = self.resolve(source)?;
            let rows = match (encoder, setting, batch.latents) {
                (Encoder::Vae, Setting::Vae { latent_direct: true }, Some(latents)) => {
                    latent_rows(latents).map_err(Error::input("cannot embed latents"))?
                }
                (Encoder::Vae, ..) => reencode(needed(batch.bundle)?, batch)?,
                (encoder, setting, _) => {
                    let encoder =
                        encoder.audio().ok_or_else(|| Error::Bug("encoder without audio".into()))?;
                    embed_clips(encoder, setting, batch)?
                }
            };
            let texts = match (encoder, batch.captions) {
                (Encoder::Clap(clap), Some(captions)) => Some(text_rows(clap, captions)?),
                _ => None,
            };
            for (i, (song, rows)) in songs.iter_mut().zip(rows).enumerate() {
                let embeddings =
                    embed::rows(&rows).map_err(Error::input(format!("embedding of {}", batch.name(i))))?;
                let text = texts.as_ref().map(|t| t.row(i).iter().map(|&x| f64::from(x)).collect());
                song.views.push(View { embeddings, text });
            }
        }
        Ok(songs)
    }

    /// The reference statistics of exemplars that are no statistics file: embeds the audio or the texts, once.
    ///
    /// # Errors
    /// If a file cannot be read or embedded, or there are too few.
    pub fn reference(
        &self,
        source: &Source,
        exemplars: &Exemplars,
        bundle: Option<&Bundle>,
        ctx: &RunContext,
    ) -> Result<Arc<FrechetReference>> {
        let mut made = self.made.lock().map_err(|_| Error::Bug("references were left half made".into()))?;
        let found = made.iter().find(|((s, e), _)| s == source && e == exemplars);
        if let Some((_, reference)) = found {
            return Ok(Arc::clone(reference));
        }
        let reference = Arc::new(self.make_reference(source, exemplars, bundle, ctx)?);
        made.push(((source.clone(), exemplars.clone()), Arc::clone(&reference)));
        Ok(reference)
    }

    fn make_reference(
        &self,
        source: &Source,
        exemplars: &Exemplars,
        bundle: Option<&Bundle>,
        ctx: &RunContext,
    ) -> Result<FrechetReference> {
        let (encoder, setting) = self.resolve(source)?;
        let rows: Vec<Rows> = match exemplars {
            Exemplars::Audio { path } => {
                let files = embed::audio_files(path)?;
                check_several(path, files.len(), Unit::Song)?;
                if files.len() < FEW_EXEMPLARS {
                    tracing::warn!(
                        "`{}` holds {} songs: a hundred or more say better what they have in common",
                        path.display(),
                        files.len()
                    );
                }
                let songs = match encoder.audio() {
                    Some(encoder) => {
                        embed::embed_files(|file| embed::embed_file(encoder, setting, file), &files, ctx)?
                    }
                    None => {
                        let bundle = needed(bundle)?;
                        embed::embed_files(|file| latents_of(file, bundle), &files, ctx)?
                    }
                };
                songs.into_iter().map(|song| song.rows).collect()
            }
            Exemplars::Texts { path } => {
                let Encoder::Clap(clap) = encoder else {
                    return Err(Error::config(
                        "encoder",
                        "an encoder of kind `clap`, which reads text",
                        &source.encoder,
                    ));
                };
                vec![texts_of(&embed::read_texts(path)?, clap)?]
            }
            Exemplars::Statistics { .. } => return Err(Error::Bug("statistics need no embedding".into())),
        };
        let all: Vec<&Rows> = rows.iter().collect();
        let stats = Rows::concat(&all).and_then(|rows| GaussianStats::fit(&rows));
        stats
            .and_then(|stats| FrechetReference::new(&stats))
            .map_err(Error::input("cannot make reference statistics"))
    }

    /// Scores two songs of noise, as long as the model's, by every reward: an embedding of another size than the
    /// exemplars', or a song of too few windows, is found before the first song is made.
    ///
    /// # Errors
    /// If a reward cannot score them.
    pub fn try_out(&self, rewards: &RewardSet, bundle: &Bundle) -> Result<()> {
        let mut rng = Rng::from_key("try out", 0);
        let (_, channels, frames) = bundle.latent_shape(1);
        let latents = rng.normal_tensor((2, channels, frames), DType::F32, &bundle.device)?;
        let clips: Vec<Vec<f32>> =
            (0..2).map(|_| (0..bundle.n_samples).map(|_| (0.2 * rng.normal()) as f32).collect()).collect();
        let batch = Batch {
            clips: &clips,
            sample_rate_hz: bundle.sample_rate_hz(),
            latents: Some(&latents),
            captions: Some(&["noise", "more noise"]),
            bundle: Some(bundle),
        };
        let songs = self.songs(rewards.sources(), &batch)?;
        let songs: Vec<&Song> = songs.iter().collect();
        for (i, reward) in rewards.iter().enumerate() {
            let label = rewards.label(i).unwrap_or_default();
            reward.set_score(&songs).map_err(|err| Error::Data {
                problem: format!("`{label}` cannot score a song of this model: {err}"),
                hint: "exemplars must come from the same encoder and setting; a distance takes several windows of a song"
                    .into(),
            })?;
        }
        Ok(())
    }

    /// Builds a reward, making the reference statistics it needs.
    ///
    /// # Errors
    /// If the config has no meaning or a reference cannot be made.
    pub fn reward(&self, cfg: &RewardConfig, bundle: Option<&Bundle>, ctx: &RunContext) -> Result<RewardSet> {
        RewardSet::build(cfg, |source, exemplars| self.reference(source, exemplars, bundle, ctx))
            .map_err(Error::input("cannot build the reward"))
    }
}

/// Songs to embed.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// Mono audio.
    pub clips: &'a [Vec<f32>],
    /// Sample rate of all clips, Hz.
    pub sample_rate_hz: u32,
    /// The latents they were decoded from, `[B, C, T]`; `None` for audio from files.
    pub latents: Option<&'a Tensor>,
    /// The prompt of each; needed by the CLAP score only.
    pub captions: Option<&'a [&'a str]>,
    /// The model folder; needed for its VAE only.
    pub bundle: Option<&'a Bundle>,
}

impl Batch<'_> {
    fn name(&self, i: usize) -> String {
        self.captions.map_or(format!("song {i}"), |captions| format!("the song for {:?}", captions[i]))
    }
}

fn needed(bundle: Option<&Bundle>) -> Result<&Bundle> {
    bundle.ok_or_else(|| Error::Data {
        problem: "the encoder `vae` needs a model folder".into(),
        hint: "name one, or use another encoder".into(),
    })
}

/// Latent rows of clips: the VAE setting's round trip.
fn reencode(bundle: &Bundle, batch: &Batch) -> Result<Vec<Embeddings>> {
    let hop = bundle.vae.config().hop();
    let whole = |clip: &[f32]| clip.len() / hop * hop;
    let rows = |latents: &Tensor| latent_rows(latents).map_err(Error::input("cannot embed latents"));
    let same = batch.clips.iter().all(|clip| clip.len() == batch.clips[0].len() && clip.len() == whole(clip));
    if same && batch.sample_rate_hz == bundle.sample_rate_hz() && !batch.clips.is_empty() {
        let views: Vec<&[f32]> = batch.clips.iter().map(Vec::as_slice).collect();
        return rows(&bundle.encode(&views)?);
    }
    let mut out = Vec::with_capacity(batch.clips.len());
    for (i, clip) in batch.clips.iter().enumerate() {
        let clip = dragon_audio::resample(clip, batch.sample_rate_hz, bundle.sample_rate_hz())
            .map_err(Error::input(format!("cannot embed {}", batch.name(i))))?;
        if whole(&clip) == 0 {
            return Err(Error::Data {
                problem: format!(
                    "{} has {} samples, less than a latent frame of {hop}",
                    batch.name(i),
                    clip.len()
                ),
                hint: "leave it out".into(),
            });
        }
        out.extend(rows(&bundle.encode(&[&clip[..whole(&clip)]])?)?);
    }
    Ok(out)
}

/// The latent frames of a file, encoded by the model folder's VAE.
///
/// # Errors
/// If the file cannot be read, or is shorter than a frame.
pub fn latents_of(file: &Path, bundle: &Bundle) -> Result<Rows> {
    let clip = embed::read_song(file, bundle.sample_rate_hz(), bundle.vae.config().hop())?;
    let (clips, sample_rate_hz) = ([clip.samples], clip.sample_rate_hz);
    let batch = Batch { clips: &clips, sample_rate_hz, latents: None, captions: None, bundle: Some(bundle) };
    let context = format!("cannot embed `{}`", file.display());
    let rows = reencode(bundle, &batch).map_err(Error::input(context.clone()))?;
    embed::rows(&rows[0]).map_err(Error::input(context))
}

/// Embeds clips in parallel, in order.
fn embed_clips(encoder: &dyn AudioEncoder, setting: &Setting, batch: &Batch) -> Result<Vec<Embeddings>> {
    let one = |(i, clip): (usize, &Vec<f32>)| -> Result<Embeddings> {
        let context = || format!("cannot embed {}", batch.name(i));
        let resampled;
        let samples = if encoder.sample_rate_hz() == batch.sample_rate_hz {
            clip
        } else {
            resampled = dragon_audio::resample(clip, batch.sample_rate_hz, encoder.sample_rate_hz())
                .map_err(Error::input(context()))?;
            &resampled
        };
        encoder.embed_clip(samples, setting).map_err(Error::input(context()))
    };
    let all: Vec<Result<Embeddings>> = batch.clips.par_iter().enumerate().map(one).collect();
    all.into_iter().collect()
}

/// The embeddings of texts, a row each.
///
/// # Errors
/// If a text is empty.
pub(crate) fn texts_of(texts: &[String], clap: &ClapEncoder) -> Result<Rows> {
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    embed::rows(&text_rows(clap, &texts)?).map_err(Error::input("cannot embed texts"))
}

fn text_rows(clap: &ClapEncoder, texts: &[&str]) -> Result<Embeddings> {
    clap.embed_texts(texts).map_err(Error::input("cannot embed a text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> EmbedConfig {
        toml::from_str(
            r#"
            [encoders.vae]
            kind = "vae"
            [encoders.ears]
            kind = "musicnn"
            weights = "musicnn.safetensors"
            [settings.ma]
            kind = "ma"
            n_windows = 8
            whole = true
            [settings.frames]
            kind = "vae"
            latent_direct = true
            [encoders.encodec]
            kind = "codec"
            path = "encodec_24khz.th"
            [settings.whole]
            kind = "frames"
            "#,
        )
        .unwrap()
    }

    fn vendi(encoder: &str, setting: &str) -> RewardConfig {
        toml::from_str(&format!(
            "kind='vendi'\nencoder='{encoder}'\nsetting='{setting}'\npooling='song_mean'"
        ))
        .unwrap()
    }

    #[test]
    fn names_that_do_not_exist_or_fit_are_reported_with_the_known_ones() {
        let cfg = config();
        cfg.check(&[vendi("ears", "ma"), vendi("vae", "frames"), vendi("encodec", "whole")]).unwrap();
        for (reward, part) in [
            (vendi("musicnn", "ma"), "one of `ears`, `encodec`, `vae`, found musicnn"),
            (vendi("ears", "fadtk"), "one of `frames`, `ma`, `whole`, found fadtk"),
            (vendi("ears", "frames"), "a setting of kind `ma` or `fadtk`"),
            (vendi("vae", "ma"), "a setting of kind `vae`"),
            (vendi("encodec", "ma"), "a setting of kind `frames`"),
            (vendi("ears", "whole"), "a setting of kind `ma` or `fadtk`"),
        ] {
            let text = cfg.check(&[reward]).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
        let clap: RewardConfig =
            toml::from_str("kind='clap_score'\nencoder='ears'\nsetting='ma'\nclip='before_mean'").unwrap();
        assert!(cfg.check(&[clap]).unwrap_err().to_string().contains("which reads text"));
    }

    #[test]
    fn exemplars_are_embedded_once_for_all_rewards_that_share_them() {
        let songs = tempfile::tempdir().unwrap();
        for seed in 0..2 {
            let mut rng = Rng::from_key("exemplar", seed);
            let clip: Vec<f32> = (0..16_000 * 4).map(|_| (0.1 * rng.normal()) as f32).collect();
            let path = songs.path().join(format!("{seed}.wav"));
            let clip = dragon_audio::Clip { samples: clip, sample_rate_hz: 16_000 };
            dragon_audio::write_wav(&path, &clip, dragon_audio::SampleFormat::Int16).unwrap();
        }
        let mut cfg = config();
        let weights =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/musicnn/mtt_musicnn.safetensors");
        cfg.encoders.insert("ears".into(), EncoderConfig::Musicnn { weights });
        let source = Source { encoder: "ears".into(), setting: "ma".into() };
        let embedder = Embedder::load(&cfg, std::slice::from_ref(&source), &Device::Cpu).unwrap();
        let exemplars = Exemplars::Audio { path: songs.path().into() };
        let ctx = RunContext::new(songs.path());
        let reference = || embedder.reference(&source, &exemplars, None, &ctx);
        let first = reference().unwrap();
        songs.close().unwrap(); // what is asked for again needs no file
        assert!(Arc::ptr_eq(&first, &reference().unwrap()));
    }
}
