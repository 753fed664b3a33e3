//! [`super::conv_transpose1d`] on the CPU: the adjoint of a correlation that maps its output back to its input, with
//! the same weights.

use super::ConvTranspose1dSpec;
use crate::kernels::conv::Geometry;
use crate::kernels::correlation::Correlation;
use candle_core::{Result, Shape, Tensor};

pub(crate) fn conv_transpose1d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    spec: ConvTranspose1dSpec,
) -> Result<Tensor> {
    let (batch, t_out, c_out) = x.dims3()?;
    let (_, out_group, kernel) = weight.dims3()?;
    let ConvTranspose1dSpec { stride, padding, dilation, groups, .. } = spec;
    let (t_in, c_in) = (spec.out_len(t_out, kernel)?, out_group * groups);
    let geometry = Geometry { batch, t_in, c_in, t_out, c_out, kernel, stride, padding, dilation, groups };
    let shape = Shape::from((batch, t_in, c_in));
    Correlation { name: "conv_transpose1d", geometry, adjoint: true, shape }.apply(x, weight, bias)
}
