//! Eigenvalues of a symmetric matrix without eigenvectors: Householder's reduction to three diagonals, then the root-free
//! QL iteration of Pal, Walker and Kahan (Reinsch 1973, CACM algorithm 464; Parlett, *The Symmetric Eigenvalue Problem*, 8-15).
//!
//! As LAPACK does, the updates of a panel of steps wait and are then one matrix product; the product with the
//! Householder vector, half of the work, reads each entry of the lower triangle once, four columns at a time, and every
//! column begins at the start of a cache line.
//! Errors are a few ε times the largest eigenvalue, as with every backward stable method.

use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::reborrow::ReborrowMut;
use faer::{Accum, MatMut, MatRef, Par};
use pulp::Simd;

/// Steps whose updates wait for each other.
const PANEL: usize = 16;
/// Square of a subdiagonal entry that is zero beside entries of about 1, far from where products underflow.
const SMALLEST_SQUARE: f64 = 1e-160;
/// Columns whose products are added in one pass.
const COLUMNS: usize = 4;
/// Numbers in a cache line, at least as many as a vector holds.
const LINE: usize = 8;
/// Iterations that one eigenvalue may take; on average it is below 2.
const MAX_ITERATIONS: usize = 50;

/// Distance between the columns of a matrix of side `n` as [`eigenvalues`] wants it: an odd number of cache lines, so
/// that neighbouring columns do not compete for the same few lines of the cache (at side 512 that costs four times the
/// time).
pub(crate) fn stride(n: usize) -> usize {
    (n.div_ceil(LINE) | 1) * LINE
}

/// `len` zeros that begin at the start of a cache line: the part of the vector from the index on.
pub(crate) fn aligned(len: usize) -> (Vec<f64>, usize) {
    let zeros = vec![0.0; len + LINE];
    let skip = zeros.as_ptr().align_offset(LINE * size_of::<f64>());
    // The offset is "unknown" only where a program is interpreted; then nothing is to be gained.
    (zeros, if skip < LINE { skip } else { 0 })
}

/// Eigenvalues, in no order, of the symmetric `n x n` matrix whose lower triangle is given, column after column,
/// [`stride`] apart (the upper triangle is not looked at; `a` is overwritten). `None` if the iteration does not end.
pub(crate) fn eigenvalues(a: &mut [f64], n: usize) -> Option<Vec<f64>> {
    let stride = stride(n);
    // A power of two brings the largest entry to about 1: nothing is rounded, no square overflows.
    let largest = (0..n).flat_map(|j| &a[j * stride + j..j * stride + n]).fold(0.0f64, |m, x| m.max(x.abs()));
    if largest == 0.0 {
        return Some(vec![0.0; n]);
    }
    if !largest.is_finite() {
        return None;
    }
    let exponent = largest.log2().floor().clamp(-1000.0, 1000.0) as i32;
    let scale = 2.0f64.powi(-exponent);
    a.iter_mut().for_each(|x| *x *= scale);
    let (mut d, e) = pulp::Arch::new().dispatch(Reduction { a, n });
    let mut squares: Vec<f64> = e.iter().map(|e| e * e).collect();
    root_free_ql(&mut d, &mut squares)?;
    d.iter_mut().for_each(|x| *x /= scale);
    Some(d)
}

/// The reduction, compiled for the vector instructions of the machine it runs on.
struct Reduction<'a> {
    a: &'a mut [f64],
    n: usize,
}

impl pulp::WithSimd for Reduction<'_> {
    type Output = (Vec<f64>, Vec<f64>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        tridiagonalize(simd, self.a, self.n)
    }
}

