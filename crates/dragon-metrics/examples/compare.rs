//! Are the songs of system A better than those of system B? FAD, KAD, Vendi and coverage on 1000 shared subsets of songs.
//!
//! `cargo run --release -p dragon-metrics --example compare`

use dragon_metrics::{
    Better, FrechetPool, FrechetReference, KadPool, KadReference, Kernel, PairedBootstrap, PrdcPool, Result,
    Rows, VendiPool, bootstrap_indices, paired_bootstrap,
};

mod made_up;

fn main() -> Result<()> {
    let reference = made_up::rows(1, 1000, 0.0);
    // Song i of both systems answers prompt i; nine embeddings a song.
    let system = |seed: u64, offset: f64| -> Vec<Rows> {
        (0..60).map(|i| made_up::rows(seed + i, 9, offset)).collect()
    };
    let (a, b) = (system(100, 0.05), system(500, 0.10));
    let (a, b): (Vec<&Rows>, Vec<&Rows>) = (a.iter().collect(), b.iter().collect());
    let subsets = bootstrap_indices(2024, 1000, 40, a.len())?;

    let frechet = FrechetReference::from_rows(&reference)?;
    let (pool_a, pool_b) = (FrechetPool::new(&frechet, &a)?, FrechetPool::new(&frechet, &b)?);
    let fad = paired_bootstrap(&subsets, |s| pool_a.distance(s), |s| pool_b.distance(s), Better::Lower)?;

    let kernel = KadReference::new(&reference, Kernel::Gaussian)?;
    let (pool_a, pool_b) = (KadPool::new(&kernel, &a)?, KadPool::new(&kernel, &b)?);
    let kad = paired_bootstrap(&subsets, |s| pool_a.kad(s), |s| pool_b.kad(s), Better::Lower)?;

    let song_means = |songs: &[&Rows]| -> Result<VendiPool> {
        VendiPool::new(&Rows::from_vecs(&songs.iter().map(|s| s.mean()).collect::<Result<Vec<_>>>()?)?)
    };
    let (pool_a, pool_b) = (song_means(&a)?, song_means(&b)?);
    let vendi = paired_bootstrap(&subsets, |s| pool_a.vendi(s), |s| pool_b.vendi(s), Better::Higher)?;

    let (pool_a, pool_b) = (PrdcPool::new(&reference, &a, 5)?, PrdcPool::new(&reference, &b, 5)?);
    let coverage = |pool: &PrdcPool, s: &[usize]| Ok(pool.prdc(s)?.coverage);
    let coverage =
        paired_bootstrap(&subsets, |s| coverage(&pool_a, s), |s| coverage(&pool_b, s), Better::Higher)?;

    println!("metric      A wins   mean A - B      95 % interval");
    print("FAD", &fad);
    print("KAD", &kad);
    print("Vendi", &vendi);
    print("coverage", &coverage);
    Ok(())
}

fn print(name: &str, result: &PairedBootstrap) {
    let (low, high) = result.difference_95;
    let wins = 100.0 * result.win_rate.rate;
    println!("{name:10} {wins:6.1} % {:12.5}   {low:10.5} .. {high:.5}", result.mean_difference);
}
