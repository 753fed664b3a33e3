//! The one form in which clips are stored, and which excerpts are refused.

use std::path::Path;

use dragon_audio::{Clip, SampleFormat, lufs, peak, write_wav};

use crate::error::Result;

/// Sample rate of stored clips, Hz.
pub const SAMPLE_RATE_HZ: u32 = 16000;
/// Samples per stored clip: 5.12 s.
pub const CLIP_SAMPLES: usize = 81920;
/// Duration of a stored clip, seconds.
pub const CLIP_S: f64 = CLIP_SAMPLES as f64 / SAMPLE_RATE_HZ as f64;
/// Loudness that clips are brought to, as far as [`PEAK_LIMIT`] allows (BS.1770, LUFS).
pub const TARGET_LUFS: f64 = -20.0;
/// Largest absolute sample of a stored clip; a clip that would pass it is scaled down as a whole, never limited.
pub const PEAK_LIMIT: f32 = 0.9;
/// Excerpts quieter than this are refused, LUFS.
pub const SILENCE_LUFS: f64 = -50.0;

/// Why an excerpt is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    /// Quieter than [`SILENCE_LUFS`], or silent for more than half of its 64 ms frames.
    Silent,
    /// Runs of full-scale samples: the source was recorded or rendered too loud.
    Clipped,
}

/// Brings an excerpt to [`TARGET_LUFS`] within [`PEAK_LIMIT`]; returns the gain in dB.
///
/// # Errors
/// (In the inner result) why the excerpt is not used.
pub fn level(samples: &mut [f32]) -> std::result::Result<f64, Refusal> {
    let loudness = lufs(&[samples], SAMPLE_RATE_HZ);
    let quiet = samples.chunks(1024).filter(|c| peak(c) < 1e-3).count();
    if loudness < SILENCE_LUFS || 2 * quiet > samples.len().div_ceil(1024) {
        return Err(Refusal::Silent);
    }
    if longest_flat_top(samples) >= 8 {
        return Err(Refusal::Clipped);
    }
    let gain = 10f64.powf((TARGET_LUFS - loudness) / 20.0).min(f64::from(PEAK_LIMIT / peak(samples)));
    samples.iter_mut().for_each(|x| *x *= gain as f32);
    Ok(20.0 * gain.log10())
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

/// Writes a clip as 16-bit mono WAV, creating its folder.
///
/// # Errors
/// If the system refuses.
pub fn store(path: &Path, samples: Vec<f32>) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(crate::Error::io(dir, "created"))?;
    }
    Ok(write_wav(path, &Clip { samples, sample_rate_hz: SAMPLE_RATE_HZ }, SampleFormat::Int16)?)
}

/// Whether a whole clip lies at `path` already: a 16-bit mono WAV of [`CLIP_SAMPLES`] has a known size.
pub fn is_stored(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.len() == 44 + 2 * CLIP_SAMPLES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(amplitude: f32) -> Vec<f32> {
        (0..CLIP_SAMPLES).map(|i| amplitude * (i as f32 * 0.2).sin()).collect()
    }

    #[test]
    fn clips_come_to_the_target_loudness() {
        for amplitude in [0.01, 0.3, 0.99] {
            let mut clip = tone(amplitude);
            level(&mut clip).unwrap();
            assert!((lufs(&[&clip], SAMPLE_RATE_HZ) - TARGET_LUFS).abs() < 0.01);
        }
    }

    #[test]
    fn a_click_keeps_the_peak_limit() {
        let mut clip = tone(0.01);
        clip[5000] = 0.9;
        level(&mut clip).unwrap();
        assert!(peak(&clip) <= PEAK_LIMIT + 1e-6);
    }

    #[test]
    fn silent_and_clipped_excerpts_are_refused() {
        assert_eq!(level(&mut vec![0.0; CLIP_SAMPLES]), Err(Refusal::Silent));
        let mut half = tone(0.3);
        half[30000..].fill(0.0);
        assert_eq!(level(&mut half), Err(Refusal::Silent));
        let mut clipped: Vec<f32> = tone(4.0).iter().map(|x| x.clamp(-1.0, 1.0)).collect();
        assert_eq!(level(&mut clipped), Err(Refusal::Clipped));
    }

    #[test]
    fn a_stored_clip_is_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wav/a.wav");
        assert!(!is_stored(&path));
        store(&path, tone(0.3)).unwrap();
        assert!(is_stored(&path));
    }
}
