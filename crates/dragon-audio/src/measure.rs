//! Numbers about a clip: peak, level, loudness, brightness.

use crate::mel::{PadMode, Stft};

/// Largest absolute sample; 0 for no samples.
pub fn peak(samples: &[f32]) -> f32 {
    samples.iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// Scales `samples` so that the largest absolute value is 1; silence stays as it is.
pub fn peak_normalize(samples: &mut [f32]) {
    let peak = peak(samples);
    if peak > 0.0 {
        samples.iter_mut().for_each(|x| *x /= peak);
    }
}

/// RMS level in dB relative to full scale (`20 log10(rms)`; a full-scale sine has -3.01); -infinity for silence.
pub fn rms_dbfs(samples: &[f32]) -> f64 {
    let power = samples.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / samples.len().max(1) as f64;
    10.0 * power.log10()
}

/// Mean over frames of the magnitude-weighted mean frequency, in Hz (`librosa.feature.spectral_centroid` with
/// 2048-sample Hann frames every 512 samples, centred, zero-padded). Silent frames are left out; 0 for silence.
pub fn spectral_centroid_hz(samples: &[f32], sample_rate_hz: u32) -> f64 {
    const N_FFT: usize = 2048;
    let mut stft = Stft::new(N_FFT, N_FFT, 512, true, PadMode::Constant).expect("these settings fit");
    let bin_hz = f64::from(sample_rate_hz) / N_FFT as f64;
    let (mut sum, mut n) = (0.0, 0usize);
    stft.magnitudes(samples, |frame| {
        let total: f64 = frame.iter().map(|&m| f64::from(m)).sum();
        if total > 1e-10 {
            sum +=
                frame.iter().enumerate().map(|(k, &m)| k as f64 * bin_hz * f64::from(m)).sum::<f64>() / total;
            n += 1;
        }
    });
    if n == 0 { 0.0 } else { sum / n as f64 }
}

/// Integrated loudness in LUFS (ITU-R BS.1770-4: K-weighting, 400 ms blocks every 100 ms, absolute gate at -70 LUFS,
/// relative gate 10 LU below); each slice is a channel with weight 1. -infinity if nothing passes the gate,
/// also for audio shorter than one block.
///
/// # Panics
/// If the channels differ in length.
pub fn lufs(channels: &[&[f32]], sample_rate_hz: u32) -> f64 {
    let rate = f64::from(sample_rate_hz);
    let n = channels.first().map_or(0, |c| c.len());
    assert!(channels.iter().all(|c| c.len() == n), "channels of different lengths");
    let (block, hop) = ((0.4 * rate).round() as usize, (0.1 * rate).round() as usize);
    if n < block || hop == 0 {
        return f64::NEG_INFINITY;
    }
    let n_blocks = 1 + (n - block) / hop;
    let mut power = vec![0.0; n_blocks];
    for channel in channels {
        let mut stages = [Biquad::high_shelf(rate), Biquad::high_pass(rate)];
        let mut sum = Vec::with_capacity(n + 1); // running sum of squares
        sum.push(0.0);
        let mut total = 0.0;
        for &x in *channel {
            let y = stages.iter_mut().fold(f64::from(x), |v, stage| stage.step(v));
            total += y * y;
            sum.push(total);
        }
        for (j, p) in power.iter_mut().enumerate() {
            *p += (sum[j * hop + block] - sum[j * hop]) / block as f64;
        }
    }
    let loudness = |p: f64| -0.691 + 10.0 * p.log10();
    let mean_above = |gate: f64| {
        let kept: Vec<f64> = power.iter().copied().filter(|&p| loudness(p) > gate).collect();
        if kept.is_empty() { 0.0 } else { kept.iter().sum::<f64>() / kept.len() as f64 }
    };
    let relative = loudness(mean_above(-70.0)) - 10.0;
    loudness(mean_above(relative.max(-70.0)))
}

/// Second-order filter, direct form II transposed.
struct Biquad {
    b: [f64; 3],
    a: [f64; 2],
    state: [f64; 2],
}

impl Biquad {
    /// First stage of K-weighting: +4 dB above about 1.7 kHz. The constants reproduce the table of BS.1770 at 48 kHz
    /// and carry it to other rates (Brecht De Man, "Evaluation of implementations of the EBU R128 loudness measurement").
    fn high_shelf(rate: f64) -> Self {
        let (f0, gain_db, q) = (1681.974450955533, 3.999843853973347, 0.7071752369554196);
        let k = (std::f64::consts::PI * f0 / rate).tan();
        let vh = 10f64.powf(gain_db / 20.0);
        let vb = vh.powf(0.4996667741545416);
        let a0 = 1.0 + k / q + k * k;
        Biquad {
            b: [(vh + vb * k / q + k * k) / a0, 2.0 * (k * k - vh) / a0, (vh - vb * k / q + k * k) / a0],
            a: [2.0 * (k * k - 1.0) / a0, (1.0 - k / q + k * k) / a0],
            state: [0.0; 2],
        }
    }

    /// Second stage of K-weighting: high-pass at about 38 Hz.
    fn high_pass(rate: f64) -> Self {
        let (f0, q) = (38.13547087602444, 0.5003270373238773);
        let k = (std::f64::consts::PI * f0 / rate).tan();
        let a0 = 1.0 + k / q + k * k;
        Biquad {
            b: [1.0, -2.0, 1.0],
            a: [2.0 * (k * k - 1.0) / a0, (1.0 - k / q + k * k) / a0],
            state: [0.0; 2],
        }
    }

    fn step(&mut self, x: f64) -> f64 {
        let y = self.b[0] * x + self.state[0];
        self.state[0] = self.b[1] * x - self.a[0] * y + self.state[1];
        self.state[1] = self.b[2] * x - self.a[1] * y;
        y
    }
}
