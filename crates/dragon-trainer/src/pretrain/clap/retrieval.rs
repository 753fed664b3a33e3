//! How well clips and captions find each other.

use std::collections::HashSet;
use std::path::Path;

use dragon_data::{Split, read_manifest};
use dragon_encoders::clap::ClapEncoder;
use dragon_encoders::settings::peak_normalize;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How well clips and captions find each other: recall in [0, 1] and median rank from 1, both ways.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Retrieval {
    /// Number of pairs; by chance, recall at `k` is about `k / n` and the median rank `n / 2`.
    pub n: usize,
    /// From a clip to its caption.
    pub text: Recall,
    /// From a caption to its clip.
    pub audio: Recall,
}

/// Recall at 1, 5 and 10, and the median rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Share of queries whose own item comes first.
    pub at_1: f64,
    /// Share of queries whose own item is among the first five.
    pub at_5: f64,
    /// Share of queries whose own item is among the first ten.
    pub at_10: f64,
    /// Median rank of the own item, from 1.
    pub median_rank: f64,
}

impl Recall {
    fn of(mut ranks: Vec<usize>) -> Self {
        ranks.sort_unstable();
        let at = |k: usize| ranks.iter().filter(|r| **r <= k).count() as f64 / ranks.len().max(1) as f64;
        let median_rank = ranks.get(ranks.len() / 2).map_or(0.0, |r| *r as f64);
        Self { at_1: at(1), at_5: at(5), at_10: at(10), median_rank }
    }
}

impl Retrieval {
    /// Of unit-length embeddings, where row `i` of `audio` belongs to row `i` of `text`. Items with the same caption
    /// as the query's are not counted against it, other ties are.
    pub fn of(audio: &[Vec<f32>], text: &[Vec<f32>], captions: &[String]) -> Self {
        let n = audio.len();
        let cosine = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let rank = |own: usize, query: &[f32], items: &[Vec<f32>]| {
            let score = cosine(query, &items[own]);
            let ahead = (0..n).filter(|&j| captions[j] != captions[own] && cosine(query, &items[j]) >= score);
            1 + ahead.count()
        };
        Self {
            n,
            text: Recall::of((0..n).into_par_iter().map(|i| rank(i, &audio[i], text)).collect()),
            audio: Recall::of((0..n).into_par_iter().map(|i| rank(i, &text[i], audio)).collect()),
        }
    }

    /// Measures a model on clips of a manifest: one per piece of the given splits, at most `n_pieces`.
    ///
    /// # Errors
    /// If the manifest or a clip cannot be read, or a caption is empty.
    pub fn on_pieces(
        encoder: &ClapEncoder,
        manifest: &Path,
        splits: &[Split],
        n_pieces: usize,
    ) -> Result<Self> {
        let context = "the data of the CLAP evaluation";
        let mut seen = HashSet::new();
        let entries = read_manifest(manifest).map_err(Error::input(context))?;
        let entries =
            entries.into_iter().filter(|e| splits.contains(&e.split) && seen.insert(e.piece.clone()));
        let folder = manifest.parent().unwrap_or(Path::new("."));
        let (mut clips, mut captions) = (vec![], vec![]);
        let audio = &encoder.model.config().audio;
        for entry in entries.take(n_pieces) {
            let path = folder.join(&entry.path);
            let mut clip =
                dragon_audio::read_mono(&path, audio.sample_rate_hz).map_err(Error::input(context))?;
            clip.samples.truncate(audio.clip_samples);
            peak_normalize(&mut clip.samples);
            clips.push(clip.samples);
            captions.push(entry.caption);
        }
        let views: Vec<&[f32]> = clips.iter().map(Vec::as_slice).collect();
        let text = encoder.embed_captions(&captions).map_err(Error::input(context))?;
        Ok(Self::of(&encoder.embed_clips(&views)?, &text, &captions))
    }

    /// As scalars of a log.
    pub(super) fn scalars(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("text_r1", self.text.at_1),
            ("text_r5", self.text.at_5),
            ("text_r10", self.text.at_10),
            ("text_median_rank", self.text.median_rank),
            ("audio_r1", self.audio.at_1),
            ("audio_r5", self.audio.at_5),
            ("audio_r10", self.audio.at_10),
            ("audio_median_rank", self.audio.median_rank),
            ("n_pairs", self.n as f64),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perfect_and_reversed_embeddings_have_the_ranks_they_should() {
        let rows: Vec<Vec<f32>> =
            (0..4).map(|i| (0..4).map(|j| f32::from(u8::from(i == j))).collect()).collect();
        let captions: Vec<String> = (0..4).map(|i| format!("{i}")).collect();
        let perfect = Retrieval::of(&rows, &rows, &captions);
        assert_eq!((perfect.text.at_1, perfect.audio.median_rank), (1.0, 1.0));
        let swapped: Vec<Vec<f32>> = rows.iter().rev().cloned().collect();
        assert_eq!(Retrieval::of(&rows, &swapped, &captions).text.at_1, 0.0);
        let same = vec!["x".to_string(); 4];
        assert_eq!(Retrieval::of(&rows, &swapped, &same).text.at_1, 1.0);
    }
}
