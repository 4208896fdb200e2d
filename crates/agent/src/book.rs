//! What this node knows of its migrations: the running ones, with a handle
//! to watch and cancel them, and on disk all of them, so that `status` and a
//! peer's inquiry survive a restart.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    fs,
    future::Future,
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use protobuf::Message as _;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use transship_api::control::{Progress, Report};
pub use transship_migration::journal::Role;
use transship_migration::{
    decide::{Choice, Journaled},
    journal,
};
use transship_types::{Code, ContainerKey, Epoch, MigrationId, NodeName, Refusal};

use crate::failure::{Failure, Step};

/// Ended migrations that are remembered. A peer asks within minutes, people
/// within days.
const REMEMBERED: usize = 500;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// Not ended.
    Running,
    /// Source: it runs on the target.
    Departed,
    /// Source: it was never given away.
    StayedHome,
    /// Source: stopped, until the target proves what became of it. Target: it
    /// could not be removed, so nothing is proved.
    InDoubt,
    /// Target: it runs here.
    Arrived,
    /// Target: it does not run here and never will.
    Discarded,
}

impl Ending {
    pub fn as_str(self) -> &'static str {
        match self {
            Ending::Running => "running",
            Ending::Departed => "departed",
            Ending::StayedHome => "stayed-home",
            Ending::InDoubt => "in-doubt",
            Ending::Arrived => "arrived",
            Ending::Discarded => "discarded",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub migration: MigrationId,
    #[serde(flatten)]
    pub key: ContainerKey,
    pub role: Role,
    pub peer: NodeName,
    /// Source: where the peer is, to ask it again after a restart.
    pub address: String,
    /// Source: the container's record is not to be removed.
    pub keep: bool,
    /// Source: our shim was told to depart, so only it or the target knows
    /// who has the container.
    pub departing: bool,
    pub phase: String,
    pub ending: Ending,
    pub error: String,
    /// Seconds since the epoch; 0: never.
    pub started: i64,
    #[serde(default)]
    pub ended: i64,
    #[serde(default)]
    pub in_doubt_since: i64,
    #[serde(default)]
    pub decision: Option<Decision>,
}

/// What a person has decided without proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    pub choice: Choice,
    /// What was said under a lower one is void.
    pub epoch: Epoch,
    /// Seconds since the epoch.
    pub at: i64,
    /// The other node knows, and has nothing of it any more. On the target:
    /// this one has nothing any more.
    pub followed: bool,
    /// Both nodes ran it for a while.
    pub both_ran: bool,
}

impl Decision {
    pub fn new(choice: Choice, epoch: Epoch) -> Self {
        Self { choice, epoch, at: now(), followed: false, both_ran: false }
    }
}

/// In seconds since the epoch.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_secs().try_into().unwrap_or(i64::MAX)
}

impl Record {
    pub fn new(migration: MigrationId, key: ContainerKey, role: Role, peer: NodeName) -> Self {
        Self {
            migration,
            key,
            role,
            peer,
            address: String::new(),
            keep: false,
            departing: false,
            phase: "begin".into(),
            ending: Ending::Running,
            error: String::new(),
            started: now(),
            ended: 0,
            in_doubt_since: 0,
            decision: None,
        }
    }

    pub fn has_ended(&self) -> bool {
        !matches!(self.ending, Ending::Running | Ending::InDoubt)
    }

    /// Of the last decision; what was never decided has the first.
    pub fn epoch(&self) -> Epoch {
        self.decision.as_ref().map_or(Epoch(1), |decision| decision.epoch)
    }

    /// The target must still hear that the source's copy runs on.
    pub fn must_fence(&self) -> bool {
        let decided = self.decision.as_ref();
        let open = decided.is_some_and(|d| d.choice == Choice::RunHere && !d.followed);
        open && self.role == Role::Source && self.ending == Ending::StayedHome
    }

