//! The float types of the CPU kernels and their elementary functions.
//!
//! The f32 functions are branch-free so that the compiler vectorises the loops around them; each is within a few
//! units in the last place of the exact value over the range that activations meet. The f64 functions are the
//! standard library's: they serve gradient checks.

use candle_core::{CpuStorage, WithDType};

/// `f32` or `f64`.
pub(crate) trait Real:
    WithDType
    + Copy
    + Send
    + Sync
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::iter::Sum
    + PartialOrd
    + 'static
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;
    fn of(x: f64) -> Self;
    /// `self * b + c`, fused where the processor fuses.
    fn fma(self, b: Self, c: Self) -> Self;
    fn root(self) -> Self;
    fn exp_(self) -> Self;
    /// `exp(self)` for `self <= 0` or NaN, with fewer steps.
    fn exp_of_negative(self) -> Self;
    fn sin_cos_(self) -> (Self, Self);
    fn erf_(self) -> Self;
    fn max_(self, other: Self) -> Self;
    fn storage(data: Vec<Self>) -> CpuStorage;

    /// `1 / (1 + exp(-x))`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::ONE / (Self::ONE + (-self).exp_())
    }

    /// Sums of `M` rows of products with `P` panels of 16 columns, in the order of the depth:
    /// `sum[i][q][j] = Σ_p a[i][p * step] * b[q * panel + 16 p + j]`, where `segments` gives `a` and its depth piece by
    /// piece and `b` runs through all of them.
    ///
    /// # Safety
    /// `a[i]` must be readable at `p * step` for every `p` of its segment, `b` at all that the sum names, and `to` must
    /// describe `M` rows that may be read and written. Nothing is asked of `_ahead`.
    #[inline(always)]
    unsafe fn tile<const M: usize, const P: usize>(
        segments: impl Iterator<Item = ([*const Self; M], usize)>,
        step: usize,
        mut b: *const Self,
        panel: usize,
        to: Target<Self>,
        _ahead: Ahead<Self>,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let mut sums = to.start::<M, P>();
            for (a, k) in segments {
                Self::accumulate(&mut sums, k, a, step, b, panel);
                b = b.add(16 * k);
            }
            to.store(&sums);
        }
    }

    /// One segment of [`Real::tile`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn accumulate<const M: usize, const P: usize>(
        sums: &mut [[[Self; 16]; P]; M],
        k: usize,
        a: [*const Self; M],
        step: usize,
        b: *const Self,
        panel: usize,
    ) {
        for p in 0..k {
            for q in 0..P {
                // SAFETY: the caller's contract.
                let row = unsafe { &*(b.add(q * panel + 16 * p) as *const [Self; 16]) };
                for i in 0..M {
                    // SAFETY: the caller's contract.
                    let factor = unsafe { *a[i].add(p * step) };
                    for j in 0..16 {
                        sums[i][q][j] = factor.fma(row[j], sums[i][q][j]);
                    }
                }
            }
        }
    }

    /// `to[i][j] = from[j][i]` for eight times eight elements.
    ///
    /// # Safety
    /// Eight elements must be readable at each of `from` and writable at each of `to`.
    #[inline(always)]
    unsafe fn transpose(from: [*const Self; 8], to: [*mut Self; 8]) {
        for (j, from) in from.into_iter().enumerate() {
            for (i, to) in to.into_iter().enumerate() {
                // SAFETY: the caller's contract.
                unsafe { *to.add(j) = *from.add(i) };
            }
        }
    }
}

/// What is wanted soon after a tile, so that it comes into the caches meanwhile; addresses that are not there do no harm.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<T> {
    /// The columns of the next tile's first row.
    pub out: *const T,
    /// Rows of the columns that come next, from here on, a cache line each and panel.
    pub b: *const T,
    /// How many.
    pub rows: usize,
}

