//! Lanes over links within the process: everything arrives, and whatever a
//! peer does ends in an error of ours.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::FutureExt;
use tokio::time::timeout;
use transship_api::session::{Batch, Lane, ShimMessage, Waiting, shim_message::Message};
use transship_link::{Channel, in_memory};
use transship_memory::{
    Backend, Dirty, Last, Memory, MemoryError,
    codec::{BATCH_BYTES, Codec, Compress},
};
use transship_types::{PAGE, PageRange, PageSet, Space};
use transship_wire::WireError;

use super::{PageReceiver, PageSender, PageSink, RateLimit, batch::space_name, numbers};
use crate::{MigrationError, source::Connect};

const P: usize = PAGE as usize;

/// Far longer than anything here takes.
const SOON: Duration = Duration::from_secs(20);

async fn soon<T>(work: impl Future<Output = T>) -> T {
    timeout(SOON, work).await.expect("it hangs")
}

type Pages = BTreeMap<(Space, u64), Vec<u8>>;

/// Memory that stands still.
#[derive(Default)]
struct Still {
    pages: Pages,
    /// Reading fails here.
    broken: Option<u64>,
}

impl Still {
    fn dirty(&self) -> Dirty {
        let mut spaces: BTreeMap<Space, PageSet> = BTreeMap::new();
        for &(space, start) in self.pages.keys() {
            spaces.entry(space).or_default().insert(PageRange::of_pages(start, 1).unwrap());
        }
        Dirty { spaces: spaces.into_iter().collect() }
    }
}

impl Memory for Still {
    fn backend(&self) -> Backend {
        Backend::None
    }
    fn round(&self) -> Result<Dirty, MemoryError> {
        Ok(self.dirty())
    }
    fn peek(&self) -> Result<u64, MemoryError> {
        Ok(self.dirty().pages())
    }
    fn last(&self) -> Result<Last, MemoryError> {
        Ok(Last { dirty: self.dirty(), ..Default::default() })
    }
    fn read(
        &self,
        space: Space,
        ranges: &[PageRange],
        into: &mut [u8],
    ) -> Result<Vec<PageRange>, MemoryError> {
        let mut gone = Vec::new();
        let starts = ranges.iter().flat_map(|r| (r.start()..r.end()).step_by(P));
        for (start, to) in starts.zip(into.chunks_mut(P)) {
            if self.broken == Some(start) {
                return Err(MemoryError::Invalid("broken".into()));
            }
            match self.pages.get(&(space, start)) {
                Some(page) => to.copy_from_slice(page),
                None => {
                    to.fill(0);
                    gone.push(PageRange::of_pages(start, 1).unwrap());
                }
            }
        }
        Ok(gone)
    }
    fn disarm(&self) {}
}

/// Remembers all it gets, up to a limit.
#[derive(Default)]
struct Sink {
    pages: Mutex<Pages>,
    limit: Option<usize>,
}

impl PageSink for Sink {
    fn put(&self, s: Space, ranges: &[PageRange], bytes: &[u8], _: u32) -> Result<(), MemoryError> {
        let mut pages = self.pages.lock().unwrap();
        let starts = ranges.iter().flat_map(|r| (r.start()..r.end()).step_by(P));
        assert_eq!(starts.clone().count() * P, bytes.len());
        for (start, page) in starts.zip(bytes.chunks(P)) {
            if self.limit.is_some_and(|limit| pages.len() >= limit) {
                return Err(MemoryError::Full { limit_bytes: 0 });
            }
            pages.insert((s, start), page.to_vec());
        }
        Ok(())
    }
    fn zero(&self, space: Space, ranges: &[PageRange], round: u32) -> Result<(), MemoryError> {
        for range in ranges {
            self.put(space, &[*range], &vec![0; range.bytes() as usize], round)?;
        }
        Ok(())
    }
}

