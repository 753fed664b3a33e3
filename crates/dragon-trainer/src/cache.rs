//! Embeddings of files kept from one command to the next, in the user's cache folder and never beside the audio.
//!
//! An entry is named by a hash of everything that it depends on: the contents of the audio file (not its name), the
//! encoder, its weights, the setting, and a version of ours. So nothing in it can be out of date, and it may be deleted at any
//! time. Entries appear whole (written under another name, then renamed); one that cannot be read is made anew.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use dragon_metrics::Rows;
use dragon_metrics::files::{Precision, read_embeddings, write_embeddings_as};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::inputs;
use crate::run::hex;

/// Raised when decoding, resampling or an encoder changes its numbers.
const VERSION: u32 = 1;

/// A folder of embeddings by hash.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    /// Whether it was said that the folder cannot be written.
    warned: AtomicBool,
    /// Files written so far, to tell unfinished ones apart.
    n_written: AtomicUsize,
}

impl Cache {
    /// A cache in `dir`, which is made when something is written.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), warned: AtomicBool::new(false), n_written: AtomicUsize::new(0) }
    }

    /// The user's: `dragon/embeddings` in `$XDG_CACHE_HOME` (an absolute path), else in `$HOME/.cache` or, on Windows,
    /// `%LOCALAPPDATA%`. `None` without any of these.
    pub fn of_user() -> Option<Self> {
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let base = absolute("XDG_CACHE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
            .or_else(|| absolute("LOCALAPPDATA"))?;
        Some(Self::at(base.join("dragon").join("embeddings")))
    }

    /// The rows of `file` as made by `maker` (encoder, weights and setting in words): those kept, or else those of `make`,
    /// which are then kept. A cache that cannot be written is no error.
    ///
    /// # Errors
    /// If `file` cannot be read, or as `make`.
    pub fn rows(&self, maker: &str, file: &Path, make: impl FnOnce() -> Result<Rows>) -> Result<Rows> {
        let contents = inputs::sha256(&[file.to_owned()])?;
        let key = Sha256::new().chain_update(format!("{VERSION}\n{maker}\n{contents}")).finalize();
        let key = hex(&key);
        let folder = self.dir.join(&key[..2]);
        let path = folder.join(format!("{key}.npz"));
        match read_embeddings(&path, None) {
            Ok(rows) => return Ok(rows),
            Err(err) if path.exists() => tracing::debug!("a cached embedding is made anew: {err}"),
            Err(_) => {}
        }
        let rows = make()?;
        let n = self.n_written.fetch_add(1, Ordering::Relaxed);
        let unfinished = folder.join(format!("{key}.{}-{n}.npz", std::process::id()));
        // Encoders give f32, so that nothing is lost.
        let written = std::fs::create_dir_all(&folder)
            .map_err(|err| err.to_string())
            .and_then(|()| {
                write_embeddings_as(&unfinished, "embeddings", &rows, Precision::F32)
                    .map_err(|err| err.to_string())
            })
            .and_then(|()| std::fs::rename(&unfinished, &path).map_err(|err| err.to_string()));
        if let Err(err) = written {
            let _ = std::fs::remove_file(&unfinished); // it may not exist
            if !self.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!("embeddings are not kept: {err}");
            }
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_depends_on_contents_and_maker_only_and_a_damaged_one_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (songs, kept) = (dir.path().join("songs"), dir.path().join("cache"));
        std::fs::create_dir(&songs).unwrap();
        for (name, contents) in [("a.wav", "1"), ("b.wav", "1"), ("c.wav", "2")] {
            std::fs::write(songs.join(name), contents).unwrap();
        }
        let cache = Cache::at(&kept);
        let made = AtomicUsize::new(0);
        let ask = |maker: &str, name: &str| {
            let rows = cache.rows(maker, &songs.join(name), || {
                let n = made.fetch_add(1, Ordering::Relaxed) as f64;
                Ok(Rows::new(2, 1, vec![n, 0.1f32.into()]).unwrap())
            });
            rows.unwrap()
        };
        let first = ask("x", "a.wav");
        assert_eq!(ask("x", "a.wav"), first);
        assert_eq!(ask("x", "b.wav"), first, "the name does not count");
        assert_ne!(ask("x", "c.wav"), first);
        assert_ne!(ask("y", "a.wav"), first);
        assert_eq!(made.load(Ordering::Relaxed), 3);
        let entries: Vec<PathBuf> = std::fs::read_dir(&kept)
            .unwrap()
            .flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap())
            .map(|entry| entry.unwrap().path())
            .collect();
        assert_eq!(entries.len(), 3, "{entries:?}");
        assert_eq!(std::fs::read_dir(&songs).unwrap().count(), 3, "nothing beside the audio");
        let damage = |how: fn(&mut Vec<u8>)| {
            for entry in &entries {
                let mut bytes = std::fs::read(entry).unwrap();
                how(&mut bytes);
                std::fs::write(entry, bytes).unwrap();
            }
        };
        damage(|bytes| bytes.truncate(bytes.len() / 2));
        assert_eq!(ask("x", "a.wav").row(1), first.row(1), "half an entry is seen");
        assert_eq!(made.load(Ordering::Relaxed), 4);
        ask("x", "c.wav");
        ask("y", "a.wav");
        damage(|bytes| {
            let value = 0.1f32.to_le_bytes();
            let at = bytes.windows(4).position(|four| four == value).unwrap();
            bytes[at] ^= 1;
        });
        assert_eq!(ask("x", "a.wav").row(1), first.row(1), "a flipped bit is seen");
        assert_eq!(made.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn a_cache_that_cannot_be_written_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (song, blocked) = (dir.path().join("a.wav"), dir.path().join("file"));
        std::fs::write(&song, "1").unwrap();
        std::fs::write(&blocked, "no folder").unwrap();
        let rows = Rows::new(1, 1, vec![1.0]).unwrap();
        assert_eq!(Cache::at(&blocked).rows("x", &song, || Ok(rows.clone())).unwrap(), rows);
    }
}