/// What the sums of a tile start from and where they go: rows `step` elements apart, `width` columns of them.
#[derive(Clone, Copy)]
pub(crate) struct Target<T> {
    pub out: *mut T,
    pub step: usize,
    pub width: usize,
    pub start: Start<T>,
}

/// See [`Target`].
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Start<T> {
    Zero,
    /// The same row of `width` numbers for all.
    Bias(*const T),
    /// What the target holds.
    Target,
    /// From zero; the sum is added to what the target holds.
    Added,
}

impl<T: Real> Target<T> {
    /// # Safety
    /// `M` rows must be readable.
    #[inline(always)]
    unsafe fn start<const M: usize, const P: usize>(&self) -> [[[T; 16]; P]; M] {
        let mut sums = [[[T::ZERO; 16]; P]; M];
        for (i, sums) in sums.iter_mut().enumerate() {
            let from = match self.start {
                Start::Bias(bias) => bias,
                // SAFETY: the caller's contract.
                Start::Target => unsafe { self.out.add(i * self.step) as *const T },
                Start::Zero | Start::Added => continue,
            };
            // SAFETY: as above; a tile has `width <= 16 P` columns.
            unsafe { std::ptr::copy_nonoverlapping(from, sums.as_mut_ptr() as *mut T, self.width) };
        }
        sums
    }

    /// # Safety
    /// `M` rows must be writable.
    #[inline(always)]
    unsafe fn store<const M: usize, const P: usize>(&self, sums: &[[[T; 16]; P]; M]) {
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: the caller's contract.
            let out = unsafe { std::slice::from_raw_parts_mut(self.out.add(i * self.step), self.width) };
            let sums = sums.as_flattened();
            if self.start == Start::Added {
                out.iter_mut().zip(sums).for_each(|(o, &s)| *o += s);
            } else {
                out.copy_from_slice(&sums[..self.width]);
            }
        }
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;

    #[inline(always)]
    fn of(x: f64) -> f64 {
        x
    }

    #[inline(always)]
    fn fma(self, b: f64, c: f64) -> f64 {
        self * b + c
    }

    fn root(self) -> f64 {
        self.sqrt()
    }

    fn exp_(self) -> f64 {
        self.exp()
    }

    fn exp_of_negative(self) -> f64 {
        self.exp()
    }

    fn sin_cos_(self) -> (f64, f64) {
        self.sin_cos()
    }

    fn erf_(self) -> f64 {
        candle_core::cpu::erf::erf_f64(self)
    }

    #[inline(always)]
    fn max_(self, other: f64) -> f64 {
        if self > other { self } else { other }
    }

    fn storage(data: Vec<f64>) -> CpuStorage {
        CpuStorage::F64(data)
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;

    #[inline(always)]
    fn of(x: f64) -> f32 {
        x as f32
    }

    #[inline(always)]
    fn fma(self, b: f32, c: f32) -> f32 {
        // Without the instruction `mul_add` is a slow library call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            self.mul_add(b, c)
        } else {
            self * b + c
        }
    }

    #[inline(always)]
    fn root(self) -> f32 {
        self.sqrt()
    }

    /// `2^n · exp(r)` with `|r| <= ln 2 / 2`; polynomial of Cephes' `expf`. Below -87.3 it gives 0 (no subnormals),
    /// above 88.7 infinity.
    #[inline(always)]
    fn exp_(self) -> f32 {
        let (y, n) = exp_reduced(self.clamp(-87.4, 89.0));
        // 2^n in two factors: n reaches 128, whose power alone would overflow.
        let low = (n * 0.5 + ROUND) - ROUND;
        let y = y * power_of_2(low) * power_of_2(n - low);
        let y = if self < -87.336_54 { 0.0 } else { y };
        let y = if self > 88.722_84 { f32::INFINITY } else { y };
        if self.is_nan() { self } else { y }
    }

