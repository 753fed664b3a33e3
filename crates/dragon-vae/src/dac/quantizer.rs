//! The residual vector quantiser of DAC (`dac/nn/quantize.py`), without what trains it: vectors are looked up in a few
//! dimensions, and by direction only.

use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::VarBuilder;
use dragon_nn::{Conv1d, Conv1dSpec, Embedding};

use super::Config;

/// Codebooks, each for what the ones before leave.
#[derive(Debug, Clone)]
pub struct Quantizer {
    layers: Vec<Layer>,
}

#[derive(Debug, Clone)]
struct Layer {
    /// Latents to the codebook's dimensions.
    in_proj: Conv1d,
    /// And back.
    out_proj: Conv1d,
    codebook: Embedding,
    /// The codebook's vectors at length 1, `[K, d]`.
    directions: Tensor,
}

impl Quantizer {
    /// Reads `quantizers.0.in_proj.…`, `quantizers.0.codebook.weight` and so on.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let layer = |i: usize| {
            let vb = vb.pp("quantizers").pp(i);
            let conv =
                |from, to, name: &str| Conv1d::weight_norm(from, to, 1, Conv1dSpec::default(), vb.pp(name));
            let codebook = Embedding::new(cfg.codebook_size, cfg.codebook_dim, vb.pp("codebook"))?;
            Ok(Layer {
                in_proj: conv(cfg.latent_dim, cfg.codebook_dim, "in_proj")?,
                out_proj: conv(cfg.codebook_dim, cfg.latent_dim, "out_proj")?,
                directions: directions(&codebook.weight)?,
                codebook,
            })
        };
        Ok(Self { layers: (0..cfg.n_codebooks).map(layer).collect::<Result<_>>()? })
    }

    /// Latents `[B, latent_dim, T]` to codes `[B, n_codebooks, T]`, u32.
    ///
    /// # Errors
    /// If there are fewer codebooks, or the channels differ.
    pub fn encode(&self, latents: &Tensor, n_codebooks: usize) -> Result<Tensor> {
        if n_codebooks == 0 || n_codebooks > self.layers.len() {
            bail!("quantize: expected 1 to {} codebooks, found {n_codebooks}", self.layers.len());
        }
        let mut rest = latents.transpose(1, 2)?.contiguous()?; // [B, T, C]
        let (batch, frames, _) = rest.dims3()?;
        let mut codes = Vec::with_capacity(n_codebooks);
        for layer in &self.layers[..n_codebooks] {
            let projected = directions(&rest.apply(&layer.in_proj)?.flatten_to(1)?)?; // [B*T, d]
            let norms = layer.directions.sqr()?.sum(1)?; // [K]
            let products = projected.matmul(&layer.directions.t()?)?; // [B*T, K]
            let nearest = (products * -2.0)?.broadcast_add(&norms)?.argmin(1)?.reshape((batch, frames))?;
            rest = (rest - layer.latents(&nearest)?)?;
            codes.push(nearest);
        }
        Tensor::stack(&codes, 1) // [B, n_codebooks, T]
    }

    /// Codes `[B, K, T]`, whole numbers, to the latents `[B, latent_dim, T]` that they stand for.
    ///
    /// # Errors
    /// If there are more rows of codes than codebooks, or a code is not below the codebooks' size.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let (_, n, _) = codes.dims3()?;
        if n == 0 || n > self.layers.len() {
            bail!("dequantize: expected codes of 1 to {} codebooks, found {n}", self.layers.len());
        }
        let codes = codes.to_dtype(DType::U32)?;
        let mut sum: Option<Tensor> = None;
        for (i, layer) in self.layers[..n].iter().enumerate() {
            let ids = codes.narrow(1, i, 1)?.squeeze(1)?.contiguous()?; // [B, T]
            let size = layer.codebook.weight.dim(0)?;
            if let Some(bad) =
                ids.flatten_all()?.to_vec1::<u32>()?.into_iter().find(|&id| id as usize >= size)
            {
                bail!("dequantize: expected codes below {size}, found {bad} in codebook {i}");
            }
            let latents = layer.latents(&ids)?;
            sum = Some(match sum {
                Some(sum) => (sum + latents)?,
                None => latents,
            });
        }
        let Some(sum) = sum else { bail!("dequantize: no codes") };
        sum.transpose(1, 2)?.contiguous() // [B, C, T]
    }
}

impl Layer {
    /// Codes `[B, T]` to latents `[B, T, C]`.
    fn latents(&self, ids: &Tensor) -> Result<Tensor> {
        self.out_proj.forward(&self.codebook.forward(ids)?)
    }
}

/// Rows `[N, d]` at length 1 (`torch.nn.functional.normalize`).
fn directions(rows: &Tensor) -> Result<Tensor> {
    rows.broadcast_div(&rows.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?)
}
