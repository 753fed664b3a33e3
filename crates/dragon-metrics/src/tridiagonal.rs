//! Eigenvalues of a symmetric matrix without eigenvectors: Householder's reduction to three diagonals, then the root-free
//! QL iteration of Pal, Walker and Kahan (Reinsch 1973, CACM algorithm 464; Parlett, *The Symmetric Eigenvalue Problem*, 8-15).
//!
//! As LAPACK does, the updates of a panel of steps wait and are then one matrix product; the product with the
//! Householder vector, half of the work, reads each entry of the lower triangle once, two columns at a time.
//! Errors are a few ε times the largest eigenvalue, as with every backward stable method.

use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::reborrow::ReborrowMut;
use faer::{Accum, MatMut, MatRef, Par};

/// Steps whose updates wait for each other.
const PANEL: usize = 32;
/// Iterations that one eigenvalue may take; on average it is below 2.
const MAX_ITERATIONS: usize = 50;

/// Distance between the columns of a matrix of side `n` as [`eigenvalues`] wants it: an odd number of cache lines, so
/// that neighbouring columns do not compete for the same few lines of the cache (at side 512 that costs four times the
/// time).
pub(crate) fn stride(n: usize) -> usize {
    (n.div_ceil(8) | 1) * 8
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

impl pulp::NullaryFnOnce for Reduction<'_> {
    type Output = (Vec<f64>, Vec<f64>);

    #[inline(always)]
    fn call(self) -> Self::Output {
        tridiagonalize(self.a, self.n)
    }
}

