//! Statistics and embeddings on disk.
//!
//! - Statistics: `.npz` with `NAME.mu` `[D]` and `NAME.cov` `[D, D]`, as fadtk 1.1 ships and writes them (f64, C order),
//!   or safetensors with the same names. Ours add `NAME.n`, the number of rows, which other readers ignore.
//! - Embeddings `[N, D]`: `.npy`, `.npz`, `.safetensors`; f16, f32, f64 (safetensors also bf16); a 1-D array is one row.
//!
//! Headers are not believed: sizes are checked against the bytes that are there before memory is set aside, and a file
//! that is not what it says ends in an [`Error::Format`] which says why. Writing goes to a temporary file beside the
//! target, is flushed to disk and then renamed, so that a file is whole or absent.
//!
//! What a file means is here; `npy` is the format of a single array.

mod npy;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Seek, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use zip::ZipArchive;
use zip::write::SimpleFileOptions;

pub use npy::{Array, parse_npy};
use npy::{decode, npy_bytes, npy_from};

use crate::{Error, GaussianStats, Result, Rows};

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

/// Writes statistics under `name`; the ending `.npz` or `.safetensors` chooses the format. Replaces the whole file.
///
/// # Errors
/// If the ending is another, or the disk refuses (no partial file is left).
pub fn write_stats(path: &Path, name: &str, stats: &GaussianStats) -> Result<()> {
    let dim = stats.dim();
    let mut arrays = BTreeMap::new();
    arrays.insert(format!("{name}.mu"), Array { shape: vec![dim], data: stats.mean().to_vec() });
    arrays.insert(format!("{name}.cov"), Array { shape: vec![dim, dim], data: stats.cov().to_vec() });
    if let Some(n) = stats.n() {
        arrays.insert(format!("{name}.n"), Array { shape: vec![1], data: vec![n as f64] });
    }
    write_arrays(path, &arrays)
}

/// Reads embeddings `[N, D]`.
///
/// `key` names the array in a `.npz` or `.safetensors` file and may be omitted where there is exactly one.
///
/// # Errors
/// If the file cannot be read, is not what its ending says, the array has more than two axes, or a value is not finite
/// (the message names the row).
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
    let array = Array { shape: vec![rows.n(), rows.dim()], data: rows.data().to_vec() };
    if kind(path)? == Kind::Npy {
        return write_whole(path, &npy_bytes(&array));
    }
    write_arrays(path, &BTreeMap::from([(key.to_string(), array)]))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Npy,
    Npz,
    Safetensors,
}

fn kind(path: &Path) -> Result<Kind> {
    match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("npy") => Ok(Kind::Npy),
        Some("npz") => Ok(Kind::Npz),
        Some("safetensors") => Ok(Kind::Safetensors),
        _ => Err(format_error(path, "its name ends in none of .npy, .npz, .safetensors")),
    }
}

fn format_error(path: &Path, reason: impl Into<String>) -> Error {
    Error::Format { path: path.into(), reason: reason.into() }
}

fn list(keys: &[String]) -> String {
    if keys.is_empty() { "nothing".into() } else { keys.join(", ") }
}

fn stats_names(keys: &[String]) -> Vec<String> {
    let has = |name: &str| keys.iter().any(|k| k.strip_suffix(".cov") == Some(name));
    keys.iter().filter_map(|k| k.strip_suffix(".mu")).filter(|n| has(n)).map(String::from).collect()
}

fn io_error(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io { action, path: path.into(), source }
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(io_error("read", path))
}

fn open_zip(path: &Path) -> Result<ZipArchive<BufReader<File>>> {
    let file = File::open(path).map_err(io_error("read", path))?;
    ZipArchive::new(BufReader::new(file))
        .map_err(|e| format_error(path, format!("not a .npz (zip) archive: {e}")))
}

/// Arrays of a `.npz` archive, sorted; entries whose name is not text cannot be asked for and are left out.
fn npz_keys(zip: &ZipArchive<BufReader<File>>) -> Vec<String> {
    let mut keys: Vec<String> =
        zip.file_names().flatten().filter_map(|n| n.strip_suffix(".npy").map(String::from)).collect();
    keys.sort();
    keys
}

/// Entries of a container, sorted.
fn keys(path: &Path) -> Result<Vec<String>> {
    let mut keys: Vec<String> = match kind(path)? {
        Kind::Npz => npz_keys(&open_zip(path)?),
        Kind::Safetensors => {
            let bytes = read_bytes(path)?;
            let tensors = SafeTensors::deserialize(&bytes)
                .map_err(|e| format_error(path, format!("not a safetensors file: {e}")))?;
            tensors.names().into_iter().map(String::from).collect()
        }
        Kind::Npy => {
            return Err(format_error(
                path,
                "a .npy file holds one unnamed array, expected .npz or .safetensors",
            ));
        }
    };
    keys.sort();
    Ok(keys)
}

