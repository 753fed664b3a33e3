//! Audio in memory: [`Audio`] keeps its channels, [`Clip`] is mono.

use std::path::Path;

use crate::error::{Error, Result};
use crate::measure::rms_dbfs;
use crate::resample::resample;

/// Files whose RMS level lies below this hold nothing to hear: the dither of a 16-bit file lies at -96 to -90 dBFS, and
/// an encoder that normalises peaks would blow it up.
pub const SILENCE_DBFS: f64 = -80.0;

/// Audio with one or more channels of equal length; samples nominally in [-1, 1].
#[derive(Debug, Clone, PartialEq)]
pub struct Audio {
    /// `[channel][sample]`; at least one channel, all of one length.
    pub channels: Vec<Vec<f32>>,
    /// Samples per second and channel.
    pub sample_rate_hz: u32,
}

impl Audio {
    /// Samples per channel.
    pub fn n_samples(&self) -> usize {
        self.channels.first().map_or(0, Vec::len)
    }

    /// Duration in seconds.
    pub fn duration_s(&self) -> f64 {
        self.n_samples() as f64 / f64::from(self.sample_rate_hz)
    }

    /// The mean of all channels (as `librosa.to_mono`).
    pub fn to_mono(&self) -> Clip {
        let mut samples = Vec::with_capacity(self.n_samples());
        add_mean(&self.channels, &mut samples);
        Clip { samples, sample_rate_hz: self.sample_rate_hz }
    }

    /// The same audio at another sample rate; `ceil(n * new / old)` samples, without delay.
    ///
    /// # Errors
    /// If a rate lies outside 1 to 768 kHz.
    pub fn resample(&self, sample_rate_hz: u32) -> Result<Audio> {
        let channels = self
            .channels
            .iter()
            .map(|c| resample(c, self.sample_rate_hz, sample_rate_hz))
            .collect::<Result<Vec<_>>>()?;
        Ok(Audio { channels, sample_rate_hz })
    }
}

/// Appends the mean of channels of equal length.
pub(crate) fn add_mean(channels: &[Vec<f32>], out: &mut Vec<f32>) {
    match channels {
        [] => {}
        [mono] => out.extend_from_slice(mono),
        [left, right] => out.extend(left.iter().zip(right).map(|(l, r)| (l + r) * 0.5)),
        many => {
            let scale = 1.0 / many.len() as f32;
            out.extend((0..many[0].len()).map(|i| many.iter().map(|c| c[i]).sum::<f32>() * scale));
        }
    }
}

/// Mono audio; samples nominally in [-1, 1].
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    /// The samples.
    pub samples: Vec<f32>,
    /// Samples per second.
    pub sample_rate_hz: u32,
}

impl Clip {
    /// Duration in seconds.
    pub fn duration_s(&self) -> f64 {
        self.samples.len() as f64 / f64::from(self.sample_rate_hz)
    }

    /// Checks that there is something to hear; `path` names the file in the error.
    ///
    /// # Errors
    /// If the RMS level lies below [`SILENCE_DBFS`].
    pub fn check_sound(&self, path: &Path) -> Result<()> {
        let found_dbfs = rms_dbfs(&self.samples);
        if found_dbfs >= SILENCE_DBFS {
            return Ok(());
        }
        Err(Error::Silent { path: path.to_path_buf(), expected_dbfs: SILENCE_DBFS, found_dbfs })
    }

    /// The same clip at another sample rate; `ceil(n * new / old)` samples, without delay.
    ///
    /// # Errors
    /// If a rate lies outside 1 to 768 kHz.
    pub fn resample(&self, sample_rate_hz: u32) -> Result<Clip> {
        Ok(Clip { samples: resample(&self.samples, self.sample_rate_hz, sample_rate_hz)?, sample_rate_hz })
    }
}

impl From<Clip> for Audio {
    fn from(clip: Clip) -> Self {
        Audio { channels: vec![clip.samples], sample_rate_hz: clip.sample_rate_hz }
    }
}

/// Windows of `window` samples every `hop` samples that lie wholly inside `samples`:
/// `1 + (n - window) / hop` of them (rounded down), none if the audio is shorter than a window.
///
/// # Panics
/// If `window` or `hop` is 0.
pub fn windows(samples: &[f32], window: usize, hop: usize) -> impl ExactSizeIterator<Item = &[f32]> + Clone {
    assert!(window > 0 && hop > 0, "window and hop must be positive, got {window} and {hop}");
    let n = if samples.len() < window { 0 } else { 1 + (samples.len() - window) / hop };
    (0..n).map(move |i| &samples[i * hop..i * hop + window])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mono_is_the_mean_of_the_channels() {
        let audio = Audio { channels: vec![vec![1.0, -0.5], vec![0.0, 0.5]], sample_rate_hz: 8000 };
        assert_eq!(audio.to_mono().samples, [0.5, 0.0]);
    }

    #[test]
    fn silence_and_dither_are_silent_and_a_quiet_tone_is_not() {
        let check = |amplitude: f32| {
            let samples: Vec<f32> = (0..1000).map(|i| amplitude * (i as f32 * 0.3).sin()).collect();
            Clip { samples, sample_rate_hz: 8000 }.check_sound(Path::new("a.wav"))
        };
        check(1e-3).unwrap();
        for amplitude in [0.0, 3e-5] {
            let message = check(amplitude).unwrap_err().to_string();
            assert!(message.contains("`a.wav` is silent: expected a level above -80 dBFS"), "{message}");
        }
    }

    #[test]
    fn windows_cover_only_whole_windows() {
        let samples: Vec<f32> = (0..10).map(|i| i as f32).collect();
        let starts: Vec<f32> = windows(&samples, 4, 3).map(|w| w[0]).collect();
        assert_eq!(starts, [0.0, 3.0, 6.0]);
        assert_eq!(windows(&samples, 11, 3).len(), 0);
        assert_eq!(windows(&samples, 10, 3).len(), 1);
    }
}
