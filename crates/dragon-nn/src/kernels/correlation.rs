//! The one operation behind the linear layer, the convolution and the transposed convolution: a correlation along time
//! or its adjoint, plus a bias, forward and backward.

use super::conv::{Geometry, correlate, correlate_adjoint, correlate_weight_gradient};
use super::{Real, by_dtype, column_sums, dtype, slice, tensor, view};
use crate::backward::hand_over;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

pub(crate) struct Correlation {
    pub name: &'static str,
    /// Of the correlation, also where its adjoint is meant.
    pub geometry: Geometry,
    /// Whether this is the adjoint: from the correlation's output to its input.
    pub adjoint: bool,
    /// Shape of the result.
    pub shape: Shape,
}

impl Correlation {
    pub(crate) fn apply(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (x, weight) = (x.contiguous()?, weight.contiguous()?);
        match bias {
            Some(bias) => x.apply_op3(&weight, &bias.contiguous()?, self),
            None => x.apply_op2(&weight, self),
        }
    }

    fn forward<T: Real>(
        &self,
        x: (&CpuStorage, &Layout),
        w: (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice::<T>(x.0, x.1)?, slice(w.0, w.1)?);
        let bias = bias.map(|(s, l)| slice::<T>(s, l)).transpose()?;
        let run = if self.adjoint { correlate_adjoint } else { correlate };
        Ok((T::storage(run(x, w, bias, &self.geometry)), self.shape.clone()))
    }

    fn backward<T: Real>(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let geo = &self.geometry;
        let grad = grad.contiguous()?;
        let g = view::<T>(&grad)?;
        let dx = if x.track_op() {
            let run = if self.adjoint { correlate } else { correlate_adjoint };
            Some(tensor(run(&g, &view::<T>(w)?, None, geo), x.shape())?)
        } else {
            None
        };
        let dw = if w.track_op() {
            let x = view::<T>(x)?;
            let (input, output) = if self.adjoint { (&g, &x) } else { (&x, &g) };
            hand_over(w, tensor(correlate_weight_gradient(input, output, geo), w.shape())?)?
        } else {
            None
        };
        let db = match bias {
            Some(bias) if bias.track_op() => {
                let channels = if self.adjoint { geo.c_in } else { geo.c_out };
                hand_over(bias, tensor(column_sums(&g, channels), bias.shape())?)?
            }
            _ => None,
        };
        Ok((dx, dw, db))
    }
}

impl CustomOp2 for Correlation {
    fn name(&self) -> &'static str {
        self.name
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

impl CustomOp3 for Correlation {
    fn name(&self) -> &'static str {
        self.name
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
