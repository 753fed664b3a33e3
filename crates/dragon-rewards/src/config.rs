//! Which reward, computed on which embeddings, against which exemplars.

use std::path::PathBuf;
use std::sync::Arc;

use dragon_metrics::{Clip, FrechetReference, files};
use serde::{Deserialize, Serialize};

use crate::mix::{RunningStats, weighted_sum};
use crate::{ClapScore, DatasetFad, Error, PerSongFad, Pooling, Result, Reward, Vendi};

/// An encoder and the windows it is given. Both are names that the caller resolves; nothing here depends on them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Source {
    /// Encoder, e.g. `musicnn`, `clap`, `vae`.
    pub encoder: String,
    /// Embedding setting, e.g. `ma`, `fadtk`, `vae` (paper B.2, C.2).
    pub setting: String,
}

/// The reference set of a distance.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Exemplars {
    /// A folder of audio files (or a manifest), embedded with the same encoder and setting.
    Audio {
        /// The folder or manifest.
        path: PathBuf,
    },
    /// A file of texts, one a line, embedded with the text branch of the same encoder.
    Texts {
        /// The file.
        path: PathBuf,
    },
    /// A statistics file (`.npz` or safetensors).
    Statistics {
        /// The file.
        path: PathBuf,
        /// Name of the statistics in it; may be left out where there is one.
        name: Option<String>,
    },
}

impl Exemplars {
    /// The reference in a statistics file; `None` for exemplars that must be embedded first.
    ///
    /// # Errors
    /// If the file cannot be read or holds no Gaussian.
    pub fn read(&self) -> Result<Option<FrechetReference>> {
        let Exemplars::Statistics { path, name } = self else { return Ok(None) };
        Ok(Some(FrechetReference::new(&files::read_stats(path, name.as_deref())?)?))
    }

    /// What they are called: the name of the statistics, or of the file or folder.
    fn name(&self) -> String {
        let (Exemplars::Audio { path } | Exemplars::Texts { path } | Exemplars::Statistics { path, .. }) =
            self;
        match self {
            Exemplars::Statistics { name: Some(name), .. } => name.clone(),
            Exemplars::Audio { .. } => {
                path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
            }
            _ => path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
        }
    }

    fn describe(&self) -> String {
        match self {
            Exemplars::Audio { path } => format!("audio `{}`", path.display()),
            Exemplars::Texts { path } => format!("texts `{}`", path.display()),
            Exemplars::Statistics { path, .. } => format!("statistics `{}`", path.display()),
        }
    }
}

/// A weighted term of a sum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Term {
    /// Weight of the normalised reward; negative turns it into a penalty.
    pub weight: f64,
    /// The reward.
    pub reward: RewardConfig,
}

/// A reward as written in a config file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardConfig {
    /// Negative Fréchet distance of each song to the exemplars.
    PerSongFad {
        /// Encoder.
        encoder: String,
        /// Embedding setting.
        setting: String,
        /// Reference set.
        exemplars: Exemplars,
    },
    /// Negative Fréchet distance of a set of songs to the exemplars.
    DatasetFad {
        /// Encoder.
        encoder: String,
        /// Embedding setting.
        setting: String,
        /// Reference set.
        exemplars: Exemplars,
    },
    /// Vendi score of a set of songs.
    Vendi {
        /// Encoder.
        encoder: String,
        /// Embedding setting.
        setting: String,
        /// What one row is: `song_mean` (paper) or `windows`.
        pooling: Pooling,
    },
    /// CLAP score of each song and its prompt.
    ClapScore {
        /// Encoder with an audio and a text branch.
        encoder: String,
        /// Embedding setting.
        setting: String,
        /// Where negative cosines become zero: `before_mean` (paper) or `after_mean`.
        clip: Clip,
    },
    /// Weighted sum of running-normalised rewards.
    WeightedSum {
        /// The terms, at least one.
        terms: Vec<Term>,
    },
    /// One of the rewards, drawn with equal probability at every step (paper 5.5).
    RandomMix {
        /// The rewards, at least one.
        rewards: Vec<RewardConfig>,
    },
}

