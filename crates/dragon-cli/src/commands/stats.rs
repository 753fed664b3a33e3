//! `dragon stats`: mean and covariance of a set of songs.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use dragon_metrics::Convention;
use dragon_metrics::files::write_stats;
use dragon_trainer::sets::{Content, Given, stats_of};
use dragon_trainer::song_encoder::SongEncoder;

use super::songs::{self, EmbedPreset, SongArgs, check_out, left_out};
use super::{FileArgs, context};
use crate::settings;

/// Write reference statistics, mean and covariance, of audio, texts or embeddings
///
/// Audio is read in one pass, in the order of the files' names, so that any number of songs fits into memory.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon stats my-songs -o reference.npz                     as fadtk's files: my-songs.mu, my-songs.cov
  dragon stats my-songs -o clap.npz --encoder clap --setting ma
  dragon stats my-songs -o latents.npz --encoder vae
  dragon stats captions.txt -o texts.npz --encoder clap      one text a line
  dragon stats songs.npz -o reference.npz                    of embeddings that are there already")]
pub struct Args {
    /// A folder of audio (with its subfolders), a text file, or embeddings (.npy, .npz, .safetensors, a folder of .npy)
    input: PathBuf,
    /// Output: .npz or .safetensors
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Their name in the file [default: that of the input]
    #[arg(long)]
    name: Option<String>,
    /// How embeddings are rounded: `exact` (not at all), `fadtk-1.1` or `gudgud`, as these tools do
    #[arg(long, value_name = "TOOL", default_value = "exact", value_parser = songs::convention)]
    convention: Convention,
    #[command(flatten)]
    songs: SongArgs,
    #[command(flatten)]
    config: FileArgs,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let parent = check_out(&args.out, &["npz", "safetensors"])?;
    let mut overrides = args.config.overrides.clone();
    overrides.extend(args.songs.overrides()?);
    let preset: EmbedPreset = settings::resolve("embed/default", args.config.config.as_deref(), &overrides)?;
    SongEncoder::check(&preset.encoder, &preset.setting)?;
    let on_bad = args.songs.on_bad();
    let given = Given::look(&args.input, None, on_bad)?;
    if matches!(given.content, Content::Statistics(_)) {
        bail!("`{}` holds statistics already\nhint: name audio, texts or embeddings", args.input.display());
    }
    given.check_encoder(&preset.encoder)?;
    let name = args.name.clone().or_else(|| {
        let path = args.input.canonicalize().unwrap_or_else(|_| args.input.clone());
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        name.map(|name| name.to_string_lossy().into_owned())
    });
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        bail!("the statistics need a name\nhint: give them one with --name");
    };
    let encoder = match given.needs_encoder() {
        true => Some(args.songs.load(&preset.encoder, preset.setting)?),
        false => None,
    };
    let ctx = context(parent.to_owned(), false, stop);
    let done = stats_of(given, encoder.as_ref(), args.convention, on_bad, &ctx)?;
    songs::make_folder(parent)?;
    write_stats(&args.out, &name, &done.stats)?;
    println!(
        "{}: statistics `{name}` of {} embeddings [{}] of {} {}{}{}",
        args.out.display(),
        done.stats.n().unwrap_or_default(),
        done.stats.dim(),
        done.n_songs,
        done.unit.plural(),
        encoder.map_or(String::new(), |encoder| format!(" by {}", encoder.id())),
        left_out(&done.skipped)
    );
    Ok(())
}
