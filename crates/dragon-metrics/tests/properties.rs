//! What must hold for any input, and the slow definitions beside the fast code.

use dragon_metrics::bootstrap::SplitMix64;
use dragon_metrics::*;
use proptest::prelude::*;

/// Rows with a spectrum: coordinate `k` has standard deviation `decay^k`.
fn rows(seed: u64, n: usize, dim: usize, decay: f64) -> Rows {
    let mut rng = SplitMix64(seed);
    let mut uniform = || (rng.next() >> 11) as f64 / (1u64 << 53) as f64;
    let normal = |_| (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
    let noise: Vec<f64> = (0..n * dim).map(normal).collect();
    Rows::new(n, dim, noise.iter().enumerate().map(|(i, x)| x * decay.powi((i % dim) as i32) + 0.3).collect())
        .unwrap()
}

/// A rotation: the product of reflections.
fn rotate(rows: &Rows, seed: u64) -> Rows {
    let mut data = rows.data().to_vec();
    for k in 0..3 {
        let axis = self::rows(seed + k, 1, rows.dim(), 1.0);
        let length: f64 = axis.row(0).iter().map(|x| x * x).sum();
        for row in data.chunks_exact_mut(rows.dim()) {
            let along: f64 = row.iter().zip(axis.row(0)).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(axis.row(0)).for_each(|(x, a)| *x -= 2.0 * along / length * a);
        }
    }
    Rows::new(rows.n(), rows.dim(), data).unwrap()
}

/// The definition, through a square root of the reference and nalgebra only.
fn slow_frechet(a: &Rows, b: &Rows) -> f64 {
    let stats = |r: &Rows| {
        let x = nalgebra::DMatrix::from_row_slice(r.n(), r.dim(), r.data());
        let mean = x.row_mean();
        let centered = nalgebra::DMatrix::from_fn(r.n(), r.dim(), |i, j| x[(i, j)] - mean[j]);
        (mean, centered.transpose() * &centered / (r.n() as f64 - 1.0))
    };
    let ((ma, sa), (mb, sb)) = (stats(a), stats(b));
    let root = |s: &nalgebra::DMatrix<f64>| {
        let e = s.clone().symmetric_eigen();
        let values = nalgebra::DMatrix::from_diagonal(&e.eigenvalues.map(|v| v.max(0.0).sqrt()));
        &e.eigenvectors * values * e.eigenvectors.transpose()
    };
    let r = root(&sb);
    (ma - mb).norm_squared() + sa.trace() + sb.trace() - 2.0 * root(&(&r * sa * &r)).trace()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn distance_is_symmetric_rotation_invariant_and_near_the_definition(
        seed in 0u64..1_000_000, n in 2usize..60, m in 2usize..60, dim in 1usize..40,
    ) {
        let (a, b) = (rows(seed, n, dim, 0.9), rows(seed + 1, m, dim, 0.9));
        let (ra, rb) = (FrechetReference::from_rows(&a).unwrap(), FrechetReference::from_rows(&b).unwrap());
        let distance = rb.distance(&a).unwrap();
        prop_assert!(distance > -1e-10, "{distance}");
        prop_assert!((distance - ra.distance(&b).unwrap()).abs() < 1e-8);
        prop_assert!((distance - slow_frechet(&a, &b)).abs() < 2e-6, "the definition counts noise for n <= d");
        let (ta, tb) = (rotate(&a, seed + 7), rotate(&b, seed + 7));
        prop_assert!((distance - FrechetReference::from_rows(&tb).unwrap().distance(&ta).unwrap()).abs() < 1e-8);
        prop_assert!(ra.distance(&a).unwrap().abs() < 1e-10, "{}", ra.distance(&a).unwrap());
        // The order of the rows moves the last bits only.
        let reversed: Vec<Vec<f64>> = a.iter().rev().map(<[f64]>::to_vec).collect();
        let reversed = rb.distance(&Rows::from_vecs(&reversed).unwrap()).unwrap();
        prop_assert!((distance - reversed).abs() < 1e-9);
    }

    #[test]
    fn any_multiset_of_a_pool_has_the_distance_of_its_rows(
        seed in 0u64..1_000_000, dim in 2usize..40, drawn in prop::collection::vec(0usize..8, 2..20), length in 1usize..6,
    ) {
        let reference = FrechetReference::from_rows(&rows(seed, 90, dim, 0.9)).unwrap();
        let songs: Vec<Rows> = (0..8).map(|i| rows(seed + 10 + i, length + i as usize % 2, dim, 0.85)).collect();
        let pool = FrechetPool::new(&reference, &songs.iter().collect::<Vec<_>>()).unwrap();
        let members: Vec<&Rows> = drawn.iter().map(|&s| &songs[s]).collect();
        let want = reference.distance(&Rows::concat(&members).unwrap()).unwrap();
        prop_assert!((pool.distance(&drawn).unwrap() - want).abs() < 1e-9);
        let mut walk = pool.into_walk();
        prop_assert!((walk.distance(&drawn).unwrap() - want).abs() < 1e-9);
    }

    #[test]
    fn vendi_lies_between_one_and_n_and_falls_with_the_order(
        seed in 0u64..1_000_000, n in 1usize..40, dim in 1usize..30, drawn in prop::collection::vec(0usize..40, 1..30),
    ) {
        let x = rows(seed, n, dim, 0.9);
        let score = vendi(&x).unwrap();
        prop_assert!((1.0 - 1e-9..=n.min(dim) as f64 + 1e-9).contains(&score), "{score}");
        prop_assert!((score - vendi(&rotate(&x, seed)).unwrap()).abs() < 1e-8);
        let twice = vendi(&Rows::concat(&[&x, &x]).unwrap()).unwrap();
        prop_assert!((score - twice).abs() < 1e-8, "duplicates change nothing");
        let orders: Vec<f64> = [0.0, 0.5, 1.0, 2.0, f64::INFINITY].map(|q| vendi_order(&x, q).unwrap()).into();
        prop_assert!(orders.windows(2).all(|w| w[0] >= w[1] - 1e-9), "{orders:?}");
        let drawn: Vec<usize> = drawn.into_iter().map(|i| i % n).collect();
        let subset: Vec<&[f64]> = drawn.iter().map(|&i| x.row(i)).collect();
        let want = vendi(&Rows::from_vecs(&subset).unwrap()).unwrap();
        prop_assert!((VendiPool::new(&x).unwrap().vendi(&drawn).unwrap() - want).abs() < 1e-9);
    }

    #[test]
    fn no_bytes_make_the_npy_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = files::parse_npy(&bytes);
        let _ = files::parse_npy(&[b"\x93NUMPY\x01\x00", &bytes[..]].concat());
        let mut header = b"\x93NUMPY\x01\x00\xff\x00{'descr': '<f8', 'fortran_order': True, 'shape': (".to_vec();
        header.extend_from_slice(&bytes);
        header.resize(400, b' ');
        let _ = files::parse_npy(&header);
    }
}

