//! What every operation must satisfy: the fast form equals the plain one, its gradients equal finite differences,
//! and its results do not depend on the number of threads.

use crate::swiglu::Halves;
use crate::*;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use dragon_testkit::{Golden, Tol, assert_close, gradient_check};

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
            Some(want) => assert!(got == *want, "{n_threads} threads change the result"),
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
        check(
            &inputs,
            |t| linear(&t[0], &t[1], Some(&t[2])),
            |t| linear::plain::linear(&t[0], &t[1], Some(&t[2])),
        );
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
fn rows_of_a_large_linear_do_not_depend_on_their_number() {
    // More than 1024 rows and fewer take different ways through 2^18 weights; 129 columns are two parts and one more.
    let x = noise("x", &[1030, 2100]).to_dtype(DType::F32).unwrap();
    let w = noise("w", &[129, 2100]).to_dtype(DType::F32).unwrap();
    let all: Vec<Vec<f32>> = linear(&x, &w, None).unwrap().to_vec2().unwrap();
    let some: Vec<Vec<f32>> = linear(&x.narrow(0, 3, 7).unwrap(), &w, None).unwrap().to_vec2().unwrap();
    assert_eq!(some, all[3..10]);
}

#[test]
fn gradients_of_rows_of_a_large_linear_do_not_depend_on_their_number() {
    // As above, backwards: parts of 128 of 257 columns, depth in parts of 384 (256 without AVX-512).
    let w = noise("w", &[1100, 257]).to_dtype(DType::F32).unwrap();
    let (x, g) = (noise("x", &[1030, 257]), noise("g", &[1030, 1100]));
    let gradient = |first: usize, n: usize| -> Vec<Vec<f32>> {
        let rows = |t: &Tensor| t.narrow(0, first, n).unwrap().to_dtype(DType::F32).unwrap();
        let x = Var::from_tensor(&rows(&x).copy().unwrap()).unwrap();
        let loss = (linear(&x, &w, None).unwrap() * rows(&g)).unwrap().sum_all().unwrap();
        loss.backward().unwrap().get(&x).unwrap().to_vec2().unwrap()
    };
    assert_eq!(gradient(3, 7), gradient(0, 1030)[3..10]);
    let inputs = [x.narrow(0, 0, 9).unwrap(), w];
    let got = run(&inputs, |t| linear(&t[0], &t[1], None));
    let want = run(&inputs, |t| linear::plain::linear(&t[0], &t[1], None));
    for (got, want) in got.iter().zip(&want) {
        assert_close(got, want, Tol { atol: 3e-4, rtol: 1e-4 }); // sums of 1100 terms
    }
}

#[test]
fn rows_that_are_copied_side_by_side_give_the_same_sums() {
    // 2060 rows in blocks of 192 and a depth of 256 and 5 more: 32 panels or more of a task are made from copies of
    // the rows, of few rows from the rows themselves. A tap that begins before the first row keeps its block from it.
    let x = noise("x", &[2060, 261]).to_dtype(DType::F32).unwrap();
    let w = noise("w", &[1050, 261]).to_dtype(DType::F32).unwrap();
    let all: Vec<Vec<f32>> = linear(&x, &w, None).unwrap().to_vec2().unwrap();
    for first in [0, 190, 2050] {
        let some: Vec<Vec<f32>> =
            linear(&x.narrow(0, first, 10).unwrap(), &w, None).unwrap().to_vec2().unwrap();
        assert_eq!(some, all[first..first + 10], "from row {first}");
    }
    let x = x.reshape((1, 2060, 261)).unwrap();
    let w = noise("w", &[1050, 261, 3]).to_dtype(DType::F32).unwrap();
    let spec = Conv1dSpec { padding: 1, ..Default::default() };
    let all: Vec<Vec<f32>> = conv1d(&x, &w, None, spec).unwrap().squeeze(0).unwrap().to_vec2().unwrap();
    for first in [0, 190, 2040] {
        // The rows at both ends see zeros where the whole has neighbours.
        let some = conv1d(&x.narrow(1, first, 20).unwrap(), &w, None, spec).unwrap();
        let some: Vec<Vec<f32>> = some.squeeze(0).unwrap().to_vec2().unwrap();
        let (low, high) = (usize::from(first > 0), 20 - usize::from(first + 20 < 2060));
        assert_eq!(some[low..high], all[first + low..first + high], "from row {first}");
    }
}

