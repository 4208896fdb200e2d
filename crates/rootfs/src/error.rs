//! What can go wrong, with the entry it went wrong at.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;
use transship_types::Code;

#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RootfsError {
    #[error("cannot {doing} {}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    /// The caller's sink refused the bytes.
    #[error("cannot hand on the writable layer")]
    Sink(#[source] io::Error),
    #[error("the overlay at {} has no upper directory: it is mounted read-only", .0.display())]
    NoUpper(PathBuf),
    #[error("the upper directory {} of the overlay at {} is not there", upper.display(), merged.display())]
    LostUpper { upper: PathBuf, merged: PathBuf },
    /// Somebody outside the container writes to its layer.
    #[error("{} changed while the container was frozen", .0.display())]
    Changed(PathBuf),
    #[error("the path {} has {length} bytes, at most {limit} can be sent", path.display())]
    PathTooLong { path: PathBuf, length: usize, limit: usize },
    #[error("the writable layer has more than {limit} entries")]
    TooManyEntries { limit: u64 },
    #[error("the extended attributes of {} have {size} bytes, at most {limit} can be sent", path.display())]
    AttributesTooLarge { path: PathBuf, size: usize, limit: usize },
    /// The stream is not one that a sender of ours makes.
    #[error("the stream of the writable layer is malformed at {}: {problem}", at.display())]
    Malformed { at: PathBuf, problem: Problem },
    /// An earlier error ended this receiver.
    #[error("the writable layer was given up after an earlier error")]
    GivenUp,
}

/// Why a stream is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Problem {
    #[error("it has version {0}, only version 1 is known")]
    Version(u8),
    #[error("record {0} is unknown")]
    Record(u8),
    #[error("the name {name:?} {why}")]
    Name { name: String, why: &'static str },
    #[error("the {what} of {name:?} is not allowed: {why}")]
    Value { what: &'static str, name: String, why: &'static str },
    #[error("{what} is {value}, at most {limit} is allowed")]
    Limit { what: &'static str, value: u64, limit: u64 },
    #[error("{name:?} comes after {after:?}, names must ascend")]
    Order { name: String, after: String },
    #[error("{0}")]
    Place(&'static str),
    #[error("it ends in the middle")]
    Truncated,
    #[error("it says {said} {what}, but had {had}")]
    Totals { what: &'static str, said: u64, had: u64 },
}

impl RootfsError {
    pub(crate) fn io(
        doing: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(rustix::io::Errno) -> Self {
        let path = path.as_ref().to_path_buf();
        move |errno| Self::Io { doing, path, source: errno.into() }
    }

    /// The reason as a word that programs can match.
    pub fn code(&self) -> Code {
        match self {
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::FileTooLarge => Code::Space,
                _ => Code::Internal,
            },
            Self::Sink(_) => Code::Link,
            Self::NoUpper(_) | Self::LostUpper { .. } => Code::Mount,
            Self::Changed(_) => Code::Busy,
            Self::PathTooLong { .. }
            | Self::TooManyEntries { .. }
            | Self::AttributesTooLarge { .. } => Code::Unsupported,
            Self::Malformed { .. } => Code::Malformed,
            Self::GivenUp => Code::Internal,
        }
    }
}
