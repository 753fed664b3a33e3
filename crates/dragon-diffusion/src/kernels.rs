//! Two fused, differentiable operations of the DiT that are not layers of general use: rotary positions and the gated residual sum.
//! On the CPU in f32 they are one multi-threaded pass each; elsewhere they are composed of candle's operations.

use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, bail,
};
use rayon::prelude::*;

/// Angles of rotary position embeddings (Su et al. 2021, arXiv:2104.09864): pair `i` of a head turns by `t * base^(-2i / rotary_dim)` at
/// frame `t`. Channels `i` and `i + rotary_dim / 2` form a pair (the GPT-NeoX order); channels from `rotary_dim` on stay as they are.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `[T, rotary_dim / 2]`, row by row.
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
    half: usize,
    n_frames: usize,
}

impl Rotary {
    /// Angles for frames `0 .. n_frames`; `rotary_dim` is even and at most the width of a head.
    pub fn new(rotary_dim: usize, base: f64, n_frames: usize) -> Self {
        let half = rotary_dim / 2;
        let angles = (0..n_frames)
            .flat_map(|t| (0..half).map(move |i| t as f64 * base.powf(-(i as f64) / half as f64)))
            .collect::<Vec<f64>>();
        Self {
            cos: Arc::new(angles.iter().map(|a| a.cos() as f32).collect()),
            sin: Arc::new(angles.iter().map(|a| a.sin() as f32).collect()),
            half,
            n_frames,
        }
    }

    /// Turns the heads of `x` by the angles of their frames.
    ///
    /// # Shapes
    /// - `x`: `[B, T, H, D]`; returns the same.
    ///
    /// # Errors
    /// If `T` is above the number of frames the angles were made for.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (_, frames, _, head_dim) = x.dims4()?;
        if frames > self.n_frames || 2 * self.half > head_dim {
            bail!(
                "rotary angles for {} frames, {} channels: found {:?}",
                self.n_frames,
                2 * self.half,
                x.dims()
            );
        }
        if self.half == 0 {
            return Ok(x.clone());
        }
        if matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32 {
            return x.contiguous()?.apply_op1(RotaryOp { angles: self.clone(), sign: 1.0 });
        }
        let table = |values: &[f32]| {
            Tensor::from_slice(&values[..frames * self.half], (1, frames, 1, self.half), x.device())?
                .to_dtype(x.dtype())
        };
        let (cos, sin) = (table(&self.cos)?, table(&self.sin)?); // [1, T, 1, half]
        let a = x.narrow(3, 0, self.half)?;
        let b = x.narrow(3, self.half, self.half)?;
        let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let turned_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rest = head_dim - 2 * self.half;
        match rest {
            0 => Tensor::cat(&[turned_a, turned_b], 3),
            _ => Tensor::cat(&[turned_a, turned_b, x.narrow(3, 2 * self.half, rest)?], 3),
        }
    }
}

/// Turns by the angles (`sign` 1) or back (`sign` -1), which is the gradient.
struct RotaryOp {
    angles: Rotary,
    sign: f32,
}

