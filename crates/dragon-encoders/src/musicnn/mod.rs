//! musicnn: a music tagger with trained weights, here an encoder for Fréchet distances, Vendi scores and tags.
//!
//! Pons et al. 2018, "End-to-end learning for music audio tagging at scale" (arXiv:1711.02520); Pons & Serra 2019,
//! "musicnn: Pre-trained convolutional neural networks for music audio tagging" (arXiv:1909.06654). Reference: the Python
//! package musicnn 0.1.0 (ISC), whose weights `fixtures/musicnn/convert.py` converts.
//!
//! Audio of 16 kHz becomes a log-mel spectrogram (96 bands, hop 256); the network reads 187 frames (3 s) of it and gives 50 tag
//! probabilities and a 200-d embedding, its penultimate layer. Two sets of weights: trained on MagnaTagATune (tags of
//! instruments, voices and styles) and on the Million Song Dataset (genres, moods, decades).
//!
//! Differences from the reference:
//! - it rounds the mel energies to float16 *before* `log10(10000 x + 1)`, where loud music overflows to infinity; here all is f32;
//! - the spectrogram's ends are mirrored, as librosa did when the network was trained (zeros since librosa 0.10).
//!
//! Golden tests: `network_matches_tensorflow`, `log_mel_matches_librosa`, `clip_matches_librosa_and_tensorflow`.

mod lanes;
mod network;
mod norm;
mod rows;
mod temporal;
mod timbral;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use dragon_audio::{MelConfig, MelNorm, MelScale, MelSpectrogram, PadMode};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

pub use network::{DIM, N_FRAMES, N_MELS, N_TAGS, Output};

use crate::encoder::{AudioEncoder, Embeddings};
use crate::error::{Error, Result};
use crate::settings::{self, Setting};
use network::Network;

/// Sample rate of the audio, Hz.
pub const SAMPLE_RATE_HZ: u32 = 16000;
/// Samples between frames.
pub const HOP: usize = 256;
/// Samples behind one embedding: from the centre of a window's first frame to that of its last, 186 hops = 2.976 s.
/// A clip of this length has exactly 187 frames; the reference calls it 3 s.
pub const WINDOW_SAMPLES: usize = (N_FRAMES - 1) * HOP;

/// The encoder; inference only, on the CPU.
pub struct Musicnn {
    id: String,
    tags: Vec<String>,
    mel: MelSpectrogram,
    network: Network,
}