#[test]
fn rows_of_linear_do_not_depend_on_their_number() {
    for (n_in, n_out) in [(1, 1), (2, 3), (7, 1), (64, 16), (300, 33), (1100, 70)] {
        let x = noise("x", &[97, n_in]).to_dtype(DType::F32).unwrap();
        let w = noise("w", &[n_out, n_in]).to_dtype(DType::F32).unwrap();
        let all: Vec<Vec<f32>> = linear(&x, &w, None).unwrap().to_vec2().unwrap();
        for (start, n) in [(0, 1), (5, 1), (96, 1), (3, 2), (10, 7), (0, 50)] {
            let some: Vec<Vec<f32>> =
                linear(&x.narrow(0, start, n).unwrap(), &w, None).unwrap().to_vec2().unwrap();
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
        let inputs =
            [noise("x", &[2, t, c_in]), noise("w", &[c_out, c_in / spec.groups, k]), noise("b", &[c_out])];
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
        let inputs =
            [noise("x", &[2, t, c_in]), noise("w", &[c_in, c_out / spec.groups, k]), noise("b", &[c_out])];
        let plain = |t: &[Tensor]| conv_transpose1d::plain::conv_transpose1d(&t[0], &t[1], t.get(2), spec);
        check(&inputs, |t| conv_transpose1d(&t[0], &t[1], Some(&t[2]), spec), plain);
        check(&inputs[..2], |t| conv_transpose1d(&t[0], &t[1], None, spec), plain);
    }
}

#[test]
fn norms_are_right() {
    for (b, t, c) in [(2, 3, 5), (1, 1, 1), (3, 2, 33)] {
        let x = noise("x", &[b, t, c]);
        let (w, bias) = (noise("w", &[c]), noise("b", &[c]));
        let (shift, scale) = (noise("shift", &[b, c]), noise("scale", &[b, c]));
        let eps = 1e-2; // large, so that a row of one element still has a gradient
        let all = [x.clone(), w.clone(), bias];
        check(
            &all,
            |t| layer_norm(&t[0], Some(&t[1]), Some(&t[2]), eps),
            |t| layer_norm::plain::layer_norm(&t[0], Some(&t[1]), Some(&t[2]), eps),
        );
        check(
            &all[..2],
            |t| layer_norm(&t[0], Some(&t[1]), None, eps),
            |t| layer_norm::plain::layer_norm(&t[0], Some(&t[1]), None, eps),
        );
        check(
            &all[..2],
            |t| layer_norm(&t[0], None, Some(&t[1]), eps),
            |t| layer_norm::plain::layer_norm(&t[0], None, Some(&t[1]), eps),
        );
        check(
            &all[..1],
            |t| layer_norm(&t[0], None, None, eps),
            |t| layer_norm::plain::layer_norm(&t[0], None, None, eps),
        );
        check(&all[..1], |t| rms_norm(&t[0], None, eps), |t| rms_norm::plain::rms_norm(&t[0], None, eps));
        check(
            &all[..2],
            |t| rms_norm(&t[0], Some(&t[1]), eps),
            |t| rms_norm::plain::rms_norm(&t[0], Some(&t[1]), eps),
        );
        check(
            &[x, shift, scale],
            |t| ada_layer_norm(&t[0], &t[1], &t[2], eps),
            |t| ada_layer_norm::plain::ada_layer_norm(&t[0], &t[1], &t[2], eps),
        );
    }
}

#[test]
fn element_wise_operations_are_right() {
    for shape in [&[2, 3, 5][..], &[1, 1, 1], &[40, 17]] {
        let x = [(noise("x", shape) * 2.0).unwrap()];
        check(&x, |t| gelu(&t[0]), |t| activation::plain::gelu(&t[0]));
        check(&x, |t| gelu_tanh(&t[0]), |t| activation::plain::gelu_tanh(&t[0]));
        check(&x, |t| silu(&t[0]), |t| activation::plain::silu(&t[0]));
        check(&x, |t| relu(&t[0]), |t| activation::plain::relu(&t[0]));
        check(&x, |t| leaky_relu(&t[0], 0.2), |t| activation::plain::leaky_relu(&t[0], 0.2));
        check(&x, |t| elu(&t[0]), |t| activation::plain::elu(&t[0]));
        check(&x, |t| softmax_last(&t[0]), |t| activation::plain::softmax_last(&t[0]));
        let c = *shape.last().unwrap();
        let with_alpha = [x[0].clone(), (noise("alpha", &[c]).abs().unwrap() + 0.3).unwrap()];
        check(&with_alpha, |t| snake(&t[0], &t[1]), |t| snake::plain::snake(&t[0], &t[1], &t[1]));
        let [x0, alpha] = with_alpha;
        let with_beta = [x0, alpha, (noise("beta", &[c]).abs().unwrap() + 0.4).unwrap()];
        check(&with_beta, |t| snake_beta(&t[0], &t[1], &t[2]), |t| snake::plain::snake(&t[0], &t[1], &t[2]));
        let mut double = shape.to_vec();
        *double.last_mut().unwrap() *= 2;
        let x = [noise("gates", &double)];
        check(&x, |t| swiglu(&t[0]), |t| swiglu::plain::swiglu(&t[0], Halves::GateFirst));
        check(&x, |t| swiglu_value_first(&t[0]), |t| swiglu::plain::swiglu(&t[0], Halves::ValueFirst));
    }
}

#[test]
fn large_row_wise_operations_do_not_depend_on_threads() {
    let x = noise("x", &[3, 2000, 34]);
    let (a, b) = (noise("a", &[34]).abs().unwrap(), noise("b", &[34]));
    let (shift, scale) = (noise("shift", &[3, 34]), noise("scale", &[3, 34]));
    same_on_any_number_of_threads(&[x.clone(), a.clone()], |t| snake(&t[0], &t[1]));
    same_on_any_number_of_threads(&[x.clone(), a, b], |t| layer_norm(&t[0], Some(&t[1]), Some(&t[2]), 1e-5));
    same_on_any_number_of_threads(&[x.clone(), shift, scale], |t| ada_layer_norm(&t[0], &t[1], &t[2], 1e-5));
    same_on_any_number_of_threads(std::slice::from_ref(&x), |t| swiglu(&t[0]));
    same_on_any_number_of_threads(std::slice::from_ref(&x), |t| softmax_last(&t[0]));
    same_on_any_number_of_threads(&[x], |t| gelu(&t[0]));
}

#[test]
fn parts_of_a_transformer_block_are_right() {
    for (b, t, c, hidden) in [(2, 3, 5, 4), (1, 1, 1, 1), (3, 40, 17, 33)] {
        let x = noise("x", &[b, t, c]);
        let inputs = [x.clone(), noise("in", &[2 * hidden, c]), noise("out", &[c + 1, hidden])];
        check(
            &inputs,
            |t| swiglu_feed_forward(&t[0], &t[1], &t[2]),
            |t| swiglu_feed_forward::plain::swiglu_feed_forward(&t[0], &t[1], &t[2]),
        );
        let inputs = [x, noise("gate", &[b, c]), noise("y", &[b, t, c])];
        check(
            &inputs,
            |t| gated_add(&t[0], &t[1], &t[2]),
            |t| gated_add::plain::gated_add(&t[0], &t[1], &t[2]),
        );
    }
    for (heads, head_dim, rotary_dim) in [(3, 8, 6), (1, 2, 2), (2, 4, 4)] {
        let angles = Rotary::new(rotary_dim, 100.0, 9);
        check(
            &[noise("x", &[2, 7, heads * head_dim])],
            |t| angles.apply(&t[0], heads),
            |t| rotary::plain::rotary(&angles, &t[0], heads),
        );
    }
}

#[test]
fn a_fused_feed_forward_equals_its_parts_bit_for_bit() {
    let inputs = [noise("x", &[2, 50, 40]), noise("in", &[96, 40]), noise("out", &[40, 48])];
    let fused = run(&inputs, |t| swiglu_feed_forward(&t[0], &t[1], &t[2]));
    let parts = run(&inputs, |t| linear(&swiglu(&linear(&t[0], &t[1], None)?)?, &t[2], None));
    for (fused, parts) in fused.iter().zip(&parts) {
        assert_close(fused, parts, Tol::EXACT);
    }
}

#[test]
fn rotary_products_depend_on_the_distance_only() {
    let angles = Rotary::new(8, 100.0, 32);
    let turned = |key: &str| {
        let x = noise(key, &[1, 1, 8]).to_dtype(DType::F32).unwrap().broadcast_as((1, 32, 8)).unwrap();
        angles.apply(&x, 1).unwrap()
    };
    let (q, k) = (turned("q"), turned("k"));
    let product = |i: usize, j: usize| -> f32 {
        let both = q.narrow(1, i, 1).unwrap() * k.narrow(1, j, 1).unwrap();
        both.unwrap().sum_all().unwrap().to_scalar().unwrap()
    };
    assert!((product(5, 2) - product(30, 27)).abs() < 1e-4);
    assert!((product(5, 2) - product(2, 5)).abs() > 1e-3);
}

#[test]
fn attention_is_right() {
    for (b, tq, tk, h, d, dv) in [(2, 3, 4, 2, 3, 2), (1, 1, 1, 1, 1, 1), (1, 70, 5, 1, 2, 2)] {
        let qkv = [noise("q", &[b, tq, h * d]), noise("k", &[b, tk, h * d]), noise("v", &[b, tk, h * dv])];
        check(
            &qkv,
            |t| attention(&t[0], &t[1], &t[2], h, None, 0.7),
            |t| attention::plain::attention(&t[0], &t[1], &t[2], h, None, 0.7),
        );
        for bias in [[b, h, tq, tk], [1, h, tq, tk], [b, 1, 1, tk], [1, 1, 1, tk]] {
            let constant = noise("bias", &bias);
            check(
                &qkv,
                |t| attention(&t[0], &t[1], &t[2], h, Some(&constant.to_dtype(t[0].dtype())?), 0.7),
                |t| {
                    attention::plain::attention(
                        &t[0],
                        &t[1],
                        &t[2],
                        h,
                        Some(&constant.to_dtype(t[0].dtype())?),
                        0.7,
                    )
                },
            );
            let mut inputs = qkv.to_vec();
            inputs.push(constant);
            check(
                &inputs,
                |t| attention(&t[0], &t[1], &t[2], h, Some(&t[3]), 0.7),
                |t| attention::plain::attention(&t[0], &t[1], &t[2], h, Some(&t[3]), 0.7),
            );
        }
    }
}

#[test]
fn a_masked_key_counts_for_nothing_and_a_blind_query_gives_zeros() {
    let (q, k, v) = (noise("q", &[1, 2, 4]), noise("k", &[1, 3, 4]), noise("v", &[1, 3, 4]));
    let inf = f64::NEG_INFINITY;
    let bias = Tensor::new(&[[[[0.0, inf, 0.3], [inf, inf, inf]]]], &CPU).unwrap();
    let got = attention(&q, &k, &v, 1, Some(&bias), 0.5).unwrap();
    let kept = Tensor::new(&[0u32, 2], &CPU).unwrap();
    let (k, v) = (k.index_select(&kept, 1).unwrap(), v.index_select(&kept, 1).unwrap());
    let bias = bias.narrow(2, 0, 1).unwrap().index_select(&kept, 3).unwrap();
    let want = attention(&q.narrow(1, 0, 1).unwrap(), &k, &v, 1, Some(&bias), 0.5).unwrap();
    assert_close(&got.narrow(1, 0, 1).unwrap(), &want, Tol::STATISTICS);
    assert_close(&got.narrow(1, 1, 1).unwrap(), &want.zeros_like().unwrap(), Tol::EXACT);
}

#[test]
fn large_attention_does_not_depend_on_threads_and_equals_the_plain_one() {
    let inputs = [noise("q", &[2, 150, 60]), noise("k", &[2, 130, 60]), noise("v", &[2, 130, 60])];
    same_on_any_number_of_threads(&inputs, |t| attention(&t[0], &t[1], &t[2], 3, None, 0.2));
    let got = run(&inputs, |t| attention(&t[0], &t[1], &t[2], 3, None, 0.2));
    let want = run(&inputs, |t| attention::plain::attention(&t[0], &t[1], &t[2], 3, None, 0.2));
    for (got, want) in got.iter().zip(&want) {
        assert_close(got, want, Tol { atol: 2e-5, rtol: 1e-4 });
    }
}

#[test]
fn operations_of_frozen_codecs_equal_the_plain_ones_on_any_number_of_threads() {
    for (b, t, c, h) in [(1, 1, 1, 1), (2, 5, 3, 20), (3, 300, 7, 33)] {
        let x = noise("x", &[b, t, c]);
        let layer = |key: &str, c: usize| {
            let get = |name: &str, shape: &[usize]| (noise(&format!("{key}.{name}"), shape) * 0.5).unwrap();
            LstmWeights {
                input: get("i", &[4 * h, c]),
                hidden: get("h", &[4 * h, h]),
                bias: get("b", &[4 * h]),
            }
        };
        let layers = [layer("first", c), layer("second", h), layer("third", h)];
        for n in 1..=3 {
            let got = lstm(&x, &layers[..n]).unwrap();
            let want = layers[..n].iter().try_fold(x.clone(), |x, layer| lstm::plain::layer(&x, layer));
            assert_close(&got, &want.unwrap(), Tol { atol: 5e-6, rtol: 1e-5 });
            same_forward_on_any_number_of_threads(|| lstm(&x, &layers[..n]));
            // A clip does not depend on the others, and the past not on what comes.
            let part = |x: &Tensor| x.narrow(0, b - 1, 1).unwrap().narrow(1, 0, t.div_ceil(2)).unwrap();
            assert_close(&lstm(&part(&x), &layers[..n]).unwrap(), &part(&got), Tol::EXACT);
        }
        assert!(lstm(&x, &[]).is_err());
    }
    for (b, t, c) in [(2, 3, 5), (1, 1, 1), (2, 3000, 33)] {
        // A mean far from zero, which a sum of squares would not survive.
        let x = (noise("x", &[b, t, c]) + 30.0).unwrap();
        let (w, bias) = (noise("w", &[c]), noise("b", &[c]));
        let got = group_norm(&x, &w, &bias, 1e-5).unwrap();
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let want = group_norm::plain::group_norm(&wide(&x), &wide(&w), &wide(&bias), 1e-5).unwrap();
        assert_close(&got, &want.to_dtype(DType::F32).unwrap(), Tol { atol: 2e-5, rtol: 1e-5 });
        same_forward_on_any_number_of_threads(|| group_norm(&x, &w, &bias, 1e-5));
        let last = group_norm(&x.narrow(0, b - 1, 1).unwrap(), &w, &bias, 1e-5).unwrap();
        assert_close(&last, &got.narrow(0, b - 1, 1).unwrap(), Tol::EXACT);
    }
}

/// As [`same_on_any_number_of_threads`], without gradients.
fn same_forward_on_any_number_of_threads(f: impl Fn() -> Result<Tensor> + Sync + Send) {
    let on = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(|| f().unwrap());
    assert_close(&on(3), &on(1), Tol::EXACT);
}

fn golden() -> Golden {
    Golden::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/dragon-nn/operations/case.safetensors"))
}

/// Checks result and gradients of a case of the golden file.
fn matches_pytorch(golden: &Golden, name: &str, n_inputs: usize, f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    let vars: Vec<Var> =
        (0..n_inputs).map(|i| Var::from_tensor(&golden.get(&format!("{name}.input.{i}"))).unwrap()).collect();
    let args: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&args).unwrap();
    assert_close(&y, &golden.get(&format!("{name}.output")), Tol::LAYER);
    let loss = (y * golden.get(&format!("{name}.weights"))).unwrap().sum_all().unwrap();
    let grads = crate::backward(&loss).unwrap();
    for (i, var) in vars.iter().enumerate() {
        let got = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("{name}: input {i} gets no gradient"));
        assert_close(got, &golden.get(&format!("{name}.gradient.{i}")), Tol { atol: 5e-5, rtol: 1e-4 }); // sums
    }
}