    /// That of the shim on this side.
    fn journal(&self, dir: &Path) -> PathBuf {
        journal::path(dir, &self.migration, self.role)
    }
}

/// How a migration ended, for whoever watched it.
#[derive(Debug, Clone)]
pub enum End {
    Moved(Box<Report>),
    Failed { refusals: Vec<Refusal>, ending: Ending, outcome: String },
}

impl End {
    /// Nobody watched it who would need more.
    pub fn of(ending: Ending, Failure(refusals): Failure) -> Self {
        End::Failed { refusals, ending, outcome: String::new() }
    }
}

/// What a watcher of a running migration sees.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub progress: Progress,
    /// Why it can no longer be cancelled.
    pub too_late: Option<String>,
    /// It stands still until the target has answered.
    pub in_doubt: bool,
    /// When the target was asked last, and what came of it.
    pub answer: Option<(i64, String)>,
    pub end: Option<End>,
}

/// Somebody decides, and waits for what comes of it.
#[derive(Debug)]
pub struct Request {
    pub choice: Choice,
    pub answer: oneshot::Sender<Step<Resolved>>,
}

/// How a doubt ended that somebody wanted to end.
#[derive(Debug)]
pub struct Resolved {
    /// The target had proof, and nobody had to decide.
    pub by_proof: bool,
    pub ending: Ending,
    pub outcome: String,
}

/// The handle to a running migration.
#[derive(Debug)]
pub struct Live {
    pub migration: MigrationId,
    pub cancel: CancellationToken,
    view: watch::Sender<View>,
    /// There while it is in doubt.
    resolver: Mutex<Option<mpsc::Sender<Request>>>,
}

impl Live {
    /// Asks whoever settles it; `None`: it is not in doubt.
    pub async fn resolve(&self, choice: Choice) -> Option<oneshot::Receiver<Step<Resolved>>> {
        let resolver = self.resolver.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let (answer, answered) = oneshot::channel();
        resolver.send(Request { choice, answer }).await.ok()?;
        Some(answered)
    }

    pub fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }
}

#[derive(Debug)]
pub struct Book {
    dir: PathBuf,
    /// Where the shims of this node write down what they decide.
    journals: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    records: BTreeMap<MigrationId, Record>,
    live: HashMap<ContainerKey, Arc<Live>>,
}

