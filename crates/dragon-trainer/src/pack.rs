//! Putting trained parts together into one small model folder.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use dragon_nn::write_safetensors;

use crate::error::{Error, Result};
use crate::run::write_atomic;

/// Copies a part (`config.json`, `tokenizer.json` if there is one, and the weights as f16) from `from` to `to`; gives
/// the size of the weights in bytes.
///
/// # Errors
/// If a file is missing or broken, a weight does not fit into f16, or something cannot be written.
pub fn copy_part(from: &Path, to: &Path) -> Result<u64> {
    std::fs::create_dir_all(to).map_err(Error::io("create", to))?;
    for name in ["config.json", "tokenizer.json"] {
        let path = from.join(name);
        if name == "config.json" || path.exists() {
            let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
            write_atomic(&to.join(name), &bytes)?;
        }
    }
    let path = from.join("model.safetensors");
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let context = || format!("cannot pack `{}`", path.display());
    let tensors =
        candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(Error::input(context()))?;
    let mut halves = BTreeMap::new();
    for (name, tensor) in tensors {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if let Some(value) = values.iter().find(|v| v.is_nan() || v.abs() > 65504.0) {
            return Err(Error::Content {
                path,
                problem: format!("holds {value} in `{name}`, which f16 cannot store"),
                hint: "pack an earlier checkpoint".into(),
            });
        }
        halves.insert(name, tensor.to_dtype(DType::F16)?);
    }
    let out = to.join("model.safetensors");
    write_safetensors(&out, &halves, &BTreeMap::new())
        .map_err(Error::input(format!("cannot write `{}`", out.display())))?;
    Ok(std::fs::metadata(&out).map_err(Error::io("read", &out))?.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;

    #[test]
    fn weights_are_halved_and_what_does_not_fit_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir(&from).unwrap();
        std::fs::write(from.join("config.json"), "{}").unwrap();
        let save = |value: f32| {
            let tensor = Tensor::new(&[0.5f32, value], &Device::Cpu).unwrap();
            let all = BTreeMap::from([("w".to_owned(), tensor)]);
            write_safetensors(from.join("model.safetensors"), &all, &BTreeMap::new()).unwrap();
        };
        save(-2.0);
        copy_part(&from, &to).unwrap();
        let read = candle_core::safetensors::load(to.join("model.safetensors"), &Device::Cpu).unwrap();
        assert_eq!(read["w"].dtype(), DType::F16);
        assert_eq!(read["w"].to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [0.5, -2.0]);
        for value in [1e5, f32::NAN] {
            save(value);
            assert!(copy_part(&from, &to).unwrap_err().to_string().contains("`w`"));
        }
        assert!(copy_part(&dir.path().join("none"), &to).unwrap_err().to_string().contains("none"));
    }
}
