//! Tempo and key of a clip, estimated: does a generation play what its caption asks for?
//!
//! Both are estimates that err on real music too, so a share of right answers means something only beside the share on
//! recordings whose tempo and key are known.

use std::fmt;
use std::str::FromStr;

use crate::mel::{PadMode, Stft};

/// Names of the pitch classes, from C, as most scores spell them.
const TONICS: [&str; 12] = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"];

/// How well each pitch class fits a key, from its tonic (Temperley, "What's key for key?", 1999).
const MAJOR: [f64; 12] = [5.0, 2.0, 3.5, 2.0, 4.5, 4.0, 2.0, 4.5, 2.0, 3.5, 1.5, 4.0];
const MINOR: [f64; 12] = [5.0, 2.0, 3.5, 4.5, 2.0, 4.0, 2.0, 4.5, 3.5, 2.0, 1.5, 4.0];

/// A tonic and the kind of its third.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Pitch class, 0 (C) to 11 (B).
    pub tonic: u8,
    /// Whether the third is minor.
    pub minor: bool,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", TONICS[usize::from(self.tonic) % 12], if self.minor { "minor" } else { "major" })
    }
}

impl FromStr for Key {
    type Err = ();

    /// Reads a tonic (`A` to `G`, perhaps with `#` or `b`) and a mode; the modes of the church count by their third.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (tonic, mode) = text.trim().split_once(' ').ok_or(())?;
        let mut letters = tonic.chars();
        let natural = match letters.next().ok_or(())? {
            'C' => 0,
            'D' => 2,
            'E' => 4,
            'F' => 5,
            'G' => 7,
            'A' => 9,
            'B' => 11,
            _ => return Err(()),
        };
        let shift = match letters.as_str() {
            "" => 0,
            "#" => 1,
            "b" => 11,
            _ => return Err(()),
        };
        let minor = match mode.trim() {
            "major" | "lydian" | "mixolydian" => false,
            "minor" | "dorian" | "phrygian" => true,
            _ => return Err(()),
        };
        Ok(Key { tonic: (natural + shift) % 12, minor })
    }
}

/// The most likely key: pitch classes of spectral peaks from 80 Hz to 2 kHz, weighed by magnitude, against Temperley's
/// profiles in all 24 keys; A is 440 Hz. `None` if there is no peak.
pub fn key(samples: &[f32], sample_rate_hz: u32) -> Option<Key> {
    let n_fft = (sample_rate_hz as usize / 4).next_power_of_two().max(16); // a quarter of a second or a little more
    let bin_hz = f64::from(sample_rate_hz) / n_fft as f64;
    let mut stft = Stft::new(n_fft, n_fft, n_fft / 2, true, PadMode::Constant).ok()?;
    let mut chroma = [0.0f64; 12];
    stft.magnitudes(samples, |frame| {
        for k in 1..frame.len() - 1 {
            let (left, here, right) = (frame[k - 1], frame[k], frame[k + 1]);
            if !(here > left && here >= right) {
                continue;
            }
            // The peak of the parabola through the three logarithms.
            let [l, c, r] = [left, here, right].map(|m| (f64::from(m) + 1e-12).ln());
            let offset = (0.5 * (l - r) / (l - 2.0 * c + r - 1e-12)).clamp(-0.5, 0.5);
            let hz = (k as f64 + offset) * bin_hz;
            if (80.0..2000.0).contains(&hz) {
                let pitch = 12.0 * (hz / 440.0).log2() + 9.0; // semitones above a C
                let nearest = pitch.round();
                let in_tune = (1.0 - 2.0 * (pitch - nearest).abs()).max(0.0);
                chroma[nearest.rem_euclid(12.0) as usize] += f64::from(here) * in_tune;
            }
        }
    });
    if chroma.iter().sum::<f64>() <= 0.0 {
        return None;
    }
    let keys = (0..12u8).flat_map(|tonic| [false, true].map(|minor| Key { tonic, minor }));
    let fit = |key: &Key| {
        let profile = if key.minor { &MINOR } else { &MAJOR };
        let mean = profile.iter().sum::<f64>() / 12.0;
        let length = profile.iter().map(|p| (p - mean).powi(2)).sum::<f64>().sqrt();
        let at = |class: usize| profile[(class + 12 - usize::from(key.tonic)) % 12] - mean;
        chroma.iter().enumerate().map(|(class, weight)| weight * at(class)).sum::<f64>() / length
    };
    keys.max_by(|a, b| fit(a).total_cmp(&fit(b)))
}

