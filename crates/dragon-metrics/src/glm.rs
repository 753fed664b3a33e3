//! Binomial regression with logit link on grouped counts, with standard errors clustered by rater.
//!
//! Model: `k_i ~ Binomial(n_i, p_i)`, `ln(p_i/(1 - p_i)) = x_i · b`, fitted by Newton's method (which is iteratively
//! reweighted least squares for this link). Raters answer several questions each, so that answers are not independent:
//! the cluster-robust ("sandwich") covariance (Liang and Zeger 1986) sums the scores within a rater first,
//! `A⁻¹ (Σ_g s_g s_gᵀ) A⁻¹ · G/(G-1) · (N-1)/(N-p)`, `A` the information, as statsmodels does with
//! `cov_type="cluster"`.

use std::collections::BTreeMap;

use nalgebra::{DMatrix, DVector};
use serde::{Deserialize, Serialize};
use statrs::function::erf::{erfc, erfc_inv};
use statrs::function::gamma::ln_gamma;

use crate::{Error, Result, Rows};

/// Newton steps before giving up; a separable problem never converges.
const MAX_STEPS: usize = 100;
/// Converged when no coefficient moves by more than this.
const STEP_TOLERANCE: f64 = 1e-12;

/// One coefficient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Coefficient {
    /// Estimate, in log-odds.
    pub estimate: f64,
    /// Standard error, clustered.
    pub std_error: f64,
    /// Standard error if all answers were independent.
    pub std_error_independent: f64,
    /// `estimate/std_error`.
    pub z: f64,
    /// Two-sided p-value of `estimate = 0`, from the normal distribution.
    pub p_value: f64,
    /// 95 % interval, `estimate ± 1.96 std_error`.
    pub interval_95: (f64, f64),
}

/// A fitted binomial regression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BinomialGlm {
    /// One per column of the design.
    pub coefficients: Vec<Coefficient>,
    /// Clustered covariance of the estimates, `[p, p]`, row-major.
    pub cov: Vec<f64>,
    /// Log-likelihood, with the binomial coefficients.
    pub log_likelihood: f64,
    /// Twice the log-likelihood that is missing to a perfect fit.
    pub deviance: f64,
    /// Number of clusters (raters).
    pub n_clusters: usize,
    /// Newton steps taken.
    pub n_steps: usize,
}

impl BinomialGlm {
    /// Fits `wins[i]` of `trials[i]` on the row `design[i]` `[p]` (include a column of ones for an intercept).
    ///
    /// `clusters[i]` is any label of the rater.
    ///
    /// # Errors
    /// If lengths differ, a group has more wins than trials, there are not more groups than columns, fewer than two
    /// clusters, columns depend on each other, or the fit does not converge (all answers alike in some direction:
    /// the odds are infinite, use [`crate::clopper_pearson`]).
    pub fn fit(design: &Rows, wins: &[usize], trials: &[usize], clusters: &[usize]) -> Result<Self> {
        let (n, p) = (design.n(), design.dim());
        for (what, found) in
            [("wins", wins.len()), ("trials", trials.len()), ("cluster labels", clusters.len())]
        {
            if found != n {
                return Err(Error::Dimension { what, expected: n, found });
            }
        }
        if let Some(i) = (0..n).find(|&i| wins[i] > trials[i]) {
            let found = format!("{} of {}", wins[i], trials[i]);
            let wrong =
                Error::Parameter { name: "number of wins", expected: "at most the number of trials", found };
            return Err(wrong.within(format!("row {i}")));
        }
        if n <= p {
            return Err(Error::TooFew {
                what: "groups of answers (more than coefficients)",
                expected: p + 1,
                found: n,
            });
        }
        let mut labels = clusters.to_vec();
        labels.sort_unstable();
        labels.dedup();
        if labels.len() < 2 {
            return Err(Error::TooFew { what: "clusters (raters)", expected: 2, found: labels.len() });
        }
        let x = DMatrix::from_row_slice(n, p, design.data());
        let count = |c: &[usize]| DVector::from_iterator(n, c.iter().map(|&c| c as f64));
        let (k, m) = (count(wins), count(trials));
        let information = |mu: &DVector<f64>| {
            let w = DVector::from_fn(n, |i, _| m[i] * mu[i] * (1.0 - mu[i]));
            x.transpose() * DMatrix::from_fn(n, p, |i, j| w[i] * x[(i, j)])
        };
        let mut beta = DVector::<f64>::zeros(p);
        for n_steps in 1..=MAX_STEPS {
            let mu = (&x * &beta).map(|eta| 1.0 / (1.0 + (-eta).exp()));
            let score = x.transpose() * (&k - m.component_mul(&mu));
            let Some(factor) = information(&mu).cholesky() else {
                break;
            };
            let step = factor.solve(&score);
            beta += &step;
            if !beta.iter().all(|b| b.is_finite()) {
                break;
            }
            if step.amax() <= STEP_TOLERANCE * (1.0 + beta.amax()) {
                let mu = (&x * &beta).map(|eta| 1.0 / (1.0 + (-eta).exp()));
                return Ok(finish(&x, &k, &m, clusters, &beta, &mu, factor.inverse(), n_steps));
            }
        }
        Err(Error::Parameter {
            name: "binomial regression",
            expected: "independent columns, and wins and losses in every direction of the design",
            found: "no finite maximum of the likelihood".into(),
        })
    }
}

