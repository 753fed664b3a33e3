//! What a user may get wrong: each ends with exit code 1 and a message that says what, where and what to do; nothing is
//! half-written, nothing that was there is lost.

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use common::*;
use dragon_audio::{Clip, SampleFormat, write_wav};

/// Every command that reads audio must refuse a corpus whose last file is `bad` under the name `name`, before it leaves
/// anything behind.
fn every_reader_refuses(name: &str, make: impl Fn(&Path), parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    write_tone(&dir.join("songs/a.wav"), 6.0, 0.3);
    write_tone(&dir.join("good/a.wav"), 6.0, 0.3);
    write_tone(&dir.join(format!("good/{name}")), 6.0, 0.3);
    for folder in ["songs", "corpus"] {
        make(&dir.join(folder).join(name));
    }
    write_manifest(&dir.join("corpus"), &["a.wav", name], "a rising tone");
    std::fs::write(dir.join("list.csv"), format!("path,caption\nsongs/a.wav,a tone\nsongs/{name},a tone\n"))
        .unwrap();
    let mut commands = vec![
        "data import list.csv --out new".to_owned(),
        "embed songs --out songs.npz".to_owned(),
        "stats songs --out songs.npz".to_owned(),
        "embed songs --out songs.npz --encoder builtin:tiny/clap --setting ma".to_owned(),
        "eval good songs --out new".to_owned(),
        "finetune --out new --set reward.exemplars={kind=\"audio\",path=\"songs\"}".to_owned(),
        "pretrain clap --out new --set clap.manifests=[\"corpus/manifest.jsonl\"]".to_owned(),
        format!("{} --out new", pretrain_vae("corpus/manifest.jsonl")),
    ];
    if !dir.join("songs").join(name).exists() {
        commands.retain(|command| command.contains("manifest") || command.contains("list.csv"));
    }
    for command in commands {
        refused(dir, &command, &[&[name][..], parts].concat());
    }
}

#[test]
fn a_gpu_that_cannot_be_used_is_an_error_and_never_replaced() {
    let parts: [&str; 2] = match cfg!(feature = "cuda") {
        false => ["the device `cuda:999` was asked for", "--features cuda"],
        true => ["cannot use the device `cuda:999`", "nvidia-smi"],
    };
    let dir = tempfile::tempdir().unwrap();
    for command in ["generate jig --out new", "finetune --out new", "card", "bench"] {
        refused(dir.path(), &format!("{command} --device cuda:999"), &parts);
    }
}

#[test]
fn missing_audio_is_named() {
    every_reader_refuses("gone.wav", |_| {}, &["does not exist"]);
    let dir = tempfile::tempdir().unwrap();
    for command in ["data import no --out new", "embed no --out songs.npz", "eval no nor --out new"] {
        refused(dir.path(), command, &["`no`"]);
    }
}

#[test]
fn empty_audio_is_named() {
    every_reader_refuses(
        "empty.wav",
        |path| std::fs::write(path, "").unwrap(),
        &["is empty: expected audio, found 0 bytes"],
    );
}

#[test]
fn truncated_audio_is_named() {
    let cut = |path: &Path| {
        write_tone(path, 6.0, 0.3);
        let whole = std::fs::read(path).unwrap();
        std::fs::write(path, &whole[..whole.len() / 2]).unwrap();
    };
    every_reader_refuses("cut.wav", cut, &["is truncated: expected 192000 bytes of samples, found 95978"]);
}

#[test]
fn silent_audio_is_named() {
    every_reader_refuses(
        "silent.wav",
        |path| write_tone(path, 6.0, 0.0),
        &["is silent: expected a level above", "found -inf dBFS"],
    );
}

#[test]
fn audio_that_is_too_short_is_named() {
    every_reader_refuses(
        "short.wav",
        |path| write_tone(path, 0.001, 0.3),
        &["is too short: expected at least", "found "],
    );
}

#[test]
fn audio_with_nan_is_named() {
    let nan = |path: &Path| {
        write_wav(path, &tone(6.0, 0.3), SampleFormat::Float32).unwrap();
        let mut bytes = std::fs::read(path).unwrap();
        let at = bytes.len() - 4 * 16000; // a second before the end
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    };
    every_reader_refuses("nan.wav", nan, &["expected finite numbers, found NaN in channel 0 at 5.0000 s"]);
}

