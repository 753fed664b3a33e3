//! `docs/config.md` is made of the presets' comments: a key, its default, what it means, and the paper's value.
//!
//! `DRAGON_BLESS=1 cargo test --release --workspace` writes it anew.

mod common;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use common::{refused, write_tone};

/// The presets in the order of the documentation, with the command that reads each.
const PRESETS: &[(&str, &str)] = &[
    ("finetune/per-song-fad", "dragon finetune"),
    ("finetune/clap-score", "dragon finetune --preset clap-score"),
    ("finetune/per-song-fad-text", "dragon finetune --preset per-song-fad-text"),
    ("finetune/dataset-fad", "dragon finetune --preset dataset-fad"),
    ("finetune/vendi", "dragon finetune --preset vendi"),
    ("finetune/stable-audio", "dragon finetune --preset stable-audio"),
    ("eval/default", "dragon eval"),
    ("eval/stable-audio", "dragon eval --model DIR"),
    ("card/default", "dragon card"),
    ("generate/default", "dragon generate"),
    ("generate/stable-audio", "dragon generate --model DIR, Stable Audio Open"),
    ("generate/musicgen", "dragon generate --model DIR, MusicGen"),
    ("embed/default", "dragon embed, stats"),
    ("score/default", "dragon score"),
    ("data/fetch", "dragon data fetch"),
    ("data/render", "dragon data render"),
    ("data/import", "dragon data import"),
    ("pretrain/vae", "dragon pretrain vae"),
    ("pretrain/vae-decoder", "dragon pretrain vae-decoder"),
    ("pretrain/vae-joint", "dragon pretrain vae-joint"),
    ("pretrain/clap", "dragon pretrain clap"),
    ("pretrain/dit", "dragon pretrain dit"),
];

const HEAD: &str = "\
# Configuration

Made from the presets in `crates/dragon-cli/presets/`; change them, not this file, and write it anew with
`DRAGON_BLESS=1 cargo test --release --workspace --test config_doc`.

A command takes its preset, or the file given by `--config`, then each `--set KEY=VALUE` in order; `--seed N` is short
for `--set seed=N`. Values are TOML; a word that is none is a string. A key that does not exist is an error. Paths that
start with `builtin:` lie in `fixtures/`. A key whose default is none is optional, and the text says what holds without it.
The last column has the value of the DRAGON paper, or `unknown` where it has such a setting and does not tell it.

A file may begin with a preset and say what differs; a table of another `kind` replaces the one below whole.
`dragon finetune --config FILE` takes each of these:

```toml
# DPO (paper eq. 6) with adapters, towards the music in a folder
extends = \"finetune/dataset-fad\"

[reward.exemplars]
kind = \"audio\"
path = \"my-songs\"

[loss]
kind = \"dpo\"
beta = 50.0

[update.lora]
rank = 8
alpha = 8.0
targets = [\"query\", \"key\", \"value\", \"attention_out\"]
```

```toml
# MaPO (Hong et al. 2024), which has no reference model
extends = \"finetune/per-song-fad\"

[loss]
kind = \"mapo\"
b = 0.1
```

```toml
# several rewards at once, each in units of its own deviation
extends = \"finetune/per-song-fad\"

[reward]
kind = \"weighted_sum\"

[[reward.terms]]
weight = 1.0
reward = { kind = \"clap_score\", encoder = \"clap\", setting = \"ma\", clip = \"before_mean\" }

[[reward.terms]]
weight = 0.5
reward = { kind = \"vendi\", encoder = \"musicnn\", setting = \"windows\", pooling = \"song_mean\" }
```

```toml
# several rewards, one drawn at every step (paper 5.5)
extends = \"finetune/per-song-fad\"

[reward]
kind = \"random_mix\"

[[reward.rewards]]
kind = \"clap_score\"
encoder = \"clap\"
setting = \"ma\"
clip = \"before_mean\"

[[reward.rewards]]
kind = \"vendi\"
encoder = \"musicnn\"
setting = \"windows\"
pooling = \"song_mean\"
```
";

/// A line of a preset that sets a key, also one that is commented out.
struct Key {
    name: String,
    value: String,
    comment: String,
    optional: bool,
}

fn key_of(line: &str) -> Option<Key> {
    let optional = line.starts_with("# ");
    let line = line.strip_prefix("# ").unwrap_or(line);
    let (name, rest) = line.split_once(" = ")?;
    if !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
        return None;
    }
    // The comment begins at the first `#` outside of quotes.
    let mut quoted = false;
    let at = rest.char_indices().find(|&(_, c)| {
        quoted ^= c == '"';
        c == '#' && !quoted
    });
    let (value, comment) = match at {
        Some((at, _)) => (&rest[..at], rest[at + 1..].trim()),
        None => (rest, ""),
    };
    Some(Key { name: name.into(), value: value.trim().into(), comment: comment.into(), optional })
}

/// One table of a preset: its header without brackets, what its header's comment says, its keys.
struct Section {
    header: String,
    repeated: bool,
    comment: String,
    keys: Vec<Key>,
}

