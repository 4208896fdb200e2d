//! What can go wrong with a frame.

use std::{io, time::Duration};

use thiserror::Error;

/// Every variant but [`WireError::Closed`] leaves the connection unusable:
/// the place in the stream is lost.
#[derive(Debug, Error)]
pub enum WireError {
    /// The peer ended the connection between two frames, as a peer may.
    #[error("the peer closed the connection")]
    Closed,
    #[error("the connection broke off in the middle of a frame")]
    Truncated,
    #[error("no complete frame passed within {} s", .0.as_secs_f32())]
    Deadline(Duration),
    #[error("a {kind} frame of {length} bytes is longer than the limit of {limit}")]
    TooLong { kind: &'static str, length: usize, limit: usize },
    #[error("a control message has more than {limit} fields")]
    TooMany { limit: usize },
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    #[error("the reserved bytes of a frame header are not zero")]
    Reserved,
    #[error("a {wanted} frame was due, a {got} frame came")]
    Unexpected { wanted: &'static str, got: &'static str },
    #[error("a control message could not be decoded")]
    Decode(#[source] prost::DecodeError),
    #[error("reading or writing the connection failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // rustls says this for a connection cut without close_notify.
            io::ErrorKind::UnexpectedEof => WireError::Truncated,
            _ => WireError::Io(error),
        }
    }
}
