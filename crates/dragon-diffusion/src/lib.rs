//! Diffusion over latents: the EDM formulation, the diffusion transformer, guidance and solvers.
//!
//! In reading order:
//! - [`edm`]: noise levels, preconditioning and loss weights;
//! - [`guidance`]: what a solver sees of a model, CFG and CFG++;
//! - [`solver`]: DPM-Solver++(2M), as ODE and SDE, and (2S), Heun;
//! - [`dit`]: the network;
//! - [`model`]: what training and sampling need of a model; network and preconditioning together;
//! - [`sampler`]: from prompts' noise to latents;
//! - [`stable_audio`]: the network of Stable Audio Open.

pub mod dit;
pub mod edm;
pub mod guidance;
pub mod model;
mod noise_features;
pub mod sampler;
pub mod solver;
pub mod stable_audio;

pub use dit::{Dit, TextCond};
pub use edm::{Edm, Weighting, denoising_errors};
pub use guidance::{ConditionalDenoiser, Denoiser, Guidance, GuidanceKind};
pub use model::{Conditioned, Config, Denoise, DiffusionModel, Model};
pub use sampler::{Noise, SamplerConfig, sample, sample_in_batches, sample_with};
pub use solver::{Progress, Solver};
pub use stable_audio::StableAudio;
