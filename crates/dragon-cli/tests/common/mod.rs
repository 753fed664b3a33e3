//! The real binary, and small inputs for it.

#![allow(dead_code)] // each test binary uses a part of this

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dragon_audio::{Clip, SampleFormat, write_wav};

/// The binary, to be run in `dir`; its environment says nothing about the terminal, and of no cache.
pub fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dragon"));
    quiet(&mut command, dir);
    command
}

/// The environment of [`command`].
pub fn quiet(command: &mut Command, dir: &Path) {
    command.current_dir(dir).env("NO_COLOR", "1");
    for name in ["RUST_LOG", "DRAGON_FIXTURES", "XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"] {
        command.env_remove(name);
    }
}

/// Runs the binary in `dir`; the arguments are separated by blanks.
pub fn dragon(dir: &Path, args: &str) -> Output {
    command(dir).args(args.split_whitespace()).output().unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs the binary, which must do its work; gives what it printed.
pub fn accepted(dir: &Path, args: &str) -> String {
    let output = dragon(dir, args);
    assert_eq!(output.status.code(), Some(0), "dragon {args}\n{}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Checks that an output is a refusal as in STYLE.md section 5: exit code 1, a message with these parts and a hint.
pub fn check_refusal(what: &str, output: &Output, parts: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{what}\n{text}");
    assert!(text.lines().any(|line| line.starts_with("error: ")), "{what}\n{text}");
    assert!(text.lines().any(|line| line.starts_with("hint: ")), "no hint in the message of {what}\n{text}");
    assert!(!text.contains("panicked"), "{what}\n{text}");
    for part in parts {
        assert!(text.contains(part), "{what}: `{part}` is missing in\n{text}");
    }
}

/// Runs the binary, which must refuse, leaving the folder `dir` file by file as it was.
pub fn refused(dir: &Path, args: &str, parts: &[&str]) {
    let before = files(dir);
    let output = dragon(dir, args);
    check_refusal(&format!("dragon {args}"), &output, parts);
    assert_eq!(files(dir), before, "dragon {args} left something behind");
}

/// All files and folders below `dir`, with sizes.
pub fn files(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with(".lock") {
                continue; // holds the process that looked last
            }
            let len = if path.is_dir() { 0 } else { path.metadata().unwrap().len() };
            if path.is_dir() {
                open.push(path.clone());
            }
            found.push((path, len));
        }
    }
    found.sort();
    found
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A tone whose pitch rises.
pub fn tone(seconds: f64, amplitude: f32) -> Clip {
    let n = (seconds * 16000.0) as usize;
    let samples = (0..n).map(|i| amplitude * (i as f32 * (0.05 + i as f32 * 1e-6)).sin()).collect();
    Clip { samples, sample_rate_hz: 16000 }
}

pub fn write_tone(path: &Path, seconds: f64, amplitude: f32) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_wav(path, &tone(seconds, amplitude), SampleFormat::Int16).unwrap();
}

/// Writes `manifest.jsonl` for the files `names` in `dir`; the second half is for validation.
pub fn write_manifest(dir: &Path, names: &[&str], caption: &str) {
    let line = |(i, name): (usize, &&str)| {
        let split = if 2 * i < names.len() { "train" } else { "valid" };
        format!(
            "{{\"id\":\"c{i}\",\"piece\":\"p{i}\",\"path\":\"{name}\",\"start_s\":0.0,\"duration_s\":1.0,\
             \"sample_rate_hz\":16000,\"caption\":\"{caption}\",\"caption_source\":\"user\",\"split\":\"{split}\",\
             \"corpus\":\"import\"}}\n"
        )
    };
    let text: String = names.iter().enumerate().map(line).collect();
    std::fs::write(dir.join("manifest.jsonl"), text).unwrap();
}

/// A corpus of two short clips in `dir/corpus`.
pub fn corpus(dir: &Path) {
    for (i, name) in ["a.wav", "b.wav"].iter().enumerate() {
        write_tone(&dir.join("corpus").join(name), 6.0, 0.2 + 0.1 * i as f32);
    }
    write_manifest(&dir.join("corpus"), &["a.wav", "b.wav"], "a rising tone");
}

/// Arguments that pre-train the smallest VAE on `manifest`.
pub fn pretrain_vae(manifest: &str) -> String {
    let manifests = format!("manifests=[\"{manifest}\"]");
    let sets = [
        manifests.as_str(),
        "batch=1",
        "crop_frames=18",
        "n_valid_clips=1",
        "n_stats_clips=1",
        "model.latent_dim=4",
        "model.frames_per_latent=1",
        "model.strides=[8,8]",
        "model.encoder_channels=[2,4,8]",
        "model.decoder_channels=[2,4,8]",
        "model.encoder_units=[0,1]",
        "model.decoder_units=[0,1]",
        "training.discriminator.periods=[2]",
        "training.discriminator.period_channels=[2,4]",
        "training.discriminator.fft_sizes=[256]",
        "training.discriminator.band_channels=2",
    ];
    let sets: String = sets.iter().map(|set| format!(" --set vae.{set}")).collect();
    format!("pretrain vae{sets}")
}