impl CustomOp1 for RotaryOp {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(storage, layout)?;
        let (_, frames, heads, head_dim) = layout.shape().dims4()?;
        let half = self.angles.half;
        let mut out = x.to_vec();
        out.par_chunks_mut(heads * head_dim).enumerate().for_each(|(row, out)| {
            let t = row % frames;
            let cos = &self.angles.cos[t * half..(t + 1) * half];
            let sin = &self.angles.sin[t * half..(t + 1) * half];
            for head in out.chunks_mut(head_dim) {
                let (a, b) = head.split_at_mut(half);
                for i in 0..half {
                    let s = self.sign * sin[i];
                    let (p, q) = (a[i], b[i]);
                    a[i] = p * cos[i] - q * s;
                    b[i] = q * cos[i] + p * s;
                }
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = RotaryOp { angles: self.angles.clone(), sign: -self.sign };
        Ok(Some(grad.contiguous()?.apply_op1(back)?))
    }
}

/// `x + gate * y`, the gate the same for all frames of an example.
///
/// # Shapes
/// - `x`, `y`: `[B, T, C]`; `gate`: `[B, C]`; returns `[B, T, C]`.
///
/// # Errors
/// If the shapes do not fit each other.
pub fn gated_add(x: &Tensor, gate: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (batch, _, channels) = x.dims3()?;
    if y.dims() != x.dims() || gate.dims() != [batch, channels] {
        bail!("gated sum of {:?} and {:?} with gate {:?}", x.dims(), y.dims(), gate.dims());
    }
    if matches!(x.device(), Device::Cpu) && x.dtype() == DType::F32 {
        return x.contiguous()?.apply_op3(&gate.contiguous()?, &y.contiguous()?, GatedAdd);
    }
    x + y.broadcast_mul(&gate.unsqueeze(1)?)?
}

struct GatedAdd;

impl CustomOp3 for GatedAdd {
    fn name(&self) -> &'static str {
        "gated_add"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        gate: &CpuStorage,
        gate_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, frames, channels) = x_layout.shape().dims3()?;
        let (x, gate, y) = (f32_slice(x, x_layout)?, f32_slice(gate, gate_layout)?, f32_slice(y, y_layout)?);
        let mut out = x.to_vec();
        let y_rows = y.par_chunks(channels);
        out.par_chunks_mut(channels).zip(y_rows).enumerate().for_each(|(row, (out, y))| {
            let b = row / frames;
            let gate = &gate[b * channels..(b + 1) * channels];
            for ((out, y), g) in out.iter_mut().zip(y).zip(gate) {
                *out += g * y;
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _x: &Tensor,
        gate: &Tensor,
        y: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let d_gate = grad.apply_op2_no_bwd(y, &SumOfProducts)?;
        let d_y = grad.apply_op2_no_bwd(gate, &ScaleRows)?;
        Ok((Some(grad), Some(d_gate), Some(d_y)))
    }
}

/// `sum over T of a * b`: `[B, T, C]`, `[B, T, C]` -> `[B, C]`, in the order of the frames.
struct SumOfProducts;

impl CustomOp2 for SumOfProducts {
    fn name(&self) -> &'static str {
        "sum_of_products"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, frames, channels) = a_layout.shape().dims3()?;
        let (a, b) = (f32_slice(a, a_layout)?, f32_slice(b, b_layout)?);
        let mut out = vec![0f32; batch * channels];
        let plane = frames * channels;
        out.par_chunks_mut(channels).enumerate().for_each(|(i, out)| {
            let rows = a[i * plane..(i + 1) * plane].chunks(channels).zip(b[i * plane..].chunks(channels));
            for (a, b) in rows {
                for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                    *out += a * b;
                }
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((batch, channels))))
    }
}

/// `a * gate`: `[B, T, C]`, `[B, C]` -> `[B, T, C]`.
struct ScaleRows;

impl CustomOp2 for ScaleRows {
    fn name(&self) -> &'static str {
        "scale_rows"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        gate: &CpuStorage,
        gate_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, frames, channels) = a_layout.shape().dims3()?;
        let (a, gate) = (f32_slice(a, a_layout)?, f32_slice(gate, gate_layout)?);
        let mut out = a.to_vec();
        out.par_chunks_mut(channels).enumerate().for_each(|(row, out)| {
            let b = row / frames;
            for (out, g) in out.iter_mut().zip(&gate[b * channels..(b + 1) * channels]) {
                *out *= g;
            }
        });
        Ok((CpuStorage::F32(out), a_layout.shape().clone()))
    }
}

