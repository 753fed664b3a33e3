//! Statistics and embeddings on disk.
//!
//! - Statistics: `.npz` with `NAME.mu` `[D]` and `NAME.cov` `[D, D]`, as fadtk 1.1 ships and writes them (f64, C order),
//!   or safetensors with the same names; fadtk's own folders too. Ours add `NAME.n`, the number of rows, which other readers ignore.
//! - Embeddings `[N, D]`: `.npy`, `.npz`, `.safetensors`; f16, f32, f64 (safetensors also bf16); a 1-D array is one row.
//!
//! Headers are not believed: sizes are checked against the bytes that are there before memory is set aside, and a file
//! that is not what it says ends in an [`Error::Format`] which says why. Writing goes to a temporary file beside the
//! target, is flushed to disk and then renamed, so that a file is whole or absent.
//!
//! What a file means is here; `npy` is the format of a single array, `containers` those of several, `fadtk` the folders
//! in which fadtk keeps what it has computed.

mod containers;
mod fadtk;
mod npy;

use std::collections::BTreeMap;
use std::path::Path;

use containers::{Kind, format_error, keys, kind, list, read_arrays, read_npy, write_arrays, write_whole};
use npy::npy_bytes;

pub use containers::parse_npz;
pub use fadtk::{read_fadtk_embeddings, read_fadtk_stats, write_fadtk_embeddings, write_fadtk_stats};
pub use npy::{Array, Precision, parse_npy};

use crate::{Error, FrechetReference, GaussianStats, Result, Rows};

/// Reads the statistics `name` from a `.npz` or `.safetensors` file.
///
/// `name` may be omitted where the file holds exactly one set of statistics.
///
/// # Errors
/// If the file cannot be read, is not what its ending says, lacks the entry (the message lists those present), or the
/// statistics are not those of a Gaussian (see [`GaussianStats::new`]).
pub fn read_stats(path: &Path, name: Option<&str>) -> Result<GaussianStats> {
    let keys = keys(path)?;
    let names = stats_names(&keys);
    let name = match name {
        Some(name) => name.to_string(),
        None => match names.as_slice() {
            [only] => only.clone(),
            [] => {
                return Err(format_error(path, "it holds no statistics (entries `NAME.mu` and `NAME.cov`)"));
            }
            many => {
                return Err(format_error(
                    path,
                    format!("it holds {} statistics, name one of: {}", many.len(), many.join(", ")),
                ));
            }
        },
    };
    let missing = |key: &str| {
        let available = if names.is_empty() { list(&keys) } else { list(&names) };
        Error::MissingKey { path: path.into(), key: key.into(), available }
    };
    let (mu_key, cov_key, n_key) = (format!("{name}.mu"), format!("{name}.cov"), format!("{name}.n"));
    for key in [&mu_key, &cov_key] {
        if !keys.contains(key) {
            return Err(missing(key));
        }
    }
    let mut wanted = vec![mu_key.as_str(), cov_key.as_str()];
    if keys.contains(&n_key) {
        wanted.push(&n_key);
    }
    let mut arrays = read_arrays(path, &wanted)?;
    let cov = arrays.remove(cov_key.as_str()).ok_or_else(|| missing(&cov_key))?;
    let mu = arrays.remove(mu_key.as_str()).ok_or_else(|| missing(&mu_key))?;
    if mu.shape.len() != 1 || cov.shape != [mu.data.len(), mu.data.len()] {
        let d = mu.data.len();
        return Err(format_error(
            path,
            format!(
                "`{mu_key}` has shape {:?} and `{cov_key}` {:?}, expected [D] and [D, D] (here [{d}, {d}])",
                mu.shape, cov.shape
            ),
        ));
    }
    let n = match arrays.remove(n_key.as_str()) {
        None => None,
        Some(Array { data, .. }) => match data.as_slice() {
            [n] if *n >= 2.0 && n.fract() == 0.0 && *n < 1e15 => Some(*n as usize),
            other => {
                return Err(format_error(
                    path,
                    format!("`{n_key}` is {other:?}, expected one count of at least 2"),
                ));
            }
        },
    };
    GaussianStats::new(mu.data, cov.data, n).map_err(|e| e.within(format!("`{}`, {name}", path.display())))
}

/// Names of the statistics in a file, sorted.
///
/// # Errors
/// If the file cannot be read or is not what its ending says.
pub fn stats_in(path: &Path) -> Result<Vec<String>> {
    Ok(stats_names(&keys(path)?))
}