#[test]
fn operations_match_pytorch() {
    let golden = golden();
    let plain = Conv1dSpec::default();
    let transposed = ConvTranspose1dSpec::default();
    let conv =
        |name: &str, spec| matches_pytorch(&golden, name, 3, |t| conv1d(&t[0], &t[1], Some(&t[2]), spec));
    let conv_t = |name: &str, spec| {
        matches_pytorch(&golden, name, 3, |t| conv_transpose1d(&t[0], &t[1], Some(&t[2]), spec));
    };
    matches_pytorch(&golden, "linear", 3, |t| linear(&t[0], &t[1], Some(&t[2])));
    conv("conv1d", Conv1dSpec { padding: 9, dilation: 3, ..plain });
    conv("conv1d_strided", Conv1dSpec { stride: 4, padding: 2, ..plain });
    conv("conv1d_grouped", Conv1dSpec { groups: 2, ..plain });
    conv_t(
        "conv_transpose1d",
        ConvTranspose1dSpec { stride: 4, padding: 2, output_padding: 1, ..transposed },
    );
    conv_t(
        "conv_transpose1d_grouped",
        ConvTranspose1dSpec { stride: 2, dilation: 2, groups: 2, ..transposed },
    );
    matches_pytorch(&golden, "attention", 4, |t| {
        let (batch, frames, heads, _) = t[0].dims4()?;
        let flat = |t: &Tensor| t.flatten_from(2);
        let mixed = attention(&flat(&t[0])?, &flat(&t[1])?, &flat(&t[2])?, heads, Some(&t[3]), 0.3)?;
        mixed.reshape((batch, frames, heads, ()))
    });
    matches_pytorch(&golden, "layer_norm", 3, |t| layer_norm(&t[0], Some(&t[1]), Some(&t[2]), 1e-5));
    matches_pytorch(&golden, "rms_norm", 2, |t| rms_norm(&t[0], Some(&t[1]), 1e-6));
    matches_pytorch(&golden, "gelu", 1, |t| gelu(&t[0]));
    matches_pytorch(&golden, "silu", 1, |t| silu(&t[0]));
    matches_pytorch(&golden, "leaky_relu", 1, |t| leaky_relu(&t[0], 0.1));
    matches_pytorch(&golden, "softmax", 1, |t| softmax_last(&t[0]));
}

