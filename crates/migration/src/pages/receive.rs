//! The target's lanes.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    sync::{Notify, futures::Notified},
    time,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use transship_api::session::{Batch, Lane as Hello, ShimMessage, shim_message::Message};
use transship_link::{BoxRead, Channel};
use transship_memory::{MemoryError, codec::Decoder};
use transship_types::{PageRange, Space};
use transship_wire::{Reader, WireError};

use super::{batch::Checked, on_a_thread};
use crate::{MigrationError, bulk::hear, limits, options::MAX_LANES, source::Connecting};

/// Where pages go. Called from every lane's thread at once.
pub trait PageSink: Send + Sync + 'static {
    /// The bytes of all ranges, one after the other; replaces what was there.
    fn put(
        &self,
        space: Space,
        ranges: &[PageRange],
        bytes: &[u8],
        round: u32,
    ) -> Result<(), MemoryError>;
    /// This shared object is a memfd of that name. Said before any page of it,
    /// and with each batch.
    fn memfd(&self, _object: u64, _name: &[u8]) -> Result<(), MemoryError> {
        Ok(())
    }
    /// These are zero.
    fn zero(&self, space: Space, ranges: &[PageRange], round: u32) -> Result<(), MemoryError>;
}

/// Puts what comes over its lanes where it belongs. Dropped, it ends them at
/// once, and cuts their connections.
pub struct PageReceiver {
    shared: Arc<Shared>,
    stop: CancellationToken,
    _guard: DropGuard,
}

impl PageReceiver {
    pub fn new(sink: Arc<dyn PageSink>) -> Self {
        let stop = CancellationToken::new();
        let shared = Shared { sink, state: Mutex::default(), changed: Notify::new() };
        Self { shared: Arc::new(shared), _guard: stop.clone().drop_guard(), stop }
    }

    /// Takes in one more lane. That it cannot be connected shows as the
    /// failure of a lane.
    pub fn add(&self, connecting: Connecting) -> Result<(), MigrationError> {
        let mut state = self.shared.state();
        if state.added == MAX_LANES {
            return Err(MigrationError::malformed("more lanes than there may be"));
        }
        state.added += 1;
        state.open += 1;
        drop(state);
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        let started = on_a_thread("lane".into(), move || async move {
            let ended = tokio::select! {
                () = stop.cancelled() => Err(MigrationError::Cancelled),
                ended = receive(&shared, connecting) => ended,
            };
            shared.end(ended);
        });
        if started.is_err() {
            self.shared.end(Ok(()));
        }
        started
    }

    /// Waits until `batches` batches of this round are in the store. Rounds
    /// ascend, and each is completed before a batch of the next one comes.
    pub async fn complete(&self, round: u32, batches: u64) -> Result<(), MigrationError> {
        loop {
            let changed = self.shared.changed.notified();
            if self.shared.state().complete(round, batches)? {
                return Ok(());
            }
            // All of it was written before this was asked.
            moved(changed, limits::FRAME, "the next pages").await?;
        }
    }

