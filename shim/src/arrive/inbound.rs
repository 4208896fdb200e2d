//! Memory that arrives beside CRIU's images: where it waits, and how it gets
//! under the restored processes.
//!
//! ```text
//!   lanes ──▶ Incoming ─▶ a memfd per shared object: given to CRIU
//!               ▼         (or a file, which becomes CRIU's image)
//!             Store ──┬─▶ eager pages: into CRIU's images, before the restore
//!                     └─▶ lazy pages: fault server, from the first descriptor
//!                         that CRIU gives it on, until every page is placed
//! ```
//!
//! A page that is missing reads as zeros once nobody serves its faults. So
//! the server that must give up kills every process first ([`Victim`]).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io,
    os::fd::BorrowedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, warn};
use transship_criu::{
    Inherited,
    images::MemoryDir,
    pages::{self, Contents, Given, Seals},
};
use transship_memory::{
    FaultOptions, FaultServer, Serving, Store,
    room::{self, Room},
};
use transship_migration::{
    Filled, MigrationError, PageStore, Wanted, chain,
    report::{self, Restored},
};
use transship_types::{PAGE, PageSet, Space};

use super::incoming::{Incoming, name_of};
use crate::{
    cgroup::{self, Cgroup},
    guardian::Guardian,
};

/// Killed processes wait for nothing but the release of their memory.
const DEATH: Duration = Duration::from_secs(30);

/// Left to the node itself and to what the restore needs beside the pages.
const RESERVE_BYTES: u64 = 64 << 20;

type Result<T> = std::result::Result<T, MigrationError>;

/// The memory of one arriving container.
pub struct Inbound {
    room: Room,
    /// As they were before CRIU mounted its own.
    mounts: String,
    images: Arc<MemoryDir>,
    store: Arc<Store>,
    incoming: Arc<Incoming>,
    /// To be put on once every process is there.
    seals: Mutex<Seals>,
    listening: Option<FaultServer>,
    serving: Option<Arc<Serving>>,
    victim: Arc<Victim>,
    post: Arc<Post>,
}

impl Inbound {
    /// Takes no more than this node has to spare. `images` are CRIU's.
    pub fn new(images: Arc<MemoryDir>) -> Result<Self> {
        let room = room()?;
        let store = Arc::new(Store::new(room.bytes));
        Ok(Self {
            incoming: Arc::new(Incoming::new(store.clone(), images.clone(), room.bytes)),
            room,
            mounts: cgroup::mounts()
                .map_err(|error| MigrationError::runtime("memory", error.sentence()))?,
            seals: Mutex::default(),
            images,
            store,
            listening: None,
            serving: None,
            victim: Arc::default(),
            post: Arc::default(),
        })
    }

    /// Refuses a container that brings more than there is. The server's
    /// socket lies in `work`, where CRIU looks for it.
    pub fn prepare(&mut self, work: &Path, memory_bytes: u64) -> Result<()> {
        // What it uses now is no limit: it may grow while it travels.
        if memory_bytes > self.room.bytes {
            return Err(MigrationError::runtime(
                "memory",
                format!(
                    "this node has {} MiB to spare (within {}) and the container uses {} MiB; \
                     free some memory here or choose another node",
                    self.room.bytes >> 20,
                    self.room.bound_by,
                    memory_bytes >> 20
                ),
            ));
        }
        let listening = FaultServer::listen(work).map_err(failed("wait for CRIU's tasks"))?;
        self.listening = Some(listening);
        // Before the pause: it is a process to start.
        self.post.take_up();
        Ok(())
    }

    /// What takes in the pages.
    pub fn store(&self) -> Arc<dyn PageStore> {
        self.incoming.clone()
    }

    /// Which of these pages CRIU puts in place itself.
    pub async fn needs(
        &self,
        images: Arc<MemoryDir>,
        present: &[(Space, PageSet)],
    ) -> Result<Vec<(Space, PageSet)>> {
        let present = present.to_vec();
        blocking(move || {
            let layout = pages::layout(&images).map_err(failed("read CRIU's images"))?;
            let needs = layout.iter().filter_map(|process| {
                let space = Space::Process(process.vpid);
                let (_, pages) = present.iter().find(|(of, _)| *of == space)?;
                Some((space, pages::eager(process, pages)))
            });
            Ok(needs.collect())
        })
        .await
    }

