//! [`super::attention`] on the CPU: one task per batch element and head, a block of queries at a time.
//!
//! The weights are never stored: the backward pass computes them again, block by block, from two numbers per query.
//! Memory beyond the result is one block of queries times all keys per thread.

use crate::kernels::gemm::{Rows, product, weight_gradient};
use crate::kernels::packed::Packed;
use crate::kernels::{
    Real, Shared, by_dtype, dot, dtype, filled, for_each, lane_sum, shared, slice, tensor, view,
};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use std::sync::OnceLock;

/// Logits of a block of queries: 256 KiB of f32, a quarter to half of a usual second-level cache.
const LOGITS: usize = 1 << 16;

pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    bias: Option<&Tensor>,
    scale: f64,
) -> Result<Tensor> {
    let ((batch, tq, channels), (_, tk, v_channels)) = (q.dims3()?, v.dims3()?);
    let (d, dv) = (channels / heads, v_channels / heads);
    let dims = Dims { batch, heads, tq, tk, d, dv, scale };
    let q = q.contiguous()?;
    match bias {
        // An operation takes three tensors: a bias that learns gets a place, keys and values then share one.
        Some(bias) if bias.track_op() => {
            let split = |t: &Tensor, d: usize| t.reshape((batch, tk, heads, d));
            let kv = Tensor::cat(&[split(k, d)?, split(v, dv)?], 3)?; // [B, Tk, H, D+Dv]
            let op = Attention { dims, bias_dims: Some(bias.dims4()?), bias: None, norms: OnceLock::new() };
            q.apply_op3(&kv, &bias.contiguous()?, op)
        }
        _ => {
            let bias_dims = bias.map(|b| b.dims4()).transpose()?;
            let bias = bias.map(|b| b.contiguous()).transpose()?;
            let op = Attention { dims, bias_dims, bias, norms: OnceLock::new() };
            q.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Dims {
    batch: usize,
    heads: usize,
    tq: usize,
    tk: usize,
    d: usize,
    dv: usize,
    scale: f64,
}

impl Dims {
    /// Queries per block, and the number of blocks.
    fn blocks(&self) -> (usize, usize) {
        let most = (LOGITS / self.tk.max(1)).clamp(16, 128);
        let n_blocks = self.tq.div_ceil(most).max(1);
        (self.tq.div_ceil(n_blocks), n_blocks)
    }

    /// Elements between rows of logits: an odd number of cache lines, so that a column's lines spread over the cache.
    fn row(&self) -> usize {
        self.tk.next_multiple_of(32) + 16
    }
}

type BiasDims = (usize, usize, usize, usize);

struct Attention {
    dims: Dims,
    bias_dims: Option<BiasDims>,
    /// A bias without gradient; with one, it is the third argument and the second holds keys and values.
    bias: Option<Tensor>,
    /// What the backward pass needs of the forward pass: see [`Inputs::forward`].
    norms: OnceLock<Tensor>,
}

/// Rows of one head of a `[B, T, H, width]` tensor, possibly interleaved with others: offset and distance.
#[derive(Clone, Copy)]
struct Head<'a, T> {
    data: &'a [T],
    stride: usize,
    /// Elements between heads.
    head: usize,
    /// First element within a head's row.
    start: usize,
}

impl<'a, T: Real> Head<'a, T> {
    /// The elements from the first row of example `b`, head `h` on.
    fn of(&self, b: usize, h: usize, t: usize) -> &'a [T] {
        &self.data[(b * t * self.stride + h * self.head + self.start).min(self.data.len())..]
    }
}

#[derive(Clone, Copy)]
struct Inputs<'a, T> {
    dims: Dims,
    q: Head<'a, T>,
    k: Head<'a, T>,
    v: Head<'a, T>,
    bias: Option<(&'a [T], BiasDims)>,
}

fn rows(n_rows: usize, width: usize, in_stride: usize, out_step: usize) -> Rows<'static> {
    Rows {
        batch: 1,
        in_batch: 0,
        out_batch: 0,
        n_rows,
        in_step: 1,
        in_rows: n_rows,
        taps: &[0],
        width,
        in_stride,
        out_step,
        out_start: 0,
        parallel: false,
        go_on: false,
    }
}

