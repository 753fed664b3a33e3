//! Rewards of songs and of sets of songs, and the demonstration sets D+ and D- made from them (paper 3.1, 4).
//!
//! - [`song`]: what a reward sees: embeddings and, where needed, the text embedding of the prompt.
//! - [`reward`]: the traits. An [`InstanceReward`] scores one song, alone (CLAP score) or against a reference
//!   distribution (per-song FAD); a [`DistributionReward`] scores a set of songs (dataset FAD, Vendi).
//! - [`terms`]: the rewards themselves; [`mix`]: weighted sums and random mixing.
//! - [`config`]: [`RewardConfig`], what to compute, and [`RewardSet`], built from it and from reference statistics.
//! - [`demonstrations`]: pairwise winners, splits at the mean or median, and Algorithm 1.
//!
//! Higher is better for every reward: distances are negated here and nowhere else. Embedding audio and text is the
//! caller's step, so everything here is tested without weights. No gradients, no audio.

pub mod config;
pub mod demonstrations;
mod error;
pub mod mix;
pub mod reward;
pub mod song;
pub mod terms;

pub use config::{Exemplars, References, RewardConfig, RewardSet, Source, Term};
pub use demonstrations::{Demonstrations, Split, algorithm_1, greedy, paired, unpaired};
pub use error::Error;
pub use mix::{RunningStats, WeightedDistributions, WeightedInstances};
pub use reward::{DistributionReward, IncrementalScore, InstanceReward, Reward};
pub use song::{Song, View, gather_songs};
pub use terms::{ClapScore, DatasetFad, MeanOf, PerSongFad, Pooling, Vendi};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
