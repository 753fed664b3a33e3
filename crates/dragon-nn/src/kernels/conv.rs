//! Correlation along time and its two adjoints, shared by the convolution and the transposed convolution.

use super::gemm::{KC, Rows, product, weight_gradient};
use super::packed::Packed;
use super::{Real, Shared, filled, for_each};

/// With so few rows, and weights of at least [`LARGE`] elements, packing all weights to memory first is much of the work (a
/// quarter of a network of 1.06 G parameters on 196 rows). Then each task packs [`PART`] columns for itself and uses them
/// while they are in the second-level cache. No sum changes its order.
const FEW_ROWS: usize = 1024;
/// See [`FEW_ROWS`].
const LARGE: usize = 1 << 18;
/// See [`FEW_ROWS`].
const PART: usize = 64;
/// The same for [`product_in_parts`]: with all that is summed at a time, 192 KiB of f32.
const COLUMNS: usize = 128;

/// Geometry of a correlation from `[B, t_in, c_in]` to `[B, t_out, c_out]` with weights `[c_out, c_in/groups, taps]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub batch: usize,
    pub t_in: usize,
    pub c_in: usize,
    pub t_out: usize,
    pub c_out: usize,
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
    pub dilation: usize,
    pub groups: usize,
}

impl Geometry {
    /// Of a linear layer: one tap over all rows.
    pub(crate) fn linear(rows: usize, c_in: usize, c_out: usize) -> Self {
        Self {
            batch: 1,
            t_in: rows,
            c_in,
            t_out: rows,
            c_out,
            kernel: 1,
            stride: 1,
            padding: 0,
            dilation: 1,
            groups: 1,
        }
    }

    fn in_group(&self) -> usize {
        self.c_in / self.groups
    }

    fn out_group(&self) -> usize {
        self.c_out / self.groups
    }

    fn taps(&self) -> Vec<isize> {
        (0..self.kernel).map(|k| (k * self.dilation) as isize - self.padding as isize).collect()
    }

    fn rows<'a>(&self, taps: &'a [isize], group: usize) -> Rows<'a> {
        Rows {
            batch: self.batch,
            in_batch: self.t_in * self.c_in,
            out_batch: self.t_out * self.c_out,
            n_rows: self.t_out,
            in_step: self.stride,
            in_rows: self.t_in,
            taps,
            width: self.in_group(),
            in_stride: self.c_in,
            out_step: self.c_out,
            out_start: group * self.out_group(),
            parallel: true,
            go_on: false,
        }
    }

    /// Whether every row of the input meets the same row of the output, and no other.
    fn is_linear(&self) -> bool {
        self.kernel == 1 && self.stride == 1 && self.padding == 0
    }

    /// Whether rows are so few, and weights so many, that packing them all to memory first is much of the work.
    fn packs_in_parts(&self, rows: usize) -> bool {
        self.batch * rows <= FEW_ROWS && self.in_group() * self.out_group() * self.kernel >= LARGE
    }
}

/// `y[b, t, o] = bias[o] + Σ w[o, i, k] x[b, t·stride + k·dilation - padding, i]`.
pub(crate) fn correlate<T: Real>(x: &[T], w: &[T], bias: Option<&[T]>, geo: &Geometry) -> Vec<T> {
    let (ig, og, k) = (geo.in_group(), geo.out_group(), geo.kernel);
    let taps = geo.taps();
    // SAFETY: the groups together write every channel of every row; rows outside the input read zeros.
    unsafe {
        filled(geo.batch * geo.t_out * geo.c_out, |out| {
            for group in 0..geo.groups {
                let x = &x[(group * ig).min(x.len())..];
                let bias = bias.map(|b| &b[group * og..(group + 1) * og]);
                let rows = geo.rows(&taps, group);
                // The columns of the product from `first` on.
                let some = |first: usize, n: usize, rows: &Rows| {
                    let start = |tap| (group * og + first) * ig * k + tap;
                    let packed = Packed::new(w, (k, ig, n), start, (k, ig * k));
                    product(x, packed.all(), bias.map(|b| &b[first..first + n]), out.from(first), rows);
                };
                if geo.packs_in_parts(geo.t_out) {
                    let work = geo.batch * geo.t_out * og * ig * k / 8;
                    // The last takes the rest too: a column on its own would be summed in another order.
                    let n_parts = (og / PART).max(1);
                    for_each(n_parts, work, |part| {
                        let (first, end) =
                            (part * PART, if part + 1 == n_parts { og } else { (part + 1) * PART });
                        some(first, end - first, &Rows { parallel: false, ..rows });
                    });
                } else {
                    some(0, og, &rows);
                }
            }
        })
    }
}

