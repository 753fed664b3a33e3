//! The captions of a set of clips as tokens.

use candle_core::{Device, Tensor};
use dragon_encoders::tokenizer::{Tokenizer, TooLong};

use crate::error::{Error, Result};

/// Captions as token ids.
pub(super) struct Captions {
    ids: Vec<u32>,
    mask: Vec<f32>,
    max_tokens: usize,
}

impl Captions {
    /// Tokens of all captions, cut at `max_tokens`.
    pub fn new(tokenizer: &Tokenizer, captions: &[String], max_tokens: usize) -> Result<Self> {
        let tokens = tokenizer
            .encode_batch(captions, max_tokens, TooLong::Truncate, &Device::Cpu)
            .map_err(Error::input("cannot read a caption"))?;
        if !tokens.truncated.is_empty() {
            tracing::warn!(
                "{} of {} captions cut at {max_tokens} tokens",
                tokens.truncated.len(),
                captions.len()
            );
        }
        Ok(Self {
            ids: tokens.ids.flatten_all()?.to_vec1()?,
            mask: tokens.mask.flatten_all()?.to_vec1()?,
            max_tokens,
        })
    }

    /// Ids and mask of some captions, as long as the longest of them.
    pub fn batch(&self, rows: &[usize], device: &Device) -> Result<(Tensor, Tensor)> {
        let row = |i: usize| i * self.max_tokens..(i + 1) * self.max_tokens;
        let tokens_of = |&i: &usize| self.mask[row(i)].iter().filter(|&&m| m > 0.5).count();
        let length = rows.iter().map(tokens_of).max().unwrap_or(0).max(1);
        let ids: Vec<u32> = rows.iter().flat_map(|&i| self.ids[row(i)][..length].to_vec()).collect();
        let mask: Vec<f32> = rows.iter().flat_map(|&i| self.mask[row(i)][..length].to_vec()).collect();
        let shape = (rows.len(), length);
        Ok((Tensor::from_vec(ids, shape, device)?, Tensor::from_vec(mask, shape, device)?))
    }
}
