//! Eight numbers side by side, and the inverse real FFT of length 96 on them.

use std::ops::{Add, Mul, Sub};

/// Numbers in a [`Lanes`].
pub const LANES: usize = 8;

/// Eight numbers on which the machine works at once; no operation crosses the lanes.
///
/// Written with AVX where the build has it, since the compiler leaves the plain form below half scalar; both give the
/// same bits.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Lanes(Eight);

#[cfg(all(target_arch = "x86_64", target_feature = "avx", target_feature = "fma"))]
mod eight {
    use std::arch::x86_64::*;
    pub type Eight = __m256;

    #[inline(always)]
    pub fn from_array(x: [f32; 8]) -> Eight {
        // SAFETY: the build has AVX, and `x` holds the eight values read.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    pub fn to_array(x: Eight) -> [f32; 8] {
        let mut out = [0.0; 8];
        // SAFETY: the build has AVX, and `out` holds the eight values written.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) };
        out
    }

    #[inline(always)]
    pub fn splat(x: f32) -> Eight {
        // SAFETY: the build has AVX.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    pub fn add(a: Eight, b: Eight) -> Eight {
        // SAFETY: the build has AVX.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    pub fn sub(a: Eight, b: Eight) -> Eight {
        // SAFETY: the build has AVX.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    pub fn mul(a: Eight, b: Eight) -> Eight {
        // SAFETY: the build has AVX.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    pub fn mul_add(a: Eight, b: Eight, c: Eight) -> Eight {
        // SAFETY: the build has FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    pub fn neg_mul_add(a: Eight, b: Eight, c: Eight) -> Eight {
        // SAFETY: the build has FMA.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    pub fn max(a: Eight, b: Eight) -> Eight {
        // SAFETY: the build has AVX.
        unsafe { _mm256_max_ps(a, b) }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "avx", target_feature = "fma")))]
mod eight {
    use std::array::from_fn;
    pub type Eight = [f32; 8];

    #[inline(always)]
    pub fn from_array(x: [f32; 8]) -> Eight {
        x
    }

    #[inline(always)]
    pub fn to_array(x: Eight) -> [f32; 8] {
        x
    }

    #[inline(always)]
    pub fn splat(x: f32) -> Eight {
        [x; 8]
    }

