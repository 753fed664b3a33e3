//! Reconstruction losses of the audio VAE, and the adversarial losses on the discriminators' outputs.
//! Reference: descript-audio-codec 1.0.0 (MIT), `dac/nn/loss.py`; its recipe: mel distance × 15, feature matching × 2,
//! adversarial × 1.
//!
//! All are pure functions of tensors. Audio is `[B, samples]` here: channels are folded into the batch by the caller.

use candle_core::{DType, Device, Result, Tensor};

use crate::stft::Stft;

/// Where the logarithm of a magnitude ends.
///
/// The logarithm hears a difference of 10 dB in a bin of near silence as well as in a loud one. DAC's limit lies so far down
/// that in rendered music, with its empty high bands, most of the loss speaks of what nobody hears.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Floor {
    /// `log10(max(x, 1e-5))`, DAC's `clamp_eps`.
    Dac,
    /// `log10(1 + x / floor)`, the floor being what a sine of this level, in dB below full scale, gives in its bin. Unlike a
    /// clamp it lets the gradient through in silence too.
    Level(f64),
}

impl Floor {
    /// What magnitudes of windows of `n_fft` samples are divided by. A sine of amplitude `a` gives `a * n_fft / 4` (Hann).
    fn unit(self, n_fft: usize) -> f64 {
        match self {
            Floor::Dac => 1.0,
            Floor::Level(db) => 10f64.powf(db / 20.0) * n_fft as f64 / 4.0,
        }
    }

    fn log10(self, x: &Tensor) -> Result<Tensor> {
        /// DAC's `clamp_eps`.
        const CLAMP_EPS: f64 = 1e-5;
        let x = match self {
            Floor::Dac => x.maximum(CLAMP_EPS)?,
            Floor::Level(_) => (x + 1.0)?,
        };
        x.log()? * std::f64::consts::LOG10_E
    }
}

/// L1 distance of log10 mel magnitudes, averaged over values and summed over resolutions
/// (DAC's `MelSpectrogramLoss` with `pow` 1 and `mag_weight` 0, which are its recipe's settings).
#[derive(Debug, Clone)]
pub struct MelLoss {
    scales: Vec<(Stft, Tensor)>,
    floor: Floor,
}

impl MelLoss {
    /// One resolution for each `(window in samples, mel bands)`, hop a quarter of the window, bands from 0 Hz to half the
    /// sample rate on Slaney's scale with unit area, as librosa has them.
    ///
    /// # Errors
    /// If the filters cannot be put on `device`.
    pub fn new(
        sample_rate_hz: u32,
        scales: &[(usize, usize)],
        floor: Floor,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let scales: Result<_> = scales
            .iter()
            .map(|&(window, n_mels)| {
                let stft = Stft::quarter(window);
                let mut filters = slaney_filters(sample_rate_hz, window, n_mels);
                if floor != Floor::Dac {
                    // Bands in units of what a sine at the floor gives at their peaks.
                    for band in filters.chunks_mut(stft.n_bins()) {
                        let peak = band.iter().copied().fold(0.0, f64::max);
                        let unit = (peak * floor.unit(window)).max(f64::MIN_POSITIVE);
                        band.iter_mut().for_each(|w| *w /= unit);
                    }
                }
                let filters = Tensor::from_vec(filters, (n_mels, stft.n_bins()), device)?.to_dtype(dtype)?;
                Ok((stft, filters))
            })
            .collect();
        Ok(Self { scales: scales?, floor })
    }

    /// The seven resolutions of DAC's recipe: windows 32 to 2048, bands 5 to 320.
    ///
    /// # Errors
    /// As [`MelLoss::new`].
    pub fn dac(sample_rate_hz: u32, floor: Floor, dtype: DType, device: &Device) -> Result<Self> {
        let scales = [(32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320)];
        Self::new(sample_rate_hz, &scales, floor, dtype, device)
    }

    /// Logarithms of the mel bands at each resolution, `[B, frames, bands]`.
    ///
    /// # Errors
    /// If the audio `[B, samples]` is too short.
    pub fn log_mels(&self, audio: &Tensor) -> Result<Vec<Tensor>> {
        let log_mel = |(stft, filters): &(Stft, Tensor)| {
            self.floor.log10(&dragon_nn::linear(&stft.magnitude(audio)?, filters, None)?) // [B, frames, bands]
        };
        self.scales.iter().map(log_mel).collect()
    }