#[test]
fn five_steps_of_adamw_match_pytorch() {
    let golden = golden();
    for dtype in [DType::F32, DType::F64] {
        let params = Params::new(0);
        let vb = params.builder(dtype, &CPU);
        let (a, b) = (vb.get((4, 3), "a").unwrap(), vb.get(5, "b").unwrap());
        for name in ["a", "b"] {
            let value = golden.get(&format!("adamw.{name}")).to_dtype(dtype).unwrap();
            params.get(name).unwrap().set(&value).unwrap();
        }
        let config = AdamWConfig {
            lr: 0.05,
            beta2: 0.99,
            weight_decay: 0.1,
            max_grad_norm: Some(1.0),
            ..AdamWConfig::default()
        };
        let mut optimiser = AdamW::new(&params, config).unwrap();
        let mut norms = Vec::new();
        for _ in 0..5 {
            let cubes = (a.sqr().unwrap() * &a).unwrap().sum_all().unwrap();
            let mixed = (b.sqr().unwrap().sum_all().unwrap() * a.sum_all().unwrap()).unwrap();
            norms.push(optimiser.step(&(cubes + mixed).unwrap().backward().unwrap()).unwrap());
        }
        let tol = Tol { atol: 1e-6, rtol: 1e-5 };
        let wide = |t: Tensor| t.to_dtype(DType::F64).unwrap();
        assert_close(&wide(a), &wide(golden.get("adamw.a_after")), tol);
        assert_close(&wide(b), &wide(golden.get("adamw.b_after")), tol);
        let norms = Tensor::from_vec(norms, 5, &CPU).unwrap();
        assert_close(&norms, &wide(golden.get("adamw.norms")), Tol { atol: 1e-4, rtol: 1e-5 });
    }
}

