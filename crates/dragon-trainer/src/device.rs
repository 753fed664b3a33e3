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
            hint: "leave --device out: this version runs on the CPU".into(),
        });
    }
    Device::new_cuda(gpu).map_err(Error::input(format!("cannot use the device `{name}`")))
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
        if !candle_core::utils::cuda_is_available() {
            assert!(device("cuda:0").unwrap_err().to_string().contains("without CUDA"));
        }
    }
}
