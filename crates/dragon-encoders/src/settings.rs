//! The embedding settings MA, FADTK and VAE (paper B.2, C.2), and frames for codecs: how a song becomes the windows that an
//! encoder embeds.
//!
//! Pure functions from samples to windows, for an encoder with any window length `W`. Nothing is random: the same
//! samples give the same windows bit for bit.
//!
//! | setting | windows | peak normalisation | used for |
//! | --- | --- | --- | --- |
//! | MA | `n_windows` of `W`, from start to end at equal distances, and the whole song squeezed into `W` | each window | aesthetics, CLAP score, Vendi, references made of text |
//! | FADTK | `W` every `hop_s` | the song, once | Fréchet distances to audio |
//! | VAE | none: each latent frame of the song is an embedding | none | Fréchet distances to latents |
//! | frames | what the encoder's own reference program cuts a song into, see [`crate::codec`] and [`crate::vggish`] | none | Fréchet distances to audio by EnCodec, DAC, VGGish |
//!
//! Rules that the paper leaves open, decided here:
//! - *Peak normalisation* divides by the largest magnitude. Audio that never exceeds [`SILENCE`] stays as it is.
//! - *Start positions* of MA are `round(i (N - W) / (n_windows - 1))`, halves upwards; a single window starts at 0.
//! - *The end* under FADTK is [`Tail`]: `whole_windows` (ours) ends with the last window that fits; `zero_padded` is what
//!   the fadtk program does: a window starts at every hop inside the song, and what lies beyond its end is zeros.
//! - *Short clips*: a clip shorter than `W` is repeated from its start until it fills `W` (as musicnn was trained and as
//!   LAION-CLAP reads short clips); one shorter than `W/10` is an error.
//! - *Silence* is legal input.

use serde::{Deserialize, Serialize};

use crate::encoder::Embeddings;
use crate::error::{Error, Result};

/// Peaks at or below this (-120 dB of full scale, one 30th of the step of 16-bit audio) are silence, which has no level
/// to normalise.
pub const SILENCE: f32 = 1e-6;

/// How a song becomes embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Setting {
    /// Windows at equal distances from start to end, each peak-normalised; and the whole song as one.
    Ma {
        /// Number of windows (paper: 8).
        n_windows: usize,
        /// Whether the song, resampled to the length of one window, is added as the last (paper: yes).
        whole: bool,
    },
    /// Windows at a fixed hop over the song, which is peak-normalised once.
    Fadtk {
        /// Distance between window starts, seconds (paper: 1).
        hop_s: f64,
        /// What happens at the end of the song.
        tail: Tail,
    },
    /// Each frame of the song's VAE latents is an embedding.
    Vae {
        /// Use the generated latents themselves; otherwise decode to audio and encode again (paper).
        latent_direct: bool,
    },
    /// Each latent frame of a codec is an embedding, or each 0.96 s for VGGish: the song cut as fadtk cuts it for the encoder.
    Frames,
}

impl Setting {
    /// The paper's MA setting: 8 windows and the whole song.
    pub const MA: Setting = Setting::Ma { n_windows: 8, whole: true };
}

/// The end of the song under [`Setting::Fadtk`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tail {
    /// The last window is the last that fits into the song: 23 windows of 10 s at hop 1 s in 32 s.
    WholeWindows,
    /// A window starts at every hop inside the song, zeros beyond its end (the fadtk program): 32 windows in 32 s.
    ZeroPadded,
}

/// The windows of `samples` under `setting`, each of `window` samples, ready for the encoder.
///
/// # Errors
/// If the clip is too short or not finite, a number of the setting is out of range, or the setting is VAE or frames, which have
/// no windows.
pub fn windows(
    samples: &[f32],
    window: usize,
    sample_rate_hz: u32,
    setting: &Setting,
) -> Result<Vec<Vec<f32>>> {
    let song = checked(samples, window)?;
    let cut = |start: usize| {
        let end = song.len().min(start + window);
        let mut out = song[start..end].to_vec();
        out.resize(window, 0.0);
        out
    };
    match *setting {
        Setting::Ma { n_windows, whole } => {
            let mut out: Vec<Vec<f32>> =
                uniform_starts(song.len(), window, n_windows)?.into_iter().map(cut).collect();
            if whole {
                out.push(squeeze(&song, window));
            }
            for window in &mut out {
                peak_normalize(window);
            }
            Ok(out)
        }
        Setting::Fadtk { hop_s, tail } => {
            let hop = hop_samples(hop_s, sample_rate_hz, 1)?;
            let gain = peak_gain(&song);
            let mut out: Vec<Vec<f32>> =
                hop_starts(song.len(), window, hop, tail).into_iter().map(cut).collect();
            for x in out.iter_mut().flatten() {
                *x *= gain;
            }
            Ok(out)
        }
        Setting::Vae { .. } | Setting::Frames => Err(no_windows(setting)),
    }
}

