//! Output folders that can be gone on with, and the names of the clips in them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::clips::Form;
use crate::error::{Error, Result};
use crate::manifest::{Entry, Shares};

/// An output folder that can be gone on with: settings, finished entries, manifest.
pub(crate) struct Store {
    out: PathBuf,
    kept: HashMap<String, Entry>,
}

impl Store {
    /// Opens or creates a folder of clips of one form; refuses one made with other settings.
    pub(crate) fn open(out: &Path, settings_name: &str, settings: &Value, form: &Form) -> Result<Store> {
        // What a folder that does not say was made with: these were constants first.
        let constants = json!({
            "min_track_s": 25.0,
            "clip": Form::default(),
            "split": Shares::default(),
        });
        let path = out.join(settings_name);
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(Error::io(&path, "read"))?;
            let found: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
            for (key, value) in settings.as_object().expect("settings are an object") {
                let found = found.get(key).or_else(|| constants.get(key));
                if found != Some(value) {
                    let found = found.map_or("absent".into(), Value::to_string);
                    let (key, expected) = (key.clone(), value.to_string());
                    return Err(Error::OtherSettings { path: out.to_path_buf(), key, expected, found });
                }
            }
        } else {
            let text = serde_json::to_string_pretty(settings).expect("settings are plain JSON") + "\n";
            dragon_audio::write::write_atomic(&path, text.as_bytes()).map_err(Error::io(&path, "written"))?;
        }
        let mut kept = HashMap::new();
        // a line cut off by a crash is simply made again
        for name in ["manifest.jsonl", "progress.jsonl"] {
            let text = fs::read_to_string(out.join(name)).unwrap_or_default();
            for entry in text.lines().filter_map(|line| serde_json::from_str::<Entry>(line).ok()) {
                if form.is_stored(&out.join(&entry.path)) {
                    kept.insert(entry.id.clone(), entry);
                }
            }
        }
        Ok(Store { out: out.to_path_buf(), kept })
    }

    /// An entry whose clip is in the folder.
    pub(crate) fn kept(&self, id: &str) -> Option<&Entry> {
        self.kept.get(id)
    }

    /// Notes finished clips, so that a later run keeps them.
    pub(crate) fn append(&self, entries: &[Entry]) -> Result<()> {
        use std::io::Write;
        let path = self.out.join("progress.jsonl");
        let text: String = entries.iter().map(crate::manifest::to_line).collect();
        fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(Error::io(&path, "written"))
    }

    /// Writes the manifest; the notes are no longer needed.
    pub(crate) fn finish(&self, entries: &[Entry]) -> Result<()> {
        crate::manifest::write_manifest(&self.out.join("manifest.jsonl"), entries)?;
        let notes = self.out.join("progress.jsonl");
        match fs::remove_file(&notes) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&notes, "removed")(e)),
            _ => Ok(()),
        }
    }
}

/// Lower-case letters and digits with single dashes between.
pub(crate) fn slug(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_ascii_alphanumeric() {
            out.push(c.to_ascii_lowercase());
        } else if !c.is_ascii() && c.is_alphanumeric() {
            out.extend(c.to_lowercase());
        } else if !out.is_empty() && !out.ends_with('-') && c != '\'' {
            out.push('-');
        }
    }
    out.trim_end_matches('-').to_string()
}