    #[inline(always)]
    fn exp_of_negative(self) -> f32 {
        let x = if self < -87.0 { -87.0 } else { self };
        let (y, n) = exp_reduced(x);
        let y = y * power_of_2(n);
        if self < -87.0 { 0.0 } else { y }
    }

    /// Reduction by multiples of π/2 in three parts, then Cephes' polynomials; absolute error below 2e-7 for
    /// `|x| < 8192`. NaN and infinities give NaN.
    #[inline(always)]
    fn sin_cos_(self) -> (f32, f32) {
        let n = self.fma(std::f32::consts::FRAC_2_PI, ROUND) - ROUND;
        let r = n.fma(-1.570_312_5, self);
        let r = n.fma(-4.837_513e-4, r);
        let r = n.fma(-7.549_79e-8, r);
        let quadrant = (n + ROUND).to_bits();
        let r2 = r * r;
        let s = (-1.951_529_6e-4f32).fma(r2, 8.332_161e-3).fma(r2, -1.666_665_5e-1);
        let s = (s * r2).fma(r, r);
        let c = 2.443_315_7e-5f32.fma(r2, -1.388_731_6e-3).fma(r2, 4.166_664_6e-2);
        let c = (c * r2).fma(r2, (-0.5f32).fma(r2, 1.0));
        let swap = quadrant & 1 != 0;
        let (sin, cos) = if swap { (c, s) } else { (s, c) };
        let sin = f32::from_bits(sin.to_bits() ^ ((quadrant & 2) << 30));
        let cos = f32::from_bits(cos.to_bits() ^ ((quadrant.wrapping_add(1) & 2) << 30));
        (sin, cos)
    }

    /// Rational approximation on [-4, 4] (Eigen's `generic_fast_erf_float`), absolute error below 2e-7.
    #[inline(always)]
    fn erf_(self) -> f32 {
        let x = self.clamp(-4.0, 4.0);
        let x2 = x * x;
        let p = (-2.726_142e-10f32).fma(x2, 2.770_681_4e-8);
        let p = p.fma(x2, -2.101_024e-6);
        let p = p.fma(x2, -5.692_506_4e-5);
        let p = p.fma(x2, -7.349_906_3e-4);
        let p = p.fma(x2, -2.954_6e-3);
        let p = p.fma(x2, -1.609_603_3e-2) * x;
        let q = (-1.456_607_2e-5f32).fma(x2, -2.133_740_5e-4);
        let q = q.fma(x2, -1.682_827e-3);
        let q = q.fma(x2, -7.373_329e-3);
        let q = q.fma(x2, -1.426_473_9e-2);
        p / q
    }

    #[inline(always)]
    fn max_(self, other: f32) -> f32 {
        if self > other { self } else { other }
    }

    fn storage(data: Vec<f32>) -> CpuStorage {
        CpuStorage::F32(data)
    }

