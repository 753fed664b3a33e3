//! Windows, STFT, mel filter banks and mel spectrograms, equal to librosa's (0.11) up to rounding.

use std::sync::Arc;

use realfft::num_complex::Complex;
use realfft::{RealFftPlanner, RealToComplex};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Mel scale: how frequency maps to mel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MelScale {
    /// `2595 log10(1 + f/700)` (librosa `htk=True`, torchaudio's default).
    Htk,
    /// Linear below 1 kHz, logarithmic above (Slaney's Auditory Toolbox; librosa's default).
    Slaney,
}

/// Normalisation of the mel filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MelNorm {
    /// Triangles of height 1.
    None,
    /// Triangles of area 1 (per Hz), `2 / (f_hi - f_lo)`: librosa's default.
    Slaney,
}

/// What stands beyond the ends of the audio when frames are centred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PadMode {
    /// The audio mirrored, without repeating the edge sample (`numpy.pad(mode="reflect")`).
    Reflect,
    /// Zeros (librosa's default since 0.10).
    Constant,
}

/// Settings of a [`MelSpectrogram`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MelConfig {
    /// Samples per second of the audio.
    pub sample_rate_hz: u32,
    /// FFT length, samples.
    pub n_fft: usize,
    /// Length of the periodic Hann window, samples, at most `n_fft`; zero-padded to it on both sides.
    pub win_length: usize,
    /// Samples between frames.
    pub hop: usize,
    /// Number of mel bands.
    pub n_mels: usize,
    /// Lower end of the lowest band, Hz.
    pub f_min: f64,
    /// Upper end of the highest band, Hz, at most half the sample rate.
    pub f_max: f64,
    /// Mel scale.
    pub scale: MelScale,
    /// Filter normalisation.
    pub norm: MelNorm,
    /// Exponent of the magnitudes before the filters: 1 magnitude, 2 power.
    pub power: f64,
    /// Whether frame `i` is centred on sample `i * hop` (else it starts there).
    pub center: bool,
    /// Padding, if centred.
    pub pad: PadMode,
}

/// A mel spectrogram, linear (no logarithm taken).
#[derive(Debug, Clone, PartialEq)]
pub struct Mel {
    /// Number of mel bands.
    pub n_mels: usize,
    /// Number of frames.
    pub n_frames: usize,
    /// `[frame][mel]`, flat.
    pub data: Vec<f32>,
}

impl Mel {
    /// The bands of frame `i`.
    ///
    /// # Panics
    /// If there is no frame `i`.
    pub fn frame(&self, i: usize) -> &[f32] {
        &self.data[i * self.n_mels..(i + 1) * self.n_mels]
    }
}

/// Mel spectrograms with fixed settings; holds the FFT plan and the filters.
pub struct MelSpectrogram {
    config: MelConfig,
    stft: Stft,
    /// Per band: first bin with a positive weight, and the weights from there.
    filters: Vec<(usize, Vec<f32>)>,
}

impl MelSpectrogram {
    /// Prepares window, FFT and filters.
    ///
    /// # Errors
    /// If a length is 0, the window is longer than the FFT, or the bands leave 0 to half the sample rate.
    pub fn new(config: &MelConfig) -> Result<Self> {
        let stft = Stft::new(config.n_fft, config.win_length, config.hop, config.center, config.pad)?;
        let n_bins = config.n_fft / 2 + 1;
        let filters = mel_filterbank(config)?
            .chunks(n_bins)
            .map(|row| {
                let first = row.iter().position(|&w| w > 0.0).unwrap_or(0);
                let last = row.iter().rposition(|&w| w > 0.0).map_or(first, |i| i + 1);
                (first, row[first..last].to_vec())
            })
            .collect();
        Ok(MelSpectrogram { config: config.clone(), stft, filters })
    }

    /// The settings.
    pub fn config(&self) -> &MelConfig {
        &self.config
    }

    /// Number of frames for this many samples: `1 + n / hop` if centred, else `1 + (n - n_fft) / hop` or 0.
    pub fn n_frames(&self, n_samples: usize) -> usize {
        self.stft.n_frames(n_samples)
    }