#[test]
fn streaming_moments_equal_the_whole() {
    let all = rows(3, 100, 17, 0.9);
    let whole = GaussianStats::fit(&all).unwrap();
    let mut streamed = Moments::new(17);
    let mut rest = Moments::new(17);
    for (k, chunk) in all.data().chunks(7 * 17).enumerate() {
        let chunk = Rows::new(chunk.len() / 17, 17, chunk.to_vec()).unwrap();
        if k < 5 { &mut streamed } else { &mut rest }.push(&chunk).unwrap();
    }
    streamed.merge(&rest).unwrap();
    let streamed = streamed.stats().unwrap();
    assert_eq!(streamed.n(), Some(100));
    let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-13);
    assert!(close(streamed.mean(), whole.mean()) && close(streamed.cov(), whole.cov()));
    assert!(frechet_distance(&streamed, &whole).unwrap().abs() < 1e-12);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let reference = FrechetReference::from_rows(&rows(1, 300, 64, 0.95)).unwrap();
    let songs: Vec<Rows> = (0..30).map(|i| rows(50 + i, 9, 64, 0.95)).collect();
    let songs: Vec<&Rows> = songs.iter().collect();
    let subsets = bootstrap_indices(9, 20, 12, 30).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let pool = FrechetPool::new(&reference, &songs).unwrap();
            let paired =
                paired_bootstrap(&subsets, |s| pool.distance(s), |s| pool.distance(&s[1..]), Better::Lower);
            (per_song_fad(&reference, &songs).unwrap(), paired.unwrap())
        })
    };
    assert_eq!(run(1), run(4));
}

