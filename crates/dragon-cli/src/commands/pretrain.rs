//! `dragon pretrain`: trains the parts of a model folder.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use clap::ValueEnum;
use dragon_trainer::pretrain::clap::{ClapConfig, ClapTask};
use dragon_trainer::pretrain::vae::{VaeConfig, VaeTask};
use dragon_trainer::pretrain::{self, LoopConfig, Outcome, dit};
use dragon_trainer::run::RunFolder;
use serde::{Deserialize, Serialize};

use super::{ConfigArgs, RunArgs, context};
use crate::settings;

/// Train the parts of a text-to-music model: vae, vae-decoder, vae-joint, clap, dit
///
/// A DiT is trained on the latents of a trained VAE, together with its text encoder.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon pretrain vae --set 'vae.manifests=[\"data/scores/manifest.jsonl\"]' --out runs/vae
  dragon pretrain vae --set vae.init=builtin:tiny/vae     start from the shipped weights (same `vae.model`)
  dragon pretrain vae-decoder --set vae.init=runs/vae/model
  dragon pretrain vae-joint                                  from runs/pretrain-vae-decoder/model
  dragon pretrain dit --set data.manifest=data/scores/manifest.jsonl --set data.vae=runs/vae/model
  dragon pretrain dit --resume                               continue where it stopped")]
pub struct Args {
    /// What to train
    what: What,
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    run: RunArgs,
    /// Run folder: run.toml, metrics.jsonl, checkpoints/, model/ [default: runs/pretrain-WHAT]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// A part of a model folder.
#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Audio to latents and back
    Vae,
    /// The decoder of a trained VAE once more, against discriminators; latents stay as they are
    VaeDecoder,
    /// Both once more, against discriminators, towards latents of few nats
    VaeJoint,
    /// Audio and text into a common space
    Clap,
    /// The diffusion transformer and its text encoder
    Dit,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vae {
    seed: u64,
    vae: VaeConfig,
    run: LoopConfig,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Clap {
    seed: u64,
    clap: ClapConfig,
    run: LoopConfig,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let name = match args.what {
        What::Vae => "pretrain/vae",
        What::VaeDecoder => "pretrain/vae-decoder",
        What::VaeJoint => "pretrain/vae-joint",
        What::Clap => "pretrain/clap",
        What::Dit => "pretrain/dit",
    };
    let out = args.out.unwrap_or_else(|| PathBuf::from("runs").join(name.replace('/', "-")));
    let ctx = context(out, args.run.resume, stop);
    let device = dragon_trainer::device(&args.run.device)?;
    let (file, overrides) = (args.config.path(), args.config.overrides());
    // The lock and the refusal to overwrite a run come before any clip is read.
    let outcome = match args.what {
        What::Vae | What::VaeDecoder | What::VaeJoint => {
            let config: Vae = settings::resolve(name, file, &overrides)?;
            config.vae.check()?;
            config.run.check()?;
            let mut folder = RunFolder::open(&ctx, "pretrain vae", &config)?;
            let mut task = VaeTask::new(&config.vae, config.seed, &device)?;
            pretrain::run_in(&mut folder, &mut task, &config.run, config.seed, &ctx)?
        }
        What::Clap => {
            let config: Clap = settings::resolve(name, file, &overrides)?;
            config.clap.check()?;
            config.run.check()?;
            let mut folder = RunFolder::open(&ctx, "pretrain clap", &config)?;
            let mut task = ClapTask::new(&config.clap, config.seed, &device)?;
            pretrain::run_in(&mut folder, &mut task, &config.run, config.seed, &ctx)?
        }
        What::Dit => {
            let config: dit::Config = settings::resolve(name, file, &overrides)?;
            config.check()?;
            let mut folder = RunFolder::open(&ctx, "pretrain dit", &config)?;
            let mut task = dit::prepare(&config, &device, &ctx)?;
            pretrain::run_in(&mut folder, &mut task, &config.run, config.seed, &ctx)?
        }
    };
    report(&outcome);
    Ok(())
}

fn report(outcome: &Outcome) {
    let state = if outcome.finished { "finished" } else { "stopped, --resume goes on" };
    println!("{}: {} after {} steps", outcome.model_dir.display(), state, outcome.steps_done);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_a_valid_config() {
        settings::resolve::<Vae>("pretrain/vae", None, &[]).unwrap().vae.check().unwrap();
        settings::resolve::<Clap>("pretrain/clap", None, &[]).unwrap().clap.check().unwrap();
        settings::resolve::<dit::Config>("pretrain/dit", None, &[]).unwrap().check().unwrap();
    }

    #[test]
    fn every_preset_shows_every_key() {
        use settings::{assert_every_key_is_shown, resolve};
        assert_every_key_is_shown("pretrain/vae", |set| resolve::<Vae>("pretrain/vae", None, set).map(drop));
        assert_every_key_is_shown("pretrain/clap", |set| {
            resolve::<Clap>("pretrain/clap", None, set).map(drop)
        });
        assert_every_key_is_shown("pretrain/dit", |set| {
            resolve::<dit::Config>("pretrain/dit", None, set).map(drop)
        });
    }
}