/// The most likely tempo from 40 to 200 beats a minute: where the spectral flux repeats itself, with a slight preference
/// for 100. Half and double the true tempo are the usual errors. `None` without onsets, or below two seconds.
pub fn tempo_bpm(samples: &[f32], sample_rate_hz: u32) -> Option<f64> {
    let hop = sample_rate_hz as usize / 100;
    if samples.len() < 2 * sample_rate_hz as usize || hop == 0 {
        return None;
    }
    let n_fft = (hop * 3).next_power_of_two();
    let mut stft = Stft::new(n_fft, n_fft, hop, true, PadMode::Constant).ok()?;
    let mut frames: Vec<Vec<f32>> = Vec::new();
    stft.magnitudes(samples, |frame| frames.push(frame.to_vec()));
    let loudest = frames.iter().flatten().fold(0.0f32, |m, &x| m.max(x));
    if loudest <= 0.0 {
        return None;
    }
    let log = |m: f32| f64::from(100.0 * m / loudest).ln_1p();
    let flux: Vec<f64> = frames
        .windows(2)
        .map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| (log(*b) - log(*a)).max(0.0)).sum())
        .collect();
    // What stands above the mean of the second around it.
    let n = flux.len();
    let local = |i: usize| {
        let around = &flux[i.saturating_sub(50)..(i + 51).min(n)];
        (flux[i] - around.iter().sum::<f64>() / 101.0).max(0.0)
    };
    let mut onsets: Vec<f64> = (0..n).map(local).collect();
    let mean = onsets.iter().sum::<f64>() / n as f64;
    onsets.iter_mut().for_each(|x| *x -= mean);
    let energy: f64 = onsets.iter().map(|x| x * x).sum();
    if energy <= 0.0 {
        return None;
    }
    // Autocorrelation; long lags have fewer products.
    let repeats: Vec<f64> = (0..n)
        .map(|lag| {
            let sum: f64 = onsets.iter().zip(&onsets[lag..]).map(|(a, b)| a * b).sum();
            sum / energy * n as f64 / (n - lag + 50) as f64
        })
        .collect();
    let at = |lag: f64| match lag as usize {
        i if i + 2 < n => repeats[i] + lag.fract() * (repeats[i + 1] - repeats[i]),
        _ => 0.0,
    };
    let strength = |bpm: f64| {
        let beat = 60.0 * 100.0 / bpm; // frames
        let sum: f64 = [(1.0, 1.0), (2.0, 0.5), (3.0, 0.33), (4.0, 0.25), (0.5, 0.3)]
            .iter()
            .map(|(k, w)| w * at(beat * k))
            .sum();
        sum * (-0.5 * ((bpm / 100.0).log2() / 0.8).powi(2)).exp()
    };
    let bpms = (0..400).map(|i| 40.0 * 5f64.powf(f64::from(i) / 399.0));
    bpms.max_by(|a, b| strength(*a).total_cmp(&strength(*b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u32 = 16_000;

    /// Notes `(start s, MIDI pitch)`, each a decaying tone of four harmonics.
    fn play(notes: &[(f64, f64)], seconds: f64) -> Vec<f32> {
        let mut out = vec![0.0; (seconds * f64::from(RATE)) as usize];
        for &(start, pitch) in notes {
            let hz = 440.0 * ((pitch - 69.0) / 12.0).exp2();
            let first = (start * f64::from(RATE)) as usize;
            for (i, x) in out[first..].iter_mut().take(RATE as usize / 2).enumerate() {
                let t = i as f64 / f64::from(RATE);
                let tone: f64 = (1..=4)
                    .map(|h| (std::f64::consts::TAU * hz * f64::from(h) * t).sin() / f64::from(h))
                    .sum();
                *x += (0.2 * tone * (-6.0 * t).exp()) as f32;
            }
        }
        out
    }

    #[test]
    fn a_scale_with_its_chord_has_its_key() {
        for (tonic, minor, steps) in [
            (62.0, false, [0, 2, 4, 5, 7, 9, 11, 12, 7, 4, 0]),
            (57.0, true, [0, 2, 3, 5, 7, 8, 11, 12, 7, 3, 0]),
        ] {
            let notes: Vec<(f64, f64)> =
                steps.iter().enumerate().map(|(i, s)| (0.3 * i as f64, tonic + f64::from(*s))).collect();
            let found = key(&play(&notes, 4.0), RATE).unwrap();
            assert_eq!(found, Key { tonic: (tonic as u8) % 12, minor }, "{found}");
        }
        assert_eq!(key(&[0.0; 16_000], RATE), None);
    }

    #[test]
    fn regular_notes_have_their_tempo() {
        for bpm in [66.0, 96.0, 132.0] {
            let notes: Vec<(f64, f64)> = (0..)
                .map(|i| (60.0 / bpm * f64::from(i), [60.0, 67.0, 64.0, 72.0][i as usize % 4]))
                .take_while(|(t, _)| *t < 5.0)
                .collect();
            let found = tempo_bpm(&play(&notes, 5.12), RATE).unwrap();
            let octaves = (found / bpm).log2();
            assert!((octaves - octaves.round()).abs() < 0.06, "{bpm}: {found}");
        }
        assert_eq!(tempo_bpm(&[0.0; 48_000], RATE), None);
        assert_eq!(tempo_bpm(&[0.5; 1000], RATE), None);
    }

    #[test]
    fn keys_are_read_by_their_third() {
        for (text, name) in [
            ("Ab major", "Ab major"),
            ("A dorian", "A minor"),
            ("F# mixolydian", "F# major"),
            ("Db minor", "C# minor"),
        ] {
            assert_eq!(text.parse::<Key>().map(|k| k.to_string()), Ok(name.to_owned()));
        }
        for text in ["", "H major", "C", "C blues", "C## major"] {
            assert_eq!(text.parse::<Key>(), Err(()), "{text}");
        }
    }
}
