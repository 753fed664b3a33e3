//! [`super::conv1d`] as candle operations: one matrix product per tap.

use super::Conv1dSpec;
use candle_core::{Result, Tensor};

pub(crate) fn conv1d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, spec: Conv1dSpec) -> Result<Tensor> {
    let (b, t, c_in) = x.dims3()?;
    let (c_out, c_in_group, k) = weight.dims3()?;
    let t_out = spec.out_len(t, k)?;
    let (in_group, out_group) = (c_in / spec.groups, c_out / spec.groups);
    debug_assert_eq!(in_group, c_in_group);
    // The slack on the right lets a strided tap read whole groups of `stride` rows.
    let x = x.pad_with_zeros(1, spec.padding, spec.padding + spec.stride)?; // [B, T+2P+S, Cin]
    let mut outs = Vec::with_capacity(spec.groups);
    for g in 0..spec.groups {
        let x = x.narrow(2, g * in_group, in_group)?;
        let w = weight.narrow(0, g * out_group, out_group)?;
        let mut sum: Option<Tensor> = None;
        for tap in 0..k {
            let rows = x.narrow(1, tap * spec.dilation, t_out * spec.stride)?.contiguous()?;
            let rows = rows.reshape((b, t_out, spec.stride, in_group))?.narrow(2, 0, 1)?.contiguous()?;
            let rows = rows.reshape((b * t_out, in_group))?;
            let y = rows.matmul(&w.narrow(2, tap, 1)?.squeeze(2)?.t()?.contiguous()?)?; // [B*T', Cout/G]
            sum = Some(match sum {
                Some(sum) => (sum + y)?,
                None => y,
            });
        }
        outs.push(sum.expect("a kernel has a tap").reshape((b, t_out, out_group))?);
    }
    let y = if outs.len() == 1 { outs.remove(0) } else { Tensor::cat(&outs, 2)? }; // [B, T', Cout]
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}
