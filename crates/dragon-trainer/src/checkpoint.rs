//! Checkpoints: everything a run needs to go on bit for bit, written whole or not at all.
//!
//! A checkpoint is a folder `step-000120/` with `state.safetensors` (tensors) and `state.json` (the rest, and the length
//! and CRC-32 of the tensor file). It is written beside its place as `.step-000120.tmp`, synced, and renamed; a crash or
//! a full disk leaves at most a `.tmp` folder, which the next save removes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const TENSORS: &str = "state.safetensors";
const SCALARS: &str = "state.json";

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scalars {
    /// Format of this file; 1.
    pub version: u32,
    /// Steps done: the run continues with this step number.
    pub next_step: usize,
    /// Seed of the run. Every generator state follows from it and the step: the noise of step k comes from
    /// `Rng::from_key("step/k", seed)`, and so does the data position.
    pub seed: u64,
    /// SHA-256 of the resolved config, in hex; a run does not continue under another config.
    pub config_sha256: String,
    /// Length of `metrics.jsonl` at this step; later lines are cut off on resume, in bytes.
    pub metrics_len: u64,
    /// Length of the tensor file, in bytes.
    pub tensors_len: u64,
    /// CRC-32 (IEEE) of the tensor file.
    pub tensors_crc32: u32,
}

/// Opens a file for writing; replaced in tests by one on a full device.
type Open = fn(&Path) -> io::Result<File>;

/// Saves a checkpoint and removes all but the newest `keep`; gives its folder.
///
/// # Errors
/// If anything cannot be written: then nothing has changed, and earlier checkpoints are whole.
pub fn save(
    dir: &Path,
    scalars: &Scalars,
    tensors: &BTreeMap<String, Tensor>,
    keep: usize,
) -> Result<PathBuf> {
    save_with(dir, scalars, tensors, keep, |path| File::create(path))
}

fn save_with(
    dir: &Path,
    scalars: &Scalars,
    tensors: &BTreeMap<String, Tensor>,
    keep: usize,
    open: Open,
) -> Result<PathBuf> {
    let name = format!("step-{:06}", scalars.next_step);
    let temporary = dir.join(format!(".{name}.tmp"));
    let place = dir.join(&name);
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    remove_leftovers(dir)?;
    let written = write_folder(&temporary, scalars, tensors, open);
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary); // the error that counts is the one above
    }
    written?;
    if place.exists() {
        fs::remove_dir_all(&place).map_err(Error::io("replace", &place))?;
    }
    fs::rename(&temporary, &place).map_err(Error::io("create", &place))?;
    sync_dir(dir)?;
    let all = list(dir)?;
    for (_, old) in &all[..all.len().saturating_sub(keep.max(1))] {
        fs::remove_dir_all(old).map_err(Error::io("remove", old))?;
    }
    Ok(place)
}

fn write_folder(dir: &Path, scalars: &Scalars, tensors: &BTreeMap<String, Tensor>, open: Open) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let bytes = to_safetensors(tensors)?;
    let scalars = Scalars {
        tensors_len: bytes.len() as u64,
        tensors_crc32: crc32fast::hash(&bytes),
        ..scalars.clone()
    };
    let json = serde_json::to_vec_pretty(&scalars).map_err(|err| Error::Bug(err.to_string()))?;
    for (name, bytes) in [(TENSORS, &bytes), (SCALARS, &json)] {
        let path = dir.join(name);
        let mut file = open(&path).map_err(Error::io("create", &path))?;
        file.write_all(bytes).and_then(|()| sync(&file)).map_err(Error::io("write", &path))?;
    }
    sync_dir(dir)
}

/// Syncs a file; what is no plain file (a device in a test) has nothing to sync.
fn sync(file: &File) -> io::Result<()> {
    if file.metadata()?.is_file() { file.sync_all() } else { Ok(()) }
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(Error::io("sync", dir))
}

