//! `dragon stats` and `dragon score` from the outside: their numbers are the library's, nothing depends on the order of
//! files, bad input is named, the cache is used and stays where it belongs.

mod common;

use std::path::Path;

use common::*;
use dragon_metrics::bootstrap::SplitMix64;
use dragon_metrics::files::{read_embeddings, read_stats, write_embeddings, write_stats};
use dragon_metrics::{
    Convention, FrechetReference, GaussianStats, KadReference, Kernel, Rows, per_song_fad, prdc, vendi,
    vendi_order,
};
use serde_json::Value;

/// `n` rows of dimension 4 around `(shift, 0, 0, 0)`.
fn rows(seed: u64, n: usize, shift: f64) -> Rows {
    let mut rng = SplitMix64(seed);
    let mut unit = || rng.next() as f64 / u64::MAX as f64 - 0.5;
    let data = (0..4 * n).map(|i| unit() + if i % 4 == 0 { shift } else { 0.0 }).collect();
    Rows::new(n, 4, data).unwrap()
}

/// Writes rows as `dir/name`.
fn write(dir: &Path, name: &str, rows: &Rows) {
    write_embeddings(&dir.join(name), "embeddings", rows).unwrap();
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The entry of a metric and a system.
fn entry<'a>(report: &'a Value, metric: &str, system: &str) -> &'a Value {
    let all = report["values"].as_array().unwrap();
    let found = all.iter().find(|v| v["metric"] == metric && v["system"] == system);
    found.unwrap_or_else(|| panic!("no {metric} of {system} in {report:#}"))
}

fn value(report: &Value, metric: &str, system: &str) -> f64 {
    entry(report, metric, system)["value"].as_f64().unwrap()
}

fn close(got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-12 * want.abs().max(1e-3), "{got}, expected {want}");
}

/// Three tones of several windows in `dir/name`.
fn tones(dir: &Path, name: &str, seconds: f64) {
    for (i, file) in ["a.wav", "b.wav", "deep/c.wav"].iter().enumerate() {
        write_tone(&dir.join(name).join(file), seconds + 0.2 * i as f64, 0.1 + 0.2 * i as f32);
    }
}

