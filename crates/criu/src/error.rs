use std::{fmt, io, path::PathBuf};

use thiserror::Error;

use crate::{Kind, Outcome, fields::BadFields};

/// Who sent something, or went away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Runtime,
    Criu,
    Stub,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Runtime => "the OCI runtime",
            Side::Criu => "CRIU",
            Side::Stub => "the criu stub",
        })
    }
}

#[derive(Debug, Error)]
pub enum CriuError {
    #[error("{what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("talking to {with}")]
    Talk { with: Side, source: io::Error },
    #[error("no criu found in PATH; install CRIU 4.2 or later, or name it in TRANSSHIP_CRIU")]
    NoCriu,
    #[error("{from} sent a message that is no CRIU RPC")]
    Malformed { from: Side, source: BadFields },
    #[error("{from} sent an answer where none was due")]
    OutOfTurn { from: Side },
    /// CRIU's process went away without an answer.
    #[error("CRIU died during {during}{}", said(.stderr))]
    CriuDied { during: String, stderr: Option<String> },
    /// The runtime went away before the decision; CRIU undoes its work.
    #[error("the OCI runtime died during {during}")]
    RuntimeDied { during: String },
    /// CRIU answered before the awaited notification came.
    #[error("CRIU ended the {kind} before {awaited}: {outcome}")]
    Ended { kind: Kind, awaited: String, outcome: Outcome },
    #[error("hiding memory from CRIU: {what}")]
    Hide { what: &'static str, source: io::Error },
    #[error("CRIU is in our own mount namespace: its gate was not isolated")]
    NotIsolated,
    /// Some processes are hidden and some are not; CRIU must not dump.
    #[error("memory was hidden from CRIU in part and cannot be shown again")]
    HalfHidden,
    /// The last notification before the decision came before the awaited one.
    #[error("CRIU was at {held} without having sent {awaited}")]
    Missed { awaited: String, held: String },
    #[error("the gate was closed")]
    Closed,
    #[error("{0}")]
    Probe(String),
}

fn said(stderr: &Option<String>) -> String {
    stderr.as_ref().map(|text| format!(": {text}")).unwrap_or_default()
}

impl CriuError {
    pub(crate) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| CriuError::File { what, path, source }
    }

    pub(crate) fn talk(with: Side) -> impl FnOnce(io::Error) -> Self {
        move |source| CriuError::Talk { with, source }
    }
}
