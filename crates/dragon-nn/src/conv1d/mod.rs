//! One-dimensional convolution over channels-last activations.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// Geometry of [`conv1d`]; names and meaning as in `torch.nn.Conv1d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv1dSpec {
    /// Frames between two outputs.
    pub stride: usize,
    /// Zero frames added on each side.
    pub padding: usize,
    /// Frames between two taps.
    pub dilation: usize,
    /// Independent groups of channels.
    pub groups: usize,
}

impl Default for Conv1dSpec {
    fn default() -> Self {
        Conv1dSpec { stride: 1, padding: 0, dilation: 1, groups: 1 }
    }
}

impl Conv1dSpec {
    /// Output frames for `t` input frames and `kernel` taps: `(t + 2 padding - dilation (kernel-1) - 1) / stride + 1`.
    ///
    /// # Errors
    /// If the input is shorter than the kernel, or stride, dilation or kernel is zero.
    pub fn out_len(&self, t: usize, kernel: usize) -> Result<usize> {
        if self.stride == 0 || self.dilation == 0 || kernel == 0 {
            candle_core::bail!(
                "conv1d: stride, dilation and kernel must be positive, got {self:?}, kernel {kernel}"
            )
        }
        let (padded, reach) = (t + 2 * self.padding, self.dilation * (kernel - 1) + 1);
        if padded < reach {
            candle_core::bail!(
                "conv1d: {t} frames with {self:?} are shorter than the kernel's reach of {reach}"
            )
        }
        Ok((padded - reach) / self.stride + 1)
    }
}

/// Convolution along time.
///
/// `y[b, t, o] = bias[o] + Σ_{i,k} weight[o, i, k] · x[b, t·stride + k·dilation - padding, i]`, zero outside.
///
/// # Shapes
/// - `x`: `[B, T, Cin]`, `weight`: `[Cout, Cin/groups, K]`, `bias`: `[Cout]`; returns `[B, T', Cout]` with `T'` from
///   [`Conv1dSpec::out_len`].
///
/// # Errors
/// If the shapes do not fit each other or the groups.
pub fn conv1d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, spec: Conv1dSpec) -> Result<Tensor> {
    check(x, weight, bias, spec)?;
    let mut all = vec![x, weight];
    all.extend(bias);
    if crate::kernels::fast(&all) {
        cpu::conv1d(x, weight, bias, spec)
    } else {
        plain::conv1d(x, weight, bias, spec)
    }
}

fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, spec: Conv1dSpec) -> Result<()> {
    let (_, t, c_in) = x.dims3()?;
    let (c_out, c_in_group, k) = weight.dims3()?;
    if spec.groups == 0 || c_in_group * spec.groups != c_in || !c_out.is_multiple_of(spec.groups) {
        candle_core::bail!(
            "conv1d: weight {:?} does not fit x {:?} in {} groups",
            weight.dims(),
            x.dims(),
            spec.groups
        )
    }
    if let Some(bias) = bias
        && bias.dims() != [c_out]
    {
        candle_core::bail!("conv1d: bias {:?} does not fit weight {:?}", bias.dims(), weight.dims())
    }
    spec.out_len(t, k).map(|_| ())
}
