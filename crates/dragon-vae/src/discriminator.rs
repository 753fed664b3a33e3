//! Discriminators of the adversarial stage: multi-period and multi-band complex STFT.
//! Reference: descript-audio-codec 1.0.0 (MIT), `dac/model/discriminator.py`, `MPD`, `MRD` and `Discriminator`; the path in
//! code is the path in its checkpoints.
//!
//! Differences from the reference: widths are configurable; the STFT is centred and divided by the window's sum, where the
//! reference trims frames to match the stride and scales by the window's energy; new weights start with a gain of
//! 1/√3, the expected norm of the uniform initialisation, in place of the exact norm.
//! Convolutions over (time, frequency) run as one-dimensional ones over frequency, their time taps folded into channels.

use candle_core::{Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use dragon_nn::{Conv1dSpec, conv1d, leaky_relu};
use serde::{Deserialize, Serialize};

use crate::losses::FeatureMaps;
use crate::stft::Stft;

/// Slope of the leaky rectifier below zero (DAC).
const SLOPE: f64 = 0.1;

/// Frequency bands of [`Config::fft_sizes`] discriminators, as fractions of half the sample rate (DAC).
const BANDS: [(f64, f64); 5] = [(0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)];

/// Hyperparameters of [`Discriminator`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Periods in samples, one multi-period discriminator each.
    pub periods: Vec<usize>,
    /// Widths of a multi-period discriminator's convolutions; the last keeps the rate, the others divide it by 3.
    pub period_channels: Vec<usize>,
    /// STFT windows in samples, one multi-band discriminator each.
    pub fft_sizes: Vec<usize>,
    /// Width of a multi-band discriminator.
    pub band_channels: usize,
}

impl Config {
    /// DAC's sizes.
    pub fn dac() -> Self {
        Self {
            periods: vec![2, 3, 5, 7, 11],
            period_channels: vec![32, 128, 512, 1024, 1024],
            fft_sizes: vec![2048, 1024, 512],
            band_channels: 32,
        }
    }

    /// For the embedded model on a CPU: two periods and two windows, narrow.
    pub fn tiny_music() -> Self {
        Self {
            periods: vec![2, 5],
            period_channels: vec![8, 16, 32, 64, 64],
            fft_sizes: vec![1024, 256],
            band_channels: 8,
        }
    }

    /// The smallest valid set, for tests.
    pub fn tiny() -> Self {
        Self { periods: vec![2, 3], period_channels: vec![4, 8, 8], fft_sizes: vec![64], band_channels: 4 }
    }
}

/// All discriminators together.
#[derive(Debug, Clone)]
pub struct Discriminator {
    periods: Vec<MultiPeriod>,
    bands: Vec<MultiBand>,
}

impl Discriminator {
    /// Reads the weights under `vb`: `discriminators.0 …`, the multi-period ones first.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("discriminators");
        let n = cfg.periods.len();
        let periods: Result<_> =
            cfg.periods.iter().enumerate().map(|(i, &p)| MultiPeriod::new(p, cfg, vb.pp(i))).collect();
        let bands: Result<_> =
            cfg.fft_sizes.iter().enumerate().map(|(i, &w)| MultiBand::new(w, cfg, vb.pp(n + i))).collect();
        Ok(Self { periods: periods?, bands: bands? })
    }

    /// The same with weights that take no gradient: for the generator's step, which needs that of the audio only.
    pub fn frozen(&self) -> Self {
        let frozen = |convs: &[NormConv]| convs.iter().map(NormConv::frozen).collect();
        let periods = self.periods.iter().map(|d| MultiPeriod {
            period: d.period,
            convs: frozen(&d.convs),
            conv_post: d.conv_post.frozen(),
        });
        let bands = self.bands.iter().map(|d| MultiBand {
            stft: d.stft,
            band_convs: d.band_convs.iter().map(|convs| frozen(convs)).collect(),
            conv_post: d.conv_post.frozen(),
        });
        Self { periods: periods.collect(), bands: bands.collect() }
    }

    /// Feature maps, score maps last.
    ///
    /// Each row is first brought to mean 0 and peak 0.8, as in DAC: loudness is the reconstruction losses' business.
    ///
    /// # Shapes
    /// - `audio`: `[B, samples]`, longer than half the longest window.
    ///
    /// # Errors
    /// If the audio is too short.
    pub fn forward(&self, audio: &Tensor) -> Result<FeatureMaps> {
        let audio = audio.broadcast_sub(&audio.mean_keepdim(1)?)?;
        let peak = (audio.abs()?.max_keepdim(1)? + 1e-9)?;
        let audio = (audio.broadcast_div(&peak)? * 0.8)?;
        let mut maps = Vec::new();
        for d in &self.periods {
            maps.push(d.forward(&audio)?);
        }
        for d in &self.bands {
            maps.push(d.forward(&audio)?);
        }
        Ok(maps)
    }
}

