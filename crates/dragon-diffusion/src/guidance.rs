//! What a solver sees of a model ([`Denoiser`]), and guidance: CFG (Ho and Salimans 2022, arXiv:2207.12598) and
//! CFG++ (Chung et al. 2024, arXiv:2406.08070), each inside an interval of noise levels.

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

/// Two estimates of the clean latents at one point of a sampling run.
#[derive(Debug, Clone)]
pub struct Estimate {
    /// `G`: where the run is heading.
    pub denoised: Tensor,
    /// `U`: the estimate from which the remaining noise, `(x - U) / sigma`, is computed. Differs from
    /// `denoised` under CFG++ only.
    pub anchor: Option<Tensor>,
    /// Whether guidance was on. A multistep solver starts afresh where this changes: the path it follows has a kink there.
    pub guided: bool,
}

impl Estimate {
    /// `U`, which is `G` unless the two differ.
    pub fn anchor(&self) -> &Tensor {
        self.anchor.as_ref().unwrap_or(&self.denoised)
    }

    /// `G - U`, the shift that CFG++ adds to a step; `None` where it is zero.
    pub fn shift(&self) -> Result<Option<Tensor>> {
        self.anchor.as_ref().map(|anchor| &self.denoised - anchor).transpose()
    }
}

/// An estimate of the clean latents, given noisy ones.
pub trait Denoiser {
    /// `D(x; sigma)`, an estimate of `x0` in `x = x0 + sigma * n`.
    ///
    /// # Shapes
    /// - `x`: `[B, C, T]`, returns the same; `sigma` above 0.
    fn denoise(&self, x: &Tensor, sigma: f64) -> Result<Tensor>;

    /// The two estimates of guided sampling; without guidance both are [`Self::denoise`].
    fn estimate(&self, x: &Tensor, sigma: f64) -> Result<Estimate> {
        Ok(Estimate { denoised: self.denoise(x, sigma)?, anchor: None, guided: false })
    }
}

/// A denoiser with a condition that can be left out.
pub trait ConditionalDenoiser {
    /// `C = D(x; sigma, c)`. Shapes as in [`Denoiser::denoise`].
    fn conditional(&self, x: &Tensor, sigma: f64) -> Result<Tensor>;

    /// `U = D(x; sigma, empty)`.
    fn unconditional(&self, x: &Tensor, sigma: f64) -> Result<Tensor>;

    /// `(C, U)`; a model may compute them in one call.
    fn both(&self, x: &Tensor, sigma: f64) -> Result<(Tensor, Tensor)> {
        Ok((self.conditional(x, sigma)?, self.unconditional(x, sigma)?))
    }
}

/// The kind of guidance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuidanceKind {
    /// The conditional estimate alone.
    None,
    /// `G = U + scale * (C - U)`, also for the direction of the noise.
    Cfg,
    /// `G = U + scale * (C - U)` with scale in [0, 1]; the remaining noise is that of `U`.
    CfgPlusPlus,
}

/// Guidance of a sampling run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guidance {
    /// Which formula.
    pub kind: GuidanceKind,
    /// CFG: 1 is off, above 1 strengthens the condition. CFG++: in [0, 1]; a step from `sigma` to `sigma_next` is one of
    /// CFG with `scale / (1 - sigma_next / sigma)`, so fewer steps want a larger scale. Not used by `none`.
    pub scale: f64,
    /// Guidance is on for `sigma_lo <= sigma <= sigma_hi`; outside, the conditional estimate is used alone, which saves
    /// the second network call.
    pub sigma_lo: f64,
    /// See `sigma_lo`.
    pub sigma_hi: f64,
}

impl Guidance {
    /// The conditional estimate alone.
    pub fn none() -> Self {
        Self { kind: GuidanceKind::None, scale: 1.0, sigma_lo: 0.0, sigma_hi: f64::MAX }
    }