    /// The mel spectrogram of `samples`: `filters · |STFT|^power`.
    pub fn compute(&self, samples: &[f32]) -> Mel {
        let mut stft = self.stft.clone();
        let n_mels = self.config.n_mels;
        let n_frames = stft.n_frames(samples.len());
        let mut data = Vec::with_capacity(n_frames * n_mels);
        let power = self.config.power;
        let mut raised = vec![0.0f32; self.config.n_fft / 2 + 1];
        stft.magnitudes(samples, |magnitudes| {
            for (r, &m) in raised.iter_mut().zip(magnitudes) {
                *r = match power {
                    1.0 => m,
                    2.0 => m * m,
                    p => m.powf(p as f32),
                };
            }
            for (first, weights) in &self.filters {
                data.push(weights.iter().zip(&raised[*first..]).map(|(w, m)| w * m).sum());
            }
        });
        Mel { n_mels, n_frames, data }
    }
}

/// Short-time Fourier transform with a periodic Hann window.
#[derive(Clone)]
pub(crate) struct Stft {
    n_fft: usize,
    hop: usize,
    center: bool,
    pad: PadMode,
    window: Vec<f32>,
    plan: Arc<dyn RealToComplex<f32>>,
    frame: Vec<f32>,
    spectrum: Vec<Complex<f32>>,
    scratch: Vec<Complex<f32>>,
    magnitudes: Vec<f32>,
}

impl Stft {
    pub(crate) fn new(
        n_fft: usize,
        win_length: usize,
        hop: usize,
        center: bool,
        pad: PadMode,
    ) -> Result<Self> {
        let wrong = |key, expected: &str, found: usize| Error::Setting {
            key,
            expected: expected.into(),
            found: found.to_string(),
        };
        if n_fft < 2 {
            return Err(wrong("n_fft", "at least 2", n_fft));
        }
        if win_length == 0 || win_length > n_fft {
            return Err(wrong("win_length", &format!("1 to n_fft = {n_fft}"), win_length));
        }
        if hop == 0 {
            return Err(wrong("hop", "at least 1", hop));
        }
        let mut window = vec![0.0; n_fft];
        let start = (n_fft - win_length) / 2;
        window[start..start + win_length].copy_from_slice(&hann_window(win_length, true));
        let plan = RealFftPlanner::<f32>::new().plan_fft_forward(n_fft);
        Ok(Stft {
            n_fft,
            hop,
            center,
            pad,
            window,
            frame: plan.make_input_vec(),
            spectrum: plan.make_output_vec(),
            scratch: plan.make_scratch_vec(),
            magnitudes: vec![0.0; n_fft / 2 + 1],
            plan,
        })
    }

    pub(crate) fn n_frames(&self, n_samples: usize) -> usize {
        let padded = if self.center { n_samples + 2 * (self.n_fft / 2) } else { n_samples };
        if n_samples == 0 || padded < self.n_fft { 0 } else { 1 + (padded - self.n_fft) / self.hop }
    }

    /// Calls `sink` with the magnitudes of each frame in turn, `n_fft/2 + 1` of them.
    pub(crate) fn magnitudes(&mut self, samples: &[f32], mut sink: impl FnMut(&[f32])) {
        let n = samples.len() as isize;
        for i in 0..self.n_frames(samples.len()) {
            let start = (i * self.hop) as isize - if self.center { (self.n_fft / 2) as isize } else { 0 };
            for (j, (x, w)) in self.frame.iter_mut().zip(&self.window).enumerate() {
                let at = start + j as isize;
                let sample = if (0..n).contains(&at) {
                    samples[at as usize]
                } else {
                    match self.pad {
                        PadMode::Constant => 0.0,
                        PadMode::Reflect => samples[reflect(at, n)],
                    }
                };
                *x = sample * w;
            }
            self.plan
                .process_with_scratch(&mut self.frame, &mut self.spectrum, &mut self.scratch)
                .expect("the buffers were made by the plan");
            for (m, c) in self.magnitudes.iter_mut().zip(&self.spectrum) {
                *m = c.norm();
            }
            sink(&self.magnitudes);
        }
    }
}

/// Index of `at` after mirroring at both ends, as often as it takes; `n >= 1`.
fn reflect(at: isize, n: isize) -> usize {
    if n == 1 {
        return 0;
    }
    let period = 2 * (n - 1);
    let at = at.rem_euclid(period);
    (if at < n { at } else { period - at }) as usize
}

