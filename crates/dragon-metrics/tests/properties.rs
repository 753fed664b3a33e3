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
fn a_nalgebra_matrix_has_its_rows_as_embeddings() {
    let matrix = nalgebra::DMatrix::from_row_slice(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(
        Rows::try_from(&matrix).unwrap(),
        Rows::from_vecs(&[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).unwrap()
    );
    let message =
        Rows::try_from(&nalgebra::DMatrix::from_row_slice(2, 1, &[0.0, f64::NAN])).unwrap_err().to_string();
    assert!(message.contains("row 1, column 0 is NaN"), "{message}");
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
    let many = rows(1, 600, 64, 0.95);
    let reference = FrechetReference::from_rows(&many).unwrap();
    let songs: Vec<Rows> = (0..30).map(|i| rows(50 + i, 9, 64, 0.95)).collect();
    let songs: Vec<&Rows> = songs.iter().collect();
    let subsets = bootstrap_indices(9, 20, 12, 30).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let pool = FrechetPool::new(&reference, &songs).unwrap();
            let paired =
                paired_bootstrap(&subsets, |s| pool.distance(s), |s| pool.distance(&s[1..]), Better::Lower);
            let all = Rows::concat(&songs).unwrap();
            let options = FadInfOptions { min_rows: 40, steps: 5, ..Default::default() };
            let kernel = KadReference::new(&many, Kernel::Gaussian).unwrap();
            let kad =
                (kernel.kad(&all).unwrap(), KadPool::new(&kernel, &songs).unwrap().kad(&subsets[0]).unwrap());
            let shares = prdc(&many, &all, 5).unwrap();
            let line = fad_inf(&reference, &all, options).unwrap();
            (per_song_fad(&reference, &songs).unwrap(), paired.unwrap(), kad, shares, line)
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

#[test]
fn pools_of_kad_and_prdc_give_any_multiset_what_its_rows_give() {
    let reference = rows(1, 70, 9, 0.9);
    let songs: Vec<Rows> = (0..7).map(|i| rows(20 + i, 3 + i as usize % 3, 9, 0.85)).collect();
    let songs: Vec<&Rows> = songs.iter().collect();
    for kernel in [Kernel::Gaussian, Kernel::InverseQuadratic, Kernel::InverseMultiquadric] {
        let kad_reference = KadReference::new(&reference, kernel).unwrap();
        let kad = KadPool::new(&kad_reference, &songs).unwrap();
        let shares = PrdcPool::new(&reference, &songs, 3).unwrap();
        for members in bootstrap_indices(5, 20, 6, 7).unwrap() {
            let drawn = Rows::concat(&members.iter().map(|&m| songs[m]).collect::<Vec<_>>()).unwrap();
            let want = kad_reference.kad(&drawn).unwrap();
            assert!((kad.kad(&members).unwrap() - want).abs() < 1e-11);
            assert_eq!(shares.prdc(&members).unwrap(), prdc(&reference, &drawn, 3).unwrap());
        }
        assert!(kad.kad(&[7]).is_err() && kad.kad(&[]).is_err());
        assert!(shares.prdc(&[7]).is_err() && shares.prdc(&[]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn kernel_and_neighbour_metrics_ignore_order_rotation_and_translation(
        seed in 0u64..1_000_000, n in 6usize..40, m in 6usize..40, dim in 1usize..20, offset in -20.0f64..20.0,
    ) {
        let (x, y) = (rows(seed, n, dim, 0.9), rows(seed + 1, m, dim, 0.9));
        let moved = |r: &Rows| {
            Rows::new(r.n(), r.dim(), rotate(r, seed).data().iter().map(|v| v + offset).collect()).unwrap()
        };
        let reversed = |r: &Rows| r.select(&(0..r.n()).rev().collect::<Vec<_>>()).unwrap();
        let reference = KadReference::new(&x, Kernel::Gaussian).unwrap();
        let kad = reference.kad(&y).unwrap();
        prop_assert!(kad < 200.0 + 1e-9, "{kad}");
        let turned = KadReference::new(&moved(&x), Kernel::Gaussian).unwrap().kad(&moved(&y)).unwrap();
        prop_assert!((kad - turned).abs() < 1e-7, "{kad} {turned}");
        prop_assert!((kad - reference.kad(&reversed(&y)).unwrap()).abs() < 1e-10);
        // With one bandwidth the distance is symmetric.
        let other = KadReference::with_bandwidth(&y, Kernel::Gaussian, reference.bandwidth()).unwrap();
        prop_assert!((kad - other.kad(&x).unwrap()).abs() < 1e-10);

        let shares = prdc(&x, &y, 3).unwrap();
        prop_assert_eq!(shares, prdc(&reversed(&x), &reversed(&y), 3).unwrap());
        prop_assert_eq!(shares.precision, prdc(&y, &x, 3).unwrap().recall, "precision and recall swap");
        let own = prdc(&x, &x, 3).unwrap();
        prop_assert_eq!((own.precision, own.recall, own.coverage), (1.0, 1.0, 1.0), "a set covers itself");
        let far = Rows::new(m, dim, y.data().iter().map(|v| v + 1e3).collect()).unwrap();
        let far = prdc(&x, &far, 3).unwrap();
        prop_assert_eq!((far.precision, far.recall, far.density, far.coverage), (0.0, 0.0, 0.0, 0.0));
    }

    #[test]
    fn frechet_distance_moves_with_translation_and_scale(
        seed in 0u64..1_000_000, n in 2usize..40, m in 2usize..40, dim in 1usize..20, offset in -5.0f64..5.0,
    ) {
        let (x, y) = (rows(seed, n, dim, 0.9), rows(seed + 1, m, dim, 0.9));
        let map = |r: &Rows, f: &dyn Fn(f64) -> f64| {
            Rows::new(r.n(), dim, r.data().iter().map(|v| f(*v)).collect()).unwrap()
        };
        let distance = |a: &Rows, b: &Rows| FrechetReference::from_rows(b).unwrap().distance(a).unwrap();
        let plain = distance(&x, &y);
        let both = distance(&map(&x, &|v| v + offset), &map(&y, &|v| v + offset));
        prop_assert!((plain - both).abs() < 1e-9, "a shift of both changes nothing");
        prop_assert!((distance(&map(&x, &|v| 3.0 * v), &map(&y, &|v| 3.0 * v)) - 9.0 * plain).abs() < 1e-7);
        let shifted = map(&x, &|v| v + offset);
        prop_assert!((distance(&x, &shifted) - dim as f64 * offset * offset).abs() < 1e-8, "equal shapes: the means remain");
        // Rows repeated k times: covariance shrinks by (n-1)k/(nk-1), so that only ddof separates them.
        let twice = Rows::concat(&[&x, &x]).unwrap();
        let ratio = ((n as f64 - 1.0) * 2.0 / (2.0 * n as f64 - 1.0)).sqrt();
        let trace = GaussianStats::fit(&x).unwrap().trace();
        prop_assert!((distance(&twice, &x) - trace * (1.0 - ratio).powi(2)).abs() < 1e-8);
    }

    #[test]
    fn a_greedy_pass_never_makes_the_set_worse(
        seed in 0u64..1_000_000, dim in 1usize..16, length in 1usize..5, pairs in 2usize..9,
    ) {
        // Algorithm 1 with the negative distance as reward.
        let reference = FrechetReference::from_rows(&rows(seed, 60, dim, 0.9)).unwrap();
        let songs: Vec<Rows> = (0..2 * pairs as u64).map(|i| rows(seed + 10 + i, length, dim, 0.8)).collect();
        let songs: Vec<&Rows> = songs.iter().collect();
        let mut walk = FrechetPool::new(&reference, &songs).unwrap().into_walk();
        let (first, second): (Vec<usize>, Vec<usize>) = ((0..pairs).collect(), (pairs..2 * pairs).collect());
        let start = walk.distance(&first).unwrap().min(walk.distance(&second).unwrap());
        let mut chosen = if walk.distance(&second).unwrap() < walk.distance(&first).unwrap() { second } else { first };
        let mut best = start;
        for i in 0..pairs {
            let mut swapped = chosen.clone();
            swapped[i] = (swapped[i] + pairs) % (2 * pairs);
            let distance = walk.distance(&swapped).unwrap();
            if distance < best {
                (chosen, best) = (swapped, distance);
            }
        }
        prop_assert!(best <= start);
        prop_assert!(chosen.iter().enumerate().all(|(i, s)| s % pairs == i), "pairs stay at their places");
        let rows = Rows::concat(&chosen.iter().map(|&s| songs[s]).collect::<Vec<_>>()).unwrap();
        prop_assert!((reference.distance(&rows).unwrap() - best).abs() < 1e-9, "the walk does not drift");
    }

    #[test]
    fn weights_of_vendi_count_like_repetitions(
        seed in 0u64..1_000_000, counts in prop::collection::vec(0usize..4, 2..12), dim in 1usize..15,
    ) {
        let total: usize = counts.iter().sum();
        prop_assume!(total > 0);
        let x = rows(seed, counts.len(), dim, 0.9);
        let repeated: Vec<usize> = counts.iter().enumerate().flat_map(|(i, &c)| vec![i; c]).collect();
        let p: Vec<f64> = counts.iter().map(|&c| c as f64 / total as f64).collect();
        for q in [0.3, 1.0, 2.0, f64::INFINITY] {
            let want = vendi_order(&x.select(&repeated).unwrap(), q).unwrap();
            let got = vendi_weighted(&x, &p, q).unwrap();
            prop_assert!((got - want).abs() < 1e-6, "order {q}: {got} {want}");
        }
    }
}

#[test]
fn bootstraps_share_their_subsets_and_take_numpys_percentiles() {
    let scores: Vec<f64> = (0..40).map(|i| ((i * 17) % 40) as f64 / 40.0).collect();
    let mean = |s: &[usize]| Ok(s.iter().map(|&i| scores[i]).sum::<f64>() / s.len() as f64);
    let subsets = bootstrap_indices(3, 500, 40, 40).unwrap();
    let one = bootstrap(&subsets, mean, 0.9).unwrap();
    assert_eq!(one.values.len(), 500);
    assert_eq!(one.interval.0, bootstrap::percentile(&one.values, (1.0 - 0.9) / 2.0).unwrap());
    assert!(one.interval.0 < one.mean && one.mean < one.interval.1);
    // The standard error of a mean of 40 draws from 0, 1/40, .. 39/40.
    let want = ((40.0f64 * 40.0 - 1.0) / 12.0).sqrt() / 40.0 / 40.0f64.sqrt();
    assert!((one.std / want - 1.0).abs() < 0.12, "{} {want}", one.std);
    let paired = paired_bootstrap(&subsets, mean, |s| Ok(mean(s)? - 0.01), Better::Higher).unwrap();
    assert_eq!(
        (paired.a.as_slice(), paired.win_rate.wins),
        (&one.values[..], 500),
        "same subsets, same values"
    );
    assert!((paired.mean_difference - 0.01).abs() < 1e-12);
    assert!(bootstrap(&[], mean, 0.9).is_err() && bootstrap(&subsets, mean, 1.0).is_err());
    let failing = |s: &[usize]| if s == subsets[3] { vendi(&Rows::new(0, 1, vec![])?) } else { Ok(1.0) };
    assert!(bootstrap(&subsets, failing, 0.9).unwrap_err().to_string().starts_with("bootstrap subset 3: "));
}

#[test]
fn cross_validation_finds_the_bandwidth_that_predicts_and_keeps_songs_together() {
    let x = rows(4, 120, 3, 1.0);
    let y: Vec<f64> = x.iter().map(|r| (2.0 * r[0]).sin() + 3.0).collect();
    let groups: Vec<usize> = (0..120).map(|i| 1000 - i / 4).collect();
    let candidates: Vec<Method> = [0.001, 0.7, 200.0]
        .map(|bandwidth| Method::KernelRidge { similarity: Similarity::Rbf { bandwidth }, lambda: 1e-3 })
        .into_iter()
        .chain([Method::NadarayaWatson { similarity: Similarity::Rbf { bandwidth: 0.4 } }])
        .collect();
    let found = cross_validate(&x, &y, &groups, &candidates, 5, 1).unwrap();
    assert_eq!(found.best.method(), candidates[1], "{:?}", found.errors);
    assert!(
        found.errors[1] < 0.3 * found.errors[0] && found.errors[1] < 0.3 * found.errors[2],
        "{:?}",
        found.errors
    );
    for i in 0..120 {
        assert_eq!(found.folds[i], found.folds[i - i % 4], "windows of a song share a fold");
    }
    assert!((0..5).all(|f| found.folds.iter().filter(|x| **x == f).count() == 24));
    assert_eq!(found.folds, cross_validate(&x, &y, &groups, &candidates[..1], 5, 1).unwrap().folds);
    assert!(cross_validate(&x, &y, &groups, &[], 5, 1).is_err());
    assert!(cross_validate(&x, &y, &groups, &candidates, 31, 1).is_err(), "30 songs, 31 folds");
    // A fit to one row predicts its rating everywhere; far away Nadaraya-Watson still has a mean.
    let one = x.select(&[0]).unwrap();
    let far = Rows::new(1, 3, vec![1e4; 3]).unwrap();
    for method in [candidates[1], candidates[3]] {
        let fitted = KernelRegression::fit(&one, &[2.5], method).unwrap();
        assert_eq!(fitted.predict(&far).unwrap(), [2.5]);
        assert!(
            fitted.predict(&rows(1, 2, 4, 1.0)).is_err()
                && KernelRegression::fit(&one, &[f64::NAN], method).is_err()
        );
    }
    let opposite = Rows::new(1, 3, x.row(0).iter().map(|v| -v).collect()).unwrap();
    let linear = Method::NadarayaWatson { similarity: Similarity::Linear };
    let message =
        KernelRegression::fit(&one, &[1.0], linear).unwrap().predict(&opposite).unwrap_err().to_string();
    assert!(message.starts_with("row 0: similarity to the fitted rows"), "{message}");
    for (bandwidth, lambda) in [(0.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, f64::INFINITY)] {
        let method = Method::KernelRidge { similarity: Similarity::Rbf { bandwidth }, lambda };
        assert!(KernelRegression::fit(&x, &y, method).is_err());
    }
}

#[test]
fn a_listening_test_gives_its_odds_back() {
    // One rater each: clustering adds only the correction, and the estimate is the log-odds of the wins.
    let wins: Vec<usize> = (0..420).map(|i| usize::from(i % 420 < 253)).collect();
    let (ones, raters): (Vec<usize>, Vec<usize>) = ((0..420).map(|_| 1).collect(), (0..420).collect());
    let fit = win_log_odds(&wins, &ones, &raters).unwrap();
    let odds = (253.0f64 / 167.0).ln();
    let [only] = fit.coefficients[..] else { panic!("one coefficient") };
    assert!((only.estimate - odds).abs() < 1e-12);
    assert!((only.std_error_independent - (1.0f64 / 253.0 + 1.0 / 167.0).sqrt()).abs() < 1e-12);
    assert!((only.std_error / only.std_error_independent - (420.0f64 / 419.0).sqrt()).abs() < 1e-9);
    // The same answers by 42 raters in tenfold groups: the same estimate, another error.
    let (sums, tens): (Vec<usize>, Vec<usize>) =
        wins.chunks(10).map(|w| (w.iter().sum::<usize>(), 10)).unzip();
    let grouped = win_log_odds(&sums, &tens, &(0..42).collect::<Vec<_>>()).unwrap();
    assert!((grouped.coefficients[0].estimate - odds).abs() < 1e-12);
    assert!(
        grouped.coefficients[0].std_error > 2.0 * only.std_error,
        "raters who always agree with themselves"
    );
    assert!(win_log_odds(&[1, 1, 1], &[1, 1, 1], &[0, 1, 2]).is_err(), "infinite odds");
    assert!(win_log_odds(&[0, 1], &[1, 1], &[0, 0]).is_err(), "one rater");
    assert!(win_log_odds(&[2, 1], &[1, 1], &[0, 1]).unwrap_err().to_string().starts_with("row 0: "));
    assert!(win_log_odds(&[1], &[1, 1], &[0]).is_err() && win_log_odds(&[], &[], &[]).is_err());
}
