//! Snapshots of every `--help` and of the likeliest mistakes. `DRAGON_BLESS=1 cargo test --release --workspace` writes
//! them anew; read the difference before it is committed.

mod common;

use std::path::Path;

use common::*;

/// Compares a text with `tests/help/NAME.txt`, or writes that file if `DRAGON_BLESS` is set.
fn snapshot(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help").join(format!("{name}.txt"));
    if std::env::var_os("DRAGON_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        return;
    }
    let known = std::fs::read_to_string(&path)
        .unwrap_or_else(|err| panic!("{}: {err}; write it with DRAGON_BLESS=1", path.display()));
    assert!(
        text == known,
        "{} differs; if this is meant, write it anew with DRAGON_BLESS=1\n--- now ---\n{text}",
        path.display()
    );
}

/// The commands, as they appear under `Commands:` in a help text.
fn commands(help: &str) -> Vec<String> {
    let part = help.split("Commands:\n").nth(1).unwrap_or_default();
    let lines = part.lines().take_while(|line| !line.is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_command_explains_itself_with_examples() {
    let dir = tempfile::tempdir().unwrap();
    let help = accepted(dir.path(), "--help");
    snapshot("dragon", &help);
    assert!(commands(&help).len() >= 8, "{help}");
    for command in commands(&help) {
        let help = accepted(dir.path(), &format!("{command} --help"));
        snapshot(&command, &help);
        let below = commands(&help);
        for sub in &below {
            let help = accepted(dir.path(), &format!("{command} {sub} --help"));
            snapshot(&format!("{command}-{sub}"), &help);
            assert!(help.contains("Example"), "`dragon {command} {sub} --help` has no example");
        }
        assert!(!below.is_empty() || help.contains("Example"), "`dragon {command} --help` has no example");
    }
}

#[test]
fn a_help_text_does_not_depend_on_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let wide = accepted(dir.path(), "finetune --help");
    let narrow = command(dir.path()).args(["finetune", "--help"]).env("COLUMNS", "40").output().unwrap();
    assert_eq!(wide, String::from_utf8_lossy(&narrow.stdout));
}

/// The ten likeliest mistakes, and what is said.
#[test]
fn the_likeliest_mistakes_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("songs")).unwrap();
    std::fs::write(dir.join("songs/notes.wav"), "la la la\n").unwrap();
    let mut text = String::new();
    for args in [
        "finetun",
        "generate",
        "finetune --step 20",
        "finetune --set run.step=20",
        "finetune --set run.steps",
        "finetune --set run.steps=many",
        "finetune --device gpu",
        "finetune --preset per-song",
        "embed song -o songs.npz",
        "embed songs -o songs.npz",
        "embed songs -o songs.csv",
        "eval runs/finetune",
        "pretrain dit",
        "pretrain --set vae.batch=4",
    ] {
        let output = dragon(dir, args);
        assert_eq!(output.status.code(), Some(1), "dragon {args}");
        text += &format!("$ dragon {args}\n{}\n", stderr(&output).trim_end().replace("dragon.exe", "dragon"));
        text.push('\n');
    }
    snapshot("mistakes", &text);
}
