//! Our side of `cargo xtask bench --peers metrics`, and the curves of `docs/benchmarks.md`.
//!
//! `peers_metrics STATISTICS.npz FOLDER` reads lines `CASE SECONDS` from standard input and answers each with
//! `CASE BEST_SECONDS VALUE`: the shortest of the runs that fit into that time (two at least), and the number that the case
//! computes, which the script compares with the peer's. FOLDER holds the embeddings that the script has drawn. A case
//! `floor/CASE` runs only what nobody can leave out: the large products and the eigenvalues.
//!
//! `peers_metrics --curves` times each metric over the number of songs and the dimension, each point in a process of its
//! own, and prints Markdown tables of time and peak memory.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use dragon_metrics::bootstrap::SplitMix64;
use dragon_metrics::linalg::{gram_lower, product, symmetric_eigenvalues, upper_product_into};
use dragon_metrics::{
    FrechetPool, FrechetReference, GaussianStats, KadReference, Kernel, Moments, Rows, files, kad_as_kadtk,
    per_song_fad, vendi,
};
use faer::{Mat, MatRef};
use rayon::prelude::*;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
/// One run of a case; gives its number.
type Case = Box<dyn FnMut() -> Result<f64>>;

/// Encoder whose statistics in fadtk's file are the reference.
const ENCODER: &str = "clap-laion-music";
/// Pairs of Algorithm 1, and songs of a drawn set.
const PAIRS: usize = 40;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["--curves"] => curves(),
        ["--point", metric, n, dim] => point(metric, n, dim),
        [statistics, folder] => serve(Path::new(statistics), Path::new(folder)),
        _ => Err("expected `STATISTICS.npz FOLDER` or `--curves`".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err}");
            ExitCode::FAILURE
        }
    }
}

