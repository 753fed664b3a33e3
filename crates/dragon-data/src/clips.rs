//! The one form in which the clips of a corpus are stored ([`Form`]), and which excerpts are refused.

use std::path::Path;

use dragon_audio::{Clip, SampleFormat, lufs, peak, write_wav};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The form of every clip of a corpus: mono, one length, one loudness.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Form {
    /// Sample rate, Hz.
    pub sample_rate_hz: u32,
    /// Duration, seconds; rounded to whole samples, see [`Form::exact_s`].
    pub duration_s: f64,
    /// Loudness that clips are brought to, as far as `peak_limit` allows (BS.1770, LUFS).
    pub target_lufs: f64,
    /// Largest absolute sample; a clip that would pass it is scaled down as a whole, never limited.
    pub peak_limit: f64,
    /// Excerpts quieter than this are refused, LUFS.
    pub silence_lufs: f64,
}

impl Default for Form {
    /// The form of the shipped model's corpora: 5.12 s at 16 kHz, -20 LUFS.
    fn default() -> Self {
        Self {
            sample_rate_hz: 16000,
            duration_s: 5.12,
            target_lufs: -20.0,
            peak_limit: 0.9,
            silence_lufs: -50.0,
        }
    }
}

/// Why an excerpt is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    /// Quieter than [`Form::silence_lufs`], or silent for more than half of its 64 ms frames.
    Silent,
    /// Runs of full-scale samples: the source was recorded or rendered too loud.
    Clipped,
}

impl Form {
    /// Checks that the settings can work; their keys lie under `clip`.
    ///
    /// # Errors
    /// For the first that cannot.
    pub fn check(&self) -> Result<()> {
        if !(8000..=96000).contains(&self.sample_rate_hz) {
            return Err(Error::config("clip.sample_rate_hz", "8000 to 96000 Hz", self.sample_rate_hz));
        }
        // Below 0.4 s, a block of BS.1770, there is no loudness.
        if !(0.4..=600.0).contains(&self.duration_s) {
            return Err(Error::config("clip.duration_s", "0.4 to 600 s", self.duration_s));
        }
        for (key, lufs) in [("clip.target_lufs", self.target_lufs), ("clip.silence_lufs", self.silence_lufs)]
        {
            if !(-70.0..=0.0).contains(&lufs) {
                return Err(Error::config(key, "-70 to 0 LUFS", lufs));
            }
        }
        if !(self.peak_limit > 0.0 && self.peak_limit <= 1.0) {
            return Err(Error::config("clip.peak_limit", "a number above 0, at most 1", self.peak_limit));
        }
        Ok(())
    }

    /// Samples of a clip.
    pub fn n_samples(&self) -> usize {
        (self.duration_s * f64::from(self.sample_rate_hz)).round() as usize
    }

    /// Duration of [`Form::n_samples`], seconds.
    pub fn exact_s(&self) -> f64 {
        self.n_samples() as f64 / f64::from(self.sample_rate_hz)
    }

    /// Brings an excerpt to the target loudness within the peak limit; returns the gain in dB.
    ///
    /// # Errors
    /// (In the inner result) why the excerpt is not used.
    pub fn level(&self, samples: &mut [f32]) -> std::result::Result<f64, Refusal> {
        let loudness = lufs(&[samples], self.sample_rate_hz);
        let frame = (0.064 * f64::from(self.sample_rate_hz)).round() as usize;
        let quiet = samples.chunks(frame).filter(|c| peak(c) < 1e-3).count();
        if loudness < self.silence_lufs || 2 * quiet > samples.len().div_ceil(frame) {
            return Err(Refusal::Silent);
        }
        if longest_flat_top(samples) >= 8 {
            return Err(Refusal::Clipped);
        }
        let most = f64::from(self.peak_limit as f32 / peak(samples));
        let gain = 10f64.powf((self.target_lufs - loudness) / 20.0).min(most);
        samples.iter_mut().for_each(|x| *x *= gain as f32);
        Ok(20.0 * gain.log10())
    }

    /// Writes a clip as 16-bit mono WAV, creating its folder.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn store(&self, path: &Path, samples: Vec<f32>) -> Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(Error::io(dir, "created"))?;
        }
        let clip = Clip { samples, sample_rate_hz: self.sample_rate_hz };
        Ok(write_wav(path, &clip, SampleFormat::Int16)?)
    }

    /// Whether a whole clip lies at `path` already: a 16-bit mono WAV has a known size.
    pub fn is_stored(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|m| m.len() == 44 + 2 * self.n_samples() as u64)
    }
}

/// Longest run of samples at 0.999 of full scale or more.
fn longest_flat_top(samples: &[f32]) -> usize {
    let (mut run, mut longest) = (0, 0);
    for x in samples {
        run = if x.abs() >= 0.999 { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(amplitude: f32) -> Vec<f32> {
        (0..81920).map(|i| amplitude * (i as f32 * 0.2).sin()).collect()
    }

    #[test]
    fn clips_come_to_the_target_loudness() {
        for target_lufs in [-20.0, -26.0] {
            let form = Form { target_lufs, ..Form::default() };
            for amplitude in [0.01, 0.3, 0.99] {
                let mut clip = tone(amplitude);
                form.level(&mut clip).unwrap();
                assert!((lufs(&[&clip], form.sample_rate_hz) - target_lufs).abs() < 0.01);
            }
        }
    }

    #[test]
    fn a_click_keeps_the_peak_limit() {
        let mut clip = tone(0.01);
        clip[5000] = 0.9;
        Form::default().level(&mut clip).unwrap();
        assert!(peak(&clip) <= 0.9 + 1e-6);
    }

    #[test]
    fn silent_and_clipped_excerpts_are_refused() {
        let form = Form::default();
        assert_eq!(form.level(&mut vec![0.0; form.n_samples()]), Err(Refusal::Silent));
        let mut half = tone(0.3);
        half[30000..].fill(0.0);
        assert_eq!(form.level(&mut half), Err(Refusal::Silent));
        let mut clipped: Vec<f32> = tone(4.0).iter().map(|x| x.clamp(-1.0, 1.0)).collect();
        assert_eq!(form.level(&mut clipped), Err(Refusal::Clipped));
        let strict = Form { silence_lufs: -10.0, ..form };
        assert_eq!(strict.level(&mut tone(0.1)), Err(Refusal::Silent));
    }

    #[test]
    fn a_stored_clip_is_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wav/a.wav");
        let form = Form::default();
        assert!(!form.is_stored(&path));
        form.store(&path, tone(0.3)).unwrap();
        assert!(form.is_stored(&path));
        assert!(!Form { duration_s: 5.0, ..form }.is_stored(&path));
    }

    #[test]
    fn a_duration_is_a_whole_number_of_samples() {
        let form = Form::default();
        assert_eq!((form.n_samples(), form.exact_s()), (81920, 5.12));
        let form = Form { sample_rate_hz: 44100, duration_s: 1.00001, ..form };
        assert_eq!((form.n_samples(), form.exact_s()), (44100, 1.0));
    }
}
