//! Training and measuring: the losses, the DRAGON loop, pre-training, evaluation and reports.
//!
//! Read in this order: [`losses`] (what is learned from D+ and D-), [`pretrain`] (the [`pretrain::Task`] trait and the loop all trainings share),
//! then [`run`] and [`checkpoint`] (run folders, exact resume) and [`tensorboard`].

pub mod bundle;
pub mod checkpoint;
pub mod embed;
pub mod error;
pub mod losses;
pub mod pretrain;
pub mod report;
pub mod run;
pub mod tensorboard;

pub use error::{Error, Result};
pub use run::{Progress, RunContext};
