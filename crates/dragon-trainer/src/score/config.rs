//! What a scoring depends on: [`ScoreConfig`].

use dragon_metrics::{Clip, Convention, Kernel};
use dragon_rewards::Pooling;
use serde::{Deserialize, Serialize};

use crate::embedder::{EncoderConfig, Setting};
use crate::error::{Error, Result};
use crate::song_encoder::SongEncoder;

/// Something that is measured of a system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Fréchet distance of all rows to the reference.
    Fad,
    /// The same at infinitely many rows.
    FadInf,
    /// Mean over the songs of the Fréchet distance of one song's rows.
    PerSongFad,
    /// Kernel distance.
    Kad,
    /// Precision, recall, density and coverage.
    Prdc,
    /// Effective number of different songs.
    Vendi,
    /// Agreement of each song with its prompt.
    ClapScore,
}

impl Metric {
    /// All, in the order of the tables.
    pub const ALL: [Metric; 7] = [
        Metric::Fad,
        Metric::PerSongFad,
        Metric::FadInf,
        Metric::Kad,
        Metric::Prdc,
        Metric::Vendi,
        Metric::ClapScore,
    ];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Fad => "fad",
            Metric::FadInf => "fad-inf",
            Metric::PerSongFad => "per-song-fad",
            Metric::Kad => "kad",
            Metric::Prdc => "prdc",
            Metric::Vendi => "vendi",
            Metric::ClapScore => "clap-score",
        }
    }

    /// Whether it compares with the reference.
    pub(super) fn needs_reference(self) -> bool {
        !matches!(self, Metric::Vendi | Metric::ClapScore)
    }
}

/// Everything a scoring depends on, besides the reference and the systems.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreConfig {
    /// Seed of the resampled songs and of FAD-infinity's rows.
    pub seed: u64,
    /// What is measured; without it, all that the reference, the systems and the prompts allow, except FAD-infinity.
    pub metrics: Option<Vec<Metric>>,
    /// How embeddings become a Gaussian.
    pub convention: Convention,
    /// How often the songs are drawn anew, with replacement, for the intervals.
    pub subsets: usize,
    /// What one row of the Vendi score is.
    pub vendi: Pooling,
    /// Order of the Vendi score, 0 to infinity.
    pub vendi_order: f64,
    /// Kernel of the kernel distance; its bandwidth is the reference's median distance.
    pub kernel: Kernel,
    /// Neighbours of precision, recall, density and coverage.
    pub neighbours: usize,
    /// Where negative cosines of the CLAP score become 0.
    pub clip: Clip,
    /// How FAD-infinity draws.
    pub fad_inf: FadInfConfig,
    /// Songs of each system that lie farthest from the reference and go into the report with their audio.
    pub outliers: usize,
    /// What embeds audio and texts.
    pub encoder: EncoderConfig,
    /// How a song is cut.
    pub setting: Setting,
}

/// How FAD-infinity draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FadInfConfig {
    /// Rows of the smallest set.
    pub min_rows: usize,
    /// Sets.
    pub steps: usize,
}

impl ScoreConfig {
    /// Checks what can be checked without files.
    ///
    /// # Errors
    /// For the first key that cannot work.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("subsets", self.subsets, 2),
            ("neighbours", self.neighbours, 1),
            ("fad_inf.min_rows", self.fad_inf.min_rows, 2),
            ("fad_inf.steps", self.fad_inf.steps, 2),
        ];
        for (key, value, least) in counts {
            if value < least {
                return Err(Error::config(key, format!("at least {least}"), value));
            }
        }
        if self.vendi_order.is_nan() || self.vendi_order < 0.0 {
            return Err(Error::config("vendi_order", "a number of at least 0, or inf", self.vendi_order));
        }
        if self.metrics.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::config("metrics", "at least one metric", "none"));
        }
        SongEncoder::check(&self.encoder, &self.setting)
    }
}
