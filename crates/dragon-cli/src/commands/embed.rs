//! `dragon embed`: audio to embeddings or statistics.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use clap::ValueEnum;
use dragon_trainer::embed::{audio_files, embed_files, save_embeddings, save_stats};
use dragon_trainer::embedder::{EncoderConfig, Setting, Tail, load_audio_encoder};

use super::context;
use crate::settings;

/// Turn a folder of audio into embeddings, or into reference statistics
///
/// Files are read in the order of their names, mixed to mono and resampled to the encoder's rate.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon embed my-songs -o songs.npz                         embeddings [N, D] and songs.npz.songs.tsv
  dragon embed my-songs -o reference.npz --stats my-songs    mean and covariance, as fadtk's files
  dragon embed my-songs -o clap.npz --encoder builtin:tiny/clap --setting ma")]
pub struct Args {
    /// A folder of audio (with its subfolders), or one file
    input: PathBuf,
    /// Output: .npz or .safetensors; embeddings also .npy
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// `musicnn`, or the folder of a CLAP
    #[arg(long, default_value = "musicnn")]
    encoder: String,
    /// How a song is cut into windows
    #[arg(long, value_enum, default_value_t = SettingName::Windows)]
    setting: SettingName,
    /// Distance between windows in seconds, for `windows` and `fadtk`
    #[arg(long, value_name = "S", default_value_t = 0.256)]
    hop: f64,
    /// Write mean and covariance under this name instead of the embeddings
    #[arg(long, value_name = "NAME")]
    stats: Option<String>,
    /// Where tensors live: `cpu` or `cuda`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// A setting by name.
#[derive(Clone, Copy, ValueEnum)]
enum SettingName {
    /// Windows at a fixed hop, as many as fit whole
    Windows,
    /// Windows at a fixed hop, zero-padded at the end, as the program fadtk has them
    Fadtk,
    /// Eight windows from start to end and the whole song, each peak-normalised (the paper's MA)
    Ma,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let ending = args.out.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let endings: &[&str] =
        if args.stats.is_some() { &["npz", "safetensors"] } else { &["npz", "safetensors", "npy"] };
    if !endings.contains(&ending) {
        bail!("`{}` should end in one of .{}", args.out.display(), endings.join(", ."));
    }
    let parent = args.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        bail!("there is no folder `{}` to write `{}` to", parent.display(), args.out.display());
    }
    let setting = match args.setting {
        SettingName::Windows => Setting::Fadtk { hop_s: args.hop, tail: Tail::WholeWindows },
        SettingName::Fadtk => Setting::Fadtk { hop_s: args.hop, tail: Tail::ZeroPadded },
        SettingName::Ma => Setting::MA,
    };
    let encoder = match args.encoder.as_str() {
        "musicnn" => {
            EncoderConfig::Musicnn { weights: settings::path("builtin:musicnn/mtt_musicnn.safetensors") }
        }
        dir => EncoderConfig::Clap { dir: settings::path(dir) },
    };
    let files = audio_files(&args.input)?;
    let device = dragon_trainer::device(&args.device)?;
    let encoder = load_audio_encoder(&encoder, &device)?;
    let songs = embed_files(encoder.as_ref(), &setting, &files, &context(parent.to_owned(), false, stop))?;
    let n: usize = songs.iter().map(|song| song.rows.n()).sum();
    match &args.stats {
        Some(name) => {
            let stats = save_stats(&args.out, name, &songs)?;
            println!(
                "{}: statistics `{name}` of {n} embeddings [{}] of {} songs by {}",
                args.out.display(),
                stats.dim(),
                songs.len(),
                encoder.id()
            );
        }
        None => {
            save_embeddings(&args.out, &songs)?;
            println!("{}: {n} embeddings of {} songs by {}", args.out.display(), songs.len(), encoder.id());
        }
    }
    Ok(())
}
