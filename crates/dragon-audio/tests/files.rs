//! Files: every format that is read, real music, and what is said about files that cannot be used.

use std::fs;
use std::path::Path;

use dragon_audio::{
    Audio, Clip, Error, SampleFormat, check, peak, read, read_duration_s, read_mono, read_tags, rms_dbfs,
    write_wav,
};
use dragon_testkit::fixture;

/// Level of one frequency in `samples`: amplitude of the best-fitting sine.
fn level_at(samples: &[f32], hz: f64, rate: u32) -> f64 {
    let (mut re, mut im) = (0.0, 0.0);
    for (i, &x) in samples.iter().enumerate() {
        let phase = 2.0 * std::f64::consts::PI * hz * i as f64 / f64::from(rate);
        re += f64::from(x) * phase.cos();
        im += f64::from(x) * phase.sin();
    }
    2.0 * re.hypot(im) / samples.len() as f64
}

fn tone(n: usize) -> Vec<f32> {
    (0..n).map(|i| 0.4 * (i as f32 * 0.11).sin()).collect()
}

fn message(path: &Path) -> String {
    read(path).expect_err("a file that cannot be used").to_string()
}

#[test]
fn every_format_gives_the_tone() {
    // encoders may pad; the tone itself must be there, at its level, in its channel
    for (name, n) in [
        ("tone.flac", 11025..=11025),
        ("tone.aiff", 11025..=11025),
        ("tone_24bit.wav", 11025..=11025),
        ("tone_8bit.wav", 11025..=11025),
        ("tone_float.wav", 11025..=11025),
        ("tone.ogg", 11025..=11025),
        ("tone.mp3", 11025..=13500),
    ] {
        let audio = read(&fixture("dragon-audio/formats").join(name)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((audio.channels.len(), audio.sample_rate_hz), (2, 22050), "{name}");
        assert!(n.contains(&audio.n_samples()), "{name}: {} samples", audio.n_samples());
        // 4410 samples hold whole periods of both tones
        let middle = 2205..2205 + 4410;
        let left = level_at(&audio.channels[0][middle.clone()], 440.0, 22050);
        let right = level_at(&audio.channels[1][middle], 660.0, 22050);
        assert!((left - 0.5).abs() < 0.01 && (right - 0.25).abs() < 0.01, "{name}: {left} {right}");
    }
}

#[test]
fn the_music_fixtures_are_music() {
    let mut n = 0;
    for item in fs::read_dir(fixture("music")).unwrap() {
        let path = item.unwrap().path();
        if path.extension().is_none_or(|e| e != "ogg") {
            continue;
        }
        n += 1;
        let audio = read(&path).unwrap();
        assert_eq!((audio.channels.len(), audio.sample_rate_hz), (2, 44100));
        assert_eq!(read_duration_s(&path).unwrap(), audio.duration_s());
        assert!((7.9..8.1).contains(&audio.duration_s()), "{}", audio.duration_s());
        let mono = read_mono(&path, 16000).unwrap();
        assert_eq!(mono.samples.len(), (audio.n_samples() * 16000).div_ceil(44100));
        assert!((-40.0..-6.0).contains(&rms_dbfs(&mono.samples)), "{} dBFS", rms_dbfs(&mono.samples));
    }
    assert_eq!(n, 6);
}

#[test]
fn wav_files_are_read_as_they_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.wav");
    let audio =
        Audio { channels: vec![tone(1000), tone(1000).iter().map(|x| -x).collect()], sample_rate_hz: 8000 };
    write_wav(&path, &audio, SampleFormat::Float32).unwrap();
    assert_eq!(read(&path).unwrap(), audio);
    write_wav(&path, &audio, SampleFormat::Int16).unwrap();
    let got = read(&path).unwrap();
    assert_eq!((got.channels.len(), got.sample_rate_hz, got.n_samples()), (2, 8000, 1000));
    let worst = (0..1000).map(|i| (got.channels[0][i] - audio.channels[0][i]).abs()).fold(0.0, f32::max);
    assert!(worst <= 0.5f32.powi(16), "{worst}");
    let first = fs::read(&path).unwrap();
    write_wav(&path, &audio, SampleFormat::Int16).unwrap();
    assert_eq!(first, fs::read(&path).unwrap(), "the same audio gives the same bytes");
}

