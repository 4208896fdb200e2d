//! The fault server: what CRIU calls its lazy-pages daemon.
//!
//! CRIU connects once, names each restored task and hands over its
//! userfaultfd. Fault threads answer who touches a page that is not there
//! yet; fill threads place the rest meanwhile, what was written last first.
//! A descriptor is closed when its task waits for nothing any more. Should it
//! be closed before, the task would read zero where its memory was, silently:
//! so the tree is killed first if this must fail.

mod criu;
mod remaining;
mod task;
mod threads;

use std::{
    collections::{HashMap, VecDeque},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
    eventfd::{EfdFlags, EventFd},
};
use transship_types::{PageRange, PageSet, Space};

use crate::{MemoryError, store::Store};
use task::Task;

/// The name CRIU looks for in its work directory.
const SOCKET: &str = "lazy-pages.socket";

/// Latencies above the last but one bucket (16 µs·2^18, four seconds) are one.
const BUCKETS: usize = 20;

/// Asks for one page ahead of all others, by space and address.
pub type Source = Arc<dyn Fn(Space, u64) + Send + Sync>;

pub struct Options {
    /// Kills the restored tree; called before any descriptor is closed early.
    pub kill: Box<dyn Fn() + Send + Sync>,
    pub fault_threads: usize,
    pub fill_threads: usize,
    /// Bytes a second that the background fill may place; `None`: all it can.
    pub fill_limit: Option<u64>,
    /// Where pages come from that are not in the store yet. Without one, a
    /// page that is not there is an error.
    pub source: Option<Source>,
    /// Gets to see every descriptor before anything is done with it, so that
    /// somebody else can hold it open if this process is killed.
    pub hold: Option<Hold>,
}

/// See [`Options::hold`].
pub type Hold = Box<dyn Fn(BorrowedFd<'_>) + Send + Sync>;

impl Options {
    pub fn new(kill: impl Fn() + Send + Sync + 'static) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            kill: Box::new(kill),
            fault_threads: cores.clamp(2, 4),
            fill_threads: (cores / 2).clamp(1, 4),
            fill_limit: None,
            source: None,
            hold: None,
        }
    }
}

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Served {
    pub faults: u64,
    /// How many faults were answered within 16 µs, 32 µs, and so on, each
    /// bucket twice as long; the last one is everything above.
    pub fault_latency: Vec<u64>,
    /// Pages placed, in answer to faults or not.
    pub pages: u64,
    /// From "restore finished" on.
    pub duration: Duration,
}

/// Listens where CRIU will look.
pub struct FaultServer {
    listener: UnixListener,
    path: PathBuf,
}

impl FaultServer {
    pub fn listen(work_dir: &Path) -> Result<FaultServer, MemoryError> {
        let path = work_dir.join(SOCKET);
        let listener = criu::listen(work_dir, SOCKET)
            .map_err(|source| MemoryError::System { what: "listening for lazy pages", source })?;
        Ok(FaultServer { listener, path })
    }

    /// `lazy`: what CRIU will leave to us, by the task's pid in its namespace.
    pub fn serve(
        self,
        store: Arc<Store>,
        lazy: HashMap<u32, PageSet>,
        options: Options,
    ) -> Result<Serving, MemoryError> {
        let shared = Arc::new(Shared::new(store, options).map_err(start)?);
        if shared.options.source.is_some() {
            let weak = Arc::downgrade(&shared);
            shared.store.watch(Some(Arc::new(move |_, _| {
                if let Some(shared) = weak.upgrade() {
                    shared.arrived();
                }
            })));
        }
        let serving = Serving { shared, threads: Mutex::default(), path: self.path };
        let shared = Arc::clone(&serving.shared);
        serving.spawn("lazy-pages", move || criu::attend(&shared, &self.listener, &lazy))?;
        for _ in 0..serving.shared.options.fault_threads.max(1) {
            let shared = Arc::clone(&serving.shared);
            serving.spawn("faults", move || threads::answer(&shared))?;
        }
        for _ in 0..serving.shared.options.fill_threads.max(1) {
            let shared = Arc::clone(&serving.shared);
            serving.spawn("fill", move || threads::fill(&shared))?;
        }
        Ok(serving)
    }
}

fn start(source: io::Error) -> MemoryError {
    MemoryError::System { what: "starting the fault server", source }
}

/// A fault server at work. Dropped before it is done, it kills the tree.
pub struct Serving {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    path: PathBuf,
}

impl Serving {
    /// The tree runs: from here on nobody else would kill it if we fail.
    pub fn resumed(&self) {
        let failed = {
            let mut state = self.shared.state();
            state.resumed = true;
            state.failed
        };
        if failed {
            (self.shared.options.kill)();
        }
        self.shared.changed.notify_all();
    }

    /// Whether nothing has failed so far. Before [`resumed`](Self::resumed) a
    /// failure kills nobody: whoever restores must ask.
    pub fn is_sound(&self) -> bool {
        !self.shared.state().failed
    }

