//! What can be wrong with the input of a metric.

use std::path::PathBuf;

/// Error of a metric, a statistic or a file; every message names what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Fewer rows, songs, pairs or trials than the quantity needs.
    #[error("{what}: expected at least {expected}, found {found}")]
    TooFew {
        /// What is counted.
        what: &'static str,
        /// Smallest number that has a meaning.
        expected: usize,
        /// Number given.
        found: usize,
    },
    /// An embedding, mean or covariance holds NaN or an infinity.
    #[error("{what}: row {row}, column {column} is {value}, expected a finite number")]
    NotFinite {
        /// Which matrix.
        what: &'static str,
        /// Row, counted from 0.
        row: usize,
        /// Column, counted from 0.
        column: usize,
        /// The value found.
        value: f64,
    },
    /// Two dimensions that must agree do not.
    #[error("{what}: expected dimension {expected}, found {found}")]
    Dimension {
        /// Which matrix or vector.
        what: &'static str,
        /// Dimension that fits.
        expected: usize,
        /// Dimension given.
        found: usize,
    },
    /// An embedding of length zero has no direction.
    #[error("{what}: row {row} is all zeros and has no direction; is this window silent?")]
    ZeroRow {
        /// Which matrix.
        what: &'static str,
        /// Row, counted from 0.
        row: usize,
    },
    /// A covariance matrix that is not symmetric.
    #[error(
        "covariance is not symmetric: [{row}, {column}] is {value} but [{column}, {row}] is {mirrored}; is this file a covariance?"
    )]
    NotSymmetric {
        /// Row of the larger disagreement.
        row: usize,
        /// Its column.
        column: usize,
        /// Value at (row, column).
        value: f64,
        /// Value at (column, row).
        mirrored: f64,
    },
    /// A covariance matrix with a negative eigenvalue beyond rounding.
    #[error("covariance is not positive semi-definite: smallest eigenvalue {smallest}, largest {largest}")]
    NotPositive {
        /// Smallest eigenvalue.
        smallest: f64,
        /// Largest eigenvalue.
        largest: f64,
    },
    /// A parameter outside its range.
    #[error("{name} is {found}, expected {expected}")]
    Parameter {
        /// Name of the parameter.
        name: &'static str,
        /// Its range.
        expected: &'static str,
        /// The value given.
        found: String,
    },
    /// An index that points outside the set it indexes.
    #[error("{what}: index {index} is out of range, the set has {len} members")]
    Index {
        /// What is indexed.
        what: &'static str,
        /// The index given.
        index: usize,
        /// Number of members.
        len: usize,
    },
    /// The eigenvalue iteration did not converge (not seen on finite input).
    #[error("eigenvalues of a {size} x {size} matrix did not converge")]
    NoConvergence {
        /// Side of the matrix.
        size: usize,
    },
    /// The file system refused.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried: `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Reason given by the system.
        source: std::io::Error,
    },
    /// A file that is not what its name says.
    #[error("cannot use `{}`: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, with expected and found.
        reason: String,
    },
    /// A file without the entry asked for.
    #[error("`{}` has no entry `{key}`; it has: {available}", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// Entry asked for.
        key: String,
        /// Entries present, separated by commas.
        available: String,
    },
    /// An error with the name of the file or song it belongs to.
    #[error("{context}: {source}")]
    In {
        /// File or song.
        context: String,
        /// What is wrong there.
        source: Box<Error>,
    },
}

impl Error {
    /// The same error, prefixed by the file or song it belongs to.
    pub fn within(self, context: impl Into<String>) -> Self {
        Error::In { context: context.into(), source: Box::new(self) }
    }
}