#[test]
fn systems_are_ranked_by_the_library_s_own_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (reference, near, far) = (rows(1, 60, 0.0), rows(2, 40, 0.1), rows(3, 40, 1.0));
    for (name, rows) in [("ref.npy", &reference), ("near.npz", &near), ("far.safetensors", &far)] {
        write(dir, name, rows);
    }
    let command = "score --reference ref.npy far.safetensors near.npz --out out --metric fad,kad,prdc,vendi,fad-inf \
                   --set fad_inf.min_rows=10 --set subsets=200";
    let printed = accepted(dir, command);
    let report = json(&dir.join("out/report.json"));
    let gaussian = FrechetReference::from_rows(&reference).unwrap();
    let kad = KadReference::new(&reference, Kernel::Gaussian).unwrap();
    for (name, rows) in [("near.npz", &near), ("far.safetensors", &far)] {
        close(value(&report, "FAD", name), gaussian.distance(rows).unwrap());
        close(value(&report, "KAD", name), kad.kad(rows).unwrap());
        let shares = prdc(&reference, rows, 5).unwrap();
        close(value(&report, "precision", name), shares.precision);
        close(value(&report, "recall", name), shares.recall);
        close(value(&report, "density", name), shares.density);
        close(value(&report, "coverage", name), shares.coverage);
        close(value(&report, "Vendi", name), vendi(rows).unwrap());
        for metric in ["FAD", "KAD", "coverage", "Vendi"] {
            let entry = entry(&report, metric, name);
            let (low, high) = (&entry["interval"]["low"], &entry["interval"]["high"]);
            let (low, high, value) =
                (low.as_f64().unwrap(), high.as_f64().unwrap(), entry["value"].as_f64().unwrap());
            assert!(low <= value && value <= high && low < high, "{metric} of {name}: {low} {value} {high}");
        }
    }
    assert_eq!(entry(&report, "FAD", "near.npz")["rank"], 1);
    assert_eq!(entry(&report, "FAD", "far.safetensors")["rank"], 2);
    let behind = &entry(&report, "FAD", "far.safetensors")["behind"];
    assert!(behind["interval"]["low"].as_f64().unwrap() > 0.0, "a unit apart is no accident: {behind}");
    assert!(entry(&report, "FAD-infinity", "near.npz")["line"]["r2"].is_number());
    let place = |name: &str| printed.find(name).unwrap();
    assert!(place("near.npz") < place("far.safetensors"), "{printed}");
    let csv = std::fs::read_to_string(dir.join("out/systems.csv")).unwrap();
    let first = csv.lines().nth(1).unwrap();
    assert!(first.starts_with("FAD,lower,1,near.npz,40,40,0."), "{csv}");

    // The same as other tools round, and on stdout.
    let output = dragon(dir, &format!("{command} --convention fadtk-1.1 --json"));
    let rounded: Value = serde_json::from_slice(&output.stdout).unwrap();
    let tool = Convention::Fadtk11;
    let stats = FrechetReference::new(&tool.stats(&reference).unwrap()).unwrap();
    close(value(&rounded, "FAD", "near.npz"), tool.distance(&stats, &near).unwrap());
    assert_ne!(value(&rounded, "FAD", "near.npz"), value(&report, "FAD", "near.npz"));

    let of_order =
        |q: &str| format!("score near.npz --out order --metric vendi --set subsets=20 --set vendi_order={q}");
    for (q, name) in [("2", "Vendi of order 2"), ("inf", "Vendi of order inf")] {
        accepted(dir, &of_order(q));
        let report = json(&dir.join("order/report.json"));
        close(value(&report, name, "near.npz"), vendi_order(&near, q.parse().unwrap()).unwrap());
    }
    refused(dir, &of_order("-1"), &["`vendi_order`: expected a number of at least 0, or inf, found -1"]);
}

#[test]
fn neither_the_order_of_files_nor_of_systems_changes_a_bit() {
    let [one, other] = [1, 2].map(|_| tempfile::tempdir().unwrap());
    let names = ["x.wav", "x.mp3", "y.wav", "z.wav"];
    for (dir, reversed) in [(one.path(), false), (other.path(), true)] {
        let mut order: Vec<usize> = (0..names.len()).collect();
        if reversed {
            order.reverse();
        }
        for system in ["s", "t"] {
            for &i in &order {
                let path = dir.join(system).join(names[i]);
                if names[i].ends_with("mp3") {
                    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                    std::fs::copy(fixture("dragon-audio/formats/tone.mp3"), path).unwrap();
                } else {
                    let seconds = if system == "s" { 3.3 } else { 3.6 };
                    write_tone(&path, seconds, 0.1 + 0.2 * i as f32);
                }
            }
        }
        let systems = if reversed { "t s" } else { "s t" };
        accepted(dir, &format!("score --reference s {systems} --out out --set subsets=50"));
    }
    for file in ["report.json", "systems.csv", "songs.csv"] {
        let read = |dir: &Path| std::fs::read_to_string(dir.join("out").join(file)).unwrap();
        assert_eq!(read(one.path()), read(other.path()), "{file}");
    }
    let songs = std::fs::read_to_string(one.path().join("out/songs.csv")).unwrap();
    assert!(songs.contains("s,x.mp3,") && songs.contains("s,x.wav,"), "two songs of one name: {songs}");
    let report = json(&one.path().join("out/report.json"));
    let own = value(&report, "FAD", "s");
    assert!(own.abs() < 1e-9, "a set has no distance to itself: {own}");
}

