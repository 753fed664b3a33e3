//! [`super::linear_few_rows`] on the CPU: the weights are read once, where they lie.

use crate::kernels::{Real, Shared, by_dtype, dtype, filled, fold, for_each, slice};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

/// Elements of the weights that one task takes, 128 KiB of f32: they stay in the second-level cache for all rows of `x`.
const BLOCK: usize = 1 << 15;
/// Rows of `x` that a row of the weights meets at a time.
const ROWS: usize = 8;

pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &FewRows { dims: x.dims().to_vec() })
}

struct FewRows {
    /// Of `x`.
    dims: Vec<usize>,
}

impl CustomOp2 for FewRows {
    fn name(&self) -> &'static str {
        "linear_few_rows"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n_out, n_in) = wl.shape().dims2()?;
        let mut dims = self.dims.clone();
        *dims.last_mut().expect("rank checked by the caller") = n_out;
        by_dtype!(dtype(w), T => {
            let y = forward::<T>(slice(x, xl)?, slice(w, wl)?, n_in, n_out);
            Ok((T::storage(y), Shape::from(dims)))
        })
    }
}

fn forward<T: Real>(x: &[T], w: &[T], n_in: usize, n_out: usize) -> Vec<T> {
    let n_rows = x.len().checked_div(n_in).unwrap_or(0);
    let per_task = (BLOCK / n_in.max(1)).max(1);
    // SAFETY: the tasks together write every column of every row.
    unsafe {
        filled(n_rows * n_out, |y: Shared<T>| {
            // Reading a weight costs about as much as eight products.
            let work = n_out * n_in * n_rows.div_ceil(8);
            for_each(n_out.div_ceil(per_task), work, |task| {
                let columns = task * per_task..((task + 1) * per_task).min(n_out);
                for first in (0..n_rows).step_by(ROWS) {
                    let n = ROWS.min(n_rows - first);
                    let x = &x[first * n_in..(first + n) * n_in];
                    for o in columns.clone() {
                        let w = &w[o * n_in..(o + 1) * n_in];
                        let to = |i: usize, sum: T| *y.ptr().add((first + i) * n_out + o) = sum;
                        match n {
                            1 => sums::<T, 1>(x, w, to),
                            2 => sums::<T, 2>(x, w, to),
                            3 => sums::<T, 3>(x, w, to),
                            4 => sums::<T, 4>(x, w, to),
                            5 => sums::<T, 5>(x, w, to),
                            6 => sums::<T, 6>(x, w, to),
                            7 => sums::<T, 7>(x, w, to),
                            _ => sums::<T, ROWS>(x, w, to),
                        }
                    }
                }
            });
        })
    }
}

/// Products of one row of the weights with `M` rows: the same sum as [`crate::kernels::dot`], whatever `M`.
#[inline(always)]
fn sums<T: Real, const M: usize>(x: &[T], w: &[T], mut to: impl FnMut(usize, T)) {
    let n = w.len();
    assert_eq!(x.len(), M * n);
    let mut lanes = [[T::ZERO; 16]; M];
    let whole = n / 16 * 16;
    for (i, lanes) in lanes.iter_mut().enumerate() {
        for (j, lane) in lanes.iter_mut().enumerate().take(n - whole) {
            *lane = x[i * n + whole + j] * w[whole + j];
        }
    }
    let mut start = 0;
    while start < whole {
        // SAFETY: `start + 16 <= n`, and `x` holds `M` rows of `n`.
        unsafe {
            let w = &*(w.as_ptr().add(start) as *const [T; 16]);
            for i in 0..M {
                let x = &*(x.as_ptr().add(i * n + start) as *const [T; 16]);
                for j in 0..16 {
                    lanes[i][j] = x[j].fma(w[j], lanes[i][j]);
                }
            }
        }
        start += 16;
    }
    for (i, lanes) in lanes.into_iter().enumerate() {
        to(i, fold(lanes));
    }
}
