//! The manifest: one line of JSON per clip. Also read from CSV.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::rng::hash64;

/// One clip.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Unique name of the clip within its manifest.
    pub id: String,
    /// Name of the tune or track that the clip is from; clips of one piece are always in one split.
    pub piece: String,
    /// WAV file, relative to the manifest's folder.
    pub path: String,
    /// Where the clip starts in its piece, seconds.
    pub start_s: f64,
    /// Duration, seconds.
    pub duration_s: f64,
    /// Samples per second.
    pub sample_rate_hz: u32,
    /// What is heard, in words.
    pub caption: String,
    /// Where the caption is from.
    pub caption_source: CaptionSource,
    /// Training, validation or test; see [`Shares::split_of`].
    pub split: Split,
    /// Where the clip is from.
    pub corpus: Corpus,
    /// Facts behind the caption, as JSON.
    #[serde(default)]
    pub attributes: Map<String, Value>,
}

/// Where a caption is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptionSource {
    /// Written from what was rendered: exact.
    Score,
    /// Put together from titles, comments and folders of a package: about the track, not this excerpt.
    Metadata,
    /// Given by the user.
    User,
    /// Written by a model.
    Model,
}

/// The three parts of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// For training.
    Train,
    /// For choices during development.
    Valid,
    /// For final numbers.
    Test,
}

/// Where a clip is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Corpus {
    /// Rendered from notation.
    Scores,
    /// Recorded music from packages.
    Recordings,
    /// The user's.
    Import,
}

/// How many of the pieces of a corpus are held out; the others are for training.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shares {
    /// For validation, percent.
    pub valid_percent: u32,
    /// For test, percent.
    pub test_percent: u32,
}

impl Default for Shares {
    fn default() -> Self {
        Self { valid_percent: 5, test_percent: 5 }
    }
}

impl Shares {
    /// Checks that the shares can work; their keys lie under `split`.
    ///
    /// # Errors
    /// If they are more than the whole.
    pub fn check(&self) -> Result<()> {
        match self.valid_percent.saturating_add(self.test_percent) {
            0..=100 => Ok(()),
            _ => {
                let valid = self.valid_percent;
                let most = format!("at most 100 in all, with `split.valid_percent` {valid}");
                Err(Error::config("split.test_percent", most, self.test_percent))
            }
        }
    }

    /// The split of a piece: by a hash of its name, so it never changes.
    pub fn split_of(&self, piece: &str) -> Split {
        let place = hash64(piece) % 100;
        let test_from = 100 - u64::from(self.test_percent);
        match place {
            place if place >= test_from => Split::Test,
            place if place + u64::from(self.valid_percent) >= test_from => Split::Valid,
            _ => Split::Train,
        }
    }
}

/// Reads a manifest: `.jsonl` (one [`Entry`] per line) or `.csv` (a header with the fields' names;
/// `attributes` as JSON or absent).
///
/// # Errors
/// If the file is missing or unreadable, or a line has a missing, unknown or ill-typed field, an empty caption, an
/// absolute path or one that leaves the folder, or an id seen before; the message names file, line and field.
pub fn read_manifest(path: &Path) -> Result<Vec<Entry>> {
    let text = read_text(path, "manifest")?;
    let entries = if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) {
        let rows = parse_csv(path, &text)?;
        rows.into_iter()
            .map(|(line, row)| Ok((line, entry_of_row(path, line, row)?)))
            .collect::<Result<Vec<_>>>()?
    } else {
        let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
        lines
            .map(|(i, l)| {
                let entry = serde_json::from_str::<Entry>(l).map_err(|e| Error::Line {
                    path: path.to_path_buf(),
                    line: i + 1,
                    detail: e.to_string(),
                })?;
                Ok((i + 1, entry))
            })
            .collect::<Result<Vec<_>>>()?
    };
    let mut seen = std::collections::HashMap::new();
    for (line, entry) in &entries {
        let refuse = |detail: String| Error::Line { path: path.to_path_buf(), line: *line, detail };
        if let Some(first) = seen.insert(entry.id.as_str(), line) {
            return Err(refuse(format!("`id` must be unique, found `{}` also on line {first}", entry.id)));
        }
        if entry.caption.trim().is_empty() {
            return Err(refuse("`caption`: expected words, found nothing".into()));
        }
        let relative = Path::new(&entry.path);
        if !relative.components().all(|c| matches!(c, std::path::Component::Normal(_)))
            || entry.path.is_empty()
        {
            return Err(refuse(format!(
                "`path` must lie inside the manifest's folder, found `{}`",
                entry.path
            )));
        }
    }
    Ok(entries.into_iter().map(|(_, e)| e).collect())
}

