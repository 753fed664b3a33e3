//! From a preset, a config file and `--set` overrides to one checked config.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// The presets that ship inside the binary: name and text.
pub const PRESETS: &[(&str, &str)] = &[
    ("finetune/per-song-fad", include_str!("../presets/finetune/per-song-fad.toml")),
    ("card/default", include_str!("../presets/card/default.toml")),
    ("eval/default", include_str!("../presets/eval/default.toml")),
    ("pretrain/vae", include_str!("../presets/pretrain/vae.toml")),
    ("pretrain/clap", include_str!("../presets/pretrain/clap.toml")),
    ("pretrain/dit", include_str!("../presets/pretrain/dit.toml")),
];

/// Paths in a config that start with this word lie in the folder of shipped files, see [`shipped`].
const BUILTIN: &str = "builtin:";

/// The folder of shipped models, statistics and prompts: `$DRAGON_FIXTURES`, else `fixtures/` of the checkout that this
/// program was built from.
pub fn shipped() -> PathBuf {
    match std::env::var_os("DRAGON_FIXTURES") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures"),
    }
}

/// A path given by the user, which may start with `builtin:`.
pub fn path(given: &str) -> PathBuf {
    match given.strip_prefix(BUILTIN) {
        Some(rest) => {
            let path = shipped().join(rest);
            path.canonicalize().unwrap_or(path)
        }
        None => given.into(),
    }
}

/// Replaces every `builtin:…` in the config by its path.
fn expand(value: &mut Value) {
    match value {
        Value::String(text) if text.starts_with(BUILTIN) => *text = path(text).to_string_lossy().into_owned(),
        Value::Array(items) => items.iter_mut().for_each(expand),
        Value::Table(table) => table.iter_mut().for_each(|(_, v)| expand(v)),
        _ => {}
    }
}

/// Resolves a config: the preset (or the file `--config`) with the overrides applied, read strictly.
///
/// # Errors
/// If the file cannot be read, is not TOML, or the result does not fit `T`: an unknown key, a wrong type.
pub fn resolve<T: DeserializeOwned>(preset: &str, file: Option<&Path>, overrides: &[String]) -> Result<T> {
    let origin = file.map_or_else(|| format!("preset `{preset}`"), |path| path.display().to_string());
    read(table(preset, file, overrides)?, &origin)
}

/// The preset (or the file) as a table, with the overrides applied and shipped paths resolved.
///
/// # Errors
/// If the file cannot be read or is not TOML, or an override names no key.
pub fn table(preset: &str, file: Option<&Path>, overrides: &[String]) -> Result<Table> {
    let (origin, text) = match file {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the config `{}`", path.display()))?;
            (path.display().to_string(), text)
        }
        None => (format!("preset `{preset}`"), preset_text(preset)?.to_owned()),
    };
    let mut table: Table =
        text.parse().map_err(|err: toml::de::Error| anyhow!("{origin} is not valid TOML\n{err}"))?;
    for item in overrides {
        apply(&mut table, item)?;
    }
    table.iter_mut().for_each(|(_, value)| expand(value));
    Ok(table)
}

/// A table as a config; `origin` names it in errors.
///
/// # Errors
/// If the table does not fit `T`.
pub fn read<T: DeserializeOwned>(table: Table, origin: &str) -> Result<T> {
    T::deserialize(Value::Table(table)).map_err(|err| {
        anyhow!("{origin} is not a valid config\n  {}", err.to_string().trim().replace('\n', "\n  "))
    })
}

fn preset_text(name: &str) -> Result<&'static str> {
    PRESETS.iter().find(|(n, _)| *n == name).map(|(_, text)| *text).ok_or_else(|| {
        let names: Vec<&str> = PRESETS.iter().map(|(n, _)| *n).collect();
        anyhow!("there is no preset `{name}`\nhint: presets are {}", names.join(", "))
    })
}

/// Applies `path.to.key=value`; the value is TOML, or a bare string. The key must exist, so that a typing error is found.
fn apply(table: &mut Table, item: &str) -> Result<()> {
    let Some((path, value)) = item.split_once('=') else {
        bail!("`--set {item}` has no `=`\nhint: write --set train.steps=20");
    };
    let (path, value) = (path.trim(), value.trim());
    let value = format!("v = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let (parents, key) = match path.rsplit_once('.') {
        Some((parents, key)) => (parents.split('.').collect(), key),
        None => (Vec::new(), path),
    };
    let mut node = table;
    for parent in parents {
        let keys = node.keys().cloned().collect::<Vec<_>>().join(", ");
        node = node.get_mut(parent).and_then(Value::as_table_mut).ok_or_else(|| {
            anyhow!("`--set {item}`: there is no section `{parent}`\nhint: here are {keys}")
        })?;
    }
    if !node.contains_key(key) {
        let keys = node.keys().cloned().collect::<Vec<_>>().join(", ");
        bail!("`--set {item}`: there is no key `{key}`\nhint: here are {keys}");
    }
    // An integer given for a float key is that float: `lr=1` means 1.0.
    let value = match (&node[key], value) {
        (Value::Float(_), Value::Integer(i)) => Value::Float(i as f64),
        (_, value) => value,
    };
    node.insert(key.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        "seed = 1\n[train]\nsteps = 10\nlr = 0.5\nname = \"a\"".parse().unwrap()
    }

    #[test]
    fn an_override_replaces_a_value_of_any_type() {
        let mut t = table();
        for item in ["train.steps=20", "train.lr=1", "train.name=b", "seed = 7"] {
            apply(&mut t, item).unwrap();
        }
        let train = t["train"].as_table().unwrap();
        assert_eq!(train["steps"].as_integer(), Some(20));
        assert_eq!(train["lr"].as_float(), Some(1.0));
        assert_eq!(train["name"].as_str(), Some("b"));
        assert_eq!(t["seed"].as_integer(), Some(7));
    }

    #[test]
    fn a_builtin_path_leads_to_the_shipped_files() {
        let mut value = Value::Table("a = [\"builtin:tiny\"]\nb = \"x\"".parse().unwrap());
        expand(&mut value);
        assert!(value["a"][0].as_str().unwrap().ends_with("tiny"), "{value}");
        assert!(!value["a"][0].as_str().unwrap().contains("builtin"), "{value}");
        assert_eq!(value["b"].as_str(), Some("x"));
    }

    #[test]
    fn an_override_of_an_unknown_key_names_the_known_ones() {
        let err = apply(&mut table(), "train.step=20").unwrap_err().to_string();
        assert!(err.contains("there is no key `step`") && err.contains("steps"), "{err}");
        let err = apply(&mut table(), "trainer.steps=20").unwrap_err().to_string();
        assert!(err.contains("no section `trainer`") && err.contains("train"), "{err}");
        assert!(apply(&mut table(), "train.steps").unwrap_err().to_string().contains("no `=`"));
    }
}
