//! Music with captions: fetched, rendered or imported into a folder of equal clips with a manifest.
//!
//! Reading order:
//! - [`manifest`]: [`Entry`], one line per clip, and its split, by a hash of the piece's name;
//! - [`clips`]: the one form in which the clips of a corpus are stored, and which excerpts are refused;
//! - [`abc`]: ABC notation to notes; [`arrange`]: notes to an arrangement for General MIDI instruments;
//!   [`caption`]: an arrangement in words; [`render`]: all of it to clips (corpus "scores");
//! - [`fetch`]: packages of recorded music to clips (corpus "recordings"), and the inputs that `render` needs;
//! - [`import`]: a folder, JSONL or CSV of the user's own audio and captions;
//! - `store`: output folders that can be gone on with;
//! - [`rng`]: the seeded choices; [`error`]: what can go wrong.

pub mod abc;
pub mod arrange;
pub mod caption;
pub mod clips;
pub mod error;
pub mod fetch;
pub mod import;
pub mod manifest;
pub mod render;
pub mod rng;
mod store;

pub use error::{Error, Result};
pub use manifest::{CaptionSource, Corpus, Entry, Shares, Split, read_manifest, write_manifest};
