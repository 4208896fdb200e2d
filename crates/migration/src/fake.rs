//! A container that is only a directory and a counter, for tests of the
//! hand-over without CRIU. It fails where it is told to.

mod memory;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use tokio::{
    sync::{Mutex, mpsc},
    time::sleep,
};
use transship_memory::Memory;
use transship_rootfs::Layer;
use transship_types::{Epoch, MigrationId, PageSet, Space, Ticket};

pub use self::memory::{FakeMemory, FakeStore};
use crate::{
    Connect, Connecting, Filled, Journal, Manifest, MigrationError, NextConnection, PageStore,
    Source, Target, Wanted,
    journal::{Role, Subject},
    report::{Fill, Restored},
};

/// The steps of both ends in which a fake can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Prepare,
    Freeze,
    Dump,
    Guard,
    TargetPrepare,
    Restore,
    Resume,
    Discard,
    /// From here on: only where there is memory.
    Connect,
    Lane,
    Scan,
    Read,
    Peek,
    LastScan,
    /// The source claims a page that it never sent.
    Lie,
    Hide,
    Store,
    /// The container runs by then.
    Fill,
}

impl Step {
    pub const ALL: [Step; 8] = [
        Step::Prepare,
        Step::Freeze,
        Step::Dump,
        Step::Guard,
        Step::TargetPrepare,
        Step::Restore,
        Step::Resume,
        Step::Discard,
    ];

    pub const OF_MEMORY: [Step; 9] = [
        Step::Connect,
        Step::Lane,
        Step::Scan,
        Step::Read,
        Step::Peek,
        Step::LastScan,
        Step::Lie,
        Step::Hide,
        Step::Store,
    ];
}

fn fail(fails: Option<Step>, step: Step) -> Result<(), MigrationError> {
    if fails == Some(step) {
        return Err(MigrationError::runtime("fake", format!("{step:?} fails as asked")));
    }
    Ok(())
}

/// Names for a migration between two fakes.
pub fn subject(role: Role) -> Subject {
    Subject {
        role,
        migration: MigrationId::from_random([7; 16]),
        ticket: Ticket::from_random([9; 16]),
        namespace: "default".into(),
        container: "fake".into(),
        peer: "b".parse().expect("a node name"),
        epoch: Epoch(1),
    }
}

pub fn manifest() -> Manifest {
    let subject = subject(Role::Source);
    Manifest {
        migration: subject.migration.to_string(),
        ticket: subject.ticket.to_string(),
        container: subject.container,
        epoch: subject.epoch.0,
        remembered: None,
        descriptors: String::new(),
        lanes: 0,
        memory_bytes: 0,
    }
}

/// A running container at its source.
pub struct FakeSource {
    pub running: Arc<AtomicBool>,
    pub ended: bool,
    pub fails: Option<Step>,
    pub memory: Option<Arc<FakeMemory>>,
    /// How its lanes get to the target.
    pub connect: Option<Connect>,
    /// Pages cannot be hidden from CRIU.
    pub hides_nothing: bool,
    /// A tree that travels as its writable layer.
    pub layer: Option<PathBuf>,
    images: PathBuf,
}

impl FakeSource {
    /// `images` stands for what CRIU writes.
    pub fn new(images: &Path, fails: Option<Step>) -> Self {
        let running = Arc::new(AtomicBool::new(true));
        Self {
            running,
            ended: false,
            fails,
            memory: None,
            connect: None,
            hides_nothing: false,
            layer: None,
            images: images.into(),
        }
    }

    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Source for FakeSource {
    fn layer(&self) -> Option<Layer> {
        self.layer.as_deref().map(Layer::whole)
    }

    fn images(&self) -> PathBuf {
        self.images.clone()
    }

    async fn prepare(&mut self) -> Result<(), MigrationError> {
        fail(self.fails, Step::Prepare)
    }

    fn complete(&mut self, manifest: &mut Manifest) -> Result<(), MigrationError> {
        manifest.descriptors = "[]".into();
        Ok(())
    }

    fn memory(&mut self) -> Option<Arc<dyn Memory>> {
        self.memory.clone().map(|memory| memory as Arc<dyn Memory>)
    }

    fn connect(&self) -> Option<Connect> {
        self.connect.clone()
    }

    fn throttle(&mut self, percent: Option<u32>) -> Result<(), MigrationError> {
        if let Some(memory) = &self.memory {
            memory.throttle.store(percent.unwrap_or(0), Ordering::SeqCst);
        }
        Ok(())
    }

    async fn freeze(&mut self) -> Result<(), MigrationError> {
        fail(self.fails, Step::Freeze)?;
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }

    async fn hide(&mut self) -> Result<Option<String>, MigrationError> {
        assert!(!self.is_running(), "only the pages of a frozen container are hidden");
        fail(self.fails, Step::Hide)?;
        Ok(self.hides_nothing.then(|| "it was asked not to".into()))
    }

    async fn dump(&mut self) -> Result<(), MigrationError> {
        fail(self.fails, Step::Dump)?;
        fs::write(self.images.join("pages-1.img"), vec![42; 3 << 20])
            .and_then(|()| fs::write(self.images.join("core-1.img"), b"registers"))
            .map_err(|source| MigrationError::Image { name: "pages-1.img".into(), source })
    }

    async fn guard(&mut self) -> Result<(), MigrationError> {
        fail(self.fails, Step::Guard)
    }

    async fn thaw(&mut self) -> Result<(), MigrationError> {
        assert!(!self.ended, "a container that has left cannot be thawed");
        self.running.store(true, Ordering::SeqCst);
        Ok(())
    }

    async fn leave(&mut self) -> Result<(), MigrationError> {
        assert!(!self.is_running(), "a container must stand still when it leaves");
        self.ended = true;
        Ok(())
    }
}

/// A container that may run here.
pub struct FakeTarget {
    pub running: bool,
    pub fails: Option<Step>,
    pub store: Option<Arc<FakeStore>>,
    /// Lanes of the source, as they come.
    pub lanes: Option<Arc<Mutex<mpsc::UnboundedReceiver<Connecting>>>>,
    /// What `restore` was told to be there.
    pub present: Vec<(Space, PageSet)>,
    /// It may run before its memory is there, and asks here for the rest.
    pub wanted: Option<mpsc::UnboundedSender<Wanted>>,
    images: PathBuf,
    journals: PathBuf,
}

impl FakeTarget {
    pub fn new(directory: &Path, fails: Option<Step>) -> Self {
        let (images, journals) = (directory.join("images"), directory.join("journal"));
        for made in [&images, &directory.join("root")] {
            fs::create_dir_all(made).expect("a directory");
        }
        Self {
            running: false,
            fails,
            store: None,
            lanes: None,
            present: Vec::new(),
            wanted: None,
            images,
            journals,
        }
    }