    #[cfg(all(target_arch = "x86_64", target_feature = "avx512f"))]
    #[inline(always)]
    unsafe fn tile<const M: usize, const P: usize>(
        segments: impl Iterator<Item = ([*const f32; M], usize)>,
        step: usize,
        mut b: *const f32,
        panel: usize,
        to: Target<f32>,
        ahead: Ahead<f32>,
    ) {
        use std::arch::x86_64::*;
        let mask = |q: usize| ((1u32 << to.width.saturating_sub(16 * q).min(16)) - 1) as u16;
        for i in 0..M {
            for q in 0..P {
                let sums = ahead.out.wrapping_add(i * to.step + 16 * q);
                // SAFETY: a hint, which reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(sums as *const i8) };
            }
        }
        for p in 0..ahead.rows {
            for q in 0..P {
                let columns = ahead.b.wrapping_add(q * panel + 16 * p);
                // SAFETY: as above.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(columns as *const i8) };
            }
        }
        // SAFETY: the reads and writes are those of the caller's contract; masks cut the rows to their width.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); P]; M];
            if let Start::Bias(_) | Start::Target = to.start {
                for i in 0..M {
                    let row = if let Start::Bias(bias) = to.start { bias } else { to.out.add(i * to.step) };
                    for q in 0..P {
                        sums[i][q] = _mm512_maskz_loadu_ps(mask(q), row.add(16 * q));
                    }
                }
            }
            for (a, k) in segments {
                let mut offset = 0;
                for _ in 0..k {
                    let mut columns = [_mm512_setzero_ps(); P];
                    for (q, columns) in columns.iter_mut().enumerate() {
                        *columns = _mm512_loadu_ps(b.add(q * panel));
                    }
                    for i in 0..M {
                        let factor = _mm512_set1_ps(*a[i].add(offset));
                        for q in 0..P {
                            sums[i][q] = _mm512_fmadd_ps(factor, columns[q], sums[i][q]);
                        }
                    }
                    b = b.add(16);
                    offset += step;
                }
            }
            for i in 0..M {
                for q in 0..P {
                    let out = to.out.add(i * to.step + 16 * q);
                    if to.start == Start::Added {
                        sums[i][q] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask(q), out), sums[i][q]);
                    }
                    if to.width == 16 * P {
                        _mm512_storeu_ps(out, sums[i][q]);
                    } else {
                        _mm512_mask_storeu_ps(out, mask(q), sums[i][q]);
                    }
                }
            }
        }
    }

    #[cfg(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma"))]
    #[inline(always)]
    unsafe fn accumulate<const M: usize, const P: usize>(
        sums: &mut [[[f32; 16]; P]; M],
        k: usize,
        a: [*const f32; M],
        step: usize,
        b: *const f32,
        panel: usize,
    ) {
        use std::arch::x86_64::*;
        // SAFETY: the reads are those of the caller's contract; the rows of `sums` hold 16 floats.
        unsafe {
            for q in 0..P {
                let mut low = [_mm256_setzero_ps(); M];
                let mut high = [_mm256_setzero_ps(); M];
                for i in 0..M {
                    low[i] = _mm256_loadu_ps(sums[i][q].as_ptr());
                    high[i] = _mm256_loadu_ps(sums[i][q].as_ptr().add(8));
                }
                let (mut b, mut offset) = (b.add(q * panel), 0);
                for _ in 0..k {
                    let b_low = _mm256_loadu_ps(b);
                    let b_high = _mm256_loadu_ps(b.add(8));
                    for i in 0..M {
                        let factor = _mm256_broadcast_ss(&*a[i].add(offset));
                        low[i] = _mm256_fmadd_ps(factor, b_low, low[i]);
                        high[i] = _mm256_fmadd_ps(factor, b_high, high[i]);
                    }
                    b = b.add(16);
                    offset += step;
                }
                for i in 0..M {
                    _mm256_storeu_ps(sums[i][q].as_mut_ptr(), low[i]);
                    _mm256_storeu_ps(sums[i][q].as_mut_ptr().add(8), high[i]);
                }
            }
        }
    }

    #[cfg(all(target_arch = "x86_64", target_feature = "avx2"))]
    #[inline(always)]
    unsafe fn transpose(from: [*const f32; 8], to: [*mut f32; 8]) {
        use std::arch::x86_64::*;
        // SAFETY: the caller's contract.
        unsafe {
            let mut rows = [_mm256_setzero_ps(); 8];
            for (row, from) in rows.iter_mut().zip(from) {
                *row = _mm256_loadu_ps(from);
            }
            // Pairs of rows interleaved, then pairs of pairs, then halves exchanged.
            let mut pairs = rows;
            for i in 0..4 {
                pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
                pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
            }
            let mut fours = pairs;
            for i in 0..2 {
                for j in 0..2 {
                    let (low, high) = (pairs[4 * i + j], pairs[4 * i + j + 2]);
                    fours[4 * i + 2 * j] = _mm256_shuffle_ps::<0x44>(low, high);
                    fours[4 * i + 2 * j + 1] = _mm256_shuffle_ps::<0xee>(low, high);
                }
            }
            for i in 0..4 {
                _mm256_storeu_ps(to[i], _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]));
                _mm256_storeu_ps(to[i + 4], _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]));
            }
        }
    }
}

