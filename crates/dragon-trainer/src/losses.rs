//! Losses on demonstrations (paper 3.2, A.1, A.2): pure functions from denoising errors to one value per example.
//!
//! All of them compare the policy with the frozen reference on the same `(x0, sigma, eps, condition dropout)`:
//! `g = e_ref - e_theta`, positive where the policy denoises a demonstration better than the reference. The caller
//! reduces by the mean. Golden test: `losses_match_pytorch`.

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

/// Denoising errors of a batch of demonstrations (paper eq. 7), `e = w(sigma) * mean over C, T of (D(x) - x0)²`.
#[derive(Debug, Clone)]
pub struct Errors {
    /// `e_theta`, `[B]`; carries the gradient.
    pub policy: Tensor,
    /// `e_ref`, `[B]`; no gradient.
    pub reference: Tensor,
}

impl Errors {
    /// `g = e_ref - e_theta`, `[B]`.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn gap(&self) -> Result<Tensor> {
        &self.reference.detach() - &self.policy
    }
}

/// Diffusion-DPO, one value per pair (paper eq. 6): `-ln sigmoid(beta/2 * (g⁺ - g⁻))`, in (0, ∞); ln 2 where policy and
/// reference agree. The factor 1/2 is that of Wallace et al.'s code, to which beta 5000 belongs.
///
/// # Errors
/// If the shapes differ.
pub fn dpo(plus: &Errors, minus: &Errors, beta: f64) -> Result<Tensor> {
    let margin = (plus.gap()? - minus.gap()?)?; // [B]
    softplus(&(margin * (-0.5 * beta))?) // [B]; stable form of -ln sigmoid
}

/// Diffusion-KTO, one value per demonstration (paper eq. 8): `w * (1 - sigmoid(s * beta * (g - Q)))`, in (0, w); w/2
/// where policy and reference agree.
///
/// `signs` holds s: +1 in D+, -1 in D-. `baseline` is Q, from [`kto_baseline`] over the whole batch. `weights` are for
/// s > 0 and s < 0.
///
/// # Errors
/// If the shapes differ.
pub fn kto(errors: &Errors, signs: &Tensor, beta: f64, baseline: f64, weights: (f64, f64)) -> Result<Tensor> {
    let gap = (errors.gap()? - baseline)?; // [B]
    let loss = one_minus_sigmoid(&(gap * signs)?.affine(beta, 0.0)?)?; // [B]
    // w = (w+ + w-)/2 + s (w+ - w-)/2
    let weight = signs.affine(0.5 * (weights.0 - weights.1), 0.5 * (weights.0 + weights.1))?;
    loss * weight
}

/// KTO's reference point Q: the mean of g over the whole batch, not below 0, without gradient (paper A.1).
pub fn kto_baseline(gaps: &[f64]) -> f64 {
    if gaps.is_empty() { 0.0 } else { (gaps.iter().sum::<f64>() / gaps.len() as f64).max(0.0) }
}

/// Reward-weighted loss (paper eq. 9, DPOK's KL-D form): `-(r - r_split) * g`. `advantages` holds `r - r_split`, `[B]`.
///
/// # Errors
/// If the shapes differ.
pub fn reward_weighted(errors: &Errors, advantages: &Tensor) -> Result<Tensor> {
    (errors.gap()? * advantages)?.neg()
}

/// KTO with the sign replaced by the reward's distance from the split (paper eq. 10):
/// `1 - sigmoid((r - r_split) * beta * (g - Q))`. The distributional form (paper eq. 11) is the same function with
/// `±(r(D+) - r(D-))` for the members of D+ and D-.
///
/// # Errors
/// If the shapes differ.
pub fn continuous_kto(errors: &Errors, advantages: &Tensor, beta: f64, baseline: f64) -> Result<Tensor> {
    let gap = (errors.gap()? - baseline)?; // [B]
    one_minus_sigmoid(&(gap * advantages)?.affine(beta, 0.0)?)
}

