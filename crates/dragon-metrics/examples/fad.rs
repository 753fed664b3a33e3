//! Fréchet audio distance of a set of embeddings to a reference, and FAD-infinity.
//!
//! `cargo run --release -p dragon-metrics --example fad [REFERENCE.npz NAME GENERATED.npy]`; without arguments on made-up
//! embeddings. REFERENCE is a statistics file as fadtk ships it (NAME: the encoder), GENERATED `[N, D]` embeddings.

use std::path::Path;

use dragon_metrics::{Convention, FadInfOptions, FrechetReference, Result, Rows, fad_inf, files};

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
    let (reference, generated): (FrechetReference, Rows) = match args.as_slice() {
        [reference, name, generated] => (
            files::read_reference(Path::new(reference), Some(name))?,
            files::read_embeddings(Path::new(generated), None)?,
        ),
        _ => (FrechetReference::from_rows(&made_up::rows(1, 3000, 0.0))?, made_up::rows(2, 1500, 0.1)),
    };
    for convention in Convention::ALL {
        println!("FAD ({:9})   {:.9}", convention.name(), convention.distance(&reference, &generated)?);
    }
    let limit = fad_inf(&reference, &generated, FadInfOptions::default())?;
    println!("FAD-infinity     {:.6}   R² {:.3}, seed {}", limit.score, limit.r2, limit.options.seed);
    Ok(())
}
