//! Per-song FAD of a folder that fadtk has embedded, worst first, as CSV.
//!
//! `cargo run --release -p dragon-metrics --example per_song [REFERENCE.npz NAME FOLDER]` reads
//! `FOLDER/embeddings/NAME/*.npy`; without arguments made-up songs.

use std::path::Path;

use dragon_metrics::{FrechetReference, Result, Rows, files, per_song_fad};

mod made_up;

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err}"); // names the file and the row
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (reference, songs): (FrechetReference, Vec<(String, Rows)>) = match args.as_slice() {
        [reference, name, folder] => (
            files::read_reference(Path::new(reference), Some(name))?,
            files::read_fadtk_embeddings(Path::new(folder), name)?,
        ),
        _ => {
            let song = |i: u64| (format!("song {i}"), made_up::rows(10 + i, 25, 0.05 * i as f64));
            (FrechetReference::from_rows(&made_up::rows(1, 3000, 0.0))?, (0..8).map(song).collect())
        }
    };
    let rows: Vec<&Rows> = songs.iter().map(|(_, rows)| rows).collect();
    let mut scored: Vec<(f64, &str)> = per_song_fad(&reference, &rows)?
        .into_iter()
        .zip(songs.iter().map(|(name, _)| name.as_str()))
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    println!("song,fad");
    for (fad, name) in scored {
        println!("{name:?},{fad}");
    }
    Ok(())
}
