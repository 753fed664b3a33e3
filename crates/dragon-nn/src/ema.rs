//! Exponential moving average of parameters.

use crate::Params;
use candle_core::{DType, Result};

/// Shadow parameters that follow the trained ones: `shadow = decay · shadow + (1 - decay) · value` at each update.
pub struct Ema {
    decay: f64,
    shadow: Params,
}

impl Ema {
    /// Starts from a copy of `params`; `decay` in [0, 1), near 1.
    ///
    /// # Errors
    /// If `decay` is outside [0, 1] or a copy fails.
    pub fn new(params: &Params, decay: f64) -> Result<Ema> {
        if !(0.0..=1.0).contains(&decay) {
            candle_core::bail!("ema: decay must lie in [0, 1], got {decay}")
        }
        Ok(Ema { decay, shadow: params.deep_clone()? })
    }

    /// Moves the shadow towards `params` by one step.
    ///
    /// # Errors
    /// If the names or shapes of `params` changed.
    pub fn update(&self, params: &Params) -> Result<()> {
        let (shadow, values) = (self.shadow.names_and_vars(), params.names_and_vars());
        if shadow.len() != values.len() || shadow.iter().zip(&values).any(|(a, b)| a.0 != b.0) {
            candle_core::bail!("ema: the parameters have other names than at the start")
        }
        for ((_, shadow), (_, value)) in shadow.iter().zip(&values) {
            if crate::adamw::cpu::supported(shadow) && value.dtype() == DType::F32 {
                crate::adamw::cpu::lerp(shadow, &value.as_tensor().detach(), self.decay)?;
            } else {
                let old = shadow.as_tensor().detach();
                shadow.set(&((old * self.decay)? + (value.as_tensor().detach() * (1.0 - self.decay))?)?)?;
            }
        }
        Ok(())
    }

    /// The averaged parameters (shared, not copied): for evaluation, saving and restoring.
    pub fn shadow(&self) -> &Params {
        &self.shadow
    }

    /// The decay.
    pub fn decay(&self) -> f64 {
        self.decay
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    #[test]
    fn the_shadow_follows_with_its_decay() {
        let params = Params::new(0);
        params.builder(DType::F32, &Device::Cpu).get(3, "w").unwrap();
        let ema = Ema::new(&params, 0.75).unwrap();
        params.get("w").unwrap().set(&Tensor::new(&[4f32, 8.0, -4.0], &Device::Cpu).unwrap()).unwrap();
        ema.update(&params).unwrap();
        ema.update(&params).unwrap();
        let shadow: Vec<f32> = ema.shadow().get("w").unwrap().as_tensor().to_vec1().unwrap();
        assert_eq!(shadow, [1.75, 3.5, -1.75]);
    }
}
