//! `dragon data`: music and captions to a manifest.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use clap::Subcommand;
use dragon_data::clips::Form;
use dragon_data::{Shares, fetch, import, render};
use serde::{Deserialize, Serialize};

use super::{ConfigArgs, FileArgs};
use crate::settings;

/// Ways to get clips with captions.
#[derive(Subcommand)]
pub enum Command {
    /// Download recorded music (Debian packages of free games) and cut it into clips; needs apt-get and dpkg-deb
    #[command(after_help = "\
Examples:
  dragon data fetch --out data/recordings --cache data/cache --clips 3000
  dragon data fetch --out data/long --set clip.duration_s=10.24 --seed 2")]
    Fetch(Fetch),
    /// Render tunes in ABC notation with a soundfont; captions say exactly what was rendered
    #[command(after_help = "\
Examples:
  dragon data render --out data/scores --cache data/cache          downloads tunes and soundfont (pip, apt-get)
  dragon data render --out data/scores --tunes my-abc --soundfont FluidR3_GM.sf2 --clips 6000
  dragon data render --out data/long --set clip.duration_s=10.24 --seed 2")]
    Render(Render),
    /// Cut your own audio into clips: a folder (captions from file names), or a JSONL or CSV list
    #[command(after_help = "\
Examples:
  dragon data import my-songs --out data/mine
  dragon data import songs.csv --out data/mine          columns path, caption; optional piece
  dragon data import my-songs --out data/test --set split.valid_percent=0 --set split.test_percent=100")]
    Import(Import),
}

/// Arguments of `data fetch`.
#[derive(clap::Args)]
pub struct Fetch {
    /// Output folder
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Folder for downloaded packages, kept between runs; short for --set cache=DIR
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Clips to cut; short for --set n_clips=N
    #[arg(long, value_name = "N")]
    clips: Option<usize>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// Arguments of `data import`.
#[derive(clap::Args)]
pub struct Import {
    /// A folder of audio, or a .jsonl or .csv file
    from: PathBuf,
    /// Output folder
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// At most this many clips of each file, evenly spread; short for --set max_clips_per_file=N
    #[arg(long, value_name = "N")]
    clips_per_file: Option<usize>,
    /// Leave out files that cannot be used, and list them, instead of stopping at the first; short for --set skip_bad=true
    #[arg(long)]
    skip_bad: bool,
    #[command(flatten)]
    config: FileArgs,
}

/// Arguments of `data render`.
#[derive(clap::Args)]
pub struct Render {
    /// A folder of *.abc files, or an archive (.zip, .whl) that holds them; short for --set tunes=PATH
    #[arg(long, value_name = "PATH")]
    tunes: Option<PathBuf>,
    /// An SF2 soundfont with the General MIDI programs; short for --set soundfont=FILE
    #[arg(long, value_name = "FILE")]
    soundfont: Option<PathBuf>,
    /// Folder for downloads, without tunes and soundfont; short for --set cache=DIR
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Output folder
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Clips to render; short for --set n_clips=N
    #[arg(long, value_name = "N")]
    clips: Option<usize>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// The preset data/fetch.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FetchPreset {
    seed: u64,
    cache: PathBuf,
    n_clips: usize,
    min_track_s: f64,
    clip: Form,
    split: Shares,
}

/// The preset data/render.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RenderPreset {
    seed: u64,
    tunes: Option<PathBuf>,
    soundfont: Option<PathBuf>,
    cache: PathBuf,
    n_clips: usize,
    clip: Form,
    split: Shares,
    parts: Vec<dragon_data::Split>,
}

/// The preset data/import.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImportPreset {
    max_clips_per_file: Option<usize>,
    skip_bad: bool,
    clip: Form,
    split: Shares,
}

/// An override for an argument that is short for one.
fn short<T>(key: &str, value: Option<T>, text: impl Fn(&T) -> String) -> Option<String> {
    value.map(|value| format!("{key}={}", text(&value)))
}

