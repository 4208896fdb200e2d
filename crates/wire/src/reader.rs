//! Frames from a stream.

use std::{mem, time::Duration};

use bytes::{Bytes, BytesMut};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time,
};

use crate::{
    Frame, WireError,
    frame::{HEADER, Header, Kind},
};

/// Reads frames. Every method may be cancelled (in a `select!`) without
/// losing a byte: what has arrived of a frame stays here.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    deadline: Option<Duration>,
    header: [u8; HEADER],
    filled: usize,
    /// Present once the header is complete and within the limits.
    body: Option<(Header, BytesMut)>,
    /// For the next data frame.
    spare: BytesMut,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub fn new(inner: R) -> Self {
        let (header, spare) = ([0; HEADER], BytesMut::new());
        Self { inner, deadline: None, header, filled: 0, body: None, spare }
    }

    /// From now on every frame must arrive whole within `deadline`, counted
    /// from the call that waits for it.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = Some(deadline);
    }

    /// From now on a frame may take for ever: for a connection whose silence
    /// means nothing.
    pub fn clear_deadline(&mut self) {
        self.deadline = None;
    }

    /// The next frame must be a control frame with an `M`.
    pub async fn control<M: Message + Default>(&mut self) -> Result<M, WireError> {
        match self.next().await? {
            Frame::Control(bytes) => M::decode(bytes).map_err(WireError::Decode),
            other => Err(WireError::Unexpected { wanted: "control", got: other.name() }),
        }
    }

    /// The next piece of a run of bulk bytes; `None` once it is complete.
    pub async fn data(&mut self) -> Result<Option<Bytes>, WireError> {
        match self.next().await? {
            Frame::Data(bytes) => Ok(Some(bytes)),
            Frame::EndOfData => Ok(None),
            other => Err(WireError::Unexpected { wanted: "data", got: other.name() }),
        }
    }

    /// Gives the memory of a frame back for the next one: a lane that moves
    /// gigabytes need not ask for each megabyte anew. A frame that somebody
    /// else still holds is left alone.
    pub fn reuse(&mut self, frame: Bytes) {
        if let Ok(spare) = frame.try_into_mut() {
            self.spare = spare;
        }
    }

    pub async fn next(&mut self) -> Result<Frame, WireError> {
        match self.deadline {
            None => self.frame().await,
            Some(limit) => {
                time::timeout(limit, self.frame()).await.map_err(|_| WireError::Deadline(limit))?
            }
        }
    }

    async fn frame(&mut self) -> Result<Frame, WireError> {
        while self.body.is_none() {
            let free = &mut self.header[self.filled..];
            match self.inner.read(free).await {
                Ok(0) if self.filled == 0 => return Err(WireError::Closed),
                Ok(0) => return Err(WireError::Truncated),
                Ok(n) => self.filled += n,
                Err(error) => return Err(error.into()),
            }
            if self.filled == HEADER {
                let header = Header::parse(self.header)?;
                let mut bytes = match header.kind {
                    Kind::Data => mem::take(&mut self.spare),
                    Kind::Control => BytesMut::new(),
                };
                bytes.clear();
                bytes.reserve(header.length);
                self.body = Some((header, bytes));
            }
        }
        // Taken out only once complete, so that a cancelled call leaves it.
        if let Some((header, bytes)) = &mut self.body {
            while bytes.len() < header.length {
                let missing = (header.length - bytes.len()) as u64;
                // `take`: BytesMut may have more capacity than asked for, and
                // what follows belongs to the next frame.
                if (&mut self.inner).take(missing).read_buf(bytes).await? == 0 {
                    return Err(WireError::Truncated);
                }
            }
        }
        self.filled = 0;
        match self.body.take() {
            Some((Header { kind: Kind::Control, .. }, bytes)) => Ok(Frame::Control(bytes.freeze())),
            Some((Header { length: 0, .. }, _)) => Ok(Frame::EndOfData),
            Some((_, bytes)) => Ok(Frame::Data(bytes.freeze())),
            None => unreachable!("the loop above ends with a body"),
        }
    }
}
