//! Batch normalisation, alone and behind a maximum over the bands.

/// Batch normalisation with fixed statistics: `x * scale + shift` per channel.
#[derive(Debug, Clone)]
pub(super) struct Norm {
    pub scale: Vec<f32>,
    pub shift: Vec<f32>,
}

impl Norm {
    pub fn apply(&self, row: &mut [f32]) {
        for ((x, scale), shift) in row.iter_mut().zip(&self.scale).zip(&self.shift) {
            *x = *x * scale + shift;
        }
    }
}

/// Relu, then [`Norm`], on rows of channels.
pub(super) fn relu_norm(rows: &mut [f32], bias: &[f32], norm: &Norm) {
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
pub(super) struct PooledNorm {
    pub sign: Vec<f32>,
    bias: Vec<f32>,
    norm: Norm,
}

impl PooledNorm {
    pub fn new(bias: Vec<f32>, norm: Norm) -> Self {
        let sign = norm.scale.iter().map(|&s| if s < 0.0 { -1.0 } else { 1.0 }).collect();
        PooledNorm { sign, bias, norm }
    }

    pub fn apply(&self, channel: usize, largest: f32) -> f32 {
        let x = (self.sign[channel] * largest + self.bias[channel]).max(0.0);
        x * self.norm.scale[channel] + self.norm.shift[channel]
    }
}
