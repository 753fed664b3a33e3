//! Weights on disk: `write` makes safetensors files, `read` opens those of others (safetensors and PyTorch's, whose
//! pickles `pickle` reads), `json` the fields of their configurations, and `load` builds models on them.

pub mod json;
mod load;
mod pickle;
mod read;
mod write;

pub use load::{Loader, Source};
pub use read::Checkpoint;
pub use write::{write_atomically, write_safetensors};
