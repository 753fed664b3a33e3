//! [`super::linear`] as candle operations.

use candle_core::{Result, Tensor};

pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (n_out, n_in) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    let rows = x.elem_count() / n_in;
    let y = x.reshape((rows, n_in))?.matmul(&weight.t()?)?; // [rows, out]
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    *dims.last_mut().expect("rank checked by the caller") = n_out;
    y.reshape(dims)
}
