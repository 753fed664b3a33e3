//! Transposed one-dimensional convolution over channels-last activations.

mod cpu;
pub(crate) mod plain;

use candle_core::{Result, Tensor};

/// Geometry of [`conv_transpose1d`]; names and meaning as in `torch.nn.ConvTranspose1d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvTranspose1dSpec {
    /// Output frames per input frame.
    pub stride: usize,
    /// Frames cut from each side of the full output.
    pub padding: usize,
    /// Frames added on the right; below `stride`.
    pub output_padding: usize,
    /// Frames between two taps.
    pub dilation: usize,
    /// Independent groups of channels.
    pub groups: usize,
}

impl Default for ConvTranspose1dSpec {
    fn default() -> Self {
        ConvTranspose1dSpec { stride: 1, padding: 0, output_padding: 0, dilation: 1, groups: 1 }
    }
}

impl ConvTranspose1dSpec {
    /// Output frames for `t` input frames and `kernel` taps:
    /// `(t-1) stride - 2 padding + dilation (kernel-1) + output_padding + 1`.
    ///
    /// # Errors
    /// If that is not positive, `output_padding` is not below `stride`, or stride, dilation or kernel is zero.
    pub fn out_len(&self, t: usize, kernel: usize) -> Result<usize> {
        if self.stride == 0 || self.dilation == 0 || kernel == 0 || t == 0 {
            candle_core::bail!(
                "conv_transpose1d: stride, dilation, kernel and frames must be positive, got {self:?}, kernel {kernel}, \
                 {t} frames"
            )
        }
        if self.output_padding >= self.stride {
            candle_core::bail!(
                "conv_transpose1d: output_padding {} must be below stride {}",
                self.output_padding,
                self.stride
            )
        }
        let full = (t - 1) * self.stride + self.dilation * (kernel - 1) + self.output_padding + 1;
        if full <= 2 * self.padding {
            candle_core::bail!("conv_transpose1d: padding {} leaves nothing of {full} frames", self.padding)
        }
        Ok(full - 2 * self.padding)
    }
}

/// Transposed convolution along time: the gradient of [`crate::conv1d()`] with respect to its input, used forward.
///
/// `y[b, t·stride + k·dilation - padding, o] += weight[i, o, k] · x[b, t, i]`, plus `bias[o]`.
///
/// # Shapes
/// - `x`: `[B, T, Cin]`, `weight`: `[Cin, Cout/groups, K]`, `bias`: `[Cout]`; returns `[B, T', Cout]` with `T'` from
///   [`ConvTranspose1dSpec::out_len`].
///
/// # Errors
/// If the shapes do not fit each other or the groups.
pub fn conv_transpose1d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    spec: ConvTranspose1dSpec,
) -> Result<Tensor> {
    check(x, weight, bias, spec)?;
    let mut all = vec![x, weight];
    all.extend(bias);
    if crate::kernels::fast(&all) {
        cpu::conv_transpose1d(x, weight, bias, spec)
    } else {
        plain::conv_transpose1d(x, weight, bias, spec)
    }
}

fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, spec: ConvTranspose1dSpec) -> Result<()> {
    let (_, t, c_in) = x.dims3()?;
    let (w_in, out_group, k) = weight.dims3()?;
    if spec.groups == 0 || w_in != c_in || !c_in.is_multiple_of(spec.groups) {
        candle_core::bail!(
            "conv_transpose1d: weight {:?} does not fit x {:?} in {} groups",
            weight.dims(),
            x.dims(),
            spec.groups
        )
    }
    if let Some(bias) = bias
        && bias.dims() != [out_group * spec.groups]
    {
        candle_core::bail!("conv_transpose1d: bias {:?} does not fit weight {:?}", bias.dims(), weight.dims())
    }
    spec.out_len(t, k).map(|_| ())
}