    /// The loss, one number; 0 for equal audio.
    ///
    /// # Shapes
    /// - `estimate`, `audio`: `[B, samples]`, longer than half the longest window.
    ///
    /// # Errors
    /// If the shapes differ or the audio is too short.
    pub fn forward(&self, estimate: &Tensor, audio: &Tensor) -> Result<Tensor> {
        let mut sum = Tensor::zeros((), audio.dtype(), audio.device())?;
        for (x, y) in self.log_mels(estimate)?.iter().zip(&self.log_mels(audio)?) {
            sum = (sum + l1(x, y)?)?;
        }
        Ok(sum)
    }
}

/// Spectral convergence plus L1 distance of log10 magnitudes, summed over resolutions (Yamamoto et al. 2020,
/// arXiv:1910.11480, eq. 5 and 6, log10 in place of ln). The first term, `|X - Y| / |Y|` in the Frobenius norm of each
/// row, looks at what is loud, the second at all bins alike.
#[derive(Debug, Clone)]
pub struct StftLoss {
    scales: Vec<Stft>,
    floor: Floor,
}

impl StftLoss {
    /// One resolution for each window, in samples; hop a quarter of it.
    pub fn new(windows: &[usize], floor: Floor) -> Self {
        Self { scales: windows.iter().map(|&w| Stft::quarter(w)).collect(), floor }
    }

    /// The loss, one number; 0 for equal audio.
    ///
    /// # Shapes
    /// - `estimate`, `audio`: `[B, samples]`, longer than half the longest window.
    ///
    /// # Errors
    /// If the shapes differ or the audio is too short.
    pub fn forward(&self, estimate: &Tensor, audio: &Tensor) -> Result<Tensor> {
        // Under the root, so that the gradient is finite where both agree.
        const EPS: f64 = 1e-8;
        let norm = |x: &Tensor| (x.sqr()?.flatten_from(1)?.sum(1)? + EPS)?.sqrt(); // [B]
        let mut sum = Tensor::zeros((), audio.dtype(), audio.device())?;
        for stft in &self.scales {
            let (x, y) = (stft.magnitude(estimate)?, stft.magnitude(audio)?); // [B, frames, bins]
            // 0.5 keeps silent rows quiet: the norm that a sine at -60 dB has in one frame of 2048 samples.
            let convergence = norm(&(&x - &y)?)?.div(&(norm(&y)? + 0.5)?)?.mean_all()?;
            let level = |x: &Tensor| self.floor.log10(&(x / self.floor.unit(stft.n_fft))?);
            sum = ((sum + convergence)? + l1(&level(&x)?, &level(&y)?)?)?;
        }
        Ok(sum)
    }
}

/// Mean absolute difference of two tensors, one number.
///
/// # Errors
/// If the shapes differ.
pub fn l1(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    (x - y)?.abs()?.mean_all()
}

/// Scale-invariant signal-to-distortion ratio in dB, one for each row (Le Roux et al. 2019, arXiv:1811.02508, eq. 3),
/// means removed. Higher is better; a row of silence gives about 0.
///
/// # Shapes
/// - `estimate`, `audio`: `[B, samples]`; returns `[B]`.
///
/// # Errors
/// If the shapes differ.
pub fn si_sdr(estimate: &Tensor, audio: &Tensor) -> Result<Tensor> {
    const EPS: f64 = 1e-8;
    let centred = |x: &Tensor| x.broadcast_sub(&x.mean_keepdim(1)?);
    let (estimate, audio) = (centred(estimate)?, centred(audio)?);
    let scale = ((&estimate * &audio)?.sum_keepdim(1)? + EPS)?.div(&(audio.sqr()?.sum_keepdim(1)? + EPS)?)?; // [B, 1]
    let signal = audio.broadcast_mul(&scale)?;
    let noise = (estimate - &signal)?;
    let ratio = (signal.sqr()?.sum(1)? + EPS)?.div(&(noise.sqr()?.sum(1)? + EPS)?)?; // [B]
    ratio.log()? * (10.0 / std::f64::consts::LN_10)
}

/// Feature maps of each discriminator, its score map last.
pub type FeatureMaps = Vec<Vec<Tensor>>;

