//! [`super::conv_transpose1d`] on the CPU, forward and backward: the adjoint of a correlation that maps its output
//! back to its input, with the same weights.

use super::ConvTranspose1dSpec;
use crate::backward::hand_over;
use crate::kernels::conv::{Geometry, correlate, correlate_adjoint, correlate_weight_gradient};
use crate::kernels::{Real, by_dtype, column_sums, dtype, slice, tensor, view};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

pub(crate) fn conv_transpose1d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    spec: ConvTranspose1dSpec,
) -> Result<Tensor> {
    let (batch, t, c) = x.dims3()?;
    let (_, out_group, kernel) = weight.dims3()?;
    let ConvTranspose1dSpec { stride, padding, dilation, groups, .. } = spec;
    let op = ConvTranspose(Geometry {
        batch,
        t_in: spec.out_len(t, kernel)?,
        c_in: out_group * groups,
        t_out: t,
        c_out: c,
        kernel,
        stride,
        padding,
        dilation,
        groups,
    });
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    match bias {
        Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, op),
        None => x.apply_op2(&weight, op),
    }
}

/// Geometry of the correlation from this operation's output (its input) to this operation's input (its output).
struct ConvTranspose(Geometry);

impl ConvTranspose {
    fn forward<T: Real>(
        &self,
        x: (&CpuStorage, &Layout),
        w: (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let bias = bias.map(|(s, l)| slice::<T>(s, l)).transpose()?;
        let y = correlate_adjoint(slice::<T>(x.0, x.1)?, slice(w.0, w.1)?, bias, &self.0);
        Ok((T::storage(y), Shape::from((self.0.batch, self.0.t_in, self.0.c_in))))
    }

    fn backward<T: Real>(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let g = view::<T>(&grad)?;
        let dx = match x.track_op() {
            true => Some(tensor(correlate(&g, &view::<T>(w)?, None, &self.0), x.shape())?),
            false => None,
        };
        let dw = match w.track_op() {
            true => hand_over(w, tensor(correlate_weight_gradient(&g, &view::<T>(x)?, &self.0), w.shape())?)?,
            false => None,
        };
        let db = match bias {
            Some(bias) if bias.track_op() => {
                hand_over(bias, tensor(column_sums(&g, self.0.c_in), bias.shape())?)?
            }
            _ => None,
        };
        Ok((dx, dw, db))
    }
}

impl CustomOp2 for ConvTranspose {
    fn name(&self) -> &'static str {
        "conv_transpose1d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(w), T => self.forward::<T>((x, xl), (w, wl), None))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw, _) = by_dtype!(w.dtype(), T => self.backward::<T>(x, w, None, grad))?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for ConvTranspose {
    fn name(&self) -> &'static str {
        "conv_transpose1d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(w), T => self.forward::<T>((x, xl), (w, wl), Some((b, bl))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        by_dtype!(w.dtype(), T => self.backward::<T>(x, w, Some(b), grad))
    }
}
