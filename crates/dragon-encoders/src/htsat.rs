//! HTS-AT (Chen et al. 2022, arXiv:2202.00874): the audio branch of LAION-CLAP. A log-mel spectrogram is folded into
//! a square image, cut into patches, and read by a Swin transformer (Liu et al. 2021, arXiv:2103.14030).
//!
//! Reference: LAION-AI/CLAP@46cce9a, `clap_module/htsat.py` (CC0), in evaluation mode and without fusion; written
//! from its formulas, no code taken. Tensor names are those of its checkpoints under `audio_branch.`; of these the
//! frozen STFT and mel filters, `relative_position_index`, `attn_mask`, `tscam_conv` and `head` are not read: the
//! first four follow from the config, the last two classify and do not reach the embedding.
//! Differences from the reference in training: no stochastic depth; `bn0` normalises by `running_mean` and
//! `running_var`, set once from the training set, never by the batch ([`Htsat::forward`] is the same function in
//! training and inference, so a clip's embedding never depends on its batch).
//! Golden test: `audio_branch_matches_laion_clap` in [`crate::clap`].

use crate::layers::{Dense, Norm, index};
use crate::rows::RowOrder;
use candle_core::{Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use dragon_audio::{MelConfig, MelNorm, MelScale, MelSpectrogram, PadMode};
use std::sync::Arc;

/// Hyperparameters of [`Htsat`] and of its log-mel front end. Patches do not overlap.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Samples per second of the audio.
    pub sample_rate_hz: u32,
    /// Samples of one clip; [`LogMel::compute`] takes this many.
    pub clip_samples: usize,
    /// FFT and window length in samples (`window_size` in LAION's config).
    pub n_fft: usize,
    /// Samples between frames.
    pub hop: usize,
    /// Mel bands.
    pub mel_bins: usize,
    /// Lower end of the lowest band, Hz.
    pub f_min_hz: f64,
    /// Upper end of the highest band, Hz.
    pub f_max_hz: f64,
    /// Side of the square image; `spec_size / mel_bins` blocks of frames are stacked along frequency.
    pub spec_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
    /// Channels of the first stage; they double with each next one.
    pub embed_dim: usize,
    /// Blocks per stage.
    pub depths: Vec<usize>,
    /// Attention heads per stage.
    pub num_heads: Vec<usize>,
    /// Side of an attention window, in tokens.
    pub window_size: usize,
    /// Hidden width of the feed-forward layer over the stage's channels.
    pub mlp_ratio: f64,
}

impl Config {
    /// LAION-CLAP's `HTSAT-tiny`: 48 kHz, clips of 10 s, 28 M parameters.
    pub fn laion_tiny() -> Self {
        Self {
            sample_rate_hz: 48_000,
            clip_samples: 480_000,
            n_fft: 1024,
            hop: 480,
            mel_bins: 64,
            f_min_hz: 50.0,
            f_max_hz: 14_000.0,
            spec_size: 256,
            patch_size: 4,
            embed_dim: 96,
            depths: vec![2, 2, 6, 2],
            num_heads: vec![4, 8, 16, 32],
            window_size: 8,
            mlp_ratio: 4.0,
        }
    }

    /// LAION-CLAP's `HTSAT-base`, the audio branch of the music checkpoints: 68 M parameters.
    pub fn laion_base() -> Self {
        Self { embed_dim: 128, depths: vec![2, 2, 12, 2], ..Self::laion_tiny() }
    }

    /// The audio branch of the tiny CLAP: 16 kHz, clips of 5.12 s, 0.4 M parameters, 0.08 GFLOP per clip.
    pub fn tiny_music() -> Self {
        Self {
            sample_rate_hz: 16_000,
            clip_samples: 48_000, // 3 s, as musicnn: several windows in a song of 5 s
            n_fft: 1024,
            hop: 188, // 1 + 48000/188 = 256 frames, two blocks of 128: no resizing
            mel_bins: 64,
            f_min_hz: 50.0,
            f_max_hz: 8_000.0,
            spec_size: 128,
            // LAION's second stage (8 by 8 values per token) is the first here: as many channels as values, so nothing
            // is lost, and a quarter of the tokens, which are what a small network spends its time on
            patch_size: 8,
            embed_dim: 64,
            depths: vec![2, 2],
            num_heads: vec![4, 8],
            window_size: 8,
            mlp_ratio: 2.0,
        }
    }

