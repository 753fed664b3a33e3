//! The network: weights, and the forward pass over windows of one spectrogram.
//!
//! All windows of a spectrogram are computed together, since they share most of the front end. A convolution with 'same'
//! padding sees zeros beyond the edges of *its window*, so each output depends on its frame and on the cut (the window's
//! first frame, or its end) that lies within reach of the kernel, if any. These combinations are the rows of [`Rows`]; each is
//! computed once:
//!
//! - *Timbral filters* (7 frames by 38 or 67 bands): by the correlation theorem along the bands. An FFT of length 96 fits a
//!   frame exactly, so the 59 (30) positions cost one product per bin instead of 38 (67) per position: 11 times fewer
//!   multiplications. 3 frames at each edge of a window are its own.
//! - *Temporal filters* (128, 64 or 32 frames by 1 band): taps are summed from the latest frame to the earliest; where a window begins,
//!   the sum so far is that window's, and what a window's end cuts off is the sum up to there.
//! - *The first middle layer* is linear in timbral and temporal features before its relu. Its timbral part is shared, but for 6
//!   frames at each edge.

use super::lanes::{InverseFft, LENGTH};
use super::norm::{Norm, PooledNorm, relu_norm};
use super::rows::Rows;
use super::temporal::Temporal;
use super::timbral::{self, Timbral};

/// Frames of a window.
pub const N_FRAMES: usize = 187;
/// Mel bands of a frame.
pub const N_MELS: usize = LENGTH;
/// Length of the embedding.
pub const DIM: usize = 200;
/// Number of tags.
pub const N_TAGS: usize = 50;

const TIMBRAL_BANDS: [usize; 2] = [38, 67];
pub(super) const TIMBRAL_FRAMES: usize = 7;
pub(super) const TIMBRAL_CHANNELS: usize = 204; // int(1.6 * 128)
const TEMPORAL_FRAMES: [usize; 3] = [128, 64, 32];
pub(super) const TEMPORAL_CHANNELS: usize = 51; // int(1.6 * 32)
/// Channels of both kinds of timbral filters, and of the three of temporal ones.
pub(super) const TIMBRAL: usize = 2 * TIMBRAL_CHANNELS;
const TEMPORAL: usize = 3 * TEMPORAL_CHANNELS;
const FRONT: usize = TIMBRAL + TEMPORAL;
const MID: usize = 64;
const MID_FRAMES: usize = 7;
/// Zeros before and after a window in the middle layers.
const PAD: usize = MID_FRAMES / 2;
/// Windows computed together.
const GROUP: usize = 32;
const POOLED: usize = 2 * (FRONT + 3 * MID);
/// TensorFlow's default, with which the network was trained.
const NORM_EPS: f64 = 1e-3;

/// Embedding and tag probabilities of one window.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Penultimate layer, after batch normalisation; length [`DIM`].
    pub embedding: Vec<f32>,
    /// Independent probabilities, in (0, 1), in the order of the model's tags; length [`N_TAGS`].
    pub tags: Vec<f32>,
}

/// The trained network, with weights laid out for the kernels.
pub struct Network {
    fft: InverseFft,
    input: Norm,
    timbral: [Timbral; 2],
    temporal: [Temporal; 3],
    /// The part of the first middle layer's kernel that reads timbral features: `[tap, 408, 64]`.
    mid_timbral: Vec<f32>,
    /// The first without that part.
    mid: [Mid; 3],
    pool_norm: Norm,
    penultimate: Dense,
    penultimate_norm: Norm,
    output: Dense,
}

/// Filters over 7 frames and all channels.
struct Mid {
    /// `[tap, channel in, channel out]`
    kernel: Vec<f32>,
    bias: Vec<f32>,
    norm: Norm,
}

struct Dense {
    /// `[in, out]`
    kernel: Vec<f32>,
    bias: Vec<f32>,
}

