//! Against what other tools print for the same embeddings; see `fixtures/dragon-metrics/{conventions,sets,regression}`.

use std::path::{Path, PathBuf};

use dragon_metrics::*;
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/dragon-metrics").join(name)
}

fn read(file: &str, key: &str) -> Rows {
    files::read_embeddings(&fixture(file), Some(key)).unwrap()
}

fn assert_close(got: f64, want: f64, tolerance: f64, what: &str) {
    let off = (got - want).abs();
    assert!(off <= tolerance, "{what}: got {got:e}, want {want:e}, off by {off:e} > {tolerance:e}");
}

const CONVENTIONS: &str = "conventions/case.safetensors";

/// The reference (in the three files fadtk saw) and the songs.
fn convention_case(case: &str) -> (Rows, Vec<Rows>, Vec<Rows>) {
    let reference = read(CONVENTIONS, &format!("{case}.reference"));
    let part = |range: std::ops::Range<usize>| reference.select(&range.collect::<Vec<_>>()).unwrap();
    let files = vec![part(0..150), part(150..340), part(340..400)];
    let all = read(CONVENTIONS, &format!("{case}.songs"));
    let mut start = 0;
    let songs = read(CONVENTIONS, &format!("{case}.lengths"))
        .row(0)
        .iter()
        .map(|n| {
            let range = start..start + *n as usize;
            start = range.end;
            all.select(&range.collect::<Vec<_>>()).unwrap()
        })
        .collect();
    (reference, files, songs)
}

#[test]
fn fadtk_mode_prints_what_fadtk_prints() {
    for case in ["clap_like", "vggish_like"] {
        let (_, files, songs) = convention_case(case);
        let mode = Convention::Fadtk11;
        let stats = mode.stats_of_files(&files.iter().collect::<Vec<_>>()).unwrap();
        let reference = FrechetReference::new(&stats).unwrap();
        let want = read(CONVENTIONS, &format!("{case}.fadtk_songs"));
        let mut rounding = 0.0f64;
        for (i, song) in songs.iter().enumerate() {
            let (got, want) = (mode.distance(&reference, song).unwrap(), want.row(0)[i]);
            assert_close(got, want, 1e-6 * want, &format!("{case}, song {i}"));
            rounding = rounding.max((reference.distance(song).unwrap() / want - 1.0).abs());
        }
        assert!(rounding > 1e-6, "the exact mode differs from what fadtk prints: {rounding:e}");
        let folder = mode.stats_of_files(&songs.iter().collect::<Vec<_>>()).unwrap();
        let want = read(CONVENTIONS, &format!("{case}.fadtk_folder")).row(0)[0];
        assert_close(
            reference.distance_to_stats(&folder).unwrap(),
            want,
            1e-6 * want,
            &format!("{case}, folder"),
        );

        let options = FadInfOptions { min_rows: 60, steps: 8, seed: 7, convention: mode };
        let all = Rows::concat(&songs.iter().collect::<Vec<_>>()).unwrap();
        let got = fad_inf(&reference, &all, options).unwrap();
        let points = read(CONVENTIONS, &format!("{case}.fad_inf_points"));
        assert_eq!(got.points.len(), points.n());
        for (got, want) in got.points.iter().zip(points.iter()) {
            assert_eq!(got.0 as f64, want[0], "{case}: rows of a set");
            assert_close(got.1, want[1], 1e-6 * want[1], &format!("{case}, FAD-infinity at {} rows", got.0));
        }
        let line = read(CONVENTIONS, &format!("{case}.fad_inf"));
        for (got, want) in [got.score, got.slope, got.r2].into_iter().zip(line.row(0)) {
            assert_close(got, *want, 2e-6 * want.abs(), &format!("{case}, FAD-infinity's line"));
        }
    }
}

#[test]
fn gudgud_mode_prints_what_frechet_audio_distance_prints() {
    for case in ["clap_like", "vggish_like"] {
        let (reference, _, songs) = convention_case(case);
        let mode = Convention::Gudgud;
        let reference = FrechetReference::new(&mode.stats(&reference).unwrap()).unwrap();
        let all = Rows::concat(&songs.iter().collect::<Vec<_>>()).unwrap();
        let want = read(CONVENTIONS, &format!("{case}.gudgud_set")).row(0)[0];
        assert_close(mode.distance(&reference, &all).unwrap(), want, 1e-6 * want, case);
    }
}

