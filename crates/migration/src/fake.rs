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
};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use tokio::sync::mpsc;
use transship_memory::Memory;
use transship_rootfs::Layer;
use transship_types::{Epoch, MigrationId, PageSet, Space, Ticket};

pub use self::memory::{FakeMemory, FakeStore};
use crate::{
    Connect, Connecting, Journal, Manifest, MigrationError, PageStore, Source, Target,
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
    pub lanes: Option<mpsc::UnboundedReceiver<Connecting>>,
    /// What `restore` was told to be there.
    pub present: Vec<(Space, PageSet)>,
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

    async fn next_lane(&mut self) -> Result<Connecting, MigrationError> {
        fail(self.fails, Step::Lane)?;
        let lanes = self.lanes.as_mut().expect("a target that waits for lanes");
        Ok(lanes.recv().await.expect("a source that may still connect"))
    }

    async fn restore(
        &mut self,
        present: Vec<(Space, PageSet)>,
    ) -> Result<Restored, MigrationError> {
        fail(self.fails, Step::Restore)?;
        self.present = present;
        let pages = fs::read(self.images.join("pages-1.img"))
            .map_err(|source| MigrationError::Image { name: "pages-1.img".into(), source })?;
        assert!(pages.len() == 3 << 20 && pages.iter().all(|byte| *byte == 42));
        Ok(Restored { lazy: !self.present.is_empty(), criu_pages: 3 })
    }

    async fn resume(&mut self) -> Result<u32, MigrationError> {
        fail(self.fails, Step::Resume)?;
        self.running = true;
        Ok(4242)
    }

    fn filled(&mut self) -> Option<BoxFuture<'static, Option<Fill>>> {
        if self.present.is_empty() {
            return None;
        }
        let pages = self.present.iter().map(|(_, pages)| pages.pages()).sum();
        let fill = Fill { pages, faults: 5, ..Fill::default() };
        let fill = fail(self.fails, Step::Fill).is_ok().then_some(fill);
        Some(futures::future::ready(fill).boxed())
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
