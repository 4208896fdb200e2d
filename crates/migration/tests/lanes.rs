//! Lanes over real connections: TLS on the loopback device.

#[path = "../../link/tests/common/mod.rs"]
mod common;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use common::{Ca, node, sockets};
use futures::FutureExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::AbortHandle,
    time::timeout,
};
use transship_link::{LinkError, Trust, accept, connect_agent};
use transship_memory::{Backend, Dirty, Last, Memory, MemoryError, codec::Compress};
use transship_migration::{
    Connect, MigrationError,
    pages::{PageReceiver, PageSender, PageSink, RateLimit},
};
use transship_types::{PAGE, PageRange, Space};

const P: usize = PAGE as usize;
const SPACE: Space = Space::Process(1);
const SOON: Duration = Duration::from_secs(30);

/// Every page tells its own address, and none can be compressed.
struct Numbered(Vec<u8>);

impl Numbered {
    fn new(pages: usize) -> Self {
        let mut state = 1_u64;
        let mut bytes = vec![0; pages * P];
        for word in bytes.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_ne_bytes();
        }
        Self(bytes)
    }

    fn dirty(&self) -> Dirty {
        let range = PageRange::new(PAGE, PAGE + self.0.len() as u64).unwrap();
        Dirty { spaces: vec![(SPACE, [range].into_iter().collect())] }
    }
}

impl Memory for Numbered {
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
        _: Space,
        ranges: &[PageRange],
        mut into: &mut [u8],
    ) -> Result<Vec<PageRange>, MemoryError> {
        for range in ranges {
            let (now, rest) = into.split_at_mut(range.bytes() as usize);
            let at = (range.start() - PAGE) as usize;
            now.copy_from_slice(&self.0[at..at + now.len()]);
            into = rest;
        }
        Ok(Vec::new())
    }
    fn disarm(&self) {}
}

/// Keeps what it gets, by address.
#[derive(Default)]
struct Sink(Mutex<HashMap<u64, Vec<u8>>>);

impl PageSink for Sink {
    fn put(&self, _: Space, r: &[PageRange], bytes: &[u8], _: u32) -> Result<(), MemoryError> {
        let starts = r.iter().flat_map(|r| (r.start()..r.end()).step_by(P));
        let pages = starts.zip(bytes.chunks(P).map(<[u8]>::to_vec));
        self.0.lock().unwrap().extend(pages);
        Ok(())
    }
    fn zero(&self, _: Space, _: &[PageRange], _: u32) -> Result<(), MemoryError> {
        Ok(())
    }
}

/// Node `b`, which takes in every connection as a lane.
struct Target {
    receiver: Arc<PageReceiver>,
    connect: Connect,
    accepting: AbortHandle,
    /// The sources of the connections, which can be cut.
    relays: mpsc::UnboundedReceiver<AbortHandle>,
}