#[test]
fn a_folder_its_embeddings_and_its_statistics_say_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    tones(dir, "songs", 3.4);
    tones(dir, "others", 4.5);
    accepted(dir, "embed songs -o songs.npz");
    accepted(dir, "embed others -o others.npy");
    let printed = accepted(dir, "stats others -o ref.npz");
    assert!(
        printed.contains("ref.npz: statistics `others` of") && printed.contains("of 3 songs"),
        "{printed}"
    );
    accepted(dir, "stats others.npy -o ref2.safetensors --name others");
    let (a, b) = (
        read_stats(&dir.join("ref.npz"), Some("others")).unwrap(),
        read_stats(&dir.join("ref2.safetensors"), None).unwrap(),
    );
    let embeddings = read_embeddings(&dir.join("others.npy"), None).unwrap();
    let whole = GaussianStats::fit(&embeddings).unwrap();
    for (x, y) in [(&a, &whole), (&b, &whole)] {
        assert_eq!(x.n(), y.n());
        let scale = y.trace();
        assert!(x.cov().iter().zip(y.cov()).all(|(x, y)| (x - y).abs() < 1e-12 * scale));
    }
    let metrics = "--metric fad,per-song-fad,vendi --set subsets=20";
    accepted(dir, &format!("score --reference others songs {metrics} --out folder --per-song"));
    accepted(dir, &format!("score --reference others.npy songs.npz {metrics} --out file"));
    accepted(dir, &format!("score --reference ref.npz songs {metrics} --out stats"));
    let [folder, file, stats] =
        ["folder", "file", "stats"].map(|out| json(&dir.join(out).join("report.json")));
    let songs = |report: &Value| report["systems"][0]["songs"].clone();
    assert_eq!(songs(&folder), songs(&file), "names and scores of the songs");
    assert_eq!(songs(&folder)[2]["name"], "deep/c.wav");
    for metric in ["FAD", "per-song FAD", "Vendi"] {
        let own = value(&folder, metric, "songs");
        assert_eq!(own, value(&file, metric, "songs.npz"), "{metric}");
        let known = value(&stats, metric, "songs");
        assert!((own - known).abs() < 1e-6 * own, "{metric}: {own} and {known}");
    }
    // The mean of the songs' distances, as the library has them.
    let all = read_embeddings(&dir.join("songs.npz"), None).unwrap();
    let counts: Vec<usize> =
        songs(&folder).as_array().unwrap().iter().map(|s| s["n_rows"].as_u64().unwrap() as usize).collect();
    let mut first = 0;
    let parts: Vec<Rows> = counts
        .iter()
        .map(|n| {
            first += n;
            all.select(&(first - n..first).collect::<Vec<_>>()).unwrap()
        })
        .collect();
    let gaussian = FrechetReference::from_rows(&embeddings).unwrap();
    let scores = per_song_fad(&gaussian, &parts.iter().collect::<Vec<_>>()).unwrap();
    close(value(&folder, "per-song FAD", "songs"), scores.iter().sum::<f64>() / 3.0);
}

#[test]
fn the_report_shows_outliers_with_players_and_a_map() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    tones(dir, "songs", 3.4);
    tones(dir, "others", 4.5);
    let printed = accepted(
        dir,
        "score --reference others songs --out out --set subsets=20 --per-song --set outliers=2",
    );
    let worst = json(&dir.join("out/report.json"))["systems"][0]["songs"].clone();
    let worst =
        worst.as_array().unwrap().iter().max_by(|a, b| {
            a["per_song_fad"].as_f64().unwrap().total_cmp(&b["per_song_fad"].as_f64().unwrap())
        });
    let worst = worst.unwrap()["name"].as_str().unwrap().to_owned();
    let listed: Vec<&str> = printed.lines().filter(|line| line.contains(".wav")).collect();
    assert!(listed.len() == 3 && listed[0].starts_with(&worst), "{printed}");
    let page = std::fs::read_to_string(dir.join("out/report.html")).unwrap();
    assert_eq!(page.matches("<audio").count(), 3, "two outliers and the best");
    assert!(page.contains(&format!("<b>{worst}</b> <span>no. 1: ")), "the worst song comes first");
    for part in
        ["Map of the songs", "<circle", "<title>deep/c.wav</title>", "per-song FAD of the songs", "Outliers"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("http"), "the page asks for something from outside");
}

