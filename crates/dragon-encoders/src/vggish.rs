//! VGGish (Hershey et al. 2017, arXiv:1609.09430), the first encoder of Fréchet audio distances. Reference: torchvggish 0.2
//! (Apache-2.0), whose file `vggish-10086976.pth` holds the weights of Google's model; the path in code is the path in it.
//!
//! Audio of 16 kHz becomes a log-mel spectrogram (64 bands from 125 to 7500 Hz, frames of 25 ms every 10 ms, `ln(mel + 0.01)`);
//! the network reads 96 frames, 0.96 s of it, and gives 128 numbers.
//!
//! As the program fadtk (1.1.0) has it, the embedding is what the last layer gives before its ReLU, without the PCA and
//! rounding to 8 bits of the AudioSet release. Under [`Setting::Frames`] a song is cut as fadtk and the reference cut it: one
//! after the other, what is left at the end is dropped, and a song below one second gets zeros up to it. Under MA and FADTK each
//! window is normalised as there.
//!
//! Differences from the reference: none known. As there, the spectrogram is computed in f64, and rounded at its end. Golden
//! tests below.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Module, Result as ModelResult, Tensor};
use candle_nn::VarBuilder;
use dragon_nn::{Checkpoint, Conv1dSpec, Linear, Loader, conv1d, leaky_relu};
use realfft::{RealFftPlanner, RealToComplex};

use crate::encoder::{AudioEncoder, Embeddings};
use crate::error::{Error, Result};
use crate::settings::{self, Setting};

/// Sample rate of the audio, Hz.
pub const SAMPLE_RATE_HZ: u32 = 16_000;
/// Frames that the network reads.
pub const N_FRAMES: usize = 96;
/// Mel bands.
pub const N_MELS: usize = 64;
/// Length of an embedding.
pub const DIM: usize = 128;
/// Samples between frames.
const HOP: usize = 160;
/// Samples of a frame.
const FRAME: usize = 400;
/// Samples from the first of a window's first frame to the last of its last: 0.975 s.
pub const WINDOW_SAMPLES: usize = (N_FRAMES - 1) * HOP + FRAME;
/// Length of the Fourier transform; frames are filled up with zeros.
const N_FFT: usize = 512;
/// Windows that pass the convolutions at a time, and the dense layers.
const BATCH: (usize, usize) = (8, 256);
/// Numbers that each window becomes before the dense layers, and their width in the published model.
const SIZES: Sizes = Sizes { channels: [64, 128, 256, 256, 512, 512], dense: 4096 };

/// Widths of the layers; tests have narrower ones.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    channels: [usize; 6],
    dense: usize,
}

/// The encoder; inference only.
pub struct Vggish {
    log_mel: LogMel,
    network: Network,
    device: Device,
}

impl Vggish {
    /// Reads torchvggish's file.
    ///
    /// # Errors
    /// If it is missing, damaged or of another model: all tensors that do not fit are listed.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::of_sizes(path.as_ref(), SIZES, device)
    }

    fn of_sizes(path: &Path, sizes: Sizes, device: &Device) -> Result<Self> {
        let checkpoint = Checkpoint::open(path).map_err(Box::new)?;
        let loader = Loader::same_names(checkpoint);
        let network = Network::new(sizes, loader.builder(DType::F32, device))?;
        // Some copies hold the parameters of the PCA beside the network.
        loader.finish(|name| name.starts_with("pproc.")).map_err(Box::new)?;
        Ok(Self { log_mel: LogMel::new(), network, device: device.clone() })
    }

    /// `ln(mel + 0.01)` of audio at 16 kHz: `[T, 64]`, flat, with `T = 1 + (n_samples - 400) / 160` frames.
    pub fn log_mel(&self, samples: &[f32]) -> Vec<f32> {
        self.log_mel.compute(samples)
    }

    /// Embeddings of spectrograms of 96 frames, `[N, 96, 64]` flat.
    fn embed_log_mels(&self, log_mels: &[f32]) -> Result<Vec<Vec<f32>>> {
        const EXAMPLE: usize = N_FRAMES * N_MELS;
        let mut out = Vec::new();
        for part in log_mels.chunks(BATCH.1 * EXAMPLE) {
            let flat = part.chunks(BATCH.0 * EXAMPLE).map(|part| {
                let shape = (part.len() / EXAMPLE, N_FRAMES, N_MELS, 1);
                self.network.convolved(&Tensor::from_slice(part, shape, &self.device)?)
            });
            let flat = Tensor::cat(&flat.collect::<ModelResult<Vec<_>>>()?, 0)?;
            out.extend(self.network.dense(&flat)?.to_vec2::<f32>()?);
        }
        Ok(out)
    }

    /// The windows of a song one after the other, as fadtk cuts it.
    fn frames(&self, samples: &[f32]) -> Result<Embeddings> {
        settings::finite(samples)?;
        if samples.is_empty() {
            return Err(Error::TooShort { expected: 1, found: 0, window: WINDOW_SAMPLES });
        }
        let mut song = samples.to_vec();
        song.resize(song.len().max(SAMPLE_RATE_HZ as usize), 0.0);
        let log_mel = self.log_mel(&song);
        let example = N_FRAMES * N_MELS;
        Embeddings::from_rows(&self.embed_log_mels(&log_mel[..log_mel.len() / example * example])?)
    }
}