fn serve(statistics: &Path, folder: &Path) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let (Some(name), Some(seconds)) = (words.next(), words.next().and_then(|s| s.parse::<f64>().ok()))
        else {
            return Err(format!("expected `CASE SECONDS`, got `{line}`").into());
        };
        let mut run = match name.strip_prefix("floor/") {
            Some(name) => floor(name)?,
            None => case(name, statistics, folder)?,
        };
        let (best, value) = shortest(&mut run, seconds)?;
        println!("{name} {best} {value}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Seconds of the shortest of at least two runs after a first one, and the number of the last.
fn shortest(run: &mut Case, seconds: f64) -> Result<(f64, f64)> {
    let mut value = run()?;
    let (start, mut best, mut n_runs) = (Instant::now(), f64::INFINITY, 0);
    while n_runs < 2 || start.elapsed().as_secs_f64() < seconds {
        let begin = Instant::now();
        value = black_box(run()?);
        best = best.min(begin.elapsed().as_secs_f64());
        n_runs += 1;
    }
    Ok((best, value))
}

/// Consecutive groups of `windows` rows, a song each.
fn songs(rows: &Rows, windows: usize) -> Result<Vec<Rows>> {
    let data = rows.data().chunks_exact(windows * rows.dim());
    Ok(data
        .map(|song| Rows::new(windows, rows.dim(), song.to_vec()))
        .collect::<dragon_metrics::Result<_>>()?)
}

/// The case and its windows per song or rows, `song_9` as `("song", 9)`.
fn split(name: &str) -> Result<(&str, usize)> {
    let (kind, size) = name.rsplit_once('_').ok_or_else(|| format!("no case `{name}`"))?;
    Ok((kind, size.parse().map_err(|_| format!("no case `{name}`"))?))
}

fn case(name: &str, statistics: &Path, folder: &Path) -> Result<Case> {
    let read = |file: &str| files::read_embeddings(&folder.join(format!("{file}.npy")), None);
    let reference = || files::read_reference(statistics, Some(ENCODER));
    let (kind, size) = split(name)?;
    Ok(match kind {
        // One song of 9, 25 or 32 embeddings.
        "song" => {
            let (reference, song) =
                (reference()?, songs(&read(&format!("songs_{size}"))?, size)?.swap_remove(0));
            Box::new(move || Ok(reference.distance(&song)?))
        }
        // All songs of 32 embeddings; the number is that of the first.
        "songs" => {
            let (reference, songs) = (reference()?, songs(&read(&format!("songs_{size}"))?, size)?);
            Box::new(move || {
                let each = per_song_fad(&reference, &songs.iter().collect::<Vec<_>>())?;
                Ok(each[0])
            })
        }
        // A set of 40 songs.
        "dataset" => {
            let (reference, all) = (reference()?, read(&format!("songs_{}", size / PAIRS))?);
            let set = all.select(&(0..size).collect::<Vec<_>>())?;
            Box::new(move || Ok(reference.distance(&set)?))
        }
        // 1000 sets of 40 songs drawn with replacement out of 40; the number is that of the first.
        "bootstrap" => {
            let (reference, songs) = (reference()?, songs(&read(&format!("songs_{size}"))?, size)?);
            let subsets: Vec<Vec<usize>> =
                read("subsets")?.iter().map(|row| row.iter().map(|&i| i as usize).collect()).collect();
            Box::new(move || {
                let pool = FrechetPool::new(&reference, &songs[..PAIRS].iter().collect::<Vec<_>>())?;
                let drawn: dragon_metrics::Result<Vec<f64>> =
                    subsets.par_iter().map(|members| pool.distance(members)).collect();
                Ok(drawn?[0])
            })
        }
        // Algorithm 1 on 40 pairs: both sets, then every swap of the better one, kept where it is nearer to the reference.
        // The number is that of the first set.
        "algorithm1" => {
            let (reference, songs) = (reference()?, songs(&read(&format!("songs_{size}"))?, size)?);
            Box::new(move || {
                let pool = FrechetPool::new(&reference, &songs[..2 * PAIRS].iter().collect::<Vec<_>>())?;
                let mut walk = pool.into_walk();
                let mut plus: Vec<usize> = (0..PAIRS).collect();
                let second: Vec<usize> = (PAIRS..2 * PAIRS).collect();
                let first = walk.distance(&plus)?;
                let mut best = first;
                let other = walk.distance(&second)?;
                if other < best {
                    (plus, best) = (second, other);
                }
                for i in 0..PAIRS {
                    let kept = std::mem::replace(&mut plus[i], 0);
                    plus[i] = (kept + PAIRS) % (2 * PAIRS);
                    let swapped = walk.distance(&plus)?;
                    if swapped < best {
                        best = swapped;
                    } else {
                        plus[i] = kept;
                    }
                }
                Ok(first)
            })
        }
        "vendi" => {
            let rows = read(&format!("means_{size}"))?;
            Box::new(move || Ok(vendi(&rows)?))
        }
        // All of kadtk's computation: its bandwidth, the reference set with itself, …
        "kad_all" => {
            let (reference, set) = (read("reference_4000")?, read("songs_25")?);
            let set = set.select(&(0..size).collect::<Vec<_>>())?;
            Box::new(move || Ok(kad_as_kadtk(&reference, &set, Kernel::Gaussian)?))
        }
        // To a reference made once, bandwidth from the reference.
        "kad" => {
            let (reference, set) =
                (KadReference::new(&read("reference_4000")?, Kernel::Gaussian)?, read("songs_25")?);
            let set = set.select(&(0..size).collect::<Vec<_>>())?;
            Box::new(move || Ok(reference.kad(&set)?))
        }
        _ => return Err(format!("no case `{name}`").into()),
    })
}

/// Uniform numbers in [-1, 1).
fn noise(seed: u64, len: usize) -> Vec<f64> {
    let mut rng = SplitMix64(seed);
    (0..len).map(|_| (rng.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0).collect()
}

/// The large products and the eigenvalues of a case at d = 512, on made-up numbers that are ready to use.
fn floor(name: &str) -> Result<Case> {
    const DIM: usize = 512;
    let (kind, size) = split(name)?;
    let rows = |seed, n: usize| {
        Mat::from_fn(n, DIM, {
            let x = noise(seed, n * DIM);
            move |i, k| x[i * DIM + k]
        })
    };
    let factor = Mat::from_fn(DIM, DIM, {
        let x = noise(1, DIM * DIM);
        move |k, i| if i < k { 0.0 } else { x[i * DIM + k] }
    });
    let project = move |x: MatRef<'_, f64>| {
        let mut out = Mat::zeros(DIM, x.nrows());
        upper_product_into(out.as_mut(), factor.as_ref(), x.transpose());
        black_box(out);
    };
    // A matrix whose eigenvalues are as hard to find as those of a Gram matrix: it is one.
    let gram = |n: usize| gram_lower(rows(2, n.min(DIM)).as_ref(), 1.0);
    let eigenvalues = |gram: &Mat<f64>| -> Result<()> {
        black_box(symmetric_eigenvalues(gram.as_ref())?);
        Ok(())
    };
    Ok(match kind {
        "song" | "dataset" => {
            let (x, gram) = (noise(3, size * DIM), gram(size));
            Box::new(move || {
                project(MatRef::from_row_major_slice(&x, x.len() / DIM, DIM));
                eigenvalues(&gram)?;
                Ok(0.0)
            })
        }
        "songs" => {
            let (x, gram) = (noise(3, size * DIM), gram(size));
            Box::new(move || {
                (0..2185).into_par_iter().for_each(|_| {
                    project(MatRef::from_row_major_slice(&x, x.len() / DIM, DIM));
                    eigenvalues(&gram).expect("finite numbers");
                });
                Ok(0.0)
            })
        }
        "bootstrap" | "algorithm1" => {
            let drawn = kind == "bootstrap";
            let (songs, sets) = if drawn { (PAIRS, 1000) } else { (2 * PAIRS, 2 + PAIRS) };
            // A drawn set has about 63 % of the songs; a set of Algorithm 1 has all of its songs once.
            let side = if drawn { 25 * size } else { PAIRS * size };
            let (x, gram) = (noise(3, songs * size * DIM), gram(side));
            Box::new(move || {
                project(MatRef::from_row_major_slice(&x, x.len() / DIM, DIM));
                let each = |_| eigenvalues(&gram).expect("finite numbers");
                if drawn {
                    (0..sets).into_par_iter().for_each(each);
                } else {
                    (0..sets).for_each(each);
                }
                Ok(0.0)
            })
        }
        "vendi" => {
            let (x, gram) = (rows(3, size), gram(size));
            Box::new(move || {
                black_box(gram_lower(x.transpose(), 1.0));
                eigenvalues(&gram)?;
                Ok(0.0)
            })
        }
        "kad" => {
            let (x, reference) = (rows(3, size), rows(4, 4000));
            Box::new(move || {
                // As many rows at a time as fit into the cache.
                for first in (0..size).step_by(128) {
                    let x = x.subrows(first, 128.min(size - first));
                    black_box(product(reference.as_ref(), x.transpose()));
                }
                Ok(0.0)
            })
        }
        _ => return Err(format!("no floor of `{name}`").into()),
    })
}

const DIMS: [usize; 7] = [32, 64, 128, 256, 512, 1024, 2048];
const SONGS: [usize; 5] = [10, 100, 1000, 10_000, 100_000];
/// Rows handed over at a time where a metric takes them so.
const BLOCK: usize = 1000;
/// Rows of KAD's reference, and songs above which KAD takes minutes (its work grows with the square).
const KAD_ROWS: (usize, usize) = (4000, 10_000);
/// Name on the command line, and what the tables call it.
const CURVES: [(&str, &str); 5] = [
    ("fad", "FAD of the set"),
    ("streamed", "statistics, streamed, and FAD"),
    ("songs", "per-song FAD, 9 rows a song"),
    ("vendi", "Vendi"),
    ("kad", "KAD against 4000 rows"),
];

/// Tables over the number of songs at d = 512 and over d at 1000 songs, each point in a process of its own.
fn curves() -> Result<()> {
    let over_songs: Vec<(String, usize, usize)> = SONGS.iter().map(|&n| (n.to_string(), n, 512)).collect();
    let over_dims: Vec<(String, usize, usize)> = DIMS.iter().map(|&d| (d.to_string(), 1000, d)).collect();
    for (corner, points) in [("songs (d = 512)", over_songs), ("d (1000 songs)", over_dims)] {
        let titles: Vec<&str> = CURVES.iter().map(|(_, title)| *title).collect();
        println!("| {corner} | {} |\n| ---: |{}", titles.join(" | "), " ---: |".repeat(CURVES.len()));
        for (label, n, dim) in points {
            let mut row = format!("| {label} |");
            for (metric, _) in CURVES {
                if metric == "kad" && n > KAD_ROWS.1 {
                    row += " |";
                    continue;
                }
                let args = ["--point", metric, &n.to_string(), &dim.to_string()];
                let out = Command::new(std::env::current_exe()?).args(args).output()?;
                if !out.status.success() {
                    return Err(format!(
                        "{metric} of {n} songs, d = {dim}: {}",
                        String::from_utf8_lossy(&out.stderr)
                    )
                    .into());
                }
                row += &format!(" {} |", String::from_utf8(out.stdout)?.trim());
            }
            println!("{row}");
        }
        println!();
    }
    Ok(())
}

/// Prints time and peak memory of one metric on `n` made-up songs of dimension `dim`. Making the songs and what is made
/// once for a reference are not timed. Where all rows are there at once, a run shorter than half a second is repeated and the
/// shortest counts.
fn point(metric: &str, n: &str, dim: &str) -> Result<()> {
    let (n, dim): (usize, usize) = (n.parse()?, dim.parse()?);
    // Neighbouring dimensions are correlated by one half; no rows are needed for it.
    let cov = (0..dim * dim).map(|i| 0.5f64.powi((i / dim).abs_diff(i % dim) as i32)).collect();
    let reference =
        || GaussianStats::new(vec![0.0; dim], cov, None).and_then(|stats| FrechetReference::new(&stats));
    let rows = |seed: usize, n: usize| Rows::new(n, dim, noise(seed as u64, n * dim));
    let blocks = || (0..n).step_by(BLOCK).map(|first| (first, BLOCK.min(n - first)));
    let repeated = |run: &mut dyn FnMut() -> dragon_metrics::Result<f64>| -> dragon_metrics::Result<f64> {
        let start = Instant::now();
        let mut best = f64::INFINITY;
        while best.is_infinite() || start.elapsed().as_secs_f64() < 0.5 {
            let begin = Instant::now();
            black_box(run()?);
            best = best.min(begin.elapsed().as_secs_f64());
        }
        Ok(best)
    };
    let seconds = match metric {
        "fad" => {
            let (reference, set) = (reference()?, rows(1, n)?);
            repeated(&mut || reference.distance(&set))?
        }
        "streamed" => {
            let reference = reference()?;
            let (mut moments, mut seconds) = (Moments::new(dim), 0.0);
            for (first, n) in blocks() {
                let block = rows(first, n)?;
                let begin = Instant::now();
                moments.push(&block)?;
                seconds += begin.elapsed().as_secs_f64();
            }
            let begin = Instant::now();
            black_box(reference.distance_to_stats(&moments.stats()?)?);
            seconds + begin.elapsed().as_secs_f64()
        }
        "songs" => {
            let (reference, mut seconds) = (reference()?, 0.0);
            for (first, n) in blocks() {
                let songs = songs(&rows(first, 9 * n)?, 9)?;
                let songs: Vec<&Rows> = songs.iter().collect();
                let begin = Instant::now();
                black_box(per_song_fad(&reference, &songs)?);
                seconds += begin.elapsed().as_secs_f64();
            }
            seconds
        }
        "vendi" => {
            let set = rows(1, n)?;
            repeated(&mut || vendi(&set))?
        }
        "kad" => {
            // The expected distance of two such rows; a median would be found among 8 million distances.
            let bandwidth = (2.0 * dim as f64 / 3.0).sqrt();
            let reference = KadReference::with_bandwidth(&rows(2, KAD_ROWS.0)?, Kernel::Gaussian, bandwidth)?;
            let set = rows(1, n)?;
            repeated(&mut || reference.kad(&set))?
        }
        _ => return Err(format!("no metric `{metric}`").into()),
    };
    let (value, unit) = if seconds < 1.0 { (1e3 * seconds, "ms") } else { (seconds, "s") };
    let digits = if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    println!("{value:.digits$} {unit}, {} MiB", peak_mib());
    Ok(())
}

/// Peak resident memory of this process in MiB; 0 where the system does not tell.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1024
}
