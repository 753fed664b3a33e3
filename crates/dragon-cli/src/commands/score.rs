//! `dragon score`: systems against a reference.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use dragon_metrics::Convention;
use dragon_trainer::score::{self, Inputs, Metric, Named, ScoreConfig};

use super::models::{ModelArgs, Plan};
use super::songs::{self, SongArgs};
use super::{ConfigArgs, context};
use crate::settings;

/// Measure systems against a reference: distances, diversity, intervals, ranks
///
/// Prints a ranked table and writes report.html, report.json, systems.csv and songs.csv. A system is a folder of audio, a
/// file of embeddings [N, D] (.npy, .npz, .safetensors), a folder of .npy, one a song, or a model: a model folder (ours, Stable
/// Audio Open or MusicGen as published) or a run of `dragon finetune`, which first answers prompts as `dragon generate`
/// does, into OUT/songs/NAME. The reference is songs too, statistics as `dragon stats` and fadtk write them, or a text file
/// with one text a line.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon score --reference ref.npz songs-a songs-b           distances to statistics, the best system first
  dragon score --reference music songs-a --per-song          the distance of each song, too
  dragon score --reference captions.txt songs-a --encoder clap --setting ma
  dragon score --reference fma_pop.npz --name clap-laion-music a.npy b.npy --metric fad,fad-inf
  dragon score songs-a songs-b --metric vendi                diversity needs no reference
  dragon score songs-a --prompts prompts.jsonl --metric clap-score --encoder clap --setting ma
  dragon score --reference ref.npz songs-a --convention fadtk-1.1
  dragon score builtin:tiny runs/finetune-vendi models/stable-audio-open-1.0 models/musicgen-small --encoder clap --setting ma \
      --prompts builtin:tiny/prompts.jsonl --reference builtin:tiny/stats/clap-recordings.npz
                                                             models: songs for 64 prompts each, then scored")]
pub struct Args {
    /// The systems: songs, embeddings or models
    #[arg(required = true, num_args = 1.., value_name = "GENERATED")]
    generated: Vec<String>,
    /// What they are compared with
    #[arg(short, long, value_name = "FILE or DIR")]
    reference: Option<String>,
    /// Which statistics, where the reference's file holds several
    #[arg(long)]
    name: Option<String>,
    /// JSON lines with `id`, the name of a song without its ending, `caption` and `split`, for the CLAP score and for models
    #[arg(long, value_name = "FILE")]
    prompts: Option<String>,
    /// What is measured, separated by commas; short for --set metrics=[…] [default: all but fad-inf that the reference,
    /// the systems and the prompts allow]
    #[arg(short, long = "metric", value_name = "METRIC", value_delimiter = ',', value_parser = metric)]
    metrics: Vec<Metric>,
    /// How embeddings are rounded: `exact` (not at all), `fadtk-1.1` or `gudgud`, as these tools do; short for
    /// --set convention=…
    #[arg(long, value_name = "TOOL", value_parser = songs::convention)]
    convention: Option<Convention>,
    /// Print the per-song FAD of each song, too, farthest first
    #[arg(long)]
    per_song: bool,
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    songs: SongArgs,
    #[command(flatten)]
    config: ConfigArgs,
    /// Output folder
    #[arg(long, value_name = "DIR", default_value = "runs/score")]
    out: PathBuf,
    /// Print what was found as JSON on stdout instead of the table
    #[arg(long)]
    json: bool,
}

/// A metric by its name.
fn metric(name: &str) -> std::result::Result<Metric, String> {
    Metric::ALL
        .into_iter()
        .find(|metric| metric.name() == name)
        .ok_or_else(|| format!("expected one of {}", Metric::ALL.map(Metric::name).join(", ")))
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let mut overrides = args.config.overrides();
    overrides.extend(args.songs.overrides()?);
    overrides.extend(args.convention.map(|convention| format!("convention={:?}", convention.name())));
    let mut metrics = args.metrics.clone();
    let distances = args.per_song && args.reference.is_some();
    if distances && !metrics.is_empty() && !metrics.contains(&Metric::PerSongFad) {
        metrics.push(Metric::PerSongFad);
    }
    if !metrics.is_empty() {
        let names: Vec<String> = metrics.iter().map(|metric| format!("{:?}", metric.name())).collect();
        overrides.push(format!("metrics=[{}]", names.join(", ")));
    }
    let config: ScoreConfig = settings::resolve("score/default", args.config.path(), &overrides)?;
    let reference = args.reference.as_deref().map(settings::path);
    let prompts = args.prompts.as_deref().map(settings::path);
    let mut ctx = context(args.out, false, stop);
    ctx.device = dragon_trainer::device(args.songs.device())?;
    let plan = Plan::new(&args.generated, prompts.as_deref(), &args.models, config.seed, &ctx.out_dir)?;
    let look = |systems: &[PathBuf]| -> Result<Inputs> {
        let inputs = Inputs::look(&Named {
            reference: reference.as_deref(),
            statistics: args.name.as_deref(),
            systems,
            prompts: prompts.as_deref(),
            on_bad: args.songs.on_bad(),
        })?;
        inputs.check(&config)?;
        Ok(inputs)
    };
    // What cannot work is said before models make their songs.
    let present = look(&plan.present())?;
    let inputs = match plan.is_done() {
        true => present,
        false => look(&plan.generate(&ctx)?)?,
    };
    let encoder = match inputs.need_encoder(&config) {
        true => Some(args.songs.load(&config.encoder, config.setting)?),
        false => None,
    };
    let summary = score::run(&config, inputs, encoder.as_ref(), &ctx)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print!("{}", summary.table(args.per_song));
        println!("{}", ctx.out_dir.join("report.html").display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preset_is_a_valid_config() {
        settings::resolve::<ScoreConfig>("score/default", None, &[]).unwrap().check().unwrap();
        settings::assert_every_key_is_shown("score/default", |set| {
            settings::resolve::<ScoreConfig>("score/default", None, set).map(drop)
        });
    }

    #[test]
    fn every_metric_has_one_name() {
        for name in Metric::ALL.map(Metric::name) {
            let set = [format!("metrics=[\"{name}\"]")];
            let config: ScoreConfig = settings::resolve("score/default", None, &set).unwrap();
            assert_eq!(config.metrics, Some(vec![metric(name).unwrap()]));
        }
        assert!(metric("fda").unwrap_err().contains("fad, per-song-fad"));
    }
}