impl RewardConfig {
    /// The rewards of which a step takes one: those of a `random_mix`, else the reward itself.
    pub fn parts(&self) -> &[RewardConfig] {
        match self {
            RewardConfig::RandomMix { rewards } => rewards,
            single => std::slice::from_ref(single),
        }
    }

    /// Encoders and settings that the reward reads, each once, in order of first mention: slot `i` of a
    /// [`crate::Song`] holds the view of source `i`.
    pub fn sources(&self) -> Vec<Source> {
        let mut sources = Vec::new();
        self.visit(&mut |leaf| {
            if let Some(source) = leaf.source()
                && !sources.contains(&source)
            {
                sources.push(source);
            }
        });
        sources
    }

    /// Reference sets that the reward reads, with the source they must be embedded by, each once.
    pub fn references(&self) -> Vec<(Source, Exemplars)> {
        let mut references = Vec::new();
        self.visit(&mut |leaf| {
            let (RewardConfig::PerSongFad { exemplars, .. } | RewardConfig::DatasetFad { exemplars, .. }) =
                leaf
            else {
                return;
            };
            if let Some(source) = leaf.source() {
                let reference = (source, exemplars.clone());
                if !references.contains(&reference) {
                    references.push(reference);
                }
            }
        });
        references
    }

    /// Whether a song's prompt must be embedded into this source (it is the CLAP score's).
    pub fn needs_text(&self, source: &Source) -> bool {
        let mut needed = false;
        self.visit(&mut |leaf| {
            needed |=
                matches!(leaf, RewardConfig::ClapScore { .. }) && leaf.source().as_ref() == Some(source);
        });
        needed
    }

    /// Whether it is a distance, which tables show as such: lower is better there.
    pub fn is_distance(&self) -> bool {
        matches!(self, RewardConfig::PerSongFad { .. } | RewardConfig::DatasetFad { .. })
    }

    /// Short name for tables: `per_song_fad(musicnn/ma to my-songs)`, `mix(a | b)`.
    pub fn label(&self) -> String {
        let join = |labels: Vec<String>, by: &str| labels.join(by);
        match self {
            RewardConfig::WeightedSum { terms } => {
                let terms = terms.iter().map(|t| format!("{}*{}", t.weight, t.reward.label())).collect();
                format!("sum({})", join(terms, " + "))
            }
            RewardConfig::RandomMix { rewards } => {
                format!("mix({})", join(rewards.iter().map(RewardConfig::label).collect(), " | "))
            }
            RewardConfig::PerSongFad { encoder, setting, exemplars } => {
                format!("per_song_fad({encoder}/{setting} to {})", exemplars.name())
            }
            RewardConfig::DatasetFad { encoder, setting, exemplars } => {
                format!("dataset_fad({encoder}/{setting} to {})", exemplars.name())
            }
            RewardConfig::Vendi { encoder, setting, pooling: Pooling::Windows } => {
                format!("vendi({encoder}/{setting}, windows)")
            }
            RewardConfig::Vendi { encoder, setting, .. } => format!("vendi({encoder}/{setting})"),
            RewardConfig::ClapScore { encoder, setting, .. } => format!("clap_score({encoder}/{setting})"),
        }
    }

