//! [`super::conv1d`] on the CPU.

use super::Conv1dSpec;
use crate::kernels::conv::Geometry;
use crate::kernels::correlation::Correlation;
use candle_core::{Result, Shape, Tensor};

pub(crate) fn conv1d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, spec: Conv1dSpec) -> Result<Tensor> {
    let (batch, t_in, c_in) = x.dims3()?;
    let (c_out, _, kernel) = weight.dims3()?;
    let Conv1dSpec { stride, padding, dilation, groups } = spec;
    let t_out = spec.out_len(t_in, kernel)?;
    let geometry = Geometry { batch, t_in, c_in, t_out, c_out, kernel, stride, padding, dilation, groups };
    let shape = Shape::from((batch, t_out, c_out));
    Correlation { name: "conv1d", geometry, adjoint: false, shape }.apply(x, weight, bias)
}
