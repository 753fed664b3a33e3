//! Against 40-digit arithmetic and against the tools that people use now; see `fixtures/dragon-metrics/*/generate.py`.

use std::path::{Path, PathBuf};

use dragon_metrics::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/dragon-metrics").join(name)
}

fn assert_close(got: f64, want: f64, tolerance: f64, what: &str) {
    assert!(
        (got - want).abs() <= tolerance,
        "{what}: got {got:e}, want {want:e}, off by {:e} > {tolerance:e}",
        got - want
    );
}

const FRECHET: [&str; 17] = [
    "n_below_d",
    "n_is_d",
    "n_is_d_plus_1",
    "n_above_d",
    "two_rows",
    "small_reference",
    "small_reference_large_set",
    "duplicates",
    "duplicates_above_d",
    "all_rows_equal",
    "nearly_singular",
    "nearly_singular_both",
    "one_dimension",
    "far_from_zero",
    "identical",
    "identical_small",
    "song_48",
];

#[test]
fn frechet_distances_meet_forty_digit_arithmetic_to_1e_9() {
    let file = fixture("frechet/case.safetensors");
    for case in FRECHET {
        let read = |key: &str| files::read_embeddings(&file, Some(&format!("{case}.{key}"))).unwrap();
        let (generated, reference) = (read("generated"), read("reference"));
        let exact = read("exact").row(0)[0];
        let tolerance = if case.starts_with("identical") { 1e-10 } else { 1e-9 * exact };
        let from_rows = FrechetReference::from_rows(&reference).unwrap();
        assert_close(from_rows.distance(&generated).unwrap(), exact, tolerance, case);
        // Any subset of a pool goes through the Gram matrix or the moments.
        let extra = Rows::concat(&[&generated, &reference]).unwrap();
        let pool = FrechetPool::new(&from_rows, &[&extra, &generated]).unwrap();
        assert_close(pool.distance(&[1]).unwrap(), exact, tolerance, &format!("{case}, pool"));
        // From covariances the zero eigenvalues of a set smaller than D are only known through `n`.
        let stats = (GaussianStats::fit(&generated).unwrap(), GaussianStats::fit(&reference).unwrap());
        let by_stats = frechet_distance(&stats.0, &stats.1).unwrap();
        let tolerance = if case.contains("duplicates") || case.contains("equal") { 1e-6 } else { tolerance };
        assert_close(by_stats, exact, tolerance, &format!("{case}, statistics"));
    }
}

#[test]
fn frechet_distances_meet_fadtk_and_frechet_audio_distance_within_their_noise() {
    let file = fixture("frechet/case.safetensors");
    let mut compared = 0;
    for case in FRECHET {
        let read = |key: &str| files::read_embeddings(&file, Some(&format!("{case}.{key}")));
        let reference = FrechetReference::from_rows(&read("reference").unwrap()).unwrap();
        let got = reference.distance(&read("generated").unwrap()).unwrap();
        for peer in ["fadtk", "gudgud"] {
            if let Ok(value) = read(peer) {
                compared += 1;
                // Their zero eigenvalues come back as ±1e-19 and the roots add up: -1e-7 relative, 1e-6 where nearly singular.
                let tolerance = 1e-6 * value.row(0)[0].abs().max(1.0);
                assert_close(got, value.row(0)[0], tolerance, &format!("{case}, {peer}"));
            }
        }
    }
    assert!(compared >= 20, "only {compared} values of peers in the fixture");
}

#[test]
fn vendi_scores_meet_exact_values_and_vendi_score() {
    let file = fixture("vendi/case.safetensors");
    for case in ["below_d", "above_d", "duplicates", "nearly_equal", "one", "orthogonal", "song_means"] {
        let read = |key: &str| files::read_embeddings(&file, Some(&format!("{case}.{key}"))).unwrap();
        let rows = read("rows");
        let exact = read("exact");
        let (pool, all) = (VendiPool::new(&rows).unwrap(), (0..rows.n()).collect::<Vec<_>>());
        for (q, want) in [0.0, 0.5, 1.0, 2.0, f64::INFINITY].into_iter().zip(exact.row(0)) {
            let tolerance = if q < 1.0 { 1e-7 } else { 1e-9 } * want; // roots of tiny eigenvalues below order 1
            let what = format!("{case}, order {q}");
            assert_close(vendi_order(&rows, q).unwrap(), *want, tolerance, &what);
            assert_close(pool.vendi_order(&all, q).unwrap(), *want, tolerance, &what);
        }
        assert_close(vendi(&rows).unwrap(), read("vendi_score").row(0)[0], 1e-9 * exact.row(0)[2], case);
        assert_close(pool.vendi(&all).unwrap(), exact.row(0)[2], 1e-9, case);
    }
}

