//! Fast differentiable layers for candle on the CPU, and what training needs around them.
//!
//! - Operations, one module each: [`linear()`], [`conv1d()`], [`conv_transpose1d()`], [`attention()`],
//!   [`layer_norm()`], [`ada_layer_norm()`], [`rms_norm()`], [`group_norm()`], [`swiglu()`], [`snake()`], [`lstm()`] and
//!   the activations.
//!   `plain.rs` in each is the definition in candle operations; `cpu.rs` the fast form, forward and backward.
//! - Layers over a `VarBuilder`: [`Linear`], [`Conv1d`], [`ConvTranspose1d`], [`LayerNorm`], [`RmsNorm`], [`GroupNorm`],
//!   [`Embedding`], [`Snake`], [`Lstm`].
//! - [`Params`]: named variables with seeded initialisation; [`AdamW`] changes them, [`Ema`] averages them,
//!   [`write_safetensors`] keeps them.
//! - [`Checkpoint`]: weights that others have published, memory-mapped; [`Loader`] builds a model on them.
//! - [`backward()`]: candle's backward pass without its detours for parameters.
//! - [`Rng`]: noise that is the same on every machine; [`peak_mib`]: what a run needs.
//!
//! Activations are channels-last and contiguous, `[B, T, C]`; weights keep the layout of PyTorch's checkpoints.

#![allow(clippy::needless_range_loop, reason = "kernels walk several slices in step; one index says so")]

mod kernels;
mod rng;

mod activation;
mod ada_layer_norm;
mod attention;
mod conv1d;
mod conv_transpose1d;
mod gated_add;
mod group_norm;
mod layer_norm;
mod linear;
mod lstm;
mod rms_norm;
mod rotary;
mod snake;
mod swiglu;
mod swiglu_feed_forward;

mod adamw;
mod backward;
mod checkpoint;
mod ema;
pub mod lora;
mod modules;
mod params;

pub use activation::{elu, gelu, gelu_tanh, leaky_relu, relu, silu, softmax_last};
pub use ada_layer_norm::ada_layer_norm;
pub use adamw::{AdamW, AdamWConfig};
pub use attention::{attention, attention_cached};
pub use backward::backward;
pub use checkpoint::{Checkpoint, Loader, Source, json, write_atomically, write_safetensors};
pub use conv_transpose1d::{ConvTranspose1dSpec, conv_transpose1d};
pub use conv1d::{Conv1dSpec, conv1d};
pub use ema::Ema;
pub use gated_add::gated_add;
pub use group_norm::group_norm;
pub use layer_norm::layer_norm;
pub use linear::{linear, linear_few_rows};
pub use lora::{Lora, LoraConfig};
pub use lstm::{LstmWeights, lstm};
pub use modules::{Conv1d, ConvTranspose1d, Embedding, GroupNorm, LayerNorm, Linear, Lstm, RmsNorm, Snake};
pub use params::{LoadError, Params};
pub use rms_norm::rms_norm;
pub use rng::Rng;
pub use rotary::Rotary;
pub use snake::{snake, snake_beta};
pub use swiglu::{swiglu, swiglu_value_first};
pub use swiglu_feed_forward::swiglu_feed_forward;

use candle_core::{DType, Result, Tensor};

/// Largest resident memory of this process so far, MiB; `None` where the system does not tell.
pub fn peak_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? / 1024.0)
}

/// Whether a tensor is bf16 or f16: sums of some hundred terms stop growing in these, so that norms and softmax are
/// computed in f32, as PyTorch does.
fn is_half(x: &Tensor) -> bool {
    matches!(x.dtype(), DType::BF16 | DType::F16)
}

/// Fails unless every present parameter is a vector of `x`'s last dimension.
fn check_last(op: &str, x: &Tensor, params: &[Option<&Tensor>]) -> Result<()> {
    for param in params.iter().flatten() {
        if param.rank() != 1 || x.dims().last() != Some(&param.dims()[0]) {
            candle_core::bail!("{op}: parameter {:?} does not fit x {:?}", param.dims(), x.dims())
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