    /// Checks what can be checked without files.
    ///
    /// # Errors
    /// If a name is empty, a weight is not finite or all are zero, a list is empty, or a mix is inside another reward.
    pub fn validate(&self) -> Result<()> {
        let bad =
            |key, expected: &str, found: String| Err(Error::Config { key, expected: expected.into(), found });
        match self {
            RewardConfig::RandomMix { rewards } if rewards.is_empty() => {
                bad("rewards", "at least one reward", "an empty list".into())
            }
            RewardConfig::RandomMix { rewards } => rewards.iter().try_for_each(|r| match r {
                RewardConfig::RandomMix { .. } => bad(
                    "rewards",
                    "rewards other than `random_mix` (write one list)",
                    "a `random_mix`".into(),
                ),
                r => r.validate(),
            }),
            RewardConfig::WeightedSum { terms } if terms.is_empty() => {
                bad("terms", "at least one term", "an empty list".into())
            }
            RewardConfig::WeightedSum { terms } => {
                if terms.iter().all(|t| t.weight == 0.0) {
                    return bad("weight", "at least one that is not zero", "0 in every term".into());
                }
                terms.iter().try_for_each(|t| {
                    if !t.weight.is_finite() {
                        return bad("weight", "a finite number", t.weight.to_string());
                    }
                    if matches!(t.reward, RewardConfig::RandomMix { .. } | RewardConfig::WeightedSum { .. }) {
                        return bad("terms", "plain rewards", format!("`{}`", t.reward.label()));
                    }
                    t.reward.validate()
                })
            }
            leaf => {
                let source =
                    leaf.source().unwrap_or(Source { encoder: String::new(), setting: String::new() });
                if source.encoder.is_empty() {
                    return bad("encoder", "the name of an encoder", "empty".into());
                }
                if source.setting.is_empty() {
                    return bad("setting", "the name of an embedding setting", "empty".into());
                }
                Ok(())
            }
        }
    }

    fn source(&self) -> Option<Source> {
        match self {
            RewardConfig::PerSongFad { encoder, setting, .. }
            | RewardConfig::DatasetFad { encoder, setting, .. }
            | RewardConfig::Vendi { encoder, setting, .. }
            | RewardConfig::ClapScore { encoder, setting, .. } => {
                Some(Source { encoder: encoder.clone(), setting: setting.clone() })
            }
            RewardConfig::WeightedSum { .. } | RewardConfig::RandomMix { .. } => None,
        }
    }

    fn visit(&self, f: &mut dyn FnMut(&RewardConfig)) {
        match self {
            RewardConfig::WeightedSum { terms } => terms.iter().for_each(|t| t.reward.visit(f)),
            RewardConfig::RandomMix { rewards } => rewards.iter().for_each(|r| r.visit(f)),
            leaf => f(leaf),
        }
    }
}

/// The rewards of a run: one, or several of which each step draws one.
#[derive(Debug)]
pub struct RewardSet {
    sources: Vec<Source>,
    labels: Vec<String>,
    rewards: Vec<Reward>,
}

/// References already made, by the source and exemplars they belong to.
pub type References = Vec<((Source, Exemplars), Arc<FrechetReference>)>;

impl RewardSet {
    /// Builds what `config` describes. `reference` makes the statistics of exemplars that are not a statistics file
    /// (embedding is the caller's step); it is asked once per source and exemplars.
    ///
    /// # Errors
    /// If the config has no meaning, a statistics file cannot be used, or `reference` fails.
    pub fn build<E: std::fmt::Display>(
        config: &RewardConfig,
        mut reference: impl FnMut(&Source, &Exemplars) -> std::result::Result<Arc<FrechetReference>, E>,
    ) -> Result<Self> {
        config.validate()?;
        let sources = config.sources();
        let mut made = References::new();
        for (source, exemplars) in config.references() {
            let stats = match exemplars.read()? {
                Some(stats) => Arc::new(stats),
                None => reference(&source, &exemplars).map_err(|e| Error::Reference {
                    exemplars: exemplars.describe(),
                    source_name: format!("{}/{}", source.encoder, source.setting),
                    reason: e.to_string(),
                })?,
            };
            made.push(((source, exemplars), stats));
        }
        let parts = config.parts();
        let rewards =
            parts.iter().map(|part| build_one(part, &sources, &made)).collect::<Result<Vec<_>>>()?;
        Ok(Self { labels: parts.iter().map(|p| p.label()).collect(), sources, rewards })
    }