impl Book {
    /// Reads what is there. A record that cannot be read is named in the log
    /// and left alone.
    pub fn open(dir: &Path) -> io::Result<Arc<Book>> {
        // What was moved where is for root alone.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let mut records = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => drop(records.insert(record.migration.clone(), record)),
                Err(error) => tracing::warn!(path = %path.display(), %error, "unreadable record"),
            }
        }
        let inner = Inner { records, live: HashMap::new() };
        let journals = dir.with_file_name("journal");
        Ok(Arc::new(Book { dir: dir.into(), journals, inner: inner.into() }))
    }

    /// Opens a migration, or refuses because the container has one already, or
    /// because its name was used before.
    pub async fn begin(self: &Arc<Self>, record: Record) -> Step<Entry> {
        if self.record(&record.migration).is_some() {
            return Err(Failure::new(
                Code::Malformed,
                format!("migration {} is known already", record.migration),
                "start a new one",
            ));
        }
        self.reopen(record).await
    }

    /// Goes on with a migration of a former run.
    pub async fn reopen(self: &Arc<Self>, record: Record) -> Step<Entry> {
        let live = Arc::new(Live {
            migration: record.migration.clone(),
            cancel: CancellationToken::new(),
            view: watch::Sender::new(View {
                progress: Progress { phase: record.phase.clone(), ..Default::default() },
                ..Default::default()
            }),
            resolver: Mutex::default(),
        });
        match self.inner().live.entry(record.key.clone()) {
            hash_map::Entry::Vacant(place) => drop(place.insert(live.clone())),
            hash_map::Entry::Occupied(other) => {
                let other = &other.get().migration;
                return Err(Failure::new(
                    Code::Busy,
                    format!("{} is being migrated already ({other})", record.key),
                    format!("wait for it, or `transship cancel {other}`"),
                ));
            }
        }
        let entry = Entry { book: self.clone(), key: record.key.clone(), live };
        self.write(record).await?;
        Ok(entry)
    }

    pub fn live(&self, migration: &MigrationId) -> Option<Arc<Live>> {
        self.inner().live.values().find(|l| l.migration == *migration).cloned()
    }

    pub fn is_live(&self, key: &ContainerKey) -> bool {
        self.inner().live.contains_key(key)
    }

    pub fn all_live(&self) -> Vec<Arc<Live>> {
        self.inner().live.values().cloned().collect()
    }

    pub fn record(&self, migration: &MigrationId) -> Option<Record> {
        self.inner().records.get(migration).cloned()
    }

    /// What the shim of this side has written down last.
    pub fn journaled(&self, migration: &MigrationId, role: Role) -> Journaled {
        journal::last(&self.journals, migration, role)
    }

    /// Oldest first.
    pub fn records(&self) -> Vec<Record> {
        let mut all: Vec<_> = self.inner().records.values().cloned().collect();
        all.sort_by_key(|r| r.started);
        all
    }

    /// How it went, if it came that far here.
    pub async fn report(&self, migration: &MigrationId) -> Option<Report> {
        let path = report_file(&self.dir, migration);
        let read = tokio::task::spawn_blocking(move || fs::read(path)).await.ok()?;
        Report::parse_from_bytes(&read.ok()?).ok()
    }

    /// Where the shims keep theirs.
    pub fn journals(&self) -> &Path {
        &self.journals
    }

    /// Whether the container of this arrival still lacks pages.
    pub fn owes(&self, record: &Record) -> bool {
        record.role == Role::Target && journal::owed(&record.journal(&self.journals)).is_some()
    }

    /// Changes a record in memory and on disk; returns once it is on disk.
    pub async fn change(
        &self,
        migration: &MigrationId,
        change: impl FnOnce(&mut Record),
    ) -> Step<()> {
        let Some(mut record) = self.record(migration) else {
            return Ok(());
        };
        change(&mut record);
        if record.has_ended() && record.ended == 0 {
            record.ended = now();
        }
        self.write(record).await
    }

    async fn write(&self, record: Record) -> Step<()> {
        let dir = self.dir.clone();
        let journal = record.journal(&self.journals);
        let forgotten = {
            let mut inner = self.inner();
            inner.records.insert(record.migration.clone(), record.clone());
            forget(&mut inner.records)
        };
        let writing = tokio::task::spawn_blocking(move || {
            for migration in forgotten {
                // A record too many is no reason to fail.
                let _ = fs::remove_file(file(&dir, &migration));
                let _ = fs::remove_file(report_file(&dir, &migration));
            }
            write(&dir, &record)?;
            // Nobody will ask the shim's journal again, and the shim may not
            // have lived to remove it.
            if record.has_ended() && journal::owed(&journal).is_none() {
                let _ = fs::remove_file(journal);
            }
            Ok::<_, io::Error>(())
        });
        let failed = |why: String| {
            let reason = format!("the record of the migration cannot be written: {why}");
            Failure::new(Code::Internal, reason, format!("see the disk of {}", self.dir.display()))
        };
        writing.await.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Each change is one insertion or removal.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A migration that runs. Dropping it makes the container free for another.
#[derive(Debug)]
pub struct Entry {
    book: Arc<Book>,
    key: ContainerKey,
    pub live: Arc<Live>,
}

impl Entry {
    pub fn migration(&self) -> &MigrationId {
        &self.live.migration
    }

    pub fn key(&self) -> &ContainerKey {
        &self.key
    }

    pub fn cancelled(&self) -> impl Future<Output = ()> + '_ {
        self.live.cancel.cancelled()
    }

    /// A new phase, shown to watchers. It reaches the disk with the next
    /// change that matters there.
    pub fn phase(&self, phase: &str) {
        let changed = self.live.view.send_if_modified(|view| {
            if view.progress.phase == phase {
                return false;
            }
            view.progress = Progress { phase: phase.into(), ..Default::default() };
            true
        });
        if changed {
            tracing::info!(phase, "phase");
            if let Some(record) = self.book.inner().records.get_mut(&self.live.migration) {
                record.phase = phase.into();
            }
        }
    }

    pub fn progress(&self, bytes: u64, bytes_total: u64) {
        self.live.view.send_modify(|v| {
            (v.progress.bytes, v.progress.bytes_total) = (bytes, bytes_total);
        });
    }

    /// What the shim says of the phase it is in.
    pub fn shim_progress(&self, progress: Progress) {
        self.phase(&progress.phase);
        self.live.view.send_modify(|v| v.progress = progress);
    }

    /// Keeps what there is to tell about it, for as long as its record.
    pub async fn remember(&self, report: &Report) {
        let path = report_file(&self.book.dir, &self.live.migration);
        let written = report.write_to_bytes().map_err(io::Error::other).map(|bytes| {
            // People read it, and nothing depends on it: it need not be on
            // the disk before anything else.
            tokio::task::spawn_blocking(move || fs::write(path, bytes))
        });
        let written = match written {
            Ok(writing) => writing.await.map_err(io::Error::other).and_then(|written| written),
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            tracing::warn!(%error, "the report was not written down");
        }
    }

    pub fn too_late(&self, why: &str) {
        self.live.view.send_modify(|v| v.too_late = Some(why.into()));
    }

    /// Before the shim may hand the container away.
    pub async fn departing(&self) -> Step<()> {
        self.book.change(&self.live.migration, |r| r.departing = true).await
    }

    pub async fn in_doubt(&self, error: &str) -> Step<()> {
        self.live.view.send_modify(|v| v.in_doubt = true);
        self.book
            .change(&self.live.migration, |r| {
                (r.ending, r.error) = (Ending::InDoubt, error.into());
                if r.in_doubt_since == 0 {
                    r.in_doubt_since = now();
                }
            })
            .await
    }

    /// From now on a person may decide; the receiver hears of it.
    pub fn requests(&self) -> mpsc::Receiver<Request> {
        let (resolver, requests) = mpsc::channel(1);
        let mut slot = self.live.resolver.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(resolver);
        requests
    }

    /// What the target has said, or why nothing.
    pub fn answered(&self, answer: &str) {
        self.live.view.send_modify(|v| v.answer = Some((now(), answer.into())));
    }

    pub fn record(&self) -> Option<Record> {
        self.book.record(&self.live.migration)
    }

    /// Before anybody acts upon it; `None` withdraws it.
    pub async fn decide(&self, decision: Option<Decision>) -> Step<()> {
        self.book.change(&self.live.migration, |r| r.decision = decision).await
    }

    /// Writes the ending down; only then do watchers hear of it.
    pub async fn end(self, ending: Ending, error: &str, end: End) {
        let written = self
            .book
            .change(&self.live.migration, |r| (r.ending, r.error) = (ending, error.into()))
            .await;
        if let Err(failure) = written {
            tracing::error!(error = failure.sentence(), "an ending was not written down");
        }
        // Free for another migration before anybody acts on the news.
        self.book.inner().live.remove(&self.key);
        self.live.view.send_modify(|v| v.end = Some(end));
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut inner = self.book.inner();
        // After `end` the container may have a migration of its own again.
        if inner.live.get(&self.key).is_some_and(|live| Arc::ptr_eq(live, &self.live)) {
            inner.live.remove(&self.key);
        }
    }
}