/// Two processes and a shared object: long runs, single pages, zero pages.
fn memory(seed: u8) -> Still {
    let mut pages = Pages::new();
    let spaces = [(Space::Process(1), 1500), (Space::Process(40), 3), (Space::Shared(9), 700)];
    for (space, count) in spaces {
        for number in 0..count as u64 {
            // Every seventh is missing, every fifth is zero.
            if number % 7 == 6 && number > 300 {
                continue;
            }
            let fill = if number % 5 == 0 { 0 } else { number as u8 ^ seed };
            let mut page = vec![fill; P];
            if fill != 0 {
                page[P - 8..].copy_from_slice(&number.to_le_bytes());
            }
            pages.insert((space, (0x40_0000 + number) * PAGE), page);
        }
    }
    Still { pages, broken: None }
}

/// A receiver, and how a sender connects to it.
fn receiver(sink: Arc<dyn PageSink>) -> (Arc<PageReceiver>, Connect) {
    let receiver = Arc::new(PageReceiver::new(sink));
    let connect = {
        let receiver = receiver.clone();
        Arc::new(move || {
            let (near, far) = in_memory::pair("a".parse().unwrap(), "b".parse().unwrap());
            receiver.add(async { Ok(far) }.boxed()).unwrap();
            async { Ok(near) }.boxed()
        })
    };
    (receiver, connect)
}

async fn open(connect: Connect, lanes: u32, compress: Compress) -> PageSender {
    soon(PageSender::open(connect, lanes, compress, Arc::new(RateLimit::new(0)))).await.unwrap()
}

#[tokio::test]
async fn every_page_arrives_round_after_round() {
    let lz4 = Compress::With(Codec::Lz4);
    let zstd = Compress::With(Codec::Zstd);
    for (lanes, compress) in
        [(1, Compress::Never), (3, Compress::Auto), (2, lz4), (16, zstd), (1, zstd)]
    {
        let sink = Arc::new(Sink::default());
        let (receiver, connect) = receiver(sink.clone());
        let sender = open(connect, lanes, compress).await;
        let mut expected = Pages::new();
        for round in 1..4 {
            let memory = memory(round as u8);
            let mut dirty = memory.dirty();
            // Some have gone since they were named.
            let ghosts = PageRange::of_pages(0x70_0000 * PAGE, 300).unwrap();
            dirty.spaces[1].1.insert(ghosts);
            let zeros = memory.pages.values().filter(|p| p.iter().all(|b| *b == 0)).count() as u64;
            expected.extend(memory.pages.clone());
            let heard = Mutex::new(0);
            let progress = |bytes| *heard.lock().unwrap() = bytes;
            let all = dirty.pages();
            let totals =
                soon(sender.send(Arc::new(memory), &dirty, round, &progress)).await.unwrap();
            assert_eq!(totals.pages + totals.zero_pages + totals.gone_pages, all);
            assert_eq!((totals.zero_pages, totals.gone_pages), (zeros, 300));
            let on_the_wire = totals.wire_bytes + totals.compressed_saved;
            assert!(on_the_wire > totals.pages * PAGE);
            assert!(on_the_wire < totals.pages * PAGE + 64 * all, "headers are small");
            if compress == lz4 || compress == zstd {
                assert!(totals.compressed_saved > totals.pages * PAGE / 2, "{totals:?}");
            }
            assert_eq!(*heard.lock().unwrap(), all * PAGE);
            soon(receiver.complete(round, totals.batches)).await.unwrap();
            assert!(*sink.pages.lock().unwrap() == expected, "{lanes} {compress:?} {round}");
        }
        // A round in which nothing was dirty is a round.
        let none = soon(sender.send(Arc::new(memory(0)), &Dirty::default(), 4, &|_| {})).await;
        assert_eq!(none.unwrap(), Default::default());
        soon(receiver.complete(4, 0)).await.unwrap();
        soon(sender.close()).await;
    }
}

