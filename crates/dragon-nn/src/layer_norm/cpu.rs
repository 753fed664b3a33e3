//! [`super::layer_norm`], [`crate::rms_norm`] and [`crate::ada_layer_norm`] on the CPU, forward and backward.

use crate::backward::hand_over;
use crate::kernels::norm::{self, Affine, Norm};
use crate::kernels::{Real, by_dtype, dtype, slice, tensor, view};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// Normalises the last dimension of `x`; `scale` and `shift` hold one vector per group of rows.
///
/// A shift without a scale is not offered: no caller has one.
pub(crate) fn apply(
    x: &Tensor,
    scale: Option<&Tensor>,
    shift: Option<&Tensor>,
    norm: Norm,
) -> Result<Tensor> {
    let x = x.contiguous()?;
    let op = Op(norm);
    match (scale, shift) {
        (None, _) => x.apply_op1(op),
        (Some(scale), None) => x.apply_op2(&scale.contiguous()?, op),
        (Some(scale), Some(shift)) => x.apply_op3(&scale.contiguous()?, &shift.contiguous()?, op),
    }
}

struct Op(Norm);

impl Op {
    fn forward<T: Real>(
        &self,
        x: (&CpuStorage, &Layout),
        scale: Option<(&CpuStorage, &Layout)>,
        shift: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let c = *x.1.dims().last().expect("rank checked");
        let data = slice::<T>(x.0, x.1)?;
        let scale = scale.map(|(s, l)| slice::<T>(s, l)).transpose()?;
        let shift = shift.map(|(s, l)| slice::<T>(s, l)).transpose()?;
        let affine =
            Affine { scale, shift, rows_per_group: rows_per_group(data.len(), c, scale.map(<[T]>::len)) };
        Ok((T::storage(norm::forward(data, c, self.0, affine)), x.1.shape().clone()))
    }

    fn backward<T: Real>(
        &self,
        x: &Tensor,
        scale: Option<&Tensor>,
        shift: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let c = *x.dims().last().expect("rank checked");
        let grad = grad.contiguous()?;
        let (data, g) = (view::<T>(x)?, view::<T>(&grad)?);
        let w = scale.map(view::<T>).transpose()?;
        let rows_per_group = rows_per_group(data.len(), c, w.as_ref().map(|w| w.len()));
        let affine = Affine { scale: w.as_deref(), shift: None, rows_per_group };
        let (dx, dw, db) = norm::backward(&data, &g, c, self.0, affine);
        let wanted = |t: Option<&Tensor>, data: Vec<T>| match t {
            Some(t) if t.track_op() => hand_over(t, tensor(data, t.shape())?),
            _ => Ok(None),
        };
        Ok([wanted(Some(x), dx)?, wanted(scale, dw)?, wanted(shift, db)?])
    }
}

/// Rows that share one scale, given the sizes of both tensors.
fn rows_per_group(len: usize, c: usize, scale_len: Option<usize>) -> usize {
    let groups = scale_len.map_or(1, |n| n / c).max(1);
    (len / c / groups).max(1)
}

type Storage<'a> = &'a CpuStorage;

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, x: Storage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(x), T => self.forward::<T>((x, xl), None, None))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [dx, ..] = by_dtype!(x.dtype(), T => self.backward::<T>(x, None, None, grad))?;
        Ok(dx)
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, x: Storage, xl: &Layout, w: Storage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(x), T => self.forward::<T>((x, xl), Some((w, wl)), None))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = by_dtype!(x.dtype(), T => self.backward::<T>(x, Some(w), None, grad))?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        x: Storage,
        xl: &Layout,
        w: Storage,
        wl: &Layout,
        b: Storage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(x), T => self.forward::<T>((x, xl), Some((w, wl)), Some((b, bl))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = by_dtype!(x.dtype(), T => self.backward::<T>(x, Some(w), Some(b), grad))?;
        Ok((dx, dw, db))
    }
}
