//! Times of the rewards on synthetic embeddings of dimension 512; one thread unless said.
//!
//! `cargo run --release -p dragon-rewards --example timings`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use dragon_metrics::bootstrap::SplitMix64;
use dragon_metrics::{
    FrechetPool, FrechetReference, Rows, VendiPool, bootstrap_indices, per_song_fad, vendi,
};
use dragon_rewards::{DatasetFad, DistributionReward, Pooling, Song, Vendi, algorithm_1, greedy};

const DIM: usize = 512;

/// Embeddings with a decaying spectrum.
fn rows(seed: u64, n: usize) -> Rows {
    let mut rng = SplitMix64(seed);
    let mut uniform = || (rng.next() >> 11) as f64 / (1u64 << 53) as f64;
    let data = (0..n * DIM)
        .map(|i| ((0..12).map(|_| uniform()).sum::<f64>() - 6.0) * 0.99f64.powi((i % DIM) as i32) * 0.04)
        .collect();
    Rows::new(n, DIM, data).expect("finite rows")
}

/// Smallest of several runs, in milliseconds.
fn best<T>(runs: usize, mut work: impl FnMut() -> T) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            black_box(work());
            start.elapsed().as_secs_f64() * 1e3
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    pool.install(measure);
}

fn measure() {
    let reference = Arc::new(FrechetReference::from_rows(&rows(1, 4000)).expect("reference"));
    println!(
        "reference of 4000 rows made in {:.0} ms",
        best(1, || FrechetReference::from_rows(&rows(1, 4000)))
    );
    for n in [9, 25, 32] {
        let song = rows(2, n);
        println!("per-song FAD, n = {n:2}: {:8.3} ms", best(30, || reference.distance(&song)));
    }
    let songs: Vec<Rows> = (0..500).map(|i| rows(1000 + i, 32)).collect();
    let songs: Vec<&Rows> = songs.iter().collect();
    println!("per-song FAD of 500 songs, n = 32: {:.1} ms", best(3, || per_song_fad(&reference, &songs)));
    for n in [360, 1000] {
        let set = rows(3, n);
        println!("dataset FAD, {n:4} rows: {:8.2} ms", best(5, || reference.distance(&set)));
    }
    for n in [9, 25] {
        let songs = |seed: u64| (0..40).map(|i| Song::new(rows(seed + i, n))).collect::<Vec<_>>();
        let (first, second) = (songs(100), songs(200));
        let (first, second): (Vec<&Song>, Vec<&Song>) = (first.iter().collect(), second.iter().collect());
        let reward = DatasetFad { slot: 0, reference: Arc::clone(&reference) };
        let fast = greedy(&reward, &[&first, &second], 0..40).expect("pass");
        println!(
            "Algorithm 1, 40 pairs x {n:2}: {:8.0} ms ({:.4} and {:.4} -> {:.4})",
            best(3, || greedy(&reward, &[&first, &second], 0..40)),
            fast.reward_first,
            fast.reward_second,
            fast.reward_plus
        );
        let everybody = [first.clone(), second.clone()].concat();
        let start = Instant::now();
        let slow = algorithm_1(40, 2, 0..40, |members| {
            reward.score(&members.iter().map(|&m| everybody[m]).collect::<Vec<_>>())
        })
        .expect("slow pass");
        println!(
            "  recomputed from the rows each time: {:.0} ms; same choice: {}, largest difference {:.1e}",
            start.elapsed().as_secs_f64() * 1e3,
            fast.plus == slow.plus,
            (fast.reward_plus - slow.reward_plus).abs().max((fast.reward_minus - slow.reward_minus).abs())
        );
        let diverse = Vendi { slot: 0, pooling: Pooling::SongMean };
        println!(
            "  Algorithm 1 with Vendi: {:.1} ms",
            best(3, || greedy(&diverse, &[&first, &second], 0..40))
        );
        let rows: Vec<&Rows> = first.iter().map(|s| &s.views[0].embeddings).collect();
        let subsets = bootstrap_indices(0, 20, 40, 40).expect("indices");
        let fad = FrechetPool::new(&reference, &rows).expect("pool");
        println!(
            "  bootstrap FAD of 40 songs of 40: {:.2} ms a subset",
            best(2, || subsets.iter().map(|s| fad.distance(s)).collect::<Vec<_>>()) / subsets.len() as f64
        );
    }
    let many = rows(5, 2185);
    println!("Vendi, 2185 rows: {:.1} ms", best(3, || vendi(&many)));
    let songs = VendiPool::new(&rows(6, 360)).expect("pool");
    let all: Vec<usize> = (0..360).collect();
    println!("Vendi, 360 rows of a pool: {:.2} ms", best(5, || songs.vendi(&all)));
}