/// MaPO, one value per pair, without a reference model: `e⁺ - b * ln sigmoid(1000 * (phi⁺ - phi⁻))` with
/// `phi = z / (e^z - 1)`, `z = e_theta / 2` (Hong et al. 2024).
///
/// # Errors
/// If the shapes differ.
pub fn mapo(plus: &Tensor, minus: &Tensor, b: f64) -> Result<Tensor> {
    let margin = ((mapo_phi(plus)? - mapo_phi(minus)?)? * -1000.0)?;
    plus + (softplus(&margin)? * b)?
}

/// `z / (e^z - 1)` with `z = e/2 >= 0`; 1 at 0, where the plain form is 0/0. `e^z - 1` is kept off 0 by its series.
fn mapo_phi(errors: &Tensor) -> Result<Tensor> {
    // z/(e^z - 1) = 1 / (1 + z/2 + z²/6 + z³/24 + …) below 0.1; above, z e^-z / (1 - e^-z). Both branches stay finite.
    let z = (errors * 0.5)?;
    let small = z.lt(0.1)?;
    let z_small = small.where_cond(&z, &z.zeros_like()?)?;
    let series = (((((z_small.affine(1.0 / 720.0, 1.0 / 120.0)? * &z_small)? + 1.0 / 24.0)? * &z_small)?
        + 1.0 / 6.0)?
        * &z_small)?;
    let series = (((series + 0.5)? * &z_small)? + 1.0)?.recip()?;
    let z_large = small.where_cond(&z.ones_like()?, &z)?;
    let decay = z_large.neg()?.exp()?;
    let direct = ((&z_large * &decay)? / decay.affine(-1.0, 1.0)?)?;
    small.where_cond(&series, &direct)
}

/// `ln(1 + e^x)`, finite for every finite x, with the exact derivative `sigmoid(x)` everywhere.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let top = x.detach().relu()?; // max(x, 0), a constant: it cancels in value and gradient
    let sum = ((x - &top)?.exp()? + top.neg()?.exp()?)?;
    top + sum.log()?
}

/// `1 - sigmoid(x) = (1 - tanh(x/2)) / 2`, finite for every x.
fn one_minus_sigmoid(x: &Tensor) -> Result<Tensor> {
    (x * 0.5)?.tanh()?.affine(-0.5, 0.5)
}

/// Which loss fine-tuning uses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LossConfig {
    /// Diffusion-DPO (paper eq. 6); needs paired demonstrations.
    Dpo {
        /// Scale of the gaps; paper 5000.
        beta: f64,
    },
    /// Diffusion-KTO (paper eq. 8).
    Kto {
        /// Scale of the gaps; paper 5000.
        beta: f64,
        /// Weight of D+; paper 1.
        weight_plus: f64,
        /// Weight of D-; paper 1.
        weight_minus: f64,
    },
    /// Reward times gap (paper eq. 9); needs a reward per song.
    RewardWeighted,
    /// KTO with continuous rewards (paper eq. 10); needs a reward per song.
    ContinuousKto {
        /// Scale of reward times gap.
        beta: f64,
    },
    /// KTO scaled by the difference of the sets' rewards (paper eq. 11).
    Distributional {
        /// Scale of reward difference times gap.
        beta: f64,
    },
    /// MaPO, without reference; needs paired demonstrations.
    Mapo {
        /// Weight of the preference term; Hong et al. 0.1.
        b: f64,
    },
}

/// What a loss is told about each example besides its errors.
#[derive(Debug, Clone)]
pub struct Labels {
    /// +1 in D+, -1 in D-.
    pub signs: Vec<f64>,
    /// `r - r_split` per example, or `±(r(D+) - r(D-))` for a reward of a set.
    pub advantages: Vec<f64>,
}

impl LossConfig {
    /// The factor by which the gap of a demonstration of this advantage enters the loss: `|factor * g|` near 1 is where it
    /// learns, much more is where it has learned.
    pub fn factor(&self, advantage: f64) -> f64 {
        match *self {
            LossConfig::RewardWeighted
            | LossConfig::ContinuousKto { .. }
            | LossConfig::Distributional { .. } => advantage * self.beta(),
            LossConfig::Dpo { .. } | LossConfig::Kto { .. } | LossConfig::Mapo { .. } => self.beta(),
        }
    }

