//! AdamW with clipping by the global norm.

pub(crate) mod cpu;

use crate::Params;
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use std::collections::BTreeMap;

/// Settings of [`AdamW`].
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamWConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, applied to every parameter.
    pub weight_decay: f64,
    /// Gradients are scaled down so that their joint norm is at most this; `None` leaves them.
    pub max_grad_norm: Option<f64>,
}

impl Default for AdamWConfig {
    /// PyTorch's defaults, without clipping.
    fn default() -> Self {
        AdamWConfig { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, max_grad_norm: None }
    }
}

/// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), step for step as `torch.optim.AdamW` after
/// `torch.nn.utils.clip_grad_norm_`.
pub struct AdamW {
    slots: Vec<Slot>,
    config: AdamWConfig,
}

struct Slot {
    name: String,
    var: Var,
    exp_avg: Var,
    exp_avg_sq: Var,
    /// Updates this variable has had; it counts alone, since a step skips variables without a gradient.
    n_steps: u64,
}

/// Factors of one update of one variable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Update {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// `1 - lr · weight_decay`.
    pub keep: f64,
    /// `lr / (1 - beta1^t)`.
    pub step_size: f64,
    /// `sqrt(1 - beta2^t)`.
    pub bias2_sqrt: f64,
    /// Factor of the gradient (clipping).
    pub grad_scale: f64,
}

impl AdamW {
    /// An optimiser of all variables of `params`, with zero moments.
    ///
    /// # Errors
    /// If the moments cannot be allocated.
    pub fn new(params: &Params, config: AdamWConfig) -> Result<AdamW> {
        let mut slots = Vec::new();
        for (name, var) in params.names_and_vars() {
            let zeros = || Var::zeros(var.shape(), var.dtype(), var.device());
            slots.push(Slot { name, exp_avg: zeros()?, exp_avg_sq: zeros()?, var, n_steps: 0 });
        }
        Ok(AdamW { slots, config })
    }

    /// One update with the gradients of a backward pass; returns their global norm before clipping.
    /// Variables without a gradient stay as they are.
    ///
    /// # Errors
    /// If the norm is not finite: nothing has been changed then.
    pub fn step(&mut self, grads: &GradStore) -> Result<f64> {
        let found: Vec<Option<Tensor>> = self
            .slots
            .iter()
            .map(|slot| grads.get(slot.var.as_tensor()).map(|g| g.contiguous()).transpose())
            .collect::<Result<_>>()?;
        let mut total = 0f64;
        for grad in found.iter().flatten() {
            total += sum_of_squares(grad)?;
        }
        let norm = total.sqrt();
        if !norm.is_finite() {
            candle_core::bail!("gradient norm is {norm}; no parameter was changed")
        }
        let cfg = &self.config;
        // The 1e-6 is PyTorch's.
        let grad_scale = cfg.max_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        for (slot, grad) in self.slots.iter_mut().zip(&found) {
            let Some(grad) = grad else { continue };
            slot.n_steps += 1;
            let t = slot.n_steps as f64;
            let update = Update {
                beta1: cfg.beta1,
                beta2: cfg.beta2,
                eps: cfg.eps,
                keep: 1.0 - cfg.lr * cfg.weight_decay,
                step_size: cfg.lr / (1.0 - cfg.beta1.powf(t)),
                bias2_sqrt: (1.0 - cfg.beta2.powf(t)).sqrt(),
                grad_scale,
            };
            if cpu::supported(&slot.var) && cpu::supported(grad) {
                cpu::update(&slot.var, &slot.exp_avg, &slot.exp_avg_sq, grad, update)?;
            } else {
                plain_update(slot, grad, update)?;
            }
        }
        Ok(norm)
    }

    /// Changes the learning rate of the next steps.
    pub fn set_lr(&mut self, lr: f64) {
        self.config.lr = lr;
    }

    /// The learning rate of the next step.
    pub fn lr(&self) -> f64 {
        self.config.lr
    }

    /// Moments and step counts by name (`NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`); copies.
    ///
    /// # Errors
    /// If a copy fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for slot in &self.slots {
            state.insert(format!("{}.exp_avg", slot.name), slot.exp_avg.as_tensor().detach().copy()?);
            state.insert(format!("{}.exp_avg_sq", slot.name), slot.exp_avg_sq.as_tensor().detach().copy()?);
            let steps = Tensor::new(&[slot.n_steps as i64], &candle_core::Device::Cpu)?;
            state.insert(format!("{}.step", slot.name), steps);
        }
        Ok(state)
    }

    /// Restores what [`AdamW::state`] gave.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen; the message has its name.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let get = |name: String| {
            state
                .get(&name)
                .ok_or_else(|| candle_core::Error::Msg(format!("optimiser state: `{name}` is missing")))
        };
        for slot in &mut self.slots {
            for (var, kind) in [(&slot.exp_avg, "exp_avg"), (&slot.exp_avg_sq, "exp_avg_sq")] {
                let value = get(format!("{}.{kind}", slot.name))?;
                if value.dims() != var.dims() {
                    candle_core::bail!(
                        "optimiser state: `{}.{kind}`: expected {:?}, found {:?}",
                        slot.name,
                        var.dims(),
                        value.dims()
                    )
                }
                var.set(&value.to_device(var.device())?.to_dtype(var.dtype())?.contiguous()?)?;
            }
            let steps =
                get(format!("{}.step", slot.name))?.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
            slot.n_steps = *steps.first().unwrap_or(&0) as u64;
        }
        Ok(())
    }
}

