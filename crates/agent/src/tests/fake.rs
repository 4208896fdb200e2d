//! A daemon and its shims in a few maps. A test can hold it at named points.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use transship_api::{
    control::{
        DepartEvent, DepartRequest, Departure, InspectResponse, MemoryReport, PhaseTime, Progress,
        WatchResponse, depart_event::Event,
    },
    session::{Any, Container, Descriptor, Hello, Stdio},
};
use transship_link::{Channel, Credentials, Trust, arrivals::wait_at, connect_ticket};
use transship_types::{ContainerKey, Epoch, MigrationId};
use transship_wire::WireError;

use crate::{
    daemon::{
        Arrival, Arriving, BlobReader, BlobWriter, Daemon, DaemonError, Description, Listed, Task,
        TaskStatus,
    },
    shim::{Departing, ShimError, Shims},
};

/// A runtime whose shim is surely installed: a path is itself.
pub const RUNTIME: &str = "/bin/sh";

/// What is in the memory of a container that leaves.
pub const PAGES: &[u8] = b"canary-of-the-memory";

type Daemonic<T> = Result<T, DaemonError>;

#[derive(Default)]
pub struct State {
    pub containers: BTreeMap<ContainerKey, Kept>,
    pub blobs: HashMap<String, Bytes>,
    pub images: HashMap<String, Vec<Descriptor>>,
    pub leases: BTreeSet<ContainerKey>,
    /// Under which containers arrived.
    pub tickets: HashMap<ContainerKey, transship_types::Ticket>,
    /// What the next call of this name answers instead.
    pub fail: HashMap<&'static str, &'static str>,
    pub disk_free: u64,
    /// A shim that is told of proof does not answer so many times.
    pub deaf: u32,
}

fn silent() -> DaemonError {
    DaemonError::Unavailable { address: "the fake".into(), source: "it is dead".into() }
}

#[derive(Clone)]
pub struct Kept {
    pub record: Container,
    pub task: Option<Task>,
}

pub struct Fake {
    state: Mutex<State>,
    arrivals: PathBuf,
    held: watch::Sender<BTreeSet<&'static str>>,
    reached: watch::Sender<BTreeSet<&'static str>>,
    /// The daemon does not answer; its shims live.
    dead: watch::Sender<bool>,
    /// Departures under way, and whether they may still be abandoned.
    departures: Mutex<HashMap<ContainerKey, (CancellationToken, bool)>>,
    /// The last bandwidth that was asked for.
    pub adjusted: Mutex<HashMap<ContainerKey, u64>>,
}