    /// Whether nothing of an arrival is left.
    pub fn is_clean(&self) -> bool {
        let empty = |path: &Path| {
            fs::read_dir(path).map(|mut entries| entries.next().is_none()).unwrap_or(true)
        };
        empty(&self.images) && empty(&self.journals)
    }
}

#[async_trait]
impl Target for FakeTarget {
    fn root(&self) -> PathBuf {
        self.images.with_file_name("root")
    }

    fn images(&self) -> PathBuf {
        self.images.clone()
    }

    async fn prepare(&mut self, _manifest: &Manifest) -> Result<(), MigrationError> {
        fail(self.fails, Step::TargetPrepare)
    }

    fn store(&self) -> Option<Arc<dyn PageStore>> {
        self.store.clone().map(|store| store as Arc<dyn PageStore>)
    }

    fn next(&self) -> Option<NextConnection> {
        let (lanes, fails) = (self.lanes.clone()?, self.fails);
        Some(Arc::new(move || {
            let lanes = lanes.clone();
            let next = async move {
                fail(fails, Step::Lane)?;
                let next = lanes.lock().await.recv().await;
                next.ok_or_else(|| MigrationError::runtime("fake", "nobody connects any more"))
            };
            next.boxed()
        }))
    }

    /// Every eighth page cannot wait.
    async fn needs(
        &mut self,
        present: &[(Space, PageSet)],
    ) -> Result<Vec<(Space, PageSet)>, MigrationError> {
        let eighth = |pages: &PageSet| {
            pages.iter().map(|range| range.split(1).0).step_by(8).collect::<PageSet>()
        };
        Ok(present.iter().map(|(space, pages)| (*space, eighth(pages))).collect())
    }

    async fn restore(
        &mut self,
        present: Vec<(Space, PageSet)>,
        wanted: Option<mpsc::UnboundedSender<Wanted>>,
    ) -> Result<Restored, MigrationError> {
        fail(self.fails, Step::Restore)?;
        let needed = self.needs(&present).await?;
        let store = self.store.clone();
        let lacks = |(space, pages): &(Space, PageSet)| {
            let store = store.as_ref().expect("pages are somewhere");
            pages.iter().any(|range| !store.lacking(*space, range).is_empty())
        };
        assert!(!needed.iter().any(lacks), "what is needed comes before the restore");
        self.wanted = wanted;
        self.present = present;
        let pages = fs::read(self.images.join("pages-1.img"))
            .map_err(|source| MigrationError::Image { name: "pages-1.img".into(), source })?;
        assert!(pages.len() == 3 << 20 && pages.iter().all(|byte| *byte == 42));
        Ok(Restored { lazy: !self.present.is_empty(), criu_pages: 3, ..Default::default() })
    }

    async fn resume(&mut self) -> Result<u32, MigrationError> {
        fail(self.fails, Step::Resume)?;
        self.running = true;
        Ok(4242)
    }

    /// Touches one page that is not there after the other.
    fn filled(&mut self) -> Option<BoxFuture<'static, Filled>> {
        if self.present.is_empty() {
            return None;
        }
        if let Err(error) = fail(self.fails, Step::Fill) {
            return Some(futures::future::ready(Filled::Failed(error.to_string())).boxed());
        }
        let (present, wanted, store) =
            (self.present.clone(), self.wanted.take(), self.store.clone()?);
        let filling = async move {
            for (space, _) in &present {
                while let Some(range) = wanted.as_ref().and(store.missing(*space).iter().next()) {
                    if let Some(wanted) = &wanted {
                        let _ = wanted.send((*space, range.start()));
                    }
                    while !store.lacking(*space, range.split(1).0).is_empty() {
                        sleep(Duration::from_millis(1)).await;
                    }
                }
            }
            let pages = present.iter().map(|(_, pages)| pages.pages()).sum();
            Filled::All(Fill { pages, faults: 5, ..Fill::default() })
        };
        Some(filling.boxed())
    }

    async fn discard(&mut self) -> Result<(), MigrationError> {
        fail(self.fails, Step::Discard)?;
        self.running = false;
        for entry in fs::read_dir(&self.images).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
        Ok(())
    }

    fn journal(&self, _manifest: &Manifest) -> Result<Journal, MigrationError> {
        Journal::create(&self.journals, subject(Role::Target))
    }
}
