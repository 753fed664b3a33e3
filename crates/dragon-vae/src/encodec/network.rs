//! Encoder and decoder of EnCodec (encodec 0.1.1, `modules/seanet.py`, `modules/conv.py`, `modules/lstm.py`).
//!
//! Activations are channels-last, `[B, T, C]`.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use dragon_nn::{Conv1d, Conv1dSpec, ConvTranspose1d, ConvTranspose1dSpec, GroupNorm, Lstm, elu};

use super::config::{Config, Norm};

/// Seconds of audio that pass the convolutions at a time; long enough to make little of the overlap, short enough for
/// activations to stay small.
const PIECE_S: f64 = 4.0;

/// Waveform to latents.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// From samples to frames.
    layers: Vec<Layer>,
    lstm: Lstm,
    last: Conv,
    pieces: Pieces,
}

/// How long inputs are cut.
#[derive(Debug, Clone, Copy)]
struct Pieces {
    hop: usize,
    /// Frames of a piece; none: a norm over time ties all frames together.
    frames: Option<usize>,
}

impl Pieces {
    fn of(cfg: &Config) -> Self {
        let frames = (PIECE_S * f64::from(cfg.sample_rate_hz) / cfg.hop() as f64).ceil() as usize;
        let frames = (cfg.norm == Norm::Weight).then_some(frames.max(1));
        Self { hop: cfg.hop(), frames }
    }

    /// Starts and ends, in frames, of the pieces of `n` frames.
    fn ranges(self, n: usize) -> impl Iterator<Item = (usize, usize)> {
        let step = self.frames.unwrap_or(n).max(1);
        (0..n).step_by(step).map(move |start| (start, (start + step).min(n)))
    }
}

impl Encoder {
    /// Reads the weights under `vb`: `model.0` is the first convolution, then the stages, an LSTM and a convolution.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("model");
        let mut width = cfg.n_filters;
        let first = Shape { c_in: cfg.audio_channels, c_out: width, kernel: cfg.kernel, ..Shape::default() };
        let mut layers = vec![Layer::Conv(Conv::new(cfg, first, vb.pp(0))?)];
        let mut at = 1; // an activation has a number too
        for &ratio in cfg.ratios.iter().rev() {
            for unit in 0..cfg.residual_units {
                layers.push(Layer::Residual(Box::new(Residual::new(cfg, width, unit, vb.pp(at))?)));
                at += 1;
            }
            let down =
                Shape { c_in: width, c_out: 2 * width, kernel: 2 * ratio, stride: ratio, ..Shape::default() };
            layers.extend([Layer::Elu, Layer::Conv(Conv::new(cfg, down, vb.pp(at + 1))?)]);
            (at, width) = (at + 2, 2 * width);
        }
        let last = Shape { c_in: width, c_out: cfg.latent_dim, kernel: cfg.last_kernel, ..Shape::default() };
        Ok(Self {
            layers,
            lstm: Lstm::new(width, cfg.lstm_layers, vb.pp(at).pp("lstm"))?,
            last: Conv::new(cfg, last, vb.pp(at + 2))?,
            pieces: Pieces::of(cfg),
        })
    }

    /// Samples `[B, N, audio_channels]` to latents `[B, ceil(N / hop), latent_dim]`.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn forward(&self, audio: &Tensor) -> Result<Tensor> {
        let (_, samples, _) = audio.dims3()?;
        let hop = self.pieces.hop;
        let mut parts = Vec::new();
        for (start, end) in self.pieces.ranges(samples.div_ceil(hop)) {
            let reads = reads(&self.layers, (start as i64, end as i64)); // samples
            let from = reads.0.max(0) as usize / hop; // a frame, so that strides stay in step
            let to = (reads.1.max(0) as usize).next_multiple_of(hop).max(end * hop).min(samples);
            let part = audio.narrow(1, from * hop, to - from * hop)?;
            let h = self.layers.iter().try_fold(part, |h, layer| layer.forward(&h))?; // [B, T, C]
            parts.push(h.narrow(1, start - from, end - start)?);
        }
        let h = joined(parts)?; // [B, T, C]
        let h = (h.apply(&self.lstm)? + &h)?;
        self.last.forward(&elu(&h)?) // [B, T, latent_dim]
    }
}