#[test]
fn binomial_and_beta_values_meet_mpmath() {
    let text = std::fs::read_to_string(fixture("statistics/case.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    for case in cases["binomial"].as_array().unwrap() {
        let number = |key: &str| case[key].as_f64().unwrap();
        let (k, n) = (number("k") as usize, number("n") as usize);
        let (lower, upper) = clopper_pearson(k, n, 0.95).unwrap();
        let what = |key: &str| format!("{key} of {k} in {n}");
        assert_close(lower, number("lower"), 1e-11, &what("lower"));
        assert_close(upper, number("upper"), 1e-11, &what("upper"));
        assert_close(
            clopper_pearson_lower(k, n, 0.95).unwrap(),
            number("lower_one_sided"),
            1e-11,
            &what("one-sided bound"),
        );
        let p = number("p_value");
        assert_close(binomial_p_value(k, n, 0.5).unwrap(), p, 1e-10 * p, &what("p-value"));
        let above = number("posterior");
        assert_close(beta_posterior_above(k, n, 0.5).unwrap(), above, 1e-10 * above, &what("posterior"));
    }
}

#[test]
fn correlations_ranks_and_quantiles_meet_scipy() {
    let text = std::fs::read_to_string(fixture("statistics/case.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    let list = |v: &serde_json::Value| -> Vec<f64> {
        v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    for case in cases["correlations"].as_array().unwrap() {
        let (a, b) = (list(&case["a"]), list(&case["b"]));
        assert_close(pearson(&a, &b).unwrap(), case["pearson"].as_f64().unwrap(), 1e-12, "pearson");
        assert_close(spearman(&a, &b).unwrap(), case["spearman"].as_f64().unwrap(), 1e-12, "spearman");
        assert_eq!(correlation::ranks(&a), list(&case["ranks"]));
        for pair in case["quantiles"].as_array().unwrap() {
            let pair = list(pair);
            assert_close(bootstrap::percentile(&a, pair[0]).unwrap(), pair[1], 1e-12, "quantile");
        }
    }
}

#[test]
fn the_papers_listening_test_is_reproduced_to_all_printed_digits() {
    for (k, rate, bound, p, posterior) in
        [(253, "60.24", "56.15", "1.58e-5", "99.9987"), (256, "60.95", "56.87", "4.15e-6", "99.9997")]
    {
        let n = 420;
        assert_eq!(format!("{:.2}", 100.0 * k as f64 / n as f64), rate);
        assert_eq!(format!("{:.2}", 100.0 * clopper_pearson_lower(k, n, 0.95).unwrap()), bound);
        assert_eq!(format!("{:.2e}", binomial_p_value(k, n, 0.5).unwrap()), p);
        assert_eq!(format!("{:.4}", 100.0 * beta_posterior_above(k, n, 0.5).unwrap()), posterior);
    }
}

#[test]
fn arrays_as_numpy_writes_them_are_read() {
    let want: Vec<f64> = (0..12).map(|i| f64::from(i) / 8.0 - 0.5).collect();
    for name in
        ["f64.npy", "f32.npy", "f16.npy", "fortran.npy", "big_endian.npy", "version_3.npy", "compressed.npz"]
    {
        let rows = files::read_embeddings(&fixture("files").join(name), None).unwrap();
        assert_eq!((rows.n(), rows.dim()), (4, 3), "{name}");
        assert_eq!(rows.data(), want, "{name}");
    }
    let one = files::read_embeddings(&fixture("files/one_row.npy"), None).unwrap();
    assert_eq!((one.n(), one.dim()), (1, 3));
}

#[test]
fn statistics_as_fadtk_writes_them_are_read() {
    let file = fixture("files/fadtk.npz");
    assert_eq!(files::stats_in(&file).unwrap(), ["clap-laion-music", "other"]);
    let stats = files::read_stats(&file, Some("clap-laion-music")).unwrap();
    assert_eq!(stats.mean(), [0.0, 0.25, 0.5]);
    assert_eq!((stats.dim(), stats.n()), (3, None));
    assert_eq!(files::read_stats(&file, Some("other")).unwrap().dim(), 2);
}

#[test]
fn files_that_cannot_be_used_say_why() {
    let error =
        |name: &str| files::read_embeddings(&fixture("files").join(name), None).unwrap_err().to_string();
    assert!(error("cube.npy").contains("shape [2, 2, 2], expected [N, D]"), "{}", error("cube.npy"));
    assert!(error("objects.npy").contains("element type `|O`"), "{}", error("objects.npy"));
    assert!(error("nan_in_row_2.npy").contains("row 2, column 1 is NaN"), "{}", error("nan_in_row_2.npy"));
    assert!(error("fadtk.npz").contains("holds 4 arrays, name one of"), "{}", error("fadtk.npz"));
    assert!(error("missing.npy").contains("cannot read"), "{}", error("missing.npy"));
    let error = |name: &str, key: Option<&str>| {
        let stats = files::read_stats(&fixture("files").join(name), key);
        stats.and_then(|s| FrechetReference::new(&s)).unwrap_err().to_string()
    };
    let message = error("fadtk.npz", Some("vggish"));
    assert!(message.contains("no entry `vggish.mu`; it has: clap-laion-music, other"), "{message}");
    let message = error("fadtk.npz", None);
    assert!(message.contains("holds 2 statistics, name one of: clap-laion-music, other"), "{message}");
    assert!(
        error("not_symmetric.npz", None).contains("not symmetric"),
        "{}",
        error("not_symmetric.npz", None)
    );
    assert!(error("not_positive.npz", None).contains("not positive"), "{}", error("not_positive.npz", None));
    assert!(error("f64.npy", None).contains("expected .npz or .safetensors"), "{}", error("f64.npy", None));
}

#[test]
fn statistics_survive_writing_and_reading_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let rows =
        files::read_embeddings(&fixture("frechet/case.safetensors"), Some("song_48.reference")).unwrap();
    let stats = GaussianStats::fit(&rows).unwrap();
    for name in ["stats.npz", "stats.safetensors"] {
        let path = folder.path().join(name);
        files::write_stats(&path, "musicnn", &stats).unwrap();
        let first = std::fs::read(&path).unwrap();
        assert_eq!(files::read_stats(&path, None).unwrap(), stats);
        files::write_stats(&path, "musicnn", &stats).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first, "same statistics, same bytes");
    }
    for name in ["rows.npy", "rows.npz", "rows.safetensors"] {
        let path = folder.path().join(name);
        files::write_embeddings(&path, "embeddings", &rows).unwrap();
        assert_eq!(files::read_embeddings(&path, None).unwrap(), rows);
    }
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 5, "temporary files left behind: {left:?}");
    let nowhere = folder.path().join("missing/stats.npz");
    assert!(files::write_stats(&nowhere, "a", &stats).unwrap_err().to_string().contains("cannot write"));
}