impl Drop for Target {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn channel_of(trust: Trust, stream: std::net::TcpStream) -> transship_migration::Connecting {
    async move {
        let failed = |source| LinkError::Socket { what: "taking over".into(), source };
        let stream = TcpStream::from_std(stream).map_err(failed)?;
        accept(&trust, stream).await
    }
    .boxed()
}

/// With `cuttable`, every connection runs through a relay that can be killed.
async fn target(sink: Arc<dyn PageSink>, cuttable: bool) -> Target {
    let ca = Ca::new();
    let (a, b) = (ca.trust("a"), ca.trust("b"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let receiver = Arc::new(PageReceiver::new(sink));
    let (tell, relays) = mpsc::unbounded_channel();
    let accepting = tokio::spawn({
        let receiver = receiver.clone();
        async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                if cuttable {
                    let (mut outer, inner) = sockets().await;
                    let relay = tokio::spawn(async move {
                        let _ = tokio::io::copy_bidirectional(&mut stream, &mut outer).await;
                    });
                    let _ = tell.send(relay.abort_handle());
                    stream = inner;
                }
                let stream = stream.into_std().unwrap();
                receiver.add(channel_of(b.clone(), stream)).unwrap();
            }
        }
    });
    let connect: Connect = Arc::new(move || {
        let (a, address) = (a.clone(), address.clone());
        async move { connect_agent(&a, &address, &node("b")).await }.boxed()
    });
    Target { receiver, connect, accepting: accepting.abort_handle(), relays }
}

async fn open(target: &Target, lanes: u32) -> PageSender {
    let limit = Arc::new(RateLimit::new(0));
    PageSender::open(target.connect.clone(), lanes, Compress::Auto, limit).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_arrive_over_tls() {
    let sink = Arc::new(Sink::default());
    let target = target(sink.clone(), false).await;
    let sender = open(&target, 3).await;
    let memory = Arc::new(Numbered::new(20_000));
    let dirty = memory.dirty();
    for round in 1..3 {
        let sending = sender.send(memory.clone(), &dirty, round, &|_| {});
        let totals = timeout(SOON, sending).await.unwrap().unwrap();
        timeout(SOON, target.receiver.complete(round, totals.batches)).await.unwrap().unwrap();
        assert_eq!(totals.pages, 20_000);
        assert_eq!(totals.batches, 20_000_u64.div_ceil(256));
    }
    sender.close().await;
    let pages = sink.0.lock().unwrap();
    assert_eq!(pages.len(), 20_000);
    for (address, page) in pages.iter() {
        let at = (*address as usize) - P;
        assert!(page[..] == memory.0[at..at + P], "page {address:#x}");
    }
}

/// A sink that lets the first lane go on only once the test says so.
struct Slow(Sink, tokio::sync::Semaphore, AtomicU64);

impl PageSink for Slow {
    fn put(&self, s: Space, r: &[PageRange], bytes: &[u8], n: u32) -> Result<(), MemoryError> {
        self.2.fetch_add(1, Ordering::Relaxed);
        while self.1.available_permits() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.0.put(s, r, bytes, n)
    }
    fn zero(&self, _: Space, _: &[PageRange], _: u32) -> Result<(), MemoryError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_cut_in_mid_round_fails_both_ends() {
    let slow = Slow(Sink::default(), tokio::sync::Semaphore::new(0), AtomicU64::new(0));
    let slow = Arc::new(slow);
    let mut target = target(slow.clone(), true).await;
    let sender = open(&target, 2).await;
    let memory = Arc::new(Numbered::new(50_000));
    let dirty = memory.dirty();
    let sending = tokio::spawn(async move {
        let sent = sender.send(memory.clone(), &dirty, 1, &|_| {}).await;
        (sent, sender)
    });
    // In the middle of it: pages have come, and far more wait for room.
    while slow.2.load(Ordering::Relaxed) < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    target.relays.recv().await.unwrap().abort();
    slow.1.add_permits(1);
    let (sent, _sender) = timeout(SOON, sending).await.unwrap().unwrap();
    assert!(matches!(sent, Err(MigrationError::Wire(_))), "{sent:?}");
    let failure = timeout(SOON, target.receiver.failure()).await.unwrap();
    assert!(matches!(failure, MigrationError::Wire(_)), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_is_dropped_is_a_cut_and_one_that_closes_is_not() {
    for closes in [true, false] {
        let target = target(Arc::new(Sink::default()), false).await;
        let sender = open(&target, 2).await;
        let memory = Arc::new(Numbered::new(300));
        let dirty = memory.dirty();
        let totals = sender.send(memory, &dirty, 1, &|_| {}).await.unwrap();
        target.receiver.complete(1, totals.batches).await.unwrap();
        if closes {
            sender.close().await;
        } else {
            drop(sender);
        }
        // Both lanes have ended one way or the other.
        let more = timeout(SOON, target.receiver.complete(2, 1)).await.unwrap();
        let error = more.unwrap_err();
        use transship_wire::WireError::Closed;
        let clean = matches!(error, MigrationError::Wire(Closed));
        assert_eq!(clean, closes, "{error:?}");
    }
}

/// Not a test but a measurement:
/// `cargo test --release -p transship-migration --test lanes -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement, which proves nothing on a busy machine"]
async fn throughput() {
    const PAGES: usize = 1 << 18;
    struct Count(AtomicU64, Vec<Mutex<std::fs::File>>);
    impl PageSink for Count {
        fn put(&self, _: Space, r: &[PageRange], b: &[u8], _: u32) -> Result<(), MemoryError> {
            use std::os::unix::fs::FileExt;
            self.0.fetch_add(b.len() as u64, Ordering::Relaxed);
            let file = self.1[0].lock().unwrap().try_clone().unwrap();
            file.write_all_at(b, r[0].start()).unwrap();
            Ok(())
        }
        fn zero(&self, _: Space, _: &[PageRange], _: u32) -> Result<(), MemoryError> {
            Ok(())
        }
    }
    let memory = Arc::new(Numbered::new(PAGES));
    let dirty = memory.dirty();
    for lanes in [1, 2, 4] {
        let raw = raw_copy(lanes, PAGES * P).await;
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let target =
            target(Arc::new(Count(AtomicU64::new(0), vec![Mutex::new(file)])), false).await;
        let sender = open(&target, lanes).await;
        let mut ours = Vec::new();
        for round in 1..4 {
            let start = Instant::now();
            let totals = sender.send(memory.clone(), &dirty, round, &|_| {}).await.unwrap();
            target.receiver.complete(round, totals.batches).await.unwrap();
            ours.push((PAGES * P) as f64 / start.elapsed().as_secs_f64() / 1e6);
        }
        println!("{lanes} lanes: raw {raw:.0} MB/s, ours {ours:.0?} MB/s");
        sender.close().await;
    }
}

/// So many bytes over so many plain connections, from one buffer to another.
async fn raw_copy(streams: u32, bytes: usize) -> f64 {
    let each = bytes / streams as usize;
    let mut all = Vec::new();
    let start = Instant::now();
    for _ in 0..streams {
        let (mut from, mut to) = sockets().await;
        all.push(tokio::spawn(async move {
            let buffer = vec![7; 1 << 20];
            for _ in 0..each >> 20 {
                from.write_all(&buffer).await.unwrap();
            }
        }));
        all.push(tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 20];
            while to.read(&mut buffer).await.unwrap() > 0 {}
        }));
    }
    for one in all {
        one.await.unwrap();
    }
    bytes as f64 / start.elapsed().as_secs_f64() / 1e6
}
