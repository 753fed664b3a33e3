//! Layer norm and root-mean-square norm of rows, with scale and shift per group of rows.

use super::{Real, filled, for_each, lane_sum, rows_per_task, shared};

/// What a norm does besides normalising; `rows_per_group` rows share one scale and one shift.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    /// Subtract the mean (layer norm) or not (root mean square).
    pub centred: bool,
    pub eps: f64,
    /// The factor is `1 + scale` instead of `scale`.
    pub one_plus: bool,
}

/// Scale and shift, `[groups, C]` each.
#[derive(Clone, Copy)]
pub(crate) struct Affine<'a, T> {
    pub scale: Option<&'a [T]>,
    pub shift: Option<&'a [T]>,
    pub rows_per_group: usize,
}

/// Mean (zero when not centred) and inverse deviation of a row.
#[inline(always)]
fn moments<T: Real>(row: &[T], norm: Norm) -> (T, T) {
    let n = T::of(row.len() as f64);
    let mean = if norm.centred { lane_sum(row.len(), |i| row[i]) / n } else { T::ZERO };
    let square = lane_sum(row.len(), |i| {
        let d = row[i] - mean;
        d * d
    });
    (mean, T::ONE / (square / n + T::of(norm.eps)).root())
}

pub(crate) fn forward<T: Real>(x: &[T], c: usize, norm: Norm, affine: Affine<T>) -> Vec<T> {
    let rows = x.len() / c;
    let block = rows_per_task(c);
    let offset = if norm.one_plus { T::ONE } else { T::ZERO };
    // SAFETY: the blocks cover the rows, and each row is written whole.
    unsafe {
        filled(x.len(), |out| {
            for_each(rows.div_ceil(block), x.len() * 4, |task| {
                for r in task * block..((task + 1) * block).min(rows) {
                    let x = &x[r * c..][..c];
                    let y = out.range(r * c, c);
                    let group = r / affine.rows_per_group * c;
                    let (mean, inverse) = moments(x, norm);
                    match (affine.scale, affine.shift) {
                        (Some(w), Some(b)) => {
                            let (w, b) = (&w[group..][..c], &b[group..][..c]);
                            for i in 0..c {
                                y[i] = ((x[i] - mean) * inverse).fma(w[i] + offset, b[i]);
                            }
                        }
                        (Some(w), None) => {
                            let w = &w[group..][..c];
                            for i in 0..c {
                                y[i] = (x[i] - mean) * inverse * (w[i] + offset);
                            }
                        }
                        (None, Some(b)) => {
                            let b = &b[group..][..c];
                            for i in 0..c {
                                y[i] = (x[i] - mean).fma(inverse, b[i]);
                            }
                        }
                        (None, None) => {
                            for i in 0..c {
                                y[i] = (x[i] - mean) * inverse;
                            }
                        }
                    }
                }
            });
        })
    }
}

/// Gradients with respect to `x`, the scale and the shift (the last two `[groups, C]`).
pub(crate) fn backward<T: Real>(
    x: &[T],
    g: &[T],
    c: usize,
    norm: Norm,
    affine: Affine<T>,
) -> (Vec<T>, Vec<T>, Vec<T>) {
    let rows = x.len() / c;
    let groups = rows.div_ceil(affine.rows_per_group.max(1));
    // Parts of a group: each sums scale and shift for itself; the sums are added in order.
    let part_rows = affine.rows_per_group.div_ceil(16).max(rows_per_task(c).min(64));
    let parts = affine.rows_per_group.div_ceil(part_rows);
    let mut sums = vec![T::ZERO; groups * parts * 2 * c];
    let sums_pointer = shared(&mut sums);
    let offset = if norm.one_plus { T::ONE } else { T::ZERO };
    let ones = vec![T::ONE - offset; c];
    // SAFETY: the parts cover the rows; each row is written whole, each part has its own sums.
    let dx = unsafe {
        filled(x.len(), |dx| {
            for_each(groups * parts, x.len() * 8, |task| {
                let (group, part) = (task / parts, task % parts);
                let group_end = ((group + 1) * affine.rows_per_group).min(rows);
                let start = group * affine.rows_per_group + part * part_rows;
                let (dw, db) = sums_pointer.range(task * 2 * c, 2 * c).split_at_mut(c);
                let w = affine.scale.map_or(&ones[..c], |w| &w[group * c..][..c]);
                for r in start..(start + part_rows).min(group_end) {
                    let (x, g) = (&x[r * c..][..c], &g[r * c..][..c]);
                    let dx = dx.range(r * c, c);
                    let n = T::of(c as f64);
                    let (mean, inverse) = moments(x, norm);
                    let along = lane_sum(c, |i| g[i] * (w[i] + offset) * (x[i] - mean)) * inverse / n;
                    let level =
                        if norm.centred { lane_sum(c, |i| g[i] * (w[i] + offset)) / n } else { T::ZERO };
                    let w = &w[..c];
                    let (dw, db) = (&mut dw[..c], &mut db[..c]);
                    for i in 0..c {
                        let hat = (x[i] - mean) * inverse;
                        dx[i] = inverse * (g[i] * (w[i] + offset) - level - hat * along);
                        dw[i] += g[i] * hat;
                        db[i] += g[i];
                    }
                }
            });
        })
    };
    let (mut dw, mut db) = (vec![T::ZERO; groups * c], vec![T::ZERO; groups * c]);
    for (task, sum) in sums.chunks_exact(2 * c).enumerate() {
        let group = task / parts * c;
        for i in 0..c {
            dw[group + i] += sum[i];
            db[group + i] += sum[c + i];
        }
    }
    (dx, dw, db)
}