/// Runs the command.
pub fn run(command: Command, stop: &Arc<AtomicBool>) -> Result<()> {
    let path = |path: &PathBuf| settings::quoted(path);
    let (out, line, refused, stopped) = match command {
        Command::Fetch(args) => {
            let mut overrides = args.config.overrides();
            overrides.extend(short("cache", args.cache, path));
            overrides.extend(short("n_clips", args.clips, usize::to_string));
            let preset: FetchPreset = settings::resolve("data/fetch", args.config.path(), &overrides)?;
            let FetchPreset { seed, cache, n_clips, min_track_s, clip, split } = preset;
            let out = args.out.clone();
            let options = fetch::Options { cache, out, n_clips, seed, min_track_s, clip, split };
            let done = fetch::recordings(&options, stop)?;
            let line = format!(
                "{} clips of {} tracks, {:.0} minutes ({} were there already)",
                done.n_clips, done.n_tracks, done.minutes, done.n_kept
            );
            (args.out, line, done.refused, done.stopped)
        }
        Command::Render(args) => {
            let mut overrides = args.config.overrides();
            overrides.extend(short("tunes", args.tunes, path));
            overrides.extend(short("soundfont", args.soundfont, path));
            overrides.extend(short("cache", args.cache, path));
            overrides.extend(short("n_clips", args.clips, usize::to_string));
            let preset: RenderPreset = settings::resolve("data/render", args.config.path(), &overrides)?;
            let RenderPreset { seed, tunes, soundfont, cache, n_clips, clip, split, parts } = preset;
            let mut options = render::Options {
                tunes: tunes.clone().unwrap_or_default(),
                soundfont: soundfont.clone().unwrap_or_default(),
                out: args.out.clone(),
                n_clips,
                seed,
                clip,
                split,
                parts,
            };
            options.check()?; // before anything is downloaded
            match (tunes, soundfont) {
                (Some(_), Some(_)) => {}
                (None, None) => {
                    let inputs = fetch::score_inputs(&cache)?;
                    (options.tunes, options.soundfont) = (inputs.tunes, inputs.soundfont);
                }
                (tunes, _) => {
                    let (given, missing) =
                        if tunes.is_some() { ("tunes", "soundfont") } else { ("soundfont", "tunes") };
                    bail!(
                        "config key `{missing}`: expected a path beside `{given}`, found none\nhint: give both, or neither to download them"
                    );
                }
            }
            let done = render::render(&options, stop)?;
            let line = format!(
                "{} clips of {} tunes ({} were there already)",
                done.n_clips, done.n_tunes, done.n_kept
            );
            (args.out, line, done.refused, done.stopped)
        }
        Command::Import(args) => {
            let mut overrides = args.config.overrides.clone();
            overrides.extend(short("max_clips_per_file", args.clips_per_file, usize::to_string));
            overrides.extend(short("skip_bad", args.skip_bad.then_some(true), bool::to_string));
            let preset: ImportPreset =
                settings::resolve("data/import", args.config.config.as_deref(), &overrides)?;
            let ImportPreset { max_clips_per_file, skip_bad, clip, split } = preset;
            let (from, out) = (args.from, args.out.clone());
            let options = import::Options { from, out, max_clips_per_file, skip_bad, clip, split };
            let done = import::import(&options, stop)?;
            let mut line = format!("{} clips of {} files", done.n_clips, done.n_files);
            if !done.left_out.is_empty() {
                line += &format!(", {} files left out (named above)", done.left_out.len());
            }
            (args.out, line, done.refused, done.stopped)
        }
    };
    println!("{}: {line}", out.join("manifest.jsonl").display());
    for (reason, n) in refused {
        println!("  refused {n}: {reason}");
    }
    if stopped {
        println!("  stopped early; the same command goes on");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_presets_are_valid_configs() {
        settings::assert_every_key_is_shown("data/fetch", |set| {
            settings::resolve::<FetchPreset>("data/fetch", None, set).map(drop)
        });
        settings::assert_every_key_is_shown("data/render", |set| {
            settings::resolve::<RenderPreset>("data/render", None, set).map(drop)
        });
        settings::assert_every_key_is_shown("data/import", |set| {
            settings::resolve::<ImportPreset>("data/import", None, set).map(drop)
        });
    }

    /// Corpora that were made before there were presets can be gone on with.
    #[test]
    fn the_presets_show_the_defaults_of_form_and_shares() {
        let fetch: FetchPreset = settings::resolve("data/fetch", None, &[]).unwrap();
        let render: RenderPreset = settings::resolve("data/render", None, &[]).unwrap();
        let import: ImportPreset = settings::resolve("data/import", None, &[]).unwrap();
        for (clip, split) in
            [(fetch.clip, fetch.split), (render.clip, render.split), (import.clip, import.split)]
        {
            assert_eq!((clip, split), (Form::default(), Shares::default()));
        }
        assert_eq!((fetch.seed, render.seed, fetch.min_track_s), (1, 1, 25.0));
    }
}