    /// The smallest valid model with every part in it (resized frames, shifted windows, merging), for tests.
    pub fn tiny() -> Self {
        Self {
            sample_rate_hz: 8_000,
            clip_samples: 6_000,
            n_fft: 256,
            hop: 100,
            mel_bins: 16,
            f_min_hz: 50.0,
            f_max_hz: 4_000.0,
            spec_size: 32,
            patch_size: 4,
            embed_dim: 8,
            depths: vec![2, 2],
            num_heads: vec![2, 4],
            window_size: 4,
            mlp_ratio: 4.0,
        }
    }

    /// Blocks of frames stacked along frequency.
    pub fn n_blocks(&self) -> usize {
        self.spec_size / self.mel_bins
    }

    /// Frames of the unfolded image; a clip with fewer is stretched to it (bicubic, as the reference does).
    pub fn image_frames(&self) -> usize {
        self.spec_size * self.n_blocks()
    }

    /// Frames of the log-mel spectrogram of one clip.
    pub fn n_frames(&self) -> usize {
        1 + self.clip_samples / self.hop
    }

    /// Width of the embedding: channels of the last stage.
    pub fn embedding_dim(&self) -> usize {
        self.embed_dim << (self.depths.len() - 1)
    }

    /// Tokens along one side of stage `i`.
    fn side(&self, stage: usize) -> usize {
        (self.spec_size / self.patch_size) >> stage
    }

    /// Side of the windows of stage `i`, and by how much every second block shifts them.
    fn window(&self, stage: usize) -> (usize, usize) {
        let side = self.side(stage);
        if side <= self.window_size { (side, 0) } else { (self.window_size, self.window_size / 2) }
    }

    fn check(&self) -> Result<()> {
        let n_stages = self.depths.len();
        if n_stages == 0 || self.num_heads.len() != n_stages || self.depths.contains(&0) {
            candle_core::bail!(
                "htsat config: depths {:?} and num_heads {:?} need one positive entry per stage",
                self.depths,
                self.num_heads
            )
        }
        if [self.hop, self.mel_bins, self.patch_size, self.window_size, self.embed_dim].contains(&0) {
            candle_core::bail!("htsat config: a size is 0: {self:?}")
        }
        let patches = [("mel_bins", self.mel_bins), ("spec_size", self.spec_size)];
        for (name, size) in patches {
            if !size.is_multiple_of(self.patch_size) {
                candle_core::bail!(
                    "htsat config: {name} {size} is not a multiple of patch_size {}",
                    self.patch_size
                )
            }
        }
        if !self.spec_size.is_multiple_of(self.mel_bins) {
            candle_core::bail!(
                "htsat config: spec_size {} is not a multiple of mel_bins {}",
                self.spec_size,
                self.mel_bins
            )
        }
        if self.n_frames() > self.image_frames() {
            candle_core::bail!(
                "htsat config: {} frames (clip_samples {} at hop {}) do not fit the image of {} frames; raise hop or spec_size",
                self.n_frames(),
                self.clip_samples,
                self.hop,
                self.image_frames()
            )
        }
        for (stage, n_heads) in self.num_heads.iter().enumerate() {
            let (side, width) = (self.side(stage), self.embed_dim << stage);
            let even = stage + 1 == n_stages || side.is_multiple_of(2);
            if side == 0 || !side.is_multiple_of(self.window(stage).0) || !even {
                candle_core::bail!(
                    "htsat config: stage {stage} has {side} tokens a side, which windows of {} and merging by 2 do not divide",
                    self.window_size
                )
            }
            if *n_heads == 0 || !width.is_multiple_of(*n_heads) {
                candle_core::bail!(
                    "htsat config: stage {stage}: {width} channels are not a multiple of {n_heads} heads"
                )
            }
        }
        Ok(())
    }
}

