//! Seeded noise: the same numbers on every platform, whatever the number of threads.
//!
//! The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): draw `i` is a
//! function of (key, stream, i), so a tensor of noise is filled by many threads and the state is three integers.
//! Normals come from the inverse of the normal distribution (Wichura 1988, AS 241), written with IEEE additions,
//! multiplications, divisions and square roots only, since `ln` and `cos` differ between C libraries.

use candle_core::{DType, Device, Result, Shape, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Seeded, counter-based random generator; serialise it to save its whole state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rng {
    key: u64,
    stream: u64,
    counter: u64,
}

impl Rng {
    /// A generator for `seed`.
    pub fn new(seed: u64) -> Rng {
        Rng { key: seed, stream: 0, counter: 0 }
    }

    /// A generator for `seed` that shares nothing with those of other keys: its key is a SHA-256 of both.
    pub fn from_key(key: &str, seed: u64) -> Rng {
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        hash.update(key.as_bytes());
        Rng::from_digest(&hash.finalize())
    }

    /// A generator split off under `label`; `self` moves on by one draw, so two forks never agree.
    pub fn fork(&mut self, label: &str) -> Rng {
        let mut hash = Sha256::new();
        for part in [self.key, self.stream, self.counter] {
            hash.update(part.to_le_bytes());
        }
        hash.update(label.as_bytes());
        self.counter += 1;
        Rng::from_digest(&hash.finalize())
    }

    fn from_digest(digest: &[u8]) -> Rng {
        let word = |i: usize| u64::from_le_bytes(digest[8 * i..8 * i + 8].try_into().expect("eight bytes"));
        Rng { key: word(0), stream: word(1), counter: 0 }
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let bits = self.draw(self.counter);
        self.counter += 1;
        bits
    }

    /// Draw number `i`: half of a Philox block.
    fn draw(&self, i: u64) -> u64 {
        philox(self.key, self.stream, i >> 1)[(i & 1) as usize]
    }

    /// Uniform in `[0, 1)`, with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * f64::EPSILON * 0.5
    }

    /// Uniform in `0..n`, without bias (Lemire 2019).
    ///
    /// # Panics
    /// If `n` is zero.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "Rng::below needs a positive bound");
        let n = n as u64;
        let reject_below = n.wrapping_neg() % n;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            if wide as u64 >= reject_below {
                return (wide >> 64) as usize;
            }
        }
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        standard_normal(self.next_u64())
    }

    /// A tensor of standard normals, drawn on the CPU in f64, rounded to `dtype` and moved to `device`.
    /// Uses one draw per element.
    ///
    /// # Errors
    /// If `dtype` is not a float type or the device refuses the copy.
    pub fn normal_tensor<S: Into<Shape>>(
        &mut self,
        shape: S,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let shape = shape.into();
        self.fill(shape, dtype, device, standard_normal)
    }

    /// A tensor of uniform numbers in `[lo, hi)`, drawn as in [`Rng::normal_tensor`].
    ///
    /// # Errors
    /// If `dtype` is not a float type or the device refuses the copy.
    pub fn uniform_tensor<S: Into<Shape>>(
        &mut self,
        lo: f64,
        hi: f64,
        shape: S,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.fill(shape.into(), dtype, device, |bits| {
            lo + (hi - lo) * ((bits >> 11) as f64 * f64::EPSILON * 0.5)
        })
    }

    fn fill(
        &mut self,
        shape: Shape,
        dtype: DType,
        device: &Device,
        f: impl Fn(u64) -> f64 + Sync,
    ) -> Result<Tensor> {
        if !dtype.is_float() {
            candle_core::bail!("random tensors need a float dtype, got {dtype:?}")
        }
        let n = shape.elem_count();
        let start = self.counter;
        self.counter += n as u64;
        let this = &*self;
        let tensor = if dtype == DType::F64 {
            let data: Vec<f64> = (0..n).into_par_iter().map(|i| f(this.draw(start + i as u64))).collect();
            Tensor::from_vec(data, shape, &Device::Cpu)?
        } else {
            let data: Vec<f32> =
                (0..n).into_par_iter().map(|i| f(this.draw(start + i as u64)) as f32).collect();
            Tensor::from_vec(data, shape, &Device::Cpu)?
        };
        tensor.to_dtype(dtype)?.to_device(device)
    }

    /// Shuffles in place (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// One Philox4x32-10 block as two 64-bit words.
fn philox(key: u64, stream: u64, block: u64) -> [u64; 2] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    let mut c = [block as u32, (block >> 32) as u32, stream as u32, (stream >> 32) as u32];
    for _ in 0..10 {
        let (p0, p1) = (M0 * u64::from(c[0]), M1 * u64::from(c[2]));
        c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [u64::from(c[0]) | u64::from(c[1]) << 32, u64::from(c[2]) | u64::from(c[3]) << 32]
}

/// The standard normal whose distribution function is the uniform number made of `bits`.
fn standard_normal(bits: u64) -> f64 {
    // The half step keeps p away from 0 and 1.
    let p = ((bits >> 12) as f64 + 0.5) * f64::EPSILON;
    normal_quantile(p)
}

