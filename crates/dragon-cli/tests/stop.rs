//! Ctrl-C: one is enough for a clean end with a checkpoint, and the run goes on bit for bit.

#![cfg(unix)]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use common::*;

/// Runs `args` until its log says `sign`, sends one interrupt, and gives the exit code and what came on stdout and on
/// stderr after it.
fn interrupted(dir: &Path, args: &str, sign: &str) -> (Option<i32>, String, String) {
    let mut child = command(dir)
        .args(args.split_whitespace())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(sign)), "`{sign}` did not come");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let rest: Vec<String> = lines.map(Result::unwrap).collect(); // until it ends
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), rest.join("\n"))
}

/// Step of the newest checkpoint.
fn newest(run: &Path) -> usize {
    let entries = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).max().expect("a checkpoint")
}

fn same(a: &Path, b: &Path, files: &[&str]) {
    for file in files {
        let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap_or_else(|err| panic!("{file}: {err}"));
        assert!(read(a) == read(b), "{file} differs");
    }
}

#[test]
fn one_interrupt_ends_a_pretraining_with_a_checkpoint_and_it_resumes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    let vae = format!(
        "{} --set run.log_every=1 --set run.validate_every=0 --set run.checkpoint_every=1000000",
        pretrain_vae("corpus/manifest.jsonl")
    );
    let (code, stdout, stderr) =
        interrupted(dir, &format!("{vae} --out run --set run.steps=1000000"), "step 2/");
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("stopped, --resume goes on"), "{stdout}");
    assert!(stderr.contains("stopping: the step in progress is finished and saved"), "{stderr}");
    let steps = newest(&dir.join("run"));
    assert!(steps >= 2);
    let logged = std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap().lines().count();
    assert_eq!(logged, steps, "the checkpoint holds every step that was logged");

    let end = format!("--set run.steps={}", steps + 2);
    accepted(dir, &format!("{vae} --out run --resume {end}"));
    accepted(dir, &format!("{vae} --out whole {end}"));
    let state = format!("checkpoints/step-{:06}/state.safetensors", steps + 2);
    same(&dir.join("run"), &dir.join("whole"), &["metrics.jsonl", "model/model.safetensors", &state]);
}

#[test]
fn one_interrupt_ends_a_fine_tuning_with_a_checkpoint_and_it_resumes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tune = "finetune --set rollout.songs_per_step=4 --set rollout.songs_per_prompt=2 --set rollout.sampler.n_steps=1 --set update.micro_batch=4 \
                --set run.validate_every=0 --set run.log_every=1 --set run.checkpoint_every=1000000 \
                --set eval.n_prompts=2 --set eval.sampler.n_steps=1 --set eval.bootstrap.subsets=10 \
                --set eval.bootstrap.songs=2 --set eval.examples=1";
    let (code, stdout, stderr) =
        interrupted(dir, &format!("{tune} --out run --set run.steps=1000000"), "step 1/");
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.contains("--resume goes on"), "{stdout}");
    let steps = newest(&dir.join("run"));
    assert!(!dir.join("run/report.json").exists(), "no evaluation after a stop");

    let end = format!("--set run.steps={}", steps + 1);
    accepted(dir, &format!("{tune} --out run --resume {end}"));
    accepted(dir, &format!("{tune} --out whole {end}"));
    let state = format!("checkpoints/step-{:06}/state.safetensors", steps + 1);
    same(
        &dir.join("run"),
        &dir.join("whole"),
        &["metrics.jsonl", "model/model.safetensors", &state, "report.json"],
    );
}

#[test]
fn an_interrupted_generation_leaves_whole_songs_only() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (code, _, stderr) =
        interrupted(dir, "generate harp --out songs --set variants=10000 --set batch=2 --steps 1", "step ");
    assert_eq!(code, Some(0), "{stderr}");
    let songs = files(&dir.join("songs"));
    assert!(!songs.is_empty());
    for (path, _) in songs {
        dragon_audio::read(&path).unwrap();
    }
}