/// `[tk, width]` as a matrix whose depth is `width` (for products with keys) or `tk` (with values).
fn pack_transposed<T: Real>(x: &[T], tk: usize, width: usize, stride: usize) -> Packed<T> {
    Packed::new(x, (1, width, tk), |_| 0, (1, stride))
}

fn pack_straight<T: Real>(x: &[T], tk: usize, width: usize, stride: usize) -> Packed<T> {
    Packed::new(x, (1, tk, width), |_| 0, (stride, 1))
}

impl<T: Real> Inputs<'_, T> {
    /// Where the bias of a query row starts.
    fn bias_row(&self, dims: BiasDims, b: usize, h: usize, query: usize) -> usize {
        let (bb, bh, bq, bk) = dims;
        let pick = |i: usize, n: usize| if n == 1 { 0 } else { i };
        ((pick(b, bb) * bh + pick(h, bh)) * bq + pick(query, bq)) * bk
    }

    /// Logits of queries `first..first + n` of a head, scaled and biased, into rows of `out`.
    fn logits(&self, b: usize, h: usize, (first, n): (usize, usize), keys: &Packed<T>, out: &mut [T]) {
        let Dims { tq, tk, d, scale, .. } = self.dims;
        let q = &self.q.of(b, h, tq)[first * self.q.stride..];
        // SAFETY: `n` rows of `q` exist from `first` on, and `out` holds `n` rows.
        unsafe { product(q, keys.all(), None, shared(out), &rows(n, d, self.q.stride, self.dims.row())) };
        let scale = T::of(scale);
        for (i, row) in out.chunks_exact_mut(self.dims.row()).take(n).enumerate() {
            let row = &mut row[..tk];
            match self.bias {
                Some((bias, dims)) => {
                    let bias = &bias[self.bias_row(dims, b, h, first + i)..][..tk];
                    for (w, &bias) in row.iter_mut().zip(bias) {
                        *w = w.fma(scale, bias);
                    }
                }
                None => {
                    for w in row.iter_mut() {
                        *w *= scale;
                    }
                }
            }
        }
    }

    fn work(&self) -> usize {
        let Dims { batch, heads, tq, tk, d, dv, .. } = self.dims;
        batch * heads * tq * tk * (d + dv + 16) / 4
    }

    /// The result, and for each query of each head the largest logit and the inverse of the sum of the exponentials.
    fn forward(&self) -> (Vec<T>, Vec<T>) {
        let Dims { batch, heads, tq, tk, dv, .. } = self.dims;
        let (block, n_blocks) = self.dims.blocks();
        let ld = self.dims.row();
        let mut norms = vec![T::ZERO; batch * heads * tq * 2];
        let norms_pointer = shared(&mut norms);
        let fill = |out: Shared<T>| {
            for_each(batch * heads, self.work(), |task| {
                let (b, h) = (task / heads, task % heads);
                let keys = pack_transposed(self.k.of(b, h, tk), tk, self.dims.d, self.k.stride);
                let values = pack_straight(self.v.of(b, h, tk), tk, dv, self.v.stride);
                let mut weights = vec![T::ZERO; block * ld];
                for first in (0..n_blocks).map(|i| i * block).filter(|&first| first < tq) {
                    let n = block.min(tq - first);
                    self.logits(b, h, (first, n), &keys, &mut weights);
                    // SAFETY: each task has the rows of its head.
                    let norms = unsafe { norms_pointer.range((task * tq + first) * 2, n * 2) };
                    for (row, norm) in weights.chunks_exact_mut(ld).zip(norms.chunks_exact_mut(2)) {
                        (norm[0], norm[1]) = exponentials(&mut row[..tk]);
                    }
                    let start = ((b * tq + first) * heads + h) * dv;
                    let to = Rows { out_start: start, ..rows(n, tk, ld, heads * dv) };
                    // SAFETY: each task writes its own head's channels of its own example.
                    unsafe { product(&weights, values.all(), None, out, &to) };
                    for (i, norm) in norms.chunks_exact(2).enumerate() {
                        // SAFETY: as above.
                        let row = unsafe { out.range(start + i * heads * dv, dv) };
                        row.iter_mut().for_each(|y| *y *= norm[1]);
                    }
                }
            });
        };
        // SAFETY: the heads together write every element.
        let y = unsafe { filled(batch * tq * heads * dv, fill) };
        (y, norms)
    }

    /// Gradients of q `[B, Tq, H, D]`, and of k and v in the layout of the inputs (`kv_width` elements per head:
    /// both in one buffer when they share a tensor), and of the bias if asked for.
    fn backward(&self, y: &[T], g: &[T], norms: &[T], shared_kv: bool, bias_gradient: bool) -> [Vec<T>; 4] {
        let Dims { batch, heads, tq, tk, d, dv, scale } = self.dims;
        let (block, n_blocks) = self.dims.blocks();
        let ld = self.dims.row();
        let (k_width, v_width) = if shared_kv { (d + dv, d + dv) } else { (d, dv) };
        let v_start = if shared_kv { d } else { 0 };
        let bias_dims = self.bias.map(|(_, dims)| dims).filter(|_| bias_gradient);
        let mut d_bias = vec![T::ZERO; bias_dims.map_or(0, |(a, b, c, d)| a * b * c * d)];
        let bias_pointer = shared(&mut d_bias);
        // Examples and heads that share a row of the bias are one task, so that its sum has one order.
        let (tasks_b, tasks_h) = bias_dims.map_or((batch, heads), |(bb, bh, ..)| (bb, bh));
        let one = |b: usize, h: usize, [dq, dk, dv_all]: [Shared<T>; 3]| {
            let keys = self.k.of(b, h, tk);
            let keys_t = pack_transposed(keys, tk, d, self.k.stride);
            let keys_s = pack_straight(keys, tk, d, self.k.stride);
            let values_t = pack_transposed(self.v.of(b, h, tk), tk, dv, self.v.stride);
            let (mut weights, mut d_logits) = (vec![T::ZERO; block * ld], vec![T::ZERO; block * ld]);
            let (mut dk_sum, mut dv_sum) = (vec![T::ZERO; tk * d], vec![T::ZERO; tk * dv]);
            let factor = T::of(scale);
            for first in (0..n_blocks).map(|i| i * block).filter(|&first| first < tq) {
                let n = block.min(tq - first);
                self.logits(b, h, (first, n), &keys_t, &mut weights);
                let start = ((b * tq + first) * heads + h) * dv;
                let norms = &norms[((b * heads + h) * tq + first) * 2..][..n * 2];
                let g = &g[start..];
                // SAFETY: `n` rows exist from `first` on; `d_logits` holds as many.
                unsafe {
                    product(g, values_t.all(), None, shared(&mut d_logits), &rows(n, dv, heads * dv, ld))
                };
                for (i, norm) in norms.chunks_exact(2).enumerate() {
                    let (w, dl) = (&mut weights[i * ld..][..tk], &mut d_logits[i * ld..][..tk]);
                    let (y, g) = (&y[start + i * heads * dv..][..dv], &g[i * heads * dv..][..dv]);
                    let level = dot(y, g);
                    let (max, inverse) = (norm[0], norm[1]);
                    for (w, dl) in w.iter_mut().zip(dl.iter_mut()) {
                        *w = (*w - max).exp_of_negative() * inverse;
                        *dl = *w * (*dl - level);
                    }
                    if let Some(dims) = bias_dims {
                        // SAFETY: the row belongs to this task alone.
                        let sum = unsafe { bias_pointer.range(self.bias_row(dims, b, h, first + i), tk) };
                        for (s, &v) in sum.iter_mut().zip(dl.iter()) {
                            *s += v;
                        }
                    }
                    for dl in dl.iter_mut() {
                        *dl *= factor;
                    }
                }
                let to = Rows { out_start: ((b * tq + first) * heads + h) * d, ..rows(n, tk, ld, heads * d) };
                let q = &self.q.of(b, h, tq)[first * self.q.stride..];
                // SAFETY: each (b, h) writes its own rows of `dq`; the matrices have `n` rows.
                unsafe {
                    product(&d_logits, keys_s.all(), None, dq, &to);
                    let rows = rows(n, tk, ld, self.q.stride);
                    weight_gradient(&d_logits, q, d, &rows, shared(&mut dk_sum), true);
                    let rows = Rows { out_step: heads * dv, ..rows };
                    weight_gradient(&weights, g, dv, &rows, shared(&mut dv_sum), true);
                }
            }
            for t in 0..tk {
                // SAFETY: each (b, h) writes its own channels.
                unsafe {
                    let row = (b * tk + t) * heads + h;
                    dk.range(row * k_width, d).copy_from_slice(&dk_sum[t * d..(t + 1) * d]);
                    let to = dv_all.range(row * v_width + v_start, dv);
                    to.copy_from_slice(&dv_sum[t * dv..(t + 1) * dv]);
                }
            }
        };
        let fill = |all: [Shared<T>; 3]| {
            for_each(tasks_b * tasks_h, self.work() * 3, |task| {
                let (task_b, task_h) = (task / tasks_h, task % tasks_h);
                for b in if tasks_b == batch { task_b..task_b + 1 } else { 0..batch } {
                    for h in if tasks_h == heads { task_h..task_h + 1 } else { 0..heads } {
                        one(b, h, all);
                    }
                }
            });
        };
        let (mut dk, mut dv_own) = (Vec::new(), Vec::new());
        // SAFETY: the heads together write every element; keys and values that share a tensor share its gradient.
        let dq = unsafe {
            filled(batch * tq * heads * d, |dq| {
                dk = filled(batch * tk * heads * k_width, |dk| {
                    if shared_kv {
                        fill([dq, dk, dk]);
                    } else {
                        dv_own = filled(batch * tk * heads * v_width, |dv| fill([dq, dk, dv]));
                    }
                });
            })
        };
        [dq, dk, dv_own, d_bias]
    }
}