impl AudioEncoder for Vggish {
    fn id(&self) -> &str {
        "vggish"
    }

    fn sample_rate_hz(&self) -> u32 {
        SAMPLE_RATE_HZ
    }

    fn window_samples(&self) -> usize {
        WINDOW_SAMPLES
    }

    fn dim(&self) -> usize {
        DIM
    }

    fn embed_windows(&self, windows: &[&[f32]]) -> Result<Vec<Vec<f32>>> {
        if let Some(window) = windows.iter().find(|window| window.len() != WINDOW_SAMPLES) {
            let (expected, found) = (format!("{WINDOW_SAMPLES} samples"), window.len().to_string());
            return Err(Error::Setting { key: "window", expected, found });
        }
        let log_mels: Vec<f32> = windows.iter().flat_map(|window| self.log_mel(window)).collect();
        self.embed_log_mels(&log_mels)
    }

    fn embed_clip(&self, samples: &[f32], setting: &Setting) -> Result<Embeddings> {
        if *setting == Setting::Frames {
            return self.frames(samples);
        }
        let windows = settings::windows(samples, WINDOW_SAMPLES, SAMPLE_RATE_HZ, setting)?;
        let views: Vec<&[f32]> = windows.iter().map(Vec::as_slice).collect();
        Embeddings::from_rows(&self.embed_windows(&views)?)
    }
}

/// Six convolutions over time and frequency, and three dense layers.
struct Network {
    convolutions: Vec<Conv>,
    dense: [Linear; 3],
}

/// Number of each convolution in the file's list of layers, and whether pooling follows.
const LAYERS: [(usize, bool); 6] = [(0, true), (3, true), (6, false), (8, true), (11, false), (13, true)];

impl Network {
    fn new(sizes: Sizes, vb: VarBuilder) -> ModelResult<Self> {
        let mut from = 1;
        let mut convolutions = Vec::new();
        for ((layer, _), to) in LAYERS.into_iter().zip(sizes.channels) {
            convolutions.push(Conv::new(from, to, vb.pp("features").pp(layer))?);
            from = to;
        }
        // Four poolings leave 6 frames of 4 bands.
        let flat = N_FRAMES / 16 * N_MELS / 16 * from;
        let vb = vb.pp("embeddings");
        let dense = [
            Linear::new(flat, sizes.dense, vb.pp(0))?,
            Linear::new(sizes.dense, sizes.dense, vb.pp(2))?,
            Linear::new(sizes.dense, DIM, vb.pp(4))?,
        ];
        Ok(Self { convolutions, dense })
    }

    /// Log-mel spectrograms `[B, 96, 64, 1]` to what the dense layers read, `[B, 12288]`.
    fn convolved(&self, x: &Tensor) -> ModelResult<Tensor> {
        let mut h = x.clone(); // [B, T, F, C]
        for (conv, (_, pooled)) in self.convolutions.iter().zip(LAYERS) {
            h = relu(&conv.forward(&h)?)?;
            if pooled {
                h = max_pool(&h)?; // [B, T/2, F/2, C]
            }
        }
        h.flatten_from(1) // [B, T*F*C], the order of the reference
    }

    /// To embeddings `[B, 128]`.
    fn dense(&self, x: &Tensor) -> ModelResult<Tensor> {
        let h = relu(&self.dense[0].forward(x)?)?;
        let h = relu(&self.dense[1].forward(&h)?)?;
        self.dense[2].forward(&h) // [B, 128]
    }
}

/// The front end of VGGish (torchvggish 0.2, `mel_features.py`), in f64: magnitudes of frames under a periodic Hann window,
/// triangles that are straight in mel (HTK's scale) and not in Hz.
struct LogMel {
    window: Vec<f64>,
    /// For each band, its first bin and the weights from there.
    bands: Vec<(usize, Vec<f64>)>,
    plan: Arc<dyn RealToComplex<f64>>,
}

