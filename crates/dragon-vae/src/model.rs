//! Encoder and decoder of the audio VAE (paper Appendix E, which builds on DAC, Kumar et al. 2023, arXiv:2306.06546).
//! Reference: descript-audio-codec 1.0.0 (MIT), `dac/model/dac.py`, `Encoder` and `Decoder`; the path in code is the path
//! in its checkpoints (`encoder.block.1.block.0.block.1.weight_g`).
//!
//! [`Design::Oobleck`] is the same network with Stable Audio's details (stable-audio-tools 0.0.19 (MIT),
//! `models/autoencoders.py`, `OobleckEncoder` and `OobleckDecoder`); where its tensors are called otherwise,
//! [`crate::published`] says how.
//!
//! Differences from the reference: the encoder ends in mean and log-variance of the latents, 2 × `latent_dim` channels;
//! widths and the number of residual units may differ between stages; frames may be folded into channels
//! ([`Config::frames_per_latent`]); the residual vector quantiser is in [`crate::dac`].
//! With an odd stride the decoder gives `T * stride` samples (`output_padding` 1), where the reference gives one less.
//! Golden tests: `encoder_and_decoder_match_the_reference` and `oobleck_matches_its_references` in `tests/golden.rs`.
//!
//! Inside, activations are channels-last, `[B, T, C]`; audio and latents are `[B, C, T]`.

use candle_core::{Result, Tensor, bail};
use candle_nn::VarBuilder;
use dragon_nn::{Conv1d, Conv1dSpec, ConvTranspose1d, ConvTranspose1dSpec, Snake};

use crate::config::{Config, Design, Output};

/// Waveform to the parameters of the latents' distribution.
#[derive(Debug, Clone)]
pub struct Encoder {
    conv_in: Conv1d,
    blocks: Vec<EncoderBlock>,
    snake_out: Snake,
    conv_out: Conv1d,
    audio_channels: usize,
    frames_per_latent: usize,
    hop: usize,
}

impl Encoder {
    /// Reads the weights under `vb`: `block.0` is the first convolution, `block.1 …` the stages, then snake and convolution.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Self::with_outputs(cfg, 2 * cfg.inner_dim(), vb)
    }

    /// The same with another number of output channels.
    pub(crate) fn with_outputs(cfg: &Config, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("block");
        let widths = &cfg.encoder_channels;
        let conv_in = Conv1d::weight_norm(cfg.audio_channels, widths[0], 7, same(7, 1), vb.pp(0))?;
        let mut blocks = Vec::new();
        for (stage, &stride) in cfg.strides.iter().enumerate() {
            let shape = BlockShape {
                from: widths[stage],
                to: widths[stage + 1],
                stride,
                residual_units: cfg.encoder_units[stage],
                design: cfg.design,
            };
            blocks.push(EncoderBlock::new(shape, vb.pp(stage + 1))?);
        }
        let last = cfg.strides.len() + 1;
        let width = widths[cfg.strides.len()];
        Ok(Self {
            conv_in,
            blocks,
            snake_out: snake(cfg.design, width, vb.pp(last))?,
            conv_out: Conv1d::weight_norm(width, outputs, 3, same(3, 1), vb.pp(last + 1))?,
            audio_channels: cfg.audio_channels,
            frames_per_latent: cfg.frames_per_latent,
            hop: cfg.hop(),
        })
    }

    /// Mean and log-variance of the latents, one above the other.
    ///
    /// # Shapes
    /// - `audio`: `[B, audio_channels, T * hop]`, nominally in [-1, 1]; returns `[B, 2 * latent_dim, T]`.
    ///
    /// # Errors
    /// If `audio` has another number of channels, or a length that is not a positive multiple of the hop.
    pub fn forward(&self, audio: &Tensor) -> Result<Tensor> {
        let (batch, channels, samples) = audio.dims3()?;
        if channels != self.audio_channels {
            bail!("encode: expected audio of {} channels, found {channels}", self.audio_channels);
        }
        if samples == 0 || !samples.is_multiple_of(self.hop) {
            bail!(
                "encode: expected a length that is a positive multiple of the hop, {} samples, found {samples}; pad or cut the audio",
                self.hop
            );
        }
        let h = self.outputs(audio)?; // [B, T*f, 2*c], f frames of c channels per latent frame
        let (_, frames, width) = h.dims3()?;
        let f = self.frames_per_latent;
        let h = h.reshape((batch, frames / f, f, 2, width / 2))?.permute((0, 3, 2, 4, 1))?; // [B, 2, f, c, T]
        h.contiguous()?.reshape((batch, width * f, frames / f)) // [B, 2*latent_dim, T]
    }

    /// What the layers make of audio `[B, audio_channels, N]` of any length that they can take: `[B, T, outputs]`, where `T` is
    /// `N / hop` or one less or more if the hop does not divide `N`.
    pub(crate) fn outputs(&self, audio: &Tensor) -> Result<Tensor> {
        let mut h = audio.transpose(1, 2)?.contiguous()?.apply(&self.conv_in)?; // [B, N, C0]
        for block in &self.blocks {
            h = block.forward(&h)?; // [B, T'/stride, C']
        }
        h.apply(&self.snake_out)?.apply(&self.conv_out) // [B, T, outputs]
    }

    /// Samples that the latent frames `start..end` depend on, clips' ends left out of account: `(first, past_last)`. `first`
    /// can be negative.
    pub fn receptive_field(&self, start: usize, end: usize) -> (i64, i64) {
        let f = self.frames_per_latent;
        let widen = |span: (i64, i64), by: usize| (span.0 - by as i64, span.1 + by as i64);
        let mut span = widen(((start * f) as i64, (end * f) as i64), 1); // conv_out, kernel 3
        for block in self.blocks.iter().rev() {
            // Kernel 2s, padding p: output i reads inputs i*s - p to i*s - p + 2s - 1.
            let (s, p) = (block.down.spec().stride as i64, block.down.spec().padding as i64);
            span = (span.0 * s - p, (span.1 - 1) * s - p + 2 * s);
            for unit in (0..block.units.len()).rev() {
                span = widen(span, 3 * dilation(unit));
            }
        }
        widen(span, 3) // conv_in, kernel 7
    }
}

