//! Distances, diversity, win rates and intervals on embeddings: exact (f64), deterministic, fast; no models, no audio.
//!
//! Reading order:
//! - [`rows`]: [`Rows`], a checked `[N, D]` matrix of embeddings, the input of everything else.
//! - [`gaussian`]: [`GaussianStats`] (mean, covariance) and [`Moments`], the streaming accumulator.
//! - [`frechet`]: Fréchet distance by symmetric eigenvalues; [`FrechetReference`], made once per reference set;
//!   [`FrechetPool`], the distance of any subset of a fixed pool of songs (bootstraps, greedy selection).
//! - [`mod@vendi`], [`mod@clap_score`]: diversity of a set; agreement of audio and text.
//! - [`mod@win_rate`], [`correlation`], [`bootstrap`]: the statistics around the metrics.
//! - [`files`]: reference statistics (`.npz` as fadtk writes them, safetensors) and embeddings (`.npy`, `.npz`, safetensors).
//! - [`linalg`]: the two eigenvalue routines and products that the rest is made of.
//!
//! Every product and every eigenproblem runs on one thread; parallelism is over songs or subsets only, so no result
//! depends on the number of threads. Nothing here draws random numbers except [`bootstrap`], from a documented generator.

pub mod bootstrap;
pub mod clap_score;
pub mod correlation;
mod error;
pub mod files;
pub mod frechet;
pub mod gaussian;
pub mod linalg;
pub mod rows;
pub mod vendi;
pub mod win_rate;

pub use bootstrap::{Better, PairedBootstrap, bootstrap_indices, paired_bootstrap};
pub use clap_score::{Clip, clap_score};
pub use correlation::{pearson, per_prompt_spearman, spearman};
pub use error::Error;
pub use frechet::{FrechetPool, FrechetReference, FrechetWalk, frechet_distance, per_song_fad};
pub use gaussian::{GaussianStats, Moments};
pub use rows::Rows;
pub use vendi::{VendiPool, vendi, vendi_order};
pub use win_rate::{
    WinRate, beta_posterior_above, binomial_p_value, clopper_pearson, clopper_pearson_lower, win_rate,
};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