#[test]
fn every_parameter_gets_a_gradient() {
    let params = Params::new(3);
    let vb = params.builder(DType::F32, &CPU);
    let spec = Conv1dSpec { padding: 1, ..Default::default() };
    let up = ConvTranspose1dSpec { stride: 2, ..Default::default() };
    let layers: Vec<Box<dyn Module>> = vec![
        Box::new(Embedding::new(7, 6, vb.pp("embedding")).unwrap()),
        Box::new(Linear::new(6, 8, vb.pp("linear")).unwrap()),
        Box::new(LayerNorm::new(8, 1e-5, vb.pp("layer_norm")).unwrap()),
        Box::new(Conv1d::new(8, 6, 3, spec, vb.pp("conv")).unwrap()),
        Box::new(Snake::new(6, vb.pp("snake")).unwrap()),
        Box::new(Conv1d::weight_norm(6, 6, 3, spec, vb.pp("normed")).unwrap()),
        Box::new(ConvTranspose1d::new(6, 4, 4, up, vb.pp("up")).unwrap()),
        Box::new(ConvTranspose1d::weight_norm(4, 4, 4, up, vb.pp("up_normed")).unwrap()),
        Box::new(RmsNorm::new(4, 1e-5, vb.pp("rms_norm")).unwrap()),
    ];
    let mut h = Tensor::new(&[[0u32, 3, 6, 2], [5, 1, 4, 0]], &CPU).unwrap();
    for layer in &layers {
        h = layer.forward(&h).unwrap();
    }
    let weights = noise("weights", h.dims()).to_dtype(DType::F32).unwrap();
    let grads = crate::backward(&(h * weights).unwrap().sum_all().unwrap()).unwrap();
    for (name, var) in params.names_and_vars() {
        let grad = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("`{name}` gets no gradient"));
        let size = grad.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(size.is_finite() && size > 0.0, "`{name}`: {size}");
    }
    let names: Vec<String> =
        params.names_and_vars().into_iter().map(|(n, _)| n).filter(|n| n.contains("up_n")).collect();
    assert_eq!(names, ["up_normed.bias", "up_normed.weight_g", "up_normed.weight_v"]);
}

