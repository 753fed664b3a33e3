//! Rendering end to end, with a soundfont of one looped wave made here.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use dragon_data::clips::Form;
use dragon_data::render::{Options, Summary, render};

use dragon_data::{Entry, Error, Shares, Split, read_manifest};

/// A soundfont with one looped wave as melodic preset and as drum kit.
fn soundfont() -> Vec<u8> {
    fn chunk(id: &str, body: &[u8]) -> Vec<u8> {
        let mut out = id.as_bytes().to_vec();
        out.extend((body.len() as u32).to_le_bytes());
        out.extend(body);
        out.resize(out.len().next_multiple_of(2), 0);
        out
    }
    fn list(kind: &str, chunks: &[Vec<u8>]) -> Vec<u8> {
        let mut body = kind.as_bytes().to_vec();
        chunks.iter().for_each(|c| body.extend(c));
        chunk("LIST", &body)
    }
    fn name(text: &str) -> Vec<u8> {
        let mut out = text.as_bytes().to_vec();
        out.resize(20, 0);
        out
    }
    fn words(values: &[u16]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }
    // 16 periods of 64 samples at 28160 Hz: 440 Hz, with an octave above it
    let mut samples: Vec<i16> = (0..1024)
        .map(|i| {
            let phase = 2.0 * std::f64::consts::PI * f64::from(i) / 64.0;
            (9000.0 * phase.sin() + 4000.0 * (2.0 * phase).sin()) as i16
        })
        .collect();
    samples.resize(1024 + 64, 0);
    let preset = |label: &str, number: u16, bank: u16, bag: u16| {
        [name(label), words(&[number, bank, bag]), vec![0; 12]].concat()
    };
    let mut sample = name("wave");
    for v in [0u32, 1024, 64, 960, 28160] {
        sample.extend(v.to_le_bytes());
    }
    sample.extend([69, 0]); // sounds A4 unshifted
    sample.extend(words(&[0, 1]));
    let pdta = [
        chunk("phdr", &[preset("wave", 0, 0, 0), preset("kit", 0, 128, 1), preset("EOP", 0, 0, 2)].concat()),
        chunk("pbag", &words(&[0, 0, 1, 0, 2, 0])),
        chunk("pmod", &[0; 10]),
        chunk("pgen", &words(&[41, 0, 41, 0, 0, 0])),
        chunk("inst", &[name("wave"), words(&[0]), name("EOI"), words(&[1])].concat()),
        chunk("ibag", &words(&[0, 0, 2, 0])),
        chunk("imod", &[0; 10]),
        chunk("igen", &words(&[54, 1, 53, 0, 0, 0])),
        chunk("shdr", &[sample, name("EOS"), vec![0; 26]].concat()),
    ];
    let info = [chunk("ifil", &words(&[2, 1])), chunk("isng", b"EMU8000\0"), chunk("INAM", b"test\0\0")];
    let bytes: Vec<u8> = samples.iter().flat_map(|s| s.to_le_bytes()).collect();
    let mut body = b"sfbk".to_vec();
    body.extend(list("INFO", &info));
    body.extend(list("sdta", &[chunk("smpl", &bytes)]));
    body.extend(list("pdta", &pdta));
    chunk("RIFF", &body)
}

/// A folder with tunes and the soundfont.
fn inputs(dir: &Path) {
    let eight = "GABc dedB|c2A2 A2GA|B2d2 d2cB|ABcA G4|".repeat(4);
    let tune = |x: u32, title: &str, meter: &str, bars: &str| {
        format!("X:{x}\nT:{title}\nR:reel\nM:{meter}\nL:1/8\nK:G\n|:{bars}:|\n\n")
    };
    fs::create_dir_all(dir.join("tunes/mine")).unwrap();
    let jig = "GAB cde|d2B G3|ABc dcB|A3 G3|".repeat(4);
    fs::write(
        dir.join("tunes/mine/book.abc"),
        tune(1, "The First", "C|", &eight)
            + &tune(2, "The Second -- Reel", "6/8", &jig)
            + "X:3\nT:no music\n",
    )
    .unwrap();
    fs::write(dir.join("tunes/mine/First.abc"), tune(1, "First", "4/4", &eight)).unwrap();
    fs::write(dir.join("font.sf2"), soundfont()).unwrap();
}

