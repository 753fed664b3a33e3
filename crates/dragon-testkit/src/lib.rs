//! Checks shared by the tests of every crate: closeness of tensors, golden files, gradients against finite
//! differences.
//!
//! - [`assert_close`] with [`Tol`]: the one way to compare numbers.
//! - [`Golden`]: a safetensors file of inputs, weights and expected outputs beside a test.
//! - [`gradient_check`]: backward against central differences in f64.

use candle_core::{DType, Device, Result, Tensor, Var};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Tolerance of a comparison: `|got - want| <= atol + rtol * |want|`, element by element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tol {
    /// Absolute part.
    pub atol: f64,
    /// Part relative to the wanted value.
    pub rtol: f64,
}

impl Tol {
    /// One layer in f32.
    pub const LAYER: Tol = Tol { atol: 1e-5, rtol: 1e-4 };
    /// A tiny model in f32, end to end.
    pub const MODEL: Tol = Tol { atol: 1e-4, rtol: 1e-3 };
    /// Anything computed in bf16.
    pub const BF16: Tol = Tol { atol: 2e-2, rtol: 2e-2 };
    /// Statistics in f64.
    pub const STATISTICS: Tol = Tol { atol: 1e-9, rtol: 1e-9 };
    /// Bit for bit (up to the sign of zero).
    pub const EXACT: Tol = Tol { atol: 0.0, rtol: 0.0 };
}

/// Panics unless the tensors have one shape and every element of `got` lies within `tol` of `want`.
///
/// Values are compared in f64 whatever the dtypes. Equal infinities agree; a NaN agrees with nothing. The message
/// names the first offending index with both values, and the largest error with its index.
#[track_caller]
pub fn assert_close(got: &Tensor, want: &Tensor, tol: Tol) {
    assert_eq!(got.dims(), want.dims(), "shapes differ: got {:?}, want {:?}", got.dims(), want.dims());
    let dims = got.dims().to_vec();
    if let Some(message) = difference(&values(got), &values(want), &dims, tol) {
        panic!("{message}");
    }
}

/// [`assert_close`] for plain slices.
#[track_caller]
pub fn assert_slices_close(got: &[f64], want: &[f64], tol: Tol) {
    assert_eq!(got.len(), want.len(), "lengths differ: got {}, want {}", got.len(), want.len());
    if let Some(message) = difference(got, want, &[got.len()], tol) {
        panic!("{message}");
    }
}

/// Why `got` is not close to `want`, or `None` when it is.
fn difference(got: &[f64], want: &[f64], dims: &[usize], tol: Tol) -> Option<String> {
    let mut first = None;
    let mut n_bad = 0;
    let (mut worst, mut worst_index) = (0.0f64, 0);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = if g == w { 0.0 } else { (g - w).abs() };
        // Asking for closeness rather than distance also catches NaN.
        let close = g == w || error <= tol.atol + tol.rtol * w.abs();
        if !close {
            n_bad += 1;
            first.get_or_insert(i);
        }
        if error > worst || (error.is_nan() && !worst.is_nan()) {
            (worst, worst_index) = (error, i);
        }
    }
    let first = first?;
    Some(format!(
        "{n_bad} of {} elements differ (atol {:e}, rtol {:e})\n  first at {:?}: got {:e}, want {:e}\n  largest error \
         {worst:e} at {:?}: got {:e}, want {:e}",
        got.len(),
        tol.atol,
        tol.rtol,
        unravel(first, dims),
        got[first],
        want[first],
        unravel(worst_index, dims),
        got[worst_index],
        want[worst_index],
    ))
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .and_then(|t| t.flatten_all())
        .and_then(|t| t.to_device(&Device::Cpu))
        .and_then(|t| t.to_vec1())
        .expect("a tensor of any float or integer type converts to f64")
}

fn unravel(mut i: usize, dims: &[usize]) -> Vec<usize> {
    let mut index = vec![0; dims.len()];
    for (slot, &d) in index.iter_mut().zip(dims).rev() {
        *slot = i % d;
        i /= d;
    }
    index
}

