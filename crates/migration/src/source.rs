//! The departing end. Contract: when [`depart`] returns, the container runs
//! here ([`Ending::StayedHome`]), or has ended here and runs there
//! ([`Ending::Departed`]), or is frozen here and nobody knows
//! ([`Ending::InDoubt`]). Any failure before the commit means the first.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use transship_api::session::{Commit, Pass, shim_message::Message};
use transship_link::{Channel, LinkError};
use transship_memory::Memory;
use transship_rootfs::{Layer, Totals};
use transship_types::{Code, Refusal};

use crate::{
    DepartError, Journal, Manifest, MigrationError, Options, Phase, Stopwatch,
    error::chain,
    handoff::{Answer, Ending, Frozen, Promised},
    journal::State,
    lanes::{hear, say, send_images, send_pass},
    limits, report,
};

/// A connection under way. Nothing of it may belong to a runtime before it is
/// first polled: that happens on the thread that will use it.
pub type Connecting = BoxFuture<'static, Result<Channel, LinkError>>;

/// Begins one more connection to the same target, under the same ticket.
pub type Connect = Arc<dyn Fn() -> Connecting + Send + Sync>;

/// The container on this node, as far as a departure needs it.
///
/// Order of calls: `prepare`, `freeze`, `hide`, `dump`, then `guard` and
/// `leave`; at any point before `leave`, `thaw`. A source without `memory` or
/// `connect` leaves all pages to CRIU's images, and its `hide` is not called.
#[async_trait]
pub trait Source: Send {
    /// Its writable layer, if its root filesystem has one that we can copy.
    fn layer(&self) -> Option<Layer>;
    /// Where `dump` leaves CRIU's images.
    fn images(&self) -> PathBuf;
    /// Starts everything a dump needs and holds it: the container still runs.
    async fn prepare(&mut self) -> Result<(), MigrationError>;
    /// Adds what the restore needs and only `prepare` has found out: the
    /// options of the dump, and the OCI runtime's external descriptors.
    fn complete(&mut self, manifest: &mut Manifest) -> Result<(), MigrationError>;
    /// Its memory while it runs; asked for once, after `prepare`.
    fn memory(&mut self) -> Option<Arc<dyn Memory>> {
        None
    }
    /// How lanes for pages get to the target.
    fn connect(&self) -> Option<Connect> {
        None
    }
    /// Takes away so many percent of the processor time that the container
    /// uses by itself; `None`: nothing, as before. It runs.
    fn throttle(&mut self, _percent: Option<u32>) -> Result<(), MigrationError> {
        Err(MigrationError::runtime("throttle", "this container cannot be slowed down"))
    }
    /// Returns once every task stands still. CRIU has done nothing more than
    /// stop them, and does not until `dump`.
    async fn freeze(&mut self) -> Result<(), MigrationError>;
    /// Makes CRIU believe that the tasks have no pages of their own; or says
    /// why that cannot be, and CRIU will save them all. The last scan runs
    /// beside it.
    async fn hide(&mut self) -> Result<Option<String>, MigrationError> {
        Ok(Some("the pages of this container cannot be hidden from CRIU".into()))
    }
    /// Returns once every image is complete; the tasks still stand.
    async fn dump(&mut self) -> Result<(), MigrationError>;
    /// A second guard, so that the tasks stand still even if this process or
    /// CRIU should die now.
    async fn guard(&mut self) -> Result<(), MigrationError>;
    /// Whatever was begun is undone; the container runs. May be called in any
    /// state, and also when a call above was cancelled half-way.
    async fn thaw(&mut self) -> Result<(), MigrationError>;
    /// The container runs elsewhere: its tasks end here, without having run.
    async fn leave(&mut self) -> Result<(), MigrationError>;
}

/// What a departure reports while it goes on.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    pub phase: Phase,
    /// What has been sent in this phase.
    pub bytes: u64,
    /// In [`Phase::Rounds`] only.
    pub round: Option<RoundProgress>,
}