/// The product of all rows with the matrix `[depth, n]` whose element `(p, j)` is `w[p * strides.0 + j * strides.1]`. Each task packs
/// [`COLUMNS`] columns, and of them what is summed at a time.
///
/// # Safety
/// As [`product`], for all rows of `rows`, which follow each other whatever the example.
unsafe fn product_in_parts<T: Real>(
    x: &[T],
    w: &[T],
    (depth, n): (usize, usize),
    strides: (usize, usize),
    bias: Option<&[T]>,
    out: Shared<T>,
    rows: &Rows,
) {
    let n_rows = rows.batch * rows.n_rows;
    // The last takes the rest too: a column on its own would be summed in another order.
    let n_parts = (n / COLUMNS).max(1);
    for_each(n_parts, n_rows * depth * n / 8, |part| {
        let first = part * COLUMNS;
        let n = if part + 1 == n_parts { n - first } else { COLUMNS };
        let bias = bias.map(|b| &b[first..first + n]);
        for p in (0..depth).step_by(KC) {
            let width = KC.min(depth - p);
            let start = p * strides.0 + first * strides.1;
            let packed = Packed::new(w, (1, width, n), |_| start, strides);
            let rows =
                Rows { batch: 1, n_rows, in_rows: n_rows, width, parallel: false, go_on: p > 0, ..*rows };
            // SAFETY: the caller's contract; the tasks write columns of their own.
            unsafe { product(&x[p.min(x.len())..], packed.all(), bias, out.from(first), &rows) };
        }
    });
}

/// The adjoint of [`correlate`] in its input: from `[B, t_out, c_out]` back to `[B, t_in, c_in]`, plus `bias[i]`.
///
/// Output rows are split by their phase modulo the stride: the rows of one phase see the same taps, so each phase is
/// a correlation of stride one whose results lie `stride` rows apart.
pub(crate) fn correlate_adjoint<T: Real>(g: &[T], w: &[T], bias: Option<&[T]>, geo: &Geometry) -> Vec<T> {
    let (ig, og, k) = (geo.in_group(), geo.out_group(), geo.kernel);
    let (stride, padding) = (geo.stride, geo.padding);
    // Taps by phase; within a phase from the last to the first: their rows then follow each other.
    let phase = |tap: usize| tap * geo.dilation % stride;
    let kernel: Vec<usize> =
        (0..stride).flat_map(|p| (0..k).rev().filter(move |&tap| phase(tap) == p)).collect();
    // SAFETY: the phases and groups together write every element.
    unsafe {
        filled(geo.batch * geo.t_in * geo.c_in, |out| {
            for group in 0..geo.groups {
                if geo.is_linear() && ig >= COLUMNS && geo.packs_in_parts(geo.t_in) {
                    let (g, w) = (&g[(group * og).min(g.len())..], &w[group * og * ig..]);
                    let bias = bias.map(|b| &b[group * ig..(group + 1) * ig]);
                    let rows = Rows {
                        in_stride: geo.c_out,
                        out_step: geo.c_in,
                        out_start: group * ig,
                        ..geo.rows(&[0], group)
                    };
                    product_in_parts(g, w, (og, ig), (ig, 1), bias, out, &rows);
                    continue;
                }
                let start = |block: usize| group * og * ig * k + kernel[block];
                let packed = Packed::new(w, (k, og, ig), start, (ig * k, k));
                let bias = bias.map(|b| &b[group * ig..(group + 1) * ig]);
                let mut n_before = 0;
                for p in 0..stride {
                    let own: Vec<usize> =
                        kernel[n_before..].iter().copied().take_while(|&tap| phase(tap) == p).collect();
                    let panels = packed.part(n_before * og..(n_before + own.len()) * og);
                    n_before += own.len();
                    // Rows j of this phase lie at stride * j + p - padding in 0..t_in.
                    let first = padding.saturating_sub(p).div_ceil(stride);
                    let end = (geo.t_in + padding).saturating_sub(p).div_ceil(stride);
                    if end <= first {
                        continue;
                    }
                    let taps: Vec<isize> = own
                        .iter()
                        .map(|tap| first as isize - ((tap * geo.dilation - p) / stride) as isize)
                        .collect();
                    let rows = Rows {
                        batch: geo.batch,
                        in_batch: geo.t_out * geo.c_out,
                        out_batch: geo.t_in * geo.c_in,
                        n_rows: end - first,
                        in_step: 1,
                        in_rows: geo.t_out,
                        taps: &taps,
                        width: og,
                        in_stride: geo.c_out,
                        out_step: stride * geo.c_in,
                        out_start: (stride * first + p - padding) * geo.c_in + group * ig,
                        parallel: true,
                        go_on: false,
                    };
                    product(&g[(group * og).min(g.len())..], panels, bias, out, &rows);
                }
            }
        })
    }
}