fn forget(records: &mut BTreeMap<MigrationId, Record>) -> Vec<MigrationId> {
    let mut ended: Vec<_> = records
        .values()
        .filter(|r| r.has_ended() && !r.must_fence())
        .map(|r| (r.started, r.migration.clone()))
        .collect();
    ended.sort_by_key(|(started, _)| *started);
    let too_many = ended.len().saturating_sub(REMEMBERED);
    let forgotten: Vec<_> = ended.into_iter().take(too_many).map(|(_, m)| m).collect();
    forgotten.iter().for_each(|m| drop(records.remove(m)));
    forgotten
}

fn file(dir: &Path, migration: &MigrationId) -> PathBuf {
    dir.join(format!("{migration}.json"))
}

/// As it goes over the control socket.
fn report_file(dir: &Path, migration: &MigrationId) -> PathBuf {
    dir.join(format!("{migration}.report"))
}

fn read(path: &Path) -> io::Result<Record> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// Whole or not at all, and on the disk: an ending is a proof for the peer.
fn write(dir: &Path, record: &Record) -> io::Result<()> {
    let path = file(dir, &record.migration);
    let new = path.with_extension("new");
    let mut out = fs::File::create(&new)?;
    out.write_all(&serde_json::to_vec_pretty(record)?)?;
    out.sync_all()?;
    fs::rename(&new, &path)?;
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn record(n: u8, name: &str) -> Record {
        let key = ContainerKey::new("default", name).unwrap();
        Record::new(MigrationId::from_random([n; 16]), key, Role::Source, "b".parse().unwrap())
    }

    fn failed() -> End {
        End::Failed { refusals: vec![], ending: Ending::StayedHome, outcome: String::new() }
    }

    #[tokio::test]
    async fn one_migration_of_a_container_at_a_time() {
        let dir = TempDir::new().unwrap();
        let book = Book::open(dir.path()).unwrap();
        let first = book.begin(record(1, "x")).await.unwrap();
        let busy = book.begin(record(2, "x")).await.unwrap_err();
        assert_eq!(busy.0[0].code, Code::Busy);
        let _other = book.begin(record(3, "y")).await.unwrap();
        first.end(Ending::StayedHome, "", failed()).await;
        let again = book.begin(record(4, "x")).await.unwrap();
        drop(again);
        book.begin(record(5, "x")).await.unwrap();
    }

    #[tokio::test]
    async fn the_shims_journal_goes_with_the_ending_and_not_before() {
        let top = TempDir::new().unwrap();
        let book = Book::open(&top.path().join("migrations")).unwrap();
        let entry = book.begin(record(1, "x")).await.unwrap();
        let journal = top.path().join("journal").join(format!("{}.source", entry.migration()));
        fs::create_dir(journal.parent().unwrap()).unwrap();
        fs::write(&journal, "").unwrap();
        entry.departing().await.unwrap();
        entry.in_doubt("why").await.unwrap();
        assert!(journal.exists());
        entry.end(Ending::StayedHome, "", failed()).await;
        assert!(!journal.exists());
    }

    #[tokio::test]
    async fn endings_survive_a_restart() {
        let dir = TempDir::new().unwrap();
        let book = Book::open(dir.path()).unwrap();
        let entry = book.begin(record(1, "x")).await.unwrap();
        let mut watch = entry.live.watch();
        entry.end(Ending::StayedHome, "why", failed()).await;
        assert!(watch.wait_for(|v| v.end.is_some()).await.is_ok());
        let running = book.begin(record(2, "y")).await.unwrap();
        running.departing().await.unwrap();

        fs::write(dir.path().join("junk.json"), "{").unwrap();
        let book = Book::open(dir.path()).unwrap();
        let ended = book.record(&MigrationId::from_random([1; 16])).unwrap();
        assert_eq!((ended.ending, ended.error.as_str()), (Ending::StayedHome, "why"));
        let running = book.record(&MigrationId::from_random([2; 16])).unwrap();
        assert_eq!((running.ending, running.departing), (Ending::Running, true));
        // The name of an ended migration is used up.
        assert_eq!(book.begin(record(1, "z")).await.unwrap_err().0[0].code, Code::Malformed);
    }
}