/// Everything of `work` but its connection, which a hostile peer holds.
async fn hostile(sink: Arc<dyn PageSink>) -> (Arc<PageReceiver>, Channel) {
    let receiver = Arc::new(PageReceiver::new(sink));
    let (near, far) = in_memory::pair("a".parse().unwrap(), "b".parse().unwrap());
    receiver.add(async { Ok(far) }.boxed()).unwrap();
    (receiver, near)
}

async fn say(lane: &mut Channel, message: Message) {
    // The receiver may have hung up by then; that it fails is what counts.
    let _ = lane.writer.control(&ShimMessage { message: Some(message) }).await;
}

fn batch(round: u32, first: u64, wire_bytes: usize) -> Batch {
    let range = PageRange::of_pages(first * PAGE, 2).unwrap();
    Batch {
        round,
        space: Some(space_name(Space::Process(1))),
        pages: numbers([range]),
        wire_bytes: wire_bytes as u32,
        ..Default::default()
    }
}

/// What the receiver makes of a lane that says hello and then does `work`.
async fn refused(case: &str, work: impl AsyncFnOnce(&mut Channel)) -> MigrationError {
    let sink = Arc::new(Sink::default());
    let (receiver, mut lane) = hostile(sink.clone()).await;
    say(&mut lane, Message::Lane(Lane { number: 0 })).await;
    work(&mut lane).await;
    let error = timeout(SOON, receiver.failure()).await.unwrap_or_else(|_| panic!("{case}: waits"));
    assert!(sink.pages.lock().unwrap().is_empty(), "{case}: nothing was put");
    let later = soon(receiver.complete(1, 1)).await;
    assert!(later.is_err(), "{case}: no round is complete");
    error
}

#[tokio::test]
async fn a_hostile_lane_is_refused() {
    use MigrationError::{Malformed, Memory, Wire};
    let malformed = |case: &str, error: MigrationError| match error {
        Malformed { .. } | Memory(MemoryError::Invalid(_)) => {}
        other => panic!("{case}: {other:?}"),
    };
    let case = "hello twice";
    let error = refused(case, async |lane| say(lane, Message::Lane(Lane { number: 0 })).await);
    malformed(case, error.await);

    let case = "no batch";
    malformed(
        case,
        refused(case, async |lane| say(lane, Message::Waiting(Waiting::default())).await).await,
    );

    let case = "too many pages";
    let long = Batch { pages: vec![1, 257], wire_bytes: 257 << 12, ..batch(1, 1, 0) };
    malformed(case, refused(case, async |lane| say(lane, Message::Batch(long)).await).await);

    for (case, frames) in [
        ("too short", vec![P]),
        ("too long", vec![2 * P + 1]),
        ("too long in pieces", vec![P, P, 1]),
        ("too long in the second", vec![2 * P, P]),
        ("nothing", vec![]),
    ] {
        let error = refused(case, async |lane| {
            say(lane, Message::Batch(batch(1, 1, 2 * P))).await;
            for length in frames {
                let _ = lane.writer.data(&vec![1; length]).await;
            }
            let _ = lane.writer.end_data().await;
        });
        malformed(case, error.await);
    }

    for codec in [1, 2] {
        let bomb = vec![0; 64 * BATCH_BYTES];
        let wire = match codec {
            1 => lz4_flex::block::compress(&bomb[..32 * BATCH_BYTES / 8]),
            _ => zstd::bulk::compress(&bomb, 1).unwrap(),
        };
        let case = format!("a bomb of codec {codec}");
        let many = Batch { codec, pages: vec![1, 256], ..batch(1, 1, wire.len()) };
        let error = refused(&case, async |lane| {
            say(lane, Message::Batch(many)).await;
            let _ = lane.writer.data(&wire).await;
            let _ = lane.writer.end_data().await;
        });
        malformed(&case, error.await);
    }

    let case = "a message in place of data";
    let error = refused(case, async |lane| {
        say(lane, Message::Batch(batch(1, 1, 2 * P))).await;
        say(lane, Message::Batch(batch(1, 9, 2 * P))).await;
    });
    let error = error.await;
    assert!(matches!(error, Wire(WireError::Unexpected { .. })), "{case}: {error:?}");

    let case = "data in place of a message";
    let error = refused(case, async |lane| drop(lane.writer.data(&[1; P]).await)).await;
    assert!(matches!(error, Wire(WireError::Unexpected { .. })), "{case}: {error:?}");
}