/// The error of an encoder of windows that is asked for a setting without them.
pub(crate) fn no_windows(setting: &Setting) -> Error {
    Error::Setting {
        key: "setting",
        expected: "`ma` or `fadtk` for an encoder of windows".into(),
        found: format!("{setting:?}, which needs the latents of a VAE or codec"),
    }
}

/// The clip, repeated from its start up to `window` samples if it is shorter.
///
/// # Errors
/// If it is shorter than a tenth of a window, or a sample is NaN or infinite.
pub fn checked(samples: &[f32], window: usize) -> Result<std::borrow::Cow<'_, [f32]>> {
    let least = window.div_ceil(10).max(1);
    if samples.len() < least {
        return Err(Error::TooShort { expected: least, found: samples.len(), window });
    }
    finite(samples)?;
    Ok(if samples.len() < window {
        samples.iter().copied().cycle().take(window).collect::<Vec<f32>>().into()
    } else {
        samples.into()
    })
}

/// # Errors
/// If a sample is NaN or infinite.
pub(crate) fn finite(samples: &[f32]) -> Result<()> {
    match samples.iter().enumerate().find(|(_, x)| !x.is_finite()) {
        Some((index, &value)) => Err(Error::NotFinite { index, value }),
        None => Ok(()),
    }
}

/// Starts of `n_windows` windows spread over `n_samples >= window` samples: the first at 0, the last at the end.
///
/// # Errors
/// If `n_windows` is 0.
pub fn uniform_starts(n_samples: usize, window: usize, n_windows: usize) -> Result<Vec<usize>> {
    if n_windows == 0 {
        return Err(Error::Setting { key: "n_windows", expected: "at least 1".into(), found: "0".into() });
    }
    let (span, gaps) = (n_samples - window, (n_windows - 1).max(1));
    Ok((0..n_windows).map(|i| (2 * i * span + gaps) / (2 * gaps)).collect())
}

/// Starts of windows every `hop` samples over `n_samples >= window` samples.
pub fn hop_starts(n_samples: usize, window: usize, hop: usize, tail: Tail) -> Vec<usize> {
    let end = match tail {
        Tail::WholeWindows => n_samples - window + 1,
        Tail::ZeroPadded => n_samples,
    };
    (0..end).step_by(hop).collect()
}

/// A hop in samples, rounded to the nearest positive multiple of `grid` (halves upwards).
///
/// # Errors
/// If it is not positive and finite.
pub fn hop_samples(hop_s: f64, sample_rate_hz: u32, grid: usize) -> Result<usize> {
    if !(hop_s > 0.0 && hop_s.is_finite()) {
        let expected = "a positive number of seconds".into();
        return Err(Error::Setting { key: "hop_s", expected, found: hop_s.to_string() });
    }
    let steps = (hop_s * f64::from(sample_rate_hz) / grid as f64 + 0.5).floor();
    Ok(steps.clamp(1.0, 1e12) as usize * grid)
}

/// The factor that brings the largest magnitude to 1; 1 for silence.
pub fn peak_gain(samples: &[f32]) -> f32 {
    let peak = samples.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
    if peak > SILENCE { 1.0 / peak } else { 1.0 }
}

/// Scales `samples` to a largest magnitude of 1; silence stays as it is.
pub fn peak_normalize(samples: &mut [f32]) {
    let gain = peak_gain(samples);
    for x in samples {
        *x *= gain;
    }
}