#[test]
fn texts_are_references_and_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    tones(dir, "songs", 5.2);
    std::fs::write(dir.join("texts.txt"), "a slow harp\na fast jig on a violin\ndrums and bass\n").unwrap();
    let prompts = |captions: [&str; 3]| {
        let line = |(id, caption): (&str, &str)| {
            format!("{{\"id\":\"{id}\",\"caption\":\"{caption}\",\"split\":\"test\"}}\n")
        };
        let text: String = ["a", "b", "c"].into_iter().zip(captions).map(line).collect();
        std::fs::write(dir.join("prompts.jsonl"), text).unwrap();
    };
    let command = "score --reference texts.txt songs --encoder clap --setting ma --prompts prompts.jsonl --set subsets=20";
    prompts(["a slow harp", "drums and bass", "a fast jig"]);
    let printed = accepted(dir, &format!("{command} --out one"));
    prompts(["drums and bass", "a fast jig", "a slow harp"]);
    accepted(dir, &format!("{command} --out other --metric clap-score"));
    let [one, other] = ["one", "other"].map(|out| json(&dir.join(out).join("report.json")));
    let (x, y) = (value(&one, "CLAP score", "songs"), value(&other, "CLAP score", "songs"));
    assert!((0.0..=1.0).contains(&x) && (0.0..=1.0).contains(&y) && x != y, "{x} and {y}\n{printed}");
    assert!(value(&one, "FAD", "songs") > 0.0 && one["reference"]["unit"] == "texts", "{one:#}");
    accepted(dir, "stats texts.txt -o texts.npz --encoder clap");
    accepted(dir, "score --reference texts.npz songs --encoder clap --setting ma --out stats --metric fad");
    let stats = value(&json(&dir.join("stats/report.json")), "FAD", "songs");
    assert!((stats - value(&one, "FAD", "songs")).abs() < 1e-6 * stats.abs(), "{stats}");
    for (args, parts) in [
        ("--encoder musicnn", ["texts.txt", "holds texts"]),
        ("--encoder clap --setting ma --prompts gone.jsonl", ["gone.jsonl", "cannot read"]),
    ] {
        refused(dir, &format!("score --reference texts.txt songs {args} --out out"), &parts);
    }
    std::fs::write(dir.join("prompts.jsonl"), "{\"id\":\"a\",\"caption\":\"harp\",\"split\":\"test\"}\n")
        .unwrap();
    refused(dir, command, &["songs/b.wav", "no prompt has the id `b`"]);
}

#[test]
fn bad_files_are_skipped_if_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    tones(dir, "songs", 3.4);
    accepted(dir, "score --reference songs songs --out clean --set subsets=20");
    std::fs::write(dir.join("songs/notes.wav"), "la la la\n").unwrap();
    write_tone(&dir.join("songs/silent.wav"), 3.4, 0.0);
    refused(dir, "score --reference songs songs --out out", &["notes.wav", "is mislabelled"]);
    std::fs::remove_file(dir.join("songs/notes.wav")).unwrap();
    refused(dir, "stats songs -o x.npz", &["silent.wav", "is silent"]);
    std::fs::write(dir.join("songs/notes.wav"), "la la la\n").unwrap();
    let printed = accepted(dir, "score --reference songs songs --out out --set subsets=20 --skip-bad");
    for part in ["left out: songs/notes.wav: ", "left out: songs/silent.wav: "] {
        assert!(printed.contains(part), "{printed}");
    }
    let [clean, out] = ["clean", "out"].map(|out| json(&dir.join(out).join("report.json")));
    assert_eq!(clean["values"], out["values"]);
    assert!(out["skipped"].as_array().unwrap().iter().all(|s| s["reason"].as_str().unwrap().len() > 10));
    let page = std::fs::read_to_string(dir.join("out/report.html")).unwrap();
    assert!(page.contains("<h2>Left out</h2>") && page.contains("silent.wav"));
    let printed = accepted(dir, "stats songs -o x.npz --skip-bad");
    assert!(printed.contains("of 3 songs") && printed.contains("2 files left out"), "{printed}");
    for file in ["a.wav", "b.wav", "deep/c.wav"] {
        std::fs::remove_file(dir.join("songs").join(file)).unwrap();
    }
    refused(dir, "stats songs -o y.npz --skip-bad", &["`songs`", "expected at least 2 songs, found 1"]);
}