#[test]
fn hostile_npy_headers_end_in_a_message() {
    let file = |header: &str| {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend_from_slice(&(header.len() as u16).to_le_bytes());
        bytes.extend_from_slice(header.as_bytes());
        bytes
    };
    let error = |header: &str| files::parse_npy(&file(header)).unwrap_err();
    let huge = "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 999999999999), }";
    assert!(error(huge).contains("more elements than memory"), "{}", error(huge));
    let large = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 10), }";
    assert!(error(large).contains("found 0; was the file cut short?"), "{}", error(large));
    for header in [
        "",
        "{",
        "{'descr'",
        "{'descr': ",
        "{'shape': (-1,), }",
        "{'shape': (",
        "{'a': 1}",
        "{}",
        "é",
        "{'é': 1}",
    ] {
        assert!(error(header).contains("header"), "{header}: {}", error(header));
    }
    for bytes in [
        &b""[..],
        b"\x93NUM",
        b"PK\x03\x04aaaaaaaa",
        b"\x93NUMPY\x09\x00aa",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    ] {
        assert!(files::parse_npy(bytes).is_err());
    }
    // Every prefix of a good file is refused, and so is a byte too many.
    let good = std::fs::read(fixture("files/f64.npy")).unwrap();
    for end in 0..good.len() {
        assert!(files::parse_npy(&good[..end]).is_err(), "prefix of {end} bytes");
    }
    assert!(files::parse_npy(&[&good[..], &[0]].concat()).unwrap_err().contains("1 bytes follow"));
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.npz", "a.safetensors", "a.npy"] {
        let path = folder.path().join(name);
        std::fs::write(&path, &good[..40]).unwrap();
        assert!(files::read_embeddings(&path, None).unwrap_err().to_string().contains(name));
    }
    let path = folder.path().join("a.csv");
    assert!(files::read_embeddings(&path, None).unwrap_err().to_string().contains("none of .npy"));
}