#[test]
fn an_mp3_named_wav_is_told_by_its_contents() {
    every_reader_refuses(
        "song.wav",
        |path| {
            std::fs::copy(fixture("dragon-audio/formats/tone.mp3"), path).unwrap();
        },
        &["is mislabelled: expected WAV, found MP3"],
    );
}

#[test]
fn a_text_named_wav_is_told_by_its_contents() {
    every_reader_refuses(
        "notes.wav",
        |path| std::fs::write(path, "la la la\n").unwrap(),
        &["is mislabelled: expected WAV, found text"],
    );
}

#[test]
fn a_folder_without_audio_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("songs")).unwrap();
    for command in [
        "data import songs --out new",
        "embed songs --out songs.npz",
        "eval songs songs --out new",
        "finetune --out new --set reward.exemplars={kind=\"audio\",path=\"songs\"}",
    ] {
        refused(dir.path(), command, &["songs", "audio"]);
    }
}

#[test]
fn what_is_easily_confused_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir_all(dir.join("songs")).unwrap();
    std::fs::create_dir_all(dir.join("empty")).unwrap();
    write_tone(&dir.join("songs/a.wav"), 6.0, 0.3);
    let prompt = |i: usize| format!("{{\"id\":\"{i}\",\"caption\":\"a jig\",\"split\":\"train\"}}\n");
    std::fs::write(dir.join("own.jsonl"), (0..200).map(prompt).collect::<String>()).unwrap();
    std::fs::write(dir.join("own.toml"), "extends = \"finetune/vendi\"\n").unwrap();
    let cases: &[(&str, &[&str])] = &[
        (
            "finetune --out new --set reward.exemplars.path=songs",
            &["is a folder", "reward.exemplars.kind=audio"],
        ),
        (
            "finetune --out new --set reward.exemplars.kind=audio --set reward.exemplars.path=songs",
            &["`songs` is no reference: expected at least 2 songs, found 1", "better a hundred"],
        ),
        ("finetune --out new --set loss.kind=dpo", &["weight_minus", "loss={kind=\"dpo\",beta=50.0}"]),
        (
            "finetune --out new --set prompts=own.jsonl --set validation.n_prompts=0 --set run.validate_every=0",
            &["evaluation after the last step", "0 prompts of split `test`, 256 are needed"],
        ),
        ("finetune --out new --set bundle=empty", &["`empty` is no model folder: it has no bundle.json"]),
        ("finetune --out new --set bundle=nope", &["there is no model folder `nope`"]),
        (
            "embed songs --out songs.npz --encoder nothing",
            &["there is no encoder `nothing`", "musicnn, clap, vae"],
        ),
        ("embed songs --out songs/a.wav/x.npz", &["`songs/a.wav` is a file"]),
    ];
    for (command, parts) in cases {
        refused(dir, command, parts);
    }
    let both = dragon(dir, "finetune --out new --preset vendi --config own.toml");
    assert_eq!(both.status.code(), Some(1));
    assert!(stderr(&both).contains("'--preset <PRESET>' cannot be used with '--config <FILE>'"));
    // All variables again where a preset names some.
    let text = "finetune --preset clap-score --set update.parameters=[] --set update.draws=0 --out new";
    refused(dir, text, &["expected at least 1"]);
    accepted(dir, "embed songs --out new/folder/songs.npz");
}

#[test]
fn an_import_that_fails_late_leaves_the_folder_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for i in 0..12 {
        write_tone(&dir.join(format!("songs/{i:02}.wav")), 6.0, 0.3);
    }
    accepted(dir, "data import songs --out mine");
    write_tone(&dir.join("songs/99.wav"), 6.0, 0.0);
    refused(dir, "data import songs --out mine", &["99.wav", "is silent"]);
    write_tone(&dir.join("others/a.wav"), 6.0, 0.3);
    refused(dir, "data import others --out mine", &["`mine`", "clips of other files", "--out"]);
    accepted(dir, "data import songs --out mine --skip-bad");
}