/// Latents to waveform.
#[derive(Debug, Clone)]
pub struct Decoder {
    first: Conv,
    lstm: Lstm,
    /// From frames to samples.
    layers: Vec<Layer>,
    pieces: Pieces,
}

impl Decoder {
    /// Reads the weights under `vb`: `model.0` is the first convolution, `model.1` the LSTM, then the stages and a
    /// convolution.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("model");
        let mut width = cfg.n_filters << cfg.ratios.len();
        let first = Shape { c_in: cfg.latent_dim, c_out: width, kernel: cfg.kernel, ..Shape::default() };
        let first = Conv::new(cfg, first, vb.pp(0))?;
        let lstm = Lstm::new(width, cfg.lstm_layers, vb.pp(1).pp("lstm"))?;
        let (mut layers, mut at) = (Vec::new(), 2);
        for &ratio in &cfg.ratios {
            layers.extend([Layer::Elu, Layer::Up(Up::new(cfg, width, ratio, vb.pp(at + 1))?)]);
            (at, width) = (at + 2, width / 2);
            for unit in 0..cfg.residual_units {
                layers.push(Layer::Residual(Box::new(Residual::new(cfg, width, unit, vb.pp(at))?)));
                at += 1;
            }
        }
        let last =
            Shape { c_in: width, c_out: cfg.audio_channels, kernel: cfg.last_kernel, ..Shape::default() };
        layers.extend([Layer::Elu, Layer::Conv(Conv::new(cfg, last, vb.pp(at + 1))?)]);
        Ok(Self { first, lstm, layers, pieces: Pieces::of(cfg) })
    }

    /// Latents `[B, T, latent_dim]` to samples `[B, T * hop, audio_channels]`.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, frames, _) = latents.dims3()?;
        let hop = self.pieces.hop;
        let h = self.first.forward(latents)?; // [B, T, C]
        let h = (h.apply(&self.lstm)? + &h)?;
        let mut parts = Vec::new();
        for (start, end) in self.pieces.ranges(frames) {
            let reads = reads(&self.layers, ((start * hop) as i64, (end * hop) as i64)); // frames
            let (from, to) = (reads.0.max(0) as usize, (reads.1 as usize).min(frames));
            let part = h.narrow(1, from, to - from)?.contiguous()?;
            let audio = self.layers.iter().try_fold(part, |h, layer| layer.forward(&h))?; // [B, T*hop, channels]
            parts.push(audio.narrow(1, (start - from) * hop, (end - start) * hop)?);
        }
        joined(parts)
    }
}

fn joined(parts: Vec<Tensor>) -> Result<Tensor> {
    match parts.as_slice() {
        [one] => one.contiguous(),
        _ => Tensor::cat(&parts, 1),
    }
}

/// What the outputs `span.0..span.1` of layers depend on, the ends of the song left out of account.
fn reads(layers: &[Layer], span: (i64, i64)) -> (i64, i64) {
    layers.iter().rev().fold(span, |span, layer| layer.reads(span))
}

#[derive(Debug, Clone)]
enum Layer {
    Elu,
    Conv(Conv),
    Up(Up),
    Residual(Box<Residual>),
}

impl Layer {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Layer::Elu => elu(x),
            Layer::Conv(conv) => conv.forward(x),
            Layer::Up(up) => up.forward(x),
            Layer::Residual(unit) => unit.forward(x),
        }
    }

    fn reads(&self, span: (i64, i64)) -> (i64, i64) {
        match self {
            Layer::Elu => span,
            Layer::Conv(conv) => conv.reads(span),
            Layer::Up(up) => up.reads(span),
            Layer::Residual(unit) => unit.conv1.reads(span),
        }
    }
}

