//! The learning rate over the steps of a training.

use serde::{Deserialize, Serialize};

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays.
    #[default]
    Constant,
    /// Falls along half a cosine to a tenth at the last step.
    Cosine,
}

impl Schedule {
    /// The part of the learning rate that holds at `step` (from 0) of `steps`: it rises evenly over the first `warmup_steps`.
    pub fn factor(self, step: usize, warmup_steps: usize, steps: usize) -> f64 {
        let warmup = ((step + 1) as f64 / warmup_steps.max(1) as f64).min(1.0);
        let rest = match self {
            Schedule::Constant => 1.0,
            Schedule::Cosine => {
                let done = step.saturating_sub(warmup_steps) as f64;
                let all = steps.saturating_sub(warmup_steps).max(1) as f64;
                0.55 + 0.45 * (std::f64::consts::PI * (done / all).min(1.0)).cos()
            }
        };
        warmup * rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_evenly_and_falls_to_a_tenth() {
        let at = |step: usize| Schedule::Cosine.factor(step, 10, 110);
        assert!((at(0) - 0.1).abs() < 1e-12 && (at(9) - 1.0).abs() < 1e-12);
        assert!((at(60) - 0.55).abs() < 1e-12 && (at(110) - 0.1).abs() < 1e-12);
        assert!((10..110).all(|step| at(step + 1) < at(step)));
        assert_eq!(at(500), at(110), "never below a tenth");
        assert_eq!(Schedule::Constant.factor(50, 10, 110), 1.0);
        assert_eq!(Schedule::Constant.factor(0, 0, 0), 1.0);
    }
}
