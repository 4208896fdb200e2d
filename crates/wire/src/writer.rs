//! Frames into a stream.

use std::{future::Future, io, io::IoSlice, time::Duration};

use prost::Message;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    time,
};

use crate::{
    MAX_DATA, WireError,
    frame::{HEADER, Header, Kind},
};

/// Writes frames. A cancelled call may have written part of a frame: the
/// stream is then of no further use.
#[derive(Debug)]
pub struct Writer<W> {
    inner: W,
    deadline: Option<Duration>,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub fn new(inner: W) -> Self {
        Self { inner, deadline: None }
    }

    /// From now on the peer must take every frame within `deadline`.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = Some(deadline);
    }

    /// Sends one message and flushes: a message is always waited for.
    pub async fn control<M: Message>(&mut self, message: &M) -> Result<(), WireError> {
        let header = Header::new(Kind::Control, message.encoded_len())?;
        let mut frame = Vec::with_capacity(HEADER + header.length);
        frame.extend_from_slice(&header.bytes());
        // A Vec grows, so this cannot run out of room.
        message.encode(&mut frame).map_err(|e| WireError::Io(io::Error::other(e)))?;
        within(self.deadline, async {
            self.inner.write_all(&frame).await?;
            self.inner.flush().await
        })
        .await
    }

    /// Sends bulk bytes, in as many frames as they need. An empty slice would
    /// end the run, which [`Writer::end_data`] says aloud: it is refused.
    pub async fn data(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        if bytes.is_empty() {
            return Err(WireError::Unexpected { wanted: "data", got: "end-of-data" });
        }
        for piece in bytes.chunks(MAX_DATA) {
            let header = Header::new(Kind::Data, piece.len())?.bytes();
            within(self.deadline, write_all(&mut self.inner, [&header, piece])).await?;
        }
        Ok(())
    }

    /// A message with a run of one data frame after it, as one write: the
    /// same bytes as [`Writer::control`], [`Writer::data`] and
    /// [`Writer::end_data`], without three small packets. `bytes` are not
    /// copied, and nothing is flushed.
    pub async fn control_with_data<M: Message>(
        &mut self,
        message: &M,
        bytes: &[u8],
    ) -> Result<(), WireError> {
        if bytes.is_empty() {
            return Err(WireError::Unexpected { wanted: "data", got: "end-of-data" });
        }
        let control = Header::new(Kind::Control, message.encoded_len())?;
        let data = Header::new(Kind::Data, bytes.len())?;
        let end = Header::new(Kind::Data, 0)?.bytes();
        let mut head = Vec::with_capacity(2 * HEADER + control.length);
        head.extend_from_slice(&control.bytes());
        message.encode(&mut head).map_err(|e| WireError::Io(io::Error::other(e)))?;
        head.extend_from_slice(&data.bytes());
        within(self.deadline, write_all(&mut self.inner, [&head, bytes, &end])).await
    }

    /// Ends a run of bulk bytes. Flushes, since the peer acts on it.
    pub async fn end_data(&mut self) -> Result<(), WireError> {
        let header = Header::new(Kind::Data, 0)?.bytes();
        within(self.deadline, async {
            self.inner.write_all(&header).await?;
            self.inner.flush().await
        })
        .await
    }

    pub async fn flush(&mut self) -> Result<(), WireError> {
        within(self.deadline, self.inner.flush()).await
    }

    /// Tells the peer that nothing more will come, so that it sees a clean
    /// end and not a cut.
    pub async fn close(&mut self) -> Result<(), WireError> {
        within(self.deadline, self.inner.shutdown()).await
    }
}

async fn within<T>(
    deadline: Option<Duration>,
    work: impl Future<Output = io::Result<T>>,
) -> Result<T, WireError> {
    match deadline {
        None => Ok(work.await?),
        Some(limit) => {
            Ok(time::timeout(limit, work).await.map_err(|_| WireError::Deadline(limit))??)
        }
    }
}

/// All parts in one system call (and as few TLS records as they need) where
/// the stream can, without copying them.
async fn write_all<const N: usize, W: AsyncWrite + Unpin>(
    inner: &mut W,
    parts: [&[u8]; N],
) -> io::Result<()> {
    let mut slices = parts.map(IoSlice::new);
    let mut left = &mut slices[..];
    // Drops the parts that are empty from the start.
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        let written = inner.write_vectored(left).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut left, written);
    }
    Ok(())
}