#[test]
fn misfits_are_named() {
    let t = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
    let message = linear(&t(&[2, 3]), &t(&[4, 5]), None).unwrap_err().to_string();
    assert!(message.contains("[2, 3]") && message.contains("[4, 5]"), "{message}");
    let message =
        conv1d(&t(&[1, 2, 3]), &t(&[4, 3, 9]), None, Conv1dSpec::default()).unwrap_err().to_string();
    assert!(message.contains("shorter than the kernel's reach of 9"), "{message}");
    let message =
        attention(&t(&[1, 2, 4]), &t(&[1, 2, 5]), &t(&[1, 2, 4]), 2, None, 1.0).unwrap_err().to_string();
    assert!(message.contains("[1, 2, 5]"), "{message}");
    let x = t(&[1, 2, 6]);
    let message = attention(&x, &x, &x, 4, None, 1.0).unwrap_err().to_string();
    assert!(message.contains("6 channels do not divide into 4 heads"), "{message}");
    let message = swiglu_feed_forward(&x, &t(&[8, 6]), &t(&[6, 8])).unwrap_err().to_string();
    assert!(message.contains("[8, 6]"), "{message}");
    let message = Rotary::new(4, 100.0, 1).apply(&x, 1).unwrap_err().to_string();
    assert!(message.contains("1 frames"), "{message}");
    let message = gated_add(&x, &t(&[2, 6]), &x).unwrap_err().to_string();
    assert!(message.contains("[2, 6]"), "{message}");
}