    /// Classifier-free guidance at every noise level.
    pub fn cfg(scale: f64) -> Self {
        Self { kind: GuidanceKind::Cfg, scale, ..Self::none() }
    }

    /// CFG++ at every noise level; `scale` in [0, 1].
    pub fn cfg_plus_plus(scale: f64) -> Self {
        Self { kind: GuidanceKind::CfgPlusPlus, scale, ..Self::none() }
    }

    /// The same guidance, on only for `lo <= sigma <= hi`.
    pub fn within(self, lo: f64, hi: f64) -> Self {
        Self { sigma_lo: lo, sigma_hi: hi, ..self }
    }

    /// Whether the unconditional estimate is needed at `sigma`.
    pub fn is_on(&self, sigma: f64) -> bool {
        self.kind != GuidanceKind::None && self.sigma_lo <= sigma && sigma <= self.sigma_hi
    }

    /// Says what is wrong with the settings, if anything.
    ///
    /// # Errors
    /// If the scale is outside the range of its kind, or the interval is empty.
    pub fn check(&self) -> Result<()> {
        match self.kind {
            GuidanceKind::CfgPlusPlus if !(0.0..=1.0).contains(&self.scale) => {
                bail!("CFG++ takes a `scale` in [0, 1], found {}", self.scale)
            }
            GuidanceKind::Cfg if !(self.scale.is_finite() && self.scale >= 0.0) => {
                bail!("CFG takes a `scale` of at least 0, found {}", self.scale)
            }
            _ => {}
        }
        if self.sigma_lo.is_nan() || self.sigma_hi.is_nan() || self.sigma_lo > self.sigma_hi {
            bail!("guidance needs `sigma_lo` <= `sigma_hi`, found {} and {}", self.sigma_lo, self.sigma_hi);
        }
        Ok(())
    }
}

/// A [`ConditionalDenoiser`] under [`Guidance`], as a [`Denoiser`].
pub struct Guided<'a, M: ?Sized> {
    /// The model.
    pub model: &'a M,
    /// Its guidance.
    pub guidance: Guidance,
}

impl<M: ConditionalDenoiser + ?Sized> Denoiser for Guided<'_, M> {
    fn denoise(&self, x: &Tensor, sigma: f64) -> Result<Tensor> {
        Ok(self.estimate(x, sigma)?.denoised)
    }

    fn estimate(&self, x: &Tensor, sigma: f64) -> Result<Estimate> {
        if !self.guidance.is_on(sigma) {
            return Ok(Estimate { denoised: self.model.conditional(x, sigma)?, anchor: None, guided: false });
        }
        let (cond, uncond) = self.model.both(x, sigma)?;
        let denoised = (&uncond + ((cond - &uncond)? * self.guidance.scale)?)?;
        let anchor = (self.guidance.kind == GuidanceKind::CfgPlusPlus).then_some(uncond);
        Ok(Estimate { denoised, anchor, guided: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_refused() {
        assert!(Guidance::cfg_plus_plus(0.6).check().is_ok() && Guidance::cfg(7.5).check().is_ok());
        let message = Guidance::cfg_plus_plus(7.5).check().unwrap_err().to_string();
        assert!(message.contains("[0, 1]") && message.contains("7.5"), "{message}");
        assert!(Guidance::cfg(f64::NAN).check().is_err());
        assert!(Guidance::cfg(2.0).within(3.0, 1.0).check().is_err());
        assert!(Guidance::cfg(2.0).within(f64::NAN, 1.0).check().is_err());
    }

    #[test]
    fn settings_round_trip_through_json() {
        let guidance = Guidance::cfg_plus_plus(0.6).within(0.1, 10.0);
        let text = serde_json::to_string(&guidance).unwrap();
        assert!(text.contains("cfg_plus_plus"), "{text}");
        assert_eq!(serde_json::from_str::<Guidance>(&text).unwrap(), guidance);
    }
}
