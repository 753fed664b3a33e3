//! CLAP score: agreement of a song's audio embeddings with the text embedding of its own prompt.

use serde::{Deserialize, Serialize};

use crate::rows::{dot, norm};
use crate::{Error, Result, Rows};

/// Where negative cosines become zero. The two differ as soon as one window disagrees with the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clip {
    /// `mean(max(0, cos))`: each window is clipped (the paper's definition).
    #[default]
    BeforeMean,
    /// `max(0, mean(cos))`.
    AfterMean,
}

/// CLAP score of one song, in [0, 1]: `max(0, cos(audio, text))` per window, averaged (paper Eq. 2).
///
/// # Errors
/// If there is no window, the dimensions differ, a value of `text` is not finite, or an embedding is all zeros.
pub fn clap_score(audio: &Rows, text: &[f64], clip: Clip) -> Result<f64> {
    if audio.n() == 0 {
        return Err(Error::TooFew { what: "audio embeddings", expected: 1, found: 0 });
    }
    if text.len() != audio.dim() {
        return Err(Error::Dimension { what: "text embedding", expected: audio.dim(), found: text.len() });
    }
    if let Some(column) = text.iter().position(|x| !x.is_finite()) {
        return Err(Error::NotFinite { what: "text embedding", row: 0, column, value: text[column] });
    }
    let text_norm = norm(text);
    if text_norm == 0.0 {
        return Err(Error::ZeroRow { what: "text embedding", row: 0 });
    }
    let mut sum = 0.0;
    for (i, row) in audio.iter().enumerate() {
        let length = norm(row);
        if length == 0.0 {
            return Err(Error::ZeroRow { what: "audio embeddings", row: i });
        }
        let cos = (dot(row, text) / length / text_norm).clamp(-1.0, 1.0);
        sum += if clip == Clip::BeforeMean { cos.max(0.0) } else { cos };
    }
    Ok((sum / audio.n() as f64).max(0.0))
}