#[test]
fn a_few_rows_are_right_and_depend_on_nothing_but_themselves() {
    for (rows, n_in, n_out) in [(1, 1, 1), (2, 5, 7), (3, 33, 17), (8, 16, 48), (19, 100, 30), (2, 1024, 700)]
    {
        let x = noise("x", &[rows, n_in]).to_dtype(DType::F32).unwrap();
        let w = noise("w", &[n_out, n_in]).to_dtype(DType::F32).unwrap();
        let got = linear_few_rows(&x, &w).unwrap();
        let want = linear::plain::linear(&x, &w, None).unwrap();
        assert_close(&got, &want, Tol { atol: 1e-4, rtol: 1e-4 });
        let one = |n_threads: usize, i: usize| -> Vec<f32> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            let row = pool.install(|| linear_few_rows(&x.narrow(0, i, 1).unwrap(), &w).unwrap());
            row.flatten_all().unwrap().to_vec1().unwrap()
        };
        let got: Vec<Vec<f32>> = got.to_vec2().unwrap();
        for (i, row) in got.iter().enumerate() {
            assert!(*row == one(1, i) && *row == one(3, i), "row {i} of {rows}");
        }
    }
    let (x, w) = (noise("x", &[2, 3, 20]), noise("w", &[4, 20]));
    assert_close(&linear_few_rows(&x, &w).unwrap(), &linear(&x, &w, None).unwrap(), Tol::LAYER);
    let message = linear_few_rows(&x, &noise("w", &[4, 21])).unwrap_err().to_string();
    assert!(message.contains("21 inputs"), "{message}");
}

