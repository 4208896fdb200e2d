//! The arriving end. Contract: when [`arrive`] returns a pid, the container
//! runs here (its pages may still be on their way to their places, and
//! [`Arrived::rest`] waits for them); when it returns an error, nothing of it is left here and the
//! source has been told so, or has seen the link close before its commit.

mod landing;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use transship_api::session::{Filled, Prepared, Refused, Running, Waiting, shim_message::Message};
use transship_link::Channel;
use transship_memory::{MemoryError, Store};
use transship_types::{Code, Epoch, PageRange, PageSet, Refusal, Space, Ticket, quantity::micros};

use self::landing::Landing;
use crate::{
    Journal, Manifest, MigrationError,
    bulk::{hear, say, sync},
    decide::{self, Word},
    error::chain,
    journal::State,
    limits,
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
    /// The next connection for pages that comes under the ticket.
    async fn next_lane(&mut self) -> Result<Connecting, MigrationError> {
        Err(MigrationError::malformed("a connection for pages that nobody waits for"))
    }
    /// Returns once every process stands ready and not one instruction ran.
    /// `present` are the pages that existed at the freeze; all of them are in
    /// the store, and nothing else. Those that CRIU's images bring themselves
    /// are as CRIU wrote them. Empty: the images have them all.
    async fn restore(&mut self, present: Vec<(Space, PageSet)>)
    -> Result<Restored, MigrationError>;
    /// Lets go. Returns the first process' id.
    async fn resume(&mut self) -> Result<u32, MigrationError>;
    /// After `resume`: waits until every page is in its place, if any had to
    /// be put there while it runs. `None` from the future: that did not go
    /// well, and whoever did it has dealt with it.
    fn filled(&mut self) -> Option<BoxFuture<'static, Option<Fill>>> {
        None
    }
    /// Kills and removes whatever was made, in any state. When it returns Ok,
    /// nothing of this container runs here or ever will.
    async fn discard(&mut self) -> Result<(), MigrationError>;
    /// The journal of this arrival, once it is known what arrives.
    fn journal(&self, manifest: &Manifest) -> Result<Journal, MigrationError>;
}

/// What an arrival does with the store itself.
pub trait PageStore: PageSink {
    /// These pages of the space there are, and no others: the others are
    /// forgotten. An error if one of these is not here.
    fn present(&self, space: Space, pages: &PageSet) -> Result<(), MemoryError>;
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

    fn spaces(&self) -> Vec<Space> {
        Store::spaces(self)
    }
}

/// A container that runs here.
pub struct Arrived {
    /// Its first process.
    pub pid: u32,
    /// Waits until all its pages are in their places, and tells the source.
    /// Nothing depends on it but figures; whoever drops it loses those.
    pub rest: BoxFuture<'static, ()>,
}

/// Takes over the container at the other end of `channel`.
pub async fn arrive<T: Target>(
    mut channel: Channel,
    target: &mut T,
    ticket: &Ticket,
    cancel: &CancellationToken,
) -> Result<Arrived, MigrationError> {
    channel.writer.set_deadline(limits::TAKEN);
    channel.reader.set_control_limit(limits::MESSAGE);
    let mut journal = None;
    let ready = tokio::select! {
        ready = until_commit(&mut channel, target, ticket, &mut journal) => ready,
        () = cancel.cancelled() => Err(MigrationError::Cancelled),
    };
    let failed = match (ready, journal.as_mut()) {
        (Ok(()), Some(journal)) => match run_here(target, journal).await {
            Ok(running) => {
                let pid = running.pid;
                // If this does not arrive, the source is in doubt, asks, and
                // the journal answers.
                if let Err(error) = say(&mut channel.writer, Message::Running(running)).await {
                    warn!(error = chain(&error), "the source could not be told");
                }
                // Nobody waits for it. It tells one that ran from one that was
                // about to, should this machine die before the agent knows.
                if let Err(error) = journal.record(State::Released) {
                    warn!(error = chain(&error), "that it runs was not recorded");
                }
                info!(pid, "arrived");
                let rest = rest(channel, target.filled()).boxed();
                return Ok(Arrived { pid, rest });
            }
            Err(error) => error,
        },
        (Ok(()), None) => MigrationError::malformed("a commit without a manifest"),
        (Err(error), _) => error,
    };
    warn!(error = chain(&failed), "the arrival failed");
    refuse(&mut channel, target, journal, &failed).await;
    Err(failed)
}

