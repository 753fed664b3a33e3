//! Neural codecs as encoders: their latents before quantisation, each frame an embedding.
//!
//! EnCodec and DAC as the program fadtk embeds with them (1.1.0, MIT, `model_loader.py`), and Stable Audio's autoencoder. They
//! take the setting [`Setting::Frames`] only. What each does with a song, which is mono:
//!
//! | codec | song | rows | channels |
//! | --- | --- | --- | --- |
//! | EnCodec, mono | as it is, whole | one a frame | 1 |
//! | EnCodec, 48 kHz stereo | as it is, in segments of 1 s, the last shorter; its own scaling of levels is left out | one a frame of each | the song twice |
//! | DAC | loudness -16 LUFS, then scaled down if its peak is above 1; zeros up to whole 5 s, and 2.5 s of zeros at both ends; windows of 5 s every 2.5 s | one a frame of each window, so that time is counted twice | 1 |
//! | Stable Audio's | as it is, whole frames | the mean of each frame's latents | the song twice |
//!
//! Differences from fadtk: it rounds songs to 16 bits and resamples them by another filter before, rounds embeddings to 16
//! bits after (the convention `fadtk-1.1` of the metrics does that), and reads the first three minutes of a song with EnCodec.
//! fadtk has no encoder of Stable Audio's.
//!
//! Memory is bounded whatever the length of a song: EnCodec's mono models and Stable Audio's work on pieces with what their
//! frames depend on, so that the numbers are those of the whole.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dragon_nn::{Checkpoint, Loader};
use dragon_vae::dac::Dac;
use dragon_vae::encodec::Encodec;
use dragon_vae::published::Layout;
use dragon_vae::{AudioVae, Error as VaeError};
use serde_json::Value;

use crate::encoder::{AudioEncoder, Embeddings};
use crate::error::{Error, Result};
use crate::loudness::loudness;
use crate::settings::{self, Setting, latent_rows};

/// Segments of EnCodec's 48 kHz model that are encoded at a time.
const SEGMENTS: usize = 4;
/// Latent frames of Stable Audio's autoencoder that are encoded at a time: 3 s.
const CHUNK: usize = 64;
/// Loudness to which fadtk brings songs for DAC, LUFS.
const DAC_LUFS: f64 = -16.0;
/// Windows of DAC, seconds; they overlap by half.
const DAC_WINDOW_S: f64 = 5.0;

/// A codec; inference only.
pub struct Codec {
    id: String,
    model: Model,
    device: Device,
}

enum Model {
    Encodec(Box<Encodec>),
    Dac(Box<Dac>),
    StableAudio(Box<AudioVae>),
}

/// What a path holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// EnCodec: encodec's file or Hugging Face's folder.
    Encodec,
    /// DAC: descript's file or Hugging Face's folder.
    Dac,
    /// Stable Audio: diffusers' folder, its `vae` folder, or stable-audio-tools' folder.
    StableAudio,
    /// VGGish: torchvggish's file.
    Vggish,
}

impl Kind {
    /// What a file or folder holds, told from its config or the names of its tensors; none if it is something else or cannot be
    /// read.
    pub fn of(path: &Path) -> Option<Self> {
        if path.join("model_index.json").is_file() || path.join("model_config.json").is_file() {
            return Some(Self::StableAudio);
        }
        let config = path.join("config.json");
        if config.is_file() {
            let json: Value = serde_json::from_str(&std::fs::read_to_string(config).ok()?).ok()?;
            let text = |key: &str| json.get(key).and_then(Value::as_str);
            return match (text("model_type"), text("_class_name")) {
                (Some("encodec"), _) => Some(Self::Encodec),
                (Some("dac"), _) => Some(Self::Dac),
                (_, Some("AutoencoderOobleck")) => Some(Self::StableAudio),
                _ => None,
            };
        }
        let checkpoint = Checkpoint::open(path).ok()?;
        let has = |name: &str| checkpoint.shape(name).is_some();
        [
            ("encoder.model.0.conv.conv.bias", Self::Encodec),
            ("encoder.block.0.bias", Self::Dac),
            ("embeddings.0.weight", Self::Vggish),
        ]
        .into_iter()
        .find_map(|(name, kind)| has(name).then_some(kind))
    }
}