#[test]
fn an_empty_caption_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    write_manifest(&dir.join("corpus"), &["a.wav", "b.wav"], " ");
    std::fs::write(dir.join("list.csv"), "path,caption\ncorpus/a.wav,\n").unwrap();
    std::fs::write(dir.join("list.jsonl"), "{\"path\":\"corpus/a.wav\",\"caption\":\" \"}\n").unwrap();
    std::fs::write(dir.join("corpus/a.txt"), "\n").unwrap();
    std::fs::write(dir.join("prompts.jsonl"), "{\"id\":\"p1\",\"caption\":\"\",\"split\":\"train\"}\n")
        .unwrap();
    std::fs::create_dir(dir.join("run")).unwrap();
    for (command, parts) in [
        ("data import list.csv --out new", ["list.csv", "line 2", "expected words, found nothing"]),
        ("data import list.jsonl --out new", ["list.jsonl", "line 1", "expected words, found nothing"]),
        ("data import corpus --out new", ["a.txt", "`caption`", "expected words, found nothing"]),
        ("finetune --out new --set prompts=prompts.jsonl", ["prompts.jsonl", "line 1", "`p1` is empty"]),
        ("eval run --out new --prompts prompts.jsonl", ["prompts.jsonl", "line 1", "`p1` is empty"]),
        (
            "pretrain clap --out new --set clap.manifests=[\"corpus/manifest.jsonl\"]",
            ["manifest.jsonl", "line 1", "expected words, found nothing"],
        ),
        (
            "pretrain dit --out new --set data.manifest=corpus/manifest.jsonl",
            ["manifest.jsonl", "line 1", "expected words, found nothing"],
        ),
    ] {
        refused(dir, command, &parts);
    }
    let before = files(dir);
    let output = command(dir).args(["generate", "a harp", " ", "--out", "new"]).output().unwrap();
    check_refusal("an empty prompt", &output, &["prompt 2 is empty"]);
    assert_eq!(files(dir), before);
}

#[test]
fn a_caption_longer_than_the_model_reads_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    let long = "a slow harp melody and ".repeat(60);
    std::fs::write(dir.join("list.csv"), format!("path,caption\ncorpus/a.wav,{long}\n")).unwrap();
    let line = format!("{{\"id\":\"p1\",\"caption\":\"{long}\",\"split\":\"train\"}}\n");
    std::fs::write(dir.join("prompts.jsonl"), line).unwrap();
    std::fs::write(dir.join("prompts.txt"), &long).unwrap();
    std::fs::create_dir(dir.join("run")).unwrap();
    refused(
        dir,
        "data import list.csv --out new",
        &["line 2", "expected at most 1000 characters, found 1379"],
    );
    for command in [
        "generate --prompts prompts.txt --out new",
        "finetune --out new --set prompts=prompts.jsonl",
        "eval run --out new --prompts prompts.jsonl",
    ] {
        refused(dir, command, &["prompt 1 is too long: expected at most ", " tokens, found "]);
    }
}

/// A copy of the shipped model folder in `dir/model`.
fn model(dir: &Path) {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let to = to.join(path.file_name().unwrap());
            if path.is_dir() {
                copy(&path, &to);
            } else {
                std::fs::copy(&path, &to).unwrap();
            }
        }
    }
    copy(&fixture("tiny"), &dir.join("model"));
}

/// Changes a number in a JSON file.
fn set_number(path: &Path, key: &str, value: u64) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let pointer = json.pointer_mut(key).unwrap_or_else(|| panic!("no {key} in {}", path.display()));
    *pointer = value.into();
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn a_checkpoint_of_another_shape_is_named_with_its_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    model(dir);
    corpus(dir);
    set_number(&dir.join("model/dit/config.json"), "/dit/ffn_hidden", 500);
    let fits = ["dit/model.safetensors", "expected", "found", "blocks."];
    refused(dir, "generate harp --out new --model model", &fits);
    refused(dir, "finetune --out new --set bundle=model", &fits);
    refused(dir, "eval model --out new --model builtin:tiny", &["dit"]);
    refused(dir, "generate harp --out new --tuned model", &["dit"]);

    set_number(&dir.join("model/clap/config.json"), "/joint_dim", 100);
    refused(
        dir,
        "embed corpus --out songs.npz --encoder model/clap --setting ma",
        &["clap", "model.safetensors", "expected", "found", "projection"],
    );
    let init = format!("{} --out new --set vae.init=model/vae", pretrain_vae("corpus/manifest.jsonl"));
    refused(dir, &init, &["model/vae", "expected", "found", "encoder."]);
    refused(dir, "generate harp --out new --model no", &["no model folder `no`"]);
    refused(dir, "generate harp --out new --tuned corpus", &["`corpus` holds no diffusion model"]);
    std::fs::write(dir.join("model/dit/model.safetensors"), "half of a").unwrap();
    refused(dir, "generate harp --out new --model model", &["dit/model.safetensors"]);
}