#[test]
fn conventions_state_their_limits() {
    let large = Rows::new(2, 1, vec![1.0, 1e5]).unwrap();
    let message = Convention::Fadtk11.stats(&large).unwrap_err().to_string();
    assert_eq!(message, "rounded as fadtk-1.1: embeddings: row 1, column 0 is inf, expected a finite number");
    assert!(Convention::Gudgud.stats(&large).is_ok() && Convention::Exact.stats_of_files(&[]).is_err());
    let one = Rows::new(1, 1, vec![2.0]).unwrap();
    let merged =
        Convention::Fadtk11.stats_of_files(&[&one, &one, &Rows::new(1, 1, vec![5.0]).unwrap()]).unwrap();
    assert_eq!((merged.mean(), merged.cov()), (&[3.0][..], &[3.0][..]), "files of one row");
    let other = Rows::new(1, 2, vec![2.0; 2]).unwrap();
    let message = Convention::Exact.stats_of_files(&[&one, &other]).unwrap_err().to_string();
    assert!(
        message.starts_with("file 1: ") && message.contains("expected dimension 1, found 2"),
        "{message}"
    );
    for mode in Convention::ALL {
        assert_eq!(serde_json::to_value(mode).unwrap(), mode.name());
    }
    let rows = read(CONVENTIONS, "clap_like.songs");
    let reference = FrechetReference::from_rows(&rows).unwrap();
    for options in [
        FadInfOptions { steps: 1, ..Default::default() },
        FadInfOptions { min_rows: rows.n(), ..Default::default() },
        FadInfOptions { min_rows: 1, ..Default::default() },
    ] {
        assert!(fad_inf(&reference, &rows, options).is_err());
    }
    let few = fad_inf(&reference, &rows, FadInfOptions { steps: 3, ..Default::default() }).unwrap();
    assert_eq!(
        few.points.iter().map(|p| p.0).collect::<Vec<_>>(),
        [500, 333, 167],
        "sizes fall, as in fadtk"
    );
}

const SETS: &str = "sets/case.safetensors";
const PAIRS: [&str; 4] = ["apart", "alike", "far_from_zero", "duplicates"];
const KERNELS: [Kernel; 3] = [Kernel::Gaussian, Kernel::InverseQuadratic, Kernel::InverseMultiquadric];

#[test]
fn kad_meets_f64_arithmetic_and_kadtk_within_its_f32() {
    for case in PAIRS {
        let (x, y) = (read(SETS, &format!("{case}.reference")), read(SETS, &format!("{case}.generated")));
        let values = |name: &str| read(SETS, &format!("{case}.{name}")).row(0).to_vec();
        let medians = values("medians");
        assert_close(median_distance(&x).unwrap(), medians[0], 1e-12 * medians[0], case);
        assert_close(median_distance(&y).unwrap(), medians[1], 1e-12 * medians[1], case);
        for (k, kernel) in KERNELS.into_iter().enumerate() {
            let reference = KadReference::new(&x, kernel).unwrap();
            let got = reference.kad(&y).unwrap();
            assert_close(got, values("kad_reference")[k], 1e-10, &format!("{case}, {kernel:?}"));
            assert_close(got, 100.0 * reference.mmd(&y).unwrap(), 1e-15 * got.abs(), "scale");
            let got = kad_as_kadtk(&x, &y, kernel).unwrap();
            assert_close(got, values("kad_evaluated")[k], 1e-10, &format!("{case}, {kernel:?}, as kadtk"));
            // Their |a|² + |b|² - 2ab in f32 loses 50² against distances of 1.
            let f32_noise = if case == "far_from_zero" { 4e-4 } else { 2e-5 };
            assert_close(got, values("kadtk")[k], f32_noise, &format!("{case}, {kernel:?}, kadtk"));
        }
    }
}

#[test]
fn precision_recall_density_and_coverage_meet_prdc() {
    for case in &PAIRS[..3] {
        let (x, y) = (read(SETS, &format!("{case}.reference")), read(SETS, &format!("{case}.generated")));
        for k in [1, 3, 5] {
            let got = prdc(&x, &y, k).unwrap();
            let got = [got.precision, got.recall, got.density, got.coverage];
            for (got, want) in got.into_iter().zip(read(SETS, &format!("{case}.prdc_{k}")).row(0)) {
                assert_close(got, *want, 1e-12, &format!("{case}, k = {k}"));
            }
        }
    }
}