#[test]
fn fadtk_folders_are_written_and_read_as_fadtk_does() {
    let folder = tempfile::tempdir().unwrap();
    let rows =
        files::read_embeddings(&fixture("frechet/case.safetensors"), Some("song_48.reference")).unwrap();
    for song in ["b.wav", "a.b.mp3"] {
        files::write_fadtk_embeddings(folder.path(), "clap-laion-music", song, &rows).unwrap();
    }
    let read = files::read_fadtk_embeddings(folder.path(), "clap-laion-music").unwrap();
    assert_eq!(read.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a.b", "b"]);
    assert_eq!(read[1].1, Convention::Fadtk11.store(&rows).unwrap(), "f16, as fadtk stores them");
    let bytes = std::fs::read(folder.path().join("embeddings/clap-laion-music/b.npy")).unwrap();
    let header = String::from_utf8_lossy(&bytes[10..128]).into_owned();
    assert!(header.contains("'<f2'") && header.contains("(120, 48)"), "{header}");
    assert_eq!(bytes.len(), 128 + 2 * 120 * 48);

    let stats = Convention::Fadtk11.stats(&rows).unwrap();
    files::write_fadtk_stats(folder.path(), "m", &stats).unwrap();
    let got = files::read_fadtk_stats(folder.path(), "m").unwrap();
    assert_eq!((got.mean(), got.cov(), got.n()), (stats.mean(), stats.cov(), None));

    let model = folder.path().join("embeddings/clap-laion-music");
    let message = |model: &str| files::read_fadtk_embeddings(folder.path(), model).unwrap_err().to_string();
    files::write_embeddings(&model.join("c.npy"), "", &Rows::new(1, 2, vec![0.0; 2]).unwrap()).unwrap();
    assert!(message("clap-laion-music").contains("c.npy`: embeddings: expected dimension 48, found 2"));
    std::fs::copy(fixture("files/nan_in_row_2.npy"), model.join("b.npy")).unwrap();
    assert!(message("clap-laion-music").contains("b.npy`: embeddings: row 2, column 1 is NaN"));
    std::fs::create_dir(folder.path().join("embeddings/empty")).unwrap();
    assert!(message("empty").contains("holds no .npy file") && message("none").contains("cannot read"));
    assert!(files::read_fadtk_stats(folder.path(), "none").unwrap_err().to_string().contains("mu.npy"));
}

#[test]
fn many_statistics_share_a_file_and_embeddings_come_in_three_precisions() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.npz");
    let stats = |x: f64| GaussianStats::new(vec![x], vec![x * x], None).unwrap();
    files::write_all_stats(&path, &[("vggish", &stats(2.0)), ("clap-2023", &stats(3.0))]).unwrap();
    assert_eq!(files::stats_in(&path).unwrap(), ["clap-2023", "vggish"]);
    assert_eq!(files::read_stats(&path, Some("vggish")).unwrap(), stats(2.0));
    assert_eq!(files::read_reference(&path, Some("clap-2023")).unwrap().mean(), [3.0]);
    let bad = files::read_reference(&fixture("files/not_positive.npz"), None).unwrap_err().to_string();
    assert!(bad.contains("not_positive.npz") && bad.contains("not positive"), "{bad}");

    let rows = Rows::new(2, 2, vec![0.1, 1e-3, 300.7, -2.0]).unwrap();
    for (precision, error) in
        [(files::Precision::F16, 1e-3), (files::Precision::F32, 1e-7), (files::Precision::F64, 0.0)]
    {
        for name in ["rows.npy", "rows.npz", "rows.safetensors"] {
            let path = folder.path().join(name);
            files::write_embeddings_as(&path, "embeddings", &rows, precision).unwrap();
            let read = files::read_embeddings(&path, None).unwrap();
            for (got, want) in read.data().iter().zip(rows.data()) {
                assert!((got / want - 1.0).abs() <= error, "{name}, {precision:?}: {got} {want}");
            }
        }
    }
    let large = Rows::new(2, 1, vec![0.0, 7e4]).unwrap();
    let path = folder.path().join("large.npy");
    let message =
        files::write_embeddings_as(&path, "", &large, files::Precision::F16).unwrap_err().to_string();
    assert!(message.contains("row 1, column 0 is 70000, too large for F16") && !path.exists(), "{message}");
}
