//! The validation: losses at fixed noise levels with fixed noises, with the right caption, another clip's, and none.

use candle_core::{DType, Tensor};
use dragon_diffusion::{Weighting, denoising_errors};
use dragon_nn::Rng;

use super::DitTask;
use crate::error::Result;

/// Noise levels of the validation with the names of their losses, for latents of unit variance. The last entry of a row is the loss with shuffled captions.
const VALID_LEVELS: [(f64, &str, &str); 6] = [
    (0.1, "loss_sigma_0.1", "loss_other_text_sigma_0.1"),
    (0.3, "loss_sigma_0.3", "loss_other_text_sigma_0.3"),
    (0.7, "loss_sigma_0.7", "loss_other_text_sigma_0.7"),
    (1.5, "loss_sigma_1.5", "loss_other_text_sigma_1.5"),
    (4.0, "loss_sigma_4", "loss_other_text_sigma_4"),
    (15.0, "loss_sigma_15", "loss_other_text_sigma_15"),
];

impl DitTask {
    /// The losses of all levels and their means, also written to the log.
    pub(super) fn losses(&self) -> Result<Vec<(&'static str, f64)>> {
        let n = self.valid.len();
        let (mut right, mut other, mut none) = (0.0, 0.0, 0.0);
        let mut scalars = Vec::new();
        for (sigma, name, name_other) in VALID_LEVELS {
            let loss = self.valid_loss(sigma, Some)?;
            // Half the set away: clips of one piece stand together.
            let loss_other = self.valid_loss(sigma, |row| Some((row + n / 2) % n))?;
            scalars.extend([(name, loss), (name_other, loss_other)]);
            right += loss;
            other += loss_other;
            none += self.valid_loss(sigma, |_| None)?;
        }
        let levels = VALID_LEVELS.len() as f64;
        let mut all = vec![
            ("loss", right / levels),
            ("loss_other_text", other / levels),
            ("loss_no_text", none / levels),
            // Relative, so that it can be followed while the losses fall.
            ("text_gain", 1.0 - right / other),
        ];
        all.append(&mut scalars);
        let line: Vec<String> = all.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        tracing::info!("validation: {}", line.join("  "));
        Ok(all)
    }

    /// The averaged networks' mean weighted error on the validation clips at one noise level. `text` gives the caption of each clip.
    fn valid_loss(&self, sigma: f64, text: impl Fn(usize) -> Option<usize>) -> Result<f64> {
        let mut total = 0.0;
        let rows: Vec<usize> = (0..self.valid.len()).collect();
        for rows in rows.chunks(self.cfg.train.batch) {
            let x0 = self.valid.batch(rows, &self.device)?;
            let noise: Vec<Tensor> = rows
                .iter()
                .map(|row| {
                    let mut rng = Rng::from_key(&format!("valid/{sigma}/{row}"), 0);
                    rng.normal_tensor((1, self.valid.channels, self.valid.n_frames), DType::F32, &self.device)
                })
                .collect::<candle_core::Result<_>>()?;
            let x = (&x0 + (Tensor::cat(&noise, 0)? * sigma)?)?;
            let captions: Vec<usize> = rows.iter().map(|&row| text(row).unwrap_or(row)).collect();
            let cond = self.averaged.texts(self.valid_captions.batch(&captions, &self.device)?)?;
            let drop: Vec<bool> = rows.iter().map(|&row| text(row).is_none()).collect();
            let context = self.averaged.model.dit.context(&cond, Some(&drop), self.valid.n_frames)?;
            let sigmas = vec![sigma; rows.len()];
            let denoised = self.averaged.model.denoise_with(&x, &sigmas, &context)?;
            let errors = denoising_errors(&self.averaged.model.edm, Weighting::Edm, &denoised, &x0, &sigmas)?;
            total += f64::from(errors.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(total / self.valid.len() as f64)
    }
}
