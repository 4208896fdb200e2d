//! Two ends and the links between them, for one migration.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use futures::FutureExt;
use tempfile::TempDir;
use tokio::{
    io::duplex,
    runtime::Handle,
    sync::mpsc,
    task::{AbortHandle, JoinHandle},
};
use tokio_util::sync::CancellationToken;
use transship_link::{BoxRead, BoxWrite, Channel, LinkError};
use transship_types::Ticket;
use transship_wire::{Reader, Writer};

use crate::{
    Arrived, Budget, Connect, Connecting, Departure, Journal, MigrationError, Options, Progress,
    arrive, depart,
    fake::{FakeMemory, FakeSource, FakeStore, FakeTarget, Step, manifest, subject},
    handoff::Ending,
    journal::Role,
};

/// Two channels joined by a relay that a test can cut.
pub struct Link {
    pub near: Channel,
    pub far: Channel,
    pub cut: AbortHandle,
}

/// The relay runs in this runtime, whoever uses the channels.
pub fn link(runtime: &Handle) -> Link {
    // Small, so that the relay carries every phase in several pieces.
    const BUFFER: usize = 64 << 10;
    let (near, mut near_end) = duplex(BUFFER);
    let (far, mut far_end) = duplex(BUFFER);
    let relay = runtime.spawn(async move {
        let _ = tokio::io::copy_bidirectional(&mut near_end, &mut far_end).await;
    });
    let channel = |stream: tokio::io::DuplexStream, peer: &str| {
        let (read, write) = tokio::io::split(stream);
        Channel {
            reader: Reader::new(Box::new(read) as BoxRead),
            writer: Writer::new(Box::new(write) as BoxWrite),
            peer: peer.parse().unwrap(),
        }
    };
    Link { near: channel(near, "b"), far: channel(far, "a"), cut: relay.abort_handle() }
}

/// What can be cut.
pub struct Cuts {
    first: AbortHandle,
    lanes: Arc<Mutex<Vec<AbortHandle>>>,
}

impl Cuts {
    pub fn all(&self) {
        self.first.abort();
        self.lanes();
    }

    pub fn lanes(&self) {
        self.lanes.lock().unwrap().iter().for_each(AbortHandle::abort);
    }
}

/// What kind of migration.
pub struct Setup {
    pub source_fails: Option<Step>,
    pub target_fails: Option<Step>,
    pub ticket: Ticket,
    pub memory: Option<Arc<FakeMemory>>,
    /// The target takes pages by lane.
    pub store: bool,
    pub hides_nothing: bool,
    pub layer: Option<PathBuf>,
    pub options: Options,
    /// Ends the arrival, as a Kill of the container that is to come does.
    pub cancel_arrival: CancellationToken,
}

/// No machine is so busy that a freeze would not be allowed.
pub fn patient() -> Options {
    let max_pause = Duration::from_secs(3600);
    let budget = Budget { max_pause, ..Budget::default() };
    Options { budget, ..Options::default() }
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            source_fails: None,
            target_fails: None,
            ticket: good_ticket(),
            memory: None,
            store: true,
            hides_nothing: false,
            layer: None,
            options: patient(),
            cancel_arrival: CancellationToken::new(),
        }
    }
}

impl Setup {
    /// One step fails, on whichever side it is.
    pub fn failing(step: Step) -> Self {
        Self { source_fails: Some(step), target_fails: Some(step), ..Self::default() }
    }
}

pub struct World {
    pub source: FakeSource,
    pub target: FakeTarget,
    pub departure: Departure,
    pub arrival: Result<Arrived, MigrationError>,
    /// What goes on at the target after it runs; over, unless in doubt.
    pub rest: Option<JoinHandle<()>>,
    pub directory: TempDir,
}

