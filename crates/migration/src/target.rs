//! The arriving end. Contract: when [`arrive`] returns a pid, the container
//! runs here (its pages may still be on their way to their places, and
//! [`Arrived::rest`] waits for them); when it returns an error, nothing of it is left here and the
//! source has been told so, or has seen the link close before its commit.

mod landing;
mod owed;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use transship_api::session::{
    Filled as Figures, Prepared, Refused, Running, Waiting, shim_message::Message,
};
use transship_link::Channel;
use transship_memory::{MemoryError, Store};
use transship_types::{Code, Epoch, PageRange, PageSet, Refusal, Space, Ticket, quantity::micros};

use self::{
    landing::{Landed, Landing},
    owed::{End, Owed},
};
use crate::{
    Journal, Manifest, MigrationError,
    bulk::sync,
    decide::{self, Word},
    error::chain,
    journal::State,
    limits,
    line::{Debt, Line, Speech, Wanted},
    options::MAX_LANES,
    pages::PageSink,
    report::{Fill, Restored},
    source::Connecting,
};

/// The container to be, as far as an arrival needs it.
///
/// Order of calls: `prepare`, `restore`, `resume`, `filled`; `discard` at any
/// point up to `resume`. A target without a store takes no pages by lane.
#[async_trait]
pub trait Target: Send {
    /// Its mounted root: passes are applied here.
    fn root(&self) -> PathBuf;
    /// Where CRIU's images are put for `restore`.
    fn images(&self) -> PathBuf;
    /// Starts everything a restore needs and holds it.
    async fn prepare(&mut self, manifest: &Manifest) -> Result<(), MigrationError>;
    /// Where pages wait for their processes.
    fn store(&self) -> Option<Arc<dyn PageStore>> {
        None
    }
    /// Waits for further connections under the ticket.
    fn next(&self) -> Option<NextConnection> {
        None
    }
    /// Of the pages that existed at the freeze, as CRIU's images are there
    /// now: those without which it cannot be restored.
    async fn needs(
        &mut self,
        _present: &[(Space, PageSet)],
    ) -> Result<Vec<(Space, PageSet)>, MigrationError> {
        Ok(Vec::new())
    }
    /// Returns once every process stands ready and not one instruction ran.
    /// `present` are the pages that existed at the freeze; all of them are in
    /// the store, and nothing else. Those that CRIU's images bring themselves
    /// are as CRIU wrote them. Empty: the images have them all. With `wanted`
    /// pages may be lacking that were not needed; who touches one of these
    /// waits, and it is to be told there.
    async fn restore(
        &mut self,
        present: Vec<(Space, PageSet)>,
        wanted: Option<mpsc::UnboundedSender<Wanted>>,
    ) -> Result<Restored, MigrationError>;
    /// Lets go. Returns the first process' id.
    async fn resume(&mut self) -> Result<u32, MigrationError>;
    /// After `resume`: waits until every page is in its place, if any had to
    /// be put there while it runs.
    fn filled(&mut self) -> Option<BoxFuture<'static, Filled>> {
        None
    }
    /// Kills and removes whatever was made, in any state. When it returns Ok,
    /// nothing of this container runs here or ever will.
    async fn discard(&mut self) -> Result<(), MigrationError>;
    /// The journal of this arrival, once it is known what arrives.
    fn journal(&self, manifest: &Manifest) -> Result<Journal, MigrationError>;
}

/// Waits for the next connection under the ticket of an arrival.
pub type NextConnection =
    Arc<dyn Fn() -> BoxFuture<'static, Result<Connecting, MigrationError>> + Send + Sync>;

/// How the filling of a container's memory ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filled {
    All(Fill),
    /// It ended by itself before.
    Nobody,
    /// It could not go on, and was killed for that.
    Failed(String),
}

/// What an arrival does with the store itself.
pub trait PageStore: PageSink {
    /// These pages of the space there are, and no others: the others are
    /// forgotten. An error if one of these is not here.
    fn present(&self, space: Space, pages: &PageSet) -> Result<(), MemoryError>;
    /// The same where pages are still to come: from now on only these are let
    /// in. Answers how many.
    fn expect(&self, space: Space, pages: &PageSet) -> Result<u64, MemoryError>;
    /// What was expected and has not come.
    fn missing(&self, space: Space) -> PageSet;
    /// The same, of one stretch.
    fn lacking(&self, space: Space, within: PageRange) -> Vec<PageRange>;
    /// Of which some page is here.
    fn spaces(&self) -> Vec<Space>;
}

impl PageSink for Store {
    fn put(
        &self,
        space: Space,
        ranges: &[PageRange],
        bytes: &[u8],
        round: u32,
    ) -> Result<(), MemoryError> {
        Store::put(self, space, ranges, bytes, round)
    }

