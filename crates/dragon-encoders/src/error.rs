//! What can go wrong between a clip (or a text) and its embeddings.

use std::path::PathBuf;

/// Result of this crate's functions outside model code.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of the encoders and of the embedding settings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The clip has another sample rate than the encoder.
    #[error("encoder `{encoder}` reads {expected} Hz, the clip has {found} Hz\nhint: resample it first")]
    SampleRate {
        /// Name of the encoder.
        encoder: String,
        /// Its rate, Hz.
        expected: u32,
        /// The clip's rate, Hz.
        found: u32,
    },
    /// The clip is too short to say anything about.
    #[error(
        "the clip is too short: expected at least {expected} samples (a tenth of the encoder's window of {window}), found {found}\nhint: leave it out, or use a longer recording"
    )]
    TooShort {
        /// Smallest number of samples accepted.
        expected: usize,
        /// Samples of the clip.
        found: usize,
        /// Samples of one window.
        window: usize,
    },
    /// A sample is NaN or infinite.
    #[error("sample {index} is {value}, expected finite audio")]
    NotFinite {
        /// Position of the first such sample.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A setting that makes no sense, or not for this encoder.
    #[error("`{key}`: expected {expected}, found {found}")]
    Setting {
        /// The key.
        key: &'static str,
        /// What would do.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A weight file that cannot be read.
    #[error("cannot read weights `{path}`: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A weight file of another network: every missing, unused and misshapen tensor.
    #[error("weights `{path}` do not fit {model}\n{problems}")]
    Weights {
        /// The file.
        path: PathBuf,
        /// Name of the network.
        model: &'static str,
        /// One line per tensor.
        problems: String,
    },
    /// Embeddings of different encoders, or rows of different length, were put together.
    #[error("embeddings of dimension {found} do not fit dimension {expected}")]
    Dimension {
        /// The dimension so far.
        expected: usize,
        /// The other one.
        found: usize,
    },
    /// From a tokenizer, about its file or a caption.
    #[error(transparent)]
    Text(#[from] crate::tokenizer::Error),
    /// From the audio crate.
    #[error(transparent)]
    Audio(#[from] dragon_audio::Error),
    /// A checkpoint that cannot be read or does not fit.
    #[error(transparent)]
    Load(#[from] Box<dragon_nn::LoadError>),
    /// From a codec's files.
    #[error(transparent)]
    Vae(#[from] dragon_vae::Error),
    /// From a model.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
