//! Frames from a stream.

use std::{mem, time::Duration};

use bytes::{Bytes, BytesMut};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::{self, Instant},
};

use crate::{
    Frame, MAX_CONTROL, WireError,
    frame::{HEADER, Header, Kind},
    shape::{MAX_FIELDS, is_modest},
};

/// What a run of data must bring within a deadline: enough that a peer cannot
/// hold a place here for ever by a byte now and then, little enough for the
/// slowest link that is any use (2 KiB a second, for the shortest deadline).
const PROGRESS: usize = 64 << 10;

/// Reads frames. Every method may be cancelled (in a `select!`) without
/// losing a byte: what has arrived of a frame stays here.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    deadline: Option<Duration>,
    /// The longest control frame that is taken.
    most: usize,
    /// How long the run of data has been waited for since it last brought
    /// [`PROGRESS`], and how much it has brought since.
    waited: Duration,
    brought: usize,
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
        let (waited, brought) = (Duration::ZERO, 0);
        let (deadline, most, filled, body) = (None, MAX_CONTROL, 0, None);
        Self { inner, deadline, most, waited, brought, header, filled, body, spare }
    }

    /// From now on every frame must arrive whole within `deadline`, counted
    /// from the call that waits for it, and a run of data must bring 64 KiB
    /// in so long a wait, or its end.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = Some(deadline);
    }

    /// From now on a longer control frame is an error, before anything is
    /// allocated for it. No more than [`MAX_CONTROL`] in any case.
    pub fn set_control_limit(&mut self, bytes: usize) {
        self.most = bytes.min(MAX_CONTROL);
    }

    /// From now on a frame may take for ever: for a connection whose silence
    /// means nothing.
    pub fn clear_deadline(&mut self) {
        self.deadline = None;
    }

    /// The next frame must be a control frame with an `M`.
    pub async fn control<M: Message + Default>(&mut self) -> Result<M, WireError> {
        match self.next().await? {
            Frame::Control(bytes) => decode(bytes),
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
        let Some(limit) = self.deadline else { return self.frame().await };
        let began = Instant::now();
        let left = limit.saturating_sub(self.waited);
        let frame =
            time::timeout(left, self.frame()).await.map_err(|_| WireError::Deadline(limit))??;
        if let Frame::Data(bytes) = &frame
            && self.brought + bytes.len() < PROGRESS
        {
            self.brought += bytes.len();
            // Only the waiting counts: what is done with the bytes in between
            // is not the peer's doing.
            self.waited += began.elapsed();
        } else {
            (self.waited, self.brought) = (Duration::ZERO, 0);
        }
        Ok(frame)
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
                let header = Header::parse(self.header)?.within(self.most)?;
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

/// A control frame as a message, unless it has more parts than any of ours.
pub fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, WireError> {
    if !is_modest(&bytes) {
        return Err(WireError::TooMany { limit: MAX_FIELDS });
    }
    M::decode(bytes).map_err(WireError::Decode)
}