#[test]
fn a_clap_of_others_that_cannot_be_read_says_what_it_is_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    let laion = fixture("dragon-encoders/clap/laion/checkpoint.pt");
    let whole = std::fs::read(laion).unwrap();
    std::fs::write(dir.join("laion.pt"), &whole).unwrap();
    let embed = |path: &str| format!("embed corpus --out songs.npz --setting ma --encoder {path}");
    refused(
        dir,
        &embed("laion.pt"),
        &["tokenizer.json", "it is missing", "hint: put the tokenizer.json of roberta-base"],
    );
    std::fs::copy(fixture("tiny/clap/tokenizer.json"), dir.join("tokenizer.json")).unwrap();
    refused(dir, &embed("laion.pt"), &["the tokenizer has", "the config says vocab_size 60"]);
    std::fs::write(dir.join("laion.pt"), &whole[..whole.len() / 2]).unwrap();
    refused(dir, &embed("laion.pt"), &["laion.pt", "cut short", "hint: the download is incomplete"]);
    std::fs::copy(fixture("dragon-encoders/t5/gated.safetensors"), dir.join("t5.safetensors")).unwrap();
    refused(dir, &embed("t5.safetensors"), &["holds no CLAP", "hint: is it a checkpoint of another model?"]);
    refused(
        dir,
        &embed("nowhere.pt"),
        &["there is no encoder `nowhere.pt`", "hint: name musicnn, clap, vae"],
    );
}

#[test]
fn an_unknown_key_is_named_with_the_known_ones() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_tone(&dir.join("songs/a.wav"), 6.0, 0.3);
    std::fs::write(dir.join("run.toml"), "seed = 1\nstpes = 2\n").unwrap();
    let file = "unknown field `stpes`";
    for command in ["pretrain vae", "pretrain clap", "pretrain dit", "generate harp", "eval songs songs"] {
        refused(dir, &format!("{command} --out new --config run.toml"), &["`run.toml`", file, "expected"]);
    }
    for (command, key, known) in [
        ("finetune", "update.optimizer.lrr=1", "did you mean `lr`?"),
        ("finetune", "eval.n_promts=4", "did you mean `n_prompts`?"),
        ("bench", "rollout.sampler.steps=4", "`n_steps`"),
        ("eval songs songs", "n_promts=4", "did you mean `n_prompts`?"),
        ("generate harp", "sampler.n_step=4", "did you mean `n_steps`?"),
        ("pretrain vae", "vae.training.n_step=4", "did you mean `n_steps`?"),
        ("pretrain clap", "clap.bach=4", "did you mean `batch`?"),
        ("pretrain dit", "text.num_layer=4", "did you mean `num_layers`?"),
    ] {
        let out = if command == "bench" { "" } else { " --out new" };
        let key_name = key.split('=').next().unwrap().rsplit('.').next().unwrap();
        let unknown = format!("unknown field `{key_name}`");
        refused(dir, &format!("{command}{out} --set {key}"), &[&unknown, key, known]);
    }
    refused(dir, "embed songs --out songs.npz --set setting.hops=1", &["unknown field `hops`", "`hop_s`"]);
    for command in ["data fetch", "data render", "data import songs"] {
        // Nothing in an import is random: its first unknown key is `seed`.
        let parts = ["`run.toml`", "unknown field `s", "expected one of"];
        refused(dir, &format!("{command} --out new --config run.toml"), &parts);
        let set = "--set clip.duration=4";
        refused(
            dir,
            &format!("{command} --out new {set}"),
            &["unknown field `duration`", "`duration_s`", set],
        );
    }
    refused(dir, "generate harp --out new --config no.toml", &["cannot read the config `no.toml`"]);
    std::fs::write(dir.join("run.toml"), "seed = \n").unwrap();
    refused(dir, "generate harp --out new --config run.toml", &["`run.toml` is not valid TOML"]);
}

