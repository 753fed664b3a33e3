//! [`super::conv_transpose1d`] as candle operations: one matrix product per tap, spread by zeros and summed.

use super::ConvTranspose1dSpec;
use candle_core::{Result, Tensor};

pub(crate) fn conv_transpose1d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    spec: ConvTranspose1dSpec,
) -> Result<Tensor> {
    let (b, t, c_in) = x.dims3()?;
    let (_, out_group, k) = weight.dims3()?;
    let t_out = spec.out_len(t, k)?;
    let in_group = c_in / spec.groups;
    let reach = spec.dilation * (k - 1);
    let mut outs = Vec::with_capacity(spec.groups);
    for g in 0..spec.groups {
        let x = x.narrow(2, g * in_group, in_group)?.contiguous()?.reshape((b * t, in_group))?;
        let w = weight.narrow(0, g * in_group, in_group)?;
        let mut sum: Option<Tensor> = None;
        for tap in 0..k {
            let y = x.matmul(&w.narrow(2, tap, 1)?.squeeze(2)?.contiguous()?)?; // [B*T, Cout/G]
            let y = y.reshape((b, t, 1, out_group))?.pad_with_zeros(2, 0, spec.stride - 1)?;
            let y = y.reshape((b, t * spec.stride, out_group))?;
            let left = tap * spec.dilation;
            let y = y.pad_with_zeros(1, left, reach - left + spec.output_padding)?; // [B, T*S+reach+op, Cout/G]
            sum = Some(match sum {
                Some(sum) => (sum + y)?,
                None => y,
            });
        }
        outs.push(sum.expect("a kernel has a tap").narrow(1, spec.padding, t_out)?.contiguous()?);
    }
    let y = if outs.len() == 1 { outs.remove(0) } else { Tensor::cat(&outs, 2)? }; // [B, T', Cout]
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}
