//! Rotary position embeddings.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};
use std::sync::Arc;

/// Angles of rotary position embeddings (Su et al. 2021, arXiv:2104.09864): pair `i` of a head turns by
/// `t · base^(-2i / rotary_dim)` at frame `t`. Channels `i` and `i + rotary_dim / 2` of a head form a pair (the GPT-NeoX order);
/// channels from `rotary_dim` on stay as they are.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `[T, rotary_dim / 2]`, row by row.
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    half: usize,
    n_frames: usize,
}

impl Rotary {
    /// Angles for frames `0 .. n_frames`; `rotary_dim` is even and at most the width of a head.
    pub fn new(rotary_dim: usize, base: f64, n_frames: usize) -> Self {
        let half = rotary_dim / 2;
        let angles = (0..n_frames)
            .flat_map(|t| (0..half).map(move |i| t as f64 * base.powf(-(i as f64) / half as f64)))
            .collect::<Vec<f64>>();
        Self {
            cos: Arc::new(angles.iter().map(|a| a.cos() as f32).collect()),
            sin: Arc::new(angles.iter().map(|a| a.sin() as f32).collect()),
            half,
            n_frames,
        }
    }

    /// Turns the heads of `x` by the angles of their frames.
    ///
    /// # Shapes
    /// - `x`: `[B, T, H·D]` with `H = heads`; returns the same.
    ///
    /// # Errors
    /// If `T` is above the number of frames the angles were made for, or the channels do not divide into heads that
    /// are wide enough.
    pub fn apply(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (_, frames, channels) = x.dims3()?;
        if frames > self.n_frames
            || heads == 0
            || !channels.is_multiple_of(heads)
            || 2 * self.half > channels / heads
        {
            candle_core::bail!(
                "rotary angles for {} frames and {} channels a head do not fit {:?} with {heads} heads",
                self.n_frames,
                2 * self.half,
                x.dims()
            )
        }
        if self.half == 0 {
            return Ok(x.clone());
        }
        if crate::kernels::fast(&[x]) { cpu::rotary(self, x, heads) } else { plain::rotary(self, x, heads) }
    }
}