/// Turns logits into their exponentials, the largest of them 1; returns the largest logit and the inverse of the sum.
/// A row of `-inf` becomes zeros, with 0 as the inverse.
#[inline(always)]
pub(super) fn exponentials<T: Real>(row: &mut [T]) -> (T, T) {
    let max = crate::kernels::lane_max(row);
    if max == T::NEG_INFINITY {
        row.fill(T::ZERO);
        return (T::ZERO, T::ZERO);
    }
    for w in row.iter_mut() {
        *w = (*w - max).exp_of_negative();
    }
    (max, T::ONE / lane_sum(row.len(), |i| row[i]))
}

impl Attention {
    fn inputs<'a, T: Real>(
        &self,
        q: &'a [T],
        second: &'a [T],
        third: &'a [T],
        bias: Option<&'a [T]>,
    ) -> Inputs<'a, T> {
        let dims = self.dims;
        let Dims { heads, d, dv, .. } = dims;
        let head = |data, width, start| Head { data, stride: heads * width, head: width, start };
        let q = head(q, d, 0);
        if self.shared_kv() {
            let bias = self.bias_dims.map(|dims| (third, dims));
            Inputs { dims, q, k: head(second, d + dv, 0), v: head(second, d + dv, d), bias }
        } else {
            let bias = self.bias_dims.and_then(|dims| bias.map(|b| (b, dims)));
            Inputs { dims, q, k: head(second, d, 0), v: head(third, dv, 0), bias }
        }
    }

    fn shared_kv(&self) -> bool {
        self.bias_dims.is_some() && self.bias.is_none()
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Dims { batch, heads, tq, dv, .. } = self.dims;
        by_dtype!(dtype(q), T => {
            let bias = self.bias.as_ref().map(view::<T>).transpose()?;
            let inputs = self.inputs(slice::<T>(q, ql)?, slice(k, kl)?, slice(v, vl)?, bias.as_deref());
            let (y, norms) = inputs.forward();
            // An operation runs forward once.
            let _ = self.norms.set(tensor(norms, (batch, heads, tq, 2))?);
            Ok((T::storage(y), Shape::from((batch, tq, heads * dv))))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        second: &Tensor,
        third: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        by_dtype!(q.dtype(), T => {
            let bias = self.bias.as_ref().map(view::<T>).transpose()?;
            let (q_data, second_data, third_data) = (view::<T>(q)?, view::<T>(second)?, view::<T>(third)?);
            let inputs = self.inputs(&q_data, &second_data, &third_data, bias.as_deref());
            let shared_kv = self.shared_kv();
            let norms = view::<T>(self.norms.get().expect("set by the forward pass"))?;
            let (y, g) = (view::<T>(y)?, view::<T>(&grad)?);
            let [dq, dk, dv, d_bias] = inputs.backward(&y, &g, &norms, shared_kv, shared_kv);
            let third_gradient = if shared_kv { d_bias } else { dv };
            Ok((
                Some(tensor(dq, q.shape())?),
                Some(tensor(dk, second.shape())?),
                Some(tensor(third_gradient, third.shape())?),
            ))
        })
    }
}