/// A file or folder below `fixtures/`.
pub fn fixture(name: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A golden file: tensors by name, made by the generator that lies beside it.
pub struct Golden {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    /// Reads `fixtures/NAME` onto the CPU.
    ///
    /// # Panics
    /// As [`Golden::read`].
    #[track_caller]
    pub fn fixture(name: impl AsRef<Path>) -> Golden {
        Golden::read(fixture(name))
    }

    /// Reads a safetensors file onto the CPU.
    ///
    /// # Panics
    /// If the file is missing or broken; the message has its path.
    #[track_caller]
    pub fn read(path: impl AsRef<Path>) -> Golden {
        let path = path.as_ref().to_path_buf();
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
            .unwrap_or_else(|e| panic!("golden file `{}`: {e}", path.display()));
        Golden { path, tensors }
    }

    /// The tensor called `name`.
    ///
    /// # Panics
    /// If there is none; the message lists what the file holds.
    #[track_caller]
    pub fn get(&self, name: &str) -> Tensor {
        self.tensors.get(name).cloned().unwrap_or_else(|| {
            let mut names: Vec<_> = self.tensors.keys().collect();
            names.sort();
            panic!("golden file `{}` has no tensor `{name}`; it holds {names:?}", self.path.display())
        })
    }

    /// All tensors whose names start with `prefix`, with the prefix removed (the weights of a module, say).
    pub fn with_prefix(&self, prefix: &str) -> HashMap<String, Tensor> {
        self.tensors
            .iter()
            .filter_map(|(name, t)| name.strip_prefix(prefix).map(|rest| (rest.to_string(), t.clone())))
            .collect()
    }
}

/// Compares the backward pass of `f` with central differences, for every element of every input.
///
/// `f` maps the inputs to a tensor of any shape; it is reduced to a scalar by fixed pseudo-random weights, so that
/// no error cancels. Inputs should be f64 (the step is 1e-5, which leaves about ten digits) and small, since `f`
/// runs twice per element.
///
/// # Panics
/// If an input gets no gradient, or an element is off by more than `tol`.
///
/// # Errors
/// Whatever `f` returns.
#[track_caller]
pub fn gradient_check(inputs: &[Tensor], tol: Tol, f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    const STEP: f64 = 1e-5;
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let out = f(&tensors)?;
    let n_out = out.elem_count();
    // A fixed irrational stride spreads the weights over (-1, 1) without a generator.
    let weights: Vec<f64> =
        (0..n_out).map(|i| ((i as f64 + 1.0) * 0.618_033_988_75).fract() * 2.0 - 1.0).collect();
    let weights = Tensor::from_vec(weights, out.dims(), out.device())?;
    let loss = |out: &Tensor| -> Result<Tensor> { (out.to_dtype(DType::F64)? * &weights)?.sum_all() };
    let grads = loss(&out)?.backward()?;
    for (i, input) in inputs.iter().enumerate() {
        let got = grads.get(&vars[i]).unwrap_or_else(|| panic!("input {i} gets no gradient"));
        let base = values(input);
        let mut want = Vec::with_capacity(base.len());
        for j in 0..base.len() {
            let mut side = [0.0; 2];
            for (slot, step) in side.iter_mut().zip([STEP, -STEP]) {
                let mut moved = base.clone();
                moved[j] += step;
                let moved = Tensor::from_vec(moved, input.dims(), input.device())?.to_dtype(input.dtype())?;
                let mut args: Vec<Tensor> = inputs.to_vec();
                args[i] = moved;
                *slot = loss(&f(&args)?)?.to_scalar::<f64>()?;
            }
            want.push((side[0] - side[1]) / (2.0 * STEP));
        }
        assert_eq!(got.dims(), input.dims(), "gradient of input {i} has another shape");
        if let Some(message) = difference(&values(got), &want, input.dims(), tol) {
            panic!("gradient of input {i}: {message}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_tensors_are_close() {
        let t = Tensor::new(&[[1f32, f32::INFINITY], [-2.0, 0.0]], &Device::Cpu).unwrap();
        assert_close(&t, &t, Tol::EXACT);
    }

    #[test]
    #[should_panic(expected = "first at [1, 0]: got -2e0, want -3e0")]
    fn the_message_names_the_element() {
        let got = Tensor::new(&[[1f32, 2.0], [-2.0, 0.0]], &Device::Cpu).unwrap();
        let want = Tensor::new(&[[1f32, 2.0], [-3.0, 0.5]], &Device::Cpu).unwrap();
        assert_close(&got, &want, Tol::LAYER);
    }

    #[test]
    #[should_panic(expected = "1 of 1 elements differ")]
    fn nan_is_close_to_nothing() {
        let nan = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
        assert_close(&nan, &nan, Tol { atol: 1.0, rtol: 1.0 });
    }

    #[test]
    fn a_right_gradient_passes() {
        let x = Tensor::new(&[0.3f64, -1.2, 2.0], &Device::Cpu).unwrap();
        gradient_check(&[x.clone(), x], Tol { atol: 1e-8, rtol: 1e-6 }, |x| x[0].sin()? * x[1].sqr()?)
            .unwrap();
    }

    #[test]
    #[should_panic(expected = "input 1 gets no gradient")]
    fn a_detached_input_is_found() {
        let x = Tensor::new(&[0.3f64, -1.2], &Device::Cpu).unwrap();
        gradient_check(&[x.clone(), x], Tol::LAYER, |x| &x[0] * x[1].detach()).unwrap();
    }
}