/// Latents to waveform.
#[derive(Debug, Clone)]
pub struct Decoder {
    conv_in: Conv1d,
    blocks: Vec<DecoderBlock>,
    snake_out: Snake,
    conv_out: Conv1d,
    output: Output,
    latent_dim: usize,
    frames_per_latent: usize,
    strides: Vec<usize>,
    residual_units: Vec<usize>,
}

impl Decoder {
    /// Reads the weights under `vb`: `model.0` is the first convolution, `model.1 …` the stages, then snake and convolution.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Self::build(cfg, true, vb)
    }

    /// `whole`: `T * stride` frames after an odd stride, else one less, as the reference has it.
    pub(crate) fn build(cfg: &Config, whole: bool, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("model");
        let n = cfg.strides.len();
        let widths = &cfg.decoder_channels;
        let conv_in = Conv1d::weight_norm(cfg.inner_dim(), widths[n], 7, same(7, 1), vb.pp(0))?;
        let mut blocks = Vec::new();
        for stage in (0..n).rev() {
            let shape = BlockShape {
                from: widths[stage + 1],
                to: widths[stage],
                stride: cfg.strides[stage],
                residual_units: cfg.decoder_units[stage],
                design: cfg.design,
            };
            blocks.push(DecoderBlock::new(shape, whole, vb.pp(n - stage))?);
        }
        let conv_out = match cfg.design {
            Design::Dac => Conv1d::weight_norm,
            Design::Oobleck => Conv1d::weight_norm_no_bias,
        };
        Ok(Self {
            conv_in,
            blocks,
            snake_out: snake(cfg.design, widths[0], vb.pp(n + 1))?,
            conv_out: conv_out(widths[0], cfg.audio_channels, 7, same(7, 1), vb.pp(n + 2))?,
            output: cfg.output,
            latent_dim: cfg.latent_dim,
            frames_per_latent: cfg.frames_per_latent,
            strides: cfg.strides.iter().rev().copied().collect(),
            residual_units: cfg.decoder_units.iter().rev().copied().collect(),
        })
    }

    /// Decodes latents, not normalised.
    ///
    /// # Shapes
    /// - `latents`: `[B, latent_dim, T]`; returns `[B, audio_channels, T * hop]`.
    ///
    /// # Errors
    /// If `latents` has another number of channels or no frame.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let (batch, channels, frames) = latents.dims3()?;
        if channels != self.latent_dim {
            bail!("decode: expected latents of {} channels, found {channels}", self.latent_dim);
        }
        if frames == 0 {
            bail!("decode: expected at least one latent frame, found none");
        }
        let f = self.frames_per_latent;
        let h = latents.reshape((batch, f, channels / f, frames))?.permute((0, 3, 1, 2))?; // [B, T, f, c]
        let h = h.contiguous()?.reshape((batch, frames * f, channels / f))?; // [B, T*f, c]
        let mut h = h.apply(&self.conv_in)?; // [B, T*f, Cn]
        for block in &self.blocks {
            h = block.forward(&h)?; // [B, T'*stride, C']
        }
        let h = h.apply(&self.snake_out)?.apply(&self.conv_out)?; // [B, T*hop, audio_channels]
        let audio = h.transpose(1, 2)?.contiguous()?; // [B, audio_channels, T*hop]
        match self.output {
            Output::Tanh => audio.tanh(),
            Output::Linear => Ok(audio),
        }
    }

    /// Latent frames that the samples of frames `start..end` depend on, clips' ends left out of account: `(first, past_last)`.
    /// `first` can be negative.
    pub fn receptive_field(&self, start: usize, end: usize) -> (i64, i64) {
        let f = self.frames_per_latent as i64;
        let hop = self.strides.iter().product::<usize>() * self.frames_per_latent;
        let mut span = ((start * hop) as i64, (end * hop) as i64);
        let widen = |span: (i64, i64), by: usize| (span.0 - by as i64, span.1 + by as i64);
        span = widen(span, 3); // conv_out, kernel 7
        for (&stride, &units) in self.strides.iter().zip(&self.residual_units).rev() {
            for unit in (0..units).rev() {
                span = widen(span, 3 * dilation(unit));
            }
            // Transposed convolution, kernel 2s, padding p: input i reaches outputs i*s - p … i*s - p + 2s - 1.
            let (s, p) = (stride as i64, stride.div_ceil(2) as i64);
            span = ((span.0 + p - s).div_euclid(s), (span.1 - 1 + p).div_euclid(s) + 1);
        }
        span = widen(span, 3); // conv_in, kernel 7
        (span.0.div_euclid(f), (span.1 + f - 1).div_euclid(f))
    }
}