/// Names and shapes of all tensors, as `fixtures/musicnn/convert.py` writes them.
pub fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut out = Vec::new();
    let norm = |out: &mut Vec<(String, Vec<usize>)>, name: &str, n: usize| {
        for parameter in ["beta", "gamma", "moving_mean", "moving_variance"] {
            out.push((format!("{name}.{parameter}"), vec![n]));
        }
    };
    norm(&mut out, "input_norm", 1);
    let mut convolutions = Vec::new();
    for bands in TIMBRAL_BANDS {
        convolutions
            .push((format!("frontend.timbral_{bands}"), vec![TIMBRAL_FRAMES, bands, 1, TIMBRAL_CHANNELS]));
    }
    for frames in TEMPORAL_FRAMES {
        convolutions.push((format!("frontend.temporal_{frames}"), vec![frames, 1, 1, TEMPORAL_CHANNELS]));
    }
    for (i, channels) in [FRONT, MID, MID].into_iter().enumerate() {
        convolutions.push((format!("midend.{i}"), vec![MID_FRAMES, channels, 1, MID]));
    }
    for (name, shape) in convolutions {
        norm(&mut out, &format!("{name}.norm"), shape[3]);
        out.push((format!("{name}.conv.bias"), vec![shape[3]]));
        out.push((format!("{name}.conv.kernel"), shape));
    }
    norm(&mut out, "backend.pool_norm", POOLED);
    norm(&mut out, "backend.penultimate_norm", DIM);
    for (name, shape) in [("penultimate", [POOLED, DIM]), ("output", [DIM, N_TAGS])] {
        out.push((format!("backend.{name}.bias"), vec![shape[1]]));
        out.push((format!("backend.{name}.kernel"), shape.to_vec()));
    }
    out
}

impl Network {
    /// Builds the network; `take` gives the values of each name of [`shapes`].
    pub fn new(take: impl Fn(&str) -> Vec<f32>) -> Self {
        let norm = |name: &str| {
            let parameter = |p: &str| take(&format!("{name}.{p}"));
            let (beta, gamma) = (parameter("beta"), parameter("gamma"));
            let (mean, variance) = (parameter("moving_mean"), parameter("moving_variance"));
            let scale: Vec<f64> = gamma
                .iter()
                .zip(&variance)
                .map(|(&g, &v)| f64::from(g) / (f64::from(v) + NORM_EPS).sqrt())
                .collect();
            let shift = (0..beta.len())
                .map(|i| (f64::from(beta[i]) - f64::from(mean[i]) * scale[i]) as f32)
                .collect();
            Norm { scale: scale.into_iter().map(|s| s as f32).collect(), shift }
        };
        let pooled =
            |name: &str| PooledNorm::new(take(&format!("{name}.conv.bias")), norm(&format!("{name}.norm")));
        let dense = |name: &str| Dense {
            kernel: take(&format!("{name}.kernel")),
            bias: take(&format!("{name}.bias")),
        };
        let fft = InverseFft::new();
        let timbral = TIMBRAL_BANDS.map(|bands| {
            let name = format!("frontend.timbral_{bands}");
            Timbral::new(&fft, bands, &take(&format!("{name}.conv.kernel")), pooled(&name))
        });
        let temporal = TEMPORAL_FRAMES.map(|frames| {
            let name = format!("frontend.temporal_{frames}");
            Temporal::new(frames, &take(&format!("{name}.conv.kernel")), pooled(&name))
        });
        let mut mid = [0, 1, 2].map(|i| Mid {
            kernel: take(&format!("midend.{i}.conv.kernel")),
            bias: take(&format!("midend.{i}.conv.bias")),
            norm: norm(&format!("midend.{i}.norm")),
        });
        let taps = || mid[0].kernel.chunks(FRONT * MID);
        let mid_timbral = taps().flat_map(|tap| &tap[..TIMBRAL * MID]).copied().collect();
        mid[0].kernel = taps().flat_map(|tap| &tap[TIMBRAL * MID..]).copied().collect();
        Network {
            fft,
            input: norm("input_norm"),
            timbral,
            temporal,
            mid_timbral,
            mid,
            pool_norm: norm("backend.pool_norm"),
            penultimate: dense("backend.penultimate"),
            penultimate_norm: norm("backend.penultimate_norm"),
            output: dense("backend.output"),
        }
    }