/// The front end: samples to a log-mel spectrogram, `10 log10(max(power, 1e-10))` dB with Slaney's scale and norm,
/// periodic Hann window, centred frames, reflected edges (torchlibrosa's, which LAION's music checkpoints use).
pub struct LogMel {
    mel: MelSpectrogram,
    clip_samples: usize,
}

impl LogMel {
    /// Prepares window, FFT and filters.
    ///
    /// # Errors
    /// If the bands leave 0 to half the sample rate, or a length is 0.
    pub fn new(config: &Config) -> dragon_audio::Result<Self> {
        let mel = MelSpectrogram::new(&MelConfig {
            sample_rate_hz: config.sample_rate_hz,
            n_fft: config.n_fft,
            win_length: config.n_fft,
            hop: config.hop,
            n_mels: config.mel_bins,
            f_min: config.f_min_hz,
            f_max: config.f_max_hz,
            scale: MelScale::Slaney,
            norm: MelNorm::Slaney,
            power: 2.0,
            center: true,
            pad: PadMode::Reflect,
        })?;
        Ok(Self { mel, clip_samples: config.clip_samples })
    }

    /// Log-mel spectrogram of one clip, `[frame][mel]` flat, in dB from -100 up.
    ///
    /// # Errors
    /// If there are not exactly `clip_samples` samples, or one of them is not finite.
    pub fn compute(&self, samples: &[f32]) -> Result<Vec<f32>> {
        if samples.len() != self.clip_samples {
            candle_core::bail!("audio clip: expected {} samples, found {}", self.clip_samples, samples.len())
        }
        if let Some(at) = samples.iter().position(|s| !s.is_finite()) {
            candle_core::bail!("audio clip: sample {at} is {}", samples[at])
        }
        let mut data = self.mel.compute(samples).data;
        for x in &mut data {
            *x = 10.0 * x.max(1e-10).log10();
        }
        Ok(data)
    }
}

/// Deviation of new weights, as in the reference.
const INITIAL_STD: f64 = 0.02;
/// Epsilon of batch and layer norms, PyTorch's default.
const EPS: f64 = 1e-5;
/// Logit of a pair of tokens from different regions of a shifted window, as in the reference.
const MASKED: f32 = -100.0;

/// Log-mel spectrogram to embedding.
#[derive(Debug, Clone)]
pub struct Htsat {
    config: Config,
    bn0: FixedBatchNorm,
    patch_weight: Tensor,
    patch_bias: Tensor,
    patch_norm: Norm,
    stages: Vec<Stage>,
    norm: Norm,
    resize: Option<Tensor>,
}

