//! Scoring any number of systems against a reference, in one encoder's eyes: distances, diversity, intervals, ranks.
//!
//! A system is a set of songs ([`crate::sets`]): audio, or embeddings made elsewhere. Its songs are taken in the order of
//! their names, so that neither the order of files in a folder nor that of systems in the command changes a bit.
//!
//! Reading order: `config` says what a scoring depends on; `measure` computes one metric of one system with its values on
//! resampled songs; `summary` holds what was found, ranked, and prints it; `page` makes the report.

mod config;
mod measure;
mod page;
mod summary;

use std::path::{Path, PathBuf};

use dragon_metrics::{FrechetReference, Rows};

pub use config::{FadInfConfig, Metric, ScoreConfig};
pub use summary::{Difference, Interval, RankedValue, ReferenceInfo, ScoredSong, Summary, SystemInfo};

use crate::bundle::{Prompt, read_prompts};
use crate::embed::{OnBad, Skipped};
use crate::embedder::EncoderConfig;
use crate::error::{Error, Result};
use crate::eval::caption_of;
use crate::run::{Meter, RunContext};
use crate::sets::{Content, Given, Set, Unit, all_rows, check_several};
use crate::song_encoder::SongEncoder;
use measure::{Measured, Measurer};

/// Largest table of distances (bytes) that precision and the like may take when they were not asked for by name.
const TABLE_UNASKED: f64 = 0.5e9;
/// The same when they were.
const TABLE_ASKED: f64 = 16e9;

/// What is scored, as a user names it.
#[derive(Debug, Clone, Copy)]
pub struct Named<'a> {
    /// Statistics, embeddings, audio or texts to compare with.
    pub reference: Option<&'a Path>,
    /// Which statistics, where the reference's file holds several.
    pub statistics: Option<&'a str>,
    /// Audio or embeddings of each system.
    pub systems: &'a [PathBuf],
    /// Prompt file whose ids are the songs' names without ending, for the CLAP score.
    pub prompts: Option<&'a Path>,
    /// What happens to a file that cannot be used.
    pub on_bad: OnBad,
}

/// What is scored: the reference, the systems and the prompts, seen but not embedded.
#[derive(Debug)]
pub struct Inputs {
    reference: Option<Given>,
    systems: Vec<Given>,
    prompts: Option<Vec<Prompt>>,
    on_bad: OnBad,
}

impl Inputs {
    /// Looks at everything.
    ///
    /// # Errors
    /// If something cannot be used, a system is named twice or holds no songs, the reference is a single song, or
    /// dimensions differ.
    pub fn look(named: &Named) -> Result<Self> {
        let Named { reference, statistics, systems, prompts, on_bad } = *named;
        let reference = reference.map(|path| Given::look(path, statistics, on_bad)).transpose()?;
        if let Some(given) = &reference {
            match &given.content {
                Content::Statistics(_) => {}
                Content::Embeddings(songs, unit) => check_several(&given.path, songs.len(), *unit)?,
                Content::Audio(files) => check_several(&given.path, files.len(), Unit::Song)?,
                Content::Texts(texts) => check_several(&given.path, texts.len(), Unit::Text)?,
            }
        }
        let mut seen: Vec<Given> = Vec::with_capacity(systems.len());
        for path in systems {
            if seen.iter().any(|given| given.path == *path) {
                return Err(Error::Content {
                    path: path.clone(),
                    problem: "is named twice".into(),
                    hint: "name each system once".into(),
                });
            }
            let given = Given::look(path, None, on_bad)?;
            if matches!(given.content, Content::Statistics(_)) {
                return Err(Error::Content {
                    path: path.clone(),
                    problem: "holds statistics: expected songs to score".into(),
                    hint: "name a folder of audio or a file of embeddings; statistics are for --reference"
                        .into(),
                });
            }
            if let Content::Embeddings(songs, _) = &given.content {
                check_size(path, songs.iter().map(|song| song.rows.n()).sum())?;
            }
            seen.push(given);
        }
        let prompts = prompts.map(read_prompts).transpose()?;
        let inputs = Self { reference, systems: seen, prompts, on_bad };
        inputs.check_dims(None)?;
        Ok(inputs)
    }

    fn all(&self) -> impl Iterator<Item = &Given> {
        self.reference.iter().chain(&self.systems)
    }

