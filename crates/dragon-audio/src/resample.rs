//! Sample-rate conversion: band-limited, without delay, deterministic.

use rubato::audioadapter_buffers::direct::SequentialSliceOfSlices;
use rubato::{Fft, FixedSync, Resampler, WindowFunction};

use crate::error::{Error, Result};

/// Rates that audio may have, Hz.
pub(crate) const SAMPLE_RATES_HZ: std::ops::RangeInclusive<u32> = 1000..=768_000;

/// Input samples per FFT block: long enough that the filter keeps more than 95 % of the lower rate's band.
const BLOCK: usize = 2048;

/// Rates whose ratio needs longer blocks than this (44101 to 16000, say) use [`interpolate`].
const MAX_BLOCK: usize = 16384;

/// `samples` at another rate: exactly `ceil(n * to_hz / from_hz)` samples, aligned in time with the input.
/// Everything below about 95 % of the lower Nyquist frequency passes; what lies above it is removed.
///
/// # Errors
/// If a rate lies outside 1 to 768 kHz.
pub fn resample(samples: &[f32], from_hz: u32, to_hz: u32) -> Result<Vec<f32>> {
    for rate in [from_hz, to_hz] {
        if !SAMPLE_RATES_HZ.contains(&rate) {
            return Err(Error::SampleRate { found_hz: rate });
        }
    }
    if from_hz == to_hz || samples.is_empty() {
        return Ok(samples.to_vec());
    }
    let n_out = (samples.len() as u64 * u64::from(to_hz)).div_ceil(u64::from(from_hz)) as usize;
    let (from, to) = (from_hz as usize, to_hz as usize);
    let divisor = gcd(from, to);
    if from.max(to) / divisor > MAX_BLOCK {
        return Ok(interpolate(samples, from, to, n_out));
    }
    // an even number of the shortest blocks: both halves of the filter are whole samples long, so the delay that
    // the resampler takes off is exact (with 5 * 441 samples it would be half a sample off)
    let unit = from / divisor;
    let block = unit * BLOCK.div_ceil(unit).next_multiple_of(2);
    let mut resampler =
        Fft::<f32>::new_custom(from, to, block, 1, 1, WindowFunction::BlackmanHarris2, FixedSync::Both)
            .expect("the rates were checked and the block is positive");
    let input = [samples];
    let input = SequentialSliceOfSlices::new(&input, 1, samples.len()).expect("one channel of this length");
    let output = resampler
        .process_all(&input, samples.len(), None)
        .expect("the buffers have the lengths that the resampler asked for");
    let mut output = output.take_data();
    // The resampler rounds the length in floating point; ours is exact.
    output.resize(n_out, 0.0);
    Ok(output)
}

/// Windowed-sinc interpolation at exact times, for ratios of large numbers. (rubato's own takes off its delay in whole
/// output samples, which is half a sample wrong at such ratios.)
fn interpolate(samples: &[f32], from: usize, to: usize, n_out: usize) -> Vec<f32> {
    /// Zero crossings of the kernel on each side, and table entries between two of them.
    const CROSSINGS: usize = 64;
    const STEPS: usize = 1024;
    // sinc under a Blackman-Harris window, from the centre to the right end
    let kernel: Vec<f64> = (0..=CROSSINGS * STEPS + 1)
        .map(|i| {
            let x = i as f64 / STEPS as f64;
            let phase = std::f64::consts::PI * (1.0 + x / CROSSINGS as f64).min(2.0);
            let window = 0.35875 - 0.48829 * phase.cos() + 0.14128 * (2.0 * phase).cos()
                - 0.01168 * (3.0 * phase).cos();
            let y = std::f64::consts::PI * x;
            window * if x == 0.0 { 1.0 } else { y.sin() / y }
        })
        .collect();
    // 0.96 of the lower band passes; the kernel's transition lies above
    let scale = 0.96 * (to as f64 / from as f64).min(1.0);
    let half = CROSSINGS as f64 / scale; // input samples
    (0..n_out)
        .map(|m| {
            let at = m as f64 * from as f64 / to as f64;
            let first = (at - half).ceil().max(0.0) as usize;
            let last = ((at + half).floor() as usize).min(samples.len() - 1);
            let sum: f64 = (first..=last)
                .map(|k| {
                    let x = (k as f64 - at).abs() * scale * STEPS as f64;
                    let (i, part) = (x as usize, x.fract());
                    f64::from(samples[k]) * (kernel[i] + part * (kernel[i + 1] - kernel[i]))
                })
                .sum();
            (sum * scale) as f32
        })
        .collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sine(n: usize, hz: f64, rate: u32) -> Vec<f32> {
        (0..n).map(|i| (2.0 * std::f64::consts::PI * hz * i as f64 / f64::from(rate)).sin() as f32).collect()
    }

    #[test]
    fn length_is_the_ceiling_of_the_exact_ratio() {
        for (n, from, to) in
            [(44100, 44100, 16000), (1, 44100, 16000), (441, 44100, 16000), (442, 44100, 16000)]
        {
            let got = resample(&vec![0.1; n], from, to).unwrap().len();
            assert_eq!(got, (n * to as usize).div_ceil(from as usize), "{n} samples, {from} to {to} Hz");
        }
    }

    #[test]
    fn a_sine_keeps_its_phase_and_level() {
        for (from, to) in [(44100, 16000), (48000, 16000), (8000, 16000), (32000, 16000), (44101, 16000)] {
            let got = resample(&sine(from as usize, 997.0, from), from, to).unwrap();
            let want = sine(got.len(), 997.0, to);
            let worst = (500..got.len() - 500).map(|i| (got[i] - want[i]).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-3, "{from} to {to} Hz: error {worst}");
        }
    }

    #[test]
    fn a_tone_above_the_new_band_is_removed() {
        let got = resample(&sine(44100, 9000.0, 44100), 44100, 16000).unwrap();
        let worst = got[500..got.len() - 500].iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(worst < 1e-4, "alias of level {worst}");
    }

    #[test]
    fn the_pass_band_reaches_95_percent_of_the_lower_nyquist_frequency() {
        let got = resample(&sine(44100, 7600.0, 44100), 44100, 16000).unwrap();
        let worst = got[500..got.len() - 500].iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(worst > 0.95, "level {worst} at 7600 Hz");
    }

    #[test]
    fn unusable_rates_are_refused() {
        assert!(matches!(resample(&[0.0], 0, 16000), Err(Error::SampleRate { found_hz: 0 })));
    }
}
