//! The folders in which fadtk (and kadtk, for embeddings) keeps what it has computed, beside the audio:
//! `embeddings/MODEL/SONG.npy` (f16, `[N, D]`) and `stats/MODEL/{mu,cov}.npy` (f64).
//!
//! fadtk never checks whether they are still those of the audio, and names a song by its file without the ending, so
//! that `a.wav` and `a.mp3` share an entry: these functions read and write such folders for exchange, not as a cache.

use std::path::{Path, PathBuf};

use super::containers::{format_error, io_error, read_npy, write_whole};
use super::npy::{Array, Precision, npy_bytes};
use super::{read_embeddings, write_embeddings_as};
use crate::{Error, GaussianStats, Result, Rows};

/// Embeddings of every song under `folder/embeddings/MODEL`, with its name (without the ending), sorted by name.
///
/// # Errors
/// If the folder cannot be read or holds no `.npy` file, a file is not an array of embeddings, or dimensions differ; the
/// message names the file.
pub fn read_fadtk_embeddings(folder: &Path, model: &str) -> Result<Vec<(String, Rows)>> {
    let dir = folder.join("embeddings").join(model);
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(io_error("read", &dir))? {
        let path = entry.map_err(io_error("read", &dir))?.path();
        if path.extension().is_some_and(|e| e == "npy") {
            files.push(path);
        }
    }
    files.sort();
    let mut songs: Vec<(String, Rows)> = Vec::with_capacity(files.len());
    for path in files {
        let rows = read_embeddings(&path, None)?;
        if let Some((_, first)) = songs.first()
            && first.dim() != rows.dim()
        {
            let differ = Error::Dimension { what: "embeddings", expected: first.dim(), found: rows.dim() };
            return Err(differ.within(format!("`{}`", path.display())));
        }
        songs.push((path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), rows));
    }
    if songs.is_empty() {
        return Err(format_error(&dir, "it holds no .npy file"));
    }
    Ok(songs)
}

/// Writes the embeddings of `song`, the name of an audio file, where fadtk looks for them, in f16 as it does: what follows
/// the last dot of the name becomes `npy`.
///
/// # Errors
/// If the folder cannot be made, a value is above 65504, or the disk refuses.
pub fn write_fadtk_embeddings(folder: &Path, model: &str, song: &str, rows: &Rows) -> Result<()> {
    let dir = folder.join("embeddings").join(model);
    std::fs::create_dir_all(&dir).map_err(io_error("write", &dir))?;
    let name = Path::new(song).with_extension("npy");
    write_embeddings_as(&dir.join(name.file_name().unwrap_or_default()), "", rows, Precision::F16)
}

/// Statistics under `folder/stats/MODEL`.
///
/// # Errors
/// If a file is missing or no array, or they are not the mean and covariance of a Gaussian; the message names the file.
pub fn read_fadtk_stats(folder: &Path, model: &str) -> Result<GaussianStats> {
    let dir = folder.join("stats").join(model);
    let (mu, cov) = (read_npy(&dir.join("mu.npy"))?, read_npy(&dir.join("cov.npy"))?);
    let d = mu.data.len();
    if mu.shape.len() != 1 || cov.shape != [d, d] {
        let reason = format!(
            "`mu.npy` has shape {:?} and `cov.npy` {:?}, expected [D] and [D, D]",
            mu.shape, cov.shape
        );
        return Err(format_error(&dir, reason));
    }
    GaussianStats::new(mu.data, cov.data, None).map_err(|e| e.within(format!("`{}`", dir.display())))
}

/// Writes statistics where fadtk looks for them.
///
/// # Errors
/// If the folder cannot be made, or the disk refuses.
pub fn write_fadtk_stats(folder: &Path, model: &str, stats: &GaussianStats) -> Result<()> {
    let dir = folder.join("stats").join(model);
    std::fs::create_dir_all(&dir).map_err(io_error("write", &dir))?;
    let dim = stats.dim();
    let mu = Array { shape: vec![dim], data: stats.mean().to_vec() };
    let cov = Array { shape: vec![dim, dim], data: stats.cov().to_vec() };
    write_whole(&dir.join("mu.npy"), &npy_bytes(&mu, Precision::F64))?;
    write_whole(&dir.join("cov.npy"), &npy_bytes(&cov, Precision::F64))
}