impl Fake {
    pub fn new(arrivals: PathBuf) -> Arc<Fake> {
        let state = State { disk_free: 1 << 40, ..Default::default() };
        Arc::new(Fake {
            state: state.into(),
            arrivals,
            held: watch::Sender::default(),
            reached: watch::Sender::default(),
            dead: watch::Sender::default(),
            departures: Mutex::default(),
            adjusted: Mutex::default(),
        })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn hold(&self, point: &'static str) {
        self.held.send_modify(|held| {
            held.insert(point);
        });
    }

    pub fn release(&self, point: &'static str) {
        self.held.send_modify(|held| {
            held.remove(point);
        });
    }

    pub fn die(&self, dead: bool) {
        self.dead.send_replace(dead);
    }

    fn answers(&self) -> Daemonic<()> {
        if *self.dead.borrow() { Err(silent()) } else { Ok(()) }
    }

    pub async fn until(&self, point: &'static str) {
        let mut reached = self.reached.subscribe();
        let wait = reached.wait_for(|r| r.contains(point));
        tokio::time::timeout(Duration::from_secs(20), wait)
            .await
            .unwrap_or_else(|_| panic!("{point} was not reached"))
            .unwrap();
    }

    async fn pass(&self, point: &'static str) -> Result<(), DaemonError> {
        self.reached.send_modify(|reached| {
            reached.insert(point);
        });
        self.held.subscribe().wait_for(|held| !held.contains(point)).await.unwrap();
        match self.state().fail.remove(point) {
            Some(why) => Err(DaemonError::failed(format!("at {point}"), why)),
            None => Ok(()),
        }
    }

    pub fn set_status(&self, key: &ContainerKey, status: TaskStatus) {
        if let Some(task) = self.state().containers.get_mut(key).and_then(|c| c.task.as_mut()) {
            task.status = status;
        }
    }

    pub fn status(&self, key: &ContainerKey) -> Option<TaskStatus> {
        self.state().containers.get(key)?.task.as_ref().map(|t| t.status)
    }

    pub fn add_image(&self, name: &str, blobs: &[&[u8]]) {
        let mut state = self.state();
        let mut content = Vec::new();
        for bytes in blobs {
            let digest = digest(bytes);
            state.blobs.insert(digest.clone(), Bytes::copy_from_slice(bytes));
            content.push(Descriptor { digest, size: bytes.len() as i64, ..Default::default() });
        }
        state.images.insert(name.into(), content);
    }

    pub fn run(&self, key: &ContainerKey, image: &str, spec: &str) {
        let record = Container {
            image: image.into(),
            runtime: RUNTIME.into(),
            snapshotter: "overlayfs".into(),
            spec: Some(Any { type_url: "spec".into(), value: spec.as_bytes().to_vec().into() }),
            ..Default::default()
        };
        let task = Some(task(4711, TaskStatus::Running));
        self.state().containers.insert(key.clone(), Kept { record, task });
    }
}

pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    format!("sha256:{}", hash.iter().map(|b| format!("{b:02x}")).collect::<String>())
}

fn task(pid: u32, status: TaskStatus) -> Task {
    Task { pid, status, stdio: Stdio::default() }
}

pub struct FakeDaemon(pub Arc<Fake>);

#[async_trait]
impl Daemon for FakeDaemon {
    async fn version(&self) -> Daemonic<String> {
        Ok("fake 1".into())
    }

    async fn describe(&self, key: &ContainerKey) -> Daemonic<Description> {
        self.0.pass("describe").await?;
        let state = self.0.state();
        let kept = state
            .containers
            .get(key)
            .ok_or_else(|| DaemonError::NotFound { what: key.to_string() })?;
        let Kept { record, task } = kept.clone();
        Ok(Description { record, snapshot_key: key.id().into(), task })
    }

    async fn list(&self, namespace: Option<&str>) -> Daemonic<Vec<Listed>> {
        let state = self.0.state();
        let found = state
            .containers
            .iter()
            .filter(|(key, _)| namespace.is_none_or(|n| n == key.namespace()));
        Ok(found
            .map(|(key, kept)| Listed {
                key: key.clone(),
                image: kept.record.image.clone(),
                task: kept.task.clone(),
            })
            .collect())
    }

    async fn task(&self, key: &ContainerKey) -> Daemonic<Option<Task>> {
        self.0.answers()?;
        Ok(self.0.state().containers.get(key).and_then(|c| c.task.clone()))
    }

    async fn taken(&self, key: &ContainerKey, _: &str) -> Daemonic<Option<String>> {
        Ok(self.0.state().containers.contains_key(key).then(|| "a container".into()))
    }

    async fn has_snapshotter(&self, name: &str) -> Daemonic<bool> {
        Ok(name == "overlayfs")
    }

    async fn content_of(&self, _: &str, image: &str) -> Daemonic<Vec<Descriptor>> {
        Ok(self.0.state().images.get(image).cloned().unwrap_or_default())
    }

    async fn missing(&self, _: &str, content: &[Descriptor]) -> Daemonic<Vec<String>> {
        let state = self.0.state();
        let lacks = content.iter().filter(|d| !state.blobs.contains_key(&d.digest));
        Ok(lacks.map(|d| d.digest.clone()).collect())
    }

    async fn read_blob(&self, _: &str, d: &Descriptor) -> Daemonic<Box<dyn BlobReader>> {
        let bytes = self.0.state().blobs.get(&d.digest).cloned().unwrap();
        Ok(Box::new(Pieces { fake: self.0.clone(), bytes }))
    }

