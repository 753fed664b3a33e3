//! What can go wrong in a run, and whether the user or we must mend it.

use std::path::{Path, PathBuf};

/// Shorthand used throughout the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a run. The message says what failed, where, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("cannot {action} `{}`: {source}{}", path.display(), disk_hint(source))]
    Io {
        /// What was tried: `read`, `write`, `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A key of the config has a value that cannot work.
    #[error(
        "config key `{key}`: expected {expected}, found {found}\nhint: correct it in the config, or with --set; docs/config.md explains the keys"
    )]
    Config {
        /// Path of the key, `train.steps`.
        key: String,
        /// What would work.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A file exists but its content is not what it should be.
    #[error("`{}` {problem}\nhint: {hint}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, continuing the sentence after its name.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// Another run holds the folder.
    #[error(
        "the run folder `{}` is in use by {holder}\nhint: wait for that run, stop it, or give this one another folder with --out",
        path.display()
    )]
    Locked {
        /// The run folder.
        path: PathBuf,
        /// Who holds it, as the lock file says.
        holder: String,
    },
    /// The run folder holds a run already, and this command was not told to continue it.
    #[error("the folder `{}` holds {what}\nhint: continue it with --resume, or give another folder with --out", path.display())]
    Exists {
        /// The run folder.
        path: PathBuf,
        /// What was found there.
        what: String,
    },
    /// A run cannot be continued with this config.
    #[error("cannot continue the run in `{}`: {reason}", path.display())]
    Resume {
        /// The run folder or the checkpoint.
        path: PathBuf,
        /// Why, with the hint on its own line.
        reason: String,
    },
    /// The loss or a gradient stopped being a number.
    #[error(
        "{what} is {value} at step {step}{}{}{}\nhint: lower the learning rate or beta; a run continues from its last checkpoint with --resume",
        at_sigma(sigma),
        at_prompt(prompt),
        kept(checkpoint)
    )]
    NotFinite {
        /// What went wrong: `loss`, `gradient norm`.
        what: String,
        /// Its value.
        value: f64,
        /// The optimiser step, counted from 0.
        step: usize,
        /// Noise level of the worst example, where it is known.
        sigma: Option<f64>,
        /// Prompt of the worst example, where it is known.
        prompt: Option<String>,
        /// The last checkpoint, which is whole; filled in by the loop.
        checkpoint: Option<PathBuf>,
    },
    /// A model gave latents that are no numbers. The loop of a training turns it into [`Error::NotFinite`].
    #[error(
        "the model gives latents that are {value} for {prompt:?}\nhint: its weights or the model folder's are broken; take another checkpoint"
    )]
    BrokenSong {
        /// Sum of the latents' magnitudes.
        value: f64,
        /// The prompt.
        prompt: String,
    },
    /// The data cannot be used: no prompt, no clip, nothing to compare.
    #[error("{problem}\nhint: {hint}")]
    Data {
        /// What is wrong.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// Another crate of ours refused an input of the user.
    #[error("{context}\n  {message}")]
    Input {
        /// What was being done.
        context: String,
        /// The other crate's message.
        message: String,
    },
    /// A tensor operation failed: a bug, since shapes are checked before.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// Something that cannot happen did.
    #[error("{0}")]
    Bug(String),
}

fn disk_hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull => "\nhint: the disk is full; what was saved before is still whole",
        std::io::ErrorKind::FileTooLarge | std::io::ErrorKind::QuotaExceeded => {
            "\nhint: a limit on disk space or file size is reached (`ulimit -f`, `quota`); what was saved before is still whole"
        }
        std::io::ErrorKind::PermissionDenied => "\nhint: check the permissions, or name another place",
        std::io::ErrorKind::NotFound => "\nhint: check the path",
        _ => "",
    }
}

fn at_sigma(sigma: &Option<f64>) -> String {
    sigma.map_or(String::new(), |sigma| format!(", sigma {sigma:.4}"))
}

fn at_prompt(prompt: &Option<String>) -> String {
    prompt.as_ref().map_or(String::new(), |prompt| format!(", prompt {prompt:?}"))
}

fn kept(checkpoint: &Option<PathBuf>) -> String {
    match checkpoint {
        Some(path) => format!("\n  the last good checkpoint is `{}`", path.display()),
        None => "\n  there is no checkpoint yet".to_owned(),
    }
}

impl Error {
    /// Wraps an I/O error with the path and what was tried.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }

    /// A file or folder that is not there.
    pub fn missing(path: &Path) -> Error {
        Error::io("read", path)(std::io::Error::new(
            std::io::ErrorKind::NotFound,
            "there is no such file or folder",
        ))
    }

    /// A config key whose value cannot work.
    pub fn config(key: &str, expected: impl ToString, found: impl ToString) -> Error {
        Error::Config { key: key.to_owned(), expected: expected.to_string(), found: found.to_string() }
    }

    /// Wraps the error of another crate: something the user gave was refused. The context may end with a line `hint: …`.
    pub fn input<E: std::fmt::Display>(context: impl Into<String>) -> impl FnOnce(E) -> Error {
        let context = context.into();
        move |err| {
            // Hints of both go to the end.
            let err = err.to_string();
            let is_hint = |line: &&str| line.trim_start().starts_with("hint:");
            let plain = |text: &str, indent: &str| {
                let lines: Vec<&str> = text.lines().filter(|line| !is_hint(line)).collect();
                lines.join(&format!("\n{indent}"))
            };
            let mut message = plain(&err, "  ");
            for hint in context.lines().chain(err.lines()).filter(is_hint) {
                message += &format!("\n{}", hint.trim_start());
            }
            Error::Input { context: plain(&context, ""), message }
        }
    }

    /// The exit code of a command that ends with this error: 1 if the user can mend it, 2 if it is a bug of ours.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Tensor(_) | Error::Bug(_) => 2,
            _ => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_of_an_inner_error_come_last_and_every_error_of_a_disk_has_one() {
        let inner = "`a.wav` is empty: expected audio, found 0 bytes\nhint: was its copy interrupted?";
        let err = Error::input("cannot embed\nhint: leave it out")(inner);
        assert_eq!(
            err.to_string(),
            "cannot embed\n  `a.wav` is empty: expected audio, found 0 bytes\nhint: leave it out\nhint: was its copy interrupted?"
        );
        use std::io::ErrorKind::{FileTooLarge, PermissionDenied, QuotaExceeded, StorageFull};
        for kind in [FileTooLarge, PermissionDenied, QuotaExceeded, StorageFull] {
            let err = Error::io("write", Path::new("x"))(kind.into());
            assert!(err.to_string().contains("\nhint: "), "{err}");
            assert_eq!(err.exit_code(), 1);
        }
    }
}
