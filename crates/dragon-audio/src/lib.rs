//! Audio clips: decoding, writing, resampling, mel spectrograms, loudness. Knows nothing about tensors or models.
//!
//! Reading order:
//! - [`clip`]: [`Audio`] (channels) and [`Clip`] (mono), their conversions and windows;
//! - [`decode`]: files to samples (WAV, FLAC, Ogg Vorbis, Ogg Opus, MP3, AIFF, MP4/AAC, ...), strict about damage;
//! - [`mod@write`]: samples to WAV files, whole or not at all;
//! - [`mod@resample`]: sample-rate conversion without delay;
//! - [`mel`]: windows, STFT, mel filter banks and mel spectrograms, equal to librosa's;
//! - [`measure`]: level, loudness, brightness;
//! - [`music`]: tempo and key, estimated;
//! - [`error`]: what can go wrong, with the path, the expected and the found.

pub mod clip;
pub mod decode;
pub mod error;
pub mod measure;
pub mod mel;
pub mod music;
mod ogg;
mod opus;
pub mod resample;
pub mod write;

pub use clip::{Audio, Clip, SILENCE_DBFS, windows};
pub use decode::{ENDINGS, check, read, read_duration_s, read_mono, read_tags};
pub use error::{Error, Result};
pub use measure::{lufs, peak, peak_normalize, rms_dbfs, spectral_centroid_hz};
pub use mel::{
    Mel, MelConfig, MelNorm, MelScale, MelSpectrogram, PadMode, hann_window, mel_filterbank, stft_magnitude,
};
pub use music::{Key, key, tempo_bpm};
pub use resample::resample;
pub use write::{SampleFormat, write_wav};
