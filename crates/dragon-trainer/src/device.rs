//! Where tensors live.

use candle_core::Device;

use crate::error::{Error, Result};

/// The device of a name: `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// If the name is another, the program was built without CUDA, or there is no such GPU. Nothing else is used instead.
pub fn device(name: &str) -> Result<Device> {
    let gpu = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    let Some(gpu) = gpu else {
        return Err(Error::Data {
            problem: format!("there is no device `{name}`: expected `cpu`, `cuda` or `cuda:N`"),
            hint: "leave --device out for the CPU".into(),
        });
    };
    if !candle_core::utils::cuda_is_available() {
        return Err(Error::Data {
            problem: format!("the device `{name}` was asked for, but this program was built without CUDA"),
            hint: "build it with CUDA (`cargo xtask COMMAND --device cuda` does, or cargo's `--features cuda`), or \
                   leave --device out for the CPU"
                .into(),
        });
    }
    // One stream for all threads: candle's other choice, a stream for each, leaves what one thread wrote unordered with
    // what another reads, and embeddings are computed on several.
    Device::new_cuda_with_stream(gpu).map_err(Error::input(format!(
        "cannot use the device `{name}`\nhint: `nvidia-smi` lists the GPUs, from 0; leave --device out for the CPU"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_is_an_error_and_never_replaced() {
        assert!(matches!(device("cpu"), Ok(Device::Cpu)));
        for name in ["gpu", "cuda:x", "mps", ""] {
            assert!(device(name).unwrap_err().to_string().contains("cuda:N"), "{name}");
        }
    }

    #[test]
    fn a_gpu_that_cannot_be_used_is_an_error_that_says_what_to_do() {
        let with_cuda = candle_core::utils::cuda_is_available();
        let parts: [&str; 2] = match with_cuda {
            false => ["was built without CUDA", "hint: build it with CUDA"],
            true => ["cannot use the device `cuda:999`", "hint: `nvidia-smi` lists the GPUs"],
        };
        let err = device("cuda:999").unwrap_err();
        assert!(parts.iter().all(|part| err.to_string().contains(part)), "{err}");
        assert_eq!(err.exit_code(), 1);
    }
}