    /// Waits until every page is placed and every descriptor closed.
    pub fn wait(&self) -> Result<Served, MemoryError> {
        let mut state = self.shared.state();
        while !state.stopping {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(error) = state.error.take() {
            return Err(error);
        }
        if state.failed || !state.complete {
            return Err(MemoryError::Invalid("the fault server had to give up".into()));
        }
        drop(state);
        self.join();
        Ok(lock(&self.shared.served).clone())
    }

    /// The tree is dead: closes everything.
    pub fn give_up(&self) {
        let mut state = self.shared.state();
        state.given_up = true;
        drop(state);
        self.shared.stop();
        self.join();
        lock(&self.shared.tasks).clear();
    }

    fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), MemoryError> {
        let thread = thread::Builder::new().name(name.into()).spawn(run).map_err(start)?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    fn join(&self) {
        for thread in lock(&self.threads).drain(..) {
            // A thread that panicked has said so; its descriptors are closed
            // with the rest.
            let _ = thread.join();
        }
        lock(&self.shared.parked).clear();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let early = {
            let state = self.shared.state();
            // Descriptors can still lie in CRIU's connection.
            let held = state.resumed || !lock(&self.shared.tasks).is_empty();
            held && !state.complete && !state.given_up
        };
        if early {
            (self.shared.options.kill)();
        }
        self.give_up();
        self.shared.store.watch(None);
        let _ = fs::remove_file(&self.path);
    }
}

/// What all threads see.
struct Shared {
    store: Arc<Store>,
    options: Options,
    epoll: Epoll,
    /// Readable once all threads shall end.
    ending: EventFd,
    /// Readable once a page came for which someone may wait.
    arrival: EventFd,
    tasks: Mutex<HashMap<u64, Arc<Task>>>,
    next_id: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    /// Fault threads at work: the fill waits for them.
    busy: AtomicUsize,
    parked: Mutex<Vec<Parked>>,
    served: Mutex<Served>,
}

#[derive(Default)]
struct State {
    /// CRIU has restored all tasks: their memory is registered.
    finished: Option<Instant>,
    resumed: bool,
    given_up: bool,
    complete: bool,
    stopping: bool,
    failed: bool,
    error: Option<MemoryError>,
    /// What was written after the first round, the latest round first.
    hot: VecDeque<(u64, PageRange)>,
}

/// A fault that could not be answered yet.
struct Parked {
    task: Arc<Task>,
    page: PageRange,
    since: Instant,
    asked: bool,
}

/// The ids of `ending` and `arrival`; tasks count from there.
const ENDING: u64 = 0;
const ARRIVAL: u64 = 1;

impl Shared {
    fn new(store: Arc<Store>, options: Options) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let (ending, arrival) = (EventFd::from_flags(flags)?, EventFd::from_flags(flags)?);
        epoll.add(&ending, EpollEvent::new(EpollFlags::EPOLLIN, ENDING))?;
        epoll.add(&arrival, EpollEvent::new(EpollFlags::EPOLLIN, ARRIVAL))?;
        Ok(Self {
            store,
            options,
            epoll,
            ending,
            arrival,
            tasks: Mutex::default(),
            next_id: AtomicU64::new(ARRIVAL + 1),
            state: Mutex::default(),
            changed: Condvar::new(),
            busy: AtomicUsize::new(0),
            parked: Mutex::default(),
            served: Mutex::new(Served { fault_latency: vec![0; BUCKETS], ..Served::default() }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn add(&self, task: Task) -> io::Result<()> {
        if let Some(hold) = &self.options.hold {
            hold(task.uffd.as_fd());
        }
        let task = Arc::new(task);
        lock(&self.tasks).insert(task.id, Arc::clone(&task));
        self.epoll.add(&task.uffd, EpollEvent::new(EpollFlags::EPOLLIN, task.id))?;
        Ok(())
    }

    /// Takes the task out if it waits for nothing; its descriptor is closed
    /// when the last thread lets go of it.
    fn close_if_filled(&self, task: &Task) -> Result<(), MemoryError> {
        if self.state().finished.is_none() || !task.is_filled() {
            return Ok(());
        }
        task.tidy(&self.store, 1)?;
        task.forget(None);
        if lock(&self.tasks).remove(&task.id).is_some() {
            let _ = self.epoll.delete(&task.uffd);
        }
        self.complete_if_done();
        Ok(())
    }

    fn complete_if_done(&self) {
        let mut state = self.state();
        let Some(finished) = state.finished else { return };
        if lock(&self.tasks).is_empty() && !state.stopping {
            state.complete = true;
            lock(&self.served).duration = finished.elapsed();
            drop(state);
            self.stop();
        }
    }

    fn fail(&self, error: MemoryError) {
        let mut state = self.state();
        if state.stopping {
            return;
        }
        state.failed = true;
        state.error = Some(error);
        let resumed = state.resumed;
        drop(state);
        if resumed {
            (self.options.kill)();
        }
        self.stop();
        if resumed {
            lock(&self.tasks).clear();
        }
    }

    fn arrived(&self) {
        if !lock(&self.parked).is_empty() {
            // As in `stop`.
            let _ = self.arrival.write(1);
        }
        self.changed.notify_all();
    }

    fn stop(&self) {
        self.state().stopping = true;
        // Fails only if it was written to 2^64 times.
        let _ = self.ending.write(1);
        self.changed.notify_all();
    }
}

/// A userfaultfd answers poll(2) only if it does not block.
fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