/// Diagonal `[n]` and subdiagonal `[n - 1]` of a tridiagonal matrix with the eigenvalues of `a`.
#[inline(always)]
fn tridiagonalize<S: Simd>(simd: S, a: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let stride = stride(n);
    let (mut d, mut e) = (vec![0.0; n], vec![0.0; n - 1]);
    // Of the last steps: A - Σ (v wᵀ + w vᵀ) is what A should be. Rows of `vs` and `ws` are vectors of length n.
    let line = n.next_multiple_of(LINE);
    let ((mut vs, vs_from), (mut ws, ws_from)) = (aligned(PANEL * line), aligned(PANEL * line));
    let (vs, ws) = (&mut vs[vs_from..][..PANEL * line], &mut ws[ws_from..][..PANEL * line]);
    let mut waiting = 0;
    for k in 0..n {
        let column = &mut a[k * stride..k * stride + n];
        for (v, w) in vs.chunks_exact(line).zip(ws.chunks_exact(line)).take(waiting) {
            let (vk, wk) = (v[k], w[k]);
            for ((x, v), w) in column[k..].iter_mut().zip(&v[k..]).zip(&w[k..]) {
                *x -= v * wk + w * vk;
            }
        }
        d[k] = column[k];
        if k + 1 == n {
            break;
        }
        let x = &column[k + 1..];
        let rest = dot(simd, &x[1..], &x[1..]).sqrt();
        e[k] = x[0];
        if rest > 0.0 {
            // (1 - tau v vᵀ) x = (beta, 0, …), v[0] = 1.
            let beta = -x[0].hypot(rest).copysign(x[0]);
            let (tau, head) = ((beta - x[0]) / beta, x[0] - beta);
            e[k] = beta;
            let (done, v) = vs.split_at_mut(waiting * line);
            let (done_w, w) = ws.split_at_mut(waiting * line);
            let (v, w) = (&mut v[..n], &mut w[..n]);
            v[..=k].fill(0.0);
            v[k + 1] = 1.0;
            v[k + 2..].iter_mut().zip(&x[1..]).for_each(|(v, x)| *v = x / head);
            lower_times(simd, a, n, k + 1, v, w);
            // From a multiple of a line on; what is before is zero in `v` and not used in `w`.
            let from = (k + 1) / LINE * LINE;
            for j in (0..waiting).step_by(2) {
                // The last of an odd number stands for two, the second with factors of zero.
                let second = (j + 1).min(waiting - 1);
                let part = |j: usize| j * line + from..j * line + n;
                let four = [&done[part(j)], &done_w[part(j)], &done[part(second)], &done_w[part(second)]];
                let [v0, w0, mut v1, mut w1] = dots(simd, &v[from..n], four);
                if second == j {
                    (v1, w1) = (0.0, 0.0);
                }
                subtract(simd, &mut w[from..n], four, [w0, v0, w1, v1]);
            }
            w[k + 1..].iter_mut().for_each(|w| *w *= tau);
            let along = dot(simd, &v[k + 1..], &w[k + 1..]);
            let half = 0.5 * tau * along;
            w[k + 1..].iter_mut().zip(&v[k + 1..]).for_each(|(w, v)| *w -= half * v);
            waiting += 1;
        }
        if waiting == PANEL {
            update(a, n, k + 1, vs, ws);
            waiting = 0;
        }
    }
    (d, e)
}

/// `A -= Σ (v wᵀ + w vᵀ)` on the lower triangle from row and column `from` on.
fn update(a: &mut [f64], n: usize, from: usize, vs: &[f64], ws: &[f64]) {
    let rest = n - from;
    let a = MatMut::from_column_major_slice_with_stride_mut(&mut a[from * stride(n)..], n, rest, stride(n));
    let mut a = a.subrows_mut(from, rest);
    let side = |x| MatRef::from_column_major_slice(x, n.next_multiple_of(LINE), PANEL).subrows(from, rest);
    for (left, right) in [(vs, ws), (ws, vs)] {
        triangular::matmul(
            a.rb_mut(),
            BlockStructure::TriangularLower,
            Accum::Add,
            side(left),
            BlockStructure::Rectangular,
            side(right).transpose(),
            BlockStructure::Rectangular,
            -1.0,
            Par::Seq,
        );
    }
}

