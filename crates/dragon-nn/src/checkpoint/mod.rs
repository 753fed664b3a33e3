//! Weights on disk: `write` makes safetensors files, `read` opens those of others (safetensors and PyTorch's, whose
//! pickles `pickle` reads), and `load` builds models on them.

mod load;
mod pickle;
mod read;
mod write;

pub use load::{Loader, Source};
pub use read::Checkpoint;
pub use write::{write_atomically, write_safetensors};