impl Codec {
    /// Reads published weights; [`Kind::of`] tells which.
    ///
    /// # Errors
    /// If the path holds no codec, or a file is missing or damaged or does not fit (all tensors that do not are listed).
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let (id, model) = match Kind::of(path) {
            Some(Kind::Encodec) => {
                let model = Encodec::load(path, device)?;
                (
                    format!("encodec-{}khz", model.config().sample_rate_hz / 1000),
                    Model::Encodec(Box::new(model)),
                )
            }
            Some(Kind::Dac) => {
                let model = Dac::load(path, device)?;
                (format!("dac-{}khz", model.config().sample_rate_hz / 1000), Model::Dac(Box::new(model)))
            }
            Some(Kind::StableAudio) => {
                ("stable-audio-vae".into(), Model::StableAudio(Box::new(stable_audio(path, device)?)))
            }
            other => {
                if other.is_none() {
                    Checkpoint::open(path).map_err(Box::new)?; // damaged or missing: says why
                }
                let what = match other {
                    Some(Kind::Vggish) => "it holds VGGish\nhint: name it with kind `vggish`",
                    _ => {
                        "it holds no codec\nhint: expected EnCodec, DAC or Stable Audio's autoencoder, as published: the file, or the \
                         folder with its config"
                    }
                };
                return Err(Error::Read { path: path.to_path_buf(), reason: what.into() });
            }
        };
        Ok(Self { id, model, device: device.clone() })
    }

    /// The latents of a mono song at [`AudioEncoder::sample_rate_hz`], one row a frame.
    ///
    /// # Errors
    /// If the song is not finite, or has no sample (Stable Audio's: less than a frame).
    pub fn frames(&self, samples: &[f32]) -> Result<Embeddings> {
        settings::finite(samples)?;
        let least = match &self.model {
            Model::StableAudio(vae) => vae.config().hop(),
            _ => 1,
        };
        if samples.len() < least {
            return Err(Error::TooShort {
                expected: least,
                found: samples.len(),
                window: self.window_samples(),
            });
        }
        match &self.model {
            Model::Encodec(model) => match model.config().segment_samples() {
                None => self.rows(&model.encode(&self.audio(samples, 1)?)?),
                Some(segment) => {
                    let channels = model.config().audio_channels;
                    let mut out = Embeddings::default();
                    let whole = samples.len() / segment * segment;
                    for part in samples[..whole].chunks(SEGMENTS * segment) {
                        let audio = self.audio(part, part.len() / segment)?; // [B, 1, segment]
                        out.append(&self.rows(&model.encode(&repeated(&audio, channels)?)?)?)?;
                    }
                    if whole < samples.len() {
                        let audio = self.audio(&samples[whole..], 1)?;
                        out.append(&self.rows(&model.encode(&repeated(&audio, channels)?)?)?)?;
                    }
                    Ok(out)
                }
            },
            Model::Dac(model) => {
                let rate = model.config().sample_rate_hz;
                let mut out = Embeddings::default();
                for window in dac_windows(samples, rate) {
                    out.append(&self.rows(&model.encode(&self.audio(&window, 1)?)?)?)?;
                }
                Ok(out)
            }
            Model::StableAudio(model) => {
                let audio = repeated(&self.audio(samples, 1)?, model.config().audio_channels)?;
                self.rows(&model.encode_mean_chunked(&audio, CHUNK)?)
            }
        }
    }

    /// `[clips, 1, samples / clips]`.
    fn audio(&self, samples: &[f32], clips: usize) -> Result<Tensor> {
        Ok(Tensor::from_slice(samples, (clips, 1, samples.len() / clips), &self.device)?)
    }

    /// Latents `[B, C, T]` to rows, clip after clip.
    fn rows(&self, latents: &Tensor) -> Result<Embeddings> {
        let mut out = Embeddings::default();
        for clip in latent_rows(latents)? {
            out.append(&clip)?;
        }
        Ok(out)
    }
}

/// The codec's only setting is [`Setting::Frames`].
impl AudioEncoder for Codec {
    /// `encodec-24khz`, `dac-44khz`, `stable-audio-vae` and so on.
    fn id(&self) -> &str {
        &self.id
    }

    fn sample_rate_hz(&self) -> u32 {
        match &self.model {
            Model::Encodec(model) => model.config().sample_rate_hz,
            Model::Dac(model) => model.config().sample_rate_hz,
            Model::StableAudio(model) => model.config().sample_rate_hz,
        }
    }

    /// Samples from one frame to the next.
    fn window_samples(&self) -> usize {
        match &self.model {
            Model::Encodec(model) => model.config().hop(),
            Model::Dac(model) => model.config().hop(),
            Model::StableAudio(model) => model.config().hop(),
        }
    }

