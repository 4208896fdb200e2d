//! What goes wrong in a migration, and what a peer is told about it.

use std::{io, path::PathBuf};

use thiserror::Error;
use transship_link::LinkError;
use transship_memory::MemoryError;
use transship_rootfs::RootfsError;
use transship_types::{Code, InvalidName, Refusal};
use transship_wire::WireError;

use crate::Phase;

/// An error of either side.
#[derive(Debug, Error)]
pub enum MigrationError {
    #[error("the link to the other node broke")]
    Wire(#[from] WireError),
    #[error("connecting to the other node failed")]
    Link(#[from] LinkError),
    #[error("copying the writable layer failed")]
    Rootfs(#[from] RootfsError),
    /// The OCI runtime or CRIU, with the lines of its log that matter.
    #[error("{step}: {reason}")]
    Runtime { step: &'static str, reason: String },
    #[error("image {name:?}")]
    Image {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("journal {}", path.display())]
    Journal {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the other side sent what it must not: {what}")]
    Malformed { what: String },
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The other side says no, and why.
    #[error("the other node: {0}")]
    Peer(Refusal),
    #[error("its memory failed")]
    Memory(#[from] MemoryError),
    /// No pause within the budget is in sight.
    #[error("given up: {reason} (what would help: {remedy})")]
    GivenUp { reason: String, remedy: String },
    #[error("cancelled")]
    Cancelled,
    #[error("{what} took longer than {seconds} s")]
    Timeout { what: &'static str, seconds: u64 },
}

impl MigrationError {
    pub fn runtime(step: &'static str, reason: impl Into<String>) -> Self {
        Self::Runtime { step, reason: reason.into() }
    }

    pub(crate) fn malformed(what: impl Into<String>) -> Self {
        Self::Malformed { what: what.into() }
    }

    pub fn code(&self) -> Code {
        match self {
            Self::Wire(_) => Code::Link,
            Self::Link(error) => error.code(),
            Self::Rootfs(error) => error.code(),
            Self::Runtime { .. } => Code::Runtime,
            Self::Image { .. } | Self::Journal { .. } => Code::Space,
            Self::Malformed { .. } | Self::Name(_) => Code::Malformed,
            Self::Peer(refusal) => refusal.code,
            Self::Memory(MemoryError::Full { .. } | MemoryError::Scattered { .. }) => Code::Space,
            Self::Memory(MemoryError::Invalid(_)) => Code::Malformed,
            Self::Memory(_) => Code::Runtime,
            Self::GivenUp { .. } => Code::NotConverging,
            Self::Cancelled => Code::Cancelled,
            Self::Timeout { .. } => Code::Timeout,
        }
    }

    pub fn during(self, phase: Phase) -> DepartError {
        DepartError { phase, error: self }
    }
}

/// The error and everything that caused it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// A departure that ended before its commit: the container runs on here.
#[derive(Debug, Error)]
#[error("in phase {phase}: {}", chain(error))]
pub struct DepartError {
    pub phase: Phase,
    pub error: MigrationError,
}