#[test]
fn input_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (name, rows) in
        [("ref.npy", rows(1, 30, 0.0)), ("good.npy", rows(2, 30, 0.0)), ("one.npy", rows(3, 1, 0.0))]
    {
        write(dir, name, &rows);
    }
    write(dir, "wide.npy", &Rows::new(3, 5, (0..15).map(f64::from).collect()).unwrap());
    write(dir, "none.npy", &Rows::new(0, 4, Vec::new()).unwrap());
    write(dir, "zeros.npy", &Rows::new(3, 4, [vec![1.0; 4], vec![0.0; 4], vec![2.0; 4]].concat()).unwrap());
    write(dir, "indexed.npy", &rows(4, 6, 0.0));
    std::fs::write(dir.join("indexed.npy.songs.tsv"), "first_row\trows\tfile\n0\t3\ta.wav\n3\t9\tb.wav\n")
        .unwrap();
    write_stats(&dir.join("ref.npz"), "r", &GaussianStats::fit(&rows(1, 30, 0.0)).unwrap()).unwrap();
    for name in ["nan_in_row_2.npy", "not_symmetric.npz", "not_positive.npz", "cube.npy"] {
        std::fs::copy(fixture("dragon-metrics/files").join(name), dir.join(name)).unwrap();
    }
    std::fs::write(dir.join("broken.npz"), "no archive").unwrap();
    std::fs::write(dir.join("texts.txt"), "a harp\n\na drum\n").unwrap();
    std::fs::create_dir(dir.join("empty")).unwrap();
    write_tone(&dir.join("both/a.wav"), 3.4, 0.3);
    write_embeddings(&dir.join("both/a.npy"), "", &rows(5, 3, 0.0)).unwrap();
    write_tone(&dir.join("text/a.wav"), 3.4, 0.3);
    std::fs::write(dir.join("text/notes.wav"), "la la la").unwrap();
    write_tone(&dir.join("single/a.wav"), 3.4, 0.3);
    tones(dir, "songs", 3.4);
    for (args, parts) in [
        ("--reference ref.npy nan_in_row_2.npy", &["nan_in_row_2.npy", "row 2"][..]),
        ("--reference nan_in_row_2.npy good.npy", &["nan_in_row_2.npy", "row 2"]),
        ("--reference ref.npy good.npy --name r", &["ref.npy", "holds no statistics", "`r`"]),
        ("--reference ref.npz good.npy --name s", &["ref.npz", "`s", "it has: r"]),
        ("--reference songs one.npy", &["one.npy", "expected at least 2 embeddings, found 1"]),
        ("--reference ref.npy both", &["`both`", "holds audio and embeddings"]),
        ("--reference ref.npy text", &["text/notes.wav", "mislabelled: expected WAV, found text"]),
        ("--reference ref.npy one.npy", &["one.npy", "expected at least 2 embeddings, found 1"]),
        ("--reference one.npy good.npy", &["one.npy", "expected at least 2 rows, found 1"]),
        ("--reference single songs", &["`single`", "expected at least 2 songs, found 1"]),
        ("--reference ref.npy none.npy", &["none.npy", "it holds none"]),
        ("--reference ref.npy wide.npy", &["wide.npy", "dimension 5: expected 4, as those of `ref.npy`"]),
        (
            "--reference ref.npz good.npy wide.npy",
            &["wide.npy", "dimension 5: expected 4, as those of `ref.npz`"],
        ),
        ("--reference songs good.npy", &["good.npy", "dimension 4: expected 200, as those of `songs`"]),
        ("--reference ref.npy empty", &["`empty`", "holds no audio"]),
        ("--reference texts.txt good.npy --encoder clap", &["texts.txt", "line 2: expected words"]),
        ("--reference not_symmetric.npz good.npy", &["not_symmetric.npz", "not symmetric"]),
        ("--reference not_positive.npz good.npy", &["not_positive.npz", "not positive"]),
        ("--reference broken.npz good.npy", &["broken.npz", "not a .npz"]),
        ("--reference ref.npy cube.npy", &["cube.npy", "expected [N, D]"]),
        ("--reference ref.npy indexed.npy", &["indexed.npy.songs.tsv", "line 3"]),
        ("--reference ref.npy gone", &["`gone`"]),
        ("--reference ref.npy good.npy good.npy", &["good.npy", "named twice"]),
        ("--reference ref.npy ref.npz", &["ref.npz", "expected songs to score"]),
        ("--reference ref.npz good.npy --metric kad", &["`kad`", "holds statistics only"]),
        (
            "--reference ref.npz good.npy --metric per-song-fad",
            &["`per-song-fad`", "`row 0` of `good.npy` has 1"],
        ),
        ("--reference ref.npy good.npy --metric prdc --set neighbours=30", &["`prdc`", "31", "has 30"]),
        ("good.npy --metric fad", &["`fad`", "--reference"]),
        ("good.npy --metric clap-score", &["`clap-score`", "--prompts"]),
        ("zeros.npy", &["zeros.npy", "`row 1`", "all zeros"]),
        ("good.npy --set subsets=1", &["`subsets`", "at least 2, found 1"]),
        ("good.npy --set metrics=[]", &["`metrics`", "at least one metric"]),
    ] {
        refused(dir, &format!("score {args} --out out"), parts);
    }
    for (args, parts) in [
        ("texts.txt --encoder clap", &["texts.txt", "line 2"][..]),
        ("one.npy", &["one.npy", "expected at least 2 rows, found 1"]),
        ("single", &["`single`", "expected at least 2 songs, found 1"]),
        ("ref.npz", &["ref.npz", "holds statistics already"]),
        ("nan_in_row_2.npy", &["nan_in_row_2.npy", "row 2"]),
        ("empty", &["`empty`", "holds no audio"]),
    ] {
        refused(dir, &format!("stats {args} -o out.npz"), parts);
    }
    let output = dragon(dir, "score --reference ref.npy good.npy --metric fda");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("expected one of fad, per-song-fad"), "{}", stderr(&output));
}