    fn dim(&self) -> usize {
        match &self.model {
            Model::Encodec(model) => model.config().latent_dim,
            Model::Dac(model) => model.config().latent_dim,
            Model::StableAudio(model) => model.config().latent_dim,
        }
    }

    fn embed_windows(&self, _: &[&[f32]]) -> Result<Vec<Vec<f32>>> {
        Err(Error::Setting {
            key: "setting",
            expected: "`frames` for a codec".into(),
            found: "windows, and a codec has one row a frame".into(),
        })
    }

    fn embed_clip(&self, samples: &[f32], setting: &Setting) -> Result<Embeddings> {
        match setting {
            Setting::Frames => self.frames(samples),
            other => Err(Error::Setting {
                key: "setting",
                expected: "`frames` for a codec".into(),
                found: format!("{other:?}"),
            }),
        }
    }
}

/// `[B, 1, N]` to `[B, channels, N]`: the same in every channel.
fn repeated(audio: &Tensor, channels: usize) -> Result<Tensor> {
    Ok(audio.repeat((1, channels, 1))?)
}

/// The windows in which fadtk hands a song to DAC.
fn dac_windows(samples: &[f32], sample_rate_hz: u32) -> impl Iterator<Item = Vec<f32>> {
    let rate = f64::from(sample_rate_hz);
    // A multiple of four, so that half of it is a whole number.
    let window = (DAC_WINDOW_S * rate / 4.0) as usize * 4;
    let hop = window / 2;
    let gain = 10f64.powf((DAC_LUFS - loudness(samples, sample_rate_hz)) / 20.0) as f32;
    let peak = samples.iter().fold(0.0f32, |peak, x| peak.max((x * gain).abs()));
    let gain = if peak > 1.0 { gain / peak } else { gain };
    let whole = samples.len().div_ceil(window) * window;
    let song: Vec<f32> = samples.iter().map(|x| x * gain).collect();
    (0..=whole / hop).map(move |i| {
        // Window `i` begins half a window before `i * hop`.
        let at = |j: usize| (i * hop + j).checked_sub(hop).and_then(|at| song.get(at)).copied();
        (0..window).map(|j| at(j).unwrap_or(0.0)).collect()
    })
}

/// Stable Audio's autoencoder, of a folder of either layout.
fn stable_audio(path: &Path, device: &Device) -> Result<AudioVae> {
    let diffusers = path.join("model_index.json").is_file();
    let folder = if diffusers { path.join("vae") } else { path.to_path_buf() };
    let config = stable_audio_config(path);
    let refuse = |message: String| Error::Vae(VaeError::Config { path: config.clone(), message });
    let text = std::fs::read_to_string(&config)
        .map_err(|source| Error::Vae(VaeError::Io { path: config.clone(), source }))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| refuse(e.to_string()))?;
    let (cfg, layout) = dragon_vae::published::read_config(&json).map_err(refuse)?;
    let checkpoint = Checkpoint::open(&folder).map_err(Box::new)?;
    // stable-audio-tools keeps the whole pipeline in one file, and an autoencoder of its own without the prefix.
    const PREFIX: &str = "pretransform.model.";
    let whole = layout == Layout::StableAudioTools && checkpoint.names().any(|name| name.starts_with(PREFIX));
    let prefix = if whole { PREFIX } else { "" };
    let loader = Loader::new(checkpoint, move |name| vec![format!("{prefix}{}", layout.name(name))]);
    let vae = AudioVae::new(&cfg, loader.builder(DType::F32, device))?;
    loader.finish(|name| whole && !name.starts_with(PREFIX)).map_err(Box::new)?;
    Ok(vae)
}

fn stable_audio_config(path: &Path) -> PathBuf {
    let tools = path.join("model_config.json");
    if path.join("model_index.json").is_file() {
        path.join("vae").join("config.json")
    } else if tools.is_file() {
        tools
    } else {
        path.join("config.json")
    }
}

