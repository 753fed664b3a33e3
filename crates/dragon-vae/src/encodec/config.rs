//! Hyperparameters of EnCodec, and the published ones.

/// Hyperparameters; the published models differ in nothing else.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Sample rate, Hz.
    pub sample_rate_hz: u32,
    /// 1 or 2.
    pub audio_channels: usize,
    /// Width of the network at the audio's rate; it doubles with each ratio.
    pub n_filters: usize,
    /// Upsampling factors in the decoder's order; their product is [`Config::hop`].
    pub ratios: Vec<usize>,
    /// Channels of the latents.
    pub latent_dim: usize,
    /// Taps of the first convolutions of encoder and decoder.
    pub kernel: usize,
    /// Taps of their last convolutions.
    pub last_kernel: usize,
    /// Taps of a residual unit's first convolution.
    pub residual_kernel: usize,
    /// Residual units of a stage.
    pub residual_units: usize,
    /// Each residual unit's dilation is this times the one's before; the first has 1.
    pub dilation_base: usize,
    /// What a residual unit's inner width is smaller by.
    pub compress: usize,
    /// Whether a residual unit's input is added through a convolution of one tap.
    pub conv_shortcut: bool,
    /// Layers of each LSTM.
    pub lstm_layers: usize,
    /// Whether convolutions see nothing of what comes after; else they see as much as of what was before.
    pub causal: bool,
    /// How convolutions are normalised.
    pub norm: Norm,
    /// Vectors in a codebook.
    pub codebook_size: usize,
    /// Codebooks, one for what the ones before leave.
    pub n_codebooks: usize,
    /// Seconds of audio that the model takes at a time; none: any length.
    pub segment_s: Option<f64>,
}

/// How convolutions are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// The weight is split into length and direction.
    Weight,
    /// The output is normalised over time and channels.
    TimeGroup,
}

impl Config {
    /// `encodec_24khz`: mono, causal, any length.
    pub fn encodec_24khz() -> Self {
        Self {
            sample_rate_hz: 24_000,
            audio_channels: 1,
            n_filters: 32,
            ratios: vec![8, 5, 4, 2],
            latent_dim: 128,
            kernel: 7,
            last_kernel: 7,
            residual_kernel: 3,
            residual_units: 1,
            dilation_base: 2,
            compress: 2,
            conv_shortcut: true,
            lstm_layers: 2,
            causal: true,
            norm: Norm::Weight,
            codebook_size: 1024,
            n_codebooks: 32,
            segment_s: None,
        }
    }

    /// `encodec_48khz`: stereo, not causal, segments of one second.
    pub fn encodec_48khz() -> Self {
        Self {
            sample_rate_hz: 48_000,
            audio_channels: 2,
            causal: false,
            norm: Norm::TimeGroup,
            n_codebooks: 16,
            segment_s: Some(1.0),
            ..Self::encodec_24khz()
        }
    }

    /// `encodec_32khz`, MusicGen's: mono, not causal, 50 frames a second of four codes.
    pub fn encodec_32khz() -> Self {
        Self {
            sample_rate_hz: 32_000,
            n_filters: 64,
            ratios: vec![8, 5, 4, 4],
            conv_shortcut: false,
            causal: false,
            codebook_size: 2048,
            n_codebooks: 4,
            ..Self::encodec_24khz()
        }
    }

    /// Samples per latent frame.
    pub fn hop(&self) -> usize {
        self.ratios.iter().product()
    }

    /// Samples that the model takes at a time; none: any number.
    pub fn segment_samples(&self) -> Option<usize> {
        self.segment_s.map(|s| (s * f64::from(self.sample_rate_hz)) as usize)
    }

    /// Checks that a model can be built.
    ///
    /// # Errors
    /// The key, what was expected and what was found.
    pub fn validate(&self) -> Result<(), String> {
        let numbers = [
            ("sample_rate_hz", self.sample_rate_hz as usize, 1000..=400_000),
            ("audio_channels", self.audio_channels, 1..=2),
            ("n_filters", self.n_filters, 1..=1024),
            ("latent_dim", self.latent_dim, 1..=4096),
            ("kernel", self.kernel, 1..=63),
            ("last_kernel", self.last_kernel, 1..=63),
            ("residual_kernel", self.residual_kernel, 1..=63),
            ("residual_units", self.residual_units, 0..=16),
            ("dilation_base", self.dilation_base, 1..=8),
            ("compress", self.compress, 1..=self.n_filters.max(1)),
            ("lstm_layers", self.lstm_layers, 1..=8),
            ("codebook_size", self.codebook_size, 1..=1 << 20),
            ("n_codebooks", self.n_codebooks, 1..=256),
            ("the number of ratios", self.ratios.len(), 1..=8),
        ];
        let ratios = self.ratios.iter().map(|&ratio| ("ratios", ratio, 2..=64));
        for (key, value, range) in numbers.into_iter().chain(ratios) {
            if !range.contains(&value) {
                return Err(format!("{key}: expected {} to {}, found {value}", range.start(), range.end()));
            }
        }
        if self.causal && self.norm == Norm::TimeGroup {
            return Err("a causal model cannot be normalised over time".into());
        }
        if self.segment_s.is_some_and(|s| !(s > 0.0 && s.is_finite())) {
            return Err(format!("segment_s: expected a positive number, found {:?}", self.segment_s));
        }
        Ok(())
    }
}
