//! [`super::snake_beta`] as candle operations.

use candle_core::{Result, Tensor};

pub(crate) fn snake(x: &Tensor, alpha: &Tensor, beta: &Tensor) -> Result<Tensor> {
    let wave = x.broadcast_mul(alpha)?.sin()?.sqr()?;
    x + wave.broadcast_div(&(beta + super::EPS)?)?
}
