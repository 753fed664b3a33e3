//! The network: weights, and the forward pass over windows of one spectrogram.
//!
//! All windows of a spectrogram are computed together, since they share most of the front end. A convolution with 'same'
//! padding sees zeros beyond the edges of *its window*, so each output depends on its frame and on the cut (the window's
//! first frame, or its end) that lies within reach of the kernel, if any. These combinations are the [`Row`]s; each is
//! computed once:
//!
//! - *Timbral filters* (7 frames by 38 or 67 bands): by the correlation theorem along the bands. An FFT of length 96 fits a
//!   frame exactly, so the 59 (30) positions cost one product per bin instead of 38 (67) per position: 11 times fewer
//!   multiplications. 3 frames at each edge of a window are its own.
//! - *Temporal filters* (128, 64 or 32 frames by 1 band): taps are summed from the latest frame to the earliest; where a window begins,
//!   the sum so far is that window's, and what a window's end cuts off is the sum up to there.
//! - *The first middle layer* is linear in timbral and temporal features before its relu. Its timbral part is shared, but for 6
//!   frames at each edge.

use super::lanes::{BINS, Complex, InverseFft, LANES, LENGTH, Lanes};

/// Frames of a window.
pub const N_FRAMES: usize = 187;
/// Mel bands of a frame.
pub const N_MELS: usize = LENGTH;
/// Length of the embedding.
pub const DIM: usize = 200;
/// Number of tags.
pub const N_TAGS: usize = 50;

const TIMBRAL_BANDS: [usize; 2] = [38, 67];
const TIMBRAL_FRAMES: usize = 7;
const TIMBRAL_CHANNELS: usize = 204; // int(1.6 * 128)
const TEMPORAL_FRAMES: [usize; 3] = [128, 64, 32];
const TEMPORAL_CHANNELS: usize = 51; // int(1.6 * 32)
/// Channels of both kinds of timbral filters, and of the three of temporal ones.
const TIMBRAL: usize = 2 * TIMBRAL_CHANNELS;
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

/// Batch normalisation with fixed statistics: `x * scale + shift` per channel.
#[derive(Debug, Clone)]
struct Norm {
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl Norm {
    fn apply(&self, row: &mut [f32]) {
        for ((x, scale), shift) in row.iter_mut().zip(&self.scale).zip(&self.shift) {
            *x = *x * scale + shift;
        }
    }
}

/// Relu, then [`Norm`], on rows of channels.
fn relu_norm(rows: &mut [f32], bias: &[f32], norm: &Norm) {
    for row in rows.chunks_mut(bias.len()) {
        for (x, b) in row.iter_mut().zip(bias) {
            *x = (*x + b).max(0.0);
        }
        norm.apply(row);
    }
}

/// The largest of `norm(relu(x + bias))` over the bands, from the largest of `x`, which is all that is kept.
///
/// Where the scale is negative that would be the smallest `x`; there the filter is stored negated, so that one maximum
/// serves all channels.
#[derive(Debug, Clone)]
struct PooledNorm {
    sign: Vec<f32>,
    bias: Vec<f32>,
    norm: Norm,
}

impl PooledNorm {
    fn new(bias: Vec<f32>, norm: Norm) -> Self {
        let sign = norm.scale.iter().map(|&s| if s < 0.0 { -1.0 } else { 1.0 }).collect();
        PooledNorm { sign, bias, norm }
    }

