//! What a user may name as a set of songs: a folder of audio, a file or folder of embeddings, a list of texts, or
//! statistics of such a set. [`Given`] looks at it without decoding or embedding; [`Given::set`] does the rest.

use std::path::{Path, PathBuf};

use dragon_metrics::files::{read_embeddings, read_fadtk_stats, read_stats, stats_in};
use dragon_metrics::{Convention, FrechetReference, GaussianStats, Rows};

use crate::embed::{self, OnBad, Skipped};
use crate::embedder::EncoderConfig;
use crate::error::{Error, Result};
use crate::run::RunContext;
use crate::song_encoder::SongEncoder;

/// A song with its embeddings.
#[derive(Debug, Clone)]
pub struct Song {
    /// Path inside its folder, with the ending; the text itself, or `row 0` where a row has no name.
    pub name: String,
    /// The audio, where there is some.
    pub file: Option<PathBuf>,
    /// `[n, D]`.
    pub rows: Rows,
}

/// What one [`Song`] of a set is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A song with all its rows.
    Song,
    /// A row whose song is not known.
    Row,
    /// A text.
    Text,
}

impl Unit {
    /// Several of them.
    pub fn plural(self) -> &'static str {
        match self {
            Unit::Song => "songs",
            Unit::Row => "rows",
            Unit::Text => "texts",
        }
    }
}

/// A set that was read or embedded, in the order of its names.
#[derive(Debug, Clone)]
pub struct Set {
    /// Its songs.
    pub songs: Vec<Song>,
    /// What each is.
    pub unit: Unit,
    /// Files left out.
    pub skipped: Vec<Skipped>,
}

/// What a path holds.
#[derive(Debug)]
pub enum Content {
    /// Mean and covariance.
    Statistics(GaussianStats),
    /// Embeddings, read.
    Embeddings(Vec<Song>, Unit),
    /// Audio files, looked at but not decoded.
    Audio(Vec<PathBuf>),
    /// Texts.
    Texts(Vec<String>),
}

/// A set as a user names it.
#[derive(Debug)]
pub struct Given {
    /// The path, as it was given.
    pub path: PathBuf,
    /// What it holds.
    pub content: Content,
    /// Files left out so far.
    pub skipped: Vec<Skipped>,
}

const EMBEDDINGS: &str =
    "hint: embeddings are [N, D], one row each, in .npy, .npz or .safetensors; `dragon embed` writes them";
const STATISTICS: &str = "hint: statistics are NAME.mu [D] and NAME.cov [D, D] in .npz or .safetensors; `dragon stats` writes them, --name says which";

impl Given {
    /// Finds out what `path` holds and reads all but audio; `name` says which statistics of several.
    ///
    /// # Errors
    /// If it does not exist, is none of the things above, or something in it cannot be used.
    pub fn look(path: &Path, name: Option<&str>, on_bad: OnBad) -> Result<Self> {
        let mut skipped = Vec::new();
        let ending = path.extension().and_then(|e| e.to_str()).map(str::to_lowercase).unwrap_or_default();
        let content = if path.is_dir() {
            look_into(path, on_bad, &mut skipped)?
        } else if !path.exists() {
            return Err(Error::missing(path));
        } else if embed::is_audio(path) {
            let (files, bad) = embed::usable_files(path, on_bad)?;
            skipped = bad;
            Content::Audio(files)
        } else {
            match ending.as_str() {
                "txt" => Content::Texts(embed::read_texts(path)?),
                "npz" | "safetensors" if holds_statistics(path)? => {
                    let stats = read_stats(path, name).and_then(|stats| {
                        // Whether it is positive shows when it is factored.
                        FrechetReference::new(&stats)
                            .map(|_| stats)
                            .map_err(|err| err.within(format!("`{}`", path.display())))
                    });
                    Content::Statistics(
                        stats.map_err(Error::input(format!("cannot use the statistics\n{STATISTICS}")))?,
                    )
                }
                "npy" | "npz" | "safetensors" => embeddings_of(path)?,
                _ => {
                    return Err(Error::Content {
                        path: path.to_owned(),
                        problem: format!(
                            "is no set of songs: expected a folder, a name ending in npz, npy, safetensors or txt, or \
                             audio, found `{ending}`"
                        ),
                        hint: "name a folder of audio, embeddings, statistics, or a list of texts".into(),
                    });
                }
            }
        };
        if let (Some(name), false) = (name, path.is_file() && matches!(content, Content::Statistics(_))) {
            return Err(Error::Content {
                path: path.to_owned(),
                problem: format!("holds no statistics, of which `{name}` could be one"),
                hint: "leave --name out".into(),
            });
        }
        Ok(Self { path: path.to_owned(), content, skipped })
    }