/// `samples` resampled to exactly `n_out <= samples.len()` samples: the song played faster, as MA's last window.
///
/// Output `i` lies at input position `(i + 1/2) N / n_out - 1/2`, so both ends agree. Kaiser-windowed sinc (beta 9, 16 zero
/// crossings a side, cutoff at 0.95 of the new Nyquist frequency), normalised to unit gain at 0 Hz; the song is
/// extended by its first and last sample. The paper names no filter.
pub fn squeeze(samples: &[f32], n_out: usize) -> Vec<f32> {
    const BETA: f64 = 9.0;
    const CROSSINGS: f64 = 16.0;
    if samples.len() == n_out {
        return samples.to_vec();
    }
    let step = samples.len() as f64 / n_out as f64;
    let cutoff = 0.95 / step.max(1.0); // relative to the input's Nyquist frequency
    let reach = CROSSINGS / cutoff;
    // The kernel in a table, read with linear interpolation: error below 1e-6.
    const TABLE: usize = 1 << 14;
    let kernel: Vec<f64> = (0..=TABLE + 1)
        .map(|i| {
            let u = i as f64 / TABLE as f64; // 0 to 1: distance over reach
            let x = std::f64::consts::PI * u * CROSSINGS;
            let sinc = if x == 0.0 { 1.0 } else { x.sin() / x };
            sinc * bessel_i0(BETA * (1.0 - u * u).max(0.0).sqrt())
        })
        .collect();
    let last = samples.len() as isize - 1;
    (0..n_out)
        .map(|i| {
            let at = (i as f64 + 0.5) * step - 0.5;
            let (mut sum, mut weight) = (0.0, 0.0);
            for j in (at - reach).ceil() as isize..=(at + reach).floor() as isize {
                let u = (j as f64 - at).abs() / reach * TABLE as f64;
                let k = u as usize;
                let w = kernel[k] + (kernel[k + 1] - kernel[k]) * (u - k as f64);
                sum += w * f64::from(samples[j.clamp(0, last) as usize]);
                weight += w;
            }
            (sum / weight) as f32
        })
        .collect()
}

/// Modified Bessel function of the first kind, order 0 (power series).
fn bessel_i0(x: f64) -> f64 {
    let (mut sum, mut term, mut k) = (1.0, 1.0, 1.0);
    while term > 1e-17 * sum {
        term *= (x / 2.0 / k) * (x / 2.0 / k);
        sum += term;
        k += 1.0;
    }
    sum
}

