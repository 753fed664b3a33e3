//! From a preset, a config file and `--set` overrides to one checked config.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// The presets that ship inside the binary: name and text.
pub const PRESETS: &[(&str, &str)] = &[
    ("finetune/per-song-fad", include_str!("../presets/finetune/per-song-fad.toml")),
    ("finetune/clap-score", include_str!("../presets/finetune/clap-score.toml")),
    ("finetune/per-song-fad-text", include_str!("../presets/finetune/per-song-fad-text.toml")),
    ("finetune/dataset-fad", include_str!("../presets/finetune/dataset-fad.toml")),
    ("finetune/vendi", include_str!("../presets/finetune/vendi.toml")),
    ("finetune/stable-audio", include_str!("../presets/finetune/stable-audio.toml")),
    ("card/default", include_str!("../presets/card/default.toml")),
    ("eval/default", include_str!("../presets/eval/default.toml")),
    ("eval/stable-audio", include_str!("../presets/eval/stable-audio.toml")),
    ("pretrain/vae", include_str!("../presets/pretrain/vae.toml")),
    ("pretrain/vae-decoder", include_str!("../presets/pretrain/vae-decoder.toml")),
    ("pretrain/vae-joint", include_str!("../presets/pretrain/vae-joint.toml")),
    ("pretrain/clap", include_str!("../presets/pretrain/clap.toml")),
    ("pretrain/dit", include_str!("../presets/pretrain/dit.toml")),
    ("generate/default", include_str!("../presets/generate/default.toml")),
    ("generate/stable-audio", include_str!("../presets/generate/stable-audio.toml")),
    ("generate/musicgen", include_str!("../presets/generate/musicgen.toml")),
    ("embed/default", include_str!("../presets/embed/default.toml")),
    ("score/default", include_str!("../presets/score/default.toml")),
    ("data/fetch", include_str!("../presets/data/fetch.toml")),
    ("data/render", include_str!("../presets/data/render.toml")),
    ("data/import", include_str!("../presets/data/import.toml")),
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

/// A path as a TOML string.
pub fn quoted(path: &Path) -> String {
    Value::String(path.to_string_lossy().into_owned()).to_string()
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
pub fn resolve<T: DeserializeOwned + Serialize>(
    preset: &str,
    file: Option<&Path>,
    overrides: &[String],
) -> Result<T> {
    read(table(preset, file, overrides)?, &origin(preset, file, overrides))
}

/// What a config was made of, for messages.
pub fn origin(preset: &str, file: Option<&Path>, overrides: &[String]) -> String {
    let mut text = match file {
        Some(path) => format!("the config `{}`", path.display()),
        None => format!("preset `{preset}`"),
    };
    if !overrides.is_empty() {
        text += &format!(" with --set {}", overrides.join(" --set "));
    }
    text
}

/// The preset (or the file) as a table, with the overrides applied and shipped paths resolved.
///
/// # Errors
/// If the file cannot be read or is not TOML, or an override has no form. Whether its key exists is found by [`read`].
pub fn table(preset: &str, file: Option<&Path>, overrides: &[String]) -> Result<Table> {
    let text = match file {
        Some(path) => std::fs::read_to_string(path).with_context(|| {
            format!("cannot read the config `{}`\nhint: check the path; it is a TOML file", path.display())
        })?,
        None => preset_text(preset)?.to_owned(),
    };
    let table: Table = text.parse().map_err(|err: toml::de::Error| {
        anyhow!("{} is not valid TOML\n{}\nhint: a text needs quotes; the presets in crates/dragon-cli/presets show the form", origin(preset, file, &[]), err.to_string().trim_end())
    })?;
    let mut table = extended(table).with_context(|| origin(preset, file, &[]))?;
    for item in overrides {
        apply(&mut table, item)?;
    }
    table.iter_mut().for_each(|(_, value)| expand(value));
    Ok(table)
}

/// A table whose key `extends` names a preset: that preset with what the table says laid over it.
fn extended(mut table: Table) -> Result<Table> {
    let Some(name) = table.remove("extends") else { return Ok(table) };
    let Some(name) = name.as_str() else {
        bail!(
            "`extends` is {name}\nhint: it takes the name of a preset, as in extends = \"finetune/per-song-fad\""
        );
    };
    let mut under = extended(preset_text(name)?.parse()?)?;
    overlay(&mut under, table);
    Ok(under)
}

/// Lays `over` on `under`, table by table. A table of another `kind` replaces the one below whole, since their keys differ;
/// so does every list.
pub fn overlay(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above))
                if above.get("kind").is_none_or(|kind| below.get("kind") == Some(kind)) =>
            {
                overlay(below, above);
            }
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// A table as a config; `origin` names it in errors.
///
/// # Errors
/// If the table does not fit `T`, or holds a key that `T` would ignore.
pub fn read<T: DeserializeOwned + Serialize>(table: Table, origin: &str) -> Result<T> {
    let refuse = |problem: &str| {
        let hint = match nearest(problem) {
            Some(key) => format!("did you mean `{key}`?"),
            None if origin.contains(".kind=") && problem.contains(" field `") => {
                "another kind has other keys: set the whole table, as in --set 'loss={kind=\"dpo\",beta=50.0}'".to_owned()
            }
            None => "docs/config.md lists the keys with their values".to_owned(),
        };
        anyhow!("{origin} is not a valid config\n  {}\nhint: {hint}", problem.trim().replace('\n', "\n  "))
    };
    let config = T::deserialize(Value::Table(table.clone())).map_err(|err| refuse(&err.to_string()))?;
    // Some configs allow unknown keys, since the files of others have them; here such a key is a typing error.
    let used = Table::try_from(&config).map_err(|err| refuse(&err.to_string()))?;
    match ignored(&table, &used, "") {
        Some(problem) => Err(refuse(&problem)),
        None => Ok(config),
    }
}

/// The first key of `given` that is not in `used`, as a sentence like serde's.
fn ignored(given: &Table, used: &Table, section: &str) -> Option<String> {
    given.iter().find_map(|(key, value)| match (value, used.get(key)) {
        (Value::Table(given), Some(Value::Table(used))) => ignored(given, used, &format!("{section}{key}.")),
        (_, Some(_)) => None,
        (_, None) => {
            let known: Vec<String> = used.keys().map(|key| format!("`{key}`")).collect();
            let place = section.trim_end_matches('.');
            Some(format!("unknown field `{key}`, expected one of {}\nin `{place}`", known.join(", ")))
        }
    })
}

/// The key that is nearest to the unknown one in a message "unknown field `x`, expected one of `a`, `b`".
fn nearest(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("unknown field `")?;
    let (given, rest) = rest.split_once('`')?;
    let known = rest.lines().next()?.split('`').skip(1).step_by(2);
    let (distance, key) = known.map(|key| (distance(given, key), key)).min()?;
    (distance <= 1 + given.len() / 4).then(|| key.to_owned())
}

/// How many letters must be added, removed or changed to make `b` of `a`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn preset_text(name: &str) -> Result<&'static str> {
    PRESETS.iter().find(|(n, _)| *n == name).map(|(_, text)| *text).ok_or_else(|| {
        let folder = name.split_once('/').map_or("", |(folder, _)| folder);
        let known = PRESETS.iter().filter_map(|(n, _)| n.strip_prefix(folder)?.strip_prefix('/'));
        anyhow!("there is no preset `{name}`\nhint: presets are {}", known.collect::<Vec<_>>().join(", "))
    })
}