    async fn free_disk(&self) -> Daemonic<u64> {
        Ok(self.0.state().disk_free)
    }

    async fn arrival(&self, key: &ContainerKey) -> Daemonic<Box<dyn Arriving>> {
        self.0.pass("lease").await?;
        self.0.state().leases.insert(key.clone());
        Ok(Box::new(FakeArriving {
            fake: self.0.clone(),
            key: key.clone(),
            blobs: vec![],
            ticket: None,
        }))
    }

    async fn unfinished(&self) -> Daemonic<Vec<(ContainerKey, Box<dyn Arriving>)>> {
        let keys: Vec<_> = self.0.state().leases.iter().cloned().collect();
        let arriving = |key: ContainerKey| {
            let fake = self.0.clone();
            let left = FakeArriving { fake, key: key.clone(), blobs: vec![], ticket: None };
            (key, Box::new(left) as Box<dyn Arriving>)
        };
        Ok(keys.into_iter().map(arriving).collect())
    }

    async fn end(&self, key: &ContainerKey, _: i64) -> Daemonic<bool> {
        self.0.answers()?;
        self.0.pass("end").await?;
        let ran = self.0.status(key) == Some(TaskStatus::Running);
        self.0.state().containers.remove(key);
        Ok(ran)
    }

    async fn remove(&self, key: &ContainerKey) -> Daemonic<()> {
        self.0.pass("remove").await?;
        self.0.state().containers.remove(key);
        Ok(())
    }
}

struct Pieces {
    fake: Arc<Fake>,
    bytes: Bytes,
}

#[async_trait]
impl BlobReader for Pieces {
    async fn next(&mut self) -> Daemonic<Option<Bytes>> {
        self.fake.pass("read").await?;
        let n = self.bytes.len().min(1000);
        Ok((n > 0).then(|| self.bytes.split_to(n)))
    }
}

struct FakeArriving {
    fake: Arc<Fake>,
    key: ContainerKey,
    blobs: Vec<String>,
    ticket: Option<transship_types::Ticket>,
}

struct Sink {
    fake: Arc<Fake>,
    digest: String,
    bytes: Vec<u8>,
}

#[async_trait]
impl BlobWriter for Sink {
    async fn write(&mut self, bytes: Bytes) -> Daemonic<()> {
        self.fake.pass("write").await?;
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }

    async fn commit(self: Box<Self>) -> Daemonic<()> {
        if digest(&self.bytes) != self.digest {
            let why = "its bytes are others".into();
            return Err(DaemonError::Blob { digest: self.digest, why });
        }
        self.fake.state().blobs.insert(self.digest, self.bytes.into());
        Ok(())
    }
}

#[async_trait]
impl Arriving for FakeArriving {
    async fn blob(&mut self, d: &Descriptor) -> Daemonic<Box<dyn BlobWriter>> {
        self.blobs.push(d.digest.clone());
        let (fake, digest) = (self.fake.clone(), d.digest.clone());
        Ok(Box::new(Sink { fake, digest, bytes: vec![] }))
    }

    async fn create(&mut self, arrival: &Arrival) -> Daemonic<()> {
        self.fake.pass("create").await?;
        let record = arrival.record.clone();
        self.ticket = Some(arrival.ticket.clone());
        let kept = Kept { record, task: Some(task(0, TaskStatus::Created)) };
        let mut state = self.fake.state();
        state.tickets.insert(arrival.key.clone(), arrival.ticket.clone());
        state.containers.insert(arrival.key.clone(), kept);
        Ok(())
    }

    fn start(&self) -> Pin<Box<dyn Future<Output = Daemonic<u32>> + Send>> {
        let (fake, key, ticket) = (self.fake.clone(), self.key.clone(), self.ticket.clone());
        Box::pin(async move {
            fake.pass("start").await?;
            let ticket = ticket.expect("created first");
            let arriving = tokio::spawn({
                let (fake, key) = (fake.clone(), key.clone());
                async move {
                    let arrived = arrive(&fake, &key, &ticket).await;
                    if arrived.is_err() && fake.status(&key) != Some(TaskStatus::Running) {
                        fake.set_status(&key, TaskStatus::Stopped);
                    }
                    arrived
                }
            });
            let mut dead = fake.dead.subscribe();
            tokio::select! {
                arrived = arriving => {
                    arrived.unwrap().map_err(|e| DaemonError::failed("to start", e))
                }
                _ = dead.wait_for(|dead| *dead) => Err(silent()),
            }
        })
    }

