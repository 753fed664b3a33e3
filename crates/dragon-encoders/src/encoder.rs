//! The two roles of this crate: [`AudioEncoder`] and [`TextEncoder`], and what they return, [`Embeddings`].

use dragon_audio::Clip;

use crate::error::{Error, Result};
use crate::settings::{self, Setting};

/// Rows of equal length: one embedding per window, frame or text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Embeddings {
    /// Number of rows.
    pub n: usize,
    /// Length of a row.
    pub dim: usize,
    /// `[n, dim]`, flat, row by row.
    pub data: Vec<f32>,
}

impl Embeddings {
    /// Puts rows together; no rows give `n = dim = 0`.
    ///
    /// # Errors
    /// If the rows differ in length.
    pub fn from_rows(rows: &[Vec<f32>]) -> Result<Self> {
        let dim = rows.first().map_or(0, Vec::len);
        if let Some(row) = rows.iter().find(|row| row.len() != dim) {
            return Err(Error::Dimension { expected: dim, found: row.len() });
        }
        Ok(Embeddings { n: rows.len(), dim, data: rows.concat() })
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.dim..(i + 1) * self.dim]
    }

    /// The rows in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        (0..self.n).map(|i| self.row(i))
    }

    /// Mean of the rows, summed in f64 (the per-song embedding of the batch Vendi score); empty if there are none.
    pub fn mean(&self) -> Vec<f32> {
        (0..if self.n == 0 { 0 } else { self.dim })
            .map(|j| (self.rows().map(|row| f64::from(row[j])).sum::<f64>() / self.n as f64) as f32)
            .collect()
    }

    /// Appends the rows of `other`.
    ///
    /// # Errors
    /// If both have rows and these differ in length.
    pub fn append(&mut self, other: &Embeddings) -> Result<()> {
        if self.n == 0 {
            self.dim = other.dim;
        } else if other.n > 0 && other.dim != self.dim {
            return Err(Error::Dimension { expected: self.dim, found: other.dim });
        }
        self.n += other.n;
        self.data.extend_from_slice(&other.data);
        Ok(())
    }

    /// All values as f64, row by row, as the metrics take them.
    pub fn to_f64(&self) -> Vec<f64> {
        self.data.iter().map(|&x| f64::from(x)).collect()
    }
}

/// Audio to embeddings. Implementations are deterministic: the same samples give the same bits, whatever the number of
/// threads and whatever else is in the batch.
pub trait AudioEncoder: Send + Sync {
    /// Name and weights, such as `musicnn-mtt`: statistics of different ids must not be compared.
    fn id(&self) -> &str;

    /// Sample rate of the audio it reads, Hz.
    fn sample_rate_hz(&self) -> u32;

    /// Length of the audio behind one embedding, samples.
    fn window_samples(&self) -> usize;

    /// Length of an embedding.
    fn dim(&self) -> usize;

    /// One embedding for each window. Each window has [`Self::window_samples`] samples and is taken as it is: not
    /// normalised, not padded.
    ///
    /// # Errors
    /// If a window has another length.
    fn embed_windows(&self, windows: &[&[f32]]) -> Result<Vec<Vec<f32>>>;

    /// Embeddings of one clip under a setting: [`settings::windows`], then [`Self::embed_windows`].
    ///
    /// # Errors
    /// If the clip is too short or not finite, or the setting does not fit this encoder.
    fn embed_clip(&self, samples: &[f32], setting: &Setting) -> Result<Embeddings> {
        let windows = settings::windows(samples, self.window_samples(), self.sample_rate_hz(), setting)?;
        let views: Vec<&[f32]> = windows.iter().map(Vec::as_slice).collect();
        Embeddings::from_rows(&self.embed_windows(&views)?)
    }

    /// [`Self::embed_clip`] for many clips, in order.
    ///
    /// # Errors
    /// Those of the first clip that fails.
    fn embed_clips(&self, clips: &[&[f32]], setting: &Setting) -> Result<Vec<Embeddings>> {
        clips.iter().map(|samples| self.embed_clip(samples, setting)).collect()
    }

    /// [`Self::embed_clip`] for a clip that knows its sample rate.
    ///
    /// # Errors
    /// If the rate is not [`Self::sample_rate_hz`], and as [`Self::embed_clip`].
    fn embed_audio(&self, clip: &Clip, setting: &Setting) -> Result<Embeddings> {
        if clip.sample_rate_hz != self.sample_rate_hz() {
            return Err(Error::SampleRate {
                encoder: self.id().to_string(),
                expected: self.sample_rate_hz(),
                found: clip.sample_rate_hz,
            });
        }
        self.embed_clip(&clip.samples, setting)
    }
}

/// Texts to embeddings.
pub trait TextEncoder: Send + Sync {
    /// One row per text, in order.
    ///
    /// # Errors
    /// If a text is empty or longer than the model reads.
    fn embed_texts(&self, texts: &[&str]) -> Result<Embeddings>;
}
