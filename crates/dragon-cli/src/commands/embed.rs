//! `dragon embed`: audio to embeddings.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use dragon_trainer::embed::{SongEmbeddings, embed_songs, save_embeddings, usable_files};
use dragon_trainer::song_encoder::SongEncoder;

use super::songs::{self, EmbedPreset, SongArgs, check_out, left_out};
use super::{FileArgs, context};
use crate::settings;

/// Turn a folder of audio into embeddings
///
/// Files are read in the order of their names, mixed to mono and resampled to the encoder's rate.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon embed my-songs -o songs.npz                         embeddings [N, D] and songs.npz.songs.tsv
  dragon embed my-songs -o clap.npz --encoder clap --setting ma
  dragon embed my-songs -o latents.npz --encoder vae")]
pub struct Args {
    /// A folder of audio (with its subfolders), or one file
    input: PathBuf,
    /// Output: .npz, .safetensors or .npy
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    songs: SongArgs,
    #[command(flatten)]
    config: FileArgs,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let parent = check_out(&args.out, &["npz", "safetensors", "npy"])?;
    let mut overrides = args.config.overrides.clone();
    overrides.extend(args.songs.overrides()?);
    let preset: EmbedPreset = settings::resolve("embed/default", args.config.config.as_deref(), &overrides)?;
    SongEncoder::check(&preset.encoder, &preset.setting)?;
    let on_bad = args.songs.on_bad();
    let (files, mut skipped) = usable_files(&args.input, on_bad)?;
    let encoder = args.songs.load(&preset.encoder, preset.setting)?;
    let ctx = context(parent.to_owned(), false, stop);
    let (songs, bad) = embed_songs(|file| encoder.embed(file), &files, on_bad, &ctx)?;
    skipped.extend(bad);
    songs::make_folder(parent)?;
    save_embeddings(&args.out, &songs)?;
    let n: usize = songs.iter().map(|song: &SongEmbeddings| song.rows.n()).sum();
    println!(
        "{}: {n} embeddings of {} songs by {}{}",
        args.out.display(),
        songs.len(),
        encoder.id(),
        left_out(&skipped)
    );
    Ok(())
}
