//! `dragon embed`: audio to embeddings or statistics.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use clap::ValueEnum;
use dragon_trainer::bundle::Bundle;
use dragon_trainer::embed::{audio_files, embed_file, embed_files, save_embeddings, save_stats};
use dragon_trainer::embedder::{EncoderConfig, Setting, latents_of, load_audio_encoder};
use serde::{Deserialize, Serialize};

use super::{FileArgs, context};
use crate::settings;

/// Turn a folder of audio into embeddings, or into reference statistics
///
/// Files are read in the order of their names, mixed to mono and resampled to the encoder's rate.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dragon embed my-songs -o songs.npz                         embeddings [N, D] and songs.npz.songs.tsv
  dragon embed my-songs -o reference.npz --stats my-songs    mean and covariance, as fadtk's files
  dragon embed my-songs -o clap.npz --encoder builtin:tiny/clap --setting ma
  dragon embed my-songs -o latents.npz --encoder vae --stats my-songs")]
pub struct Args {
    /// A folder of audio (with its subfolders), or one file
    input: PathBuf,
    /// Output: .npz or .safetensors; embeddings also .npy
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// `musicnn`, the folder of a CLAP, or `vae` (latent frames of a model folder); short for --set encoder=…
    #[arg(long, value_name = "NAME or DIR")]
    encoder: Option<String>,
    /// How a song is cut into windows; short for --set setting=…
    #[arg(long, value_enum)]
    setting: Option<SettingName>,
    /// Seconds between windows; short for --set setting.hop_s=S
    #[arg(long, value_name = "S")]
    hop: Option<f64>,
    /// Model folder whose VAE encodes, for the encoder `vae`
    #[arg(long, value_name = "DIR", default_value = "builtin:tiny")]
    model: String,
    #[command(flatten)]
    config: FileArgs,
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

/// A preset of presets/embed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EmbedPreset {
    encoder: EncoderConfig,
    setting: Setting,
}

/// Runs the command.
pub fn run(args: Args, stop: &Arc<AtomicBool>) -> Result<()> {
    let ending = args.out.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let endings: &[&str] =
        if args.stats.is_some() { &["npz", "safetensors"] } else { &["npz", "safetensors", "npy"] };
    if !endings.contains(&ending) {
        bail!(
            "cannot write `{}`: expected an ending of {}, found `{ending}`\nhint: name a file such as songs.npz",
            args.out.display(),
            endings.join(", ")
        );
    }
    let parent = args.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        bail!(
            "there is no folder `{}` to write `{}` to\nhint: make it, or check the path",
            parent.display(),
            args.out.display()
        );
    }
    let mut overrides = args.config.overrides.clone();
    overrides.extend(args.encoder.as_ref().map(|encoder| match encoder.as_str() {
        "musicnn" => {
            r#"encoder={ kind = "musicnn", weights = "builtin:musicnn/mtt_musicnn.safetensors" }"#.into()
        }
        "vae" => "encoder={ kind = \"vae\" }".into(),
        dir => format!("encoder={{ kind = \"clap\", dir = {} }}", settings::quoted(Path::new(dir))),
    }));
    if args.encoder.as_deref() == Some("vae") && args.setting.is_none() {
        overrides.push(r#"setting={ kind = "vae", latent_direct = false }"#.into());
    }
    overrides.extend(args.setting.map(|setting| {
        let value = match setting {
            SettingName::Windows => r#"{ kind = "fadtk", hop_s = 0.256, tail = "whole_windows" }"#,
            SettingName::Fadtk => r#"{ kind = "fadtk", hop_s = 0.256, tail = "zero_padded" }"#,
            SettingName::Ma => r#"{ kind = "ma", n_windows = 8, whole = true }"#,
        };
        format!("setting={value}")
    }));
    overrides.extend(args.hop.map(|hop| format!("setting.hop_s={hop:?}")));
    let preset: EmbedPreset = settings::resolve("embed/default", args.config.config.as_deref(), &overrides)?;
    let EmbedPreset { encoder, setting } = preset;
    let files = audio_files(&args.input)?;
    let device = dragon_trainer::device(&args.device)?;
    let ctx = context(parent.to_owned(), false, stop);
    let (songs, by) = match (encoder, &setting) {
        (EncoderConfig::Vae, Setting::Vae { .. }) => {
            let bundle = Bundle::load(&settings::path(&args.model), &device)?;
            let songs = embed_files(|file| latents_of(file, &bundle), &files, &ctx)?;
            (songs, format!("the VAE of {}", args.model))
        }
        (EncoderConfig::Vae, _) | (_, Setting::Vae { .. }) => {
            bail!(
                "the encoder and the setting do not fit\nhint: the encoder `vae` goes with a setting of kind `vae`"
            )
        }
        (encoder, setting) => {
            let encoder = load_audio_encoder(&encoder, &device)?;
            let songs = embed_files(|file| embed_file(encoder.as_ref(), setting, file), &files, &ctx)?;
            (songs, encoder.id().to_owned())
        }
    };
    let n: usize = songs.iter().map(|song| song.rows.n()).sum();
    match &args.stats {
        Some(name) => {
            let stats = save_stats(&args.out, name, &songs)?;
            println!(
                "{}: statistics `{name}` of {n} embeddings [{}] of {} songs by {}",
                args.out.display(),
                stats.dim(),
                songs.len(),
                by
            );
        }
        None => {
            save_embeddings(&args.out, &songs)?;
            println!("{}: {n} embeddings of {} songs by {}", args.out.display(), songs.len(), by);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preset_is_a_valid_config() {
        settings::assert_every_key_is_shown("embed/default", |set| {
            settings::resolve::<EmbedPreset>("embed/default", None, set).map(drop)
        });
    }
}
