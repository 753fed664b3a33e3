//! Distances, diversity, win rates and intervals on embeddings: exact (f64), deterministic, fast; no models, no audio.
//!
//! Reading order:
//! - [`rows`]: [`Rows`], a checked `[N, D]` matrix of embeddings, the input of everything else.
//! - [`gaussian`]: [`GaussianStats`] (mean, covariance) and [`Moments`], the streaming accumulator.
//! - [`frechet`]: Fréchet distance by symmetric eigenvalues; [`FrechetReference`], made once per reference set;
//!   [`FrechetPool`], the distance of any subset of a fixed pool of songs (bootstraps, greedy selection).
//! - [`convention`], [`mod@fad_inf`]: the Gaussians that other tools make of the same rows; the distance at infinitely many rows.
//! - [`kad`], [`mod@prdc`]: distances without a Gaussian; precision, recall, density, coverage.
//! - [`mod@vendi`], [`mod@clap_score`], [`regression`]: diversity of a set; agreement of audio and text; ratings from embeddings.
//! - [`mod@pca`]: the axes of a map of songs.
//! - [`mod@win_rate`], [`correlation`], [`mod@bootstrap`], [`glm`]: the statistics around the metrics.
//! - [`files`]: reference statistics (`.npz` as fadtk writes them, safetensors) and embeddings (`.npy`, `.npz`, safetensors).
//! - [`linalg`]: the two eigenvalue routines and products that the rest is made of.
//!
//! ```
//! use dragon_metrics::{FrechetReference, Rows};
//! let reference = Rows::new(3, 2, vec![0.0, 0.0, 1.0, 0.0, 0.0, 1.0])?; // [N, D], row after row
//! let generated = Rows::from_vecs(&[[0.5, 0.0], [1.5, 0.0], [0.5, 1.0]])?; // the same, moved by (1/2, 0)
//! let fad = FrechetReference::from_rows(&reference)?.distance(&generated)?;
//! assert!((fad - 0.25).abs() < 1e-12);
//! # Ok::<(), dragon_metrics::Error>(())
//! ```
//!
//! Every product and every eigenproblem runs on one thread; parallelism is over songs or subsets only, so no result
//! depends on the number of threads. Nothing here draws random numbers except [`mod@bootstrap`], [`mod@fad_inf`] and [`regression::cross_validate`],
//! from a documented generator and a seed that the caller gives.

pub mod bootstrap;
pub mod clap_score;
pub mod convention;
pub mod correlation;
mod error;
pub mod fad_inf;
pub mod files;
pub mod frechet;
pub mod gaussian;
pub mod glm;
pub mod kad;
pub mod linalg;
mod pairwise;
pub mod pca;
pub mod prdc;
pub mod regression;
pub mod rows;
mod tridiagonal;
pub mod vendi;
pub mod win_rate;

pub use bootstrap::{Better, Bootstrap, PairedBootstrap, bootstrap, bootstrap_indices, paired_bootstrap};
pub use clap_score::{Clip, clap_score};
pub use convention::Convention;
pub use correlation::{pearson, per_prompt_spearman, spearman};
pub use error::Error;
pub use fad_inf::{FadInf, FadInfOptions, fad_inf, fad_inf_indices};
pub use frechet::{FrechetPool, FrechetReference, FrechetWalk, frechet_distance, per_song_fad};
pub use gaussian::{GaussianStats, Moments};
pub use glm::{BinomialGlm, win_log_odds};
pub use kad::{KadPool, KadReference, Kernel, kad_as_kadtk, median_distance};
pub use pca::{Pca, pca};
pub use prdc::{Prdc, PrdcPool, prdc};
pub use regression::{CrossValidation, KernelRegression, Method, Similarity, cross_validate};
pub use rows::Rows;
pub use vendi::{VendiBatches, VendiPool, vendi, vendi_of_kernel, vendi_order, vendi_weighted};
pub use win_rate::{
    WinRate, beta_posterior_above, binomial_p_value, clopper_pearson, clopper_pearson_lower, win_rate,
};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