impl World {
    /// `at` hears what the source has to say of its progress.
    pub async fn run(
        setup: Setup,
        at: impl Fn(&Progress, &Cuts, &CancellationToken) + Send + Sync,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path().join("source-images");
        std::fs::create_dir(&images).unwrap();
        let mut source = FakeSource::new(&images, setup.source_fails);
        let mut target = FakeTarget::new(directory.path(), setup.target_fails);
        let journals = directory.path().join("source-journal");
        let journal = Journal::create(&journals, subject(Role::Source)).unwrap();
        let Link { near, far, cut } = link(&Handle::current());
        let cuts = Cuts { first: cut, lanes: Arc::default() };
        let (queue, lanes) = mpsc::unbounded_channel();
        source.connect = Some(connect(queue, cuts.lanes.clone(), setup.source_fails));
        source.memory = setup.memory;
        source.hides_nothing = setup.hides_nothing;
        source.layer = setup.layer;
        target.lanes = Some(Arc::new(lanes.into()));
        let fails = setup.target_fails;
        target.store = setup.store.then(|| Arc::new(FakeStore::new(fails)));

        let cancel = CancellationToken::new();
        let progress = |progress: Progress| at(&progress, &cuts, &cancel);
        let options = setup.options;
        let departing =
            depart(near, &mut source, manifest(), journal, &options, &cancel, &progress);
        let arriving = async {
            let mut arrived = arrive(far, &mut target, &setup.ticket, &setup.cancel_arrival).await;
            let rest = arrived.as_mut().ok().map(|arrived| {
                let rest = std::mem::replace(&mut arrived.rest, std::future::ready(()).boxed());
                tokio::spawn(rest)
            });
            (arrived, rest)
        };
        let both = async {
            let (departure, (arrival, mut rest)) = tokio::join!(departing, arriving);
            if departure.ending != Ending::InDoubt
                && let Some(rest) = rest.take()
            {
                rest.await.expect("an end without a panic");
            }
            (departure, arrival, rest)
        };
        let (departure, arrival, rest) =
            tokio::time::timeout(Duration::from_secs(60), both).await.expect("both ends end");
        Self { source, target, departure, arrival, rest, directory }
    }

    pub fn stayed_home(&self, case: &str) {
        assert_eq!(self.departure.ending, Ending::StayedHome, "{case}");
        assert!(self.departure.error.is_some(), "{case}: a reason");
        assert!(self.source.is_running(), "{case}: runs at the source");
        assert!(!self.source.ended && !self.target.running, "{case}: and only there");
        assert!(self.arrival.is_err(), "{case}");
        assert!(self.target.is_clean(), "{case}: nothing is left at the target");
        assert!(is_empty(&self.directory.path().join("source-journal")), "{case}: settled");
        if let Some(memory) = &self.source.memory {
            assert_eq!(memory.throttle.load(Ordering::SeqCst), 0, "{case}: at full speed");
            assert!(!memory.watched.load(Ordering::SeqCst), "{case}: and unwatched");
        }
    }

    /// It runs on the target, and has there what it had at the freeze.
    pub fn departed(&self, case: &str) {
        let error = &self.departure.error;
        assert_eq!(self.departure.ending, Ending::Departed, "{case}: {error:?}");
        assert!(error.is_none(), "{case}: {error:?}");
        assert!(self.source.ended && !self.source.is_running(), "{case}");
        assert!(self.target.running && self.arrival.is_ok(), "{case}");
        assert!(is_empty(&self.directory.path().join("source-journal")), "{case}: settled");
        if let (Some(memory), Some(store)) = (&self.source.memory, &self.target.store)
            && self.departure.memory.as_ref().is_some_and(|report| report.page_less)
        {
            let arrived = store.contents(&self.target.present);
            assert!(memory.contents() == arrived, "{case}: the memory differs");
        }
    }
}

/// Lanes between two ends: the far end of each goes into the queue.
fn connect(
    queue: mpsc::UnboundedSender<Connecting>,
    cuts: Arc<Mutex<Vec<AbortHandle>>>,
    fails: Option<Step>,
) -> Connect {
    let runtime = Handle::current();
    Arc::new(move || {
        if fails == Some(Step::Connect) {
            let failed = LinkError::Arrival("it was asked to fail".into());
            return std::future::ready(Err(failed)).boxed();
        }
        let Link { near, far, cut } = link(&runtime);
        cuts.lock().unwrap().push(cut);
        // The target may have given up.
        let _ = queue.send(std::future::ready(Ok(far)).boxed());
        std::future::ready(Ok(near)).boxed()
    })
}

pub fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().next().is_none()
}

pub fn good_ticket() -> Ticket {
    subject(Role::Target).ticket
}
