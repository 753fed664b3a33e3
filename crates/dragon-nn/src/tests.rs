//! What every operation must satisfy: the fast form equals the plain one, its gradients equal finite differences,
//! and its results do not depend on the number of threads.

use crate::*;
use candle_core::{DType, Device, Result, Tensor, Var};
use dragon_testkit::{Tol, assert_close, gradient_check};

const CPU: Device = Device::Cpu;

fn noise(key: &str, shape: &[usize]) -> Tensor {
    Rng::from_key(key, 0).normal_tensor(shape, DType::F64, &CPU).unwrap()
}

/// Checks `fast` against `plain`, forward and backward in f32, and its gradients in f64; then forward and backward
/// under 1, 2 and 5 threads, bit for bit.
fn check(
    inputs: &[Tensor],
    fast: impl Fn(&[Tensor]) -> Result<Tensor> + Sync,
    plain: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    gradient_check(inputs, Tol { atol: 1e-7, rtol: 1e-5 }, &fast).unwrap();
    let tol = Tol { atol: 2e-5, rtol: 1e-4 };
    let want = run(inputs, &plain);
    for n_threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        let got = pool.install(|| run(inputs, &fast));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.dims(), want.dims(), "result {i}");
            assert_close(got, want, tol);
        }
    }
    same_on_any_number_of_threads(inputs, fast);
}

fn same_on_any_number_of_threads(inputs: &[Tensor], fast: impl Fn(&[Tensor]) -> Result<Tensor> + Sync) {
    let mut first: Option<Vec<Vec<f32>>> = None;
    for n_threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
        let got: Vec<Vec<f32>> = pool
            .install(|| run(inputs, &fast))
            .iter()
            .map(|t| t.flatten_all().unwrap().to_vec1().unwrap())
            .collect();
        match &first {
            None => first = Some(got),
            Some(want) => assert!(&got == want, "{n_threads} threads change the result"),
        }
    }
}

/// The result of `f` in f32 and the gradient of each input.
fn run(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Vec<Tensor> {
    let vars: Vec<Var> =
        inputs.iter().map(|t| Var::from_tensor(&t.to_dtype(DType::F32).unwrap()).unwrap()).collect();
    let args: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&args).unwrap();
    let weights = noise("weights of the loss", y.dims()).to_dtype(DType::F32).unwrap();
    let grads = (&y * weights).unwrap().sum_all().unwrap().backward().unwrap();
    let mut out = vec![y];
    out.extend(vars.iter().enumerate().map(|(i, v)| {
        grads.get(v.as_tensor()).unwrap_or_else(|| panic!("input {i} gets no gradient")).contiguous().unwrap()
    }));
    out
}

#[test]
fn linear_is_right() {
    for (rows, n_in, n_out) in [(1, 1, 1), (3, 5, 7), (1, 33, 17), (13, 20, 1), (8, 16, 48)] {
        let inputs = [noise("x", &[rows, n_in]), noise("w", &[n_out, n_in]), noise("b", &[n_out])];
        check(&inputs, |t| linear(&t[0], &t[1], Some(&t[2])), |t| linear::plain::linear(&t[0], &t[1], Some(&t[2])));
        check(&inputs[..2], |t| linear(&t[0], &t[1], None), |t| linear::plain::linear(&t[0], &t[1], None));
    }
    // A non-contiguous input of higher rank.
    let inputs = [noise("x", &[2, 6, 3]), noise("w", &[4, 6])];
    check(
        &inputs,
        |t| linear(&t[0].transpose(1, 2)?, &t[1], None),
        |t| linear::plain::linear(&t[0].transpose(1, 2)?, &t[1], None),
    );
}

#[test]
fn large_products_do_not_depend_on_threads() {
    let inputs = [noise("x", &[700, 130]), noise("w", &[150, 130]), noise("b", &[150])];
    same_on_any_number_of_threads(&inputs, |t| linear(&t[0], &t[1], Some(&t[2])));
    let inputs = [noise("x", &[2, 3000, 12]), noise("w", &[20, 12, 7]), noise("b", &[20])];
    let spec = Conv1dSpec { padding: 9, dilation: 3, ..Default::default() };
    same_on_any_number_of_threads(&inputs, |t| conv1d(&t[0], &t[1], Some(&t[2]), spec));
}