/// Diagonal `[n]` and subdiagonal `[n - 1]` of a tridiagonal matrix with the eigenvalues of `a`.
#[inline(always)]
fn tridiagonalize(a: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let stride = stride(n);
    let (mut d, mut e) = (vec![0.0; n], vec![0.0; n - 1]);
    // Of the last steps: A - Σ (v wᵀ + w vᵀ) is what A should be. Rows of `vs` and `ws` are vectors of length n.
    let (mut vs, mut ws) = (vec![0.0; PANEL * n], vec![0.0; PANEL * n]);
    let mut waiting = 0;
    for k in 0..n {
        let column = &mut a[k * stride..k * stride + n];
        for (v, w) in vs.chunks_exact(n).zip(ws.chunks_exact(n)).take(waiting) {
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
        let rest: f64 = x[1..].iter().map(|x| x * x).sum::<f64>().sqrt();
        e[k] = x[0];
        if rest > 0.0 {
            // (1 - tau v vᵀ) x = (beta, 0, …), v[0] = 1.
            let beta = -x[0].hypot(rest).copysign(x[0]);
            let (tau, head) = ((beta - x[0]) / beta, x[0] - beta);
            e[k] = beta;
            let (done, v) = vs.split_at_mut(waiting * n);
            let (done_w, w) = ws.split_at_mut(waiting * n);
            let (v, w) = (&mut v[..n], &mut w[..n]);
            v[..=k].fill(0.0);
            v[k + 1] = 1.0;
            v[k + 2..].iter_mut().zip(&x[1..]).for_each(|(v, x)| *v = x / head);
            lower_times(&a[..], n, k + 1, v, w);
            for (v_old, w_old) in done.chunks_exact(n).zip(done_w.chunks_exact(n)) {
                let (mut of_v, mut of_w) = (0.0, 0.0);
                for ((v, v_old), w_old) in v[k + 1..].iter().zip(&v_old[k + 1..]).zip(&w_old[k + 1..]) {
                    of_v += v * v_old;
                    of_w += v * w_old;
                }
                for ((w, v_old), w_old) in w[k + 1..].iter_mut().zip(&v_old[k + 1..]).zip(&w_old[k + 1..]) {
                    *w -= v_old * of_w + w_old * of_v;
                }
            }
            let mut along = 0.0;
            for (w, v) in w[k + 1..].iter_mut().zip(&v[k + 1..]) {
                *w *= tau;
                along += *w * v;
            }
            let half = 0.5 * tau * along;
            w[k + 1..].iter_mut().zip(&v[k + 1..]).for_each(|(w, v)| *w -= half * v);
            waiting += 1;
        }
        if waiting == PANEL {
            update(a, n, k + 1, &vs, &ws);
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
    let side = |x| MatRef::from_column_major_slice(x, n, PANEL).subrows(from, rest);
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

/// `out = A v` on the rows and columns from `from` on, from the lower triangle of `a`: every entry is loaded once.
#[inline(always)]
fn lower_times(a: &[f64], n: usize, from: usize, v: &[f64], out: &mut [f64]) {
    let stride = stride(n);
    out.fill(0.0);
    let mut j = from;
    while j + 1 < n {
        let (left, right) = a[j * stride..(j + 1) * stride + n].split_at(stride);
        two_columns(&left[..n], right, j, v, out);
        j += 2;
    }
    if j < n {
        out[j] += a[j * stride + j] * v[j];
    }
}

/// The share of the lower parts of columns `j` and `j + 1` in `A v`.
#[inline(always)]
fn two_columns(left: &[f64], right: &[f64], j: usize, v: &[f64], out: &mut [f64]) {
    const LANES: usize = 8;
    let (v0, v1) = (v[j], v[j + 1]);
    out[j] += left[j] * v0 + left[j + 1] * v1;
    out[j + 1] += left[j + 1] * v0 + right[j + 1] * v1;
    let from = j + 2;
    let (left, right, v, below) = (&left[from..], &right[from..], &v[from..], &mut out[from..]);
    let whole = left.len() / LANES * LANES;
    let (mut sum0, mut sum1) = ([0.0f64; LANES], [0.0f64; LANES]);
    for at in (0..whole).step_by(LANES) {
        let here = at..at + LANES;
        let l: &[f64; LANES] = left[here.clone()].try_into().expect("LANES long");
        let r: &[f64; LANES] = right[here.clone()].try_into().expect("LANES long");
        let v: &[f64; LANES] = v[here.clone()].try_into().expect("LANES long");
        let to: &mut [f64; LANES] = (&mut below[here]).try_into().expect("LANES long");
        #[allow(clippy::needless_range_loop)] // six arrays side by side
        for i in 0..LANES {
            sum0[i] = l[i].mul_add(v[i], sum0[i]);
            sum1[i] = r[i].mul_add(v[i], sum1[i]);
            to[i] = r[i].mul_add(v1, l[i].mul_add(v0, to[i]));
        }
    }
    let tail = left[whole..].iter().zip(&right[whole..]).zip(&v[whole..]).zip(&mut below[whole..]);
    for (((l, r), v), to) in tail {
        sum0[0] += l * v;
        sum1[0] += r * v;
        *to += l * v0 + r * v1;
    }
    out[j] += sum0.iter().sum::<f64>();
    out[j + 1] += sum1.iter().sum::<f64>();
}

/// Replaces the diagonal `d` by the eigenvalues; `e2` holds the squares of the subdiagonal and is overwritten.
fn root_free_ql(d: &mut [f64], e2: &mut [f64]) -> Option<()> {
    let negligible = |e2: f64, a: f64, b: f64| e2 <= f64::EPSILON * f64::EPSILON * (a * b).abs();
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
            let (mut c, mut s) = (1.0, 0.0);
            let mut gamma = d[m] - shift;
            let mut p = gamma * gamma;
            for i in (l..m).rev() {
                let b = e2[i];
                let r = p + b;
                if i + 1 < m {
                    e2[i + 1] = s * r;
                }
                let (c_last, gamma_last) = (c, gamma);
                c = p / r;
                s = b / r;
                gamma = c * (d[i] - shift) - s * gamma_last;
                d[i + 1] = gamma_last + (d[i] - gamma);
                p = if c == 0.0 { c_last * b } else { gamma * gamma / c };
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
