//! An aesthetics head: kernel regression of ratings on embeddings, its bandwidth and ridge chosen by cross-validation.
//!
//! `cargo run --release -p dragon-metrics --example aesthetics`

use dragon_metrics::{Method, Result, Rows, Similarity, cross_validate, median_distance, pearson};

mod made_up;

fn main() -> Result<()> {
    // 80 rated songs of four windows each; the made-up rating depends on the first two coordinates.
    let rating = |song: &Rows| -> Result<f64> {
        let mean = song.mean()?;
        Ok(3.0 + mean[0].tanh() + 0.5 * mean[1])
    };
    let songs: Vec<Rows> = (0..80).map(|i| made_up::rows(50 + i, 4, (i as f64 * 0.7).sin())).collect();
    let ratings = songs.iter().map(rating).collect::<Result<Vec<f64>>>()?;
    let windows = Rows::concat(&songs.iter().collect::<Vec<_>>())?;
    let by_window: Vec<f64> = ratings.iter().flat_map(|r| [*r; 4]).collect();
    let song_of: Vec<usize> = (0..windows.n()).map(|i| i / 4).collect(); // windows of a song share a fold

    let median = median_distance(&windows)?;
    let mut candidates = Vec::new();
    for factor in [0.25, 0.5, 1.0, 2.0, 4.0] {
        let similarity = Similarity::Rbf { bandwidth: factor * median };
        candidates.push(Method::NadarayaWatson { similarity });
        candidates.extend([1e-3, 1e-1, 1e1].map(|lambda| Method::KernelRidge { similarity, lambda }));
    }
    candidates
        .extend([1e-1, 1e1].map(|lambda| Method::KernelRidge { similarity: Similarity::Linear, lambda }));
    let found = cross_validate(&windows, &by_window, &song_of, &candidates, 5, 7)?;
    let error = found.errors.iter().copied().fold(f64::INFINITY, f64::min);
    println!("best of {}: {:?}", candidates.len(), found.best.method());
    println!("held-out root mean squared error: {:.3}", error.sqrt());

    let new: Vec<Rows> = (0..30).map(|i| made_up::rows(900 + i, 4, (i as f64 * 1.3).cos())).collect();
    let predicted = new.iter().map(|song| found.best.rate(song)).collect::<Result<Vec<f64>>>()?;
    let truth = new.iter().map(rating).collect::<Result<Vec<f64>>>()?;
    println!("correlation with the rating of new songs: {:.3}", pearson(&predicted, &truth)?);
    Ok(())
}