/// Widths, stride and depth of one stage.
struct BlockShape {
    from: usize,
    to: usize,
    stride: usize,
    residual_units: usize,
    design: Design,
}

#[derive(Debug, Clone)]
struct EncoderBlock {
    units: Vec<ResidualUnit>,
    snake: Snake,
    down: Conv1d,
}

impl EncoderBlock {
    fn new(shape: BlockShape, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("block");
        let n = shape.residual_units;
        let units: Result<_> =
            (0..n).map(|i| ResidualUnit::new(&shape, shape.from, dilation(i), vb.pp(i))).collect();
        let spec = Conv1dSpec { stride: shape.stride, padding: shape.stride.div_ceil(2), ..same(1, 1) };
        Ok(Self {
            units: units?,
            snake: snake(shape.design, shape.from, vb.pp(n))?,
            down: Conv1d::weight_norm(shape.from, shape.to, 2 * shape.stride, spec, vb.pp(n + 1))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = x.clone(); // [B, T, C]
        for unit in &self.units {
            h = unit.forward(&h)?;
        }
        h.apply(&self.snake)?.apply(&self.down) // [B, T/stride, C']
    }
}

#[derive(Debug, Clone)]
struct DecoderBlock {
    snake: Snake,
    up: ConvTranspose1d,
    units: Vec<ResidualUnit>,
}

impl DecoderBlock {
    fn new(shape: BlockShape, whole: bool, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("block");
        let spec = ConvTranspose1dSpec {
            stride: shape.stride,
            padding: shape.stride.div_ceil(2),
            output_padding: if whole { shape.stride % 2 } else { 0 },
            dilation: 1,
            groups: 1,
        };
        let units: Result<_> = (0..shape.residual_units)
            .map(|i| ResidualUnit::new(&shape, shape.to, dilation(i), vb.pp(i + 2)))
            .collect();
        Ok(Self {
            snake: snake(shape.design, shape.from, vb.pp(0))?,
            up: ConvTranspose1d::weight_norm(shape.from, shape.to, 2 * shape.stride, spec, vb.pp(1))?,
            units: units?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = x.apply(&self.snake)?.apply(&self.up)?; // [B, T*stride, C']
        for unit in &self.units {
            h = unit.forward(&h)?;
        }
        Ok(h)
    }
}

/// Snake, dilated convolution of 7 taps, snake, convolution of 1 tap, and the input added.
#[derive(Debug, Clone)]
struct ResidualUnit {
    snake1: Snake,
    conv1: Conv1d,
    snake2: Snake,
    conv2: Conv1d,
}

impl ResidualUnit {
    fn new(shape: &BlockShape, channels: usize, dilation: usize, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("block");
        Ok(Self {
            snake1: snake(shape.design, channels, vb.pp(0))?,
            conv1: Conv1d::weight_norm(channels, channels, 7, same(7, dilation), vb.pp(1))?,
            snake2: snake(shape.design, channels, vb.pp(2))?,
            conv2: Conv1d::weight_norm(channels, channels, 1, same(1, 1), vb.pp(3))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = x.apply(&self.snake1)?.apply(&self.conv1)?; // [B, T, C]
        x + h.apply(&self.snake2)?.apply(&self.conv2)?
    }
}

fn snake(design: Design, channels: usize, vb: VarBuilder) -> Result<Snake> {
    match design {
        Design::Dac => Snake::new(channels, vb),
        Design::Oobleck => Snake::beta(channels, vb),
    }
}

/// Dilation of the `unit`-th residual unit of a stage: 1, 3, 9 …
fn dilation(unit: usize) -> usize {
    3usize.pow(unit as u32)
}

/// A convolution of odd `kernel` that keeps the length.
fn same(kernel: usize, dilation: usize) -> Conv1dSpec {
    Conv1dSpec { stride: 1, padding: (kernel - 1) * dilation / 2, dilation, groups: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_keeps_the_length_for_odd_kernels() {
        assert_eq!(same(7, 9).padding, 27);
        assert_eq!(same(1, 1).padding, 0);
    }
}