    /// The outputs of the windows that begin at the frames `starts` of a log-mel spectrogram `[T, 96]`.
    ///
    /// # Panics
    /// If a window does not fit into the spectrogram.
    pub fn forward(&self, log_mel: &[f32], starts: &[usize]) -> Vec<Output> {
        let n_frames = log_mel.len() / N_MELS;
        assert!(
            starts.iter().all(|s| s + N_FRAMES <= n_frames),
            "windows of {N_FRAMES} frames at {starts:?} leave a spectrogram of {n_frames} frames"
        );
        // In groups, so that memory does not grow with the song.
        let mut outputs = Vec::with_capacity(starts.len());
        for group in starts.chunks(GROUP) {
            let first = *group.iter().min().expect("chunks are not empty");
            let end = group.iter().max().expect("chunks are not empty") + N_FRAMES;
            let local: Vec<usize> = group.iter().map(|start| start - first).collect();
            outputs.extend(self.forward_group(&log_mel[first * N_MELS..end * N_MELS], &local));
        }
        outputs
    }

    fn forward_group(&self, log_mel: &[f32], starts: &[usize]) -> Vec<Output> {
        let n_frames = log_mel.len() / N_MELS;
        let (scale, shift) = (self.input.scale[0], self.input.shift[0]);
        let x: Vec<f32> = log_mel.iter().map(|x| x * scale + shift).collect(); // [T, 96]

        let rows = Rows::new(n_frames, starts, TIMBRAL_FRAMES);
        let timbral = timbral::features(&self.fft, &self.timbral, &x, &rows); // [rows, 2 * 204]
        let temporal = self.temporal.each_ref().map(|filters| {
            let rows = Rows::new(n_frames, starts, filters.n_taps);
            (filters.forward(&x, &rows), rows) // [rows, 51]
        });
        let (mixed, mixed_rows) = self.mix_timbral(&timbral, &rows, n_frames); // [rows, 64]
        let mut scratch = Scratch::default();
        (0..starts.len())
            .map(|window| {
                scratch.clear();
                for i in 0..N_FRAMES {
                    scratch.timbral.extend_from_slice(row_of(&timbral, TIMBRAL, rows.of(window, i)));
                    let mut out = &mut scratch.temporal[(i + PAD) * TEMPORAL..][..TEMPORAL];
                    for (features, rows) in &temporal {
                        let (here, rest) = out.split_at_mut(TEMPORAL_CHANNELS);
                        here.copy_from_slice(row_of(features, TEMPORAL_CHANNELS, rows.of(window, i)));
                        out = rest;
                    }
                    scratch.mixed.extend_from_slice(row_of(&mixed, MID, mixed_rows.of(window, i)));
                }
                self.head(&mut scratch)
            })
            .collect()
    }

    /// What the timbral features `[rows, 408]` add to the first middle layer, before its relu: `[rows, 64]`.
    fn mix_timbral(&self, features: &[f32], rows: &Rows, n_frames: usize) -> (Vec<f32>, Rows) {
        // Both kernels reach 3 frames, so 6 frames at the edges of a window are its own: as with one kernel of 13.
        let mixed = Rows::new(n_frames, &rows.starts, TIMBRAL_FRAMES + MID_FRAMES - 1);
        const WIDTH: usize = MID_FRAMES * TIMBRAL;
        let mut inputs = vec![0.0; mixed.rows.len() * WIDTH];
        let mut done = vec![false; mixed.rows.len()];
        for window in 0..rows.starts.len() {
            for i in 0..N_FRAMES {
                let row = mixed.of(window, i);
                if std::mem::replace(&mut done[row], true) {
                    continue;
                }
                let taps = inputs[row * WIDTH..][..WIDTH].chunks_exact_mut(TIMBRAL);
                for (tap, input) in taps.enumerate() {
                    let frame = (i + tap).wrapping_sub(PAD);
                    if frame < N_FRAMES {
                        input.copy_from_slice(row_of(features, TIMBRAL, rows.of(window, frame)));
                    }
                }
            }
        }
        let mut out = vec![0.0; mixed.rows.len() * MID];
        product(mixed.rows.len(), MID, WIDTH, &inputs, WIDTH, &self.mid_timbral, &mut out);
        (out, mixed)
    }

