//! Hyperparameters of the autoencoder and its presets.

use serde::{Deserialize, Serialize};

/// What is applied to the decoder's last convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// `tanh`, as in DAC: samples lie in (-1, 1).
    Tanh,
    /// Nothing: samples are nominally in [-1, 1], not clipped.
    Linear,
}

/// Whose autoencoder this is, down to the details that widths and strides do not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Design {
    /// DAC's layers (and ours): snake activations with one parameter; the encoder gives the latents' mean and log-variance.
    #[default]
    Dac,
    /// Stable Audio's, "Oobleck": snake activations with two parameters, no bias in the decoder's last convolution; the
    /// encoder gives the latents' mean and deviation, the latter through `softplus(x) + 1e-4`.
    Oobleck,
}

/// Hyperparameters of [`crate::AudioVae`], and the statistics of its latents once it is trained.
///
/// Stages are counted from the audio rate down: stage 0 works at the sample rate. The decoder mirrors the encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Details of the layers; a file without this key means DAC's.
    #[serde(default)]
    pub design: Design,
    /// Samples per second and channel of the audio that the model takes and gives.
    pub sample_rate_hz: u32,
    /// Channels of the audio: 1 is mono.
    pub audio_channels: usize,
    /// Channels of the latents.
    pub latent_dim: usize,
    /// Frames at the rate of the last stage that are laid side by side in the channels of one latent frame; a divisor of
    /// `latent_dim`. DAC and the paper: 1, which a file without this key means too. More keep the diffusion model's sequences
    /// short without widening the strides.
    #[serde(default = "one")]
    pub frames_per_latent: usize,
    /// Downsampling factor of each stage; their product and `frames_per_latent` make [`Config::hop`].
    pub strides: Vec<usize>,
    /// Width of the encoder before each stage, and after the last: one more than `strides`. DAC doubles it at each stage.
    pub encoder_channels: Vec<usize>,
    /// Width of the decoder at the same places, audio rate first: one more than `strides`. DAC doubles it at each stage.
    pub decoder_channels: Vec<usize>,
    /// Residual units of each stage of the encoder, with dilations 1, 3, 9 and so on; DAC has 3 in every stage.
    pub encoder_units: Vec<usize>,
    /// The same for the decoder, audio rate first.
    pub decoder_units: Vec<usize>,
    /// Last operation of the decoder.
    pub output: Output,
    /// Mean of each latent channel over the training data; empty before it is measured.
    pub latent_mean: Vec<f32>,
    /// Standard deviation of each latent channel over the training data; empty before it is measured.
    pub latent_std: Vec<f32>,
}

impl Config {
    /// The paper's autoencoder: 44.1 kHz mono, hop 768 samples (57 latent frames per second), 32 channels (paper Appendix E).
    ///
    /// The paper gives hop and latent size and says "DAC architecture"; widths are DAC's (64 doubling in the encoder,
    /// 1536 halving in the decoder), and the split of 768 into strides is ours.
    pub fn presto() -> Self {
        Self {
            design: Design::Dac,
            sample_rate_hz: 44_100,
            audio_channels: 1,
            latent_dim: 32,
            frames_per_latent: 1,
            strides: vec![2, 6, 8, 8],
            encoder_channels: vec![64, 128, 256, 512, 1024],
            decoder_channels: vec![96, 192, 384, 768, 1536],
            encoder_units: vec![3, 3, 3, 3],
            decoder_units: vec![3, 3, 3, 3],
            output: Output::Tanh,
            latent_mean: Vec::new(),
            latent_std: Vec::new(),
        }
    }

    /// A small model for music, for tests and benchmarks: 16 kHz mono, hop 1024 samples, 32 channels. The shipped one's folder
    /// holds its own config.
    pub fn tiny_music() -> Self {
        Self {
            design: Design::Dac,
            sample_rate_hz: 16_000,
            audio_channels: 1,
            latent_dim: 32,
            frames_per_latent: 1,
            strides: vec![4, 4, 8, 8],
            encoder_channels: vec![16, 32, 64, 128, 256],
            decoder_channels: vec![16, 32, 64, 160, 320],
            // DAC has 3 everywhere; a unit at the audio rate costs the most and sees the least context.
            encoder_units: vec![0, 1, 2, 3],
            decoder_units: vec![1, 2, 3, 3],
            output: Output::Tanh,
            latent_mean: Vec::new(),
            latent_std: Vec::new(),
        }
    }

    /// The autoencoder of Stable Audio Open 1.0: 44.1 kHz stereo, hop 2048 samples (21.5 latent frames per second), 64
    /// channels, 156 M parameters (Evans et al. 2024, arXiv:2407.14358; `model_config.json` of the model).
    pub fn stable_audio_open() -> Self {
        let channels = vec![128, 128, 256, 512, 1024, 2048];
        Self {
            design: Design::Oobleck,
            sample_rate_hz: 44_100,
            audio_channels: 2,
            latent_dim: 64,
            frames_per_latent: 1,
            strides: vec![2, 4, 4, 8, 8],
            encoder_channels: channels.clone(),
            decoder_channels: channels,
            encoder_units: vec![3; 5],
            decoder_units: vec![3; 5],
            output: Output::Linear,
            latent_mean: Vec::new(),
            latent_std: Vec::new(),
        }
    }

    /// The smallest valid model, for tests: hop 8, 4 latent channels.
    pub fn tiny() -> Self {
        Self {
            design: Design::Dac,
            sample_rate_hz: 1_000,
            audio_channels: 1,
            latent_dim: 4,
            frames_per_latent: 1,
            strides: vec![2, 4],
            encoder_channels: vec![4, 8, 16],
            decoder_channels: vec![4, 8, 16],
            encoder_units: vec![3, 3],
            decoder_units: vec![3, 3],
            output: Output::Tanh,
            latent_mean: Vec::new(),
            latent_std: Vec::new(),
        }
    }