/// How near the rounds are to their end.
#[derive(Debug, Clone, Copy)]
pub struct RoundProgress {
    /// From 1 on.
    pub number: u32,
    /// What a freeze now would have to move, as of the last look.
    pub dirty_bytes: u64,
    /// Bytes per second that the lanes carry; 0: not known yet.
    pub rate: u64,
    /// What the pause would be if the freeze came now; 0: not known yet.
    pub expected_downtime: Duration,
}

/// How a departure ended.
#[derive(Debug)]
pub struct Departure {
    pub ending: Ending,
    /// Why it did not depart, or what went wrong after it did.
    pub error: Option<DepartError>,
    /// Its first process on the target, in the target's pid namespace.
    pub target_pid: Option<u32>,
    pub times: Stopwatch,
    pub layer: Totals,
    pub image_bytes: u64,
    /// Missing if its pages travelled in CRIU's images.
    pub memory: Option<report::Memory>,
    /// In doubt only: what [`settle`] needs once there is proof.
    pub doubt: Option<Journal>,
}

/// Moves `source` to the node at the other end of `channel`.
pub async fn depart<S: Source>(
    mut channel: Channel,
    source: &mut S,
    manifest: Manifest,
    journal: Journal,
    _options: &Options,
    cancel: &CancellationToken,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Departure {
    channel.writer.set_deadline(limits::TAKEN);
    let watch = Stopwatch::start(Phase::Offer);
    let mut run = Run {
        channel,
        watch,
        progress,
        layer: Totals::default(),
        image_bytes: 0,
        epoch: manifest.epoch,
    };
    let dumped = tokio::select! {
        done = run.until_prepared(source, manifest) => done,
        () = cancel.cancelled() => Err(MigrationError::Cancelled),
    };
    let outcome = match dumped {
        Ok(Dumped(())) => run.commit(Frozen::new(source), journal).await,
        Err(error) => run.stay_home(Frozen::new(source), journal, error).await,
    };
    info!(
        ending = outcome.ending.as_str(),
        downtime_ms = run.watch.downtime().as_millis() as u64,
        "departure ended"
    );
    Departure {
        ending: outcome.ending,
        error: outcome.error,
        target_pid: outcome.pid,
        times: run.watch,
        layer: run.layer,
        image_bytes: run.image_bytes,
        memory: None,
        doubt: outcome.doubt,
    }
}

/// Ends a doubt on proof: the target's own word, which came another way.
pub async fn settle<S: Source>(
    source: &mut S,
    journal: Journal,
    runs_there: bool,
) -> Result<Ending, MigrationError> {
    let answer = if runs_there { Answer::Accepted } else { Answer::Refused };
    let (ending, settled) = Promised::in_doubt(source).settle(answer).await;
    record(journal, ending);
    settled.map(|()| ending)
}

/// Writes down how it ended. The ending itself is certain: a record that
/// could not be written is only asked about once more after a restart.
fn record(mut journal: Journal, ending: Ending) {
    let state = match ending {
        Ending::Departed => State::Departed,
        Ending::StayedHome => State::Aborted,
        Ending::InDoubt => return,
    };
    if let Err(error) = journal.record(state).and_then(|()| journal.settle()) {
        warn!(error = chain(&error), "the ending was not recorded");
    }
}

/// Proof that the target holds the whole container, ready to run.
struct Dumped(());

struct Outcome {
    ending: Ending,
    error: Option<DepartError>,
    pid: Option<u32>,
    doubt: Option<Journal>,
}

struct Run<'a> {
    channel: Channel,
    watch: Stopwatch,
    progress: &'a (dyn Fn(Progress) + Send + Sync),
    layer: Totals,
    image_bytes: u64,
    epoch: u64,
}

