//! Audio autoencoders, waveform to latents and back: our VAE with its training losses (paper Appendix E), and published ones.
//!
//! In reading order: [`config`] the hyperparameters and presets, [`model`] encoder and decoder, [`vae`] the bottleneck, the
//! whole model and its folder, [`published`] what Stable Audio calls its parts; then what training needs: [`stft`] the transform with a gradient, [`losses`],
//! [`discriminator`], and [`training`], one optimiser step.
//!
//! Beside it the codecs of others, frozen: [`encodec`] and [`dac`].

pub mod config;
pub mod dac;
pub mod encodec;
pub mod model;
pub mod published;
pub mod vae;

pub mod discriminator;
pub mod losses;
pub mod stft;
pub mod training;

pub use config::{Config, Design, Output};
pub use vae::{AudioVae, Error, Posterior};