    /// Whether an encoder is needed.
    pub fn needs_encoder(&self) -> bool {
        matches!(self.content, Content::Audio(_) | Content::Texts(_))
    }

    /// Checks that `encoder` can embed it, where it needs one.
    ///
    /// # Errors
    /// If texts meet an encoder of audio.
    pub fn check_encoder(&self, encoder: &EncoderConfig) -> Result<()> {
        if matches!(self.content, Content::Texts(_)) && !matches!(encoder, EncoderConfig::Clap { .. }) {
            return Err(Error::Content {
                path: self.path.clone(),
                problem: "holds texts, which the encoder cannot read".into(),
                hint: "take one that reads audio and text: --encoder clap, or the folder of a CLAP".into(),
            });
        }
        Ok(())
    }

    /// Length of its rows, where that is known without an encoder.
    pub fn dim(&self) -> Option<usize> {
        match &self.content {
            Content::Statistics(stats) => Some(stats.dim()),
            Content::Embeddings(songs, _) => songs.first().map(|song| song.rows.dim()),
            Content::Audio(_) | Content::Texts(_) => None,
        }
    }

    /// Its songs with their embeddings; `None` for statistics.
    ///
    /// # Errors
    /// If a file cannot be decoded or embedded and is not to be skipped, or none is left.
    pub fn set(self, encoder: Option<&SongEncoder>, on_bad: OnBad, ctx: &RunContext) -> Result<Option<Set>> {
        let Self { path, content, mut skipped } = self;
        let needed = || encoder.ok_or_else(|| Error::Bug("no encoder was loaded".into()));
        let (songs, unit) = match content {
            Content::Statistics(_) => return Ok(None),
            Content::Embeddings(songs, unit) => (songs, unit),
            Content::Texts(texts) => {
                let rows = needed()?.embed_texts(&texts).map_err(Error::input(in_file(&path)))?;
                (rows_apart(&rows, |i| texts[i].clone())?, Unit::Text)
            }
            Content::Audio(files) => {
                let encoder = needed()?;
                let (songs, bad) = embed::embed_songs(|file| encoder.embed(file), &files, on_bad, ctx)?;
                skipped.extend(bad);
                let name = |file: &Path| {
                    let inside = file.strip_prefix(&path).ok().filter(|name| name.file_name().is_some());
                    let name = inside.unwrap_or(Path::new(file.file_name().unwrap_or_default()));
                    name.to_string_lossy().replace('\\', "/")
                };
                let songs = songs.into_iter().map(|song| Song {
                    name: name(&song.path),
                    file: Some(song.path),
                    rows: song.rows,
                });
                (songs.collect(), Unit::Song)
            }
        };
        Ok(Some(Set { songs, unit, skipped }))
    }
}

/// Statistics of a set.
#[derive(Debug)]
pub struct SetStats {
    /// Mean and covariance of all its rows.
    pub stats: GaussianStats,
    /// Songs, rows or texts.
    pub n_songs: usize,
    /// What each is.
    pub unit: Unit,
    /// Files left out.
    pub skipped: Vec<Skipped>,
}

