//! The source's lanes.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{self, Instant, MissedTickBehavior},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use transship_api::session::{Batch, Lane as Hello, ShimMessage, shim_message::Message};
use transship_link::Channel;
use transship_memory::{
    Dirty, Memory,
    codec::{BATCH_BYTES, BATCH_PAGES, Codec, Compress, Encoder},
};
use transship_types::{PAGE, PageRange, Space};

use super::{
    RateLimit,
    batch::{numbers, sort, space_name},
    on_a_thread,
};
use crate::{MigrationError, bulk::say, limits, source::Connect};

/// How often whoever waits for a round hears how far it is.
const PROGRESS: Duration = Duration::from_millis(100);

/// For the lanes to say that they are done: a few bytes each.
const CLOSE: Duration = Duration::from_secs(1);

/// What one round took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundTotals {
    /// Sent with content.
    pub pages: u64,
    /// Sent as nothing but zeros.
    pub zero_pages: u64,
    /// Dirty, and gone before they could be read.
    pub gone_pages: u64,
    /// What the other side must have applied for the round to be complete.
    pub batches: u64,
    /// Bytes on the lanes, headers included, before encryption.
    pub wire_bytes: u64,
    /// Bytes that compression kept off the link.
    pub compressed_saved: u64,
}

impl RoundTotals {
    fn add(&mut self, other: &RoundTotals) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.gone_pages += other.gone_pages;
        self.batches += other.batches;
        self.wire_bytes += other.wire_bytes;
        self.compressed_saved += other.compressed_saved;
    }
}

/// Sends pages over all its lanes. Dropped, it ends them at once, and cuts
/// their connections.
pub struct PageSender {
    /// Dropped first: a lane that saw no more orders before would end well.
    _stop: DropGuard,
    lanes: Vec<mpsc::UnboundedSender<Order>>,
    /// Ends once the last lane has.
    ended: mpsc::Receiver<()>,
}

/// A round, and where each lane says how its part went.
type Order = (Arc<Round>, mpsc::UnboundedSender<Result<RoundTotals, MigrationError>>);

impl PageSender {
    /// Connects `lanes` lanes. An error if any of them cannot be had.
    pub async fn open(
        connect: Connect,
        lanes: u32,
        compress: Compress,
        limit: Arc<RateLimit>,
    ) -> Result<Self, MigrationError> {
        let token = CancellationToken::new();
        let stop = token.clone().drop_guard();
        let (alive, ended) = mpsc::channel(1);
        let (ready, mut opened) = mpsc::unbounded_channel();
        let mut orders = Vec::new();
        for number in 0..lanes {
            let (sender, receiver) = mpsc::unbounded_channel();
            orders.push(sender);
            let (ready, alive) = (ready.clone(), alive.clone());
            let (connect, limit, token) = (connect.clone(), limit.clone(), token.clone());
            on_a_thread(format!("lane-{number}"), move || async move {
                let life = async {
                    match connected(&connect, number).await {
                        Ok(channel) => {
                            let _ = ready.send(Ok(()));
                            drop(ready);
                            Lane::new(channel, compress, limit).run(receiver, &token).await;
                        }
                        Err(error) => drop(ready.send(Err(error))),
                    }
                };
                tokio::select! {
                    biased;
                    () = token.cancelled() => {}
                    () = life => {}
                }
                drop(alive);
            })?;
        }
        drop(ready);
        for _ in 0..lanes {
            opened.recv().await.unwrap_or_else(|| Err(lost()))?;
        }
        Ok(Self { _stop: stop, lanes: orders, ended })
    }

    pub fn lanes(&self) -> u32 {
        // As many as were asked for, in a u32.
        self.lanes.len() as u32
    }

    /// Returns once everything is written. `progress` hears how many bytes of
    /// memory have been dealt with. If it fails or is dropped, the sender is
    /// of no further use.
    pub async fn send(
        &self,
        memory: Arc<dyn Memory>,
        dirty: &Dirty,
        number: u32,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<RoundTotals, MigrationError> {
        let round = Arc::new(Round {
            number,
            memory,
            queue: Mutex::new(Queue::new(dirty)),
            dealt: AtomicU64::new(0),
        });
        // Whatever happens, the lanes stop taking from it.
        let _guard = Abandon(round.clone());
        let (done, mut outcomes) = mpsc::unbounded_channel();
        for lane in &self.lanes {
            lane.send((round.clone(), done.clone())).map_err(|_| lost())?;
        }
        drop(done);
        let mut totals = RoundTotals::default();
        let mut ticks = time::interval(PROGRESS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut left = self.lanes.len();
        while left > 0 {
            tokio::select! {
                outcome = outcomes.recv() => {
                    totals.add(&outcome.unwrap_or_else(|| Err(lost()))?);
                    left -= 1;
                }
                _ = ticks.tick() => progress(round.dealt.load(Ordering::Relaxed)),
            }
        }
        progress(round.dealt.load(Ordering::Relaxed));
        Ok(totals)
    }

    /// Ends the lanes in a way that the other side can tell from a cut.
    pub async fn close(mut self) {
        self.lanes.clear();
        let _ = time::timeout(CLOSE, self.ended.recv()).await;
    }
}

/// A lane's thread is gone without a word, which only a panic can do, or it
/// failed in an earlier round, which said why.
fn lost() -> MigrationError {
    MigrationError::runtime("sending pages", "a lane has ended before")
}

async fn connected(connect: &Connect, number: u32) -> Result<Channel, MigrationError> {
    let mut channel = connect().await?;
    channel.writer.set_deadline(limits::TAKEN);
    say(&mut channel.writer, Message::Lane(Hello { number })).await?;
    Ok(channel)
}

/// What is to be sent, for whichever lane is free.
struct Round {
    number: u32,
    memory: Arc<dyn Memory>,
    queue: Mutex<Queue>,
    dealt: AtomicU64,
}

impl Round {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        // A queue that is half taken from is still a queue.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Abandon(Arc<Round>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.queue().0.clear();
    }
}

struct Queue(VecDeque<(Space, VecDeque<PageRange>)>);

impl Queue {
    fn new(dirty: &Dirty) -> Self {
        Self(dirty.spaces.iter().map(|(space, pages)| (*space, pages.iter().collect())).collect())
    }