    /// Whether an encoder is needed.
    pub fn need_encoder(&self, cfg: &ScoreConfig) -> bool {
        self.all().any(Given::needs_encoder) || self.wants_captions(cfg)
    }

    /// Whether songs are to be compared with their prompts.
    fn wants_captions(&self, cfg: &ScoreConfig) -> bool {
        match &cfg.metrics {
            Some(metrics) => metrics.contains(&Metric::ClapScore),
            None => self.prompts.is_some() && reads_text(cfg),
        }
    }

    /// Checks that all rows have, or will have, one dimension.
    fn check_dims(&self, encoder: Option<&SongEncoder>) -> Result<()> {
        let known = self.all().filter_map(|given| match (given.dim(), encoder) {
            (Some(dim), _) => Some((given, dim)),
            (None, Some(encoder)) => Some((given, encoder.dim())),
            (None, None) => None,
        });
        let mut first: Option<(&Given, usize)> = None;
        for (given, dim) in known {
            match first {
                None => first = Some((given, dim)),
                Some((other, expected)) if dim != expected => {
                    return Err(Error::Content {
                        path: given.path.clone(),
                        problem: format!(
                            "has embeddings of dimension {dim}: expected {expected}, as those of `{}`",
                            other.path.display()
                        ),
                        hint: "compare embeddings of one encoder; --encoder names the one for audio".into(),
                    });
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Checks what can be checked before weights are read.
    ///
    /// # Errors
    /// If the config cannot work, texts meet an encoder of audio, or a metric was asked for that cannot be measured.
    pub fn check(&self, cfg: &ScoreConfig) -> Result<()> {
        cfg.check()?;
        self.all().try_for_each(|given| given.check_encoder(&cfg.encoder))?;
        for metric in cfg.metrics.iter().flatten() {
            let reason = match (&self.reference, metric) {
                (_, Metric::ClapScore) if self.prompts.is_none() => Some(NO_PROMPTS.to_owned()),
                (_, Metric::ClapScore) if !reads_text(cfg) => Some(NO_TEXT.to_owned()),
                (None, metric) if metric.needs_reference() => Some(NO_REFERENCE.to_owned()),
                (Some(given), Metric::Kad | Metric::Prdc) => match given.content {
                    Content::Statistics(_) => Some(statistics_only(&given.path)),
                    _ => None,
                },
                _ => None,
            };
            if let Some(reason) = reason {
                return Err(cannot(*metric, reason));
            }
        }
        if self.wants_captions(cfg) {
            for given in &self.systems {
                let files: Vec<&Path> = match &given.content {
                    Content::Audio(files) => files.iter().map(PathBuf::as_path).collect(),
                    Content::Embeddings(songs, _) => songs.iter().map(|song| Path::new(&song.name)).collect(),
                    Content::Texts(_) | Content::Statistics(_) => Vec::new(),
                };
                files.iter().try_for_each(|file| caption_of(file, self.prompts.as_deref()).map(drop))?;
            }
        }
        Ok(())
    }
}

const NO_REFERENCE: &str = "it needs a reference (--reference), and none was named";
const NO_PROMPTS: &str = "it needs the songs' prompts (--prompts), and none were named";
const NO_TEXT: &str = "it needs an encoder that reads audio and text (--encoder clap)";

/// # Errors
/// If a system has too few embeddings for a covariance.
fn check_size(path: &Path, n_rows: usize) -> Result<()> {
    if n_rows >= 2 {
        return Ok(());
    }
    Err(Error::Content {
        path: path.to_owned(),
        problem: format!("is too small: expected at least 2 embeddings, found {n_rows}"),
        hint: "name more songs, or cut them into more windows with --hop".into(),
    })
}

/// Whether the encoder reads text.
fn reads_text(cfg: &ScoreConfig) -> bool {
    matches!(cfg.encoder, EncoderConfig::Clap { .. })
}

fn statistics_only(path: &Path) -> String {
    format!("it needs the reference's embeddings, and `{}` holds statistics only", path.display())
}

fn cannot(metric: Metric, reason: String) -> Error {
    Error::Data {
        problem: format!("the metric `{}` cannot be measured: {reason}", metric.name()),
        hint: "give it what it needs, or name other metrics with --metric".into(),
    }
}

/// The reference, ready to be compared with.
pub(crate) struct Reference {
    info: ReferenceInfo,
    gaussian: FrechetReference,
    /// Its songs, unless it is known by statistics only.
    set: Option<(Set, Rows)>,
}

/// A system with its embeddings.
pub(crate) struct System {
    name: String,
    set: Set,
    rows: Rows,
    /// The embedding of each song's prompt, where they are to be compared.
    captions: Option<Rows>,
}

/// Measures all systems; writes `report.json`, `report.html`, `systems.csv` and, where songs have scores of their own,
/// `songs.csv` to `ctx.out_dir`. `encoder` is needed where audio or texts are to be embedded.
///
/// # Errors
/// As [`Inputs::check`]; if a file cannot be decoded or embedded and is not to be skipped, a metric that was asked for
/// cannot be measured, or `ctx.stop` was set.
pub fn run(
    cfg: &ScoreConfig,
    inputs: Inputs,
    encoder: Option<&SongEncoder>,
    ctx: &RunContext,
) -> Result<Summary> {
    inputs.check(cfg)?;
    inputs.check_dims(encoder)?;
    let wants_captions = inputs.wants_captions(cfg);
    let Inputs { reference, systems, prompts, on_bad } = inputs;
    let mut skipped: Vec<Skipped> = Vec::new();
    let reference = match reference {
        Some(given) => Some(Reference::make(given, cfg, encoder, on_bad, ctx, &mut skipped)?),
        None => None,
    };
    let mut sets: Vec<System> = Vec::with_capacity(systems.len());
    for given in systems {
        let path = given.path.clone();
        let refuse =
            |err: dragon_metrics::Error| Error::input(format!("cannot use `{}`", path.display()))(err);
        let set =
            given.set(encoder, on_bad, ctx)?.ok_or_else(|| Error::Bug("a system of statistics".into()))?;
        let rows = all_rows(&set.songs).map_err(refuse)?;
        check_size(&path, rows.n())?;
        skipped.extend(set.skipped.iter().cloned());
        let captions = match encoder.filter(|_| wants_captions) {
            Some(encoder) => {
                let of = |song: &crate::sets::Song| {
                    caption_of(Path::new(&song.name), prompts.as_deref()).map(str::to_owned)
                };
                let captions = set.songs.iter().map(of).collect::<Result<Vec<String>>>()?;
                Some(encoder.embed_texts(&captions)?)
            }
            None => None,
        };
        sets.push(System { name: path.display().to_string(), set, rows, captions });
    }
    // The order of the command does not count.
    sets.sort_by(|a, b| a.name.cmp(&b.name));

    let mut left_out = Vec::new();
    let metrics = match &cfg.metrics {
        Some(asked) => {
            for metric in asked {
                if let Some(reason) = obstacle(*metric, cfg, reference.as_ref(), &sets, TABLE_ASKED) {
                    return Err(cannot(*metric, reason));
                }
            }
            asked.clone()
        }
        None => {
            let (mut metrics, mut obstacles): (Vec<Metric>, Vec<(String, String)>) = Default::default();
            let asked = |metric: &Metric| match metric {
                Metric::FadInf => false,
                Metric::ClapScore => prompts.is_some(),
                _ => true,
            };
            for metric in Metric::ALL.into_iter().filter(asked) {
                match obstacle(metric, cfg, reference.as_ref(), &sets, TABLE_UNASKED) {
                    None => metrics.push(metric),
                    Some(reason) => match obstacles.iter_mut().find(|(known, _)| *known == reason) {
                        Some((_, names)) => *names += &format!(", {}", metric.name()),
                        None => obstacles.push((reason, metric.name().to_owned())),
                    },
                }
            }
            left_out.extend(obstacles.iter().map(|(reason, names)| format!("{names}: {reason}")));
            metrics
        }
    };
    let measurer = Measurer { cfg, reference: reference.as_ref() };
    let mut meter = Meter::new(ctx.progress, sets.len() * metrics.len(), 0, 1.0, "measurements");
    let mut found: Vec<Vec<Measured>> = Vec::with_capacity(sets.len());
    let mut n_done = 0;
    for system in &sets {
        let mut of_system = Vec::new();
        for metric in &metrics {
            if ctx.stopped() {
                return Err(Error::Data {
                    problem: "stopped before the end".into(),
                    hint: "nothing was written; start the command again".into(),
                });
            }
            of_system.extend(measurer.measure(*metric, system)?);
            n_done += 1;
            meter.update(n_done, &[], &[], false);
        }
        found.push(of_system);
    }
    meter.finish();
    // The reference and a system may share a folder.
    let mut seen = std::collections::BTreeSet::new();
    skipped.retain(|skipped| seen.insert(skipped.file.clone()));
    let summary = Summary::new(cfg, reference.as_ref(), encoder, &sets, &found, left_out, skipped);
    page::write(cfg, &summary, reference.as_ref(), &sets, &found, ctx)?;
    Ok(summary)
}

impl Reference {
    fn make(
        given: Given,
        cfg: &ScoreConfig,
        encoder: Option<&SongEncoder>,
        on_bad: OnBad,
        ctx: &RunContext,
        skipped: &mut Vec<Skipped>,
    ) -> Result<Self> {
        let path = given.path.clone();
        let refuse = |err: dragon_metrics::Error| {
            Error::input(format!(
                "cannot use the reference `{}`\nhint: it takes two embeddings or more, or the mean and covariance of such",
                path.display()
            ))(err)
        };
        let name = path.display().to_string();
        if let Content::Statistics(stats) = &given.content {
            let gaussian = FrechetReference::new(stats).map_err(refuse)?;
            let info = ReferenceInfo { name, unit: None, n_songs: None, n_rows: stats.n(), dim: stats.dim() };
            return Ok(Self { info, gaussian, set: None });
        }
        let set = given.set(encoder, on_bad, ctx)?.ok_or_else(|| Error::Bug("no reference".into()))?;
        check_several(&path, set.songs.len(), set.unit)?;
        skipped.extend(set.skipped.iter().cloned());
        let rows = all_rows(&set.songs).map_err(refuse)?;
        let gaussian = measure::gaussian(cfg.convention, &set, &rows).map_err(refuse)?;
        let info = ReferenceInfo {
            name,
            unit: Some(set.unit.plural().into()),
            n_songs: Some(set.songs.len()),
            n_rows: Some(rows.n()),
            dim: rows.dim(),
        };
        Ok(Self { info, gaussian, set: Some((set, rows)) })
    }
}

/// Why a metric cannot be measured, if it cannot.
fn obstacle(
    metric: Metric,
    cfg: &ScoreConfig,
    reference: Option<&Reference>,
    systems: &[System],
    table: f64,
) -> Option<String> {
    match metric {
        Metric::Vendi => return None,
        Metric::ClapScore if systems.iter().all(|system| system.captions.is_some()) => return None,
        Metric::ClapScore => return Some(if reads_text(cfg) { NO_PROMPTS } else { NO_TEXT }.into()),
        _ => {}
    }
    let Some(reference) = reference else { return Some(NO_REFERENCE.into()) };
    let rows = reference.set.as_ref().map(|(_, rows)| rows);
    match metric {
        Metric::PerSongFad => systems.iter().find_map(|system| {
            let lone = system.set.songs.iter().find(|song| song.rows.n() < 2)?;
            Some(format!(
                "a song needs at least 2 embeddings, and `{}` of `{}` has 1",
                lone.name, system.name
            ))
        }),
        Metric::Kad if rows.is_none() => Some(statistics_only(Path::new(&reference.info.name))),
        Metric::Prdc => {
            let Some(rows) = rows else { return Some(statistics_only(Path::new(&reference.info.name))) };
            let k = cfg.neighbours;
            let few = |name: &str, n: usize| {
                (n <= k).then(|| format!("{k} neighbours take {} embeddings, and `{name}` has {n}", k + 1))
            };
            let few = few(&reference.info.name, rows.n())
                .or_else(|| systems.iter().find_map(|system| few(&system.name, system.rows.n())));
            few.or_else(|| {
                systems.iter().find_map(|system| {
                    let bytes = 8.0 * ((rows.n() + system.rows.n()) as f64).powi(2);
                    (bytes > table).then(|| {
                        format!(
                            "its table of distances between the {} embeddings of the reference and the {} of `{}` would take {:.1} GB",
                            rows.n(),
                            system.rows.n(),
                            system.name,
                            bytes / 1e9
                        )
                    })
                })
            })
        }
        _ => None,
    }
}