#[test]
fn cached_attention_sees_what_it_is_told_and_no_more() {
    let (batch, t, heads, n, d) = (3, 2, 2, 21, 20);
    let q = noise("q", &[batch, t, heads * d]).to_dtype(DType::F32).unwrap();
    let [k, v] = ["k", "v"].map(|key| noise(key, &[batch, heads, n, d]).to_dtype(DType::F32).unwrap());
    let seen = [5, 6, 0, 21, 1, 0];
    let got = attention_cached(&q, &k, &v, &seen, 0.3).unwrap();
    let want = attention::plain::attention_cached(&q, &k, &v, &seen, 0.3).unwrap();
    assert_close(&got, &want, Tol::LAYER);
    let nothing: Vec<f32> = got.get(1).unwrap().get(0).unwrap().to_vec1().unwrap();
    assert!(nothing.iter().all(|y| *y == 0.0));
    // Neither what lies behind, nor other examples, nor the number of threads.
    let row = |t: &Tensor, b: usize| t.narrow(0, b, 1).unwrap();
    let short = |t: &Tensor| row(t, 0).narrow(2, 0, 6).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let alone = pool.install(|| attention_cached(&row(&q, 0), &short(&k), &short(&v), &[5, 6], 0.3).unwrap());
    assert_eq!(
        alone.get(0).unwrap().to_vec2::<f32>().unwrap(),
        got.get(0).unwrap().to_vec2::<f32>().unwrap()
    );
    for (seen, part) in [(vec![5, 6], "2 numbers of keys"), (vec![22; 6], "sees 22 keys, there are 21")] {
        let message = attention_cached(&q, &k, &v, &seen, 0.3).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}