    fn zero(&self, space: Space, ranges: &[PageRange], round: u32) -> Result<(), MemoryError> {
        Store::zero(self, space, ranges, round)
    }
}

impl PageStore for Store {
    fn present(&self, space: Space, pages: &PageSet) -> Result<(), MemoryError> {
        Store::present(self, space, pages)
    }

    fn expect(&self, space: Space, pages: &PageSet) -> Result<u64, MemoryError> {
        Store::expect(self, space, pages)
    }

    fn missing(&self, space: Space) -> PageSet {
        Store::missing(self, space)
    }

    fn lacking(&self, space: Space, within: PageRange) -> Vec<PageRange> {
        Store::lacking(self, space, within)
    }

    fn spaces(&self) -> Vec<Space> {
        Store::spaces(self)
    }
}

/// A container that runs here.
pub struct Arrived {
    /// Its first process.
    pub pid: u32,
    /// Waits until all its pages are in their places, and tells the source.
    /// If pages are still to come, whoever drops it leaves the container
    /// without them; else nothing depends on it but figures.
    pub rest: BoxFuture<'static, ()>,
}

/// Takes over the container at the other end of `channel`.
pub async fn arrive<T: Target>(
    channel: Channel,
    target: &mut T,
    ticket: &Ticket,
    cancel: &CancellationToken,
) -> Result<Arrived, MigrationError> {
    let mut speech = Speech::new(channel);
    let mut journal = None;
    let ready = tokio::select! {
        ready = until_commit(&mut speech, target, ticket, &mut journal) => ready,
        () = cancel.cancelled() => Err(MigrationError::Cancelled),
    };
    let failed = match (ready, journal.take()) {
        (Ok(owed), Some(mut open)) => match run_here(target, &mut open, owed.is_some()).await {
            Ok(running) => {
                let pid = running.pid;
                // If this does not arrive, the source is in doubt, asks, and
                // the journal answers.
                if let Err(error) = speech.say(Message::Running(running)).await {
                    warn!(error = chain(&error), "the source could not be told");
                }
                // Nobody waits for it. It tells one that ran from one that was
                // about to, should this machine die before the agent knows. One
                // that is owed pages says more once it has them all.
                if owed.is_none()
                    && let Err(error) = open.record(State::Released)
                {
                    warn!(error = chain(&error), "that it runs was not recorded");
                }
                info!(pid, owed = owed.is_some(), "arrived");
                let rest = rest(speech, target.filled(), owed, open).boxed();
                return Ok(Arrived { pid, rest });
            }
            Err(error) => {
                journal = Some(open);
                error
            }
        },
        (Ok(_), None) => MigrationError::malformed("a commit without a manifest"),
        (Err(error), open) => {
            journal = open;
            error
        }
    };
    warn!(error = chain(&failed), "the arrival failed");
    refuse(&mut speech, target, journal, &failed).await;
    Err(failed)
}

/// Answers what is owed when the source has given it up.
async fn until_commit<T: Target>(
    speech: &mut Speech,
    target: &mut T,
    ticket: &Ticket,
    slot: &mut Option<Journal>,
) -> Result<Option<Owed>, MigrationError> {
    let manifest = match speech.hear(limits::FRAME).await? {
        Message::Manifest(manifest) => manifest,
        _ => return Err(MigrationError::malformed("no manifest")),
    };
    if manifest.ticket.parse::<Ticket>()? != *ticket {
        return Err(MigrationError::malformed("a ticket for another container"));
    }
    let journal = slot.insert(target.journal(&manifest)?);
    let store = target.store().filter(|_| manifest.lanes > 0);
    let lanes = if store.is_some() { manifest.lanes.min(MAX_LANES) } else { 0 };
    speech.say(Message::Waiting(Waiting { lanes })).await?;

    let mut landing = Landing::new(speech.plain()?, store.clone());
    landing.lanes(target, lanes).await?;
    let Landed { present, unsynced, owed, receiver } = landing.receive(target, &manifest).await?;
    let (mut wanted, mut owing) = (None, None);
    if let (false, Some(store), Some(next)) = (owed.is_empty(), store, target.next()) {
        let (sender, wants) = mpsc::unbounded_channel();
        wanted = Some(sender);
        let debt = Arc::new(Debt::new(store, owed, wants));
        let line = debt.clone();
        speech.turn(|channel| Line::asking(channel, line))?;
        let needed = target.needs(&present).await?;
        if let Speech::Line(line) = speech {
            debt.fetch(line, &needed).await?;
        }
        let (migration, epoch) = (manifest.migration.clone(), manifest.epoch);
        owing = Some(Owed { debt, receiver, next, migration, epoch });
    }
    // What the container had made durable must be so here before the source
    // gives it up; the disk works while CRIU does. Without need nobody waits
    // for a disk that others use too.
    let root = target.root();
    let syncing = async { if unsynced { sync(root).await } else { Ok(()) } };
    let begun = Instant::now();
    let restoring = async {
        let restored = timeout(limits::RESTORE, target.restore(present, wanted)).await;
        (restored, begun.elapsed())
    };
    let ((restored, took), synced) = tokio::join!(restoring, syncing);
    let restored = restored.map_err(|_| MigrationError::Timeout {
        what: "CRIU's restore",
        seconds: limits::RESTORE.as_secs(),
    })??;
    synced?;

    journal.record(State::Prepared)?;
    let prepared = Prepared {
        restore_us: micros(took),
        criu_pages: restored.criu_pages,
        lazy: restored.lazy,
        shared_bytes: restored.shared_bytes,
        given_bytes: restored.given_bytes,
    };
    speech.say(Message::Prepared(prepared)).await?;
    let word = match not_aborted(speech.hear(limits::COMMIT).await?)? {
        Message::Commit(commit) => Word::Commit(Epoch(commit.epoch)),
        _ => Word::Other,
    };
    if !decide::may_run(Epoch(manifest.epoch), word) {
        return Err(MigrationError::malformed("no commit after prepared"));
    }
    Ok(owing)
}