/// Magnitudes of the STFT, `[frame][bin]` flat with `n_fft/2 + 1` bins, periodic Hann window of `win_length`.
///
/// # Errors
/// If a length is 0 or the window is longer than the FFT.
pub fn stft_magnitude(
    samples: &[f32],
    n_fft: usize,
    win_length: usize,
    hop: usize,
    pad: Option<PadMode>,
) -> Result<Vec<f32>> {
    let mut stft = Stft::new(n_fft, win_length, hop, pad.is_some(), pad.unwrap_or(PadMode::Constant))?;
    let mut out = Vec::with_capacity(stft.n_frames(samples.len()) * (n_fft / 2 + 1));
    stft.magnitudes(samples, |frame| out.extend_from_slice(frame));
    Ok(out)
}

/// Hann window of `n` points: `0.5 - 0.5 cos(2πi/n)` if periodic (for spectra), with `n - 1` if symmetric.
pub fn hann_window(n: usize, periodic: bool) -> Vec<f32> {
    let divisor = if periodic { n } else { n.saturating_sub(1).max(1) } as f64;
    (0..n).map(|i| (0.5 - 0.5 * (2.0 * std::f64::consts::PI * i as f64 / divisor).cos()) as f32).collect()
}

/// Triangular mel filters, `[n_mels][n_fft/2 + 1]` flat (`librosa.filters.mel`).
///
/// # Errors
/// If there are no bands, or they leave 0 to half the sample rate.
pub fn mel_filterbank(config: &MelConfig) -> Result<Vec<f32>> {
    let nyquist = f64::from(config.sample_rate_hz) / 2.0;
    if config.n_mels == 0 {
        return Err(Error::Setting { key: "n_mels", expected: "at least 1".into(), found: "0".into() });
    }
    if !(0.0 <= config.f_min && config.f_min < config.f_max && config.f_max <= nyquist) {
        return Err(Error::Setting {
            key: "f_min, f_max",
            expected: format!("0 <= f_min < f_max <= {nyquist} Hz, half the sample rate"),
            found: format!("{}, {}", config.f_min, config.f_max),
        });
    }
    let (lo, hi) = (hz_to_mel(config.f_min, config.scale), hz_to_mel(config.f_max, config.scale));
    let edges: Vec<f64> = (0..config.n_mels + 2)
        .map(|i| mel_to_hz(lo + (hi - lo) * i as f64 / (config.n_mels + 1) as f64, config.scale))
        .collect();
    let n_bins = config.n_fft / 2 + 1;
    let mut weights = vec![0.0f32; config.n_mels * n_bins];
    for (band, row) in weights.chunks_mut(n_bins).enumerate() {
        let [left, centre, right] = [edges[band], edges[band + 1], edges[band + 2]];
        let scale = match config.norm {
            MelNorm::None => 1.0,
            MelNorm::Slaney => 2.0 / (right - left),
        };
        for (k, w) in row.iter_mut().enumerate() {
            let f = k as f64 * f64::from(config.sample_rate_hz) / config.n_fft as f64;
            let rise = (f - left) / (centre - left);
            let fall = (right - f) / (right - centre);
            *w = (scale * rise.min(fall).max(0.0)) as f32;
        }
    }
    Ok(weights)
}

/// Slaney's scale: 200/3 Hz per mel below 1 kHz (15 mel), a factor of 6.4 per 27 mel above.
const SLANEY_HZ_PER_MEL: f64 = 200.0 / 3.0;

fn hz_to_mel(f: f64, scale: MelScale) -> f64 {
    match scale {
        MelScale::Htk => 2595.0 * (1.0 + f / 700.0).log10(),
        MelScale::Slaney if f < 1000.0 => f / SLANEY_HZ_PER_MEL,
        MelScale::Slaney => 15.0 + (f / 1000.0).ln() * 27.0 / 6.4f64.ln(),
    }
}

fn mel_to_hz(mel: f64, scale: MelScale) -> f64 {
    match scale {
        MelScale::Htk => 700.0 * (10f64.powf(mel / 2595.0) - 1.0),
        MelScale::Slaney if mel < 15.0 => mel * SLANEY_HZ_PER_MEL,
        MelScale::Slaney => 1000.0 * ((mel - 15.0) * 6.4f64.ln() / 27.0).exp(),
    }
}
