//! Safetensors files written whole or not at all.

use candle_core::{Device, Error, Result, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes tensors and metadata as safetensors: to a temporary file in the same folder, flushed to disk, then renamed.
/// A reader sees the old file or the new one, never half of one.
///
/// # Errors
/// If the file cannot be written (the message has its path); the temporary file is removed and an older file stays.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    // safetensors panics inside `View::data` on a failed copy, hence the copy to contiguous host memory first.
    let mut host: Vec<(&String, Tensor)> = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        host.push((name, tensor.detach().to_device(&Device::Cpu)?.contiguous()?));
    }
    let metadata: Option<HashMap<String, String>> =
        (!metadata.is_empty()).then(|| metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect());
    let bytes = safetensors::serialize(host, metadata)
        .map_err(|e| Error::Msg(format!("cannot serialise `{}`: {e}", path.display())))?;
    write_atomically(path, &bytes).map_err(|e| Error::Msg(format!("cannot write `{}`: {e}", path.display())))
}

/// Writes a file through a temporary sibling, `fsync` and rename.
///
/// # Errors
/// The error of the system; the temporary file is removed.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let mut name = path.file_name().map(|n| n.to_os_string()).unwrap_or_default();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = folder.join(name);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    if let Err(e) = write() {
        // The first error is the one to report; what is left over is removed if it can be.
        let _ = fs::remove_file(&temporary);
        return Err(e);
    }
    // The rename itself survives a power cut only once the folder is on disk; not every file system allows this.
    if let Ok(folder) = File::open(&folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn a_file_round_trips_with_metadata() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        let t = Tensor::arange(0f32, 6f32, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        let tensors = BTreeMap::from([("a".to_string(), t.t().unwrap()), ("b".to_string(), t.clone())]);
        write_safetensors(&path, &tensors, &BTreeMap::from([("k".into(), "v".into())])).unwrap();
        let back = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        assert_eq!(back["a"].to_vec2::<f32>().unwrap(), t.t().unwrap().to_vec2::<f32>().unwrap());
        assert_eq!(back["b"].dtype(), DType::F32);
        let bytes = fs::read(&path).unwrap();
        let (_, meta) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(meta.metadata().as_ref().unwrap()["k"], "v");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_failed_write_names_the_file_and_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("folder");
        fs::create_dir(&target).unwrap(); // renaming a file onto a folder fails
        let err = write_safetensors(&target, &BTreeMap::new(), &BTreeMap::new()).unwrap_err();
        assert!(err.to_string().contains("folder"), "{err}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