    /// The scale of gaps; 1 if the loss has none.
    pub fn beta(&self) -> f64 {
        match *self {
            LossConfig::Dpo { beta }
            | LossConfig::Kto { beta, .. }
            | LossConfig::ContinuousKto { beta }
            | LossConfig::Distributional { beta } => beta,
            LossConfig::RewardWeighted | LossConfig::Mapo { .. } => 1.0,
        }
    }

    /// Whether rows must come as pairs, D+ member then D- member.
    pub fn needs_pairs(&self) -> bool {
        matches!(self, LossConfig::Dpo { .. } | LossConfig::Mapo { .. })
    }

    /// Whether the loss has the batch-wide reference point Q.
    pub fn needs_baseline(&self) -> bool {
        matches!(
            self,
            LossConfig::Kto { .. } | LossConfig::ContinuousKto { .. } | LossConfig::Distributional { .. }
        )
    }

    /// Whether the loss needs a reward for each song, which a reward of a set does not give.
    pub fn needs_song_rewards(&self) -> bool {
        matches!(self, LossConfig::RewardWeighted | LossConfig::ContinuousKto { .. })
    }

    /// The loss of a batch: its sum over examples (over pairs where the loss is of pairs) divided by `count`, which is
    /// the number of examples (pairs) of the whole step, so that micro-batches add up.
    ///
    /// # Shapes
    /// - `errors`: `[B]`; with [`LossConfig::needs_pairs`] rows 2i and 2i+1 are the D+ and D- member of pair i; returns a scalar.
    ///
    /// # Errors
    /// If a length differs, or rows do not come in pairs where they must.
    pub fn evaluate(&self, errors: &Errors, labels: &Labels, baseline: f64, count: usize) -> Result<Tensor> {
        let rows = errors.policy.dims1()?;
        if labels.signs.len() != rows || labels.advantages.len() != rows {
            bail!(
                "{rows} errors, but {} signs and {} advantages",
                labels.signs.len(),
                labels.advantages.len()
            )
        }
        let tensor = |v: &[f64]| Tensor::new(v, errors.policy.device())?.to_dtype(errors.policy.dtype());
        let values = match *self {
            LossConfig::Dpo { beta } => {
                let (plus, minus) = pairs(errors)?;
                dpo(&plus, &minus, beta)?
            }
            LossConfig::Mapo { b } => {
                let (plus, minus) = pairs(errors)?;
                mapo(&plus.policy, &minus.policy, b)?
            }
            LossConfig::Kto { beta, weight_plus, weight_minus } => {
                kto(errors, &tensor(&labels.signs)?, beta, baseline, (weight_plus, weight_minus))?
            }
            LossConfig::RewardWeighted => reward_weighted(errors, &tensor(&labels.advantages)?)?,
            LossConfig::ContinuousKto { beta } | LossConfig::Distributional { beta } => {
                continuous_kto(errors, &tensor(&labels.advantages)?, beta, baseline)?
            }
        };
        values.sum_all()? / count.max(1) as f64
    }
}

/// Splits rows `+ - + - …` into the errors of D+ and of D-.
fn pairs(errors: &Errors) -> Result<(Errors, Errors)> {
    let rows = errors.policy.dims1()?;
    if !rows.is_multiple_of(2) {
        bail!("a loss of pairs needs an even number of rows, found {rows}")
    }
    let side = |t: &Tensor, i: usize| t.reshape((rows / 2, 2))?.narrow(1, i, 1)?.squeeze(1);
    let both = |i| -> Result<Errors> {
        Ok(Errors { policy: side(&errors.policy, i)?, reference: side(&errors.reference, i)? })
    };
    Ok((both(0)?, both(1)?))
}

#[cfg(test)]
mod tests {
    use std::f64::consts::LN_2;

    use candle_core::{DType, Device, Var};
    use dragon_diffusion::{Edm, Weighting, denoising_errors};
    use dragon_testkit::Golden;

    use super::*;