    /// Resolves if a lane fails: the migration must not wait for the end of a
    /// round to hear of it.
    pub async fn failure(&self) -> MigrationError {
        loop {
            let changed = self.shared.changed.notified();
            if let Err(error) = self.shared.state().check() {
                return error;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
impl PageReceiver {
    /// Lanes that have not ended.
    pub(super) fn open_lanes(&self) -> u32 {
        self.shared.state().open
    }
}

async fn moved(
    changed: Notified<'_>,
    limit: Duration,
    what: &'static str,
) -> Result<(), MigrationError> {
    let seconds = limit.as_secs();
    time::timeout(limit, changed).await.map_err(|_| MigrationError::Timeout { what, seconds })
}

struct Shared {
    sink: Arc<dyn PageSink>,
    state: Mutex<State>,
    changed: Notify,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is a few numbers.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, ended: Result<(), MigrationError>) {
        let mut state = self.state();
        state.open -= 1;
        if let Err(error) = ended {
            state.failed = true;
            // The first failure is the cause of the others.
            state.failure.get_or_insert(error);
        }
        drop(state);
        self.changed.notify_waiters();
    }
}

#[derive(Default)]
struct State {
    added: u32,
    open: u32,
    /// Lane numbers that were said, by bit.
    numbers: u64,
    /// The last round that is complete.
    completed: Option<u32>,
    /// Whose pages have come.
    spaces: HashSet<Space>,
    /// The round whose batches come, and how many have been applied.
    coming: Option<u32>,
    applied: u64,
    failed: bool,
    /// Told once; who asks later hears only that there was one.
    failure: Option<MigrationError>,
}

impl State {
    fn greet(&mut self, hello: &Hello) -> Result<(), MigrationError> {
        let bit = 1_u64.checked_shl(hello.number).unwrap_or(0);
        if hello.number >= MAX_LANES || self.numbers & bit != 0 {
            return Err(MigrationError::malformed(format!("a second lane {}", hello.number)));
        }
        self.numbers |= bit;
        Ok(())
    }

    /// A batch, before anything is remembered of it.
    fn batch(&mut self, batch: &Checked) -> Result<(), MigrationError> {
        self.admit(batch.round)?;
        if self.spaces.len() == limits::SPACES && !self.spaces.contains(&batch.space) {
            return Err(MigrationError::malformed("pages of more spaces than a container has"));
        }
        self.spaces.insert(batch.space);
        Ok(())
    }

    fn admit(&mut self, round: u32) -> Result<(), MigrationError> {
        let late = self.completed.is_some_and(|completed| round <= completed);
        if late || self.coming.is_some_and(|coming| coming != round) {
            let what = format!("a batch of round {round} out of its turn");
            return Err(MigrationError::malformed(what));
        }
        self.coming = Some(round);
        Ok(())
    }

    fn check(&mut self) -> Result<(), MigrationError> {
        match self.failure.take() {
            Some(failure) => Err(failure),
            None if self.failed => {
                Err(MigrationError::runtime("receiving pages", "a lane has failed"))
            }
            None => Ok(()),
        }
    }

    fn complete(&mut self, round: u32, batches: u64) -> Result<bool, MigrationError> {
        self.check()?;
        if batches > 0 || self.coming.is_some() {
            self.admit(round)?;
        }
        if self.applied < batches {
            return match self.open {
                // Nothing is left that could bring them.
                0 => Err(WireError::Closed.into()),
                _ => Ok(false),
            };
        }
        if self.applied > batches {
            let what = format!("{} batches of the {batches} of round {round}", self.applied);
            return Err(MigrationError::malformed(what));
        }
        (self.completed, self.coming, self.applied) = (Some(round), None, 0);
        Ok(true)
    }
}

/// One lane, to the end of its connection.
async fn receive(shared: &Shared, connecting: Connecting) -> Result<(), MigrationError> {
    let Channel { mut reader, writer: _writer, .. } = connecting.await?;
    reader.set_deadline(limits::FRAME);
    reader.set_control_limit(limits::LANE_MESSAGE);
    match hear(&mut reader).await? {
        Message::Lane(hello) => shared.state().greet(&hello)?,
        _ => return Err(MigrationError::malformed("a lane that does not say so")),
    }
    let mut decoder = Decoder::default();
    loop {
        // Between two rounds a lane is silent for as long as they are apart.
        reader.clear_deadline();
        let message: ShimMessage = match reader.control().await {
            Err(WireError::Closed) => return Ok(()),
            message => message?,
        };
        let Some(Message::Batch(batch)) = message.message else {
            return Err(MigrationError::malformed("something that is no batch on a lane"));
        };
        let batch = Checked::new(&batch)?;
        shared.state().batch(&batch)?;
        // Blocks this thread, which has nothing else to do.
        apply(&mut reader, &mut decoder, &*shared.sink, &batch).await?;
        shared.state().applied += 1;
        shared.changed.notify_waiters();
    }
}

/// Takes in one batch, whose message has been read, with its data.
pub(crate) async fn put(
    reader: &mut Reader<BoxRead>,
    decoder: &mut Decoder,
    sink: &dyn PageSink,
    batch: &Batch,
) -> Result<(), MigrationError> {
    apply(reader, decoder, sink, &Checked::new(batch)?).await
}

async fn apply(
    reader: &mut Reader<BoxRead>,
    decoder: &mut Decoder,
    sink: &dyn PageSink,
    batch: &Checked,
) -> Result<(), MigrationError> {
    if let (Space::Shared(object), Some(name)) = (batch.space, &batch.memfd) {
        sink.memfd(object, name)?;
    }
    if batch.wire_bytes > 0 {
        reader.set_deadline(limits::FRAME);
        let wire = run(reader, batch.wire_bytes).await?;
        let pages = decoder.decode(batch.codec, &wire, batch.length())?;
        sink.put(batch.space, &batch.pages, pages, batch.round)?;
        reader.reuse(wire);
    }
    if !batch.zeros.is_empty() {
        sink.zero(batch.space, &batch.zeros, batch.round)?;
    }
    Ok(())
}

/// A run of data of exactly `length` bytes, which was checked. Usually one
/// frame, which is then not copied.
async fn run(reader: &mut Reader<BoxRead>, length: usize) -> Result<Bytes, MigrationError> {
    let wrong = || MigrationError::malformed(format!("a batch that has not its {length} bytes"));
    let first = reader.data().await?.ok_or_else(wrong)?;
    if first.len() == length {
        return match reader.data().await? {
            None => Ok(first),
            Some(_) => Err(wrong()),
        };
    }
    let mut all = BytesMut::with_capacity(length);
    let mut next = Some(first);
    while let Some(piece) = next {
        if all.len() + piece.len() > length {
            return Err(wrong());
        }
        all.extend_from_slice(&piece);
        next = reader.data().await?;
    }
    if all.len() == length { Ok(all.freeze()) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::space_name;

    #[test]
    fn pages_of_one_space_too_many_are_refused() {
        let of = |space| {
            let space = Some(space_name(space));
            Checked::new(&Batch { space, zeros: vec![1, 1], ..Default::default() }).unwrap()
        };
        let mut state = State::default();
        for number in 0..limits::SPACES as u64 {
            state.batch(&of(Space::Shared(number))).unwrap();
        }
        state.batch(&of(Space::Shared(7))).unwrap();
        for beyond in [Space::Process(1), Space::Shared(u64::MAX)] {
            assert!(state.batch(&of(beyond)).is_err(), "{beyond}");
        }
    }
}