#[test]
fn bootstrap_indices_are_those_written_down() {
    let indices = bootstrap_indices(42, 3, 8, 40).unwrap();
    assert_eq!(
        indices[..2],
        bootstrap_indices(42, 2, 8, 40).unwrap(),
        "a subset does not depend on how many there are"
    );
    assert_eq!(SplitMix64(1234567).next(), 6457827717110365317, "published first output of SplitMix64");
    let many = bootstrap_indices(1, 200, 500, 10).unwrap().concat();
    for value in 0..10 {
        let count = many.iter().filter(|&&i| i == value).count() as f64;
        assert!((count - 10_000.0).abs() < 5.0 * 95.0, "{value} drawn {count} times of 100000");
    }
}

#[test]
fn ties_count_half_and_direction_matters() {
    let (a, b) = ([3.0, 2.0, 1.0, 0.0], [1.0, 2.0, 2.0, -1.0]);
    let higher = win_rate(&a, &b, Better::Higher).unwrap();
    assert_eq!((higher.wins, higher.ties, higher.n, higher.rate), (2, 1, 4, 0.625));
    assert_eq!(win_rate(&a, &b, Better::Lower).unwrap().rate, 0.375);
    assert!(higher.lower < 0.625 && 0.625 < higher.upper);
}

#[test]
fn clap_score_clips_before_or_after_the_mean() {
    let audio = Rows::from_vecs(&[vec![3.0, 0.0], vec![-1.0, 0.0], vec![0.0, 2.0]]).unwrap();
    let text = [2.0, 0.0];
    assert!((clap_score(&audio, &text, Clip::BeforeMean).unwrap() - 1.0 / 3.0).abs() < 1e-15);
    assert_eq!(clap_score(&audio, &text, Clip::AfterMean).unwrap(), 0.0);
}

#[test]
fn prompts_without_ranks_are_left_out_of_the_mean() {
    let prompts = [1, 1, 1, 2, 2, 3, 4, 4];
    let a = [1.0, 2.0, 3.0, 1.0, 2.0, 5.0, 7.0, 7.0];
    let b = [1.0, 2.0, 3.0, 2.0, 1.0, 5.0, 1.0, 2.0];
    assert_eq!(per_prompt_spearman(&prompts, &a, &b).unwrap(), (0.0, 2));
}