impl Htsat {
    /// Reads the weights under `vb` (`bn0`, `patch_embed`, `layers.I.blocks.J`, `layers.I.downsample`, `norm`).
    ///
    /// # Errors
    /// If the config contradicts itself, or a tensor is missing or has another shape.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let patch = (config.embed_dim, 1, config.patch_size, config.patch_size);
        // PyTorch's default for a convolution: uniform with bound 1/sqrt(fan in), which is 1/patch_size
        let bound = 1.0 / config.patch_size as f64;
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let projection = vb.pp("patch_embed").pp("proj");
        let resize = (config.n_frames() != config.image_frames())
            .then(|| bicubic_matrix(config.n_frames(), config.image_frames(), &vb))
            .transpose()?;
        Ok(Self {
            config: config.clone(),
            bn0: FixedBatchNorm::new(config.mel_bins, vb.pp("bn0"))?,
            patch_weight: projection.get_with_hints(patch, "weight", uniform)?,
            patch_bias: projection.get_with_hints(config.embed_dim, "bias", uniform)?,
            patch_norm: Norm::new(config.embed_dim, EPS, vb.pp("patch_embed").pp("norm"))?,
            stages: (0..config.depths.len())
                .map(|i| Stage::new(config, i, vb.pp("layers").pp(i)))
                .collect::<Result<_>>()?,
            norm: Norm::new(config.embedding_dim(), EPS, vb.pp("norm"))?,
            resize,
        })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Embedding of log-mel spectrograms (the reference's `embedding`: mean over all tokens after the last norm).
    ///
    /// # Shapes
    /// - `log_mel`: `[B, n_frames, mel_bins]` in dB, from [`LogMel`]; returns `[B, embedding_dim]`, not normalised.
    ///
    /// # Errors
    /// If the shape is another one.
    pub fn forward(&self, log_mel: &Tensor) -> Result<Tensor> {
        let (batch, n_frames, mel_bins) = log_mel.dims3()?;
        if (n_frames, mel_bins) != (self.config.n_frames(), self.config.mel_bins) {
            candle_core::bail!(
                "log-mel: expected [B, {}, {}], found {:?}",
                self.config.n_frames(),
                self.config.mel_bins,
                log_mel.dims()
            )
        }
        let mut x = self.bn0.forward(log_mel)?; // [B, n_frames, mel_bins]
        if let Some(matrix) = &self.resize {
            x = matrix.broadcast_matmul(&x)?; // [B, image_frames, mel_bins]
        }
        let patches = self.fold(&x)?; // [B, side², patch²]
        let weight = self.patch_weight.reshape((self.config.embed_dim, ()))?;
        let tokens = dragon_nn::linear(&patches, &weight, Some(&self.patch_bias))?; // [B, side², embed_dim]
        let mut tokens = self.patch_norm.forward(&tokens)?;
        for stage in &self.stages {
            tokens = stage.forward(&tokens)?; // [B, L/4, 2C]; the last one keeps [B, L, C]
        }
        let embedding = self.norm.forward(&tokens)?.mean(1)?; // [B, embedding_dim]
        debug_assert_eq!(embedding.dims(), [batch, self.config.embedding_dim()]);
        Ok(embedding)
    }

    /// Stacks blocks of frames along frequency and cuts the image into patches, row by row.
    /// Image row `r*mel_bins + f`, column `w` is frame `r*spec_size + w`, band `f`.
    fn fold(&self, x: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (batch, p) = (x.dim(0)?, c.patch_size);
        let (rows, columns) = (c.mel_bins / p, c.spec_size / p);
        x.reshape(&[batch, c.n_blocks(), columns, p, rows, p][..])? // [B, block, column, w, row, f]
            .permute(vec![0, 1, 4, 2, 5, 3])? // [B, block, row, column, f, w]
            .contiguous()?
            .reshape((batch, c.n_blocks() * rows * columns, p * p)) // [B, side², patch²]
    }
}

/// Batch norm over the mel bands by stored statistics; only scale and shift are trained.
#[derive(Debug, Clone)]
struct FixedBatchNorm {
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
}

impl FixedBatchNorm {
    fn new(dim: usize, vb: VarBuilder) -> Result<Self> {
        let get = |name: &str, first: f64| vb.get_with_hints(dim, name, Init::Const(first));
        Ok(Self {
            weight: get("weight", 1.0)?,
            bias: get("bias", 0.0)?,
            mean: get("running_mean", 0.0)?,
            var: get("running_var", 1.0)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let std = (self.var.detach() + EPS)?.sqrt()?; // [mel_bins]
        let x = x.broadcast_sub(&self.mean.detach())?.broadcast_div(&std)?;
        x.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }
}

/// `[n_out, n_in]` matrix of a bicubic resize (a = -0.75, corners aligned, edges repeated), as
/// `torch.nn.functional.interpolate` does it.
fn bicubic_matrix(n_in: usize, n_out: usize, vb: &VarBuilder) -> Result<Tensor> {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0; // |x| <= 1
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A; // 1 < |x| < 2
    let step = if n_out > 1 { (n_in - 1) as f32 / (n_out - 1) as f32 } else { 0.0 };
    let mut matrix = vec![0f32; n_out * n_in];
    for (i, row) in matrix.chunks_exact_mut(n_in).enumerate() {
        let at = step * i as f32; // f32, as the reference computes it
        let left = (at.floor() as usize).min(n_in - 1);
        let t = (at - left as f32) as f64;
        for (offset, weight) in [(-1i64, far(t + 1.0)), (0, near(t)), (1, near(1.0 - t)), (2, far(2.0 - t))] {
            let from = (left as i64 + offset).clamp(0, n_in as i64 - 1) as usize;
            row[from] += weight as f32;
        }
    }
    Tensor::from_vec(matrix, (n_out, n_in), vb.device())?.to_dtype(vb.dtype())
}

/// Blocks of one resolution, then patch merging (but in the last stage).
#[derive(Debug, Clone)]
struct Stage {
    blocks: Vec<Block>,
    merging: Option<PatchMerging>,
}

impl Stage {
    fn new(config: &Config, i: usize, vb: VarBuilder) -> Result<Self> {
        let is_last = i + 1 == config.depths.len();
        Ok(Self {
            blocks: (0..config.depths[i])
                .map(|j| Block::new(config, i, j % 2 == 1, vb.pp("blocks").pp(j)))
                .collect::<Result<_>>()?,
            merging: (!is_last)
                .then(|| PatchMerging::new(config.side(i), config.embed_dim << i, vb.pp("downsample")))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        match &self.merging {
            Some(merging) => merging.forward(&x),
            None => Ok(x),
        }
    }
}

/// Joins 2×2 neighbours, in the order (0,0), (1,0), (0,1), (1,1) of (row, column).
#[derive(Debug, Clone)]
struct PatchMerging {
    order: RowOrder,
    norm: Norm,
    reduction: Dense,
}

impl PatchMerging {
    fn new(side: usize, dim: usize, vb: VarBuilder) -> Result<Self> {
        let half = side / 2;
        let mut source = Vec::with_capacity(side * side);
        for (row, column) in (0..half).flat_map(|r| (0..half).map(move |c| (r, c))) {
            for (down, right) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                source.push(((2 * row + down) * side + 2 * column + right) as u32);
            }
        }
        Ok(Self {
            order: RowOrder::new(source),
            norm: Norm::new(4 * dim, EPS, vb.pp("norm"))?,
            reduction: Dense::no_bias(4 * dim, 2 * dim, INITIAL_STD, vb.pp("reduction"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, len, dim) = x.dims3()?;
        let x = self.order.apply(x)?.reshape((batch, len / 4, 4 * dim))?; // [B, L/4, 4C]
        self.reduction.forward(&self.norm.forward(&x)?) // [B, L/4, 2C]
    }
}

/// Swin block: attention inside windows, then a feed-forward layer, each behind a norm and around a residual.
#[derive(Debug, Clone)]
struct Block {
    norm1: Norm,
    attention: WindowAttention,
    norm2: Norm,
    fc1: Dense,
    fc2: Dense,
}

impl Block {
    fn new(config: &Config, stage: usize, is_shifted: bool, vb: VarBuilder) -> Result<Self> {
        let dim = config.embed_dim << stage;
        let hidden = (dim as f64 * config.mlp_ratio) as usize;
        Ok(Self {
            norm1: Norm::new(dim, EPS, vb.pp("norm1"))?,
            attention: WindowAttention::new(config, stage, is_shifted, vb.pp("attn"))?,
            norm2: Norm::new(dim, EPS, vb.pp("norm2"))?,
            fc1: Dense::new(dim, hidden, INITIAL_STD, vb.pp("mlp").pp("fc1"))?,
            fc2: Dense::new(hidden, dim, INITIAL_STD, vb.pp("mlp").pp("fc2"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.attention.forward(&self.norm1.forward(x)?)?)?; // [B, L, C]
        let h = dragon_nn::gelu(&self.fc1.forward(&self.norm2.forward(&x)?)?)?; // [B, L, hidden]
        &x + self.fc2.forward(&h)?
    }
}

/// Multi-head attention inside windows, with a learned bias per relative position.
///
/// Tokens are brought into the order (place in the window, window): window and head together then form one head
/// axis for [`dragon_nn::attention`], so that the bias of all windows is shared by the batch and nothing is copied
/// per clip.
#[derive(Debug, Clone)]
struct WindowAttention {
    table: Tensor,
    /// Row of `table` for each pair of places in a window, flat `[N * N]`.
    table_rows: Tensor,
    /// `[1, windows, 1, N, N]`: 0, or [`MASKED`] where a shifted window joins distant tokens.
    mask: Tensor,
    order: RowOrder,
    qkv: Dense,
    proj: Dense,
    n_heads: usize,
    n_windows: usize,
}

impl WindowAttention {
    fn new(config: &Config, stage: usize, is_shifted: bool, vb: VarBuilder) -> Result<Self> {
        let (dim, n_heads, side) = (config.embed_dim << stage, config.num_heads[stage], config.side(stage));
        let (window, shift) = config.window(stage);
        let layout = Arc::new(WindowLayout { side, window, shift: if is_shifted { shift } else { 0 } });
        let (n_places, n_windows) = (window * window, (side / window).pow(2));
        let init = Init::Randn { mean: 0.0, stdev: INITIAL_STD };
        let table = ((2 * window - 1).pow(2), n_heads);
        Ok(Self {
            table: vb.get_with_hints(table, "relative_position_bias_table", init)?,
            table_rows: index(layout.table_rows(), vb.device())?,
            mask: Tensor::from_vec(layout.mask(), (1, n_windows, 1, n_places, n_places), &Device::Cpu)?
                .to_device(vb.device())?
                .to_dtype(vb.dtype())?,
            order: RowOrder::new(layout.order()),
            qkv: Dense::new(dim, 3 * dim, INITIAL_STD, vb.pp("qkv"))?,
            proj: Dense::new(dim, dim, INITIAL_STD, vb.pp("proj"))?,
            n_heads,
            n_windows,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, len, dim) = x.dims3()?;
        let (n_places, n_heads) = (len / self.n_windows, self.n_windows * self.n_heads);
        let qkv = self.qkv.forward(&self.order.apply(x)?)?; // [B, N*windows, 3C]
        let part = |i: usize| {
            let rows = (batch, n_places, self.n_windows * dim);
            qkv.narrow(2, i * dim, dim)?.contiguous()?.reshape(rows) // [B, N, windows*C]
        };
        let scale = ((dim / self.n_heads) as f64).powf(-0.5);
        let bias = self.bias(n_places)?;
        let mixed = dragon_nn::attention(&part(0)?, &part(1)?, &part(2)?, n_heads, Some(&bias), scale)?;
        let mixed = self.proj.forward(&mixed.reshape((batch, len, dim))?)?; // [B, N*windows, C]
        self.order.inverse().apply(&mixed) // [B, L, C]
    }

    /// `[1, windows*H, N, N]`.
    fn bias(&self, n_places: usize) -> Result<Tensor> {
        let relative = self.table.index_select(&self.table_rows, 0)?.t()?.contiguous()?; // [H, N*N]
        let relative = relative.reshape((1, 1, self.n_heads, n_places, n_places))?;
        let bias = relative.broadcast_add(&self.mask)?; // [1, windows, H, N, N]
        bias.reshape((1, self.n_windows * self.n_heads, n_places, n_places))
    }
}

/// Where the tokens of a square image lie in (cyclically shifted) windows.
#[derive(Debug)]
struct WindowLayout {
    /// Tokens along a side of the image.
    side: usize,
    /// Tokens along a side of a window.
    window: usize,
    /// Tokens by which the image is rolled up and left before it is cut.
    shift: usize,
}

impl WindowLayout {
    /// Row and column in the rolled image, for every (place, window) in the order of [`Self::order`].
    fn rolled(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let per_side = self.side / self.window;
        (0..self.window * self.window).flat_map(move |place| {
            (0..per_side * per_side).map(move |window| {
                let row = window / per_side * self.window + place / self.window;
                (row, window % per_side * self.window + place % self.window)
            })
        })
    }

    /// Token of the image for every (place, window).
    fn order(&self) -> Vec<u32> {
        let unroll = |at: usize| (at + self.shift) % self.side;
        self.rolled().map(|(row, column)| (unroll(row) * self.side + unroll(column)) as u32).collect()
    }

    /// Row of the bias table for each pair of places: `(dy + w - 1) * (2w - 1) + dx + w - 1`, query minus key.
    fn table_rows(&self) -> Vec<u32> {
        let w = self.window;
        let n = w * w;
        let pairs = (0..n).flat_map(|query| (0..n).map(move |key| (query, key)));
        pairs.map(|(q, k)| ((q / w + w - 1 - k / w) * (2 * w - 1) + q % w + w - 1 - k % w) as u32).collect()
    }

    /// `[windows, N, N]` flat: [`MASKED`] between tokens that were not neighbours before the roll.
    fn mask(&self) -> Vec<f32> {
        let (n, n_windows) = (self.window * self.window, (self.side / self.window).pow(2));
        let band = |at: usize| match at {
            _ if self.shift == 0 || at < self.side - self.window => 0,
            _ if at < self.side - self.shift => 1,
            _ => 2,
        };
        let regions: Vec<usize> = self.rolled().map(|(row, column)| 3 * band(row) + band(column)).collect();
        let region = |place: usize, window: usize| regions[place * n_windows + window];
        let mut mask = Vec::with_capacity(n_windows * n * n);
        for window in 0..n_windows {
            for (query, key) in (0..n).flat_map(|q| (0..n).map(move |k| (q, k))) {
                let same = region(query, window) == region(key, window);
                mask.push(if same { 0.0 } else { MASKED });
            }
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn the_front_end_gives_the_frames_of_the_config_and_refuses_other_clips() {
        for config in [Config::tiny(), Config::tiny_music(), Config::laion_base()] {
            let log_mel = LogMel::new(&config).unwrap();
            let silence = log_mel.compute(&vec![0.0; config.clip_samples]).unwrap();
            assert_eq!(silence.len(), config.n_frames() * config.mel_bins);
            assert!(silence.iter().all(|x| *x == -100.0));
            let message = log_mel.compute(&[0.0; 10]).unwrap_err().to_string();
            assert!(message.contains("found 10"), "{message}");
        }
        let config = Config::tiny();
        let mut samples = vec![0.0; config.clip_samples];
        samples[17] = f32::NAN;
        let message = LogMel::new(&config).unwrap().compute(&samples).unwrap_err().to_string();
        assert!(message.contains("sample 17 is NaN"), "{message}");
    }

    #[test]
    fn contradicting_configs_are_named() {
        let message = |config: Config| {
            let params = dragon_nn::Params::new(0);
            Htsat::new(&config, params.builder(DType::F32, &Device::Cpu)).unwrap_err().to_string()
        };
        assert!(message(Config { hop: 50, ..Config::tiny() }).contains("raise hop or spec_size"));
        assert!(
            message(Config { mel_bins: 12, ..Config::tiny() })
                .contains("spec_size 32 is not a multiple of mel_bins 12")
        );
        assert!(
            message(Config { num_heads: vec![3, 4], ..Config::tiny() })
                .contains("8 channels are not a multiple of 3")
        );
        assert!(
            message(Config { depths: vec![2], ..Config::tiny() }).contains("one positive entry per stage")
        );
    }

    #[test]
    fn a_shifted_layout_is_a_permutation_and_masks_only_edge_windows() {
        let layout = WindowLayout { side: 8, window: 4, shift: 2 };
        let mut order = layout.order();
        order.sort();
        assert_eq!(order, (0..64).collect::<Vec<u32>>());
        let mask = layout.mask();
        assert!(mask[..256].iter().all(|x| *x == 0.0)); // the first window holds no seam
        assert!((1..4).all(|w| mask[256 * w..256 * (w + 1)].contains(&MASKED)));
        assert!(WindowLayout { side: 8, window: 4, shift: 0 }.mask().iter().all(|x| *x == 0.0));
    }

    #[test]
    fn the_published_sizes_have_the_published_parameter_counts() {
        let count = |config: &Config| {
            let params = dragon_nn::Params::new(0);
            let model = Htsat::new(config, params.builder(DType::F32, &Device::Cpu)).unwrap();
            assert_eq!(model.config().embedding_dim(), config.embed_dim * 8);
            params.len_params()
        };
        let n = count(&Config::laion_tiny());
        assert!((27_000_000..28_500_000).contains(&n), "{n}");
    }
}