/// Mean and covariance of a set of at least two songs. Exact ones of audio are made in one pass, whose memory does not
/// grow with the number of songs.
///
/// # Errors
/// As [`Given::set`], if the set consists of a single song, or of statistics.
pub fn stats_of(
    given: Given,
    encoder: Option<&SongEncoder>,
    convention: Convention,
    on_bad: OnBad,
    ctx: &RunContext,
) -> Result<SetStats> {
    let path = given.path.clone();
    if let (Content::Audio(files), Some(encoder), Convention::Exact) = (&given.content, encoder, convention) {
        check_several(&path, files.len(), Unit::Song)?;
        let (moments, bad) = embed::moments_of(|file| encoder.embed(file), files, on_bad, ctx)?;
        let n_songs = files.len() - bad.len();
        check_several(&path, n_songs, Unit::Song)?;
        let stats = moments.stats().map_err(Error::input(in_file(&path)))?;
        let skipped = given.skipped.into_iter().chain(bad).collect();
        return Ok(SetStats { stats, n_songs, unit: Unit::Song, skipped });
    }
    let set = given.set(encoder, on_bad, ctx)?;
    let Set { songs, unit, skipped } = set.ok_or_else(|| Error::Bug("statistics of statistics".into()))?;
    check_several(&path, songs.len(), unit)?;
    let stats = match unit {
        Unit::Song => {
            let rows: Vec<&Rows> = songs.iter().map(|song| &song.rows).collect();
            convention.stats_of_files(&rows)
        }
        // One array.
        Unit::Row | Unit::Text => all_rows(&songs).and_then(|rows| convention.stats(&rows)),
    };
    let stats = stats.map_err(Error::input(in_file(&path)))?;
    Ok(SetStats { stats, n_songs: songs.len(), unit, skipped })
}

/// The rows of all songs, in order.
pub(crate) fn all_rows(songs: &[Song]) -> dragon_metrics::Result<Rows> {
    Rows::concat(&songs.iter().map(|song| &song.rows).collect::<Vec<_>>())
}

/// # Errors
/// If a reference consists of one song (or row, or text), whose Gaussian would say nothing of others.
pub(crate) fn check_several(path: &Path, n: usize, unit: Unit) -> Result<()> {
    if n >= 2 {
        return Ok(());
    }
    Err(Error::Content {
        path: path.to_owned(),
        problem: format!("is no reference: expected at least 2 {}, found {n}", unit.plural()),
        hint: "a distribution takes several songs, better a hundred; name more".into(),
    })
}

fn in_file(path: &Path) -> String {
    format!("cannot use `{}`", path.display())
}

fn holds_statistics(path: &Path) -> Result<bool> {
    Ok(!stats_in(path)
        .map_err(Error::input(format!("cannot use a file\n{EMBEDDINGS}\n{STATISTICS}")))?
        .is_empty())
}

/// A folder: fadtk's statistics, audio, or one `.npy` a song, as fadtk and kadtk keep them.
fn look_into(path: &Path, on_bad: OnBad, skipped: &mut Vec<Skipped>) -> Result<Content> {
    if path.join("mu.npy").is_file() && path.join("cov.npy").is_file() {
        let whole = path.canonicalize().map_err(Error::io("read", path))?;
        let (folder, model) = (whole.parent().and_then(Path::parent), whole.file_name());
        if let (Some(folder), Some(model)) = (folder, model.and_then(|m| m.to_str()))
            && folder.join("stats").join(model) == whole
        {
            let stats = read_fadtk_stats(folder, model)
                .map_err(Error::input(format!("cannot use the statistics\n{STATISTICS}")))?;
            return Ok(Content::Statistics(stats));
        }
        return Err(Error::Content {
            path: path.to_owned(),
            problem: "holds `mu.npy` and `cov.npy`, but not where fadtk keeps them".into(),
            hint: "fadtk's statistics are read from FOLDER/stats/MODEL".into(),
        });
    }
    let entries = std::fs::read_dir(path).map_err(Error::io("read", path))?;
    let mut arrays: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("read", path))?.path();
        if entry.is_file() && entry.extension().is_some_and(|e| e == "npy") {
            arrays.push(entry);
        }
    }
    if arrays.is_empty() {
        let (files, bad) = embed::usable_files(path, on_bad)?;
        skipped.extend(bad);
        return Ok(Content::Audio(files));
    }
    if embed::find_files(path).is_ok() {
        return Err(Error::Content {
            path: path.to_owned(),
            problem: "holds audio and embeddings (.npy): expected one of them".into(),
            hint: "keep embeddings in a folder of their own".into(),
        });
    }
    arrays.sort();
    let mut songs: Vec<Song> = Vec::with_capacity(arrays.len());
    for array in arrays {
        let read = read_embeddings(&array, None).and_then(|rows| match songs.first() {
            Some(first) if first.rows.dim() != rows.dim() => {
                let (expected, found) = (first.rows.dim(), rows.dim());
                let differ = dragon_metrics::Error::Dimension { what: "embeddings", expected, found };
                Err(differ.within(format!("`{}`", array.display())))
            }
            _ => Ok(rows),
        });
        match read.map_err(Error::input(format!("cannot use the embeddings\n{EMBEDDINGS}"))) {
            Ok(rows) => {
                let name = array.file_name().unwrap_or_default().to_string_lossy().into_owned();
                songs.push(Song { name, file: None, rows });
            }
            Err(err) => embed::skip(&array, err, on_bad, skipped)?,
        }
    }
    embed::some_left(songs.len(), path, skipped)?;
    Ok(Content::Embeddings(songs, Unit::Song))
}