/// Least-squares loss of the discriminators: `Σ mean(D(fake)²) + mean((1 - D(real))²)`, one number.
///
/// # Errors
/// Those of tensor arithmetic.
pub fn discriminator_loss(fake: &FeatureMaps, real: &FeatureMaps) -> Result<Tensor> {
    let mut terms = Vec::new();
    for (fake, real) in fake.iter().zip(real) {
        let (Some(fake), Some(real)) = (fake.last(), real.last()) else { continue };
        terms.push((fake.sqr()?.mean_all()? + real.affine(-1.0, 1.0)?.sqr()?.mean_all()?)?);
    }
    total(&terms)
}

/// Least-squares loss of the generator: `Σ mean((1 - D(fake))²)`, one number.
///
/// # Errors
/// Those of tensor arithmetic.
pub fn generator_loss(fake: &FeatureMaps) -> Result<Tensor> {
    let terms: Result<Vec<_>> =
        fake.iter().filter_map(|f| f.last()).map(|f| f.affine(-1.0, 1.0)?.sqr()?.mean_all()).collect();
    total(&terms?)
}

/// Feature matching: L1 distance of all feature maps but the score maps, one number. `real` carries no gradient.
///
/// # Errors
/// If the maps' shapes differ.
pub fn feature_matching_loss(fake: &FeatureMaps, real: &FeatureMaps) -> Result<Tensor> {
    let mut terms = Vec::new();
    for (fake, real) in fake.iter().zip(real) {
        let inner = fake.len().saturating_sub(1);
        for (f, r) in fake.iter().zip(real).take(inner) {
            terms.push(l1(f, &r.detach())?);
        }
    }
    total(&terms)
}

fn total(terms: &[Tensor]) -> Result<Tensor> {
    Tensor::stack(terms, 0)?.sum_all()
}

