//! Reordering of tokens: the windows of a Swin block, and the four neighbours that patch merging joins.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// A permutation of the tokens of a sequence, and its inverse.
#[derive(Debug, Clone)]
pub(crate) struct RowOrder {
    source: Arc<[u32]>,
    inverse: Arc<[u32]>,
}

impl RowOrder {
    /// Row `i` of the result is row `source[i]` of the input; `source` is a permutation.
    pub(crate) fn new(source: Vec<u32>) -> Self {
        let mut inverse = vec![0u32; source.len()];
        for (to, &from) in source.iter().enumerate() {
            inverse[from as usize] = to as u32;
        }
        Self { source: source.into(), inverse: inverse.into() }
    }

    /// The order that undoes this one.
    pub(crate) fn inverse(&self) -> Self {
        Self { source: self.inverse.clone(), inverse: self.source.clone() }
    }

    /// Reorders the tokens of `x` `[B, L, C]`; differentiable, bit for bit.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (_, len, _) = x.dims3()?;
        if len != self.source.len() {
            candle_core::bail!("reordering tokens: expected {} of them, found {len}", self.source.len())
        }
        if x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64) {
            return x.contiguous()?.apply_op1(self.clone());
        }
        let ids = Tensor::from_slice(&self.source, len, x.device())?;
        x.index_select(&ids, 1)
    }

    fn copy<T: Copy + Default + Send + Sync>(&self, from: &[T], channels: usize) -> Vec<T> {
        let mut out = vec![T::default(); from.len()];
        let song = self.source.len() * channels;
        out.par_chunks_mut(song).zip(from.par_chunks(song)).for_each(|(out, from)| {
            for (row, &source) in out.chunks_exact_mut(channels).zip(self.source.iter()) {
                let start = source as usize * channels;
                row.copy_from_slice(&from[start..start + channels]);
            }
        });
        out
    }
}

impl CustomOp1 for RowOrder {
    fn name(&self) -> &'static str {
        "row-order"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let channels = layout.dims()[2];
        let (start, end) = layout.contiguous_offsets().expect("`apply` makes the input contiguous");
        let out = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(self.copy(&x[start..end], channels)),
            CpuStorage::F64(x) => CpuStorage::F64(self.copy(&x[start..end], channels)),
            _ => candle_core::bail!("row-order: expected f32 or f64 tokens"),
        };
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.inverse().apply(grad).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn the_custom_op_equals_index_select_forward_and_backward() {
        let order = RowOrder::new(vec![3, 0, 4, 1, 2]);
        let x = Tensor::arange(0f32, 30., &Device::Cpu).unwrap().reshape((2, 5, 3)).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let ids = Tensor::from_slice(&[3u32, 0, 4, 1, 2], 5, &Device::Cpu).unwrap();
        let (got, want) = (order.apply(&x).unwrap(), x.index_select(&ids, 1).unwrap());
        let all = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(all(&got), all(&want));
        assert_eq!(all(&order.inverse().apply(&got).unwrap()), all(&x));
        let weights = x.as_tensor().detach().sqr().unwrap();
        let grad = |y: &Tensor| {
            let grads = (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            all(grads.get(&x).unwrap())
        };
        assert_eq!(grad(&got), grad(&want));
    }
}
