//! The departing end. Contract: when [`depart`] returns, the container runs
//! here ([`Ending::StayedHome`]), or has ended here and runs there
//! ([`Ending::Departed`]), or is frozen here and nobody knows
//! ([`Ending::InDoubt`]). Any failure before the commit means the first.

mod owing;
mod passes;
mod rounds;
mod run;
mod watched;

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use transship_api::session::Refused;
use transship_link::{Channel, LinkError};
use transship_memory::Memory;
use transship_rootfs::{Layer, Totals};
use transship_types::{Code, Epoch, Refusal};

pub use self::owing::Debt;
use self::run::Run;

use crate::{
    DepartError, Journal, Manifest, MigrationError, Options, Phase, Stopwatch, decide,
    error::chain,
    handoff::{Answer, Ending, Frozen, Paid, Promised},
    journal::State,
    report,
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
    /// Its memory while it runs, and then while it stands still; asked for
    /// once, after `prepare`.
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
    /// CRIU should die from now on. It fails if they may have run since the
    /// dump.
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
    pub doubt: Option<Doubt>,
}

/// What is kept of a departure in doubt, beside the frozen container.
#[derive(Debug)]
pub struct Doubt {
    pub(crate) journal: Journal,
    /// Pages that the target has not got. Proof that it runs there does not
    /// end such a doubt: they are to be sent first.
    pub(crate) debt: Option<Debt>,
}

impl Doubt {
    pub fn owes(&self) -> bool {
        self.debt.is_some()
    }
}

/// Moves `source` to the node at the other end of `channel`.
pub async fn depart<S: Source>(
    channel: Channel,
    source: &mut S,
    manifest: Manifest,
    journal: Journal,
    options: &Options,
    cancel: &CancellationToken,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Departure {
    let mut run = Run::new(channel, &manifest, options, progress);
    let dumped = tokio::select! {
        done = run.until_prepared(source, manifest) => done,
        () = cancel.cancelled() => Err(MigrationError::Cancelled),
    };
    let outcome = match dumped {
        Ok(dumped) => run.commit(dumped, Frozen::new(source), journal).await,
        Err(error) => {
            run.release(source);
            run.stay_home(Frozen::new(source), journal, error).await
        }
    };
    info!(
        ending = outcome.ending.as_str(),
        downtime_ms = run.watch.downtime().as_millis() as u64,
        "departure ended"
    );
    let owes = outcome.doubt.as_ref().is_some_and(Doubt::owes);
    let memory = run.after(outcome.ending, owes).await;
    Departure {
        ending: outcome.ending,
        error: outcome.error,
        target_pid: outcome.pid,
        times: run.watch,
        layer: run.layer,
        image_bytes: run.image_bytes,
        memory,
        doubt: outcome.doubt,
    }
}

/// What became of a container in doubt, on the target's own word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// It runs there, or ran there to its end, and has all of its memory.
    RunsThere,
    /// It runs there, and may lack pages.
    MayLack,
    /// It does not run there and never will.
    NotThere,
}

/// Ends a doubt on proof: the target's own word, which came another way; or
/// because a person has `decided` so, under that epoch. The doubt comes back
/// if pages are owed and could not be sent.
pub async fn settle<S: Source>(
    source: &mut S,
    mut doubt: Doubt,
    proof: Evidence,
    decided: Option<Epoch>,
) -> Result<(Ending, Result<(), MigrationError>), (Doubt, MigrationError)> {
    if let Some(epoch) = decided {
        let state = match proof {
            Evidence::NotThere => State::Aborted,
            Evidence::RunsThere | Evidence::MayLack => State::Departed,
        };
        // The agent has it in its book already, or it would not have told us.
        if let Err(error) = doubt.journal.decide(epoch, state) {
            warn!(error = chain(&error), "the decision was not recorded");
        }
    }
    let promised = Promised::in_doubt(source);
    let (ending, settled) = match (proof, doubt.debt.as_mut()) {
        (Evidence::MayLack, Some(debt)) => {
            let owing = promised.owe();
            match debt.pay(None, &|_| {}).await {
                Ok(_line) => owing.paid(Paid::heard()).await,
                Err(error) => {
                    owing.in_doubt();
                    return Err((doubt, error));
                }
            }
        }
        (Evidence::RunsThere | Evidence::MayLack, _) => promised.settle(Answer::Accepted).await,
        (Evidence::NotThere, _) => promised.settle(Answer::Refused).await,
    };
    record(doubt.journal, ending);
    Ok((ending, settled))
}

/// Writes down how it ended. The ending itself is certain: a record that
/// could not be written is only asked about once more after a restart.
fn record(mut journal: Journal, ending: Ending) {
    let Some(state) = decide::recorded(ending) else { return };
    if let Err(error) = journal.record(state).and_then(|()| journal.settle()) {
        warn!(error = chain(&error), "the ending was not recorded");
    }
}

fn refusal(refused: &Refused) -> MigrationError {
    let mut reason = refused.reason.clone();
    if !refused.log.is_empty() {
        reason.push('\n');
        reason.push_str(&refused.log);
    }
    // One that we do not know yet is a failure all the same.
    let code = refused.code.parse().unwrap_or(Code::Runtime);
    MigrationError::Peer(Refusal::new(code, reason, ""))
}
