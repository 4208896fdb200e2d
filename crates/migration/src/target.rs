//! The arriving end. Contract: when [`arrive`] returns a pid, the container
//! runs here (its pages may still be on their way to their places, and
//! [`Arrived::rest`] waits for them); when it returns an error, nothing of it is left here and the
//! source has been told so, or has seen the link close before its commit.

use std::{path::PathBuf, time::Duration};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use transship_api::session::{
    PassDone, Prepared, Refused, Running, Waiting, shim_message::Message,
};
use transship_link::Channel;
use transship_types::{Code, PageSet, Refusal, Space, Ticket};

use crate::{
    Journal, Manifest, MigrationError,
    error::chain,
    journal::State,
    lanes::{hear, receive_image, receive_pass, say, sync},
    limits,
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
    let mut journal = None;
    let ready = tokio::select! {
        ready = until_commit(&mut channel, target, ticket, &mut journal) => ready,
        () = cancel.cancelled() => Err(MigrationError::Cancelled),
    };
    let failed = match (ready, journal.as_mut()) {
        (Ok(()), Some(journal)) => match run_here(target, journal).await {
            Ok(pid) => {
                // If this does not arrive, the source is in doubt, asks, and
                // the journal answers.
                if let Err(error) =
                    say(&mut channel.writer, Message::Running(Running { pid })).await
                {
                    warn!(error = chain(&error), "the source could not be told");
                }
                info!(pid, "arrived");
                let rest = futures::future::ready(()).boxed();
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
    say(&mut channel.writer, Message::Waiting(Waiting {})).await?;

    receive(channel, target, &manifest).await?;
    // What the container had made durable must be so here before the source
    // gives it up; the disk works while CRIU does.
    let root = target.root();
    let (restored, synced) =
        tokio::join!(timeout(limits::RESTORE, target.restore(Vec::new())), sync(root));
    restored.map_err(|_| MigrationError::Timeout {
        what: "CRIU's restore",
        seconds: limits::RESTORE.as_secs(),
    })??;
    synced?;

    journal.record(State::Prepared)?;
    channel.reader.set_deadline(limits::COMMIT);
    say(&mut channel.writer, Message::Prepared(Prepared {})).await?;
    match hear_source(channel).await? {
        Message::Commit(commit) if commit.epoch == manifest.epoch => Ok(()),
        _ => Err(MigrationError::malformed("no commit after prepared")),
    }
}

/// Passes over the writable layer, then the images, until both are complete.
async fn receive<T: Target>(
    channel: &mut Channel,
    target: &mut T,
    manifest: &Manifest,
) -> Result<(), MigrationError> {
    let mut prepared = false;
    let mut images = 0;
    loop {
        // Between two passes the source may be busy with its own preparation.
        channel.reader.set_deadline(limits::PASS);
        let message = hear_source(channel).await?;
        channel.reader.set_deadline(limits::FRAME);
        match message {
            Message::Pass(pass) if images == 0 => {
                let totals = receive_pass(&mut channel.reader, &target.root()).await?;
                if !pass.last {
                    // Takes the load off the sync within the pause.
                    sync(target.root()).await?;
                }
                info!(pass = pass.number, last = pass.last, bytes = totals.bytes, "pass applied");
                let done = PassDone { number: pass.number };
                say(&mut channel.writer, Message::PassDone(done)).await?;
            }
            Message::Image(_) if images >= limits::IMAGES => {
                return Err(MigrationError::malformed("more images than CRIU ever writes"));
            }
            Message::Image(image) => {
                receive_image(&mut channel.reader, &target.images(), image).await?;
                images += 1;
            }
            Message::ImagesEnd(end) if end.count == images => return Ok(()),
            _ => return Err(MigrationError::malformed("neither pass nor image")),
        }
        // After the first message the root is as complete as it gets before
        // the freeze: the runtime can start, and waits at the gate.
        if !prepared {
            target.prepare(manifest).await?;
            prepared = true;
        }
    }
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
async fn run_here<T: Target>(target: &mut T, journal: &mut Journal) -> Result<u32, MigrationError> {
    journal.record(State::Running)?;
    target.resume().await
}

/// Nothing stays here; only then the source may be told so.
async fn refuse<T: Target>(
    channel: &mut Channel,
    target: &mut T,
    journal: Option<Journal>,
    reason: &MigrationError,
) {
    if let Err(error) = target.discard().await {
        // Not proved gone: silence, so that the source stays in doubt.
        error!(error = chain(&error), "what had arrived could not be discarded");
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