    fn apply(&self, channel: usize, largest: f32) -> f32 {
        let x = (self.sign[channel] * largest + self.bias[channel]).max(0.0);
        x * self.norm.scale[channel] + self.norm.shift[channel]
    }
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

/// Filters over 7 frames and many bands, 'same' in time and 'valid' in frequency, maximum over frequency.
struct Timbral {
    /// Number of positions along the bands.
    positions: usize,
    /// `[group][bin][tap]`: conjugate spectrum of the filters over 96, real and imaginary.
    spectra: Vec<Complex>,
    pooled: PooledNorm,
}

/// Filters over many frames and one band, 'same' in time, maximum over frequency.
struct Temporal {
    /// `[channel / 4][tap][4]`, zeros for the 52nd channel.
    taps: Vec<[f32; TILE_CHANNELS]>,
    n_taps: usize,
    pooled: PooledNorm,
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
        let timbral = self.timbral(&x, &rows); // [rows, 2 * 204]
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

/// Which outputs of a 'same' convolution over time are needed, and where each window finds its own.
struct Rows {
    rows: Vec<Row>,
    /// Row of frame `t`, uncut; `usize::MAX` where no window needs it.
    whole: Vec<usize>,
    starts: Vec<usize>,
    /// First of the cut rows of each window: `before` at its start, then `after` at its end.
    cut: Vec<usize>,
    before: usize,
    after: usize,
}

/// One output: frame `t` with the taps that see frames `from..to`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row {
    t: usize,
    from: usize,
    to: usize,
}

impl Rows {
    /// For a kernel of `n_taps` frames: TensorFlow puts the smaller half of an even number of padding frames first.
    fn new(n_frames: usize, starts: &[usize], n_taps: usize) -> Self {
        let (before, after) = ((n_taps - 1) / 2, n_taps / 2);
        let mut rows = Vec::new();
        let mut whole = vec![usize::MAX; n_frames];
        for &start in starts {
            let inside = start + before..start + N_FRAMES - after;
            for (row, t) in whole[inside.clone()].iter_mut().zip(inside) {
                if *row == usize::MAX {
                    *row = rows.len();
                    rows.push(Row { t, from: t - before, to: t + after + 1 });
                }
            }
        }
        let mut cut = Vec::new();
        for &start in starts {
            cut.push(rows.len());
            let end = start + N_FRAMES;
            rows.extend((start..start + before).map(|t| Row { t, from: start, to: t + after + 1 }));
            rows.extend((end - after..end).map(|t| Row { t, from: t - before, to: end }));
        }
        Rows { rows, whole, starts: starts.to_vec(), cut, before, after }
    }

