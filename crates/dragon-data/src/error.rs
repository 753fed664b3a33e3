//! Errors of this crate: what failed, on which file or field, what was expected and what was found.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why music could not be fetched, rendered, imported or listed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An audio file could not be read or written.
    #[error(transparent)]
    Audio(#[from] dragon_audio::Error),
    /// The operating system refused.
    #[error("`{path}` could not be {action}: {source}", path = .path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// "read", "written", ...
        action: &'static str,
        /// The system's message.
        source: std::io::Error,
    },
    /// A file or folder that must be there is not.
    #[error("{what} `{path}` does not exist\nhint: {hint}", path = .path.display())]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// How to get it.
        hint: &'static str,
    },
    /// A line of a manifest or list does not fit.
    #[error("`{path}` line {line}: {detail}\nhint: correct the line, or take it out", path = .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Field, expected and found.
        detail: String,
    },
    /// A setting cannot work.
    #[error(
        "config key `{key}`: expected {expected}, found {found}\nhint: correct it in the config, or with --set; docs/config.md explains the keys"
    )]
    Config {
        /// Path of the key, `clip.duration_s`.
        key: &'static str,
        /// What would work.
        expected: String,
        /// What was given.
        found: String,
    },
    /// An input file is not what it should be.
    #[error("{what} `{path}` cannot be used: {detail}\nhint: correct the file, or leave it out", path = .path.display())]
    Input {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Expected and found.
        detail: String,
    },
    /// The output folder holds the result of other settings.
    #[error(
        "folder `{path}` holds clips of other settings: `{key}` is {found} there, {expected} here\nhint: choose another folder, or remove this one", path = .path.display()
    )]
    OtherSettings {
        /// The folder.
        path: PathBuf,
        /// Setting that differs.
        key: String,
        /// Its value in this run.
        expected: String,
        /// Its value in the folder.
        found: String,
    },
    /// The output folder holds clips that a new manifest would leave out.
    #[error(
        "folder `{path}` holds clips of other files, among them {piece}: expected an empty folder, or an earlier import of the same files\nhint: choose another folder with --out", path = .path.display()
    )]
    OtherClips {
        /// The folder.
        path: PathBuf,
        /// A piece that is there and not in this import.
        piece: String,
    },
    /// A helper program failed or is not installed.
    #[error("`{command}` failed: {detail}\nhint: {hint}")]
    Program {
        /// The command line.
        command: String,
        /// Exit status and last line of its messages.
        detail: String,
        /// What to do.
        hint: &'static str,
    },
    /// Nothing usable was found.
    #[error("no usable {what} in `{path}`: {detail}\nhint: name a folder, list or archive that holds some", path = .path.display())]
    Nothing {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why each candidate was refused.
        detail: String,
    },
}

impl Error {
    pub(crate) fn config(key: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Error::Config { key, expected: expected.to_string(), found: found.to_string() }
    }

    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Error::Io { path, action, source }
    }
}