#[test]
fn embeddings_are_kept_in_the_user_s_cache_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    tones(dir, "songs", 3.4);
    tones(dir, "others", 4.5);
    let songs = files(&dir.join("songs"));
    let run = |more: &str| {
        let args = format!("score --reference others songs --metric fad --set subsets=2 --out out {more}");
        let output = command(dir)
            .args(args.split_whitespace())
            .env("XDG_CACHE_HOME", dir.join("cache"))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        std::fs::read_to_string(dir.join("out/report.json")).unwrap()
    };
    let kept = || -> Vec<std::path::PathBuf> {
        let all = files(&dir.join("cache/dragon/embeddings")).into_iter().map(|(path, _)| path);
        all.filter(|path| path.is_file()).collect()
    };
    let uncached = run("--no-cache");
    assert!(!dir.join("cache").exists());
    assert_eq!(run(""), uncached);
    assert_eq!(kept().len(), 6);
    assert!(kept().iter().all(|path| path.extension().unwrap() == "npz"), "nothing unfinished: {:?}", kept());
    assert_eq!(run(""), uncached);
    assert_eq!(files(&dir.join("songs")), songs, "nothing beside the audio");
    // Contents count, names do not; another setting is another entry.
    std::fs::rename(dir.join("songs/a.wav"), dir.join("songs/a2.wav")).unwrap();
    run("");
    assert_eq!(kept().len(), 6);
    run("--hop 0.128");
    assert_eq!(kept().len(), 12);
    std::fs::rename(dir.join("songs/a2.wav"), dir.join("songs/a.wav")).unwrap();
    // Entries are really read: others give other numbers, damaged ones are made anew.
    let whole: Vec<(std::path::PathBuf, Vec<u8>)> =
        kept().into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
    for (path, _) in &whole {
        let rows = read_embeddings(path, None).unwrap();
        let moved = rows.data().iter().map(|x| 1.5 * x).collect();
        write_embeddings(path, "embeddings", &Rows::new(rows.n(), rows.dim(), moved).unwrap()).unwrap();
    }
    assert_ne!(run(""), uncached);
    assert_eq!(run("--no-cache"), uncached);
    for (path, bytes) in &whole {
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }
    assert_eq!(run(""), uncached);
}