/// Reads the statistics `name` and factors them: [`read_stats`], then [`FrechetReference::new`].
///
/// # Errors
/// As both; every message holds the file's name.
pub fn read_reference(path: &Path, name: Option<&str>) -> Result<FrechetReference> {
    FrechetReference::new(&read_stats(path, name)?).map_err(|e| e.within(format!("`{}`", path.display())))
}

/// Writes statistics under `name`; the ending `.npz` or `.safetensors` chooses the format. Replaces the whole file.
///
/// # Errors
/// If the ending is another, or the disk refuses (no partial file is left).
pub fn write_stats(path: &Path, name: &str, stats: &GaussianStats) -> Result<()> {
    write_all_stats(path, &[(name, stats)])
}

/// Writes several statistics into one file, as fadtk's `fma_pop.npz` holds those of 21 encoders.
///
/// # Errors
/// As [`write_stats`].
pub fn write_all_stats(path: &Path, all: &[(&str, &GaussianStats)]) -> Result<()> {
    let mut arrays = BTreeMap::new();
    for (name, stats) in all {
        let dim = stats.dim();
        arrays.insert(format!("{name}.mu"), Array { shape: vec![dim], data: stats.mean().to_vec() });
        arrays.insert(format!("{name}.cov"), Array { shape: vec![dim, dim], data: stats.cov().to_vec() });
        if let Some(n) = stats.n() {
            arrays.insert(format!("{name}.n"), Array { shape: vec![1], data: vec![n as f64] });
        }
    }
    write_arrays(path, &arrays, Precision::F64)
}

/// Reads embeddings `[N, D]`.
///
/// `key` names the array in a `.npz` or `.safetensors` file and may be omitted where there is exactly one.
///
/// # Errors
/// If the file cannot be read, is not what its ending says, the array has no rows or more than two axes, or a value is
/// not finite (the message names the row).
pub fn read_embeddings(path: &Path, key: Option<&str>) -> Result<Rows> {
    let array = if kind(path)? == Kind::Npy {
        read_npy(path)?
    } else {
        let keys = keys(path)?;
        let key = match (key, keys.as_slice()) {
            (Some(key), _) => key,
            (None, [only]) => only,
            (None, _) => {
                return Err(format_error(
                    path,
                    format!("it holds {} arrays, name one of: {}", keys.len(), list(&keys)),
                ));
            }
        };
        read_arrays(path, &[key])?.remove(key).ok_or_else(|| Error::MissingKey {
            path: path.into(),
            key: key.into(),
            available: list(&keys),
        })?
    };
    let (n, dim) = match array.shape.as_slice() {
        [dim] => (1, *dim),
        [0, _] => {
            return Err(format_error(
                path,
                format!("embeddings have shape {:?}: it holds none", array.shape),
            ));
        }
        [n, dim] => (*n, *dim),
        other => {
            return Err(format_error(
                path,
                format!("embeddings have shape {other:?}, expected [N, D] or [D]"),
            ));
        }
    };
    Rows::new(n, dim, array.data).map_err(|e| e.within(format!("`{}`", path.display())))
}

/// Writes embeddings `[N, D]` as f64: `.npy`, or `.npz` and `.safetensors` under `key`.
///
/// # Errors
/// If the ending is another, or the disk refuses (no partial file is left).
pub fn write_embeddings(path: &Path, key: &str, rows: &Rows) -> Result<()> {
    write_embeddings_as(path, key, rows, Precision::F64)
}

/// [`write_embeddings`] with the values rounded to `precision`.
///
/// # Errors
/// As [`write_embeddings`], and if a value is too large for `precision` (the message names its row).
pub fn write_embeddings_as(path: &Path, key: &str, rows: &Rows, precision: Precision) -> Result<()> {
    if let Some(at) = rows.data().iter().position(|x| !precision.round(*x).is_finite()) {
        let (row, column) = (at / rows.dim(), at % rows.dim());
        let value = rows.data()[at];
        return Err(format_error(
            path,
            format!("row {row}, column {column} is {value}, too large for {precision:?}"),
        ));
    }
    let array = Array { shape: vec![rows.n(), rows.dim()], data: rows.data().to_vec() };
    if kind(path)? == Kind::Npy {
        return write_whole(path, &npy_bytes(&array, precision));
    }
    write_arrays(path, &BTreeMap::from([(key.to_string(), array)]), precision)
}

fn stats_names(keys: &[String]) -> Vec<String> {
    let has = |name: &str| keys.iter().any(|k| k.strip_suffix(".cov") == Some(name));
    keys.iter().filter_map(|k| k.strip_suffix(".mu")).filter(|n| has(n)).map(String::from).collect()
}
