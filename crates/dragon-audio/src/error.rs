//! Errors of this crate: what failed, on which file, what was expected and what was found.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why audio could not be read, converted or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No file at this path.
    #[error("audio file `{path}` does not exist\nhint: check the path; relative paths start at the current folder", path = .path.display())]
    NotFound {
        /// The path asked for.
        path: PathBuf,
    },
    /// The operating system refused to read or write.
    #[error("audio file `{path}` could not be {action}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// "read" or "written".
        action: &'static str,
        /// The system's message.
        source: std::io::Error,
    },
    /// The file has no bytes.
    #[error("audio file `{path}` is empty: expected audio, found 0 bytes\nhint: was its download or copy interrupted?", path = .path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },
    /// The file's contents are not of the format its name promises.
    #[error("audio file `{path}` is mislabelled: expected {expected}, found {found}\nhint: rename it to its true format, or convert it", path = .path.display())]
    Mislabelled {
        /// The file.
        path: PathBuf,
        /// Format that belongs to the file's extension.
        expected: String,
        /// Format of the file's first bytes.
        found: String,
    },
    /// The contents are not in a format that can be read.
    #[error("audio file `{path}` cannot be decoded: expected one of {SUPPORTED}, found {found}\nhint: convert it, for example to WAV or FLAC", path = .path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Format or codec found.
        found: String,
    },
    /// The stream is damaged.
    #[error("audio file `{path}` is damaged at {at_s:.2} s: {detail}\nhint: fetch or export it again", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Time of the first damaged packet, seconds.
        at_s: f64,
        /// The decoder's message.
        detail: String,
    },
    /// The file ends before its stream does.
    #[error("audio file `{path}` is truncated: expected {expected}, found {found}\nhint: fetch or export it again", path = .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What a whole file would have.
        expected: String,
        /// What this one has.
        found: String,
    },
    /// The file is well-formed and has no samples.
    #[error("audio file `{path}` has no samples: expected audio, found a header only\nhint: was its export or recording interrupted?", path = .path.display())]
    NoSamples {
        /// The file.
        path: PathBuf,
    },
    /// The file's header states a sample rate that no audio has.
    #[error("audio file `{path}` has an impossible sample rate: expected 1000 to 768000 Hz, found {found_hz} Hz\nhint: export it again from its source", path = .path.display())]
    FileRate {
        /// The file.
        path: PathBuf,
        /// The rate, Hz.
        found_hz: u32,
    },
    /// A sample is NaN or infinite.
    #[error("audio file `{path}` carries a bad sample: expected finite numbers, found {value} in channel {channel} at {at_s:.4} s\nhint: export it again from its source", path = .path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// Channel, from 0.
        channel: usize,
        /// Time of the sample, seconds.
        at_s: f64,
        /// The value.
        value: f32,
    },
    /// The audio is shorter than its use needs.
    #[error("audio file `{path}` is too short: expected at least {expected_s:.2} s, found {found_s:.2} s\nhint: leave it out, or use a longer recording", path = .path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Shortest usable duration, seconds.
        expected_s: f64,
        /// Duration of the file, seconds.
        found_s: f64,
    },
    /// The audio is silent where sound is needed.
    #[error("audio file `{path}` is silent: expected a level above {expected_dbfs:.0} dBFS, found {found_dbfs:.0} dBFS\nhint: leave it out, or export it again from its source", path = .path.display())]
    Silent {
        /// The file.
        path: PathBuf,
        /// Lowest usable RMS level, dB relative to full scale.
        expected_dbfs: f64,
        /// RMS level of the file, dB relative to full scale.
        found_dbfs: f64,
    },
    /// A sample rate that cannot be used.
    #[error(
        "sample rate does not fit: expected 1000 to 768000 Hz, found {found_hz} Hz\nhint: check the file's header, or `sample_rate_hz` of the config"
    )]
    SampleRate {
        /// The rate, Hz.
        found_hz: u32,
    },
    /// A setting that makes no sense.
    #[error("setting `{key}` does not fit: expected {expected}, found {found}")]
    Setting {
        /// The field's name.
        key: &'static str,
        /// What would fit.
        expected: String,
        /// What was given.
        found: String,
    },
}

/// What [`crate::read`] can decode, for messages.
pub const SUPPORTED: &str = "WAV, FLAC, Ogg Vorbis, Ogg Opus, MP3, AIFF, CAF, MP4 (AAC, ALAC), Matroska";

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound && action == "read" {
            return Error::NotFound { path: path.to_path_buf() };
        }
        Error::Io { path: path.to_path_buf(), action, source }
    }
}