    /// Middle and back of the network for one window whose front-end features lie in `scratch`.
    fn head(&self, scratch: &mut Scratch) -> Output {
        let Scratch { timbral, temporal, mixed, mid } = scratch;
        for (i, layer) in self.mid.iter().enumerate() {
            let (done, todo) = mid.split_at_mut(i);
            let (input, channels) = if i == 0 { (&temporal[..], TEMPORAL) } else { (&done[i - 1][..], MID) };
            let out = &mut todo[0];
            out.clear();
            out.resize((N_FRAMES + 2 * PAD) * MID, 0.0);
            let body = &mut out[PAD * MID..(PAD + N_FRAMES) * MID];
            // Rows of 7 frames overlap: one product, nothing copied.
            product(N_FRAMES, MID, MID_FRAMES * channels, input, channels, &layer.kernel, body);
            if i == 0 {
                for (x, mixed) in body.iter_mut().zip(mixed.iter()) {
                    *x += mixed;
                }
            }
            relu_norm(body, &layer.bias, &layer.norm);
            if i > 0 {
                for (x, residual) in body.iter_mut().zip(&input[PAD * MID..]) {
                    *x += residual;
                }
            }
        }
        // Largest value and mean over time of every channel, interleaved as TensorFlow's flatten leaves them.
        let mut pooled = Vec::with_capacity(POOLED);
        let [a, b, c] = mid;
        for (padded, features, channels) in [
            (false, timbral, TIMBRAL),
            (true, temporal, TEMPORAL),
            (true, a, MID),
            (true, b, MID),
            (true, c, MID),
        ] {
            let body =
                if padded { &features[PAD * channels..(PAD + N_FRAMES) * channels] } else { &features[..] };
            let (mut largest, mut sum) = (vec![f32::NEG_INFINITY; channels], vec![0.0f64; channels]);
            for row in body.chunks(channels) {
                for ((x, largest), sum) in row.iter().zip(&mut largest).zip(&mut sum) {
                    *largest = largest.max(*x);
                    *sum += f64::from(*x);
                }
            }
            for (largest, sum) in largest.iter().zip(&sum) {
                pooled.extend([*largest, (sum / N_FRAMES as f64) as f32]);
            }
        }
        self.pool_norm.apply(&mut pooled);
        let mut embedding = self.penultimate.forward(&pooled);
        for x in &mut embedding {
            *x = x.max(0.0);
        }
        self.penultimate_norm.apply(&mut embedding);
        let tags =
            self.output.forward(&embedding).into_iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
        Output { embedding, tags }
    }
}

/// Features of one window.
#[derive(Default)]
struct Scratch {
    /// `[187, 408]`
    timbral: Vec<f32>,
    /// `[3 + 187 + 3, 153]`, zeros around.
    temporal: Vec<f32>,
    /// `[187, 64]`: see [`Network::mix_timbral`].
    mixed: Vec<f32>,
    /// `[3 + 187 + 3, 64]` each, zeros around.
    mid: [Vec<f32>; 3],
}

impl Scratch {
    fn clear(&mut self) {
        self.timbral.clear();
        self.mixed.clear();
        self.temporal.clear();
        self.temporal.resize((N_FRAMES + 2 * PAD) * TEMPORAL, 0.0);
    }
}

/// Row `i` of a matrix.
fn row_of(matrix: &[f32], width: usize, i: usize) -> &[f32] {
    &matrix[i * width..(i + 1) * width]
}

impl Dense {
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let mut out = self.bias.clone();
        for (x, weights) in x.iter().zip(self.kernel.chunks(out.len())) {
            for (y, w) in out.iter_mut().zip(weights) {
                *y += x * w;
            }
        }
        out
    }
}

/// `out [m, n] = a [m, k] · b [k, n]`, where the rows of `a` begin `a_stride` apart and may overlap.
fn product(m: usize, n: usize, k: usize, a: &[f32], a_stride: usize, b: &[f32], out: &mut [f32]) {
    assert!(a.len() >= (m - 1) * a_stride + k && b.len() == k * n && out.len() == m * n);
    // SAFETY: the assertion above keeps every access inside the three slices; `out` is exclusively borrowed.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            a_stride as isize,
            b.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