/// Inverse of the normal distribution function, AS 241 (PPND16): relative error about 1e-16.
#[allow(clippy::excessive_precision)] // the constants as published
fn normal_quantile(p: f64) -> f64 {
    let poly = |c: &[f64; 8], x: f64| c.iter().rev().fold(0.0, |acc, &c| acc * x + c);
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        const A: [f64; 8] = [
            3.3871328727963666080e0,
            1.3314166789178437745e+2,
            1.9715909503065514427e+3,
            1.3731693765509461125e+4,
            4.5921953931549871457e+4,
            6.7265770927008700853e+4,
            3.3430575583588128105e+4,
            2.5090809287301226727e+3,
        ];
        const B: [f64; 8] = [
            1.0,
            4.2313330701600911252e+1,
            6.8718700749205790830e+2,
            5.3941960214247511077e+3,
            2.1213794301586595867e+4,
            3.9307895800092710610e+4,
            2.8729085735721942674e+4,
            5.2264952788528545610e+3,
        ];
        let r = 0.180625 - q * q;
        return q * poly(&A, r) / poly(&B, r);
    }
    let tail = if q < 0.0 { p } else { 1.0 - p };
    let r = (-portable_ln(tail)).sqrt();
    let x = if r <= 5.0 {
        const C: [f64; 8] = [
            1.42343711074968357734e0,
            4.63033784615654529590e0,
            5.76949722146069140550e0,
            3.64784832476320460504e0,
            1.27045825245236838258e0,
            2.41780725177450611770e-1,
            2.27238449892691845833e-2,
            7.74545014278341407640e-4,
        ];
        const D: [f64; 8] = [
            1.0,
            2.05319162663775882187e0,
            1.67638483018380384940e0,
            6.89767334985100004550e-1,
            1.48103976427480074590e-1,
            1.51986665636164571966e-2,
            5.47593808499534494600e-4,
            1.05075007164441684324e-9,
        ];
        let r = r - 1.6;
        poly(&C, r) / poly(&D, r)
    } else {
        const E: [f64; 8] = [
            6.65790464350110377720e0,
            5.46378491116411436990e0,
            1.78482653991729133580e0,
            2.96560571828504891230e-1,
            2.65321895265761230930e-2,
            1.24266094738807843860e-3,
            2.71155556874348757815e-5,
            2.01033439929228813265e-7,
        ];
        const F: [f64; 8] = [
            1.0,
            5.99832206555887937690e-1,
            1.36929880922735805310e-1,
            1.48753612908506148525e-2,
            7.86869131145613259100e-4,
            1.84631831751005468180e-5,
            1.42151175831644588870e-7,
            2.04426310338993978564e-15,
        ];
        let r = r - 5.0;
        poly(&E, r) / poly(&F, r)
    };
    if q < 0.0 { -x } else { x }
}

/// Natural logarithm of a positive normal number from IEEE operations only: `e ln 2 + 2 atanh((m-1)/(m+1))`.
fn portable_ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7FF) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52)); // [1, 2)
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let s = (mantissa - 1.0) / (mantissa + 1.0); // |s| < 0.172
    let s2 = s * s;
    // 0.172^22 < 2e-17: eleven terms reach full precision.
    let series = (0..11).rev().fold(0.0, |acc, i| acc * s2 + 1.0 / (2 * i + 1) as f64);
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_meets_its_published_vectors() {
        // Random123 distribution, kat_vectors: philox4x32-10.
        assert_eq!(philox(0, 0, 0), [0xe169_c58d_6627_e8d5, 0x9b00_dbd8_bc57_ac4c]);
        assert_eq!(philox(u64::MAX, u64::MAX, u64::MAX), [0x41c8_3b0e_408f_276d, 0x6d54_51fd_a20b_c7c6]);
    }

    #[test]
    fn logarithm_matches_the_library_to_an_ulp_or_two() {
        for i in 1..2000 {
            let x = i as f64 * 0.00037;
            assert!((portable_ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1.0), "{x}");
        }
    }

    #[test]
    fn normals_have_the_moments_of_a_standard_normal() {
        let t = Rng::new(3).normal_tensor(200_000, DType::F64, &Device::Cpu).unwrap();
        let v: Vec<f64> = t.to_vec1().unwrap();
        let n = v.len() as f64;
        let moment = |k: i32| v.iter().map(|x| x.powi(k)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.02);
        assert!(moment(3).abs() < 0.05 && (moment(4) - 3.0).abs() < 0.1);
    }

    #[test]
    fn known_quantiles() {
        for (p, want) in
            [(0.975, 1.959963984540054), (1e-10, -6.361340902404056), (0.5, 0.0), (0.9, 1.2815515655446004)]
        {
            assert!((normal_quantile(p) - want).abs() < 1e-14 * (1.0 + want.abs() * 4.0), "{p}");
        }
    }

    #[test]
    fn a_tensor_equals_single_draws_and_the_state_round_trips() {
        let mut a = Rng::from_key("noise", 7);
        let mut b: Rng = serde_json::from_str(&serde_json::to_string(&a).unwrap()).unwrap();
        let t = a.normal_tensor((3, 5), DType::F64, &Device::Cpu).unwrap().flatten_all().unwrap();
        let one_by_one: Vec<f64> = (0..15).map(|_| b.normal()).collect();
        assert_eq!(t.to_vec1::<f64>().unwrap(), one_by_one);
        assert_eq!(a, b);
    }

    #[test]
    fn forks_and_keys_differ() {
        let mut rng = Rng::new(1);
        let (mut a, mut b, mut c) = (rng.fork("x"), rng.fork("x"), Rng::from_key("x", 1));
        let (a, b, c) = (a.next_u64(), b.next_u64(), c.next_u64());
        assert!(a != b && b != c && a != c);
    }

    #[test]
    fn below_covers_its_range_evenly() {
        let mut rng = Rng::new(5);
        let mut counts = [0usize; 7];
        for _ in 0..70_000 {
            counts[rng.below(7)] += 1;
        }
        assert!(counts.iter().all(|&c| (9_500..10_500).contains(&c)), "{counts:?}");
    }

    #[test]
    fn a_shuffle_is_a_permutation() {
        let mut items: Vec<usize> = (0..100).collect();
        Rng::new(2).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