/// `exp(x) = y · 2^n` with a whole `n` and `y` between about 0.7 and 1.4; polynomial of Cephes' `expf`.
#[inline(always)]
fn exp_reduced(x: f32) -> (f32, f32) {
    let n = x.fma(std::f32::consts::LOG2_E, ROUND) - ROUND;
    let r = n.fma(-0.693_359_4, x);
    let r = n.fma(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.fma(r, 1.398_199_9e-3);
    let p = p.fma(r, 8.333_452e-3);
    let p = p.fma(r, 4.166_579_6e-2);
    let p = p.fma(r, 1.666_666_5e-1);
    let p = p.fma(r, 0.5);
    (p.fma(r * r, r) + 1.0, n)
}

/// `2^n` for a whole `n` from -126 to 127.
#[inline(always)]
fn power_of_2(n: f32) -> f32 {
    f32::from_bits((n + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23)
}

/// Adding and subtracting this rounds an f32 below 2^22 to an integer, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_f32_functions_follow_f64() {
        for i in -200_000..200_000 {
            let x = i as f32 * 4.3e-4; // ±86
            let wide = f64::from(x);
            assert!((f64::from(x.exp_()) / wide.exp() - 1.0).abs() < 3e-7, "exp {x}");
            if x <= 0.0 {
                assert!((f64::from(x.exp_of_negative()) / wide.exp() - 1.0).abs() < 3e-7, "exp {x}");
            }
            let (s, c) = (x * 10.0).sin_cos_();
            let wide10 = f64::from(x * 10.0);
            assert!(
                (f64::from(s) - wide10.sin()).abs() < 3e-7 && (f64::from(c) - wide10.cos()).abs() < 3e-7,
                "sin {x}"
            );
            let erf = candle_core::cpu::erf::erf_f64(wide * 0.1);
            assert!((f64::from((x * 0.1).erf_()) - erf).abs() < 5e-7, "erf {x}");
        }
    }

    #[test]
    fn transposing_exchanges_rows_and_columns() {
        let from: Vec<f32> = (0..8 * 11).map(|i| i as f32).collect();
        let mut to = vec![0f32; 8 * 13];
        let (source, target) = (from.as_ptr(), to.as_mut_ptr());
        // SAFETY: rows of 11 and 13 elements inside the two vectors.
        unsafe {
            f32::transpose(
                std::array::from_fn(|i| source.add(11 * i)),
                std::array::from_fn(|i| target.add(13 * i)),
            );
        }
        for i in 0..8 {
            for j in 0..8 {
                assert_eq!(to[13 * i + j], from[11 * j + i], "{i}, {j}");
            }
        }
    }

    #[test]
    fn the_f32_functions_keep_their_limits() {
        assert_eq!(f32::NEG_INFINITY.exp_(), 0.0);
        assert_eq!((-100f32).exp_(), 0.0);
        assert_eq!(f32::INFINITY.exp_(), f32::INFINITY);
        assert_eq!(0f32.exp_(), 1.0);
        assert!(f32::NAN.exp_().is_nan() && f32::NAN.sin_cos_().0.is_nan() && f32::NAN.erf_().is_nan());
        assert_eq!((f32::NEG_INFINITY.exp_of_negative(), 0f32.exp_of_negative()), (0.0, 1.0));
        assert!(f32::NAN.exp_of_negative().is_nan());
        assert!((88.5f32.exp_() / 88.5f32.exp() - 1.0).abs() < 1e-6);
        assert_eq!(0f32.sin_cos_(), (0.0, 1.0));
    }
}