    /// Completes CRIU's images with the pages that must be there before the
    /// container runs, and serves the others. Pages that are touched and
    /// lacking are told to `wanted`. `takes_files`: CRIU can be given shared
    /// objects.
    pub async fn serve(
        &mut self,
        present: Vec<(Space, PageSet)>,
        wanted: Option<UnboundedSender<Wanted>>,
        takes_files: bool,
    ) -> Result<Served> {
        let (images, store, incoming) =
            (self.images.clone(), self.store.clone(), self.incoming.clone());
        let completed = blocking(move || {
            let mut completed = complete(&images, &store, &present)?;
            complete_shared(&images, incoming.memfds(), &present, takes_files, &mut completed)?;
            Ok(completed)
        });
        let Completed { lazy, mut served, seals } = completed.await?;
        *self.seals() = seals;
        if lazy.values().all(PageSet::is_empty) {
            self.listening = None;
            return Ok(served);
        }
        served.restored.lazy = true;
        let Some(server) = self.listening.take() else {
            return Err(MigrationError::runtime("memory", "its pages are served already"));
        };
        let (victim, post) = (self.victim.clone(), self.post.clone());
        let mut options = FaultOptions::new(move || victim.kill());
        options.hold = Some(Box::new(move |descriptor| post.hold(descriptor)));
        options.source = wanted.map(|wanted| -> transship_memory::Source {
            Arc::new(move |space, address| {
                // Nobody listens any more once nobody waits either.
                let _ = wanted.send((space, address));
            })
        });
        let serving =
            server.serve(self.store.clone(), lazy, options).map_err(failed("serve its pages"))?;
        self.serving = Some(Arc::new(serving));
        Ok(served)
    }

    fn seals(&self) -> MutexGuard<'_, Seals> {
        self.seals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every process is there and none has run: from now on the server knows
    /// whom to kill.
    pub fn restored(&self, pid: i32) -> Result<()> {
        let seals = std::mem::take(&mut *self.seals());
        seals.apply().map_err(failed("seal a shared object"))?;
        if self.serving.is_none() {
            return Ok(());
        }
        let cgroup = Cgroup::of_process_among(pid, &self.mounts)
            .map_err(|error| MigrationError::runtime("memory", error.sentence()))?;
        self.post.over(&cgroup);
        self.victim.is(cgroup);
        self.is_sound()
    }

    /// Fails if the server has given up: nobody may run on what it left.
    pub fn is_sound(&self) -> Result<()> {
        let sound = self.serving.as_ref().is_none_or(|serving| serving.is_sound());
        match sound && !self.victim.is_killed() {
            true => Ok(()),
            false => Err(MigrationError::runtime("memory", "its pages are no longer served")),
        }
    }

    /// The container runs: the rest may be filled in.
    pub fn resumed(&self) {
        match &self.serving {
            Some(serving) => serving.resumed(),
            None => self.post.leave(),
        }
    }

    /// Ends the server, once no process is left that it could serve.
    pub fn stop(&self) -> Arc<dyn Fn() + Send + Sync> {
        let (serving, post) = (self.serving.clone(), self.post.clone());
        Arc::new(move || {
            if let Some(serving) = &serving {
                serving.give_up();
            }
            post.leave();
        })
    }

    /// Ends when the server has: every page in place, or nobody there.
    pub fn filled(&self) -> Option<BoxFuture<'static, Filled>> {
        let (serving, post) = (self.serving.clone()?, self.post.clone());
        let victim = self.victim.clone();
        Some(Box::pin(async move {
            let served = tokio::task::spawn_blocking(move || {
                let served = serving.wait();
                post.leave();
                served
            });
            match served.await {
                Ok(Ok(served)) => Filled::All(report::Fill {
                    faults: served.faults,
                    fault_latency: served.fault_latency,
                    pages: served.pages,
                    duration: served.duration,
                }),
                // It was told to end, because nobody is left.
                Ok(Err(_)) if !victim.is_killed() => Filled::Nobody,
                Ok(Err(error)) => {
                    error!(error = chain(&error), "the container's memory was not completed");
                    Filled::Failed(chain(&error))
                }
                Err(error) => {
                    error!(%error, "the fault server's end was not seen");
                    Filled::Failed(error.to_string())
                }
            }
        }))
    }
}

/// What CRIU is to make of it.
#[derive(Default)]
pub struct Served {
    pub restored: Restored,
    /// For CRIU, with its request.
    pub files: Vec<Inherited>,
}

#[derive(Default)]
struct Completed {
    lazy: HashMap<u32, PageSet>,
    served: Served,
    seals: Seals,
}

/// Every process of CRIU's images, also one that brought no page by lane.
fn complete(images: &MemoryDir, store: &Store, present: &[(Space, PageSet)]) -> Result<Completed> {
    let mut completed = Completed::default();
    for process in pages::layout(images).map_err(failed("read CRIU's images"))? {
        let space = Space::Process(process.vpid);
        let none = PageSet::new();
        let pages = present.iter().find(|(of, _)| *of == space).map_or(&none, |(_, set)| set);
        let mut fetch =
            |range, into: &mut [u8]| store.copy_out(space, range, into).map_err(io::Error::other);
        let done = pages::complete(images, &process, pages, &mut fetch)
            .map_err(failed("complete CRIU's images"))?;
        completed.served.restored.criu_pages += done.criu_pages;
        completed.lazy.insert(process.vpid, done.lazy);
    }
    Ok(completed)
}