/// Sum of products.
#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_tail), (b, b_tail)) = (S::as_simd_f64s(a), S::as_simd_f64s(b));
    // Four sums, since one would wait for each addition.
    let mut sums = [simd.splat_f64s(0.0); 4];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<4>(), b.as_chunks::<4>());
    for (a, b) in a.iter().zip(b) {
        sums = std::array::from_fn(|i| simd.mul_add_f64s(a[i], b[i], sums[i]));
    }
    for (a, b) in a_rest.iter().zip(b_rest) {
        sums[0] = simd.mul_add_f64s(*a, *b, sums[0]);
    }
    let sum = simd.add_f64s(simd.add_f64s(sums[0], sums[1]), simd.add_f64s(sums[2], sums[3]));
    simd.reduce_sum_f64s(sum) + a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f64>()
}

/// Sums of products of `x` with each of four.
#[inline(always)]
fn dots<S: Simd>(simd: S, x: &[f64], four: [&[f64]; 4]) -> [f64; 4] {
    let (whole, tail) = S::as_simd_f64s(x);
    let [(a, a_tail), (b, b_tail), (c, c_tail), (d, d_tail)] = four.map(|y| S::as_simd_f64s(y));
    let mut sums = [simd.splat_f64s(0.0); 4];
    for ((((x, a), b), c), d) in whole.iter().zip(a).zip(b).zip(c).zip(d) {
        sums[0] = simd.mul_add_f64s(*x, *a, sums[0]);
        sums[1] = simd.mul_add_f64s(*x, *b, sums[1]);
        sums[2] = simd.mul_add_f64s(*x, *c, sums[2]);
        sums[3] = simd.mul_add_f64s(*x, *d, sums[3]);
    }
    let mut out = sums.map(|sum| simd.reduce_sum_f64s(sum));
    for (sum, y) in out.iter_mut().zip([a_tail, b_tail, c_tail, d_tail]) {
        *sum += tail.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    }
    out
}

/// `to -= Σ factor x` over four vectors.
#[inline(always)]
fn subtract<S: Simd>(simd: S, to: &mut [f64], four: [&[f64]; 4], factors: [f64; 4]) {
    let (whole, tail) = S::as_mut_simd_f64s(to);
    let [(a, a_tail), (b, b_tail), (c, c_tail), (d, d_tail)] = four.map(|y| S::as_simd_f64s(y));
    let [fa, fb, fc, fd] = factors.map(|f| simd.splat_f64s(-f));
    for ((((to, a), b), c), d) in whole.iter_mut().zip(a).zip(b).zip(c).zip(d) {
        let left = simd.mul_add_f64s(*b, fb, simd.mul_add_f64s(*a, fa, *to));
        *to = simd.mul_add_f64s(*d, fd, simd.mul_add_f64s(*c, fc, left));
    }
    for (x, factor) in [a_tail, b_tail, c_tail, d_tail].into_iter().zip(factors) {
        tail.iter_mut().zip(x).for_each(|(to, x)| *to -= factor * x);
    }
}

/// `out = A v` on the rows and columns from `from` on, from the lower triangle of `a`: every entry is loaded once.
#[inline(always)]
fn lower_times<S: Simd>(simd: S, a: &[f64], n: usize, from: usize, v: &[f64], out: &mut [f64]) {
    out.fill(0.0);
    let mut j = from;
    while j + COLUMNS <= n {
        few_columns(simd, a, n, j, v, out);
        j += COLUMNS;
    }
    for j in j..n {
        let column = &a[j * stride(n)..j * stride(n) + n];
        out[j] += column[j] * v[j];
        for i in j + 1..n {
            out[i] += column[i] * v[j];
            out[j] += column[i] * v[i];
        }
    }
}