#[test]
fn loud_samples_are_limited_to_16_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.wav");
    write_wav(&path, &Clip { samples: vec![1.5, -1.5, 1.0], sample_rate_hz: 8000 }, SampleFormat::Int16)
        .unwrap();
    let got = read(&path).unwrap().to_mono().samples;
    assert_eq!(got, [32767.0 / 32768.0, -1.0, 32767.0 / 32768.0]);
}

#[test]
fn eight_kilohertz_stereo_becomes_sixteen_kilohertz_mono() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.wav");
    let audio = Audio { channels: vec![tone(8000), tone(8000)], sample_rate_hz: 8000 };
    write_wav(&path, &audio, SampleFormat::Int16).unwrap();
    let clip = read_mono(&path, 16000).unwrap();
    assert_eq!((clip.samples.len(), clip.sample_rate_hz), (16000, 16000));
    assert!((peak(&clip.samples) - 0.4).abs() < 0.02);
}

#[test]
fn a_missing_file_is_named() {
    let message = message(Path::new("/no/such/song.wav"));
    assert!(message.starts_with("audio file `/no/such/song.wav` does not exist\nhint: "), "{message}");
}

#[test]
fn empty_and_headless_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.ogg");
    fs::write(&path, b"").unwrap();
    assert!(message(&path).contains("is empty: expected audio, found 0 bytes"));
    let path = dir.path().join("b.wav");
    write_wav(&path, &Clip { samples: vec![], sample_rate_hz: 16000 }, SampleFormat::Int16).unwrap();
    assert!(message(&path).contains("has no samples"), "{}", message(&path));
}

#[test]
fn wrong_names_are_told_from_the_contents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.wav");
    fs::write(&path, "la la la\n").unwrap();
    assert!(message(&path).contains("is mislabelled: expected WAV, found text"), "{}", message(&path));
    let path = dir.path().join("song.wav");
    fs::copy(fixture("dragon-audio/formats/tone.ogg"), &path).unwrap();
    assert!(message(&path).contains("expected WAV, found Ogg Vorbis"), "{}", message(&path));
    let path = dir.path().join("song.mp3");
    fs::write(&path, b"MThd\0\0\0\x06\0\0\0\x01\0\x60").unwrap();
    assert!(message(&path).contains("expected MP3, found MIDI (notes, not audio)"), "{}", message(&path));
    let path = dir.path().join("song.bin");
    fs::write(&path, [0u8, 1, 2, 3, 250, 7]).unwrap();
    assert!(
        matches!(read(&path), Err(Error::Unsupported { .. } | Error::Damaged { .. })),
        "{}",
        message(&path)
    );
    // without a known ending the contents decide
    let path = dir.path().join("song");
    fs::copy(fixture("dragon-audio/formats/tone.flac"), &path).unwrap();
    assert_eq!(read(&path).unwrap().n_samples(), 11025);
}

#[test]
fn a_look_at_a_file_finds_what_needs_no_decoding() {
    let dir = tempfile::tempdir().unwrap();
    let wav = dir.path().join("a.wav");
    write_wav(&wav, &Clip { samples: tone(1000), sample_rate_hz: 8000 }, SampleFormat::Int16).unwrap();
    check(&wav).unwrap();
    for name in ["tone.flac", "tone.ogg", "tone.opus", "tone.mp3", "tone.aiff", "tone_float.wav"] {
        check(&fixture("dragon-audio/formats").join(name)).unwrap();
    }
    let whole = fs::read(&wav).unwrap();
    let (cut, text, tune) = (dir.path().join("cut.wav"), dir.path().join("x"), dir.path().join("y"));
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    fs::write(&text, "la la la\n").unwrap();
    fs::write(&tune, b"MThd\0\0\0\x06\0\0\0\x01\0\x60").unwrap();
    assert!(matches!(check(&cut), Err(Error::Truncated { .. })));
    assert!(matches!(check(&text), Err(Error::Unsupported { .. })));
    assert!(matches!(check(&tune), Err(Error::Unsupported { .. })));
    assert!(matches!(check(&dir.path().join("no.wav")), Err(Error::NotFound { .. })));
    assert!(check(dir.path()).unwrap_err().to_string().contains("found a folder"));
}