/// CRIU is given the objects that are memfds, if it can be, and finds the
/// others whole in its images.
fn complete_shared(
    images: &MemoryDir,
    mut memfds: BTreeMap<u64, File>,
    present: &[(Space, PageSet)],
    takes_files: bool,
    completed: &mut Completed,
) -> Result<()> {
    let shared = present.iter().filter_map(|(space, pages)| match *space {
        Space::Shared(inode) => Some((inode, pages)),
        Space::Process(_) => None,
    });
    let shared: BTreeMap<u64, &PageSet> = shared.collect();
    // CRIU makes those itself of which nothing is left.
    memfds.retain(|inode, _| shared.get(inode).is_some_and(|pages| !pages.is_empty()));
    let mut given = Given::default();
    if takes_files {
        given = pages::give(images, &memfds).map_err(failed("give CRIU shared objects"))?;
        for (inode, why) in &given.left {
            warn!(inode, why, "CRIU must fill a shared object itself");
        }
    } else {
        given.left = memfds.keys().map(|inode| (*inode, String::new())).collect();
    }
    let left: HashSet<u64> = given.left.iter().map(|(inode, _)| *inode).collect();
    let restored = &mut completed.served.restored;
    for (inode, pages) in shared {
        let file = memfds.get(&inode);
        if file.is_some() && !left.contains(&inode) {
            restored.given_bytes += pages.pages() * PAGE;
            restored.shared_bytes += pages.pages() * PAGE;
            continue;
        }
        let name = name_of(inode);
        let contents = file.map_or(Contents::Image(&name), Contents::Open);
        let done = pages::complete_shared(images, inode, pages, contents)
            .map_err(failed("complete CRIU's images"))?;
        if done.criu_pages > 0 {
            // If any, then all; what came by lane is dropped.
            warn!(inode, pages = done.criu_pages, "CRIU has saved a shared object itself");
        }
        restored.shared_bytes += done.pages * PAGE;
        restored.criu_pages += done.criu_pages;
    }
    completed.served.files = given.files;
    completed.seals = given.seals;
    Ok(())
}

/// Whom the fault server kills when it must give up.
#[derive(Default)]
struct Victim(Mutex<Fate>);

#[derive(Default)]
struct Fate {
    killed: bool,
    cgroup: Option<Cgroup>,
}

impl Victim {
    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is(&self, cgroup: Cgroup) {
        self.fate().cgroup = Some(cgroup);
    }

    fn is_killed(&self) -> bool {
        self.fate().killed
    }

    /// Returns once nobody is left, as far as that can be brought about.
    /// Until it is known who it is nobody runs, and nobody will.
    fn kill(&self) {
        let cgroup = {
            let mut fate = self.fate();
            fate.killed = true;
            fate.cgroup.clone()
        };
        let Some(cgroup) = cgroup else { return };
        error!("the container is killed: some of its memory cannot be brought back");
        if let Err(error) = cgroup.kill(DEATH) {
            error!(error = error.sentence(), "it could not be killed");
        }
    }
}

/// Where the guardian stands, if one could be had.
#[derive(Default)]
struct Post(Mutex<Option<Guardian>>);

impl Post {
    fn guardian(&self) -> MutexGuard<'_, Option<Guardian>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_up(&self) {
        match Guardian::post() {
            Ok(guardian) => *self.guardian() = Some(guardian),
            Err(error) => {
                let error = error.sentence();
                warn!(error, "nobody stands in if this shim is killed meanwhile");
            }
        }
    }

    fn hold(&self, descriptor: BorrowedFd<'_>) {
        self.tell(|guardian| guardian.hold(descriptor));
    }

    fn over(&self, victim: &Cgroup) {
        self.tell(|guardian| guardian.over(victim));
    }

    fn tell(&self, what: impl FnOnce(&Guardian) -> io::Result<()>) {
        if let Some(guardian) = &*self.guardian()
            && let Err(error) = what(guardian)
        {
            warn!(%error, "the guardian does not listen");
        }
    }

    /// Nobody is in danger any more.
    fn leave(&self) {
        let guardian = self.guardian().take();
        if let Some(guardian) = guardian {
            guardian.dismiss();
        }
    }
}

/// What this node can spare for pages that wait: they are charged to us.
fn room() -> Result<Room> {
    let found = room::for_us().map_err(|error| {
        MigrationError::runtime("memory", format!("how much is free here: {error}"))
    })?;
    Ok(Room { bytes: found.bytes.saturating_sub(RESERVE_BYTES), ..found })
}

fn failed<E: std::error::Error>(doing: &'static str) -> impl FnOnce(E) -> MigrationError {
    move |error| MigrationError::runtime("memory", format!("{doing}: {}", chain(&error)))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|error| MigrationError::runtime("memory", error.to_string()))?
}