impl Musicnn {
    /// Reads weights made by `fixtures/musicnn/convert.py`.
    ///
    /// # Errors
    /// If the file cannot be read, or lacks a tensor, has one too many, or one of another shape: all of them are listed.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path)
            .map_err(|e| Error::Read { path: path.to_path_buf(), reason: e.to_string() })?;
        Self::from_bytes(&bytes, path)
    }

    /// [`Self::load`] from memory; `origin` names the file in errors.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_bytes(bytes: &[u8], origin: impl AsRef<Path>) -> Result<Self> {
        let path = origin.as_ref().to_path_buf();
        let read = |reason: String| Error::Read { path: path.clone(), reason };
        let file = SafeTensors::deserialize(bytes).map_err(|e| read(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| read(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();

        let mut problems = Vec::new();
        let mut values = BTreeMap::new();
        for (name, shape) in network::shapes() {
            match file.tensor(&name) {
                Err(_) => problems.push(format!("  tensor `{name}`: missing, expected {shape:?}")),
                Ok(view) if view.shape() != shape || view.dtype() != Dtype::F32 => problems.push(format!(
                    "  tensor `{name}`: expected {shape:?} F32, found {:?} {:?}",
                    view.shape(),
                    view.dtype()
                )),
                Ok(view) => {
                    let floats: Vec<f32> =
                        view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    values.insert(name, floats);
                }
            }
        }
        let known: BTreeSet<String> = network::shapes().into_iter().map(|(name, _)| name).collect();
        let unused: BTreeSet<&str> = file.names().into_iter().filter(|name| !known.contains(*name)).collect();
        problems.extend(unused.into_iter().map(|name| format!("  tensor `{name}`: unused")));
        let tags: Vec<String> =
            metadata.get("tags").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        if tags.len() != N_TAGS {
            problems.push(format!(
                "  metadata `tags`: expected a JSON list of {N_TAGS} names, found {}",
                tags.len()
            ));
        }
        if !problems.is_empty() {
            return Err(Error::Weights { path, model: "musicnn", problems: problems.join("\n") });
        }

        let model = metadata.get("model").map_or("", String::as_str);
        let id = format!("musicnn-{}", model.trim_end_matches("_musicnn").to_lowercase());
        let mel = MelSpectrogram::new(&MelConfig {
            sample_rate_hz: SAMPLE_RATE_HZ,
            n_fft: 512,
            win_length: 512,
            hop: HOP,
            n_mels: N_MELS,
            f_min: 0.0,
            f_max: 8000.0,
            scale: MelScale::Slaney,
            norm: MelNorm::Slaney,
            power: 2.0,
            center: true,
            pad: PadMode::Reflect,
        })?;
        let network = Network::new(|name| values[name].clone());
        Ok(Musicnn { id, tags, mel, network })
    }

    /// The names of the tags, in the order of [`Output::tags`].
    pub fn tags(&self) -> &[String] {
        &self.tags
    }

    /// `log10(10000 mel + 1)` of audio at 16 kHz: `[T, 96]`, flat, with `T = 1 + n_samples / 256` frames.
    pub fn log_mel(&self, samples: &[f32]) -> Vec<f32> {
        let mut mel = self.mel.compute(samples).data;
        for x in &mut mel {
            *x = (10000.0 * *x + 1.0).log10();
        }
        mel
    }

    /// Embedding and tags of the windows of 187 frames that begin at the frames `starts` of a log-mel spectrogram
    /// `[T, 96]`. Windows share what they have in common, so many overlapping ones cost little more than one pass.
    ///
    /// # Errors
    /// If a window does not fit into the spectrogram.
    pub fn outputs(&self, log_mel: &[f32], starts: &[usize]) -> Result<Vec<Output>> {
        let n_frames = log_mel.len() / N_MELS;
        if let Some(start) = starts.iter().find(|&&start| start + N_FRAMES > n_frames) {
            return Err(Error::Setting {
                key: "starts",
                expected: format!("windows of {N_FRAMES} frames inside {n_frames}"),
                found: format!("one that begins at frame {start}"),
            });
        }
        Ok(self.network.forward(log_mel, starts))
    }

    /// Embeddings and tags of one clip at 16 kHz under MA or FADTK; see [`AudioEncoder::embed_clip`].
    ///
    /// # Errors
    /// If the clip is too short or not finite, or the setting is VAE.
    pub fn clip_outputs(&self, samples: &[f32], setting: &Setting) -> Result<Vec<Output>> {
        match *setting {
            Setting::Ma { .. } => {
                let windows = settings::windows(samples, WINDOW_SAMPLES, SAMPLE_RATE_HZ, setting)?;
                Ok(windows.iter().map(|window| self.window_output(window)).collect())
            }
            Setting::Fadtk { hop_s, tail } => {
                // Windows begin on frames and share one spectrogram of the song, as in the reference.
                let mut song = settings::checked(samples, WINDOW_SAMPLES)?.into_owned();
                settings::peak_normalize(&mut song);
                let hop = settings::hop_samples(hop_s, SAMPLE_RATE_HZ, HOP)?;
                let starts = settings::hop_starts(song.len(), WINDOW_SAMPLES, hop, tail);
                let last = starts.last().map_or(0, |last| last + WINDOW_SAMPLES);
                song.resize(song.len().max(last), 0.0);
                let starts: Vec<usize> = starts.into_iter().map(|start| start / HOP).collect();
                Ok(self.network.forward(&self.log_mel(&song), &starts))
            }
            Setting::Vae { .. } | Setting::Frames => Err(settings::no_windows(setting)),
        }
    }

    /// The mean tag probabilities of a clip at 16 kHz (3 s windows, half a second apart, level untouched), with their
    /// names, highest first.
    ///
    /// # Errors
    /// If the clip is too short or not finite.
    pub fn tag_clip(&self, samples: &[f32]) -> Result<Vec<(&str, f32)>> {
        let song = settings::checked(samples, WINDOW_SAMPLES)?;
        let log_mel = self.log_mel(&song);
        let starts: Vec<usize> = (0..log_mel.len() / N_MELS - N_FRAMES + 1).step_by(31).collect();
        let outputs = self.network.forward(&log_mel, &starts);
        let mut tags: Vec<(&str, f32)> = (0..N_TAGS)
            .map(|i| {
                let sum: f32 = outputs.iter().map(|output| output.tags[i]).sum();
                (self.tags[i].as_str(), sum / outputs.len() as f32)
            })
            .collect();
        tags.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(tags)
    }

    fn window_output(&self, window: &[f32]) -> Output {
        self.network.forward(&self.log_mel(window), &[0]).remove(0)
    }
}

/// Under FADTK, windows begin on frames: the hop is rounded to a multiple of 256 samples (16 ms), and all windows share one
/// spectrogram of the peak-normalised song, so only the song's ends are mirrored. Under MA, and in `embed_windows`,
/// each window is a clip of its own.
impl AudioEncoder for Musicnn {
    /// `musicnn-mtt` or `musicnn-msd`.
    fn id(&self) -> &str {
        &self.id
    }

    fn sample_rate_hz(&self) -> u32 {
        SAMPLE_RATE_HZ
    }

    fn window_samples(&self) -> usize {
        WINDOW_SAMPLES
    }

    fn dim(&self) -> usize {
        DIM
    }

    fn embed_windows(&self, windows: &[&[f32]]) -> Result<Vec<Vec<f32>>> {
        if let Some(window) = windows.iter().find(|window| window.len() != WINDOW_SAMPLES) {
            let (expected, found) = (format!("{WINDOW_SAMPLES} samples"), window.len().to_string());
            return Err(Error::Setting { key: "window", expected, found });
        }
        Ok(windows.par_iter().map(|window| self.window_output(window).embedding).collect())
    }

    fn embed_clip(&self, samples: &[f32], setting: &Setting) -> Result<Embeddings> {
        let outputs = self.clip_outputs(samples, setting)?;
        Embeddings::from_rows(&outputs.into_iter().map(|output| output.embedding).collect::<Vec<_>>())
    }

    fn embed_clips(&self, clips: &[&[f32]], setting: &Setting) -> Result<Vec<Embeddings>> {
        // In two steps, so that of several errors the first is reported, not the fastest.
        let results: Vec<Result<Embeddings>> =
            clips.par_iter().map(|samples| self.embed_clip(samples, setting)).collect();
        results.into_iter().collect()
    }
}

#[cfg(test)]
mod tests;