/// Looks at every `period`-th sample (HiFi-GAN, arXiv:2010.05646, as in DAC).
#[derive(Debug, Clone)]
struct MultiPeriod {
    period: usize,
    convs: Vec<NormConv>,
    conv_post: NormConv,
}

impl MultiPeriod {
    fn new(period: usize, cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let mut convs = Vec::new();
        let mut from = 1;
        for (i, &to) in cfg.period_channels.iter().enumerate() {
            convs.push(NormConv::new([to, from, 5, 1], vb.pp("convs").pp(i).pp(0))?);
            from = to;
        }
        Ok(Self { period, convs, conv_post: NormConv::new([1, from, 3, 1], vb.pp("conv_post"))? })
    }

    fn forward(&self, audio: &Tensor) -> Result<Vec<Tensor>> {
        let (batch, samples) = audio.dims2()?;
        // Reflected at the end to a whole number of periods, and a whole one more where it already is, as in DAC.
        let pad = self.period - samples % self.period;
        if samples <= pad {
            bail!("multi-period discriminator: expected more than {pad} samples, found {samples}");
        }
        let tail = audio.narrow(1, samples - 1 - pad, pad)?.contiguous()?.flip(&[1])?;
        let length = (samples + pad) / self.period;
        let mut h = Tensor::cat(&[audio, &tail], 1)?
            .reshape((batch, length, self.period))? // [B, L, period]
            .transpose(1, 2)?
            .contiguous()?
            .reshape((batch * self.period, length, 1))?; // [B*period, L, 1]
        let mut maps = Vec::new();
        for (i, conv) in self.convs.iter().enumerate() {
            let stride = if i + 1 < self.convs.len() { 3 } else { 1 };
            let (weight, bias) = conv.weight()?;
            let spec = Conv1dSpec { stride, padding: 2, ..Default::default() };
            h = leaky_relu(&conv1d(&h, &weight.squeeze(3)?, Some(bias), spec)?, SLOPE)?; // [B*period, L', C]
            maps.push(h.clone());
        }
        let (weight, bias) = self.conv_post.weight()?;
        let spec = Conv1dSpec { padding: 1, ..Default::default() };
        maps.push(conv1d(&h, &weight.squeeze(3)?, Some(bias), spec)?); // [B*period, L', 1]
        Ok(maps)
    }
}

/// Looks at bands of the complex spectrogram.
#[derive(Debug, Clone)]
struct MultiBand {
    stft: Stft,
    band_convs: Vec<Vec<NormConv>>,
    conv_post: NormConv,
}

impl MultiBand {
    /// Taps over time, taps over frequency and stride over frequency of the convolutions of one band.
    const LAYERS: [(usize, usize, usize); 5] = [(3, 9, 1), (3, 9, 2), (3, 9, 2), (3, 9, 2), (3, 3, 1)];

    fn new(window: usize, cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let width = cfg.band_channels;
        let mut band_convs = Vec::new();
        for band in 0..BANDS.len() {
            let mut convs = Vec::new();
            let mut from = 2;
            for (i, (time, frequency, _)) in Self::LAYERS.into_iter().enumerate() {
                let vb = vb.pp("band_convs").pp(band).pp(i).pp(0);
                convs.push(NormConv::new([width, from, time, frequency], vb)?);
                from = width;
            }
            band_convs.push(convs);
        }
        let conv_post = NormConv::new([1, width, 3, 3], vb.pp("conv_post"))?;
        Ok(Self { stft: Stft::quarter(window), band_convs, conv_post })
    }