#[test]
fn vendi_scores_with_weights_and_in_batches_meet_vendi_score() {
    for case in PAIRS {
        let rows = read(SETS, &format!("{case}.generated"));
        let weights = read(SETS, &format!("{case}.weights")).row(0).to_vec();
        let unit = rows.normalized("rows").unwrap();
        let kernel: Vec<f64> = unit
            .iter()
            .flat_map(|a| {
                unit.iter().map(|b| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>()).collect::<Vec<_>>()
            })
            .collect();
        let mut batches = VendiBatches::new(rows.dim());
        for start in (0..rows.n()).step_by(7) {
            let batch: Vec<usize> = (start..rows.n().min(start + 7)).collect();
            batches.push(&rows.select(&batch).unwrap()).unwrap();
        }
        assert_eq!(batches.n(), rows.n());
        let (plain, weighted) =
            (read(SETS, &format!("{case}.vendi")), read(SETS, &format!("{case}.vendi_weighted")));
        for (i, q) in [1.0, 2.0, 3.5, f64::INFINITY].into_iter().enumerate() {
            let (plain, weighted) = (plain.row(0)[i], weighted.row(0)[i]);
            let what = format!("{case}, order {q}");
            assert_close(vendi_order(&rows, q).unwrap(), plain, 1e-9 * plain, &what);
            assert_close(batches.score(q).unwrap(), plain, 1e-9 * plain, &format!("{what}, batches"));
            assert_close(vendi_weighted(&rows, &weights, q).unwrap(), weighted, 1e-9 * weighted, &what);
            let by_kernel = vendi_of_kernel(&kernel, rows.n(), Some(&weights), q).unwrap();
            assert_close(by_kernel, weighted, 1e-9 * weighted, &format!("{what}, kernel"));
            let by_kernel = vendi_of_kernel(&kernel, rows.n(), None, q).unwrap();
            assert_close(by_kernel, plain, 1e-9 * plain, &format!("{what}, kernel"));
        }
    }
}

fn list(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn counts(v: &Value) -> Vec<usize> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as usize).collect()
}

fn regression_case() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture("regression/case.json")).unwrap()).unwrap()
}

#[test]
fn kernel_regression_meets_scikit_learn() {
    let case = regression_case();
    let rows = |key: &str| {
        let data = list(&case[key]);
        Rows::new(data.len() / 6, 6, data).unwrap()
    };
    let (x, new, y) = (rows("x"), rows("new"), list(&case["y"]));
    let check = |method: Method, want: &Value, tolerance: f64| {
        let fitted = KernelRegression::fit(&x, &y, method).unwrap();
        let got = fitted.predict(&new).unwrap();
        for (got, want) in got.iter().zip(list(want)) {
            assert_close(*got, want, tolerance, &format!("{method:?}"));
        }
        assert_close(fitted.rate(&new).unwrap(), got.iter().sum::<f64>() / 7.0, 1e-14, "rate then average");
    };
    for ridge in case["ridge"].as_array().unwrap() {
        let similarity = match ridge["kernel"].as_str().unwrap() {
            "linear" => Similarity::Linear,
            _ => Similarity::Rbf { bandwidth: ridge["bandwidth"].as_f64().unwrap() },
        };
        let lambda = ridge["lambda"].as_f64().unwrap();
        // The condition of K + lambda I is about 40 / lambda.
        let tolerance = 1e-10 / lambda.min(1.0).sqrt();
        check(Method::KernelRidge { similarity, lambda }, &ridge["predicted"], tolerance);
    }
    for case in case["nadaraya_watson"].as_array().unwrap() {
        let similarity = Similarity::Rbf { bandwidth: case["bandwidth"].as_f64().unwrap() };
        check(Method::NadarayaWatson { similarity }, &case["predicted"], 1e-12);
    }
}

#[test]
fn binomial_regression_clustered_by_rater_meets_statsmodels() {
    for case in regression_case()["glm"].as_array().unwrap() {
        let p = case["p"].as_u64().unwrap() as usize;
        let design = list(&case["design"]);
        let design = Rows::new(design.len() / p, p, design).unwrap();
        let (wins, trials, raters) =
            (counts(&case["wins"]), counts(&case["trials"]), counts(&case["raters"]));
        let fit = BinomialGlm::fit(&design, &wins, &trials, &raters).unwrap();
        for (j, got) in fit.coefficients.iter().enumerate() {
            let want = |key: &str| list(&case[key])[j];
            for (got, key) in [
                (got.estimate, "estimate"),
                (got.std_error, "std_error"),
                (got.std_error_independent, "std_error_independent"),
                (got.z, "z"),
                (got.p_value, "p_value"),
            ] {
                assert_close(got, want(key), 1e-8 * want(key).abs(), &format!("{p} columns, {key} of {j}"));
            }
            let interval = list(&case["interval_95"][j]);
            assert_close(got.interval_95.0, interval[0], 1e-8, "lower");
            assert_close(got.interval_95.1, interval[1], 1e-8, "upper");
            assert_close(fit.cov[j * p + j].sqrt(), got.std_error, 1e-12, "diagonal of the covariance");
        }
        for (got, key) in [(fit.log_likelihood, "log_likelihood"), (fit.deviance, "deviance")] {
            let want = case[key].as_f64().unwrap();
            assert_close(got, want, 1e-9 * want.abs(), key);
        }
        if p == 1 {
            assert_eq!(win_log_odds(&wins, &trials, &raters).unwrap(), fit);
        }
    }
}