fn sum_of_squares(grad: &Tensor) -> Result<f64> {
    if cpu::supported(grad) {
        return cpu::sum_of_squares(grad);
    }
    grad.detach().to_dtype(DType::F32)?.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar()
}

/// The update as candle operations: other devices and dtypes.
fn plain_update(slot: &Slot, grad: &Tensor, u: Update) -> Result<()> {
    let grad = (grad.detach() * u.grad_scale)?;
    let exp_avg = ((slot.exp_avg.as_tensor().detach() * u.beta1)? + (&grad * (1.0 - u.beta1))?)?;
    let exp_avg_sq = ((slot.exp_avg_sq.as_tensor().detach() * u.beta2)? + (grad.sqr()? * (1.0 - u.beta2))?)?;
    let denominator = ((exp_avg_sq.sqrt()? / u.bias2_sqrt)? + u.eps)?;
    let kept = (slot.var.as_tensor().detach() * u.keep)?;
    slot.var.set(&(kept - ((&exp_avg * u.step_size)? / denominator)?)?)?;
    slot.exp_avg.set(&exp_avg)?;
    slot.exp_avg_sq.set(&exp_avg_sq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use dragon_testkit::{Tol, assert_close};

    fn params(values: &[f32], dtype: DType) -> Params {
        let params = Params::new(0);
        params.builder(dtype, &Device::Cpu).get(values.len(), "w").unwrap();
        let t = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        params.get("w").unwrap().set(&t).unwrap();
        params
    }

    fn run(dtype: DType) -> (Tensor, Vec<f64>) {
        let params = params(&[0.5, -1.0, 2.0, 0.1], dtype);
        let config =
            AdamWConfig { lr: 0.1, max_grad_norm: Some(1.0), weight_decay: 0.1, ..Default::default() };
        let mut opt = AdamW::new(&params, config).unwrap();
        let var = params.get("w").unwrap();
        let mut norms = Vec::new();
        for _ in 0..3 {
            let w = var.as_tensor();
            let loss = (w.sqr().unwrap() * w).unwrap().sum_all().unwrap();
            norms.push(opt.step(&loss.backward().unwrap()).unwrap());
        }
        (var.as_tensor().to_dtype(DType::F64).unwrap(), norms)
    }

    #[test]
    fn the_fast_update_equals_the_plain_one() {
        let (w, norms) = run(DType::F64);
        let (fast, fast_norms) = run(DType::F32);
        assert_close(&fast, &w, Tol { atol: 1e-6, rtol: 1e-5 });
        assert!((norms[0] - fast_norms[0]).abs() < 1e-5);
    }

    #[test]
    fn a_bad_gradient_changes_nothing() {
        let params = params(&[0.0, 1.0], DType::F32);
        let mut opt = AdamW::new(&params, AdamWConfig::default()).unwrap();
        let var = params.get("w").unwrap();
        let loss = var.as_tensor().log().unwrap().sum_all().unwrap();
        let message = opt.step(&loss.backward().unwrap()).unwrap_err().to_string();
        assert!(message.contains("gradient norm is inf"), "{message}");
        assert_eq!(var.as_tensor().to_vec1::<f32>().unwrap(), [0.0, 1.0]);
    }

    #[test]
    fn the_state_goes_on_bit_for_bit() {
        let step = |opt: &mut AdamW, params: &Params| {
            let w = params.get("w").unwrap();
            opt.step(&w.as_tensor().sqr().unwrap().sum_all().unwrap().backward().unwrap()).unwrap();
        };
        let a = params(&[0.5, -1.0, 2.0], DType::F32);
        let mut opt = AdamW::new(&a, AdamWConfig::default()).unwrap();
        step(&mut opt, &a);
        let (b, state) = (a.deep_clone().unwrap(), opt.state().unwrap());
        let mut resumed = AdamW::new(&b, AdamWConfig::default()).unwrap();
        resumed.load_state(&state).unwrap();
        for _ in 0..3 {
            step(&mut opt, &a);
            step(&mut resumed, &b);
        }
        let value = |p: &Params| p.get("w").unwrap().as_tensor().to_vec1::<f32>().unwrap();
        assert_eq!(value(&a), value(&b));
    }
}