#[test]
fn a_damaged_or_missing_page_of_an_ogg_file_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.ogg");
    let whole = fs::read(fixture("music/cc0_loop_tabla.ogg")).unwrap();
    let pages: Vec<usize> = (0..whole.len()).filter(|&at| whole[at..].starts_with(b"OggS")).collect();
    assert!(pages.len() > 7, "{}", pages.len());
    for (i, at) in pages.iter().enumerate() {
        let mut damaged = whole.clone();
        damaged[at + 40] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert!(read(&path).is_err(), "page {i} damaged");
    }
    let (start, end) = (pages[6], pages[7]);
    fs::write(&path, [&whole[..start], &whole[end..]].concat()).unwrap();
    assert!(message(&path).contains("page 5 is followed by page 7"), "{}", message(&path));
    assert!(matches!(check(&path), Err(Error::Damaged { at_s, .. }) if at_s > 0.1));
    // What follows the end of the stream does not count.
    fs::write(&path, [&whole[..], b"TAG"].concat()).unwrap();
    assert!(read(&path).unwrap() == read(&fixture("music/cc0_loop_tabla.ogg")).unwrap());
}

#[test]
fn truncated_files_are_errors_at_every_length() {
    let dir = tempfile::tempdir().unwrap();
    let wav = dir.path().join("whole.wav");
    write_wav(&wav, &Clip { samples: tone(4000), sample_rate_hz: 16000 }, SampleFormat::Int16).unwrap();
    let music = fixture("music/cc0_loop_tabla.ogg");
    let formats = fixture("dragon-audio/formats");
    for whole in [
        wav,
        music,
        formats.join("tone.flac"),
        formats.join("tone.aiff"),
        formats.join("tone.opus"),
        fixture("dragon-audio/opus/pauses.opus"),
    ] {
        let bytes = fs::read(&whole).unwrap();
        let path = dir.path().join("cut").with_extension(whole.extension().unwrap());
        for part in 1..8 {
            fs::write(&path, &bytes[..bytes.len() * part / 8]).unwrap();
            let error = read(&path).expect_err(&format!("{} cut at {part}/8", whole.display()));
            assert!(
                matches!(error, Error::Truncated { .. } | Error::Damaged { .. } | Error::NoSamples { .. }),
                "{} cut at {part}/8: {error}",
                whole.display()
            );
        }
        fs::write(&path, &bytes).unwrap();
        read(&path).unwrap();
    }
}

#[test]
fn nan_is_refused_on_reading_and_on_writing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nan.wav");
    let mut clip = Clip { samples: tone(100), sample_rate_hz: 1000 };
    write_wav(&path, &clip, SampleFormat::Float32).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 4 * 50; // the 50th sample from the end
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    assert!(message(&path).contains("found NaN in channel 0 at 0.0500 s"), "{}", message(&path));
    clip.samples[3] = f32::INFINITY;
    let other = dir.path().join("b.wav");
    assert!(matches!(write_wav(&other, &clip, SampleFormat::Int16), Err(Error::NonFinite { .. })));
    assert!(!other.exists());
}

#[test]
fn a_refused_write_leaves_the_old_file_and_no_temporary_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("taken");
    fs::create_dir(&path).unwrap(); // a folder stands where the file should go
    let clip = Clip { samples: tone(10), sample_rate_hz: 8000 };
    let error = write_wav(&path, &clip, SampleFormat::Int16).unwrap_err();
    assert!(error.to_string().contains("could not be written"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let error = write_wav(&dir.path().join("no/a.wav"), &clip, SampleFormat::Int16).unwrap_err();
    assert!(error.to_string().contains("no/a.wav` could not be written"), "{error}");
}

#[test]
fn damaged_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = 1u64;
    for name in ["tone.ogg", "tone.opus", "tone.flac", "tone.mp3", "tone.aiff", "tone_24bit.wav"] {
        let whole = fs::read(fixture("dragon-audio/formats").join(name)).unwrap();
        for _ in 0..40 {
            let mut bytes = whole.clone();
            for _ in 0..8 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let at = (state >> 33) as usize % bytes.len();
                bytes[at] = (state >> 20) as u8;
            }
            let path = dir.path().join(name);
            fs::write(&path, &bytes).unwrap();
            if let Ok(audio) = read(&path) {
                assert!(audio.channels.iter().flatten().all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn an_impossible_sample_rate_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.wav");
    write_wav(&path, &Clip { samples: tone(100), sample_rate_hz: 10 }, SampleFormat::Int16).unwrap();
    assert!(
        message(&path)
            .contains("a.wav` has an impossible sample rate: expected 1000 to 768000 Hz, found 10 Hz")
    );
}

#[test]
fn tags_are_read() {
    let tags = read_tags(&fixture("dragon-audio/formats/tone.flac")).unwrap();
    assert!(tags.iter().all(|(key, _)| *key == key.to_lowercase()));
}
