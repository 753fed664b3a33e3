//! Encoders of audio and text, tokenizers, and the settings by which a song becomes embeddings.
//!
//! Reading order:
//! - [`encoder`]: the roles [`AudioEncoder`] and [`TextEncoder`], and [`Embeddings`];
//! - [`settings`]: MA, FADTK, VAE and frames, from samples to windows;
//! - [`musicnn`]: a music tagger with trained weights, for Fréchet distances and Vendi scores;
//! - [`vggish`], [`codec`] (EnCodec, DAC, Stable Audio's autoencoder): for Fréchet distances;
//! - [`tokenizer`], [`t5`]: captions to ids, ids to the states that condition the denoiser;
//! - [`clap`]: audio and text in one space, of [`htsat`] and [`roberta`];
//! - [`error`]: what can go wrong.

pub mod clap;
pub mod codec;
pub mod encoder;
pub mod error;
pub mod htsat;
mod layers;
mod loudness;
pub mod musicnn;
pub mod roberta;
mod rows;
pub mod settings;
pub mod t5;
pub mod tokenizer;
pub mod vggish;

pub use encoder::{AudioEncoder, Embeddings, TextEncoder};
pub use error::{Error, Result};
pub use settings::{Setting, Tail};