    async fn keep(self: Box<Self>) -> Daemonic<()> {
        self.fake.state().leases.remove(&self.key);
        Ok(())
    }

    async fn undo(self: Box<Self>) -> Daemonic<()> {
        self.fake.answers()?;
        let mut state = self.fake.state();
        state.containers.remove(&self.key);
        state.leases.remove(&self.key);
        self.blobs.iter().for_each(|digest| drop(state.blobs.remove(digest)));
        Ok(())
    }
}

type Boxed = Box<dyn std::error::Error + Send + Sync>;

async fn say(channel: &mut Channel, word: &str) -> Result<(), WireError> {
    let hello = Hello { software: word.into(), ..Default::default() };
    channel.writer.control(&hello).await
}

async fn hear(channel: &mut Channel, word: &str) -> Result<(), Boxed> {
    let said: Hello = channel.reader.control().await?;
    if said.software == word { Ok(()) } else { Err(format!("{} for {word}", said.software).into()) }
}

/// The target's shim in six lines.
async fn arrive(
    fake: &Arc<Fake>,
    key: &ContainerKey,
    ticket: &transship_types::Ticket,
) -> Result<u32, Boxed> {
    let arrival = wait_at(&fake.arrivals, ticket, Duration::from_secs(20)).await?;
    let mut source = arrival.accept().await?;
    while source.reader.data().await?.is_some() {}
    fake.pass("restore").await?;
    say(&mut source, "prepared").await?;
    hear(&mut source, "commit").await?;
    fake.set_status(key, TaskStatus::Running);
    fake.pass("running").await?;
    // It runs whether or not the source hears of it.
    let _ = say(&mut source, "running").await;
    Ok(77)
}

pub struct FakeShims(pub Arc<Fake>);

#[async_trait]
impl Shims for FakeShims {
    async fn inspect(&self, _: &ContainerKey) -> Result<InspectResponse, ShimError> {
        let runtime = "sh 1".into();
        Ok(InspectResponse { runtime, memory_bytes: 1 << 20, ..Default::default() })
    }

    async fn depart(
        &self,
        key: &ContainerKey,
        request: DepartRequest,
    ) -> Result<Box<dyn Departing>, ShimError> {
        let (fake, key) = (self.0.clone(), key.clone());
        let stop = CancellationToken::new();
        fake.departures.lock().unwrap().insert(key.clone(), (stop.clone(), true));
        let (events, receiver) = mpsc::channel(8);
        tokio::spawn(async move {
            let progress =
                Progress { phase: "rounds".into(), bytes: 5, round: 1, ..Default::default() };
            let _ = events.send(event(Event::Progress(progress))).await;
            let ending = leave(&fake, &key, request, stop).await;
            let _ = events.send(event(Event::Departure(ending))).await;
        });
        Ok(Box::new(Events(receiver)))
    }

    async fn abandon(
        &self,
        key: &ContainerKey,
        _: &MigrationId,
    ) -> Result<Option<String>, ShimError> {
        let departures = self.0.departures.lock().unwrap();
        let (stop, open) = &departures[key];
        if *open {
            stop.cancel();
        }
        Ok((!open).then(|| "it is committed".into()))
    }

    async fn settle(
        &self,
        key: &ContainerKey,
        _: &MigrationId,
        runs_there: bool,
        _may_lack: bool,
        _: Option<Epoch>,
    ) -> Result<(String, String), ShimError> {
        let hears = {
            let deaf = &mut self.0.state().deaf;
            std::mem::replace(deaf, deaf.saturating_sub(1)) == 0
        };
        if !hears {
            let source = ttrpc::Error::Others("it hangs".into());
            return Err(ShimError::Failed { key: key.clone(), doing: "settle", source });
        }
        let status = if runs_there { TaskStatus::Stopped } else { TaskStatus::Running };
        self.0.set_status(key, status);
        let ending = if runs_there { "departed" } else { "stayed-home" };
        Ok((ending.into(), String::new()))
    }