    fn forward(&self, audio: &Tensor) -> Result<Vec<Tensor>> {
        let bins = self.stft.n_bins();
        let spectrum = (self.stft.complex(audio)? * (2.0 / self.stft.n_fft as f64))?; // [B, T, 2, F]
        let spectrum = spectrum.transpose(2, 3)?.contiguous()?; // [B, T, F, 2]
        let mut maps = Vec::new();
        let mut tops = Vec::new();
        for ((from, to), convs) in BANDS.into_iter().zip(&self.band_convs) {
            let (from, to) = ((from * bins as f64) as usize, (to * bins as f64) as usize);
            let mut h = spectrum.narrow(2, from, to - from)?; // [B, T, band, 2]
            for ((_, _, stride), conv) in Self::LAYERS.into_iter().zip(convs) {
                h = leaky_relu(&conv.over_time_and_frequency(&h, stride)?, SLOPE)?; // [B, T, F', C]
                maps.push(h.clone());
            }
            tops.push(h);
        }
        let h = Tensor::cat(&tops, 2)?; // [B, T, ΣF', C]
        maps.push(self.conv_post.over_time_and_frequency(&h, 1)?); // [B, T, ΣF', 1]
        Ok(maps)
    }
}

/// Weight-normed convolution with two-dimensional taps: `weight = weight_g · weight_v / |weight_v|`, norms over all but the
/// first dimension (`torch.nn.utils.weight_norm`).
#[derive(Debug, Clone)]
struct NormConv {
    weight_g: Tensor,
    weight_v: Tensor,
    bias: Tensor,
}

impl NormConv {
    fn new(shape: [usize; 4], vb: VarBuilder) -> Result<Self> {
        let fan_in = (shape[1] * shape[2] * shape[3]) as f64;
        let uniform = Init::Uniform { lo: -fan_in.powf(-0.5), up: fan_in.powf(-0.5) };
        Ok(Self {
            weight_g: vb.get_with_hints((shape[0], 1, 1, 1), "weight_g", Init::Const(3f64.powf(-0.5)))?,
            weight_v: vb.get_with_hints(&shape, "weight_v", uniform)?,
            bias: vb.get_with_hints(shape[0], "bias", uniform)?,
        })
    }

    fn frozen(&self) -> Self {
        Self { weight_g: self.weight_g.detach(), weight_v: self.weight_v.detach(), bias: self.bias.detach() }
    }

    /// Weight `[Cout, Cin, taps over time, taps over frequency]` and bias.
    fn weight(&self) -> Result<(Tensor, &Tensor)> {
        let norm = self.weight_v.sqr()?.sum_keepdim((1, 2, 3))?.sqrt()?;
        Ok((self.weight_v.broadcast_mul(&self.weight_g.div(&norm)?)?, &self.bias))
    }

    /// Convolution of `x` `[B, T, F, Cin]`, zeros around it, giving `[B, T, F', Cout]`.
    fn over_time_and_frequency(&self, x: &Tensor, stride: usize) -> Result<Tensor> {
        let (batch, frames, bins, _) = x.dims4()?;
        let (weight, bias) = self.weight()?;
        let (to, from, time, frequency) = weight.dims4()?;
        let padded = x.pad_with_zeros(1, time / 2, time / 2)?;
        let shifted: Result<Vec<_>> = (0..time).map(|dt| padded.narrow(1, dt, frames)).collect();
        let folded = Tensor::cat(&shifted?, 3)?.reshape((batch * frames, bins, time * from))?; // [B*T, F, taps*Cin]
        let weight = weight.permute((0, 2, 1, 3))?.contiguous()?.reshape((to, time * from, frequency))?;
        let spec = Conv1dSpec { stride, padding: frequency / 2, ..Default::default() };
        let y = conv1d(&folded, &weight, Some(bias), spec)?; // [B*T, F', Cout]
        let bins = y.dim(1)?;
        y.reshape((batch, frames, bins, to))
    }
}
