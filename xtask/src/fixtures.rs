//! `cargo xtask fixtures`: what lies under `fixtures/`, with sizes and hashes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// Limits of `fixtures/`, in bytes: the embedded default, the music excerpts, and all the rest.
const LIMITS: [(&str, u64); 3] = [("tiny/", 24 << 20), ("music/", 6 << 20), ("", 16 << 20)];

/// Lists the fixtures; `--write` renews the list, `--check` compares with it and with the size limits.
pub fn run(root: &Path, args: &[String]) -> Result<()> {
    let folder = root.join("fixtures");
    let list = folder.join("MANIFEST.tsv");
    let found = scan(&folder)?;
    let text: String = found.iter().map(|(name, (size, hash))| format!("{hash}\t{size}\t{name}\n")).collect();
    match args.first().map(String::as_str) {
        None => print!("{text}"),
        Some("--write") => {
            fs::write(&list, text).with_context(|| format!("cannot write {}", list.display()))?
        }
        Some("--check") => {
            check_sizes(&found)?;
            let wanted =
                fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
            let ours: Vec<&str> = text.lines().collect();
            let theirs: Vec<&str> = wanted.lines().collect();
            let changed: Vec<String> = ours
                .iter()
                .filter(|line| !theirs.contains(line))
                .map(|line| format!("  new or changed: {line}"))
                .chain(
                    theirs
                        .iter()
                        .filter(|line| !ours.contains(line))
                        .map(|line| format!("  listed:         {line}")),
                )
                .collect();
            if !changed.is_empty() {
                bail!(
                    "fixtures/ does not agree with {}\n{}\nhint: after a change on purpose, run `cargo xtask fixtures --write`",
                    list.display(),
                    changed.join("\n")
                );
            }
            println!("{} fixtures agree with their list", found.len());
        }
        Some(other) => bail!("`fixtures` takes --check or --write, not `{other}`"),
    }
    Ok(())
}

fn check_sizes(found: &BTreeMap<String, (u64, String)>) -> Result<()> {
    let mut sums = [0u64; LIMITS.len()];
    for (name, (size, _)) in found {
        let group =
            LIMITS.iter().position(|(prefix, _)| name.starts_with(prefix)).expect("the last prefix is empty");
        sums[group] += size;
    }
    for ((prefix, limit), sum) in LIMITS.iter().zip(sums) {
        if sum > *limit {
            bail!("fixtures/{prefix} holds {sum} bytes, more than its limit of {limit}");
        }
    }
    Ok(())
}

/// Every file below `folder` except the list itself: name -> (size, SHA-256).
fn scan(folder: &Path) -> Result<BTreeMap<String, (u64, String)>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(dir) = open.pop() {
        let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
        for entry in entries {
            let path: PathBuf = entry?.path();
            let name =
                path.strip_prefix(folder).expect("inside the folder").to_string_lossy().replace('\\', "/");
            if path.is_dir() {
                if !name.ends_with("__pycache__") {
                    open.push(path);
                }
            } else if name != "MANIFEST.tsv" {
                let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                let hash = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
                found.insert(name, (bytes.len() as u64, hash));
            }
        }
    }
    Ok(found)
}
