//! Loudness as fadtk measures it before DAC: audiotools 0.7.2 (MIT), whose filters are pyloudnorm's (MIT). It follows ITU-R
//! BS.1770-4 but for two things, by which it differs from [`dragon_audio::lufs`]: both filters are the audio-EQ cookbook's (Robert
//! Bristow-Johnson) at rounded frequencies, and the last block is filled up with silence.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// The least loudness that is told apart, LUFS.
const LEAST: f64 = -70.0;

/// Integrated loudness of mono samples in LUFS, at least -70. Below half a second, silence is added up to it.
pub(crate) fn loudness(samples: &[f32], sample_rate_hz: u32) -> f64 {
    let rate = f64::from(sample_rate_hz);
    let mut filters =
        [Biquad::high_shelf(4.0, FRAC_1_SQRT_2, 1500.0 / rate), Biquad::high_pass(0.5, 38.0 / rate)];
    let (size, step) = ((0.4 * rate) as usize, (0.4 * rate * 0.25) as usize);
    let n = samples.len().max((0.5 * rate) as usize);
    let mut sums = Vec::with_capacity(n + 1); // of squares, from the start
    let mut total = 0.0;
    sums.push(total);
    for i in 0..n {
        let x = f64::from(samples.get(i).copied().unwrap_or(0.0));
        let y = filters.iter_mut().fold(x, |x, filter| filter.step(x));
        total += y * y;
        sums.push(total);
    }
    let n_blocks = n.saturating_sub(size).div_ceil(step.max(1)) + 1;
    let powers =
        (0..n_blocks).map(|i| (sums[(i * step + size).min(n)] - sums[(i * step).min(n)]) / (0.4 * rate));
    let powers: Vec<f64> = powers.collect();
    let level = |power: f64| -0.691 + 10.0 * power.log10();
    let mean_above = |gate: f64| {
        let kept: Vec<f64> = powers.iter().copied().filter(|&power| level(power) > gate).collect();
        if kept.is_empty() { 0.0 } else { kept.iter().sum::<f64>() / kept.len() as f64 }
    };
    let relative = level(mean_above(LEAST)) - 10.0;
    level(mean_above(relative.max(LEAST))).max(LEAST)
}

/// Second-order filter, direct form II transposed.
struct Biquad {
    b: [f64; 3],
    a: [f64; 2],
    state: [f64; 2],
}

impl Biquad {
    fn new(b: [f64; 3], a: [f64; 3]) -> Self {
        Self { b: b.map(|b| b / a[0]), a: [a[1] / a[0], a[2] / a[0]], state: [0.0; 2] }
    }

    /// `gain_db` above the corner, which is given as a part of the sample rate.
    fn high_shelf(gain_db: f64, q: f64, corner: f64) -> Self {
        let (a, (sin, cos)) = (10f64.powf(gain_db / 40.0), (2.0 * PI * corner).sin_cos());
        let slope = a.sqrt() * sin / q; // 2 √A α
        let (up, down) = (a + 1.0, a - 1.0);
        Self::new(
            [a * (up + down * cos + slope), -2.0 * a * (down + up * cos), a * (up + down * cos - slope)],
            [up - down * cos + slope, 2.0 * (down - up * cos), up - down * cos - slope],
        )
    }

    fn high_pass(q: f64, corner: f64) -> Self {
        let (sin, cos) = (2.0 * PI * corner).sin_cos();
        let (alpha, half) = (sin / (2.0 * q), (1.0 + cos) / 2.0);
        Self::new([half, -2.0 * half, half], [1.0 + alpha, -2.0 * cos, 1.0 - alpha])
    }

    fn step(&mut self, x: f64) -> f64 {
        let y = self.b[0] * x + self.state[0];
        self.state[0] = self.b[1] * x - self.a[0] * y + self.state[1];
        self.state[1] = self.b[2] * x - self.a[1] * y;
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_near_the_standards_and_falls_with_the_level() {
        for rate in [16_000, 44_100] {
            let tone: Vec<f32> = (0..2 * rate)
                .map(|i| 0.25 * (2.0 * PI * 440.0 * f64::from(i) / f64::from(rate)).sin() as f32)
                .collect();
            let got = loudness(&tone, rate);
            // The silence in the last block counts here, and the filters are not quite the same.
            assert!((got - dragon_audio::lufs(&[&tone], rate)).abs() < 0.3, "{got}");
            let soft: Vec<f32> = tone.iter().map(|x| x * 0.1).collect();
            assert!((loudness(&soft, rate) - (got - 20.0)).abs() < 1e-4);
            // Half of it is silence, which the gates leave out.
            let mut gap = tone.clone();
            gap.resize(4 * rate as usize, 0.0);
            assert!((loudness(&gap, rate) - got).abs() < 0.5);
        }
        assert_eq!(loudness(&[0.0; 10], 44_100), LEAST);
    }
}
