//! The activations and the softmax on the CPU, forward and backward.

use crate::kernels::{
    Real, by_dtype, dot, dtype, filled, for_each, lane_max, lane_sum, map, map2, rows_per_task, slice,
    tensor, view,
};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// An element-wise function with a known derivative.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Activation {
    Gelu,
    GeluTanh,
    Silu,
    Relu,
    LeakyRelu(f64),
    Elu,
}

pub(crate) fn apply(x: &Tensor, activation: Activation) -> Result<Tensor> {
    x.contiguous()?.apply_op1(activation)
}

const FRAC_1_SQRT_2: f64 = std::f64::consts::FRAC_1_SQRT_2;
/// `1 / sqrt(2 π)`.
const DENSITY_AT_0: f64 = 0.398_942_280_401_432_7;

/// `sqrt(2 / π)` and the cube's factor in the tanh form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).
const TANH_SCALE: f64 = 0.797_884_560_802_865_4;
const TANH_CUBE: f64 = 0.044_715;

/// The normal distribution function, nearly: `(1 + tanh u) / 2 = σ(2 u)` with `u = sqrt(2 / π) (x + 0.044715 x³)`.
#[inline(always)]
fn phi_tanh<T: Real>(x: T) -> T {
    (x * (x * x).fma(T::of(2.0 * TANH_SCALE * TANH_CUBE), T::of(2.0 * TANH_SCALE))).sigmoid()
}

/// The normal distribution function.
#[inline(always)]
fn phi<T: Real>(x: T) -> T {
    T::of(0.5) * (T::ONE + (x * T::of(FRAC_1_SQRT_2)).erf_())
}

impl Activation {
    fn forward<T: Real>(self, x: &[T]) -> Vec<T> {
        match self {
            Activation::Gelu => map(x, |x| x * phi(x)),
            Activation::GeluTanh => map(x, |x| x * phi_tanh(x)),
            Activation::Silu => map(x, |x| x * x.sigmoid()),
            Activation::Relu => map(x, |x| if x < T::ZERO { T::ZERO } else { x }), // NaN stays
            Activation::LeakyRelu(slope) => {
                let slope = T::of(slope);
                map(x, move |x| if x > T::ZERO { x } else { x * slope })
            }
            Activation::Elu => map(x, |x| {
                let below = (if x > T::ZERO { T::ZERO } else { x }).exp_of_negative() - T::ONE;
                if x > T::ZERO { x } else { below }
            }),
        }
    }

    fn backward<T: Real>(self, x: &[T], g: &[T]) -> Vec<T> {
        match self {
            Activation::Gelu => map2(x, g, |x, g| {
                let density = T::of(DENSITY_AT_0) * (x * x * T::of(-0.5)).exp_();
                g * x.fma(density, phi(x))
            }),
            Activation::GeluTanh => map2(x, g, |x, g| {
                let s = phi_tanh(x);
                let slope = (x * x).fma(T::of(6.0 * TANH_SCALE * TANH_CUBE), T::of(2.0 * TANH_SCALE)); // of 2 u
                g * s * (x * slope).fma(T::ONE - s, T::ONE)
            }),
            Activation::Silu => map2(x, g, |x, g| {
                let s = x.sigmoid();
                g * s * (x * (T::ONE - s) + T::ONE)
            }),
            Activation::Relu => map2(x, g, |x, g| if x > T::ZERO { g } else { T::ZERO }),
            Activation::LeakyRelu(slope) => {
                let slope = T::of(slope);
                map2(x, g, move |x, g| if x > T::ZERO { g } else { g * slope })
            }
            Activation::Elu => map2(x, g, |x, g| {
                let below = (if x > T::ZERO { T::ZERO } else { x }).exp_of_negative();
                if x > T::ZERO { g } else { g * below }
            }),
        }
    }
}

impl CustomOp1 for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(x), T => Ok((T::storage(self.forward(slice::<T>(x, xl)?)), xl.shape().clone())))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        by_dtype!(x.dtype(), T => Ok(Some(tensor(self.backward(&view::<T>(x)?, &view::<T>(&grad)?), x.shape())?)))
    }
}

pub(crate) fn softmax_last(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Softmax)
}

struct Softmax;

/// Turns logits into weights in place; a row of `-inf` becomes zeros.
#[inline(always)]
pub(crate) fn softmax_row<T: Real>(row: &mut [T]) {
    let max = lane_max(row);
    if max == T::NEG_INFINITY {
        row.fill(T::ZERO);
        return;
    }
    for v in row.iter_mut() {
        *v = (*v - max).exp_();
    }
    let inverse = T::ONE / lane_sum(row.len(), |i| row[i]);
    for v in row.iter_mut() {
        *v *= inverse;
    }
}

fn softmax_forward<T: Real>(x: &[T], c: usize) -> Vec<T> {
    let mut y = x.to_vec();
    let block = rows_per_task(c) * c;
    let pointer = crate::kernels::shared(&mut y);
    for_each(x.len().div_ceil(block), x.len() * 8, |task| {
        let start = task * block;
        // SAFETY: blocks do not overlap.
        let part = unsafe { pointer.range(start, block.min(x.len() - start)) };
        part.chunks_exact_mut(c).for_each(softmax_row);
    });
    y
}

fn softmax_backward<T: Real>(y: &[T], g: &[T], c: usize) -> Vec<T> {
    let rows = y.len() / c;
    let block = rows_per_task(c);
    // SAFETY: the blocks cover the rows.
    unsafe {
        filled(y.len(), |out| {
            for_each(rows.div_ceil(block), y.len() * 4, |task| {
                for r in task * block..((task + 1) * block).min(rows) {
                    let (y, g, dx) = (&y[r * c..][..c], &g[r * c..][..c], out.range(r * c, c));
                    let level = dot(y, g);
                    for i in 0..c {
                        dx[i] = y[i] * (g[i] - level);
                    }
                }
            });
        })
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some(&c) = xl.dims().last() else { candle_core::bail!("softmax of a scalar") };
        by_dtype!(dtype(x), T => Ok((T::storage(softmax_forward(slice::<T>(x, xl)?, c.max(1))), xl.shape().clone())))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let c = *y.dims().last().expect("checked forward");
        by_dtype!(y.dtype(), T => {
            Ok(Some(tensor(softmax_backward(&view::<T>(y)?, &view::<T>(&grad)?, c.max(1)), y.shape())?))
        })
    }
}