#[test]
fn large_products_equal_the_plain_ones() {
    let inputs = [noise("x", &[700, 130]), noise("w", &[150, 130]), noise("b", &[150])];
    let got = run(&inputs, |t| linear(&t[0], &t[1], Some(&t[2])));
    let want = run(&inputs, |t| linear::plain::linear(&t[0], &t[1], Some(&t[2])));
    for (got, want) in got.iter().zip(&want) {
        assert_close(got, want, Tol { atol: 3e-4, rtol: 1e-4 }); // sums of 700 terms
    }
    let inputs = [noise("x", &[2, 3000, 12]), noise("w", &[20, 12, 7]), noise("b", &[20])];
    let spec = Conv1dSpec { padding: 9, dilation: 3, ..Default::default() };
    let got = run(&inputs, |t| conv1d(&t[0], &t[1], Some(&t[2]), spec));
    let want = run(&inputs, |t| conv1d::plain::conv1d(&t[0], &t[1], Some(&t[2]), spec));
    for (got, want) in got.iter().zip(&want) {
        assert_close(got, want, Tol { atol: 1e-3, rtol: 1e-4 }); // sums of 6000 terms
    }
}

#[test]
fn rows_of_linear_do_not_depend_on_their_number() {
    for (n_in, n_out) in [(1, 1), (2, 3), (7, 1), (64, 16), (300, 33), (1100, 70)] {
        let x = noise("x", &[97, n_in]).to_dtype(DType::F32).unwrap();
        let w = noise("w", &[n_out, n_in]).to_dtype(DType::F32).unwrap();
        let all: Vec<Vec<f32>> = linear(&x, &w, None).unwrap().to_vec2().unwrap();
        for (start, n) in [(0, 1), (5, 1), (96, 1), (3, 2), (10, 7), (0, 50)] {
            let some: Vec<Vec<f32>> = linear(&x.narrow(0, start, n).unwrap(), &w, None).unwrap().to_vec2().unwrap();
            assert!(some[..] == all[start..start + n], "{n} rows of {n_in} -> {n_out}");
        }
    }
}

#[test]
fn conv1d_is_right() {
    let spec = |stride, padding, dilation, groups| Conv1dSpec { stride, padding, dilation, groups };
    for (t, c_in, c_out, k, spec) in [
        (9, 3, 4, 3, spec(1, 1, 1, 1)),
        (9, 1, 2, 7, spec(1, 3, 1, 1)),
        (11, 2, 3, 3, spec(1, 3, 3, 1)),
        (12, 3, 2, 4, spec(2, 1, 1, 1)),
        (13, 2, 2, 5, spec(3, 0, 1, 1)),
        (14, 4, 6, 3, spec(2, 2, 2, 2)),
        (7, 2, 18, 1, spec(1, 0, 1, 1)),
        (7, 2, 2, 1, spec(4, 2, 1, 2)),
        (3, 2, 2, 3, spec(1, 4, 1, 1)), // more padding than reach
    ] {
        let inputs = [noise("x", &[2, t, c_in]), noise("w", &[c_out, c_in / spec.groups, k]), noise("b", &[c_out])];
        let plain = |t: &[Tensor]| conv1d::plain::conv1d(&t[0], &t[1], t.get(2), spec);
        check(&inputs, |t| conv1d(&t[0], &t[1], Some(&t[2]), spec), plain);
        check(&inputs[..2], |t| conv1d(&t[0], &t[1], None, spec), plain);
    }
}

#[test]
fn conv_transpose1d_is_right() {
    let spec = |stride, padding, output_padding, dilation, groups| ConvTranspose1dSpec {
        stride,
        padding,
        output_padding,
        dilation,
        groups,
    };
    for (t, c_in, c_out, k, spec) in [
        (5, 3, 4, 3, spec(1, 1, 0, 1, 1)),
        (5, 2, 3, 4, spec(2, 1, 0, 1, 1)),
        (4, 2, 2, 8, spec(4, 2, 0, 1, 1)),
        (4, 2, 2, 5, spec(3, 1, 2, 1, 1)),
        (4, 2, 3, 2, spec(3, 0, 1, 1, 1)), // phases without taps
        (5, 4, 6, 3, spec(2, 2, 1, 2, 2)),
    ] {
        let inputs = [noise("x", &[2, t, c_in]), noise("w", &[c_in, c_out / spec.groups, k]), noise("b", &[c_out])];
        let plain = |t: &[Tensor]| conv_transpose1d::plain::conv_transpose1d(&t[0], &t[1], t.get(2), spec);
        check(&inputs, |t| conv_transpose1d(&t[0], &t[1], Some(&t[2]), spec), plain);
        check(&inputs[..2], |t| conv_transpose1d(&t[0], &t[1], None, spec), plain);
    }
}