/// A source that gives up says why.
fn not_aborted(message: Message) -> Result<Message, MigrationError> {
    match message {
        Message::Abort(abort) => {
            let refusal = Refusal::new(Code::Cancelled, abort.reason, "");
            Err(MigrationError::Peer(refusal))
        }
        message => Ok(message),
    }
}

/// The source has given it up: first the record, then the first instruction.
async fn run_here<T: Target>(
    target: &mut T,
    journal: &mut Journal,
    owing: bool,
) -> Result<Running, MigrationError> {
    let begun = Instant::now();
    journal.record(if owing { State::Owing } else { State::Running })?;
    let pid = target.resume().await?;
    Ok(Running { pid, resume_us: micros(begun.elapsed()) })
}

/// The container runs; what it lacks comes, and is put in its place.
async fn rest(
    mut speech: Speech,
    filling: Option<BoxFuture<'static, Filled>>,
    owed: Option<Owed>,
    mut journal: Journal,
) {
    let Some(mut filling) = filling else { return };
    let mut ended = None;
    if let Some(mut owed) = owed {
        let first = match speech {
            Speech::Line(line) => Some(line),
            _ => None,
        };
        let (end, line) = owed.collect(first, &mut filling).await;
        // On disk before it is said, and before anything else is waited for.
        let word = end.word(&mut journal);
        let told = timeout(limits::TOLD, owed.tell(line, word)).await;
        speech = told.ok().flatten().map_or(Speech::Over, Speech::Line);
        match end {
            End::Paid => info!("every page is here"),
            End::Filled(filled) => ended = Some(filled),
        }
    }
    let filled = match ended {
        Some(filled) => filled,
        None => filling.await,
    };
    let Filled::All(fill) = filled else { return };
    info!(
        pages = fill.pages,
        faults = fill.faults,
        duration_ms = fill.duration.as_millis() as u64,
        "every page is in its place"
    );
    let figures = Figures {
        faults: fill.faults,
        fault_latency: fill.fault_latency,
        pages: fill.pages,
        duration_us: micros(fill.duration),
    };
    if let Err(error) = speech.say(Message::Filled(figures)).await {
        // It does not wait for ever.
        debug!(error = chain(&error), "the source does not listen any more");
    }
}

/// Nothing stays here; only then the source may be told so.
async fn refuse<T: Target>(
    speech: &mut Speech,
    target: &mut T,
    journal: Option<Journal>,
    reason: &MigrationError,
) {
    let discarded = target.discard().await;
    if let Err(error) = &discarded {
        error!(error = chain(error), "what had arrived could not be discarded");
    }
    if !decide::may_refuse(discarded.is_ok()) {
        // Not proved gone: silence, so that the source stays in doubt.
        return;
    }
    if let Some(mut journal) = journal
        && let Err(error) = journal.record(State::Aborted).and_then(|()| journal.settle())
    {
        warn!(error = chain(&error), "the ending was not recorded");
    }
    let refused =
        Refused { code: reason.code().to_string(), reason: chain(reason), log: String::new() };
    let told = speech.say(Message::Refused(refused));
    let _ = timeout(Duration::from_secs(1), told).await;
}
