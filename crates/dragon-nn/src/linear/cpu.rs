//! [`super::linear`] on the CPU: a correlation of one tap over all rows.

use crate::kernels::conv::Geometry;
use crate::kernels::correlation::Correlation;
use candle_core::{Result, Shape, Tensor};

pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (c_out, c_in) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    *dims.last_mut().expect("rank checked") = c_out;
    let rows = dims[..dims.len() - 1].iter().product();
    let geometry = Geometry::linear(rows, c_in, c_out);
    let op = Correlation { name: "linear", geometry, adjoint: false, shape: Shape::from(dims) };
    op.apply(x, weight, bias)
}