    #[inline(always)]
    pub fn add(a: Eight, b: Eight) -> Eight {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    pub fn sub(a: Eight, b: Eight) -> Eight {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    pub fn mul(a: Eight, b: Eight) -> Eight {
        from_fn(|i| a[i] * b[i])
    }

    /// Without the instruction, `f32::mul_add` is a slow library call.
    #[inline(always)]
    pub fn mul_add(a: Eight, b: Eight, c: Eight) -> Eight {
        let fused = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        from_fn(|i| if fused { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
    }

    #[inline(always)]
    pub fn neg_mul_add(a: Eight, b: Eight, c: Eight) -> Eight {
        mul_add(a.map(|x| -x), b, c)
    }

    #[inline(always)]
    pub fn max(a: Eight, b: Eight) -> Eight {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
}

use eight::Eight;

impl Lanes {
    #[inline(always)]
    pub fn splat(x: f32) -> Self {
        Lanes(eight::splat(x))
    }

    pub fn zero() -> Self {
        Lanes::splat(0.0)
    }

    #[inline(always)]
    pub fn from_array(x: [f32; LANES]) -> Self {
        Lanes(eight::from_array(x))
    }

    #[inline(always)]
    pub fn to_array(self) -> [f32; LANES] {
        eight::to_array(self.0)
    }

    /// `self * factor + addend`, rounded once where the machine has such an instruction.
    #[inline(always)]
    pub fn mul_add(self, factor: Self, addend: Self) -> Self {
        Lanes(eight::mul_add(self.0, factor.0, addend.0))
    }

    /// `addend - self * factor`, rounded as [`Self::mul_add`].
    #[inline(always)]
    pub fn neg_mul_add(self, factor: Self, addend: Self) -> Self {
        Lanes(eight::neg_mul_add(self.0, factor.0, addend.0))
    }

    #[inline(always)]
    pub fn max(self, other: Self) -> Self {
        Lanes(eight::max(self.0, other.0))
    }

    /// The largest of the eight.
    pub fn max_lane(self) -> f32 {
        self.to_array().into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
}

impl Add for Lanes {
    type Output = Lanes;
    #[inline(always)]
    fn add(self, other: Lanes) -> Lanes {
        Lanes(eight::add(self.0, other.0))
    }
}

impl Sub for Lanes {
    type Output = Lanes;
    #[inline(always)]
    fn sub(self, other: Lanes) -> Lanes {
        Lanes(eight::sub(self.0, other.0))
    }
}

impl Mul for Lanes {
    type Output = Lanes;
    #[inline(always)]
    fn mul(self, other: Lanes) -> Lanes {
        Lanes(eight::mul(self.0, other.0))
    }
}

/// A complex number per lane: real and imaginary parts.
pub type Complex = [Lanes; 2];

/// Length of the transform: the mel bands of a frame. The correlation of 96 bands with a filter of at most 96 fits into it
/// without wrapping around, wherever the filter lies wholly inside the frame.
pub const LENGTH: usize = 96;
/// Bins of its spectrum.
pub const BINS: usize = LENGTH / 2 + 1;
const HALF: usize = LENGTH / 2;

/// Inverse real FFT: `y[n] = Σ_k Y[k] exp(2πi kn/96)` over all 96 bins, of which `spectrum` holds the first 49 (the
/// others are their conjugates). Not divided by 96.
pub struct InverseFft {
    /// `exp(2πi k/96)`.
    twiddles: [[f32; 2]; LENGTH],
}

impl InverseFft {
    pub fn new() -> Self {
        InverseFft {
            twiddles: std::array::from_fn(|k| {
                let (sin, cos) = (std::f64::consts::TAU * k as f64 / LENGTH as f64).sin_cos();
                [cos as f32, sin as f32]
            }),
        }
    }

    /// Calculates `z[m] = y[2m] + i y[2m+1]`, so that the result is read in pairs.
    #[inline(always)]
    pub fn run(&self, spectrum: &[Complex; BINS], z: &mut [Complex; HALF]) {
        let mut a = [[Lanes::zero(); 2]; HALF];
        let mut b = [[Lanes::zero(); 2]; HALF];
        // Even samples are the transform of Y[k] + Y[k+48], odd ones of (Y[k] - Y[k+48]) exp(2πik/96).
        for k in 0..HALF {
            let ([xr, xi], [yr, yi]) = (spectrum[k], spectrum[HALF - k]); // Y[k+48] = conj(Y[48-k])
            let (even, odd) = ([xr + yr, xi - yi], [xr - yr, xi + yi]);
            let odd = turn(odd, self.twiddles[k]);
            a[k] = [even[0] - odd[1], even[1] + odd[0]];
        }
        // Stockham: 48 = 4 * 4 * 3; each pass leaves its output in order.
        self.radix_4::<48, 1>(&a, &mut b);
        self.radix_4::<12, 4>(&b, &mut a);
        self.radix_3(&a, z);
    }

    /// One pass on `S` interleaved transforms of length `N`.
    #[inline(always)]
    fn radix_4<const N: usize, const S: usize>(&self, x: &[Complex; HALF], y: &mut [Complex; HALF]) {
        let quarter = N / 4;
        for p in 0..quarter {
            let w = |j: usize| self.twiddles[j * p * (LENGTH / N)];
            let (w1, w2, w3) = (w(1), w(2), w(3));
            for q in 0..S {
                let [a, b, c, d] = std::array::from_fn(|j| x[q + S * (p + quarter * j)]);
                let (ac, a_c) = (add(a, c), sub(a, c));
                let (bd, b_d) = (add(b, d), sub(b, d));
                let out = &mut y[q + S * 4 * p..];
                out[0] = add(ac, bd);
                // i (b - d) = [-im, re]
                out[S] = turn([a_c[0] - b_d[1], a_c[1] + b_d[0]], w1);
                out[2 * S] = turn(sub(ac, bd), w2);
                out[3 * S] = turn([a_c[0] + b_d[1], a_c[1] - b_d[0]], w3);
            }
        }
    }

    /// The last pass: 16 interleaved transforms of length 3.
    #[inline(always)]
    fn radix_3(&self, x: &[Complex; HALF], y: &mut [Complex; HALF]) {
        const S: usize = 16;
        let (half, sin_60) = (Lanes::splat(0.5), Lanes::splat(0.866_025_4));
        for q in 0..S {
            let [a, b, c] = [x[q], x[q + S], x[q + 2 * S]];
            let (sum, difference) = (add(b, c), sub(b, c));
            let middle = [sum[0].neg_mul_add(half, a[0]), sum[1].neg_mul_add(half, a[1])];
            let [dr, di] = difference; // times i sin(60°): [-di, dr] sin(60°)
            y[q] = add(a, sum);
            y[q + S] = [di.neg_mul_add(sin_60, middle[0]), dr.mul_add(sin_60, middle[1])];
            y[q + 2 * S] = [di.mul_add(sin_60, middle[0]), dr.neg_mul_add(sin_60, middle[1])];
        }
    }

    /// The forward transform of one frame, in f64: bins 0 to 48.
    pub fn forward(&self, frame: &[f32]) -> [[f32; 2]; BINS] {
        std::array::from_fn(|k| {
            let (mut re, mut im) = (0.0f64, 0.0f64);
            for (n, &x) in frame.iter().enumerate() {
                let [cos, sin] = self.twiddles[k * n % LENGTH];
                re += f64::from(x) * f64::from(cos);
                im -= f64::from(x) * f64::from(sin);
            }
            [re as f32, im as f32]
        })
    }
}

#[inline(always)]
fn add(a: Complex, b: Complex) -> Complex {
    [a[0] + b[0], a[1] + b[1]]
}

#[inline(always)]
fn sub(a: Complex, b: Complex) -> Complex {
    [a[0] - b[0], a[1] - b[1]]
}

/// Complex product with the same number in all lanes.
#[inline(always)]
fn turn(a: Complex, w: [f32; 2]) -> Complex {
    let [wr, wi] = w.map(Lanes::splat);
    [a[1].neg_mul_add(wi, a[0] * wr), a[1].mul_add(wr, a[0] * wi)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inverse_fft_undoes_the_forward_transform() {
        let fft = InverseFft::new();
        let frames: Vec<Vec<f32>> = (0..LANES)
            .map(|lane| {
                (0..LENGTH).map(|n| ((n * n + 7 * lane) as f32 * 0.37).sin() + 0.1 * lane as f32).collect()
            })
            .collect();
        let mut parts = [[[0.0; LANES]; 2]; BINS];
        for (lane, frame) in frames.iter().enumerate() {
            for (bin, value) in fft.forward(frame).into_iter().enumerate() {
                parts[bin][0][lane] = value[0];
                parts[bin][1][lane] = value[1];
            }
        }
        let spectrum = parts.map(|parts| parts.map(Lanes::from_array));
        let mut z = [[Lanes::zero(); 2]; HALF];
        fft.run(&spectrum, &mut z);
        for (lane, frame) in frames.iter().enumerate() {
            for (n, want) in frame.iter().enumerate() {
                let got = z[n / 2][n % 2].to_array()[lane] / LENGTH as f32;
                assert!((got - want).abs() < 2e-6, "lane {lane} sample {n}: {got} {want}");
            }
        }
    }
}