/// The files that [`Codec::load`] and [`crate::vggish::Vggish::load`] read: weights, and the config if there is one.
///
/// # Errors
/// If there is no checkpoint, or several.
pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let (folder, config) = match Kind::of(path) {
        Some(Kind::StableAudio) if path.join("model_index.json").is_file() => {
            (path.join("vae"), stable_audio_config(path))
        }
        Some(Kind::StableAudio) => (path.to_path_buf(), stable_audio_config(path)),
        _ => (path.to_path_buf(), path.join("config.json")),
    };
    let weights = Checkpoint::find(&folder).map_err(Box::new)?;
    Ok([weights].into_iter().chain(config.is_file().then_some(config)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dragon_testkit::{Golden, Tol, assert_close, fixture};

    fn noise(n: usize) -> Vec<f32> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    /// `[1, 2, N]`: the same in both channels.
    fn stereo(samples: &[f32]) -> Tensor {
        Tensor::from_vec([samples, samples].concat(), (1, 2, samples.len()), &Device::Cpu).unwrap()
    }

    fn load(path: &str) -> Codec {
        Codec::load(fixture(path), &Device::Cpu).unwrap()
    }

    const ALL: [&str; 5] = [
        "dragon-vae/encodec/encodec_24khz/model.th",
        "dragon-vae/encodec/encodec_48khz/model.th",
        "dragon-vae/encodec/encodec_32khz",
        "dragon-vae/dac_codec/descript/weights.pth",
        "dragon-vae/dac_codec/hugging_face",
    ];

    #[test]
    fn frames_are_the_references_latents() {
        let golden = Golden::fixture("dragon-vae/encodec/encodec_24khz/golden.safetensors");
        let audio = golden.get("200.audio").get(1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let want = golden.get("200.latents").get(1).unwrap().t().unwrap(); // [T, C]
        let codec = load(ALL[0]);
        assert_eq!((codec.id(), codec.sample_rate_hz(), codec.dim()), ("encodec-24khz", 24_000, 6));
        let rows = codec.embed_clip(&audio, &Setting::Frames).unwrap();
        let got = Tensor::from_vec(rows.data, (rows.n, rows.dim), &Device::Cpu).unwrap();
        assert_close(&got, &want, Tol::LAYER);
    }

    #[test]
    fn stereo_models_hear_the_song_in_both_channels_segment_by_segment() {
        let codec = load(ALL[1]);
        let song = noise(5 * 48_000 + 1000);
        let rows = codec.frames(&song).unwrap();
        assert_eq!((rows.n, rows.dim), (5 * 3200 + 67, 6));
        let Model::Encodec(model) = &codec.model else { panic!("another codec") };
        for (segment, first) in
            [(&song[..48_000], 0), (&song[4 * 48_000..5 * 48_000], 12_800), (&song[240_000..], 16_000)]
        {
            let audio = stereo(segment);
            let want = &latent_rows(&model.encode(&audio).unwrap()).unwrap()[0];
            assert_eq!(rows.data[first * 6..][..want.data.len()], want.data);
        }
    }

    #[test]
    fn dac_hears_windows_of_five_seconds_at_a_fixed_loudness() {
        let rate = 8000; // windows of 40 000 samples
        let song: Vec<f32> = noise(56_000).iter().map(|x| x * 0.02).collect();
        let windows: Vec<Vec<f32>> = dac_windows(&song, rate).collect();
        // Ten seconds of song and zeros: windows begin at -2.5 s to 7.5 s.
        assert_eq!(windows.len(), 5);
        assert!(windows.iter().all(|window| window.len() == 40_000));
        let gain = windows[1][100] / song[100];
        let near = |a: f32, b: f32| (a - b * gain).abs() < 1e-6;
        assert!(windows[0][..20_000].iter().all(|&x| x == 0.0) && near(windows[0][20_000], song[0]));
        assert!(windows[3][16_000..].iter().all(|&x| x == 0.0) && near(windows[3][15_999], song[55_999]));
        let loud: Vec<f32> = song.iter().map(|x| x * gain).collect();
        assert!((loudness(&loud, rate) + 16.0).abs() < 1e-3);
        // A click is louder than its loudness says: its peak is brought to 1.
        let mut click = vec![0.0; 56_000];
        click[24_000] = 0.5;
        let peak = dac_windows(&click, rate).flatten().fold(0.0f32, |peak, x| peak.max(x.abs()));
        assert!((peak - 1.0).abs() < 1e-6, "{peak}");
        assert_eq!(dac_windows(&[0.0; 10], rate).flatten().fold(0.0f32, f32::max), 0.0);
    }

    #[test]
    fn every_codec_takes_frames_only_and_short_and_silent_songs() {
        for path in ALL {
            let codec = load(path);
            for song in [noise(3), vec![0.0; 30_000], noise(30_000)] {
                let rows = codec.frames(&song).unwrap();
                assert!(rows.n > 0 && rows.data.iter().all(|x| x.is_finite()), "{path}");
                assert_eq!(rows, codec.frames(&song).unwrap());
            }
            let wrong = codec.embed_clip(&noise(3000), &Setting::MA).unwrap_err().to_string();
            assert!(wrong.contains("`frames` for a codec"), "{wrong}");
            assert!(matches!(codec.frames(&[]), Err(Error::TooShort { .. })));
            assert!(matches!(codec.frames(&[0.0, f32::NAN]), Err(Error::NotFinite { index: 1, .. })));
        }
    }

    /// Stable Audio's autoencoder at a reduced width, in the folder of a whole pipeline.
    fn pipeline(dir: &Path, layout: Layout) {
        let case = fixture("dragon-vae/oobleck/case.safetensors");
        let case = candle_core::safetensors::load(case, &Device::Cpu).unwrap();
        let (theirs, ours, folder) = match layout {
            Layout::Diffusers => ("diffusers.", "", dir.join("vae")),
            Layout::StableAudioTools => ("stable_audio_tools.", "pretransform.model.", dir.to_path_buf()),
        };
        let named = |(k, v): (String, Tensor)| Some((format!("{ours}{}", k.strip_prefix(theirs)?), v));
        let mut tensors: std::collections::BTreeMap<String, Tensor> =
            case.into_iter().filter_map(named).collect();
        std::fs::create_dir_all(&folder).unwrap();
        match layout {
            Layout::Diffusers => {
                std::fs::write(dir.join("model_index.json"), r#"{"_class_name": "StableAudioPipeline"}"#)
                    .unwrap();
                let config = r#"{"_class_name": "AutoencoderOobleck", "audio_channels": 2, "channel_multiples": [1, 2],
                    "decoder_channels": 8, "decoder_input_channels": 4, "downsampling_ratios": [2, 4],
                    "encoder_hidden_size": 8, "sampling_rate": 44100}"#;
                std::fs::write(folder.join("config.json"), config).unwrap();
            }
            Layout::StableAudioTools => {
                tensors.insert(
                    "model.model.of.the.dit".into(),
                    Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap(),
                );
                let part = |more: &str| {
                    format!(
                        r#"{{"type": "oobleck", "config": {{"channels": 8, "c_mults": [1, 2], "strides": [2, 4], "use_snake": true,
                            {more}}}}}"#
                    )
                };
                let config = format!(
                    r#"{{"sample_rate": 44100, "model": {{"pretransform": {{"type": "autoencoder", "config": {{"encoder": {},
                        "decoder": {}, "bottleneck": {{"type": "vae"}}}}}}}}}}"#,
                    part(r#""latent_dim": 8"#),
                    part(r#""latent_dim": 4, "out_channels": 2, "final_tanh": false"#)
                );
                std::fs::write(folder.join("model_config.json"), config).unwrap();
            }
        }
        dragon_nn::write_safetensors(folder.join("model.safetensors"), &tensors, &Default::default())
            .unwrap();
    }

    #[test]
    fn stable_audios_autoencoder_is_read_from_both_layouts() {
        let song = noise(1003);
        let rows = [Layout::Diffusers, Layout::StableAudioTools].map(|layout| {
            let dir = tempfile::tempdir().unwrap();
            pipeline(dir.path(), layout);
            assert_eq!(Kind::of(dir.path()), Some(Kind::StableAudio));
            assert_eq!(files(dir.path()).unwrap().len(), 2);
            let codec = Codec::load(dir.path(), &Device::Cpu).unwrap();
            let Model::StableAudio(vae) = &codec.model else { panic!("another codec") };
            let want = vae.encode(&stereo(&song[..1000])).unwrap().mean;
            let rows = codec.embed_clip(&song, &Setting::Frames).unwrap();
            assert_eq!((rows.n, rows.dim, codec.id()), (125, 4, "stable-audio-vae"));
            assert_eq!(rows, latent_rows(&want).unwrap()[0]);
            assert!(matches!(codec.frames(&song[..7]), Err(Error::TooShort { expected: 8, .. })));
            rows
        });
        assert_eq!(rows[0], rows[1]);
    }

    #[test]
    fn what_holds_no_codec_is_said() {
        let message = |path: &str| Codec::load(fixture(path), &Device::Cpu).err().unwrap().to_string();
        assert!(message("dragon-encoders/vggish/model.pth").contains("kind `vggish`"));
        assert!(message("musicnn/mtt_musicnn.safetensors").contains("it holds no codec"));
        assert!(message("dragon-encoders/t5/README.md").contains("neither safetensors nor"));
        assert!(message("nowhere").contains("No such file"));
        assert_eq!(Kind::of(&fixture("tiny/clap")), None);
    }
}