/// The VAE setting's embeddings of a batch: one row of `C` values per latent frame, one [`Embeddings`] per song.
///
/// Which latents to pass is [`Setting::Vae`]'s `latent_direct`: the generated ones, or those of their decoded audio.
///
/// # Shapes
/// - `latents`: `[B, C, T]`.
///
/// # Errors
/// If `latents` is not rank 3.
pub fn latent_rows(latents: &candle_core::Tensor) -> Result<Vec<Embeddings>> {
    let (songs, dim, n) = latents.dims3()?;
    let rows = latents.to_dtype(candle_core::DType::F32)?.transpose(1, 2)?.contiguous()?; // [B, T, C]
    let data = rows.flatten_all()?.to_vec1::<f32>()?;
    Ok((0..songs)
        .map(|song| Embeddings { n, dim, data: data[song * n * dim..(song + 1) * n * dim].to_vec() })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize) -> Vec<f32> {
        let mut state = 1u32;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect()
    }

    #[test]
    fn ma_spreads_windows_from_the_first_sample_to_the_last() {
        assert_eq!(uniform_starts(320, 100, 8).unwrap(), [0, 31, 63, 94, 126, 157, 189, 220]);
        assert_eq!(uniform_starts(100, 100, 3).unwrap(), [0, 0, 0]);
        assert_eq!(uniform_starts(500, 100, 1).unwrap(), [0]);
        assert!(uniform_starts(500, 100, 0).is_err());
    }

    #[test]
    fn fadtk_gives_23_whole_windows_in_32_seconds_and_32_padded_ones() {
        let starts = hop_starts(32 * 48, 10 * 48, 48, Tail::WholeWindows);
        assert_eq!((starts.len(), starts[22]), (23, 22 * 48));
        assert_eq!(hop_starts(32 * 48, 10 * 48, 48, Tail::ZeroPadded).len(), 32);
        let out =
            windows(&noise(320), 100, 10, &Setting::Fadtk { hop_s: 1.0, tail: Tail::ZeroPadded }).unwrap();
        assert_eq!(out.len(), 32);
        assert!(out[31][..10].iter().all(|&x| x != 0.0) && out[31][10..].iter().all(|&x| x == 0.0));
    }

    #[test]
    fn ma_normalises_each_window_and_fadtk_the_song() {
        let mut song = noise(1000);
        song[..500].iter_mut().for_each(|x| *x *= 0.1);
        let peak = |w: &Vec<f32>| w.iter().fold(0.0f32, |p, x| p.max(x.abs()));
        let ma = windows(&song, 100, 100, &Setting::MA).unwrap();
        assert_eq!(ma.len(), 9);
        assert!(ma.iter().all(|w| w.len() == 100 && (peak(w) - 1.0).abs() < 1e-6));
        let fadtk =
            windows(&song, 100, 100, &Setting::Fadtk { hop_s: 1.0, tail: Tail::WholeWindows }).unwrap();
        assert_eq!(fadtk.len(), 10);
        assert!(peak(&fadtk[0]) < 0.11 && fadtk.iter().map(peak).fold(0.0, f32::max) == 1.0);
    }

    #[test]
    fn short_clips_repeat_and_shorter_ones_are_refused() {
        let song = noise(30);
        let out = windows(&song, 100, 100, &Setting::Fadtk { hop_s: 1.0, tail: Tail::WholeWindows }).unwrap();
        assert_eq!(out.len(), 1);
        assert!((0..70).all(|i| out[0][i] == out[0][i + 30]));
        let error = windows(&song[..9], 100, 100, &Setting::MA).unwrap_err().to_string();
        assert_eq!(
            error,
            "the clip is too short: expected at least 10 samples (a tenth of the encoder's window of 100), found 9\nhint: leave it out, or use a longer recording"
        );
    }

    #[test]
    fn silence_is_legal_and_nan_is_not() {
        let out = windows(&[0.0; 300], 100, 100, &Setting::MA).unwrap();
        assert!(out.iter().flatten().all(|&x| x == 0.0));
        let mut song = noise(300);
        song[7] = f32::NAN;
        let error = windows(&song, 100, 100, &Setting::MA).unwrap_err().to_string();
        assert_eq!(error, "sample 7 is NaN, expected finite audio");
    }

    #[test]
    fn squeezing_keeps_slow_waves_and_removes_what_does_not_fit() {
        let wave = |cycles: f64, n: usize| -> Vec<f32> {
            (0..n)
                .map(|i| (std::f64::consts::TAU * cycles * (i as f64 + 0.5) / n as f64).sin() as f32)
                .collect()
        };
        let (slow, want) = (squeeze(&wave(50.0, 5000), 2000), wave(50.0, 2000));
        assert!((100..1900).all(|i| (slow[i] - want[i]).abs() < 1e-4));
        let fast = squeeze(&wave(1200.0, 5000), 2000);
        assert!((100..1900).all(|i| fast[i].abs() < 1e-3));
        assert_eq!(squeeze(&want, 2000), want);
    }

    #[test]
    fn the_hop_is_rounded_to_the_grid() {
        assert_eq!(hop_samples(0.256, 16000, 256).unwrap(), 4096);
        assert_eq!(hop_samples(1.0, 16000, 256).unwrap(), 63 * 256);
        assert_eq!(hop_samples(1e-9, 16000, 256).unwrap(), 256);
        assert!(hop_samples(f64::NAN, 16000, 1).is_err() && hop_samples(0.0, 16000, 1).is_err());
    }

    #[test]
    fn settings_read_from_json_and_refuse_unknown_keys() {
        let read = |s: &str| serde_json::from_str::<Setting>(s);
        assert_eq!(read(r#"{"kind":"ma","n_windows":8,"whole":true}"#).unwrap(), Setting::MA);
        let fadtk = Setting::Fadtk { hop_s: 0.256, tail: Tail::WholeWindows };
        assert_eq!(read(r#"{"kind":"fadtk","hop_s":0.256,"tail":"whole_windows"}"#).unwrap(), fadtk);
        assert!(read(r#"{"kind":"vae","latent_direct":true,"hop":1}"#).is_err());
    }

    #[test]
    fn latent_frames_become_rows() {
        let latents = candle_core::Tensor::arange(0f32, 12.0, &candle_core::Device::Cpu).unwrap();
        let songs = latent_rows(&latents.reshape((2, 2, 3)).unwrap()).unwrap();
        assert_eq!((songs.len(), songs[0].n, songs[0].dim), (2, 3, 2));
        assert_eq!(songs[1].data, [6.0, 9.0, 7.0, 10.0, 8.0, 11.0]);
        assert_eq!(songs[0].mean(), [1.0, 4.0]);
    }
}
