//! Our side of `cargo xtask bench --peers audio`: an hour of music read as mono at another rate.
//!
//! `peers_audio FOLDER RATE` reads lines `FILE SECONDS` from standard input and answers each with `FILE BEST_SECONDS LEVEL`:
//! the shortest of the runs that fit into that time (one at least), and the root mean square of the samples, which the script
//! compares with the peer's.

use std::io::{BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.as_slice() {
        [folder, rate] => rate.parse().map_err(Into::into).and_then(|rate| serve(Path::new(folder), rate)),
        _ => Err("expected `FOLDER RATE`".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err}");
            ExitCode::FAILURE
        }
    }
}

fn serve(folder: &Path, rate_hz: u32) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (file, seconds) = line.split_once(' ').ok_or("expected `FILE SECONDS`")?;
        let seconds: f64 = seconds.parse()?;
        let (start, mut best, mut level) = (Instant::now(), f64::INFINITY, 0.0);
        while best.is_infinite() || start.elapsed().as_secs_f64() < seconds {
            let begin = Instant::now();
            let clip = dragon_audio::read_mono(&folder.join(file), rate_hz)?;
            best = best.min(begin.elapsed().as_secs_f64());
            let power: f64 = clip.samples.iter().map(|x| f64::from(x * x)).sum();
            level = (power / clip.samples.len() as f64).sqrt();
        }
        println!("{file} {best} {level}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
