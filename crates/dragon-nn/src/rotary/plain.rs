//! [`super::Rotary::apply`] as candle operations.

use super::Rotary;
use candle_core::{Result, Tensor};

pub(crate) fn rotary(angles: &Rotary, x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, frames, channels) = x.dims3()?;
    let (half, head_dim) = (angles.half, channels / heads);
    let x = x.reshape((batch, frames, heads, head_dim))?;
    let table = |values: &[f32]| {
        Tensor::from_slice(&values[..frames * half], (1, frames, 1, half), x.device())?.to_dtype(x.dtype())
    };
    let (cos, sin) = (table(&angles.cos)?, table(&angles.sin)?);
    let (a, b) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let mut parts = vec![turned_a, turned_b];
    if head_dim > 2 * half {
        parts.push(x.narrow(3, 2 * half, head_dim - 2 * half)?);
    }
    Tensor::cat(&parts, 3)?.flatten_from(2)
}