fn options(dir: &Path, out: &str, n_clips: usize) -> Options {
    Options {
        tunes: dir.join("tunes"),
        soundfont: dir.join("font.sf2"),
        out: dir.join(out),
        n_clips,
        seed: 3,
        clip: Form::default(),
        split: Shares::default(),
        parts: vec![Split::Train, Split::Valid, Split::Test],
    }
}

fn run(options: &Options, n_threads: usize) -> Summary {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
    pool.install(|| render(options, &AtomicBool::new(false))).unwrap_or_else(|e| panic!("{e}"))
}

/// Names and bytes of everything in a folder.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).unwrap() {
            let path = item.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push((path.strip_prefix(dir).unwrap().display().to_string(), fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn tunes_become_clips_that_say_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    let summary = run(&options(dir.path(), "out", 9), 2);
    assert_eq!((summary.n_clips, summary.n_tunes), (9, 3), "{summary:?}");
    let entries = read_manifest(&dir.path().join("out/manifest.jsonl")).unwrap();
    for entry in &entries {
        let clip = dragon_audio::read(&dir.path().join("out").join(&entry.path)).unwrap();
        assert_eq!((clip.channels.len(), clip.n_samples(), clip.sample_rate_hz), (1, 81920, 16000));
        let instrument = entry.attributes["instrument"].as_str().unwrap();
        assert!(entry.caption.to_lowercase().contains(instrument), "{}", entry.caption);
        assert!(dragon_audio::peak(&clip.channels[0]) <= 0.9);
    }
    // "The First" and "First" are one piece, in whatever file and metre
    let pieces: std::collections::BTreeSet<&str> = entries.iter().map(|e| e.piece.as_str()).collect();
    assert_eq!(pieces.into_iter().collect::<Vec<_>>(), ["first", "second"]);
}

#[test]
fn the_same_seed_gives_the_same_bytes_whatever_the_threads_and_interruptions() {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    run(&options(dir.path(), "a", 7), 1);
    run(&options(dir.path(), "b", 7), 3);
    let want = contents(&dir.path().join("a"));
    assert!(want == contents(&dir.path().join("b")));

    // as after a crash: no manifest yet, one clip missing, one cut short, a half-written note
    let out = dir.path().join("b");
    let manifest = fs::read_to_string(out.join("manifest.jsonl")).unwrap();
    fs::remove_file(out.join("manifest.jsonl")).unwrap();
    fs::write(out.join("progress.jsonl"), manifest[..manifest.len() - 40].to_string() + "\n").unwrap();
    let entries = read_manifest(&dir.path().join("a/manifest.jsonl")).unwrap();
    fs::remove_file(out.join(&entries[0].path)).unwrap();
    fs::write(out.join(&entries[1].path), b"RIFF").unwrap();
    let summary = run(&options(dir.path(), "b", 7), 2);
    assert_eq!(summary.n_kept, 4);
    assert!(want == contents(&out));

    // more clips keep the first ones
    run(&options(dir.path(), "b", 10), 2);
    let more = contents(&out);
    assert!(want.iter().filter(|(name, _)| name.ends_with(".wav")).all(|file| more.contains(file)));
}

#[test]
fn a_part_of_the_split_has_the_clips_that_it_has_in_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    let split = (1..100)
        .map(|valid_percent| Shares { valid_percent, test_percent: 0 })
        .find(|split| split.split_of("first") != split.split_of("second"))
        .unwrap();
    let all = Options { split, ..options(dir.path(), "all", 9) };
    run(&all, 2);
    let held_out: Vec<Entry> = read_manifest(&dir.path().join("all/manifest.jsonl"))
        .unwrap()
        .into_iter()
        .filter(|entry| entry.split == Split::Valid)
        .collect();
    let part =
        Options { parts: vec![Split::Valid], n_clips: held_out.len(), ..options(dir.path(), "part", 0) };
    run(&Options { split: all.split.clone(), ..part }, 2);
    assert_eq!(read_manifest(&dir.path().join("part/manifest.jsonl")).unwrap(), held_out);
    for entry in &held_out {
        let bytes = |run: &str| fs::read(dir.path().join(run).join(&entry.path)).unwrap();
        assert!(bytes("all") == bytes("part"), "{}", entry.path);
    }
    // The same folder takes the rest in.
    let rest = Options { out: dir.path().join("part"), ..all };
    assert_eq!(run(&rest, 1).n_kept, held_out.len());
    let nothing = render(&Options { parts: vec![Split::Test], ..rest }, &AtomicBool::new(false)).unwrap_err();
    assert!(nothing.to_string().contains("no tune falls to [Test]"), "{nothing}");
}

