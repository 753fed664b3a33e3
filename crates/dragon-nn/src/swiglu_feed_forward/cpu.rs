//! [`super::swiglu_feed_forward`] on the CPU, forward and backward.

use crate::backward::hand_over;
use crate::kernels::conv::{Geometry, correlate, correlate_adjoint, correlate_weight_gradient};
use crate::kernels::{Real, by_dtype, dtype, slice, tensor, view};
use crate::swiglu::Halves::GateFirst;
use crate::swiglu::cpu::{backward as swiglu_backward, forward as swiglu};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use std::sync::OnceLock;

pub(crate) fn swiglu_feed_forward(x: &Tensor, w_in: &Tensor, w_out: &Tensor) -> Result<Tensor> {
    let (n_out, n_gated) = w_out.dims2()?;
    let mut dims = x.dims().to_vec();
    let n_in = std::mem::replace(dims.last_mut().expect("rank checked"), n_out);
    let rows = x.elem_count() / n_in.max(1);
    let op = FeedForward {
        first: Geometry::linear(rows, n_in, 2 * n_gated),
        second: Geometry::linear(rows, n_gated, n_out),
        shape: Shape::from(dims),
        hidden: OnceLock::new(),
    };
    x.contiguous()?.apply_op3(&w_in.contiguous()?, &w_out.contiguous()?, op)
}

struct FeedForward {
    first: Geometry,
    second: Geometry,
    /// Of the result.
    shape: Shape,
    /// `W_in x`, which the backward pass needs.
    hidden: OnceLock<Tensor>,
}

impl FeedForward {
    fn backward<T: Real>(
        &self,
        x: &Tensor,
        w_in: &Tensor,
        w_out: &Tensor,
        grad: &Tensor,
    ) -> Result<Gradients> {
        let grad = grad.contiguous()?;
        let (x_data, g, hidden) = (
            view::<T>(x)?,
            view::<T>(&grad)?,
            view::<T>(self.hidden.get().expect("set by the forward pass"))?,
        );
        let n_gated = self.second.c_in;
        let d_out = if w_out.track_op() {
            let gated = swiglu(&hidden, n_gated, GateFirst);
            hand_over(w_out, tensor(correlate_weight_gradient(&gated, &g, &self.second), w_out.shape())?)?
        } else {
            None
        };
        let d_gated = correlate_adjoint(&g, &view::<T>(w_out)?, None, &self.second);
        let d_hidden = swiglu_backward(&hidden, &d_gated, n_gated, GateFirst);
        let d_in = if w_in.track_op() {
            hand_over(
                w_in,
                tensor(correlate_weight_gradient(&x_data, &d_hidden, &self.first), w_in.shape())?,
            )?
        } else {
            None
        };
        let dx = if x.track_op() {
            Some(tensor(correlate_adjoint(&d_hidden, &view::<T>(w_in)?, None, &self.first), x.shape())?)
        } else {
            None
        };
        Ok((dx, d_in, d_out))
    }
}

type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl CustomOp3 for FeedForward {
    fn name(&self) -> &'static str {
        "swiglu_feed_forward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w_in: &CpuStorage,
        w_in_layout: &Layout,
        w_out: &CpuStorage,
        w_out_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(dtype(x), T => {
            let hidden = correlate(slice::<T>(x, xl)?, slice(w_in, w_in_layout)?, None, &self.first);
            let gated = swiglu(&hidden, self.second.c_in, GateFirst);
            let y = correlate(&gated, slice(w_out, w_out_layout)?, None, &self.second);
            // An operation runs forward once.
            let _ = self.hidden.set(tensor(hidden, (self.first.t_out, self.first.c_out))?);
            Ok((T::storage(y), self.shape.clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        w_in: &Tensor,
        w_out: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        by_dtype!(x.dtype(), T => self.backward::<T>(x, w_in, w_out, grad))
    }
}