impl Run<'_> {
    fn enter(&mut self, phase: Phase) {
        self.watch.enter(phase);
        info!(%phase, "phase");
        (self.progress)(Progress { phase, bytes: 0, round: None });
    }

    async fn until_prepared<S: Source>(
        &mut self,
        source: &mut S,
        mut manifest: Manifest,
    ) -> Result<Dumped, MigrationError> {
        (self.progress)(Progress { phase: Phase::Offer, bytes: 0, round: None });
        // First of all, because the target's runtime wants to know what this
        // one finds out, and because a dump that cannot start need not travel.
        source.prepare().await?;
        source.complete(&mut manifest)?;
        self.channel.reader.set_deadline(limits::FRAME);
        say(&mut self.channel.writer, Message::Manifest(manifest)).await?;
        self.expect_waiting().await?;

        self.enter(Phase::Prepare);
        let layer = source.layer();
        let mut before = None;
        let mut number = 0;
        if let Some(layer) = &layer {
            let mut previous = None;
            loop {
                number += 1;
                let pass = Pass { number, last: false };
                let (index, totals) =
                    send_pass(&mut self.channel.writer, layer, pass, before).await?;
                self.count(totals);
                before = Some(index);
                // The target writes the pass to its disk before it answers.
                self.channel.reader.set_deadline(limits::PASS);
                self.expect_pass_done(number).await?;
                if is_enough(number, totals.bytes, previous) {
                    break;
                }
                previous = Some(totals.bytes);
            }
            self.channel.reader.set_deadline(limits::FRAME);
        }

        self.enter(Phase::Freeze);
        source.freeze().await?;

        self.enter(Phase::Dump);
        source.dump().await?;
        // After the dump and not beside it: CRIU gives names to deleted files
        // that are still linked somewhere, and those belong to the layer too.
        if let Some(layer) = &layer {
            let pass = Pass { number: number + 1, last: true };
            let writer = &mut self.channel.writer;
            let (_, totals) = send_pass(writer, layer, pass, before).await?;
            self.count(totals);
            self.expect_pass_done(number + 1).await?;
        }

        self.enter(Phase::Transfer);
        let progress = self.progress;
        let sent = move |bytes| progress(Progress { phase: Phase::Transfer, bytes, round: None });
        self.image_bytes = send_images(&mut self.channel.writer, source.images(), &sent).await?;

        self.enter(Phase::Restore);
        self.channel.reader.set_deadline(limits::RESTORE);
        match self.hear().await? {
            Message::Prepared(_) => Ok(Dumped(())),
            _ => Err(MigrationError::malformed("no answer to the images")),
        }
    }

    /// The point of no return: journal first, then the word.
    async fn commit<S: Source>(&mut self, frozen: Frozen<'_, S>, mut journal: Journal) -> Outcome {
        self.enter(Phase::Commit);
        let proof = match journal.commit() {
            Ok(proof) => proof,
            // Maybe on disk, surely not sent: it stays, and the journal says so.
            Err(error) => return self.stay_home(frozen, journal, error).await,
        };
        let promised = match frozen.promise(proof).await {
            Ok(promised) => promised,
            Err((frozen, error)) => return self.stay_home(frozen, journal, error).await,
        };
        let (answer, pid, reason) = self.ask().await;
        self.enter(Phase::Depart);
        let (ending, settled) = promised.settle(answer).await;
        let doubt = match ending {
            Ending::InDoubt => Some(journal),
            Ending::Departed | Ending::StayedHome => {
                record(journal, ending);
                None
            }
        };
        let failed = settled.err().or(reason);
        if let Some(failed) = &failed {
            error!(error = chain(failed), ending = ending.as_str(), "after the commit");
        }
        Outcome { ending, pid, error: failed.map(|error| error.during(Phase::Commit)), doubt }
    }

    /// Sends the commit and reads the answer. Only the target's own word
    /// proves anything; everything else is silence.
    async fn ask(&mut self) -> (Answer, Option<u32>, Option<MigrationError>) {
        let commit = say(&mut self.channel.writer, Message::Commit(Commit { epoch: self.epoch }));
        let answer = async {
            commit.await?;
            self.channel.reader.set_deadline(limits::COMMIT);
            hear(&mut self.channel.reader).await
        };
        match timeout(limits::COMMIT, answer).await {
            Ok(Ok(Message::Running(running))) => (Answer::Accepted, Some(running.pid), None),
            Ok(Ok(Message::Refused(refused))) => {
                (Answer::Refused, None, Some(refusal(&refused.reason, &refused.log)))
            }
            Ok(Ok(_)) => {
                let text = "an answer to the commit that is none";
                (Answer::Silence, None, Some(MigrationError::malformed(text)))
            }
            Ok(Err(error)) => (Answer::Silence, None, Some(error)),
            Err(_) => {
                let seconds = limits::COMMIT.as_secs();
                let error = MigrationError::Timeout { what: "the answer to the commit", seconds };
                (Answer::Silence, None, Some(error))
            }
        }
    }

    async fn stay_home<S: Source>(
        &mut self,
        frozen: Frozen<'_, S>,
        journal: Journal,
        reason: MigrationError,
    ) -> Outcome {
        let failed = reason.during(self.watch.phase());
        warn!(error = chain(&failed), "staying home");
        if let Err(error) = frozen.stay_home().await {
            error!(error = chain(&error), "the container could not be thawed");
        }
        // The target sees the link close in any case; this only tells it why.
        let abort = transship_api::session::Abort { reason: failed.to_string() };
        let told = say(&mut self.channel.writer, Message::Abort(abort));
        let _ = timeout(Duration::from_secs(1), told).await;
        record(journal, Ending::StayedHome);
        Outcome { ending: Ending::StayedHome, error: Some(failed), pid: None, doubt: None }
    }

    fn count(&mut self, totals: Totals) {
        self.layer.entries += totals.entries;
        self.layer.bytes += totals.bytes;
        let bytes = self.layer.bytes;
        (self.progress)(Progress { phase: self.watch.phase(), bytes, round: None });
    }

    async fn expect_waiting(&mut self) -> Result<(), MigrationError> {
        match self.hear().await? {
            Message::Waiting(_) => Ok(()),
            _ => Err(MigrationError::malformed("no answer to the manifest")),
        }
    }

    async fn expect_pass_done(&mut self, number: u32) -> Result<(), MigrationError> {
        match self.hear().await? {
            Message::PassDone(done) if done.number == number => Ok(()),
            _ => Err(MigrationError::malformed(format!("no answer to pass {number}"))),
        }
    }

    /// The next message; a refusal is an error of its own.
    async fn hear(&mut self) -> Result<Message, MigrationError> {
        match hear(&mut self.channel.reader).await? {
            Message::Refused(refused) => Err(refusal(&refused.reason, &refused.log)),
            message => Ok(message),
        }
    }
}