/// The share of the lower parts of the columns from `j` on, [`COLUMNS`] of them, in `A v`.
#[inline(always)]
fn few_columns<S: Simd>(simd: S, a: &[f64], n: usize, j: usize, v: &[f64], out: &mut [f64]) {
    let columns: [&[f64]; COLUMNS] =
        std::array::from_fn(|c| &a[(j + c) * stride(n)..(j + c) * stride(n) + n]);
    let factors: [f64; COLUMNS] = std::array::from_fn(|c| v[j + c]);
    // Whole vectors begin at a multiple of their length.
    let from = (j + COLUMNS).next_multiple_of(LINE).min(n);
    for (c, column) in columns.iter().enumerate() {
        let at = j + c;
        let mut sum = column[at] * factors[c];
        for i in at + 1..from {
            sum += column[i] * v[i];
            out[i] += column[i] * factors[c];
        }
        out[at] += sum;
    }
    let (out, below) = out.split_at_mut(from);
    let (below, below_tail) = S::as_mut_simd_f64s(below);
    let (right, right_tail) = S::as_simd_f64s(&v[from..]);
    let [(c0, t0), (c1, t1), (c2, t2), (c3, t3)] = columns.map(|column| S::as_simd_f64s(&column[from..]));
    let [f0, f1, f2, f3] = factors.map(|f| simd.splat_f64s(f));
    let mut sums = [simd.splat_f64s(0.0); COLUMNS];
    for (((((to, v), c0), c1), c2), c3) in below.iter_mut().zip(right).zip(c0).zip(c1).zip(c2).zip(c3) {
        sums[0] = simd.mul_add_f64s(*c0, *v, sums[0]);
        sums[1] = simd.mul_add_f64s(*c1, *v, sums[1]);
        sums[2] = simd.mul_add_f64s(*c2, *v, sums[2]);
        sums[3] = simd.mul_add_f64s(*c3, *v, sums[3]);
        let left = simd.mul_add_f64s(*c1, f1, simd.mul_add_f64s(*c0, f0, *to));
        *to = simd.mul_add_f64s(*c3, f3, simd.mul_add_f64s(*c2, f2, left));
    }
    for (c, tail) in [t0, t1, t2, t3].into_iter().enumerate() {
        let mut sum = simd.reduce_sum_f64s(sums[c]);
        for ((x, v), to) in tail.iter().zip(right_tail).zip(below_tail.iter_mut()) {
            sum += x * v;
            *to += x * factors[c];
        }
        out[j + c] += sum;
    }
}

