//! Named arrays in `.npz` (zip) and safetensors files; whole-file writing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use zip::ZipArchive;
use zip::write::SimpleFileOptions;

use super::npy::{Array, Precision, decode, npy_bytes, npy_from, parse_npy};
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Npy,
    Npz,
    Safetensors,
}

pub(super) fn kind(path: &Path) -> Result<Kind> {
    match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("npy") => Ok(Kind::Npy),
        Some("npz") => Ok(Kind::Npz),
        Some("safetensors") => Ok(Kind::Safetensors),
        _ => Err(format_error(path, "its name ends in none of .npy, .npz, .safetensors")),
    }
}

pub(super) fn format_error(path: &Path, reason: impl Into<String>) -> Error {
    Error::Format { path: path.into(), reason: reason.into() }
}

pub(super) fn list(keys: &[String]) -> String {
    if keys.is_empty() { "nothing".into() } else { keys.join(", ") }
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io { action, path: path.into(), source }
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(io_error("read", path))
}

fn open_zip(path: &Path) -> Result<ZipArchive<BufReader<File>>> {
    let file = File::open(path).map_err(io_error("read", path))?;
    zip_of(BufReader::new(file)).map_err(|e| format_error(path, e))
}

fn zip_of<R: Read + Seek>(reader: R) -> std::result::Result<ZipArchive<R>, String> {
    ZipArchive::new(reader).map_err(|e| format!("not a .npz (zip) archive: {e}"))
}

/// One array out of an archive that has it.
fn npz_array<R: Read + Seek>(zip: &mut ZipArchive<R>, key: &str) -> std::result::Result<Array, String> {
    let mut entry = zip.by_name(&format!("{key}.npy")).map_err(|e| format!("entry `{key}`: {e}"))?;
    let size = entry.size();
    let array = npy_from(&mut entry, size).map_err(|e| format!("entry `{key}`: {e}"))?;
    // The checksum is compared where the entry ends.
    match entry.read(&mut [0u8]) {
        Ok(0) => Ok(array),
        Ok(_) => Err(format!("entry `{key}`: bytes follow the array")),
        Err(e) => Err(format!("entry `{key}`: cannot read to its end: {e}")),
    }
}

/// All arrays in the bytes of a `.npz` file, by name.
///
/// # Errors
/// A sentence saying what is wrong. Never panics; sets aside no more memory than a small multiple of the bytes that the
/// archive holds (unpacked: deflate shrinks at most 1032-fold).
pub fn parse_npz(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Array>, String> {
    let mut zip = zip_of(std::io::Cursor::new(bytes))?;
    npz_keys(&zip).into_iter().map(|key| Ok((key.clone(), npz_array(&mut zip, &key)?))).collect()
}

/// Arrays of a `.npz` archive, sorted; entries whose name is not text cannot be asked for and are left out.
fn npz_keys<R: Read + Seek>(zip: &ZipArchive<R>) -> Vec<String> {
    let mut keys: Vec<String> =
        zip.file_names().flatten().filter_map(|n| n.strip_suffix(".npy").map(String::from)).collect();
    keys.sort();
    keys
}

/// Entries of a container, sorted.
pub(super) fn keys(path: &Path) -> Result<Vec<String>> {
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

pub(super) fn read_arrays(path: &Path, wanted: &[&str]) -> Result<BTreeMap<String, Array>> {
    let mut arrays = BTreeMap::new();
    if kind(path)? == Kind::Npz {
        let mut zip = open_zip(path)?;
        for &key in wanted {
            if zip.index_for_name(&format!("{key}.npy")).is_none() {
                let available = list(&npz_keys(&zip));
                return Err(Error::MissingKey { path: path.into(), key: key.into(), available });
            }
            let array = npz_array(&mut zip, key).map_err(|e| format_error(path, e))?;
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

pub(super) fn read_npy(path: &Path) -> Result<Array> {
    let bytes = read_bytes(path)?;
    parse_npy(&bytes).map_err(|e| format_error(path, e))
}

pub(super) fn write_arrays(
    path: &Path,
    arrays: &BTreeMap<String, Array>,
    precision: Precision,
) -> Result<()> {
    let bytes = match kind(path)? {
        Kind::Npy => {
            return Err(format_error(path, "a .npy file holds one unnamed array, use .npz or .safetensors"));
        }
        Kind::Npz => npz_bytes(arrays, precision)
            .map_err(|e| format_error(path, format!("cannot make the archive: {e}")))?,
        Kind::Safetensors => {
            let dtype = match precision {
                Precision::F16 => Dtype::F16,
                Precision::F32 => Dtype::F32,
                Precision::F64 => Dtype::F64,
            };
            let raw: Vec<(&String, &Array, Vec<u8>)> =
                arrays.iter().map(|(k, a)| (k, a, precision.encode(&a.data))).collect();
            let views = raw
                .iter()
                .map(|(k, a, data)| Ok((k.as_str(), TensorView::new(dtype, a.shape.clone(), data)?)))
                .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
            views
                .and_then(|views| safetensors::serialize(views, None))
                .map_err(|e| format_error(path, format!("cannot serialise: {e}")))?
        }
    };
    write_whole(path, &bytes)
}

fn npz_bytes(arrays: &BTreeMap<String, Array>, precision: Precision) -> zip::result::ZipResult<Vec<u8>> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    // Stored, as numpy's savez does; a fixed time stamp, so that equal contents are equal files.
    let options = SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default())
        .large_file(arrays.values().any(|a| a.data.len() > (u32::MAX as usize) / 16));
    for (key, array) in arrays {
        zip.start_file(format!("{key}.npy"), options)?;
        zip.write_all(&npy_bytes(array, precision))?;
    }
    let mut cursor = zip.finish()?;
    cursor.rewind()?;
    Ok(cursor.into_inner())
}

/// Temporary file beside the target, fsync, rename.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
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