    /// Samples per latent frame.
    pub fn hop(&self) -> usize {
        self.strides.iter().product::<usize>() * self.frames_per_latent
    }

    /// Channels of a frame at the rate of the last stage.
    pub fn inner_dim(&self) -> usize {
        self.latent_dim / self.frames_per_latent
    }

    /// Latent frames per second.
    pub fn frame_rate_hz(&self) -> f64 {
        self.sample_rate_hz as f64 / self.hop() as f64
    }

    /// Multiply-adds times two of one encoding and one decoding of a second of audio, convolutions only.
    pub fn flops_per_second(&self) -> f64 {
        let mut rate = f64::from(self.sample_rate_hz);
        let latent = self.inner_dim() as f64;
        let mut flops = 0.0;
        for (stage, &stride) in self.strides.iter().enumerate() {
            let next_rate = rate / stride as f64;
            for (channels, units) in
                [(&self.encoder_channels, &self.encoder_units), (&self.decoder_channels, &self.decoder_units)]
            {
                let (outer, inner, units) =
                    (channels[stage] as f64, channels[stage + 1] as f64, units[stage] as f64);
                flops += 2.0 * units * 8.0 * outer * outer * rate;
                flops += 2.0 * 2.0 * stride as f64 * outer * inner * next_rate;
            }
            rate = next_rate;
        }
        let ends = |channels: &[usize]| (channels[0] as f64, channels[channels.len() - 1] as f64);
        let ((e0, e1), (d0, d1)) = (ends(&self.encoder_channels), ends(&self.decoder_channels));
        flops += 2.0 * 7.0 * (e0 + d0) * self.audio_channels as f64 * f64::from(self.sample_rate_hz);
        flops + 2.0 * (3.0 * e1 * 2.0 * latent + 7.0 * d1 * latent) * rate
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// A message with the field, what it holds and what it should hold.
    pub fn validate(&self) -> Result<(), String> {
        let n = self.strides.len();
        if n == 0 || self.strides.contains(&0) || self.strides.contains(&1) {
            return Err(format!("`strides`: expected factors of at least 2, found {:?}", self.strides));
        }
        for (name, widths) in
            [("encoder_channels", &self.encoder_channels), ("decoder_channels", &self.decoder_channels)]
        {
            if widths.len() != n + 1 || widths.contains(&0) {
                return Err(format!(
                    "`{name}`: expected {} widths above 0, one more than `strides`, found {widths:?}",
                    n + 1
                ));
            }
        }
        for (name, units) in [("encoder_units", &self.encoder_units), ("decoder_units", &self.decoder_units)]
        {
            if units.len() != n {
                return Err(format!(
                    "`{name}`: expected {n} numbers, one for each of `strides`, found {units:?}"
                ));
            }
        }
        for (name, value) in [
            ("sample_rate_hz", self.sample_rate_hz as usize),
            ("audio_channels", self.audio_channels),
            ("latent_dim", self.latent_dim),
        ] {
            if value == 0 {
                return Err(format!("`{name}`: expected at least 1, found 0"));
            }
        }
        if self.frames_per_latent == 0 || !self.latent_dim.is_multiple_of(self.frames_per_latent) {
            return Err(format!(
                "`frames_per_latent`: expected a divisor of `latent_dim`, {}, found {}",
                self.latent_dim, self.frames_per_latent
            ));
        }
        let (n_mean, n_std) = (self.latent_mean.len(), self.latent_std.len());
        if n_mean != n_std || (n_mean != 0 && n_mean != self.latent_dim) {
            return Err(format!(
                "`latent_mean` and `latent_std`: expected both empty or both of {} numbers (`latent_dim`), found {n_mean} and {n_std}",
                self.latent_dim
            ));
        }
        if let Some(bad) = self.latent_std.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return Err(format!("`latent_std`: expected finite numbers above 0, found {bad}"));
        }
        Ok(())
    }
}

fn one() -> usize {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_have_the_stated_hop() {
        for (cfg, hop) in [(Config::presto(), 768), (Config::tiny_music(), 1024), (Config::tiny(), 8)] {
            cfg.validate().unwrap();
            assert_eq!(cfg.hop(), hop);
        }
        assert!((Config::presto().frame_rate_hz() - 57.4).abs() < 0.1);
    }

    #[test]
    fn a_wrong_config_names_the_field() {
        let mut cfg = Config::tiny();
        cfg.encoder_units = vec![3];
        assert!(cfg.validate().unwrap_err().contains("`encoder_units`: expected 2 numbers"));
        let mut cfg = Config::tiny();
        cfg.latent_mean = vec![0.0; 4];
        assert!(cfg.validate().unwrap_err().contains("found 4 and 0"));
    }

    #[test]
    fn frames_are_not_folded_where_a_file_does_not_say_so() {
        let mut json = serde_json::to_value(Config::tiny()).unwrap();
        json.as_object_mut().unwrap().remove("frames_per_latent");
        assert_eq!(serde_json::from_value::<Config>(json).unwrap(), Config::tiny());
        let cfg = Config { frames_per_latent: 3, ..Config::tiny() };
        assert!(cfg.validate().unwrap_err().contains("divisor of `latent_dim`, 4, found 3"));
    }

    #[test]
    fn unknown_keys_are_refused() {
        let mut json = serde_json::to_value(Config::tiny()).unwrap();
        json["hop"] = 8.into();
        assert!(
            serde_json::from_value::<Config>(json).unwrap_err().to_string().contains("unknown field `hop`")
        );
    }
}
