//! What can go wrong between a set of songs and its reward.

/// Error of a reward or of building one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The metric underneath refused its input.
    #[error(transparent)]
    Metric(#[from] dragon_metrics::Error),
    /// A reward asks for an embedding that the song does not carry.
    #[error("the song has {found} embedding sets, the reward reads set {slot} (counted from 0)")]
    MissingView {
        /// Slot asked for, an index into [`crate::RewardSet::sources`].
        slot: usize,
        /// Number of slots the song carries.
        found: usize,
    },
    /// A CLAP score needs the text embedding of the song's own prompt.
    #[error("the song carries no text embedding of its prompt, which the CLAP score compares it with")]
    MissingText,
    /// The songs of D1, D2, … at one place answer the same prompt.
    #[error(
        "the sets D1, D2, … have {sizes:?} songs, expected two sets or more of equally many, at least one each"
    )]
    UnequalSets {
        /// Songs in each set.
        sizes: Vec<usize>,
    },
    /// The swap range of Algorithm 1 leaves the pairs.
    #[error("swaps of pairs {start}..{end} were asked for, there are {pairs} pairs")]
    SwapRange {
        /// First pair.
        start: usize,
        /// One past the last pair.
        end: usize,
        /// Number of pairs.
        pairs: usize,
    },
    /// A reward came out as NaN or infinite.
    #[error("reward is {value}, expected a finite number")]
    NotFinite {
        /// The value.
        value: f64,
    },
    /// A config value that has no meaning.
    #[error("reward config: `{key}` is {found}, expected {expected}")]
    Config {
        /// Key in the config.
        key: &'static str,
        /// What would do.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The caller's step that makes reference statistics failed.
    #[error("reference statistics of {exemplars} for {source_name}: {reason}")]
    Reference {
        /// Description of the exemplars.
        exemplars: String,
        /// Encoder and setting.
        source_name: String,
        /// Reason, from the caller.
        reason: String,
    },
    /// A saved state that does not belong to this reward.
    #[error(
        "saved reward state holds {found} normalisers, expected {expected}; was the reward config changed?"
    )]
    State {
        /// Normalisers of this reward.
        expected: usize,
        /// Normalisers in the state.
        found: usize,
    },
    /// Songs could not be exchanged between ranks.
    #[error("exchange of songs between ranks: {0}")]
    Exchange(String),
    /// An error with the song it belongs to.
    #[error("song {index}: {source}")]
    Song {
        /// Index of the song in its set.
        index: usize,
        /// What is wrong with it.
        source: Box<Error>,
    },
}

impl Error {
    /// The same error, with the index of its song.
    pub fn of_song(self, index: usize) -> Self {
        Error::Song { index, source: Box::new(self) }
    }
}