#[tokio::test]
async fn two_lanes_of_one_number_are_refused() {
    for number in [0, 16, 63, 64, u32::MAX] {
        let receiver = PageReceiver::new(Arc::new(Sink::default()));
        let mut lanes = Vec::new();
        for _ in 0..2 {
            let (mut near, far) = in_memory::pair("a".parse().unwrap(), "b".parse().unwrap());
            receiver.add(async { Ok(far) }.boxed()).unwrap();
            say(&mut near, Message::Lane(Lane { number })).await;
            lanes.push(near);
        }
        let error = soon(receiver.failure()).await;
        assert!(matches!(error, MigrationError::Malformed { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn lanes_are_counted() {
    let receiver = PageReceiver::new(Arc::new(Sink::default()));
    let never = || futures::future::pending().boxed();
    for _ in 0..crate::MAX_LANES {
        receiver.add(never()).unwrap();
    }
    assert!(receiver.add(never()).is_err());
}

async fn put(lane: &mut Channel, round: u32, first: u64) {
    let message = ShimMessage { message: Some(Message::Batch(batch(round, first, 2 * P))) };
    let _ = lane.writer.control_with_data(&message, &[1; 2 * P]).await;
    let _ = lane.writer.flush().await;
}

#[tokio::test]
async fn rounds_are_counted_and_stay_in_order() {
    // Batches that come: of which round, and what is asked for at the end.
    for (case, rounds, complete, good) in [
        ("as many as said", &[1, 1][..], (1, 2), true),
        ("one too many", &[1, 1, 1], (1, 2), false),
        ("another round", &[2, 2], (1, 2), false),
        ("two rounds at once", &[1, 2], (1, 1), false),
        ("of a round that is complete", &[5, 4], (5, 1), false),
    ] {
        let (receiver, mut lane) = hostile(Arc::new(Sink::default())).await;
        say(&mut lane, Message::Lane(Lane { number: 0 })).await;
        for (first, round) in rounds.iter().enumerate() {
            put(&mut lane, *round, 1 + 4 * first as u64).await;
            if case == "of a round that is complete" && first == 0 {
                soon(receiver.complete(5, 1)).await.unwrap();
            }
        }
        // A clean end: everything that was written has been seen by then.
        lane.writer.close().await.unwrap();
        soon(async {
            while receiver.open_lanes() > 0 {
                tokio::task::yield_now().await
            }
        })
        .await;
        let done = soon(receiver.complete(complete.0, complete.1)).await;
        assert_eq!(done.is_ok(), good, "{case}: {done:?}");
    }
}

#[tokio::test]
async fn fewer_batches_than_said_are_waited_for_until_the_lanes_end() {
    let (receiver, mut lane) = hostile(Arc::new(Sink::default())).await;
    say(&mut lane, Message::Lane(Lane { number: 0 })).await;
    put(&mut lane, 1, 1).await;
    let mut waiting = Box::pin(receiver.complete(1, 2));
    assert!(timeout(Duration::from_millis(50), &mut waiting).await.is_err());
    drop(lane);
    assert!(soon(waiting).await.is_err());
}

#[tokio::test]
async fn a_lane_that_is_cut_fails_both_ends() {
    let sink = Arc::new(Sink { limit: Some(300), ..Default::default() });
    let (receiver, connect) = receiver(sink);
    let sender = open(connect, 2, Compress::Never).await;
    let memory = memory(1);
    let dirty = memory.dirty();
    // The target has no room: its lane ends, and the source's with it.
    let sent = soon(sender.send(Arc::new(memory), &dirty, 1, &|_| {})).await;
    let error = soon(receiver.failure()).await;
    assert!(matches!(error, MigrationError::Memory(MemoryError::Full { .. })), "{error:?}");
    // Buffers may have taken the whole round by then; no further one passes.
    if let Ok(totals) = sent {
        assert!(soon(receiver.complete(1, totals.batches)).await.is_err());
    }
    drop(receiver);
}

#[tokio::test]
async fn a_receiver_that_is_dropped_ends_the_sender() {
    let (receiver, connect) = receiver(Arc::new(Sink::default()));
    let sender = open(connect, 3, Compress::Never).await;
    drop(receiver);
    let memory = Arc::new(memory(1));
    // What is in the buffers is lost; soon there is no more room in them.
    let sending = async {
        for round in 1.. {
            if let Err(error) = sender.send(memory.clone(), &memory.dirty(), round, &|_| {}).await {
                return error;
            }
        }
        unreachable!()
    };
    let error = soon(sending).await;
    assert!(matches!(error, MigrationError::Wire(_)), "{error:?}");
    let again = soon(sender.send(memory.clone(), &memory.dirty(), 99, &|_| {})).await;
    assert!(again.is_err());
    soon(sender.close()).await;
}

#[tokio::test]
async fn memory_that_cannot_be_read_fails_the_round() {
    let (_receiver, connect) = receiver(Arc::new(Sink::default()));
    let sender = open(connect, 2, Compress::Never).await;
    let mut memory = memory(1);
    memory.broken = Some((0x40_0000 + 200) * PAGE);
    let dirty = memory.dirty();
    let error = soon(sender.send(Arc::new(memory), &dirty, 1, &|_| {})).await.unwrap_err();
    assert!(matches!(error, MigrationError::Memory(MemoryError::Invalid(_))), "{error:?}");
}

#[tokio::test]
async fn a_lane_that_cannot_connect_is_an_error_at_once() {
    let connect: Connect = Arc::new(|| {
        let why = transship_link::LinkError::Arrival("no".into());
        async { Err(why) }.boxed()
    });
    let limit = Arc::new(RateLimit::new(0));
    let opened = soon(PageSender::open(connect, 2, Compress::Never, limit)).await;
    assert!(matches!(opened.err(), Some(MigrationError::Link(_))));

    let receiver = PageReceiver::new(Arc::new(Sink::default()));
    let why = transship_link::LinkError::Arrival("no".into());
    receiver.add(async { Err(why) }.boxed()).unwrap();
    assert!(matches!(soon(receiver.failure()).await, MigrationError::Link(_)));
}

/// The peer takes nothing: the lanes stand in the middle of a write.
#[tokio::test]
async fn dropped_senders_let_go_of_the_memory() {
    let held = Arc::new(Mutex::new(Vec::new()));
    let connect: Connect = {
        let held = held.clone();
        Arc::new(move || {
            let (near, far) = in_memory::pair("a".parse().unwrap(), "b".parse().unwrap());
            held.lock().unwrap().push(far);
            async { Ok(near) }.boxed()
        })
    };
    let memory = Arc::new(memory(3));
    let dirty = memory.dirty();
    for whole in [true, false] {
        let sender = open(connect.clone(), 2, Compress::Never).await;
        let sending = sender.send(memory.clone(), &dirty, 1, &|_| {});
        // Until every lane is stuck, or nearly.
        assert!(timeout(Duration::from_millis(50), sending).await.is_err());
        if whole {
            drop(sender);
        } else {
            // Nothing is left to send: what stands in a write ends with it.
            soon(sender.close()).await;
        }
        let gone = async {
            while Arc::strong_count(&memory) > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        soon(gone).await;
    }
}