#[test]
fn a_zero_batch_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir_all(dir.join("run")).unwrap();
    for (command, key) in [
        ("finetune", "rollout.batch"),
        ("finetune", "update.micro_batch"),
        ("finetune", "eval.batch"),
        ("eval run", "batch"),
        ("generate harp", "batch"),
        ("pretrain vae", "vae.batch"),
        ("pretrain clap", "clap.batch"),
        ("pretrain dit", "train.batch"),
    ] {
        let name = key.strip_prefix("eval.").unwrap_or(key);
        let problem = format!("config key `{name}`: expected at least ");
        let parts = [problem.as_str(), "found 0"];
        refused(dir, &format!("{command} --out new --set {key}=0"), &parts);
        let wrong = format!("{command} --out new --set {key}=many");
        refused(dir, &wrong, &["invalid type: string \"many\"", &format!("{key}=many")]);
    }
}

#[test]
fn impossible_sizes_of_a_corpus_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_tone(&dir.join("songs/a.wav"), 6.0, 0.3);
    for command in ["data fetch", "data render", "data import songs"] {
        for (set, expected, found) in [
            ("clip.sample_rate_hz=0", "8000 to 96000 Hz", "0"),
            ("clip.duration_s=0", "0.4 to 600 s", "0"),
            ("clip.duration_s=-5", "0.4 to 600 s", "-5"),
            ("split.test_percent=101", "at most 100", "101"),
        ] {
            let key = set.split('=').next().unwrap();
            let parts = [&format!("config key `{key}`: expected {expected}"), &format!("found {found}")];
            refused(dir, &format!("{command} --out new --set {set}"), &parts.map(String::as_str));
        }
        let negative = format!("{command} --out new --set split.valid_percent=-1");
        refused(dir, &negative, &["split.valid_percent=-1", "integer `-1`"]);
    }
    for (command, key) in [
        ("data fetch --clips", "n_clips"),
        ("data render --clips", "n_clips"),
        ("data import songs --clips-per-file", "max_clips_per_file"),
    ] {
        let problem = format!("config key `{key}`: expected at least 1, found 0");
        refused(dir, &format!("{command} 0 --out new"), &[&problem]);
    }
    refused(dir, "data render --out new --tunes songs", &["`soundfont`: expected a path beside `tunes`"]);
    accepted(dir, "data import songs --out new --set clip.duration_s=2 --set clip.sample_rate_hz=8000");
    let manifest = std::fs::read_to_string(dir.join("new/manifest.jsonl")).unwrap();
    assert_eq!(manifest.matches("\"duration_s\":2.0,\"sample_rate_hz\":8000").count(), 3, "{manifest}");
}

#[test]
fn a_sample_rate_that_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    let vae = pretrain_vae("corpus/manifest.jsonl");
    refused(
        dir,
        &format!("{vae} --out new --set vae.model.sample_rate_hz=44100"),
        &[
            "`vae.model.sample_rate_hz`",
            "expected at most 16000 Hz, the rate of the clip `c0`",
            "found 44100 Hz",
        ],
    );
    refused(
        dir,
        &format!("{vae} --out new --set vae.model.sample_rate_hz=0"),
        &["sample_rate_hz", "found 0"],
    );
    let clap = "pretrain clap --out new --set clap.manifests=[\"corpus/manifest.jsonl\"]";
    refused(
        dir,
        &format!("{clap} --set clap.model.audio.sample_rate_hz=48000"),
        &["`clap.model.audio.sample_rate_hz`", "expected at most 16000 Hz", "found 48000 Hz"],
    );
    refused(dir, &format!("{clap} --set clap.model.audio.f_max_hz=9000.0"), &["f_max", "9000"]);
    // A file with a header that cannot be true.
    let strange = Clip { sample_rate_hz: 10, ..tone(1.0, 0.3) };
    std::fs::create_dir(dir.join("songs")).unwrap();
    write_wav(&dir.join("songs/a.wav"), &strange, SampleFormat::Int16).unwrap();
    for command in ["embed songs --out songs.npz", "data import songs --out new"] {
        refused(dir, command, &["a.wav", "expected 1000 to 768000 Hz, found 10 Hz"]);
    }
}

