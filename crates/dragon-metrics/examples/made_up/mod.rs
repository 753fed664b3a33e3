//! Embeddings for the examples that were given none.

use dragon_metrics::Rows;
use dragon_metrics::bootstrap::SplitMix64;

/// `n` embeddings of dimension 32 around `offset`, the later coordinates smaller.
pub fn rows(seed: u64, n: usize, offset: f64) -> Rows {
    let mut rng = SplitMix64(seed);
    let mut uniform = || (rng.next() >> 11) as f64 / (1u64 << 53) as f64;
    let mut normal = || (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
    let data = (0..n * 32).map(|i| normal() * 0.95f64.powi(i as i32 % 32) + offset).collect();
    Rows::new(n, 32, data).expect("finite numbers")
}
