//! A connection to a peer whose name is known and proved.

use tokio::io::{AsyncRead, AsyncWrite};
use transship_types::NodeName;
use transship_wire::{Reader, Writer};

pub type BoxRead = Box<dyn AsyncRead + Send + Unpin>;
pub type BoxWrite = Box<dyn AsyncWrite + Send + Unpin>;

/// Frames both ways. The two halves are independent, so one may be written
/// while the other is waited for.
pub struct Channel {
    pub reader: Reader<BoxRead>,
    pub writer: Writer<BoxWrite>,
    /// As the peer's certificate names it.
    pub peer: NodeName,
}

impl Channel {
    pub(crate) fn over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        peer: NodeName,
    ) -> Self {
        let (read, write) = tokio::io::split(stream);
        Self { reader: Reader::new(Box::new(read)), writer: Writer::new(Box::new(write)), peer }
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("peer", &self.peer).finish_non_exhaustive()
    }
}
