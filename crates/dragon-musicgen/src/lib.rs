//! MusicGen (Copet et al. 2023, arXiv:2306.05284): a transformer that writes the codes of an audio codec, one frame after the
//! other, to a text.
//!
//! In reading order:
//! - [`delay`]: how the codebooks of a frame are spread over steps;
//! - [`decoder`]: the network, and what it keeps from step to step;
//! - [`generate`](mod@generate): guidance, and the choice of each code;
//! - [`published`]: configs and names of tensors as Hugging Face publishes them.
//!
//! Text states come from outside (a T5), and codes become audio outside (EnCodec): this crate knows neither.

pub mod decoder;
pub mod delay;
pub mod generate;
pub mod published;

pub use decoder::{Config, MusicGen, State, Texts};
pub use delay::Delay;
pub use generate::{Choice, Sampling, generate};