fn remove_leftovers(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(".step-") && name.ends_with(".tmp") {
            fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// The whole checkpoints of a folder, oldest first, with the step each continues at.
///
/// # Errors
/// If the folder exists and cannot be read.
pub fn list(dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let mut all = Vec::new();
    if !dir.exists() {
        return Ok(all);
    }
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(step) = name.strip_prefix("step-").and_then(|digits| digits.parse().ok()) {
            all.push((step, path));
        }
    }
    all.sort();
    Ok(all)
}

/// Reads a checkpoint folder.
///
/// # Errors
/// If a file is missing, damaged or of another version.
pub fn load(dir: &Path) -> Result<(Scalars, BTreeMap<String, Tensor>)> {
    let damaged = |problem: String| Error::Content {
        path: dir.to_owned(),
        problem,
        hint: "remove this checkpoint folder to continue from the one before it".to_owned(),
    };
    let path = dir.join(SCALARS);
    let json = fs::read(&path).map_err(Error::io("read", &path))?;
    let scalars: Scalars =
        serde_json::from_slice(&json).map_err(|err| damaged(format!("has no valid {SCALARS}: {err}")))?;
    if scalars.version != 1 {
        return Err(damaged(format!("is of version {}, this program reads 1", scalars.version)));
    }
    let path = dir.join(TENSORS);
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    if bytes.len() as u64 != scalars.tensors_len || crc32fast::hash(&bytes) != scalars.tensors_crc32 {
        return Err(damaged(format!(
            "has a damaged {TENSORS}: expected {} bytes with CRC {:08x}, found {} with {:08x}",
            scalars.tensors_len,
            scalars.tensors_crc32,
            bytes.len(),
            crc32fast::hash(&bytes)
        )));
    }
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
    Ok((scalars, tensors.into_iter().collect()))
}

/// The bytes of a safetensors file with these tensors, sorted by name.
///
/// # Errors
/// If a tensor cannot be read back from its device, or has a dtype that is not f32, f64, u32, i64 or u8.
pub fn to_safetensors(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    struct Owned {
        dtype: safetensors::Dtype,
        shape: Vec<usize>,
        bytes: Vec<u8>,
    }
    impl safetensors::View for Owned {
        fn dtype(&self) -> safetensors::Dtype {
            self.dtype
        }
        fn shape(&self) -> &[usize] {
            &self.shape
        }
        fn data(&self) -> std::borrow::Cow<'_, [u8]> {
            (&self.bytes[..]).into()
        }
        fn data_len(&self) -> usize {
            self.bytes.len()
        }
    }
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let flat = tensor.flatten_all()?;
        let (dtype, bytes) = match tensor.dtype() {
            DType::F32 => (safetensors::Dtype::F32, le_bytes(&flat.to_vec1::<f32>()?, f32::to_le_bytes)),
            DType::F64 => (safetensors::Dtype::F64, le_bytes(&flat.to_vec1::<f64>()?, f64::to_le_bytes)),
            DType::U32 => (safetensors::Dtype::U32, le_bytes(&flat.to_vec1::<u32>()?, u32::to_le_bytes)),
            DType::I64 => (safetensors::Dtype::I64, le_bytes(&flat.to_vec1::<i64>()?, i64::to_le_bytes)),
            DType::U8 => (safetensors::Dtype::U8, flat.to_vec1::<u8>()?),
            other => return Err(Error::Bug(format!("checkpoint tensor `{name}` has dtype {other:?}"))),
        };
        views.push((name, Owned { dtype, shape: tensor.dims().to_vec(), bytes }));
    }
    safetensors::serialize(views, None).map_err(|err| Error::Bug(err.to_string()))
}

fn le_bytes<T: Copy, const N: usize>(values: &[T], to: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| to(v)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scalars(next_step: usize) -> Scalars {
        Scalars {
            version: 1,
            next_step,
            seed: 7,
            config_sha256: "00".into(),
            metrics_len: 12,
            tensors_len: 0,
            tensors_crc32: 0,
        }
    }

    fn tensors(value: f32) -> BTreeMap<String, Tensor> {
        let t = Tensor::new(&[[value, -0.0, f32::MIN_POSITIVE]], &Device::Cpu).unwrap();
        [("a.weight".to_owned(), t)].into()
    }

    #[test]
    fn a_checkpoint_comes_back_bit_for_bit_and_two_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for step in [1, 2, 3] {
            save(dir.path(), &scalars(step), &tensors(step as f32), 2).unwrap();
        }
        let all = list(dir.path()).unwrap();
        assert_eq!(all.iter().map(|(s, _)| *s).collect::<Vec<_>>(), [2, 3]);
        let (got, t) = load(&all[1].1).unwrap();
        assert_eq!((got.next_step, got.seed, got.metrics_len), (3, 7, 12));
        let bits: Vec<u32> = t["a.weight"]
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .map(|v| v.to_bits())
            .collect();
        assert_eq!(bits, [3f32.to_bits(), (-0f32).to_bits(), f32::MIN_POSITIVE.to_bits()]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_reported_and_leaves_the_previous_checkpoint_whole() {
        let dir = tempfile::tempdir().unwrap();
        let good = save(dir.path(), &scalars(1), &tensors(1.0), 2).unwrap();
        // Every write to /dev/full fails with "no space left on device".
        let full: Open = |_| File::options().write(true).open("/dev/full");
        let err = save_with(dir.path(), &scalars(2), &tensors(2.0), 2, full).unwrap_err();
        assert!(err.to_string().contains("the disk is full"), "{err}");
        assert_eq!(err.exit_code(), 1);
        assert_eq!(list(dir.path()).unwrap(), [(1, good.clone())]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing half-written stays");
        load(&good).unwrap();
    }

    #[test]
    fn a_damaged_checkpoint_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let place = save(dir.path(), &scalars(1), &tensors(1.0), 2).unwrap();
        let file = place.join(TENSORS);
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        let err = load(&place).unwrap_err().to_string();
        assert!(err.contains("damaged") && err.contains("step-000001"), "{err}");
        fs::write(&file, &bytes[..10]).unwrap();
        assert!(load(&place).unwrap_err().to_string().contains("found 10 with"), "length is checked too");
    }

    #[test]
    fn what_a_crash_left_half_written_is_ignored_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(".step-000009.tmp")).unwrap();
        assert!(list(dir.path()).unwrap().is_empty());
        save(dir.path(), &scalars(1), &tensors(1.0), 2).unwrap();
        assert!(!dir.path().join(".step-000009.tmp").exists());
    }
}
