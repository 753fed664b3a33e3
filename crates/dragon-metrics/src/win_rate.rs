//! How often one system beats another, and how sure that is.

use serde::{Deserialize, Serialize};
use statrs::function::beta::beta_reg;

use crate::bootstrap::Better;
use crate::{Error, Result};

/// Share of comparisons won, with a Clopper-Pearson interval of 95 %.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WinRate {
    /// Comparisons won outright.
    pub wins: usize,
    /// Ties; each counts half.
    pub ties: usize,
    /// Comparisons.
    pub n: usize,
    /// `(wins + ties/2)/n`, in [0, 1].
    pub rate: f64,
    /// Lower end of the two-sided 95 % interval.
    pub lower: f64,
    /// Upper end.
    pub upper: f64,
}

/// Share of the indices on which `a` beats `b`; ties count half.
///
/// # Errors
/// If the lengths differ, there is nothing to compare, or a value is not finite.
pub fn win_rate(a: &[f64], b: &[f64], better: Better) -> Result<WinRate> {
    if a.len() != b.len() {
        return Err(Error::Dimension {
            what: "scores of the second system",
            expected: a.len(),
            found: b.len(),
        });
    }
    if a.is_empty() {
        return Err(Error::TooFew { what: "comparisons", expected: 1, found: 0 });
    }
    let (mut wins, mut ties) = (0, 0);
    for (i, (&x, &y)) in a.iter().zip(b).enumerate() {
        for value in [x, y] {
            if !value.is_finite() {
                return Err(Error::NotFinite { what: "scores", row: i, column: 0, value });
            }
        }
        ties += usize::from(x == y);
        wins += usize::from(better.is_better(x, y));
    }
    let n = a.len();
    let won = wins as f64 + 0.5 * ties as f64;
    let (lower, upper) = interval(won, n, 0.95)?;
    Ok(WinRate { wins, ties, n, rate: won / n as f64, lower, upper })
}

/// Two-sided Clopper-Pearson interval of a share, `k` wins of `n`: exact coverage of at least `level`.
///
/// # Errors
/// If `n` is 0, `k > n`, or `level` is not in (0, 1).
pub fn clopper_pearson(k: usize, n: usize, level: f64) -> Result<(f64, f64)> {
    check(k, n)?;
    interval(k as f64, n, level)
}

/// One-sided Clopper-Pearson lower bound: `Beta^-1(1 - level; k, n-k+1)`.
///
/// # Errors
/// If `n` is 0, `k > n`, or `level` is not in (0, 1).
pub fn clopper_pearson_lower(k: usize, n: usize, level: f64) -> Result<f64> {
    check(k, n)?;
    check_level(level)?;
    Ok(beta_quantile(1.0 - level, k as f64, n as f64 - k as f64 + 1.0))
}

/// One-sided binomial p-value: probability of `k` or more wins in `n` fair comparisons, `P(X >= k | p = p0)`.
///
/// # Errors
/// If `n` is 0, `k > n`, or `p0` is not in (0, 1).
pub fn binomial_p_value(k: usize, n: usize, p0: f64) -> Result<f64> {
    check(k, n)?;
    if !(p0 > 0.0 && p0 < 1.0) {
        return Err(Error::Parameter { name: "p0", expected: "between 0 and 1", found: p0.to_string() });
    }
    if k == 0 {
        return Ok(1.0);
    }
    Ok(beta_reg(k as f64, (n - k) as f64 + 1.0, p0))
}

/// Posterior probability that the win rate exceeds `threshold`, under a uniform prior:
/// `1 - I_threshold(k + 1, n - k + 1)`.
///
/// # Errors
/// If `n` is 0, `k > n`, or `threshold` is not in (0, 1).
pub fn beta_posterior_above(k: usize, n: usize, threshold: f64) -> Result<f64> {
    check(k, n)?;
    if !(threshold > 0.0 && threshold < 1.0) {
        return Err(Error::Parameter {
            name: "threshold",
            expected: "between 0 and 1",
            found: threshold.to_string(),
        });
    }
    // 1 - I_x(a, b) = I_{1-x}(b, a), without the cancellation.
    Ok(beta_reg((n - k) as f64 + 1.0, k as f64 + 1.0, 1.0 - threshold))
}

fn check(k: usize, n: usize) -> Result<()> {
    if n == 0 {
        return Err(Error::TooFew { what: "comparisons", expected: 1, found: 0 });
    }
    if k > n {
        return Err(Error::Parameter {
            name: "number of wins",
            expected: "at most the number of comparisons",
            found: format!("{k} of {n}"),
        });
    }
    Ok(())
}

fn check_level(level: f64) -> Result<()> {
    if level > 0.0 && level < 1.0 {
        return Ok(());
    }
    Err(Error::Parameter { name: "level", expected: "between 0 and 1", found: level.to_string() })
}

/// With half wins (ties) the same formula at `k + 1/2`, the usual continuous extension.
fn interval(k: f64, n: usize, level: f64) -> Result<(f64, f64)> {
    check_level(level)?;
    let tail = (1.0 - level) / 2.0;
    let n = n as f64;
    let lower = if k == 0.0 { 0.0 } else { beta_quantile(tail, k, n - k + 1.0) };
    let upper = if k == n { 1.0 } else { beta_quantile(1.0 - tail, k + 1.0, n - k) };
    Ok((lower, upper))
}

/// `x` with `I_x(a, b) = p`; bisection down to neighbouring floats. 0 when `a` is 0.
fn beta_quantile(p: f64, a: f64, b: f64) -> f64 {
    if a == 0.0 {
        return 0.0;
    }
    let (mut low, mut high) = (0.0f64, 1.0f64);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        if beta_reg(a, b, middle) < p { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}
