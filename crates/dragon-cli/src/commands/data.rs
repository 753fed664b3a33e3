//! `dragon data`: music and captions to a manifest.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use clap::Subcommand;
use dragon_data::{fetch, import, render};

/// Ways to get clips with captions.
#[derive(Subcommand)]
pub enum Command {
    /// Download recorded music (Debian packages of free games) and cut it into clips; needs apt-get and dpkg-deb
    #[command(after_help = "\
Example:
  dragon data fetch --out data/recordings --cache data/cache --clips 3000")]
    Fetch(Fetch),
    /// Render tunes in ABC notation with a soundfont; captions say exactly what was rendered
    #[command(after_help = "\
Examples:
  dragon data render --out data/scores --cache data/cache          downloads tunes and soundfont (pip, apt-get)
  dragon data render --out data/scores --tunes my-abc --soundfont FluidR3_GM.sf2 --clips 6000")]
    Render(Render),
    /// Cut your own audio into clips: a folder (captions from file names), or a JSONL or CSV list
    #[command(after_help = "\
Examples:
  dragon data import my-songs --out data/mine
  dragon data import songs.csv --out data/mine          columns path, caption; optional piece")]
    Import(Import),
}

/// Arguments of `data fetch`.
#[derive(clap::Args)]
pub struct Fetch {
    /// Output folder
    #[arg(long)]
    out: PathBuf,
    /// Folder for downloaded packages; kept between runs
    #[arg(long, default_value = "data/cache")]
    cache: PathBuf,
    /// Clips to cut, 5.12 s each
    #[arg(long, default_value_t = 3000)]
    clips: usize,
    /// Seed of where clips start
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Arguments of `data import`.
#[derive(clap::Args)]
pub struct Import {
    /// A folder of audio, or a .jsonl or .csv file
    from: PathBuf,
    /// Output folder
    #[arg(long)]
    out: PathBuf,
    /// At most this many clips of each file, evenly spread [default: all that fit]
    #[arg(long)]
    clips_per_file: Option<usize>,
    /// Leave out files that cannot be used, and list them, instead of stopping at the first
    #[arg(long)]
    skip_bad: bool,
}

/// Arguments of `data render`.
#[derive(clap::Args)]
pub struct Render {
    /// A folder of *.abc files, or an archive (.zip, .whl) that holds them
    #[arg(long, requires = "soundfont")]
    tunes: Option<PathBuf>,
    /// An SF2 soundfont with the General MIDI programs
    #[arg(long, requires = "tunes")]
    soundfont: Option<PathBuf>,
    /// Folder for downloads, without --tunes and --soundfont
    #[arg(long, default_value = "data/cache")]
    cache: PathBuf,
    /// Output folder
    #[arg(long)]
    out: PathBuf,
    /// Clips to render, 5.12 s each
    #[arg(long, default_value_t = 6000)]
    clips: usize,
    /// Seed of the arrangements
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the command.
pub fn run(command: Command, stop: &Arc<AtomicBool>) -> Result<()> {
    let (out, line, refused, stopped) = match command {
        Command::Fetch(args) => {
            let Fetch { out, cache, clips, seed } = args;
            let options = fetch::Options { cache, out: out.clone(), n_clips: clips, seed };
            let done = fetch::recordings(&options, stop)?;
            let line = format!(
                "{} clips of {} tracks, {:.0} minutes ({} were there already)",
                done.n_clips, done.n_tracks, done.minutes, done.n_kept
            );
            (out, line, done.refused, done.stopped)
        }
        Command::Render(args) => {
            let (tunes, soundfont) = match (args.tunes, args.soundfont) {
                (Some(tunes), Some(soundfont)) => (tunes, soundfont),
                _ => {
                    let inputs = fetch::score_inputs(&args.cache)?;
                    (inputs.tunes, inputs.soundfont)
                }
            };
            let options = render::Options {
                tunes,
                soundfont,
                out: args.out.clone(),
                n_clips: args.clips,
                seed: args.seed,
            };
            let done = render::render(&options, stop)?;
            let line = format!(
                "{} clips of {} tunes ({} were there already)",
                done.n_clips, done.n_tunes, done.n_kept
            );
            (args.out, line, done.refused, done.stopped)
        }
        Command::Import(args) => {
            let options = import::Options {
                from: args.from,
                out: args.out.clone(),
                max_clips_per_file: args.clips_per_file,
                skip_bad: args.skip_bad,
            };
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