/// Applies `path.to.key=value`; the value is TOML, or a bare string. Keys that the table lacks are added: whether they
/// exist is known to the config's type, which refuses unknown ones ([`read`]).
fn apply(table: &mut Table, item: &str) -> Result<()> {
    let Some((path, value)) = item.split_once('=') else {
        bail!("`--set {item}` has no `=`\nhint: write --set run.steps=20");
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
        let child = node.entry(parent).or_insert_with(|| Value::Table(Table::new()));
        node = child.as_table_mut().ok_or_else(|| {
            anyhow!("`--set {item}`: `{parent}` is a value, not a section\nhint: write --set {parent}=VALUE")
        })?;
    }
    // An integer given for a float key is that float: `lr=1` means 1.0.
    let value = match (node.get(key), value) {
        (Some(Value::Float(_)), Value::Integer(i)) => Value::Float(i as f64),
        (_, value) => value,
    };
    node.insert(key.to_owned(), value);
    Ok(())
}

/// Checks that a preset shows every key that its config may have: set, or commented out if it is optional. `read` reads
/// the preset with some overrides.
///
/// # Panics
/// If a key is missing.
#[cfg(test)]
pub fn assert_every_key_is_shown(preset: &str, read: impl Fn(&[String]) -> Result<()>) {
    fn tables(table: &Table, path: &str, out: &mut Vec<(String, Table)>) {
        out.push((path.to_owned(), table.clone()));
        for (key, value) in table {
            if let Value::Table(table) = value {
                tables(table, &format!("{path}{key}."), out);
            }
        }
    }
    read(&[]).unwrap();
    let (mut text, mut name) = (String::new(), Some(preset.to_owned()));
    while let Some(preset) = name {
        let own = preset_text(&preset).unwrap();
        text += own;
        let own: Table = own.parse().unwrap();
        name = own.get("extends").map(|base| base.as_str().unwrap().to_owned());
    }
    let mut table = extended(preset_text(preset).unwrap().parse().unwrap()).unwrap();
    if let Some(Value::Table(mut own)) = table.remove("eval") {
        // What a fine-tuning preset leaves out of its table `eval` is shown by the preset below it.
        let below = own.remove("extends");
        let below = below.as_ref().and_then(Value::as_str).unwrap_or("eval/default");
        let mut eval = extended(preset_text(below).unwrap().parse().unwrap()).unwrap();
        overlay(&mut eval, own);
        text += preset_text("eval/default").unwrap();
        table.insert("eval".into(), Value::Table(eval));
    }
    let mut all = Vec::new();
    tables(&table, "", &mut all);
    let mut n_seen = 0;
    for (path, table) in all {
        // A config tells its keys when it refuses one.
        let message = format!("{:#}", read(&[format!("{path}no_such_key=1")]).unwrap_err());
        let Some((_, known)) = message.split_once("unknown field `no_such_key`, expected ") else { continue };
        let known = known.lines().next().unwrap().split('`').skip(1).step_by(2);
        for key in known.filter(|key| !table.contains_key(*key)) {
            assert!(text.contains(&format!("\n# {key} = ")), "preset `{preset}` does not show `{path}{key}`");
        }
        n_seen += 1;
    }
    assert!(n_seen > 0, "preset `{preset}`: no table told its keys");
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
    fn every_preset_with_weights_names_their_licence() {
        for (name, text) in PRESETS.iter().filter(|(name, _)| !name.starts_with("data/")) {
            let head = text.lines().take_while(|line| line.starts_with('#')).collect::<String>();
            let trained = name.starts_with("pretrain/");
            assert!(trained || head.to_lowercase().contains("licence"), "preset `{name}`");
        }
    }

    #[test]
    fn a_table_laid_over_another_keeps_what_it_does_not_name_unless_its_kind_differs() {
        let parse = |text: &str| -> Table { text.parse().unwrap() };
        let mut under = parse(
            "a = 1\nlist = [1, 2]\n[r]\nkind = \"x\"\nn = 1\n[s]\nkind = \"x\"\nn = 1\n[t]\nn = 1\nm = 2",
        );
        overlay(&mut under, parse("list = [3]\n[r]\nkind = \"y\"\n[s]\nkind = \"x\"\nm = 2\n[t]\nn = 5"));
        let expected =
            parse("a = 1\nlist = [3]\n[r]\nkind = \"y\"\n[s]\nkind = \"x\"\nn = 1\nm = 2\n[t]\nn = 5\nm = 2");
        assert_eq!(under, expected);
    }

    #[test]
    fn a_config_may_extend_a_preset_and_an_unknown_one_is_refused() {
        let extended = |text: &str| extended(text.parse().unwrap());
        let table = extended("extends = \"eval/default\"\nn_prompts = 7").unwrap();
        assert_eq!(table["n_prompts"].as_integer(), Some(7));
        assert!(table.contains_key("metrics") && !table.contains_key("extends"));
        let err = extended("extends = \"eval/defualt\"").unwrap_err().to_string();
        assert!(
            err.contains("there is no preset `eval/defualt`") && err.contains("presets are default"),
            "{err}"
        );
        assert!(extended("extends = 3").unwrap_err().to_string().contains("takes the name of a preset"));
    }

    #[test]
    fn a_builtin_path_leads_to_the_shipped_files() {
        let mut value = Value::Table("a = [\"builtin:tiny\"]\nb = \"x\"".parse().unwrap());
        expand(&mut value);
        assert!(value["a"][0].as_str().unwrap().ends_with("tiny"), "{value}");
        assert!(!value["a"][0].as_str().unwrap().contains("builtin"), "{value}");
        assert_eq!(value["b"].as_str(), Some("x"));
    }

    #[derive(Debug, Serialize, serde::Deserialize)]
    struct Config {
        seed: u64,
        train: Train,
    }
    #[derive(Debug, Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Train {
        steps: usize,
        lr: f64,
        name: String,
        init: Option<String>,
    }

    fn with(item: &str) -> Result<Config> {
        let mut t = table();
        apply(&mut t, item)?;
        read(t, &origin("train", None, &[item.to_owned()]))
    }

    #[test]
    fn an_override_may_set_an_optional_key_that_the_preset_leaves_out() {
        assert_eq!(with("train.init=weights").unwrap().train.init.as_deref(), Some("weights"));
    }

    #[test]
    fn an_override_of_an_unknown_key_names_the_known_ones() {
        let err = with("train.step=20").unwrap_err().to_string();
        for part in
            ["preset `train` with --set train.step=20", "unknown field `step`", "did you mean `steps`?"]
        {
            assert!(err.contains(part), "{err}");
        }
        let err = with("trainer.steps=20").unwrap_err().to_string();
        // `Config` itself would ignore unknown keys.
        assert!(err.contains("unknown field `trainer`") && err.contains("did you mean `train`?"), "{err}");
        let err = with("train.whatever=20").unwrap_err().to_string();
        assert!(err.contains("expected one of `steps`") && !err.contains("did you mean"), "{err}");
        assert!(with("seed.steps=20").unwrap_err().to_string().contains("is a value, not a section"));
        assert!(with("train.steps").unwrap_err().to_string().contains("no `=`"));
    }
}