impl LogMel {
    fn new() -> Self {
        let turn = 2.0 * std::f64::consts::PI / FRAME as f64;
        let mel = |hz: f64| 1127.0 * (1.0 + hz / 700.0).ln();
        let (low, high) = (mel(125.0), mel(7500.0));
        let edge = |i: usize| low + (high - low) * i as f64 / (N_MELS + 1) as f64;
        let band = |i: usize| {
            let [left, centre, right] = [edge(i), edge(i + 1), edge(i + 2)];
            let weight = |bin: usize| {
                let at = mel(bin as f64 * f64::from(SAMPLE_RATE_HZ) / N_FFT as f64);
                ((at - left) / (centre - left)).min((right - at) / (right - centre)).max(0.0)
            };
            // Bin 0 has no weight, as the lowest band begins above it.
            let weights: Vec<f64> = (0..=N_FFT / 2).map(weight).collect();
            let first = weights.iter().position(|&w| w > 0.0).unwrap_or(0);
            let end = weights.iter().rposition(|&w| w > 0.0).map_or(first, |last| last + 1);
            (first, weights[first..end].to_vec())
        };
        Self {
            window: (0..FRAME).map(|i| 0.5 - 0.5 * (turn * i as f64).cos()).collect(),
            bands: (0..N_MELS).map(band).collect(),
            plan: RealFftPlanner::new().plan_fft_forward(N_FFT),
        }
    }

    fn compute(&self, samples: &[f32]) -> Vec<f32> {
        let n_frames = if samples.len() < FRAME { 0 } else { 1 + (samples.len() - FRAME) / HOP };
        let mut out = Vec::with_capacity(n_frames * N_MELS);
        let (mut frame, mut spectrum) = (self.plan.make_input_vec(), self.plan.make_output_vec());
        for i in 0..n_frames {
            frame.fill(0.0);
            for ((x, &sample), w) in frame.iter_mut().zip(&samples[i * HOP..][..FRAME]).zip(&self.window) {
                *x = f64::from(sample) * w;
            }
            self.plan.process(&mut frame, &mut spectrum).expect("the buffers were made by the plan");
            let magnitudes: Vec<f64> = spectrum.iter().map(|c| c.norm()).collect();
            for (first, weights) in &self.bands {
                let mel: f64 = weights.iter().zip(&magnitudes[*first..]).map(|(w, m)| w * m).sum();
                out.push((mel + 0.01).ln() as f32);
            }
        }
        out
    }
}

fn relu(x: &Tensor) -> ModelResult<Tensor> {
    leaky_relu(x, 0.0)
}

/// A convolution of 3 x 3 taps that keeps both lengths: three neighbouring frames side by side in the channels, then three taps
/// over the bands.
struct Conv {
    /// `[Cout, 3 Cin, 3]`.
    weight: Tensor,
    bias: Tensor,
}

impl Conv {
    fn new(from: usize, to: usize, vb: VarBuilder) -> ModelResult<Self> {
        let weight = vb.get((to, from, 3, 3), "weight")?; // [Cout, Cin, time, band]
        let weight = weight.permute((0, 2, 1, 3))?.contiguous()?.reshape((to, 3 * from, 3))?;
        Ok(Self { weight, bias: vb.get(to, "bias")? })
    }

    /// `[B, T, F, Cin]` to `[B, T, F, Cout]`.
    fn forward(&self, x: &Tensor) -> ModelResult<Tensor> {
        let (batch, frames, bands, channels) = x.dims4()?;
        let padded = x.pad_with_zeros(1, 1, 1)?; // [B, T+2, F, Cin]
        let rows = [0, 1, 2].map(|shift| padded.narrow(1, shift, frames));
        let [before, here, after] = rows;
        let h = Tensor::cat(&[before?, here?, after?], 3)?; // [B, T, F, 3 Cin]
        let h = h.reshape((batch * frames, bands, 3 * channels))?;
        let spec = Conv1dSpec { padding: 1, ..Conv1dSpec::default() };
        let h = conv1d(&h, &self.weight, Some(&self.bias), spec)?; // [B*T, F, Cout]
        h.reshape((batch, frames, bands, ()))
    }
}