#[test]
fn bad_input_is_named() {
    let message = |e: Error| e.to_string();
    let nan = Rows::new(2, 2, vec![0.0, 1.0, f64::NAN, 2.0]).unwrap_err();
    assert_eq!(message(nan), "embeddings: row 1, column 0 is NaN, expected a finite number");
    assert!(Rows::new(2, 2, vec![0.0]).is_err() && Rows::new(usize::MAX, 2, vec![]).is_err());
    assert!(Rows::new(1, 0, vec![]).is_err() && Rows::from_vecs::<Vec<f64>>(&[]).is_err());
    let (five, one, none) = (rows(1, 5, 3, 1.0), rows(1, 1, 3, 1.0), Rows::new(0, 3, vec![]).unwrap());
    let reference = FrechetReference::from_rows(&five).unwrap();
    assert_eq!(
        message(reference.distance(&one).unwrap_err()),
        "embeddings of a song or set: expected at least 2, found 1"
    );
    assert!(reference.distance(&none).is_err() && FrechetReference::from_rows(&one).is_err());
    assert!(GaussianStats::fit(&one).is_err() && GaussianStats::fit(&none).is_err() && none.mean().is_err());
    assert_eq!(
        message(reference.distance(&rows(1, 5, 4, 1.0)).unwrap_err()),
        "embeddings (against the reference): expected dimension 3, found 4"
    );
    let of_song = per_song_fad(&reference, &[&five, &one]).unwrap_err();
    assert!(message(of_song).starts_with("song 1: "));
    assert!(FrechetPool::new(&reference, &[]).is_err() && FrechetPool::new(&reference, &[&none]).is_err());
    let pool = FrechetPool::new(&reference, &[&five, &one]).unwrap();
    assert!(pool.distance(&[1]).is_err() && pool.distance(&[]).is_err());
    assert_eq!(
        message(pool.distance(&[2]).unwrap_err()),
        "song: index 2 is out of range, the set has 2 members"
    );
    assert!(vendi(&none).is_err() && VendiPool::new(&five).unwrap().vendi(&[5]).is_err());
    let silent = Rows::from_vecs(&[[1.0, 0.0], [0.0, 0.0]]).unwrap();
    assert!(message(vendi(&silent).unwrap_err()).contains("row 1 is all zeros"));
    assert!(clap_score(&silent, &[1.0, 0.0], Clip::BeforeMean).is_err());
    assert!(
        clap_score(&one, &[0.0; 3], Clip::BeforeMean).is_err()
            && clap_score(&one, &[1.0], Clip::BeforeMean).is_err()
    );
    assert!(vendi_order(&five, -1.0).is_err() && vendi_order(&five, f64::NAN).is_err());
    assert!(win_rate(&[], &[], Better::Higher).is_err() && win_rate(&[1.0], &[], Better::Higher).is_err());
    assert!(win_rate(&[f64::NAN], &[1.0], Better::Higher).is_err());
    assert!(
        clopper_pearson(3, 2, 0.95).is_err()
            && clopper_pearson(1, 2, 1.5).is_err()
            && binomial_p_value(0, 0, 0.5).is_err()
    );
    assert!(pearson(&[1.0, 1.0], &[1.0, 2.0]).is_err() && spearman(&[1.0], &[1.0]).is_err());
    assert!(bootstrap_indices(0, 1, 1, 0).is_err() && bootstrap::percentile(&[], 0.5).is_err());
    let stats = |mean: Vec<f64>, cov: Vec<f64>| GaussianStats::new(mean, cov, None);
    assert!(stats(vec![0.0; 2], vec![1.0, 0.5, 0.1, 1.0]).unwrap_err().to_string().contains("[1, 0] is 0.1"));
    assert!(stats(vec![0.0; 2], vec![0.0; 3]).is_err() && stats(vec![], vec![]).is_err());
    assert!(stats(vec![0.0, f64::INFINITY], vec![0.0; 4]).is_err());
    let indefinite = stats(vec![0.0; 2], vec![1.0, 2.0, 2.0, 1.0]).unwrap();
    assert!(FrechetReference::new(&indefinite).unwrap_err().to_string().contains("smallest eigenvalue -1"));
}

#[test]
fn a_reference_without_spread_leaves_traces_and_means() {
    let flat = Rows::from_vecs(&[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]).unwrap();
    let other = Rows::from_vecs(&[[0.0, 1.0], [2.0, 1.0]]).unwrap();
    for reference in [
        FrechetReference::from_rows(&flat).unwrap(),
        FrechetReference::new(&GaussianStats::new(vec![1.0, 1.0], vec![0.0; 4], None).unwrap()).unwrap(),
    ] {
        assert_eq!(reference.distance(&other).unwrap(), 2.0);
        assert_eq!(FrechetPool::new(&reference, &[&other]).unwrap().distance(&[0]).unwrap(), 2.0);
        assert_eq!(reference.distance_to_stats(&GaussianStats::fit(&other).unwrap()).unwrap(), 2.0);
    }
}
