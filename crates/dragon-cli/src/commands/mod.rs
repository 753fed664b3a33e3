//! The commands, one module each.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use clap::Subcommand;

/// What `dragon` can do.
#[derive(Subcommand)]
pub enum Command {}

impl Command {
    /// Runs the command to its end, or until `stop` is set.
    pub fn run(self, _stop: &Arc<AtomicBool>) -> Result<()> {
        match self {}
    }
}