/// Whether the container may freeze after this pass: the rest is small, or
/// it will not become smaller (a layer on tmpfs is sent whole every time).
fn is_enough(number: u32, bytes: u64, previous: Option<u64>) -> bool {
    let shrinks = previous.is_none_or(|previous| bytes <= previous / 2);
    bytes < limits::SMALL_PASS || number >= limits::PASSES || !shrinks
}

fn refusal(reason: &str, log: &str) -> MigrationError {
    let mut reason = reason.to_owned();
    if !log.is_empty() {
        reason.push('\n');
        reason.push_str(log);
    }
    MigrationError::Peer(Refusal::new(Code::Runtime, reason, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_end_when_the_rest_is_small_or_stays_large() {
        const GIB: u64 = 1 << 30;
        for (number, bytes, previous, enough) in [
            (1, 0, None, true),
            (1, limits::SMALL_PASS - 1, None, true),
            (1, GIB, None, false),
            (2, GIB / 10, Some(GIB), false),
            (2, GIB, Some(GIB), true),
            (2, GIB - 1, Some(GIB), true),
            (limits::PASSES, GIB / 100, Some(GIB), true),
        ] {
            assert_eq!(is_enough(number, bytes, previous), enough, "{number} {bytes} {previous:?}");
        }
    }
}