fn sections(text: &str) -> (String, Vec<Section>) {
    let (mut lead, mut all) = (Vec::new(), vec![]);
    let new = |header: &str, repeated: bool, comment: &str| Section {
        header: header.into(),
        repeated,
        comment: comment.trim().into(),
        keys: Vec::new(),
    };
    all.push(new("", false, ""));
    for line in text.lines() {
        let last = all.len() - 1;
        if let Some(key) = key_of(line) {
            all[last].keys.push(key);
        } else if let Some(rest) = line.strip_prefix("[[") {
            let (header, rest) = rest.split_once("]]").unwrap();
            all.push(new(header, true, rest.split_once('#').map_or("", |(_, c)| c)));
        } else if let Some(rest) = line.strip_prefix('[') {
            let (header, rest) = rest.split_once(']').unwrap();
            all.push(new(header, false, rest.split_once('#').map_or("", |(_, c)| c)));
        } else if let Some(comment) = line.strip_prefix('#')
            && last == 0
            && all[0].keys.is_empty()
        {
            lead.push(comment.trim().to_owned());
        } else {
            assert!(line.trim().is_empty(), "a line that is no key, header or blank: {line}");
        }
    }
    all.retain(|section| !section.keys.is_empty() || !section.comment.is_empty());
    (lead.join("\n"), all)
}

/// The sections with each header once and each key once: a second entry of a list has nothing new to explain.
fn merged(sections: Vec<Section>) -> Vec<Section> {
    let mut all: Vec<Section> = Vec::new();
    for section in sections {
        match all.iter_mut().find(|known| known.header == section.header) {
            Some(known) => known.keys.extend(section.keys),
            None => all.push(section),
        }
    }
    for section in &mut all {
        let mut seen = HashSet::new();
        section.keys.retain(|key| !key.comment.is_empty() && seen.insert(key.name.clone()));
    }
    all.retain(|section| !section.keys.is_empty());
    all
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn preset(name: &str) -> String {
    let path = root().join("crates/dragon-cli/presets").join(format!("{name}.toml"));
    std::fs::read_to_string(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

#[test]
fn every_preset_is_documented() {
    let mut found = Vec::new();
    for folder in std::fs::read_dir(root().join("crates/dragon-cli/presets")).unwrap() {
        let folder = folder.unwrap().path();
        for file in std::fs::read_dir(&folder).unwrap() {
            let file = file.unwrap().path();
            let name = |path: &Path| path.file_stem().unwrap().to_string_lossy().into_owned();
            found.push(format!("{}/{}", name(&folder), name(&file)));
        }
    }
    found.sort();
    let mut known: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
    known.sort();
    assert_eq!(found, known, "list the preset in this test");
}

/// A key that appears again in a repeated table, such as a second metric, need not be explained again.
#[test]
fn every_key_of_every_preset_has_a_comment() {
    for (name, _) in PRESETS {
        let mut explained = HashSet::new();
        for section in sections(&preset(name)).1 {
            for key in section.keys {
                let path = format!("{}.{}", section.header, key.name);
                let known = !explained.insert(path.clone()) || key.name == "exemplars";
                assert!(known || !key.comment.is_empty(), "{name}: `{path}` has no comment");
            }
        }
    }
}

#[test]
fn the_documentation_is_made_of_the_presets() {
    let mut out = String::from(HEAD);
    for (name, command) in PRESETS {
        let (lead, sections) = sections(&preset(name));
        let _ = write!(out, "\n## `{command}`: preset `{name}`\n\n{lead}\n");
        for section in merged(sections) {
            let brackets = if section.repeated { ("[[", "]]") } else { ("[", "]") };
            if !section.header.is_empty() {
                let _ = write!(out, "\n### `{}{}{}`\n", brackets.0, section.header, brackets.1);
            }
            if !section.comment.is_empty() {
                let _ = write!(out, "\n{}\n", section.comment);
            }
            out.push_str("\n| key | default | meaning and unit | paper |\n| --- | --- | --- | --- |\n");
            for key in section.keys {
                let default = match key.optional {
                    true => format!("none, e.g. `{}`", key.value),
                    false => format!("`{}`", key.value),
                };
                let (meaning, paper) = key.comment.split_once("paper: ").unwrap_or((&key.comment, ""));
                let meaning = meaning.trim().trim_end_matches(';');
                let cell = |text: &str| text.replace('|', "\\|");
                let (default, meaning, paper) = (cell(&default), cell(meaning), cell(paper));
                let _ = writeln!(out, "| `{}` | {default} | {meaning} | {paper} |", key.name);
            }
        }
    }
    let path = root().join("docs/config.md");
    if std::env::var_os("DRAGON_BLESS").is_some() {
        std::fs::write(&path, &out).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(known == out, "docs/config.md is not what the presets say: write it anew with DRAGON_BLESS=1");
}

/// Each example of a file must be read, up to a key that is made wrong.
#[test]
fn the_examples_of_files_are_valid() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("my-songs")).unwrap();
    for name in ["a.wav", "b.wav"] {
        write_tone(&dir.path().join("my-songs").join(name), 6.0, 0.3);
    }
    let examples: Vec<&str> =
        HEAD.split("```toml\n").skip(1).filter_map(|text| text.split("```").next()).collect();
    assert_eq!(examples.len(), 4);
    for example in examples {
        std::fs::write(dir.path().join("own.toml"), example).unwrap();
        let command = "finetune --config own.toml --out new --set eval.n_prompts=1";
        refused(dir.path(), command, &["`n_prompts`", "at least 2"]);
    }
}