    /// The row of frame `i` of a window.
    fn of(&self, window: usize, i: usize) -> usize {
        if i < self.before {
            self.cut[window] + i
        } else if i + self.after >= N_FRAMES {
            self.cut[window] + self.before + i + self.after - N_FRAMES
        } else {
            self.whole[self.starts[window] + i]
        }
    }
}

/// Rows computed at once: their accumulators, two weights and two inputs fit the registers.
const TILE_ROWS: usize = 4;
/// Rows whose packed spectra stay in the second-level cache while all filters pass.
const BLOCK_ROWS: usize = 32;

impl Timbral {
    fn new(fft: &InverseFft, bands: usize, kernel: &[f32], pooled: PooledNorm) -> Self {
        let groups = TIMBRAL_CHANNELS.div_ceil(LANES);
        let mut spectra = vec![[[0.0; LANES]; 2]; groups * BINS * TIMBRAL_FRAMES];
        for channel in 0..TIMBRAL_CHANNELS {
            for tap in 0..TIMBRAL_FRAMES {
                let scale = pooled.sign[channel] / LENGTH as f32;
                let filter: Vec<f32> = (0..bands)
                    .map(|band| kernel[(tap * bands + band) * TIMBRAL_CHANNELS + channel] * scale)
                    .collect();
                for (bin, [re, im]) in fft.forward(&filter).into_iter().enumerate() {
                    let slot = &mut spectra[((channel / LANES) * BINS + bin) * TIMBRAL_FRAMES + tap];
                    slot[0][channel % LANES] = re;
                    slot[1][channel % LANES] = -im;
                }
            }
        }
        let spectra = spectra.into_iter().map(|parts| parts.map(Lanes::from_array)).collect();
        Timbral { positions: N_MELS - bands + 1, spectra, pooled }
    }
}

impl Network {
    /// Both kinds of timbral features of the given rows: `[rows, 2 * 204]`.
    fn timbral(&self, x: &[f32], rows: &Rows) -> Vec<f32> {
        const TAPS: usize = TIMBRAL_FRAMES;
        let width = TIMBRAL;
        let spectra: Vec<[[f32; 2]; BINS]> = x.chunks(N_MELS).map(|frame| self.fft.forward(frame)).collect();
        let mut out = vec![0.0; rows.rows.len() * width];
        let mut packed = vec![[[0.0f32; 2]; TILE_ROWS]; BLOCK_ROWS / TILE_ROWS * BINS * TAPS];
        let mut products = [[[Lanes::zero(); 2]; BINS]; TILE_ROWS];
        let mut pairs = [[Lanes::zero(); 2]; LENGTH / 2];
        for (block, rows) in rows.rows.chunks(BLOCK_ROWS).enumerate() {
            packed.fill([[0.0; 2]; TILE_ROWS]);
            for (r, row) in rows.iter().enumerate() {
                for tap in 0..TAPS {
                    let frame = (row.t + tap).wrapping_sub(TAPS / 2);
                    if (row.from..row.to).contains(&frame) {
                        for (bin, value) in spectra[frame].iter().enumerate() {
                            packed[((r / TILE_ROWS) * BINS + bin) * TAPS + tap][r % TILE_ROWS] = *value;
                        }
                    }
                }
            }
            for (side, filters) in self.timbral.iter().enumerate() {
                for (group, weights) in filters.spectra.chunks(BINS * TAPS).enumerate() {
                    for (tile, inputs) in
                        packed.chunks(BINS * TAPS).take(rows.len().div_ceil(TILE_ROWS)).enumerate()
                    {
                        multiply(inputs, weights, &mut products);
                        for (r, products) in products.iter().enumerate() {
                            let row = tile * TILE_ROWS + r;
                            if row >= rows.len() {
                                break;
                            }
                            self.fft.run(products, &mut pairs);
                            let mut largest = pairs[0][0].max(pairs[0][1]);
                            for pair in &pairs[1..filters.positions / 2] {
                                largest = largest.max(pair[0]).max(pair[1]);
                            }
                            if filters.positions % 2 == 1 {
                                largest = largest.max(pairs[filters.positions / 2][0]);
                            }
                            let largest = largest.to_array();
                            let out =
                                &mut out[(block * BLOCK_ROWS + row) * width + side * TIMBRAL_CHANNELS..];
                            let first = group * LANES;
                            for channel in first..TIMBRAL_CHANNELS.min(first + LANES) {
                                out[channel] = filters.pooled.apply(channel, largest[channel - first]);
                            }
                        }
                    }
                }
            }
        }
        out
    }
}

/// Sums over the taps of input spectrum times filter spectrum, per bin and row.
#[inline(always)]
fn multiply(inputs: &[[[f32; 2]; TILE_ROWS]], weights: &[Complex], out: &mut [[Complex; BINS]; TILE_ROWS]) {
    let inputs = inputs.chunks_exact(TIMBRAL_FRAMES);
    let weights = weights.chunks_exact(TIMBRAL_FRAMES);
    for (bin, (inputs, weights)) in inputs.zip(weights).enumerate() {
        let mut sums = [[Lanes::zero(); 2]; TILE_ROWS];
        for (input, [re, im]) in inputs.iter().zip(weights) {
            for (sum, &[xr, xi]) in sums.iter_mut().zip(input) {
                let (xr, xi) = (Lanes::splat(xr), Lanes::splat(xi));
                sum[0] = xi.neg_mul_add(*im, xr.mul_add(*re, sum[0]));
                sum[1] = xi.mul_add(*re, xr.mul_add(*im, sum[1]));
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            out[bin] = sum;
        }
    }
}

/// Channels and groups of eight bands computed at once: 12 accumulators, 3 inputs and a weight make 16 registers.
const TILE_CHANNELS: usize = 4;
const TILE_BANDS: usize = 3;
type Tile = [[Lanes; TILE_BANDS]; TILE_CHANNELS];

impl Temporal {
    fn new(n_taps: usize, kernel: &[f32], pooled: PooledNorm) -> Self {
        let mut taps = Vec::new();
        for group in 0..TEMPORAL_CHANNELS.div_ceil(TILE_CHANNELS) {
            for tap in 0..n_taps {
                taps.push(std::array::from_fn(|i| {
                    let channel = group * TILE_CHANNELS + i;
                    if channel < TEMPORAL_CHANNELS {
                        kernel[tap * TEMPORAL_CHANNELS + channel] * pooled.sign[channel]
                    } else {
                        0.0
                    }
                }));
            }
        }
        Temporal { taps, n_taps, pooled }
    }

    /// The features of the given rows, `[rows, 51]`, of normalised frames `x [T, 96]`.
    fn forward(&self, x: &[f32], rows: &Rows) -> Vec<f32> {
        let n_frames = x.len() / N_MELS;
        let (before, after) = (rows.before, rows.after);
        let mut out = vec![0.0; rows.rows.len() * TEMPORAL_CHANNELS];
        // Rows of one frame share their sums.
        let mut by_frame: Vec<Vec<usize>> = vec![Vec::new(); n_frames];
        for (i, row) in rows.rows.iter().enumerate() {
            by_frame[row.t].push(i);
        }
        let x: Vec<[Lanes; N_MELS / LANES]> = x
            .chunks_exact(N_MELS)
            .map(|frame| {
                std::array::from_fn(|i| {
                    Lanes::from_array(std::array::from_fn(|lane| frame[i * LANES + lane]))
                })
            })
            .collect();
        let mut largest: Vec<[Lanes; TILE_CHANNELS]> = Vec::new();
        let mut beyond: Vec<Tile> = Vec::new();
        for (t, wanted) in by_frame.iter().enumerate().filter(|(_, wanted)| !wanted.is_empty()) {
            let (first, last) = (t.saturating_sub(before), n_frames.min(t + after + 1));
            // Frames at which a window begins (from > first) or ends (to < last), latest first.
            let mut cuts: Vec<(usize, Cut)> = Vec::new();
            for (slot, &i) in wanted.iter().enumerate() {
                let row = rows.rows[i];
                if row.from > first {
                    cuts.push((row.from, Cut::Begins(slot)));
                } else {
                    cuts.push((row.to, Cut::Ends(slot)));
                }
            }
            cuts.sort_by_key(|cut| std::cmp::Reverse(cut.0));
            for (group, taps) in self.taps.chunks_exact(self.n_taps).enumerate() {
                largest.clear();
                largest.resize(wanted.len(), [Lanes::splat(f32::NEG_INFINITY); TILE_CHANNELS]);
                for band in (0..N_MELS / LANES).step_by(TILE_BANDS) {
                    let mut sum: Tile = [[Lanes::zero(); TILE_BANDS]; TILE_CHANNELS];
                    let mut done = last;
                    beyond.clear();
                    for &(at, cut) in &cuts {
                        sum = accumulate(sum, &x[at..done], band, &taps[at + before - t..]);
                        done = at;
                        match cut {
                            Cut::Begins(slot) => raise(&mut largest[slot], &sum),
                            Cut::Ends(_) => beyond.push(sum),
                        }
                    }
                    sum = accumulate(sum, &x[first..done], band, &taps[first + before - t..]);
                    let mut beyond = beyond.iter();
                    for (_, cut) in &cuts {
                        if let Cut::Ends(slot) = cut {
                            let beyond = beyond.next().expect("pushed once per cut above");
                            let mut inside = sum;
                            for (inside, beyond) in inside.iter_mut().flatten().zip(beyond.iter().flatten()) {
                                *inside = *inside - *beyond;
                            }
                            raise(&mut largest[*slot], &inside);
                        }
                    }
                }
                for (largest, &row) in largest.iter().zip(wanted) {
                    let first = group * TILE_CHANNELS;
                    for channel in first..TEMPORAL_CHANNELS.min(first + TILE_CHANNELS) {
                        let largest = largest[channel - first].max_lane();
                        out[row * TEMPORAL_CHANNELS + channel] = self.pooled.apply(channel, largest);
                    }
                }
            }
        }
        out
    }
}

/// What happens at a frame of the sum for an output slot.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Begins(usize),
    Ends(usize),
}

/// `sum + Σ_i x[i] taps[i]`, from the last to the first.
#[inline(always)]
fn accumulate(
    mut sum: Tile,
    x: &[[Lanes; N_MELS / LANES]],
    band: usize,
    taps: &[[f32; TILE_CHANNELS]],
) -> Tile {
    let taps = &taps[..x.len()];
    for (x, taps) in x.iter().zip(taps).rev() {
        let x: &[Lanes; TILE_BANDS] = x[band..band + TILE_BANDS].try_into().expect("a whole tile");
        for (sum, &tap) in sum.iter_mut().zip(taps) {
            let tap = Lanes::splat(tap);
            for (sum, x) in sum.iter_mut().zip(x) {
                *sum = x.mul_add(tap, *sum);
            }
        }
    }
    sum
}

#[inline(always)]
fn raise(largest: &mut [Lanes; TILE_CHANNELS], values: &Tile) {
    for (largest, values) in largest.iter_mut().zip(values) {
        for value in values {
            *largest = largest.max(*value);
        }
    }
}