/// Log-odds that the first system wins, clustered by rater: the intercept-only regression of a listening test.
///
/// # Errors
/// As [`BinomialGlm::fit`].
pub fn win_log_odds(wins: &[usize], trials: &[usize], raters: &[usize]) -> Result<BinomialGlm> {
    BinomialGlm::fit(&Rows::new(wins.len(), 1, vec![1.0; wins.len()])?, wins, trials, raters)
}

#[allow(clippy::too_many_arguments)] // the one caller has just made them
fn finish(
    x: &DMatrix<f64>,
    k: &DVector<f64>,
    m: &DVector<f64>,
    clusters: &[usize],
    beta: &DVector<f64>,
    mu: &DVector<f64>,
    bread: DMatrix<f64>,
    n_steps: usize,
) -> BinomialGlm {
    let (n, p) = x.shape();
    let mut scores: BTreeMap<usize, DVector<f64>> = BTreeMap::new();
    for i in 0..n {
        let score = scores.entry(clusters[i]).or_insert_with(|| DVector::zeros(p));
        *score += x.row(i).transpose() * (k[i] - m[i] * mu[i]);
    }
    let meat = scores.values().fold(DMatrix::zeros(p, p), |sum, s| sum + s * s.transpose());
    let groups = scores.len() as f64;
    let correction = groups / (groups - 1.0) * (n as f64 - 1.0) / (n as f64 - p as f64);
    let cov = &bread * meat * &bread * correction;
    let z_95 = std::f64::consts::SQRT_2 * erfc_inv(0.05);
    let coefficients = (0..p)
        .map(|j| {
            let (estimate, std_error) = (beta[j], cov[(j, j)].max(0.0).sqrt());
            let z = estimate / std_error;
            Coefficient {
                estimate,
                std_error,
                std_error_independent: bread[(j, j)].sqrt(),
                z,
                p_value: erfc(z.abs() / std::f64::consts::SQRT_2),
                interval_95: (estimate - z_95 * std_error, estimate + z_95 * std_error),
            }
        })
        .collect();
    // 0 ln 0 = 0.
    let part = |count: f64, share: f64| if count > 0.0 { count * share.ln() } else { 0.0 };
    let (mut log_likelihood, mut deviance) = (0.0, 0.0);
    for i in 0..n {
        let (k, m) = (k[i], m[i]);
        let fitted = part(k, mu[i]) + part(m - k, 1.0 - mu[i]);
        log_likelihood += ln_gamma(m + 1.0) - ln_gamma(k + 1.0) - ln_gamma(m - k + 1.0) + fitted;
        deviance += 2.0 * (part(k, k / m) + part(m - k, 1.0 - k / m) - fitted);
    }
    let cov = cov.transpose().as_slice().to_vec();
    BinomialGlm { coefficients, cov, log_likelihood, deviance, n_clusters: scores.len(), n_steps }
}