/// Widths and geometry of a convolution.
#[derive(Debug, Clone, Copy)]
struct Shape {
    c_in: usize,
    c_out: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self { c_in: 1, c_out: 1, kernel: 1, stride: 1, dilation: 1 }
    }
}

/// A convolution that gives `ceil(T / stride)` frames: its input is reflected at both ends, or at its start if the model
/// is causal.
#[derive(Debug, Clone)]
struct Conv {
    conv: Conv1d,
    norm: Option<GroupNorm>,
    /// Frames from the first to the last tap.
    reach: usize,
    stride: usize,
    causal: bool,
}

impl Conv {
    /// Reads `conv.conv.…`, and `conv.norm.…` of a model that is normalised over time.
    fn new(cfg: &Config, shape: Shape, vb: VarBuilder) -> Result<Self> {
        let Shape { c_in, c_out, kernel, stride, dilation } = shape;
        let vb = vb.pp("conv");
        let spec = Conv1dSpec { stride, dilation, ..Conv1dSpec::default() };
        let make = match cfg.norm {
            Norm::Weight => Conv1d::weight_norm,
            Norm::TimeGroup => Conv1d::new,
        };
        Ok(Self {
            conv: make(c_in, c_out, kernel, spec, vb.pp("conv"))?.frozen()?,
            norm: norm(cfg, c_out, &vb)?,
            reach: (kernel - 1) * dilation + 1,
            stride,
            causal: cfg.causal,
        })
    }

    /// Frames added before the first and, for an input of a multiple of the stride, after the last.
    fn padding(&self) -> (usize, usize) {
        let total = self.reach - self.stride;
        let after = if self.causal { 0 } else { total / 2 };
        (total - after, after)
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (before, after) = self.padding();
        let (_, frames, _) = x.dims3()?;
        let x = reflected(x, before, after + frames.next_multiple_of(self.stride) - frames)?;
        normed(x.apply(&self.conv)?, self.norm.as_ref())
    }

    fn reads(&self, (start, end): (i64, i64)) -> (i64, i64) {
        let (stride, before) = (self.stride as i64, self.padding().0 as i64);
        (start * stride - before, (end - 1) * stride - before + self.reach as i64)
    }
}

/// A transposed convolution that gives `T * stride` frames.
#[derive(Debug, Clone)]
struct Up {
    conv: ConvTranspose1d,
    norm: Option<GroupNorm>,
    stride: usize,
    /// Frames cut from the start; the others that are too many are cut from the end.
    cut: usize,
}