/// A file of embeddings. Which rows are a song's is said by the index that `dragon embed` writes beside it; without one
/// each row stands for itself.
fn embeddings_of(path: &Path) -> Result<Content> {
    let rows = read_embeddings(path, None)
        .map_err(Error::input(format!("cannot use the embeddings\n{EMBEDDINGS}")))?;
    let mut index = path.as_os_str().to_owned();
    index.push(".songs.tsv");
    let index = PathBuf::from(index);
    if !index.is_file() {
        return Ok(Content::Embeddings(rows_apart(&rows, |i| format!("row {i}"))?, Unit::Row));
    }
    let text = std::fs::read_to_string(&index).map_err(Error::io("read", &index))?;
    let refuse = |problem: String| Error::Content {
        path: index.clone(),
        problem,
        hint: format!(
            "it says which rows of `{}` are a song's; delete it to take each row alone, or embed the songs again",
            path.display()
        ),
    };
    let mut songs = Vec::new();
    let mut end = 0;
    for (i, line) in text.lines().enumerate().skip(1) {
        let mut cells = line.splitn(3, '\t');
        let mut number = || cells.next().and_then(|cell| cell.parse::<usize>().ok());
        let (first, n) = (number(), number());
        let (Some(first), Some(n), Some(name)) = (first, n, cells.next()) else {
            return Err(refuse(format!("line {}: expected first row, rows and file, found `{line}`", i + 1)));
        };
        if first != end || n == 0 || n > rows.n() - end {
            return Err(refuse(format!(
                "line {}: expected some of the rows from {end} to {}, found {n} from {first}",
                i + 1,
                rows.n()
            )));
        }
        end += n;
        let members: Vec<usize> = (first..end).collect();
        let rows = rows.select(&members).map_err(Error::input(in_file(path)))?;
        let file = Some(PathBuf::from(name)).filter(|file| file.is_file());
        songs.push(Song { name: name.to_owned(), file, rows });
    }
    if end != rows.n() {
        return Err(refuse(format!("names {end} rows, but there are {}", rows.n())));
    }
    // Inside their folder, songs of two systems may have the same name.
    let mut folder = songs.first().and_then(|song| Path::new(&song.name).parent()).map(Path::to_owned);
    while let Some(dir) =
        folder.clone().filter(|dir| !songs.iter().all(|s| Path::new(&s.name).starts_with(dir)))
    {
        folder = dir.parent().map(Path::to_owned);
    }
    if let Some(dir) = folder {
        for song in &mut songs {
            let name =
                Path::new(&song.name).strip_prefix(&dir).ok().map(|n| n.to_string_lossy().into_owned());
            song.name = name.unwrap_or_else(|| song.name.clone());
        }
    }
    songs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Content::Embeddings(songs, Unit::Song))
}

fn rows_apart(rows: &Rows, name: impl Fn(usize) -> String) -> Result<Vec<Song>> {
    (0..rows.n())
        .map(|i| {
            let row = rows.select(&[i]).map_err(|err| Error::Bug(err.to_string()))?;
            Ok(Song { name: name(i), file: None, rows: row })
        })
        .collect()
}