/// Triangular filters on Slaney's mel scale, each of unit area over Hz, `[n_mels, n_fft / 2 + 1]` row by row
/// (`librosa.filters.mel` with its defaults).
fn slaney_filters(sample_rate_hz: u32, n_fft: usize, n_mels: usize) -> Vec<f64> {
    // Linear below 1000 Hz (15 mel), then a factor of 6.4 in 27 mel.
    let step = 6.4f64.ln() / 27.0;
    let to_mel = |hz: f64| if hz < 1000.0 { hz * 3.0 / 200.0 } else { 15.0 + (hz / 1000.0).ln() / step };
    let to_hz = |mel: f64| if mel < 15.0 { mel * 200.0 / 3.0 } else { 1000.0 * (step * (mel - 15.0)).exp() };
    let nyquist = f64::from(sample_rate_hz) / 2.0;
    let edges: Vec<f64> =
        (0..n_mels + 2).map(|i| to_hz(to_mel(nyquist) * i as f64 / (n_mels + 1) as f64)).collect();
    let bins = n_fft / 2 + 1;
    let mut filters = Vec::with_capacity(n_mels * bins);
    for edge in edges.windows(3) {
        let (low, centre, high) = (edge[0], edge[1], edge[2]);
        for bin in 0..bins {
            let hz = nyquist * bin as f64 / (bins - 1) as f64;
            let triangle = ((hz - low) / (centre - low)).min((high - hz) / (high - centre)).max(0.0);
            filters.push(triangle * 2.0 / (high - low));
        }
    }
    filters
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use dragon_nn::Rng;

    use super::*;

    fn noise(shape: (usize, usize)) -> Tensor {
        Rng::new(3).normal_tensor(shape, DType::F64, &Device::Cpu).unwrap()
    }

    fn value(x: &Tensor) -> f64 {
        x.to_scalar::<f64>().unwrap()
    }

    #[test]
    fn losses_are_zero_on_equal_input_and_positive_otherwise() {
        let (x, y) = (noise((2, 400)), (noise((2, 400)) * 0.5).unwrap());
        let mel = MelLoss::new(1000, &[(32, 5), (64, 10)], Floor::Dac, DType::F64, &Device::Cpu).unwrap();
        let stft = StftLoss::new(&[64, 32], Floor::Dac);
        assert_eq!(value(&mel.forward(&x, &x).unwrap()), 0.0);
        assert!(value(&stft.forward(&x, &x).unwrap()) < 1e-4);
        assert_eq!(value(&l1(&x, &x).unwrap()), 0.0);
        // Half the amplitude is log10(2) away at each resolution, where the floor is far.
        let distance = value(&mel.forward(&y, &x).unwrap());
        assert!((distance - 2.0 * 2f64.log10()).abs() < 1e-3, "{distance}");
        assert!(value(&stft.forward(&y, &x).unwrap()) > 2.0 * 2f64.log10());
    }

    #[test]
    fn what_lies_below_the_floor_hardly_counts() {
        // A sine at -20 dB, and noise at the given level beside it.
        let sine: Vec<f64> = (0..4000).map(|i| 0.1 * (0.7 * i as f64).sin()).collect();
        let sine = Tensor::from_vec(sine, (1, 4000), &Device::Cpu).unwrap();
        let noise = Rng::new(5).normal_tensor((1, 4000), DType::F64, &Device::Cpu).unwrap();
        let with_noise = |db: f64| (&sine + (&noise * 10f64.powf(db / 20.0)).unwrap()).unwrap();
        let distances = |floor: Floor, db: f64| {
            let mel = MelLoss::new(16_000, &[(512, 80)], floor, DType::F64, &Device::Cpu).unwrap();
            let stft = StftLoss::new(&[512], floor);
            let y = with_noise(db);
            [value(&mel.forward(&y, &sine).unwrap()), value(&stft.forward(&y, &sine).unwrap())]
        };
        for (deaf, dac) in distances(Floor::Level(-70.0), -90.0).into_iter().zip(distances(Floor::Dac, -90.0))
        {
            assert!(deaf < 0.02 && dac > 4.0 * deaf, "{deaf} {dac}");
        }
        for heard in distances(Floor::Level(-70.0), -30.0) {
            assert!(heard > 0.5, "{heard}");
        }
    }

    #[test]
    fn the_mel_loss_has_the_gradient_of_finite_differences() {
        for floor in [Floor::Dac, Floor::Level(-60.0)] {
            gradient_equals_finite_differences(floor);
        }
    }

    fn gradient_equals_finite_differences(floor: Floor) {
        let mel = MelLoss::new(1000, &[(32, 5)], floor, DType::F64, &Device::Cpu).unwrap();
        let (x, y) = (noise((1, 64)), (noise((1, 64)).cos()).unwrap());
        let var = Var::from_tensor(&x).unwrap();
        let grads = mel.forward(&var, &y).unwrap().backward().unwrap();
        let grad = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let base = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for at in [0, 7, 31, 63] {
            let moved = |by: f64| {
                let mut v = base.clone();
                v[at] += by;
                value(&mel.forward(&Tensor::from_vec(v, (1, 64), &Device::Cpu).unwrap(), &y).unwrap())
            };
            let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((grad[at] - want).abs() < 1e-6 + 1e-4 * want.abs(), "{at}: {} {want}", grad[at]);
        }
    }

    #[test]
    fn si_sdr_ignores_scale_and_counts_noise() {
        let x = noise((1, 4000));
        let other = Rng::new(9).normal_tensor((1, 4000), DType::F64, &Device::Cpu).unwrap();
        let noisy = ((&x * 3.0).unwrap() + (&other * 0.3).unwrap()).unwrap();
        let db = si_sdr(&noisy, &x).unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((db - 20.0).abs() < 0.3, "{db}");
        assert!(si_sdr(&x, &x).unwrap().to_vec1::<f64>().unwrap()[0] > 100.0);
    }

    #[test]
    fn adversarial_losses_are_zero_where_each_side_has_won() {
        let maps = |score: f64| -> FeatureMaps {
            vec![vec![noise((2, 3)), Tensor::full(score, (2, 4), &Device::Cpu).unwrap()]]
        };
        assert_eq!(value(&discriminator_loss(&maps(0.0), &maps(1.0)).unwrap()), 0.0);
        assert_eq!(value(&discriminator_loss(&maps(1.0), &maps(0.0)).unwrap()), 2.0);
        assert_eq!(value(&generator_loss(&maps(1.0)).unwrap()), 0.0);
        assert_eq!(value(&feature_matching_loss(&maps(1.0), &maps(0.0)).unwrap()), 0.0);
    }

    #[test]
    fn filters_have_unit_area() {
        let filters = slaney_filters(16_000, 2048, 80);
        let bin_hz = 16_000.0 / 2048.0;
        for row in filters.chunks(1025).skip(10) {
            assert!((row.iter().sum::<f64>() * bin_hz - 1.0).abs() < 0.1);
        }
    }
}