/// Runs the binary with a limit on the size of files, which stands for a full disk: every write beyond it fails.
#[cfg(unix)]
fn with_full_disk(dir: &Path, kib: usize, args: &str) -> std::process::Output {
    // The size limit's signal would end the process; ignored, the write itself fails, as on a full disk.
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", 2 * kib);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_dragon")]).args(args.split_whitespace());
    quiet(&mut command, dir);
    command.output().unwrap()
}

#[cfg(unix)]
#[test]
fn a_full_disk_while_saving_loses_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    let vae = format!(
        "{} --set run.checkpoint_every=2 --set run.validate_every=0",
        pretrain_vae("corpus/manifest.jsonl")
    );
    accepted(dir, &format!("{vae} --out whole --set run.steps=4"));
    accepted(dir, &format!("{vae} --out run --set run.steps=2"));
    let kept = files(&dir.join("run/checkpoints"));
    let model = std::fs::read(dir.join("run/model/model.safetensors")).unwrap();
    let output = with_full_disk(dir, 16, &format!("{vae} --out run --set run.steps=4 --resume"));
    check_refusal(
        "a full disk",
        &output,
        &["cannot write", "state.safetensors", "what was saved before is still whole"],
    );
    assert_eq!(files(&dir.join("run/checkpoints")), kept, "the earlier checkpoint stays, and no other");
    assert_eq!(std::fs::read(dir.join("run/model/model.safetensors")).unwrap(), model);
    // With room again, the run goes on as if nothing had happened.
    accepted(dir, &format!("{vae} --out run --set run.steps=4 --resume"));
    for file in ["metrics.jsonl", "checkpoints/step-000004/state.safetensors", "model/model.safetensors"] {
        let read = |run: &str| std::fs::read(dir.join(run).join(file)).unwrap();
        assert!(read("run") == read("whole"), "{file} differs");
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_half_of_an_output() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_tone(&dir.join("songs/a.wav"), 6.0, 0.3);
    write_tone(&dir.join("songs/b.wav"), 6.0, 0.2);
    let before = files(dir);
    for (command, kib) in [
        ("data import songs --out new", 64),
        ("embed songs --out songs.npz", 4),
        ("stats songs --out songs.npz", 64),
        ("generate harp --out . --steps 1", 64),
        ("eval songs songs --out . --set n_prompts=2", 1),
    ] {
        let output = with_full_disk(dir, kib, command);
        check_refusal(command, &output, &["File too large"]);
        assert_eq!(files(dir), before, "dragon {command} left something behind");
    }
}

#[cfg(unix)]
#[test]
fn two_runs_in_one_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    let vae = pretrain_vae("corpus/manifest.jsonl");
    let long =
        format!("{vae} --out run --set run.steps=1000000 --set run.log_every=1 --set run.validate_every=0");
    let mut first = command(dir)
        .args(long.split_whitespace())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(first.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("step 1/")), "the first run ended by itself");
    let in_use = format!("in use by process {}", first.id());
    for resume in ["", " --resume"] {
        let output = dragon(dir, &format!("{vae} --out run{resume}"));
        check_refusal("a second run", &output, &["`run`", &in_use, "--out"]);
    }
    assert!(first.try_wait().unwrap().is_none(), "the first run goes on");
    interrupt(&first);
    for line in lines {
        line.unwrap(); // until it ends
    }
    assert!(first.wait().unwrap().success(), "the first run ends cleanly");
    refused(dir, &format!("{vae} --out run"), &["holds a run already", "--resume"]);
}

#[cfg(unix)]
fn interrupt(child: &std::process::Child) {
    assert!(
        std::process::Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn a_run_is_not_continued_with_another_config_or_from_a_damaged_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    corpus(dir);
    let vae = format!("{} --out run --set run.validate_every=0", pretrain_vae("corpus/manifest.jsonl"));
    accepted(dir, &format!("{vae} --set run.steps=1"));
    refused(
        dir,
        &format!("{vae} --resume --set vae.training.lr=0.5"),
        &["vae.training.lr: the run has 0.0008, this command 0.5"],
    );
    let state = dir.join("run/checkpoints/step-000001/state.safetensors");
    let mut bytes = std::fs::read(&state).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&state, bytes).unwrap();
    refused(dir, &format!("{vae} --resume --set run.steps=2"), &["step-000001", "damaged"]);
}
