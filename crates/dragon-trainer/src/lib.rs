//! Training and measuring: the losses, the DRAGON loop, pre-training, evaluation and reports.
//!
//! Read in this order: [`finetune`] (the DRAGON loop), [`losses`] (what it learns from D+ and D-), [`rollout`] and
//! [`embedder`] (from prompts to what a reward sees), [`bundle`] and [`mod@diffusion`] (model folders), [`mod@stable_audio`] and [`mod@musicgen`] (published ones); [`pretrain`] (the
//! [`pretrain::Task`] trait and the loop all trainings share), [`run`], [`inputs`] and [`checkpoint`] (run folders, the
//! files that a run reads, exact resume), [`tensorboard`]; [`eval`] with [`report`], [`card`], [`generate`];
//! [`embed`], [`song_encoder`], [`cache`] and [`sets`] (files to embeddings),
//! [`score`] (any systems against a reference); [`mod@bench`] and [`presto`] (how fast the parts are, and those of the paper's size).

pub mod bench;
pub mod bundle;
pub mod cache;
pub mod card;
pub mod checkpoint;
pub mod device;
pub mod diffusion;
pub mod embed;
pub mod embedder;
pub mod error;
pub mod eval;
pub mod finetune;
pub mod generate;
pub mod inputs;
pub mod losses;
pub mod musicgen;
pub mod pack;
pub mod presto;
pub mod pretrain;
pub mod report;
pub mod rollout;
pub mod run;
pub mod schedule;
pub mod score;
pub mod sets;
pub mod song_encoder;
pub mod stable_audio;
pub mod tensorboard;

pub use device::device;
pub use dragon_diffusion::SamplerConfig;
pub use error::{Error, Result};
pub use run::{Progress, RunContext};