#[test]
fn a_folder_of_other_settings_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    run(&options(dir.path(), "out", 2), 1);
    let before = contents(&dir.path().join("out"));
    let other = Options { seed: 4, ..options(dir.path(), "out", 2) };
    let error = render(&other, &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("`seed` is 3 there, 4 here"), "{error}");
    let good = options(dir.path(), "out", 2);
    let other = Options { clip: Form { duration_s: 4.0, ..good.clip.clone() }, ..good.clone() };
    let error = render(&other, &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("`clip` is {"), "{error}");
    assert!(before == contents(&dir.path().join("out")));

    // a folder from the time when form and shares were constants is gone on with
    let path = dir.path().join("out/render.json");
    let mut settings: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for key in ["clip", "split"] {
        assert!(settings.as_object_mut().unwrap().remove(key).is_some(), "{settings}");
    }
    fs::write(&path, settings.to_string()).unwrap();
    assert!(render(&other, &AtomicBool::new(false)).is_err());
    assert_eq!(run(&good, 1).n_kept, 2);
}

#[test]
fn clips_take_the_form_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    let clip = Form { sample_rate_hz: 22050, duration_s: 2.5, ..Form::default() };
    run(&Options { clip, ..options(dir.path(), "out", 3) }, 1);
    for entry in read_manifest(&dir.path().join("out/manifest.jsonl")).unwrap() {
        let clip = dragon_audio::read(&dir.path().join("out").join(&entry.path)).unwrap();
        assert_eq!((clip.n_samples(), clip.sample_rate_hz), (55125, 22050));
        assert_eq!((entry.duration_s, entry.sample_rate_hz), (2.5, 22050));
    }
}

#[test]
fn settings_that_cannot_work_are_named() {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    let good = options(dir.path(), "out", 2);
    let form = |clip: Form| Options { clip, ..good.clone() };
    for (bad, part) in [
        (Options { n_clips: 0, ..good.clone() }, "`n_clips`: expected at least 1, found 0"),
        (
            Options { parts: Vec::new(), ..good.clone() },
            "`parts`: expected at least one of train, valid, test",
        ),
        (
            form(Form { sample_rate_hz: 0, ..Form::default() }),
            "`clip.sample_rate_hz`: expected 8000 to 96000 Hz, found 0",
        ),
        (
            form(Form { duration_s: -1.0, ..Form::default() }),
            "`clip.duration_s`: expected 0.4 to 600 s, found -1",
        ),
        (form(Form { duration_s: f64::NAN, ..Form::default() }), "`clip.duration_s`"),
        (
            form(Form { target_lufs: 3.0, ..Form::default() }),
            "`clip.target_lufs`: expected -70 to 0 LUFS, found 3",
        ),
        (form(Form { peak_limit: 0.0, ..Form::default() }), "`clip.peak_limit`"),
        (
            Options { split: Shares { valid_percent: 60, test_percent: 41 }, ..good.clone() },
            "`split.test_percent`: expected at most 100 in all, with `split.valid_percent` 60, found 41",
        ),
    ] {
        let error = render(&bad, &AtomicBool::new(false)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(!dir.path().join("out").exists());
}

#[test]
fn missing_and_wrong_inputs_are_named() {
    let dir = tempfile::tempdir().unwrap();
    inputs(dir.path());
    let good = options(dir.path(), "out", 2);
    let fails = |options: Options| render(&options, &AtomicBool::new(false)).unwrap_err();
    let error = fails(Options { soundfont: dir.path().join("no.sf2"), ..good.clone() });
    assert!(matches!(error, Error::Missing { what: "soundfont", .. }), "{error}");
    let error = fails(Options { soundfont: dir.path().join("tunes/mine/book.abc"), ..good.clone() });
    assert!(error.to_string().contains("expected an SF2 file, found something else"), "{error}");
    let error = fails(Options { tunes: dir.path().join("none"), ..good.clone() });
    assert!(matches!(error, Error::Missing { what: "folder of tunes", .. }), "{error}");
    fs::create_dir(dir.path().join("empty")).unwrap();
    let error = fails(Options { tunes: dir.path().join("empty"), ..good });
    assert!(error.to_string().contains("0 ABC files, 0 tunes in them"), "{error}");
    assert!(!dir.path().join("out").exists());
}