    /// What each slot of a [`crate::Song`] must hold.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// Number of rewards to draw from; 1 unless the config is a `random_mix`.
    pub fn len(&self) -> usize {
        self.rewards.len()
    }

    /// Never true: a set is built with at least one reward.
    pub fn is_empty(&self) -> bool {
        self.rewards.is_empty()
    }

    /// Which reward a step uses, from 64 random bits of the caller's generator: each with equal probability.
    pub fn pick(&self, random: u64) -> usize {
        // High word of the product: uniform up to len/2^64.
        ((u128::from(random) * self.rewards.len() as u128) >> 64) as usize
    }

    /// Reward `i`.
    pub fn get(&self, i: usize) -> Option<&Reward> {
        self.rewards.get(i)
    }

    /// Reward `i`, to update its normalisers ([`Reward::observe`]).
    pub fn get_mut(&mut self, i: usize) -> Option<&mut Reward> {
        self.rewards.get_mut(i)
    }

    /// Name of reward `i` for logs and tables.
    pub fn label(&self, i: usize) -> Option<&str> {
        self.labels.get(i).map(String::as_str)
    }

    /// The rewards, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Reward> {
        self.rewards.iter()
    }

    /// The rewards, in order, to change.
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, Reward> {
        self.rewards.iter_mut()
    }

    /// Running normalisers of every reward, for a checkpoint.
    pub fn state(&self) -> Vec<Vec<RunningStats>> {
        self.rewards.iter().map(Reward::state).collect()
    }

    /// Takes back what [`RewardSet::state`] gave.
    ///
    /// # Errors
    /// If it belongs to another config.
    pub fn load_state(&mut self, state: &[Vec<RunningStats>]) -> Result<()> {
        if state.len() != self.rewards.len() {
            return Err(Error::State { expected: self.rewards.len(), found: state.len() });
        }
        self.rewards.iter_mut().zip(state).try_for_each(|(reward, state)| reward.load_state(state))
    }
}

fn build_one(config: &RewardConfig, sources: &[Source], made: &References) -> Result<Reward> {
    let slot = || {
        let source = config.source();
        sources.iter().position(|s| Some(s) == source.as_ref()).unwrap_or(usize::MAX)
    };
    let reference = |exemplars: &Exemplars| {
        let source = config.source();
        let found = made.iter().find(|((s, e), _)| Some(s) == source.as_ref() && e == exemplars);
        found.map(|(_, r)| Arc::clone(r)).ok_or_else(|| Error::Config {
            key: "exemplars",
            expected: "exemplars listed by `references`".into(),
            found: exemplars.describe(),
        })
    };
    Ok(match config {
        RewardConfig::PerSongFad { exemplars, .. } => {
            Reward::Instance(Box::new(PerSongFad { slot: slot(), reference: reference(exemplars)? }))
        }
        RewardConfig::DatasetFad { exemplars, .. } => {
            Reward::Distribution(Box::new(DatasetFad { slot: slot(), reference: reference(exemplars)? }))
        }
        RewardConfig::Vendi { pooling, .. } => {
            Reward::Distribution(Box::new(Vendi { slot: slot(), pooling: *pooling }))
        }
        RewardConfig::ClapScore { clip, .. } => {
            Reward::Instance(Box::new(ClapScore { slot: slot(), clip: *clip }))
        }
        RewardConfig::WeightedSum { terms } => weighted_sum(
            terms
                .iter()
                .map(|t| Ok((t.weight, build_one(&t.reward, sources, made)?)))
                .collect::<Result<Vec<_>>>()?,
        ),
        RewardConfig::RandomMix { .. } => {
            return Err(Error::Config {
                key: "kind",
                expected: "a reward to compute".into(),
                found: "`random_mix` inside another reward".into(),
            });
        }
    })
}