#[test]
fn a_model_answers_prompts_and_is_scored_like_its_songs() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let prompt = |i: usize| format!("{{\"id\":\"p{i}\",\"caption\":\"a harp, {i}\",\"split\":\"test\"}}\n");
    std::fs::write(dir.join("prompts.jsonl"), (0..4).map(prompt).collect::<String>()).unwrap();
    let measured = "--encoder clap --setting ma --prompts prompts.jsonl --set subsets=20 --no-cache";
    let reference = "--reference builtin:tiny/stats/clap-recordings.npz";
    let command = format!("score builtin:tiny {reference} {measured} --songs 2 --out out");
    accepted(dir, &command);
    let report = json(&dir.join("out/report.json"));
    let songs = dir.join("out/songs/tiny");
    assert_eq!(files(&songs).len(), 2, "p0 and p2");
    // The song is that of `generate`, and the numbers those of a folder.
    std::fs::write(dir.join("captions.txt"), "a harp, 2\n").unwrap();
    accepted(dir, "generate --prompts captions.txt --out one");
    let read = |path: &Path| std::fs::read(path).unwrap();
    assert_eq!(read(&dir.join("one/000-a-harp-2.wav")), read(&songs.join("p2.wav")));
    let system = songs.display().to_string();
    accepted(dir, &format!("score {system} {reference} {measured} --out folder"));
    for metric in ["FAD", "per-song FAD", "CLAP score"] {
        let folder = json(&dir.join("folder/report.json"));
        close(value(&report, metric, "out/songs/tiny"), value(&folder, metric, &system));
    }
    // Songs that are missing are made again.
    let before = read(&songs.join("p2.wav"));
    std::fs::remove_file(songs.join("p2.wav")).unwrap();
    accepted(dir, &command);
    assert_eq!(read(&songs.join("p2.wav")), before);
    assert_eq!(json(&dir.join("out/report.json"))["values"], report["values"]);
    for (command, part) in [
        (format!("{command} --seed 1"), "made otherwise"),
        (command.replace("--songs 2", "--songs 3"), "made otherwise"),
        (command.replace("--songs 2", "--songs 5"), "has 4 prompts of split `test`, 5 are needed"),
        (command.replace("--prompts prompts.jsonl", ""), "no prompts for it to answer"),
        (format!("{command} builtin:tiny"), "two models are called `tiny`"),
        (command.replace("clap-recordings", "gone").replace("--out out", "--out new"), "gone"),
    ] {
        refused(dir, &command, &[part]);
    }
    // The same ids with other captions are other songs.
    let text = std::fs::read_to_string(dir.join("prompts.jsonl")).unwrap();
    std::fs::write(dir.join("prompts.jsonl"), text.replace("a harp, 0", "a flute, 0")).unwrap();
    refused(dir, &command, &["made otherwise"]);
}