/// Writes a JSONL manifest, whole or not at all.
///
/// # Errors
/// If the system refuses.
pub fn write_manifest(path: &Path, entries: &[Entry]) -> Result<()> {
    let mut text = String::new();
    for entry in entries {
        text.push_str(&to_line(entry));
    }
    dragon_audio::write::write_atomic(path, text.as_bytes()).map_err(Error::io(path, "written"))
}

pub(crate) fn to_line(entry: &Entry) -> String {
    let mut line = serde_json::to_string(entry).expect("an entry has only string keys");
    line.push('\n');
    line
}

pub(crate) fn read_text(path: &Path, what: &'static str) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| {
        if e.kind() == std::io::ErrorKind::NotFound {
            let hint = "check the path; relative paths start at the current folder";
            return Error::Missing { what, path: path.to_path_buf(), hint };
        }
        Error::Io { path: path.to_path_buf(), action: "read", source: e }
    })?;
    let text = String::from_utf8(bytes).map_err(|e| Error::Input {
        what,
        path: path.to_path_buf(),
        detail: format!("expected UTF-8 text, found other bytes at {}", e.utf8_error().valid_up_to()),
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

/// One row of a CSV file: column to text.
pub(crate) type Row = std::collections::BTreeMap<String, String>;

/// Reads CSV with a header; rows carry their line.
pub(crate) fn parse_csv(path: &Path, text: &str) -> Result<Vec<(usize, Row)>> {
    let refuse = |line: usize, detail: String| Error::Line { path: path.to_path_buf(), line, detail };
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
    let header = reader.headers().map_err(|e| refuse(1, e.to_string()))?;
    let header: Vec<String> = header.iter().map(|name| name.trim().to_string()).collect();
    if header.is_empty() {
        return Err(refuse(1, "expected a header with the columns' names, found nothing".into()));
    }
    let records: Vec<csv::StringRecord> =
        reader.records().collect::<std::result::Result<_, _>>().map_err(|e| refuse(1, e.to_string()))?;
    let (mut at, mut line) = (0, 1);
    let mut rows = Vec::with_capacity(records.len());
    for record in &records {
        // The library counts line breaks before a row to the row.
        let start = record.position().expect("it was read from somewhere").byte() as usize;
        let start = text.len() - text[start..].trim_start_matches(['\r', '\n']).len();
        line += text[at..start].matches('\n').count();
        at = start;
        rows.push((line, record));
    }
    // It takes all that follows an unclosed quote for one field.
    if !rows.is_empty() && text[at..].matches('"').count() % 2 == 1 {
        return Err(refuse(line, "expected a closing quote, found the end of the file".into()));
    }
    let row = |(line, record): (usize, &csv::StringRecord)| match record.len() == header.len() {
        true => Ok((line, header.iter().cloned().zip(record.iter().map(String::from)).collect())),
        false => Err(refuse(line, format!("expected {} columns, found {}", header.len(), record.len()))),
    };
    rows.into_iter().map(row).collect()
}

fn entry_of_row(path: &Path, line: usize, row: Row) -> Result<Entry> {
    let refuse = |detail: String| Error::Line { path: path.to_path_buf(), line, detail };
    let mut object = Map::new();
    for (key, text) in row {
        let value = match key.as_str() {
            "start_s" | "duration_s" | "sample_rate_hz" => serde_json::from_str(text.trim())
                .map_err(|_| refuse(format!("`{key}`: expected a number, found `{text}`")))?,
            "attributes" if text.trim().is_empty() => continue,
            "attributes" => serde_json::from_str(&text)
                .map_err(|e| refuse(format!("`attributes`: expected JSON, found `{text}` ({e})")))?,
            _ => Value::String(text),
        };
        object.insert(key, value);
    }
    serde_json::from_value(Value::Object(object)).map_err(|e| refuse(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str) -> Entry {
        Entry {
            id: id.into(),
            piece: "The \"Quoted\", Tune".into(),
            path: format!("wav/{id}.wav"),
            start_s: 1.5,
            duration_s: 5.12,
            sample_rate_hz: 16000,
            caption: "a slow air, on solo flute".into(),
            caption_source: CaptionSource::User,
            split: Shares::default().split_of("x"),
            corpus: Corpus::Import,
            attributes: Map::new(),
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifest.jsonl");
        let entries = vec![entry("a"), entry("b")];
        write_manifest(&path, &entries).unwrap();
        assert_eq!(read_manifest(&path).unwrap(), entries);
    }

    #[test]
    fn csv_with_quotes_gives_the_same_entries() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.csv");
        let text = "id,piece,path,start_s,duration_s,sample_rate_hz,caption,caption_source,split,corpus\r\n\
            a,\"The \"\"Quoted\"\", Tune\",wav/a.wav,1.5,5.12,16000,\"a slow air, on solo flute\",user,train,import\r\n";
        fs::write(&path, text).unwrap();
        let mut want = entry("a");
        want.split = Split::Train;
        assert_eq!(read_manifest(&path).unwrap(), [want]);
    }

    #[test]
    fn rows_of_csv_carry_their_lines_after_any_line_breaks() {
        let text = "path,caption\r\n\r\na.wav,\"one\r\ntwo\"\r\nb.wav,three\n\n\nc.wav,four\n";
        let rows = parse_csv(Path::new("l.csv"), text).unwrap();
        assert_eq!(rows.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [3, 5, 8]);
        assert_eq!(rows[0].1["caption"], "one\r\ntwo");
        for (text, want) in [
            ("a,b\r\n1,2\r\n1,2,3\r\n", "line 3: expected 2 columns, found 3"),
            ("a,b\r\n1,2\r\n\r\n1,\"2\r\n", "line 4: expected a closing quote"),
        ] {
            let error = parse_csv(Path::new("l.csv"), text).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn a_wrong_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("manifest.jsonl");
        let cases = [
            (to_line(&entry("a")) + "{\"id\": 3}\n", "line 2"),
            (to_line(&entry("a")).replace("\"caption\"", "\"captoin\""), "unknown field `captoin`"),
            (to_line(&entry("a")) + &to_line(&entry("a")), "`id` must be unique, found `a` also on line 1"),
            (
                to_line(&entry("a")).replace("a slow air, on solo flute", " "),
                "line 1: `caption`: expected words, found nothing",
            ),
            (
                to_line(&entry("a")).replace("wav/a.wav", "../a.wav"),
                "`path` must lie inside the manifest's folder",
            ),
        ];
        for (text, want) in cases {
            fs::write(&path, text).unwrap();
            let message = read_manifest(&path).unwrap_err().to_string();
            assert!(message.contains(want), "{message}");
        }
    }

    #[test]
    fn splits_are_fixed_and_near_their_shares() {
        let count =
            |shares: &Shares, s| (0..10000).filter(|i| shares.split_of(&format!("piece {i}")) == s).count();
        let shares = Shares::default();
        let (valid, test) = (count(&shares, Split::Valid), count(&shares, Split::Test));
        assert!((400..600).contains(&valid) && (400..600).contains(&test), "{valid} {test}");
        let shares = Shares { valid_percent: 20, test_percent: 0 };
        let (valid, test) = (count(&shares, Split::Valid), count(&shares, Split::Test));
        assert!((1800..2200).contains(&valid) && test == 0, "{valid} {test}");
        let shares = Shares { valid_percent: 60, test_percent: 40 };
        assert_eq!(count(&shares, Split::Train), 0);
        // Corpora that exist were split so: it must not change.
        for piece in (0..1000).map(|i| format!("piece {i}")) {
            let want = match hash64(&piece) % 100 {
                0..=89 => Split::Train,
                90..=94 => Split::Valid,
                _ => Split::Test,
            };
            assert_eq!(Shares::default().split_of(&piece), want, "{piece}");
        }
    }
}