/// The largest of each 2 x 2 frames and bands.
fn max_pool(x: &Tensor) -> ModelResult<Tensor> {
    let (batch, frames, bands, channels) = x.dims4()?;
    let of_pairs = |x: Tensor| -> ModelResult<Tensor> {
        let (rows, _, width) = x.dims3()?;
        let half = |i| x.narrow(1, i, 1)?.contiguous();
        half(0)?.maximum(&half(1)?)?.reshape((rows, width))
    };
    let h = of_pairs(x.reshape((batch * frames / 2, 2, bands * channels))?)?; // [B*T/2, F*C]
    let h = of_pairs(h.reshape((batch * frames / 2 * bands / 2, 2, channels))?)?; // [B*T/2*F/2, C]
    h.reshape((batch, frames / 2, bands / 2, channels))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dragon_testkit::{Golden, Tol, assert_close, fixture};

    const NARROW: Sizes = Sizes { channels: [2, 3, 4, 4, 5, 6], dense: 10 };

    fn model() -> Vggish {
        Vggish::of_sizes(&fixture("dragon-encoders/vggish/model.pth"), NARROW, &Device::Cpu).unwrap()
    }

    fn golden() -> Golden {
        Golden::fixture("dragon-encoders/vggish/golden.safetensors")
    }

    fn tensor(data: &[f32], width: usize) -> Tensor {
        Tensor::from_slice(data, (data.len() / width, width), &Device::Cpu).unwrap()
    }

    #[test]
    fn spectrogram_and_embeddings_match_torchvggish() {
        let (model, golden) = (model(), golden());
        for name in ["long", "short"] {
            let audio = golden.get(&format!("{name}.audio")).to_vec1::<f32>().unwrap();
            let rows = model.embed_clip(&audio, &Setting::Frames).unwrap();
            assert_close(&tensor(&rows.data, DIM), &golden.get(&format!("{name}.embeddings")), Tol::MODEL);
        }
        let audio = golden.get("long.audio").to_vec1::<f32>().unwrap();
        let want = golden.get("long.log_mel").flatten_all().unwrap();
        let got = model.log_mel(&audio);
        let n = want.elem_count();
        assert_close(&tensor(&got[..n], 1).flatten_all().unwrap(), &want, Tol { atol: 1e-6, rtol: 1e-6 });
    }

    #[test]
    fn windows_are_what_a_song_is_cut_into() {
        let model = model();
        let audio = golden().get("long.audio").to_vec1::<f32>().unwrap();
        let frames = model.embed_clip(&audio, &Setting::Frames).unwrap();
        let step = N_FRAMES * HOP;
        let windows: Vec<&[f32]> =
            (0..frames.n).map(|i| &audio[i * step..i * step + WINDOW_SAMPLES]).collect();
        let got = model.embed_windows(&windows).unwrap();
        for (window, row) in got.iter().zip(frames.rows()) {
            assert_eq!(window, row);
        }
        // One alone gives the same bits.
        assert_eq!(model.embed_windows(&windows[1..2]).unwrap()[0], got[1]);
        assert_eq!(model.embed_clip(&audio, &Setting::MA).unwrap().n, 9);
        let silence = model.embed_clip(&[0.0; 20_000], &Setting::Frames).unwrap();
        assert!(silence.n == 1 && silence.data.iter().all(|x| x.is_finite()));
        assert!(model.embed_windows(&[&[0.0; 100]]).unwrap_err().to_string().contains("15600 samples"));
    }

    #[test]
    fn the_published_file_has_the_tensors_that_ours_asks_for() {
        let text = std::fs::read_to_string(fixture("dragon-encoders/vggish/vggish-10086976.shapes")).unwrap();
        let shapes = text.lines().map(|line| {
            let (name, shape) = line.split_once('\t').unwrap();
            (name.to_string(), shape.split(',').map(|n| n.parse().unwrap()).collect())
        });
        let loader = Loader::same_names(Checkpoint::without_data(shapes));
        Network::new(SIZES, loader.builder(DType::F32, &Device::Cpu)).unwrap();
        let tensors = loader.finish(|_| false).unwrap();
        assert_eq!(tensors.values().map(Tensor::elem_count).sum::<usize>(), 72_141_184);
    }

    #[test]
    fn a_file_that_does_not_fit_is_listed() {
        let message = |path: &str| Vggish::load(fixture(path), &Device::Cpu).err().unwrap().to_string();
        let narrow = message("dragon-encoders/vggish/model.pth");
        assert!(narrow.contains("`features.0.bias`: expected [64], found [2]"), "{narrow}");
        let dac = message("dragon-vae/dac_codec/descript/weights.pth");
        assert!(
            dac.contains("`features.0.weight`: missing") && dac.contains("not used by the model"),
            "{dac}"
        );
    }
}