fn f32_slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("expected f32, found {:?}", storage_dtype(storage)) };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("expected a contiguous tensor, found strides {:?}", layout.stride()),
    }
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// Sinusoidal features of `c_noise = ln(sigma) / 4`: cosines, then sines, of `f_i * c_noise`.
///
/// The frequencies are spaced evenly in their logarithm from 1 to 64: `c_noise` spans about 3, so the lowest rises steadily over the whole range
/// of levels, and the highest tells levels apart that differ by a tenth.
///
/// # Shapes
/// - `c_noise`: `[B]`; returns `[B, n_features]`, `n_features` even and at least 4.
pub fn noise_features(c_noise: &Tensor, n_features: usize) -> Result<Tensor> {
    const HIGHEST: f64 = 64.0;
    let half = n_features / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|i| HIGHEST.powf(i as f64 / (half - 1) as f64) as f32).collect();
    let frequencies =
        Tensor::from_vec(frequencies, (1, half), c_noise.device())?.to_dtype(c_noise.dtype())?;
    let angles = c_noise.unsqueeze(1)?.broadcast_mul(&frequencies)?; // [B, half]
    Tensor::cat(&[angles.cos()?, angles.sin()?], D::Minus1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dragon_nn::Rng;
    use dragon_testkit::{Tol, assert_close, gradient_check};

    #[test]
    fn rotary_equals_its_composition_in_both_directions() -> Result<()> {
        let mut rng = Rng::new(1);
        let rotary = Rotary::new(6, 100.0, 9);
        let x = rng.normal_tensor((2, 7, 3, 8), DType::F32, &Device::Cpu)?;
        let weights = rng.normal_tensor((2, 7, 3, 8), DType::F32, &Device::Cpu)?;
        let run = |dtype: DType| -> Result<(Tensor, Tensor)> {
            let x = candle_core::Var::from_tensor(&x.to_dtype(dtype)?)?;
            let y = rotary.apply(&x)?;
            let grads = (&y * weights.to_dtype(dtype)?)?.sum_all()?.backward()?;
            Ok((y, grads.get(&x).expect("x is a variable").clone()))
        };
        let (fast, slow) = (run(DType::F32)?, run(DType::F64)?);
        assert_close(&fast.0, &slow.0, Tol::LAYER);
        assert_close(&fast.1, &slow.1, Tol::LAYER);
        Ok(())
    }

    #[test]
    fn rotary_products_depend_on_the_distance_only() -> Result<()> {
        let mut rng = Rng::new(2);
        let rotary = Rotary::new(8, 100.0, 32);
        let q = rng.normal_tensor((1, 1, 1, 8), DType::F32, &Device::Cpu)?.broadcast_as((1, 32, 1, 8))?;
        let k = rng.normal_tensor((1, 1, 1, 8), DType::F32, &Device::Cpu)?.broadcast_as((1, 32, 1, 8))?;
        let (q, k) = (rotary.apply(&q)?, rotary.apply(&k)?);
        let product = |i: usize, j: usize| -> Result<f32> {
            (q.narrow(1, i, 1)? * k.narrow(1, j, 1)?)?.sum_all()?.to_scalar()
        };
        assert!((product(5, 2)? - product(30, 27)?).abs() < 1e-4);
        assert!((product(5, 2)? - product(2, 5)?).abs() > 1e-3);
        Ok(())
    }

    #[test]
    fn gated_sum_has_the_gradient_of_its_composition() -> Result<()> {
        let mut rng = Rng::new(3);
        let args = [
            rng.normal_tensor((2, 5, 4), DType::F32, &Device::Cpu)?,
            rng.normal_tensor((2, 4), DType::F32, &Device::Cpu)?,
            rng.normal_tensor((2, 5, 4), DType::F32, &Device::Cpu)?,
        ];
        let weights = rng.normal_tensor((2, 5, 4), DType::F32, &Device::Cpu)?;
        let run = |dtype: DType| -> Result<Vec<Tensor>> {
            let vars = args
                .iter()
                .map(|a| candle_core::Var::from_tensor(&a.to_dtype(dtype)?))
                .collect::<Result<Vec<_>>>()?;
            let out = gated_add(&vars[0], &vars[1], &vars[2])?;
            let grads = (&out * weights.to_dtype(dtype)?)?.sum_all()?.backward()?;
            let mut all = vec![out];
            all.extend(vars.iter().map(|v| grads.get(v).expect("a variable").clone()));
            Ok(all)
        };
        for (fast, slow) in run(DType::F32)?.iter().zip(run(DType::F64)?) {
            assert_close(fast, &slow, Tol::LAYER);
        }
        let f64_args: Vec<Tensor> = args.iter().map(|a| a.to_dtype(DType::F64)).collect::<Result<_>>()?;
        gradient_check(&f64_args, Tol { atol: 1e-7, rtol: 1e-6 }, |a| gated_add(&a[0], &a[1], &a[2]))
    }

    #[test]
    fn noise_features_are_cosines_then_sines() -> Result<()> {
        let c_noise = Tensor::new(&[0.3f32, -1.0], &Device::Cpu)?;
        let got = noise_features(&c_noise, 4)?.to_vec2::<f32>()?;
        for (row, c) in got.iter().zip([0.3f32, -1.0]) {
            for (got, want) in row.iter().zip([c.cos(), (64.0 * c).cos(), c.sin(), (64.0 * c).sin()]) {
                assert!((got - want).abs() < 1e-5);
            }
        }
        Ok(())
    }
}