/// The adjoint of [`correlate`] in its weights: `dw[o, i, k] = Σ g[b, t, o] x[b, t·stride + k·dilation - padding, i]`.
pub(crate) fn correlate_weight_gradient<T: Real>(x: &[T], g: &[T], geo: &Geometry) -> Vec<T> {
    let (ig, og, k) = (geo.in_group(), geo.out_group(), geo.kernel);
    let taps = geo.taps();
    // SAFETY: the groups together write every element.
    unsafe {
        filled(geo.c_out * ig * k, |out| {
            for group in 0..geo.groups {
                if k == 1 && geo.stride == 1 && geo.padding == 0 {
                    // Every row meets itself: input and output change places, and the result needs no reordering.
                    let rows = Rows {
                        batch: 1,
                        n_rows: geo.batch * geo.t_out,
                        in_rows: geo.batch * geo.t_out,
                        width: og,
                        in_stride: geo.c_out,
                        out_step: geo.c_in,
                        out_start: group * ig,
                        ..geo.rows(&taps, group)
                    };
                    let dw = out.from(group * og * ig);
                    weight_gradient(&g[(group * og).min(g.len())..], x, ig, &rows, dw, false);
                    continue;
                }
                let x = &x[(group * ig).min(x.len())..];
                let rows = geo.rows(&taps, group);
                let taps_first =
                    filled(k * ig * og, |taps_first| weight_gradient(x, g, og, &rows, taps_first, false));
                // [k, i, o] -> [o, i, k], eight by eight.
                for_each(og.div_ceil(8), taps_first.len(), |block| {
                    let columns = block * 8..((block + 1) * 8).min(og);
                    let part = out.range((group * og + columns.start) * ig * k, columns.len() * ig * k);
                    // Row `f` of the result is input channel `f / k`, tap `f % k`.
                    let row = |f: usize| &taps_first[(f % k * ig + f / k) * og..][..og][columns.clone()];
                    for f in (0..ig * k).step_by(8) {
                        let n = 8.min(ig * k - f);
                        if n == 8 && columns.len() == 8 {
                            let from = std::array::from_fn(|j| row(f + j).as_ptr());
                            let to = std::array::from_fn(|o| part[o * ig * k + f..][..8].as_mut_ptr());
                            T::transpose(from, to);
                        } else {
                            for j in f..f + n {
                                for (o, &v) in row(j).iter().enumerate() {
                                    part[o * ig * k + j] = v;
                                }
                            }
                        }
                    }
                });
            }
        })
    }
}
