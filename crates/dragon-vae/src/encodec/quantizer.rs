//! The residual vector quantiser of EnCodec (encodec 0.1.1, `quantization/core_vq.py`), without what trains it.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::config::Config;

/// Codebooks, each for what the ones before leave.
#[derive(Debug, Clone)]
pub struct Quantizer {
    /// `[codebook_size, latent_dim]` each.
    codebooks: Vec<Tensor>,
}

impl Quantizer {
    /// Reads `vq.layers.0._codebook.embed` and so on.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("vq").pp("layers");
        let codebook = |i: usize| vb.pp(i).pp("_codebook").get((cfg.codebook_size, cfg.latent_dim), "embed");
        Ok(Self { codebooks: (0..cfg.n_codebooks).map(codebook).collect::<Result<_>>()? })
    }

    /// Latents `[B, latent_dim, T]` to codes `[B, n_codebooks, T]`, u32: of each codebook the vector nearest to what is left.
    ///
    /// # Errors
    /// If there are fewer codebooks, or the channels differ.
    pub fn encode(&self, latents: &Tensor, n_codebooks: usize) -> Result<Tensor> {
        if n_codebooks == 0 || n_codebooks > self.codebooks.len() {
            bail!("quantize: expected 1 to {} codebooks, found {n_codebooks}", self.codebooks.len());
        }
        let (batch, channels, frames) = latents.dims3()?;
        let mut rest = latents.transpose(1, 2)?.contiguous()?.reshape((batch * frames, channels))?; // [B*T, C]
        let mut codes = Vec::with_capacity(n_codebooks);
        for codebook in &self.codebooks[..n_codebooks] {
            // |x - e|² = |x|² - 2 x e + |e|², of which the first term is the same for all e
            let norms = codebook.sqr()?.sum(1)?; // [K]
            let distance = (rest.matmul(&codebook.t()?)? * -2.0)?.broadcast_add(&norms)?; // [B*T, K]
            let nearest = distance.argmin(1)?; // [B*T]
            rest = (rest - codebook.index_select(&nearest, 0)?)?;
            codes.push(nearest.reshape((batch, frames))?);
        }
        Tensor::stack(&codes, 1) // [B, n_codebooks, T]
    }

    /// Codes `[B, K, T]`, whole numbers, to the latents `[B, latent_dim, T]` that they stand for.
    ///
    /// # Errors
    /// If there are more rows of codes than codebooks, or a code is not below the codebooks' size.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let (batch, n, frames) = codes.dims3()?;
        if n == 0 || n > self.codebooks.len() {
            bail!("dequantize: expected codes of 1 to {} codebooks, found {n}", self.codebooks.len());
        }
        let codes = codes.to_dtype(DType::U32)?;
        let mut sum: Option<Tensor> = None;
        for (i, codebook) in self.codebooks[..n].iter().enumerate() {
            let ids = codes.narrow(1, i, 1)?.contiguous()?.flatten_all()?; // [B*T]
            let size = codebook.dim(0)?;
            if let Some(bad) = ids.to_vec1::<u32>()?.into_iter().find(|&id| id as usize >= size) {
                bail!("dequantize: expected codes below {size}, found {bad} in codebook {i}");
            }
            let vectors = codebook.index_select(&ids, 0)?; // [B*T, C]
            sum = Some(match sum {
                Some(sum) => (sum + vectors)?,
                None => vectors,
            });
        }
        let Some(sum) = sum else { bail!("dequantize: no codes") };
        let channels = sum.dim(1)?;
        sum.reshape((batch, frames, channels))?.transpose(1, 2)?.contiguous() // [B, C, T]
    }
}
