//! What the fuzz target and the test do with one input.

use dragon_metrics::{FrechetReference, GaussianStats, Rows, files, vendi};

/// Reads `bytes` as a `.npy` and as a `.npz` file; what is accepted must be consistent and usable without a panic.
pub fn run(bytes: &[u8]) {
    let mut arrays: Vec<files::Array> = files::parse_npy(bytes).into_iter().collect();
    arrays.extend(files::parse_npz(bytes).into_iter().flat_map(|all| all.into_values()));
    for array in arrays {
        assert_eq!(array.shape.iter().product::<usize>(), array.data.len(), "shape and values agree");
        let &[n, dim] = &array.shape[..] else { continue };
        if n.max(dim) > 64 {
            continue; // large ones take time, not other paths
        }
        if n == dim {
            let stats = GaussianStats::new(vec![0.0; dim], array.data.clone(), None);
            let _ = stats.and_then(|stats| FrechetReference::new(&stats));
        }
        let Ok(rows) = Rows::new(n, dim, array.data) else { continue };
        let _ = vendi(&rows);
        if let Ok(reference) = FrechetReference::from_rows(&rows) {
            let _ = reference.distance(&rows);
        }
    }
}