    async fn adjust(
        &self,
        key: &ContainerKey,
        _: &MigrationId,
        bandwidth: u64,
    ) -> Result<(), ShimError> {
        self.0.adjusted.lock().unwrap().insert(key.clone(), bandwidth);
        Ok(())
    }

    async fn watch(&self, _: &ContainerKey, _: Duration) -> Result<WatchResponse, ShimError> {
        Ok(WatchResponse {
            backend: "write-protect".into(),
            pages: 256,
            written: vec![5, 5],
            interval_us: 100_000,
            written_pages: 6,
            shared_bytes: 2 << 20,
            ..Default::default()
        })
    }
}

fn event(event: Event) -> DepartEvent {
    DepartEvent { event: Some(event), ..Default::default() }
}

struct Events(mpsc::Receiver<DepartEvent>);

#[async_trait]
impl Departing for Events {
    async fn next(&mut self) -> Result<Option<DepartEvent>, ShimError> {
        Ok(self.0.recv().await)
    }
}

fn took_one(phase: &str) -> PhaseTime {
    PhaseTime { phase: phase.into(), duration_us: 1, ..Default::default() }
}

/// The source's shim: frozen means Paused here.
async fn leave(
    fake: &Arc<Fake>,
    key: &ContainerKey,
    request: DepartRequest,
    stop: CancellationToken,
) -> Departure {
    let departure = |ending: &str, error: String| Departure {
        ending: ending.into(),
        error,
        downtime_us: 7,
        image_bytes: 2000,
        phases: ["offer", "prepare", "rounds", "freeze"].map(took_one).into(),
        // What it was told, so that a test sees it.
        memory: Some(MemoryReport {
            lanes: request.tuning.lanes,
            expected_downtime_us: request.tuning.max_pause_us,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let home = |error: String| {
        fake.set_status(key, TaskStatus::Running);
        departure("stayed-home", error)
    };
    let prepared = tokio::select! {
        prepared = until_prepared(fake, key, &request) => prepared,
        () = stop.cancelled() => Err("abandoned".into()),
    };
    let mut target = match prepared {
        Ok(target) => target,
        Err(error) => return home(error.to_string()),
    };
    // No await between the last look at the cancellation and the commit.
    let late = {
        let mut departures = fake.departures.lock().unwrap();
        let (stop, open) = departures.get_mut(key).unwrap();
        *open = false;
        stop.is_cancelled()
    };
    if late {
        return home("abandoned".into());
    }
    let committed = async {
        say(&mut target, "commit").await?;
        fake.pass("committed").await?;
        hear(&mut target, "running").await
    };
    match committed.await {
        Ok(()) => {
            fake.set_status(key, TaskStatus::Stopped);
            departure("departed", String::new())
        }
        Err(error) => departure("in-doubt", error.to_string()),
    }
}

async fn until_prepared(
    fake: &Arc<Fake>,
    key: &ContainerKey,
    request: &DepartRequest,
) -> Result<Channel, Boxed> {
    let files = &request.credentials;
    let trust = Trust::load(&Credentials {
        ca: (&files.ca).into(),
        certificate: (&files.certificate).into(),
        key: (&files.key).into(),
        crl: Some(&files.crl).filter(|crl| !crl.is_empty()).map(Into::into),
    })?;
    let (node, ticket) = (request.node.parse()?, request.ticket.parse()?);
    let mut target = connect_ticket(&trust, &request.address, &node, &ticket).await?;
    fake.pass("pages").await?;
    target.writer.data(PAGES).await?;
    fake.set_status(key, TaskStatus::Paused);
    target.writer.end_data().await?;
    hear(&mut target, "prepared").await?;
    fake.pass("prepared").await?;
    Ok(target)
}