async fn until_commit<T: Target>(
    channel: &mut Channel,
    target: &mut T,
    ticket: &Ticket,
    slot: &mut Option<Journal>,
) -> Result<(), MigrationError> {
    channel.reader.set_deadline(limits::FRAME);
    let manifest = match hear(&mut channel.reader).await? {
        Message::Manifest(manifest) => manifest,
        _ => return Err(MigrationError::malformed("no manifest")),
    };
    if manifest.ticket.parse::<Ticket>()? != *ticket {
        return Err(MigrationError::malformed("a ticket for another container"));
    }
    let journal = slot.insert(target.journal(&manifest)?);
    let store = target.store().filter(|_| manifest.lanes > 0);
    let lanes = if store.is_some() { manifest.lanes.min(MAX_LANES) } else { 0 };
    say(&mut channel.writer, Message::Waiting(Waiting { lanes })).await?;

    let mut landing = Landing::new(channel, store);
    landing.lanes(target, lanes).await?;
    let landed = landing.receive(target, &manifest).await?;
    // What the container had made durable must be so here before the source
    // gives it up; the disk works while CRIU does. Without need nobody waits
    // for a disk that others use too.
    let root = target.root();
    let syncing = async { if landed.unsynced { sync(root).await } else { Ok(()) } };
    let begun = Instant::now();
    let restoring = async {
        let restored = timeout(limits::RESTORE, target.restore(landed.present)).await;
        (restored, begun.elapsed())
    };
    let ((restored, took), synced) = tokio::join!(restoring, syncing);
    let restored = restored.map_err(|_| MigrationError::Timeout {
        what: "CRIU's restore",
        seconds: limits::RESTORE.as_secs(),
    })??;
    synced?;

    journal.record(State::Prepared)?;
    channel.reader.set_deadline(limits::COMMIT);
    let prepared =
        Prepared { restore_us: micros(took), criu_pages: restored.criu_pages, lazy: restored.lazy };
    say(&mut channel.writer, Message::Prepared(prepared)).await?;
    let word = match hear_source(channel).await? {
        Message::Commit(commit) => Word::Commit(Epoch(commit.epoch)),
        _ => Word::Other,
    };
    if !decide::may_run(Epoch(manifest.epoch), word) {
        return Err(MigrationError::malformed("no commit after prepared"));
    }
    Ok(())
}

async fn hear_source(channel: &mut Channel) -> Result<Message, MigrationError> {
    match hear(&mut channel.reader).await? {
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
) -> Result<Running, MigrationError> {
    let begun = Instant::now();
    journal.record(State::Running)?;
    let pid = target.resume().await?;
    Ok(Running { pid, resume_us: micros(begun.elapsed()) })
}

/// The container runs; what is told now are figures.
async fn rest(mut channel: Channel, filling: Option<BoxFuture<'static, Option<Fill>>>) {
    let Some(filling) = filling else { return };
    let Some(fill) = filling.await else { return };
    info!(
        pages = fill.pages,
        faults = fill.faults,
        duration_ms = fill.duration.as_millis() as u64,
        "every page is in its place"
    );
    let filled = Filled {
        faults: fill.faults,
        fault_latency: fill.fault_latency,
        pages: fill.pages,
        duration_us: micros(fill.duration),
    };
    if let Err(error) = say(&mut channel.writer, Message::Filled(filled)).await {
        // It does not wait for ever.
        debug!(error = chain(&error), "the source does not listen any more");
    }
}

/// Nothing stays here; only then the source may be told so.
async fn refuse<T: Target>(
    channel: &mut Channel,
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
    let told = say(&mut channel.writer, Message::Refused(refused));
    let _ = timeout(Duration::from_secs(1), told).await;
}