/// Replaces the diagonal `d` by the eigenvalues; `e2` holds the squares of the subdiagonal and is overwritten.
fn root_free_ql(d: &mut [f64], e2: &mut [f64]) -> Option<()> {
    let negligible =
        |e2: f64, a: f64, b: f64| e2 <= f64::EPSILON * f64::EPSILON * (a * b).abs() || e2 < SMALLEST_SQUARE;
    let n = d.len();
    let mut left = MAX_ITERATIONS * n;
    let mut start = 0;
    while start < n {
        let mut end = start;
        while end + 1 < n && !negligible(e2[end], d[end], d[end + 1]) {
            end += 1;
        }
        // QL wants the small entries of a graded block first.
        let (d, e2) = (&mut d[start..=end], &mut e2[start..end]);
        start = end + 1;
        if d[0].abs() > d[d.len() - 1].abs() {
            d.reverse();
            e2.reverse();
        }
        let mut l = 0;
        while l < d.len() {
            let mut m = l;
            while m + 1 < d.len() && !negligible(e2[m], d[m], d[m + 1]) {
                m += 1;
            }
            if m == l {
                l += 1;
                continue;
            }
            left = left.checked_sub(1)?;
            // Shift: the eigenvalue of the leading 2 x 2 block nearest to d[l].
            let root = e2[l].sqrt();
            let ratio = (d[l + 1] - d[l]) / (2.0 * root);
            let shift = d[l] - root / (ratio + ratio.hypot(1.0).copysign(ratio));
            // Each step waits for the last one, so that the chain from `p` to the next `p` is kept short: one division.
            // The others, and `s` and `c`, are made beside it.
            let (mut c, mut s) = (1.0, 0.0);
            let mut gamma = d[m] - shift;
            let mut p = gamma * gamma;
            for i in (l..m).rev() {
                let b = e2[i];
                let r = p + b;
                if i + 1 < m {
                    e2[i + 1] = s * r;
                }
                let (c_last, gamma_last, inverse) = (c, gamma, r / p);
                c = p / r;
                s = b / r;
                gamma = (p * (d[i] - shift) - b * gamma_last) / r;
                d[i + 1] = gamma_last + (d[i] - gamma);
                p = if c < f64::MIN_POSITIVE { c_last * b } else { gamma * gamma * inverse };
            }
            e2[l] = s * p;
            d[l] = shift + gamma;
            if m + 1 < d.len() {
                e2[m] = 0.0;
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootstrap::SplitMix64;

    /// Eigenvalues of the lower triangle of `full`, rising.
    fn sorted(full: &nalgebra::DMatrix<f64>) -> Vec<f64> {
        let n = full.nrows();
        let mut a = vec![f64::NAN; n * stride(n)]; // what is above the diagonal must not matter
        for j in 0..n {
            for i in j..n {
                a[j * stride(n) + i] = full[(i, j)];
            }
        }
        let mut values = eigenvalues(&mut a, n).unwrap();
        values.sort_unstable_by(f64::total_cmp);
        values
    }

    fn random(seed: u64, n: usize, m: usize) -> nalgebra::DMatrix<f64> {
        let mut rng = SplitMix64(seed);
        nalgebra::DMatrix::from_fn(n, m, |_, _| (rng.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
    }

    #[test]
    fn eigenvalues_meet_nalgebras_whatever_the_side_the_rank_and_the_scale() {
        for n in (1..40).chain([63, 64, 65, 97, 130]) {
            let x = random(n as u64, n, n);
            let graded = nalgebra::DMatrix::from_fn(n, n, |i, j| x[(i, j)] * 0.5f64.powi(i as i32));
            for (case, a) in [
                ("any", &x + x.transpose()),
                ("of rank 2", random(9, n, 2) * random(9, n, 2).transpose()),
                ("falling", &graded * graded.transpose()),
                ("diagonal", nalgebra::DMatrix::from_diagonal(&x.column(0))),
                ("one", nalgebra::DMatrix::identity(n, n)),
                ("large", (&x * x.transpose()) * 1e290),
                ("small", (&x * x.transpose()) * 1e-290),
                ("zero", nalgebra::DMatrix::zeros(n, n)),
            ] {
                let got = sorted(&a);
                let mut want: Vec<f64> = a.symmetric_eigenvalues().iter().copied().collect();
                want.sort_unstable_by(f64::total_cmp);
                let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                for (got, want) in got.iter().zip(&want) {
                    let tolerance = 4e-15 * n as f64 * largest;
                    assert!((got - want).abs() <= tolerance, "{case}, side {n}: got {got:e}, want {want:e}");
                }
            }
        }
    }

    #[test]
    fn eigenvalues_of_the_second_difference_are_the_known_ones() {
        let n = 200;
        let a = nalgebra::DMatrix::from_fn(n, n, |i, j| match i.abs_diff(j) {
            0 => 2.0,
            1 => -1.0,
            _ => 0.0,
        });
        for (k, got) in sorted(&a).into_iter().enumerate() {
            let want = 4.0 * (std::f64::consts::PI * (k + 1) as f64 / (2 * (n + 1)) as f64).sin().powi(2);
            assert!((got - want).abs() < 1e-14, "{k}: got {got:e}, want {want:e}");
        }
    }
}