fn read_arrays(path: &Path, wanted: &[&str]) -> Result<BTreeMap<String, Array>> {
    let mut arrays = BTreeMap::new();
    if kind(path)? == Kind::Npz {
        let mut zip = open_zip(path)?;
        for &key in wanted {
            let name = format!("{key}.npy");
            if zip.index_for_name(&name).is_none() {
                let available = list(&npz_keys(&zip));
                return Err(Error::MissingKey { path: path.into(), key: key.into(), available });
            }
            let mut entry =
                zip.by_name(&name).map_err(|e| format_error(path, format!("entry `{key}`: {e}")))?;
            let array =
                npy_from(&mut entry).map_err(|e| format_error(path, format!("entry `{key}`: {e}")))?;
            arrays.insert(key.to_string(), array);
        }
        return Ok(arrays);
    }
    let bytes = read_bytes(path)?;
    let tensors = SafeTensors::deserialize(&bytes)
        .map_err(|e| format_error(path, format!("not a safetensors file: {e}")))?;
    for &key in wanted {
        let tensor = tensors.tensor(key).map_err(|_| {
            let mut names: Vec<_> = tensors.names().into_iter().map(String::from).collect();
            names.sort();
            Error::MissingKey { path: path.into(), key: key.into(), available: list(&names) }
        })?;
        let raw = tensor.data();
        let data = match tensor.dtype() {
            Dtype::F64 => decode::<8>(raw, f64::from_le_bytes),
            Dtype::F32 => decode::<4>(raw, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => decode::<2>(raw, |b| f16::from_le_bytes(b).into()),
            Dtype::BF16 => decode::<2>(raw, |b| bf16::from_le_bytes(b).into()),
            Dtype::I64 => decode::<8>(raw, |b| i64::from_le_bytes(b) as f64),
            other => {
                return Err(format_error(
                    path,
                    format!("`{key}` has type {other:?}, expected F16, BF16, F32 or F64"),
                ));
            }
        };
        arrays.insert(key.to_string(), Array { shape: tensor.shape().to_vec(), data });
    }
    Ok(arrays)
}

fn read_npy(path: &Path) -> Result<Array> {
    let bytes = read_bytes(path)?;
    parse_npy(&bytes).map_err(|e| format_error(path, e))
}

fn write_arrays(path: &Path, arrays: &BTreeMap<String, Array>) -> Result<()> {
    let bytes = match kind(path)? {
        Kind::Npy => {
            return Err(format_error(path, "a .npy file holds one unnamed array, use .npz or .safetensors"));
        }
        Kind::Npz => {
            npz_bytes(arrays).map_err(|e| format_error(path, format!("cannot make the archive: {e}")))?
        }
        Kind::Safetensors => {
            let raw: Vec<(String, Vec<usize>, Vec<u8>)> = arrays
                .iter()
                .map(|(k, a)| {
                    (k.clone(), a.shape.clone(), a.data.iter().flat_map(|v| v.to_le_bytes()).collect())
                })
                .collect();
            let views = raw
                .iter()
                .map(|(k, shape, data)| Ok((k.as_str(), TensorView::new(Dtype::F64, shape.clone(), data)?)))
                .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
            views
                .and_then(|views| safetensors::serialize(views, None))
                .map_err(|e| format_error(path, format!("cannot serialise: {e}")))?
        }
    };
    write_whole(path, &bytes)
}

fn npz_bytes(arrays: &BTreeMap<String, Array>) -> zip::result::ZipResult<Vec<u8>> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    // Stored, as numpy's savez does; a fixed time stamp, so that equal contents are equal files.
    let options = SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default())
        .large_file(arrays.values().any(|a| a.data.len() > (u32::MAX as usize) / 16));
    for (key, array) in arrays {
        zip.start_file(format!("{key}.npy"), options)?;
        zip.write_all(&npy_bytes(array))?;
    }
    let mut cursor = zip.finish()?;
    cursor.rewind()?;
    Ok(cursor.into_inner())
}

/// Temporary file beside the target, fsync, rename.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary: PathBuf = path.with_file_name(name);
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|source| {
        let _ = std::fs::remove_file(&temporary); // it may not exist; the first error is the one to report
        Error::Io { action: "write", path: path.into(), source }
    })
}