impl Up {
    /// Reads `convtr.convtr.…`, and `convtr.norm.…` of a model that is normalised over time.
    fn new(cfg: &Config, width: usize, ratio: usize, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("convtr");
        let spec = ConvTranspose1dSpec { stride: ratio, ..ConvTranspose1dSpec::default() };
        let make = match cfg.norm {
            Norm::Weight => ConvTranspose1d::weight_norm,
            Norm::TimeGroup => ConvTranspose1d::new,
        };
        Ok(Self {
            conv: make(width, width / 2, 2 * ratio, spec, vb.pp("convtr"))?.frozen()?,
            norm: norm(cfg, width / 2, &vb)?,
            stride: ratio,
            cut: if cfg.causal { 0 } else { ratio - ratio / 2 },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, frames, _) = x.dims3()?;
        let y = normed(x.apply(&self.conv)?, self.norm.as_ref())?; // [B, (T+1)*stride, C]
        y.narrow(1, self.cut, frames * self.stride)?.contiguous()
    }

    /// Input `i` reaches outputs `i * stride - cut` to `(i + 2) * stride - cut`.
    fn reads(&self, (start, end): (i64, i64)) -> (i64, i64) {
        let (stride, cut) = (self.stride as i64, self.cut as i64);
        ((start + cut).div_euclid(stride) - 1, (end - 1 + cut).div_euclid(stride) + 1)
    }
}

/// Two convolutions, each after an activation, and the input added.
#[derive(Debug, Clone)]
struct Residual {
    conv1: Conv,
    conv2: Conv,
    shortcut: Option<Conv>,
}

impl Residual {
    fn new(cfg: &Config, width: usize, unit: usize, vb: VarBuilder) -> Result<Self> {
        let inner = width / cfg.compress;
        let dilation = cfg.dilation_base.pow(unit as u32);
        let conv1 = Shape { c_in: width, c_out: inner, kernel: cfg.residual_kernel, stride: 1, dilation };
        let conv2 = Shape { c_in: inner, c_out: width, ..Shape::default() };
        let shortcut = Shape { c_in: width, c_out: width, ..Shape::default() };
        Ok(Self {
            conv1: Conv::new(cfg, conv1, vb.pp("block").pp(1))?,
            conv2: Conv::new(cfg, conv2, vb.pp("block").pp(3))?,
            shortcut: match cfg.conv_shortcut {
                true => Some(Conv::new(cfg, shortcut, vb.pp("shortcut"))?),
                false => None,
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&elu(x)?)?; // [B, T, C / compress]
        let h = self.conv2.forward(&elu(&h)?)?; // [B, T, C]
        match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)? + h,
            None => x + h,
        }
    }
}

/// The value of `torch.nn.GroupNorm`.
const EPS: f64 = 1e-5;

fn norm(cfg: &Config, channels: usize, vb: &VarBuilder) -> Result<Option<GroupNorm>> {
    match cfg.norm {
        Norm::Weight => Ok(None),
        Norm::TimeGroup => GroupNorm::new(channels, EPS, vb.pp("norm")).map(Some),
    }
}

fn normed(x: Tensor, norm: Option<&GroupNorm>) -> Result<Tensor> {
    match norm {
        Some(norm) => x.apply(norm),
        None => Ok(x),
    }
}

/// `x` `[B, T, C]` with `before` and `after` frames more, reflected at its first and last frame. An input too short for
/// that is first filled up with zeros, which are cut from the end again (`pad1d` of the reference).
fn reflected(x: &Tensor, before: usize, after: usize) -> Result<Tensor> {
    if before == 0 && after == 0 {
        return x.contiguous();
    }
    let (_, frames, _) = x.dims3()?;
    let zeros = (before.max(after) + 1).saturating_sub(frames);
    let x = if zeros > 0 { x.pad_with_zeros(1, 0, zeros)? } else { x.clone() };
    let n = frames + zeros;
    let pick = |frames: Vec<u32>| x.contiguous()?.index_select(&Tensor::new(frames, x.device())?, 1);
    let mut parts = Vec::with_capacity(3);
    if before > 0 {
        parts.push(pick((1..=before as u32).rev().collect())?);
    }
    parts.push(x.clone());
    if after > 0 {
        parts.push(pick((0..after).map(|i| (n - 2 - i) as u32).collect())?);
    }
    let padded = Tensor::cat(&parts, 1)?;
    padded.narrow(1, 0, before + frames + after)?.contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn edges_are_reflected_and_short_inputs_filled_up_first() {
        for (frames, before, after, want) in [
            (4, 2, 1, vec![3., 2., 1., 2., 3., 4., 3.]),
            (2, 3, 1, vec![0., 0., 2., 1., 2., 0.]), // torch: pad1d([1, 2], (3, 1), "reflect")
            (1, 0, 0, vec![1.]),
        ] {
            let x = Tensor::arange(1f32, frames as f32 + 1.0, &Device::Cpu).unwrap();
            let x = x.reshape((1, frames, 1)).unwrap();
            let got = reflected(&x, before, after).unwrap().flatten_all().unwrap();
            assert_eq!(got.to_vec1::<f32>().unwrap(), want);
        }
    }
}
