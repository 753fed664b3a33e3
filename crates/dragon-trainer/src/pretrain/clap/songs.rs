//! The clips of a split as spectrograms in memory.

use std::path::Path;

use candle_core::Tensor;
use dragon_data::Entry;
use dragon_encoders::clap::{self, ClapEncoder};
use dragon_encoders::htsat::LogMel;
use dragon_encoders::settings::peak_normalize;

use crate::embed::read_song;
use crate::error::{Error, Result};

/// Steps of the 16-bit spectrograms per dB: ±163 dB in steps of 0.005.
const STEPS_PER_DB: f32 = 200.0;

/// Spectrograms and captions of one split, in memory.
#[derive(Default)]
pub(super) struct Songs {
    /// Of each clip, one spectrogram a window.
    pub log_mel: Vec<Vec<Vec<i16>>>,
    pub captions: Vec<String>,
    pub pieces: Vec<String>,
}

impl Songs {
    /// Adds a clip.
    pub fn push(&mut self, entry: Entry, log_mel: Vec<Vec<i16>>) {
        self.log_mel.push(log_mel);
        self.captions.push(entry.caption);
        self.pieces.push(entry.piece);
    }

    /// Spectrogram of a window of clip `i` in dB, frame by frame.
    pub fn spectrogram(&self, i: usize, window: usize) -> Vec<f32> {
        self.log_mel[i][window].iter().map(|x| f32::from(*x) / STEPS_PER_DB).collect()
    }
}

/// Windows that a clip longer than the audio branch's is cut into, from its start to its end.
const WINDOWS: usize = 3;

/// Reads a clip and computes the 16-bit log-mel spectrograms of its windows, each peak-normalised as in the MA setting.
pub(super) fn spectrograms(
    path: &Path,
    config: &clap::Config,
    front_end: &LogMel,
) -> std::result::Result<Vec<Vec<i16>>, String> {
    let expected = config.audio.clip_samples;
    let clip = read_song(path, config.audio.sample_rate_hz, expected).map_err(|e| e.to_string())?;
    let found = clip.samples.len();
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

/// Mean and variance of every mel band over the training clips go into `bn0`; returns the means.
pub(super) fn set_statistics(encoder: &ClapEncoder, songs: &Songs) -> Result<Vec<f32>> {
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