    /// The next batch: pages of one space, in ascending order.
    fn take(&mut self) -> Option<(Space, Vec<PageRange>)> {
        let mut taken = Vec::new();
        while let Some((space, ranges)) = self.0.front_mut() {
            let mut room = BATCH_PAGES;
            while room > 0
                && let Some(range) = ranges.pop_front()
            {
                let (first, rest) = range.split(room);
                room -= first.pages();
                taken.push(first);
                if let Some(rest) = rest {
                    ranges.push_front(rest);
                }
            }
            let space = *space;
            if ranges.is_empty() {
                self.0.pop_front();
            }
            if !taken.is_empty() {
                return Some((space, taken));
            }
        }
        None
    }
}

struct Lane {
    channel: Channel,
    encoder: Encoder,
    limit: Arc<RateLimit>,
    /// Memory as it is read, one batch of it.
    bytes: Vec<u8>,
}

impl Lane {
    fn new(channel: Channel, compress: Compress, limit: Arc<RateLimit>) -> Self {
        Self { channel, encoder: Encoder::new(compress), limit, bytes: vec![0; BATCH_BYTES] }
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>, stop: &CancellationToken) {
        while let Some((round, done)) = orders.recv().await {
            let outcome = self.send(&round).await;
            let failed = outcome.is_err();
            // Nobody waits for a round that was given up.
            let _ = done.send(outcome);
            if failed {
                return;
            }
        }
        if !stop.is_cancelled() {
            // Whether the other side sees a clean end is all the same to us.
            let _ = self.channel.writer.close().await;
        }
    }

    async fn send(&mut self, round: &Round) -> Result<RoundTotals, MigrationError> {
        let mut totals = RoundTotals::default();
        loop {
            let Some((space, ranges)) = round.queue().take() else { break };
            let asked: u64 = ranges.iter().map(|range| range.pages()).sum();
            totals.add(&self.batch(round, space, &ranges, asked).await?);
            round.dealt.fetch_add(asked * PAGE, Ordering::Relaxed);
        }
        self.channel.writer.flush().await?;
        Ok(totals)
    }

    async fn batch(
        &mut self,
        round: &Round,
        space: Space,
        ranges: &[PageRange],
        asked: u64,
    ) -> Result<RoundTotals, MigrationError> {
        // Blocks this thread, which has nothing else to do.
        let bytes = &mut self.bytes[..(asked * PAGE) as usize];
        let gone = round.memory.read(space, ranges, bytes)?;
        let sorted = sort(ranges, gone, bytes);
        let pages = sorted.length as u64 / PAGE;
        let zero_pages: u64 = sorted.zeros.iter().map(|range| range.pages()).sum();
        let gone_pages = asked - pages - zero_pages;
        let mut totals = RoundTotals { pages, zero_pages, gone_pages, ..Default::default() };
        if pages + zero_pages == 0 {
            return Ok(totals);
        }
        let (codec, wire) = self.encoder.encode(&self.bytes[..sorted.length])?;
        let wire_bytes = wire.len();
        let batch = Batch {
            round: round.number,
            space: Some(space_name(space)),
            pages: numbers(sorted.pages),
            zeros: numbers(sorted.zeros),
            codec: codec.number(),
            wire_bytes: wire_bytes as u32,
            memfd: round.memory.memfd(space).map(Into::into),
        };
        let message = ShimMessage { message: Some(Message::Batch(batch)) };
        // Three frame headers, as good as.
        let bytes = prost::Message::encoded_len(&message) + wire_bytes + 24;
        let start = Instant::now();
        self.limit.take(bytes as u64).await;
        let writer = &mut self.channel.writer;
        if wire_bytes == 0 {
            writer.control(&message).await?;
        } else {
            writer.control_with_data(&message, wire).await?;
            if self.limit.get() != 0 {
                // The rest of it must not lie here until there is credit again.
                writer.flush().await?;
            }
            self.encoder.sent(wire_bytes, start.elapsed());
        }
        totals.batches = 1;
        totals.wire_bytes = bytes as u64;
        if codec != Codec::Raw {
            totals.compressed_saved = (sorted.length - wire_bytes) as u64;
        }
        Ok(totals)
    }
}