    fn t(values: &[f64]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn errors(policy: &[f64], reference: &[f64]) -> Errors {
        Errors { policy: t(policy), reference: t(reference) }
    }

    fn all_configs(beta: f64) -> Vec<LossConfig> {
        vec![
            LossConfig::Dpo { beta },
            LossConfig::Kto { beta, weight_plus: 1.0, weight_minus: 1.0 },
            LossConfig::RewardWeighted,
            LossConfig::ContinuousKto { beta },
            LossConfig::Distributional { beta },
            LossConfig::Mapo { b: 0.1 },
        ]
    }

    #[test]
    fn equal_models_start_at_ln_2_and_one_half() {
        let e = errors(&[0.3, 0.7, 0.1, 0.9], &[0.3, 0.7, 0.1, 0.9]);
        let labels = Labels { signs: vec![1.0, -1.0, 1.0, -1.0], advantages: vec![0.2, -0.2, 3.0, -3.0] };
        let value =
            |cfg: LossConfig, n| cfg.evaluate(&e, &labels, 0.0, n).unwrap().to_scalar::<f64>().unwrap();
        assert!((value(LossConfig::Dpo { beta: 5000.0 }, 2) - LN_2).abs() < 1e-15);
        assert_eq!(value(LossConfig::Kto { beta: 5000.0, weight_plus: 1.0, weight_minus: 1.0 }, 4), 0.5);
        assert_eq!(value(LossConfig::ContinuousKto { beta: 5000.0 }, 4), 0.5);
        assert_eq!(value(LossConfig::RewardWeighted, 4), 0.0);
    }

    #[test]
    fn losses_fall_where_the_policy_is_better_on_d_plus_and_worse_on_d_minus() {
        // g = +0.1 on D+, -0.1 on D-: every loss with a reference lies below its start.
        let good = errors(&[0.2, 0.6], &[0.3, 0.5]);
        let bad = errors(&[0.4, 0.4], &[0.3, 0.5]);
        let labels = Labels { signs: vec![1.0, -1.0], advantages: vec![1.0, -1.0] };
        for cfg in all_configs(10.0) {
            let value = |e: &Errors| cfg.evaluate(e, &labels, 0.0, 2).unwrap().to_scalar::<f64>().unwrap();
            assert!(value(&good) < value(&bad), "{cfg:?}");
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let reference = [0.31, 0.52, 0.24, 0.8, 0.05, 0.33];
        let policy = [0.3, 0.55, 0.2, 0.9, 0.31, 0.33];
        let labels = Labels {
            signs: vec![1.0, -1.0, 1.0, -1.0, 1.0, -1.0],
            advantages: vec![0.4, -0.2, 1.5, -0.1, 0.3, -0.9],
        };
        for cfg in all_configs(3.0) {
            let value = |p: &[f64]| {
                cfg.evaluate(&errors(p, &reference), &labels, 0.013, 6).unwrap().to_scalar::<f64>().unwrap()
            };
            let var = Var::from_tensor(&t(&policy)).unwrap();
            let e = Errors { policy: var.as_tensor().clone(), reference: t(&reference) };
            let grads = cfg.evaluate(&e, &labels, 0.013, 6).unwrap().backward().unwrap();
            let got = grads.get(&var).unwrap().to_vec1::<f64>().unwrap();
            for i in 0..policy.len() {
                let (mut up, mut down) = (policy, policy);
                up[i] += 1e-6;
                down[i] -= 1e-6;
                let want = (value(&up) - value(&down)) / 2e-6;
                assert!(
                    (got[i] - want).abs() < 1e-6 * (1.0 + want.abs()),
                    "{cfg:?} {i}: {} and {want}",
                    got[i]
                );
            }
        }
    }

    #[test]
    fn values_and_gradients_are_finite_at_extremes() {
        for dtype in [DType::F32, DType::F64] {
            for (policy, reference) in [(1e4, 0.0), (0.0, 1e4), (1e-30, 0.0), (0.0, 0.0), (80.0, 80.0)] {
                for cfg in all_configs(5000.0) {
                    let labels = Labels { signs: vec![1.0, -1.0], advantages: vec![100.0, -100.0] };
                    let var = Var::from_tensor(&t(&[policy, reference]).to_dtype(dtype).unwrap()).unwrap();
                    let reference = t(&[reference, policy]).to_dtype(dtype).unwrap();
                    let loss = cfg
                        .evaluate(&Errors { policy: var.as_tensor().clone(), reference }, &labels, 0.0, 2)
                        .unwrap();
                    let value = loss.to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap();
                    let grad = loss.backward().unwrap().get(&var).unwrap().to_dtype(DType::F64).unwrap();
                    assert!(value.is_finite(), "{cfg:?} {policy}: {value}");
                    assert!(
                        grad.to_vec1::<f64>().unwrap().iter().all(|g| g.is_finite()),
                        "{cfg:?} {policy}: {grad}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_kto_baseline_is_never_negative() {
        assert_eq!(kto_baseline(&[0.5, -0.1]), 0.2);
        assert_eq!(kto_baseline(&[-0.5, 0.1]), 0.0);
        assert_eq!(kto_baseline(&[]), 0.0);
    }

    #[test]
    fn micro_batches_add_up_to_the_whole_batch() {
        let (policy, reference) = ([0.3, 0.5, 0.2, 0.9], [0.31, 0.52, 0.24, 0.8]);
        let labels = Labels { signs: vec![1.0, -1.0, 1.0, -1.0], advantages: vec![0.4, -0.2, 1.5, -0.1] };
        for cfg in all_configs(3.0) {
            let count = if cfg.needs_pairs() { 2 } else { 4 };
            let whole = cfg.evaluate(&errors(&policy, &reference), &labels, 0.01, count).unwrap();
            let part = |r: std::ops::Range<usize>| {
                let labels = Labels {
                    signs: labels.signs[r.clone()].to_vec(),
                    advantages: labels.advantages[r.clone()].to_vec(),
                };
                let e = errors(&policy[r.clone()], &reference[r]);
                cfg.evaluate(&e, &labels, 0.01, count).unwrap().to_scalar::<f64>().unwrap()
            };
            let sum = part(0..2) + part(2..4);
            assert!((whole.to_scalar::<f64>().unwrap() - sum).abs() < 1e-12, "{cfg:?}");
        }
    }

    #[test]
    fn losses_match_pytorch() {
        let case = Golden::fixture("dragon-trainer/losses/case.safetensors");
        let var = Var::from_tensor(&case.get("policy")).unwrap();
        let e = Errors { policy: var.as_tensor().clone(), reference: case.get("reference") };
        let vec = |name: &str| case.get(name).to_vec1::<f64>().unwrap();
        let labels = Labels { signs: vec("signs"), advantages: vec("advantages") };
        let gaps = e.gap().unwrap().to_vec1::<f64>().unwrap();
        let baseline = kto_baseline(&gaps);
        assert!((baseline - vec("baseline")[0]).abs() < 1e-12);
        let rows = gaps.len();
        let cases = [
            ("dpo", LossConfig::Dpo { beta: 20.0 }, rows / 2),
            ("kto", LossConfig::Kto { beta: 20.0, weight_plus: 1.5, weight_minus: 0.5 }, rows),
            ("reward_weighted", LossConfig::RewardWeighted, rows),
            ("continuous_kto", LossConfig::ContinuousKto { beta: 20.0 }, rows),
            ("mapo", LossConfig::Mapo { b: 0.1 }, rows / 2),
        ];
        for (name, cfg, count) in cases {
            let loss = cfg.evaluate(&e, &labels, baseline, count).unwrap();
            let want = vec(name)[0];
            let got = loss.to_scalar::<f64>().unwrap();
            assert!((got - want).abs() < 1e-10 * (1.0 + want.abs()), "{name}: {got} and {want}");
            let grad = loss.backward().unwrap().get(&var).unwrap().to_vec1::<f64>().unwrap();
            for (i, (g, w)) in grad.iter().zip(vec(&format!("{name}.grad"))).enumerate() {
                assert!((g - w).abs() < 1e-9 * (1.0 + w.abs()), "{name} gradient {i}: {g} and {w}");
            }
        }
        let sigmas = vec("sigmas");
        let edm = Edm { sigma_data: 0.5, ..Edm::default() };
        let weighted =
            denoising_errors(&edm, Weighting::Edm, &case.get("denoised"), &case.get("x0"), &sigmas).unwrap();
        for (g, w) in weighted.to_vec1::<f32>().unwrap().iter().zip(vec("edm_errors")) {
            assert!((*g as f64 - w).abs() < 1e-5 * (1.0 + w), "{g} and {w}");
        }
    }
}
