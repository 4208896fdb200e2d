//! A migration as its source sees it.
//!
//! ```text
//! inspect ─▶ connect ─▶ offer ─▶ content ─▶ prepare ─▶ depart ─▶ confirm ─▶ clean up
//!    │          │         └─────────┴──────────┤         │ │
//!    ▼          ▼                              ▼         │ └─▶ in doubt: ask the
//!  refused   refused            Discard, wait for ◀──────┘     target until it has
//!                               Discarded: stayed home         proof, then settle
//! ```
//!
//! Until `depart` this side only reads. In `depart` the shim has the say; the
//! agent watches, and carries a cancellation to it. Only a target that has
//! said that the container runs there makes this side remove it.

mod content;
mod depart;
mod fence;
mod inspect;
mod person;
mod settle;

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tracing::Instrument;
use transship_api::{
    control::{MigrateRequest, PhaseTime, Report, Tuning},
    session::{Arrived, Discard, Offer, Prepare, agent_message::Message},
};
use transship_link::{Channel, connect_agent};
use transship_types::{Code, ContainerKey, MigrationId, Refusal, Ticket, quantity::micros};

use crate::{
    book::{End, Ending, Entry, Live, Record, Role},
    daemon::TaskStatus,
    failure::{Failure, Step, from_session},
    node::{Destination, Node, random},
    talk, tuning,
};
use depart::Outcome;

pub use inspect::{Subject, look, refusals_of};
pub use settle::resume;

/// The target probes its CRIU and asks its daemon.
const VERDICT: Duration = Duration::from_secs(60);
/// Unpacking may take minutes; the target says that it lives meanwhile.
const READY: Duration = Duration::from_secs(120);
/// Removing what was made: a kill, an unmount, a few database writes.
const DISCARDED: Duration = Duration::from_secs(60);
/// After the target's shim released it, its daemon only has to answer.
const ARRIVED: Duration = Duration::from_secs(60);
/// A killed task's exit, as its daemon reports it.
const STOPPED: Duration = Duration::from_secs(30);

/// Starts a migration in the background and returns its handle; only what can
/// be said at once is an error here.
pub async fn begin(node: &Arc<Node>, request: &MigrateRequest) -> Step<Arc<Live>> {
    let key = key(&request.namespace, &request.container)?;
    let to = node.find(&request.node)?;
    let tuning = tuning::choose(request.tuning.get_or_default(), &node.config.memory)?;
    if node.shutdown.is_cancelled() {
        return Err(Failure::new(Code::Busy, "transshipd is shutting down", "try again later"));
    }
    let migration = MigrationId::from_random(random()?);
    let mut record = Record::new(migration, key.clone(), Role::Source, to.name.clone());
    (record.address, record.keep) = (to.address.clone(), request.keep);
    let entry = node.book.begin(record).await?;
    let live = entry.live.clone();
    let span =
        tracing::info_span!("migration", id = %live.migration, container = %key, to = %to.name);
    let (node_too, keep) = (node.clone(), request.keep);
    let source = Source { node: node_too, entry, key, to, keep, tuning, phases: vec![] };
    node.tasks.spawn(source.run().instrument(span));
    Ok(live)
}

/// A container as somebody has named it.
pub fn key(namespace: &str, container: &str) -> Step<ContainerKey> {
    ContainerKey::new(namespace, container).map_err(|e| {
        Failure::new(Code::UnknownContainer, e.to_string(), "see `transship ps` for names")
    })
}

struct Source {
    node: Arc<Node>,
    entry: Entry,
    key: ContainerKey,
    to: Destination,
    keep: bool,
    /// For the shim.
    tuning: Tuning,
    phases: Vec<PhaseTime>,
}

/// How far the target got involved before a failure.
enum Left {
    /// It was never asked, or refused.
    Nothing,
    /// It has removed what it made.
    Discarded,
    /// It did not confirm.
    Unconfirmed,
}

impl Source {
    async fn run(mut self) {
        tracing::info!("migration began");
        let began = Instant::now();
        match self.until_ready().await {
            Err((failure, left)) => self.stayed_home(failure, left).await,
            Ok(ready) => self.depart(ready, began).await,
        }
    }

    /// Everything before the shim is told to depart.
    async fn until_ready(&mut self) -> Result<Ready, (Failure, Left)> {
        let refused = |failure| (failure, Left::Nothing);
        let subject = self.inspect().await.map_err(refused)?;
        let mut channel = self.connect().await.map_err(refused)?;
        match self.prepare(&mut channel, &subject).await {
            Ok((ticket, content_bytes)) => Ok(Ready { channel, ticket, content_bytes }),
            Err((failure, true)) => {
                let (left, _) = self.discard(&mut channel, &failure).await;
                Err((failure, left))
            }
            Err((failure, false)) => Err((failure, Left::Nothing)),
        }
    }

    async fn inspect(&mut self) -> Step<Subject> {
        let clock = self.phase("inspect");
        let subject = tokio::select! {
            subject = inspect::inspect(&self.node, &self.key, &self.tuning) => subject?,
            () = self.entry.cancelled() => return Err(cancelled()),
        };
        self.took("inspect", clock);
        Ok(subject)
    }

    async fn connect(&mut self) -> Step<Channel> {
        let clock = self.phase("connect");
        let Destination { name, address } = &self.to;
        let trust = self.node.trust();
        let mut channel = tokio::select! {
            channel = connect_agent(&trust, address, name) => channel?,
            () = self.entry.cancelled() => return Err(cancelled()),
        };
        channel.writer.set_deadline(talk::WRITE);
        self.took("connect", clock);
        Ok(channel)
    }

    /// Offer, content, container. An error says whether the target has
    /// something to discard.
    async fn prepare(
        &mut self,
        channel: &mut Channel,
        subject: &Subject,
    ) -> Result<(Ticket, u64), (Failure, bool)> {
        let clock = self.phase("offer");
        let offer = offer(&self.node, self.entry.migration(), &self.key, subject).await;
        // From here on the target may hold something for us.
        talk::send(channel, Message::Offer(offer)).await.map_err(|f| (f, false))?;
        let verdict = match self.next(channel, VERDICT).await.map_err(|f| (f, true))? {
            Message::Verdict(verdict) => verdict,
            Message::Failure(f) => return Err((Failure::from_message(&self.to.name, f), false)),
            other => return Err((talk::out_of_place(&self.to.name, &other), true)),
        };
        if !verdict.refusals.is_empty() {
            return Err((Failure(verdict.refusals.into_iter().map(from_session).collect()), false));
        }
        let ticket = verdict.ticket.parse::<Ticket>().map_err(|e| {
            (Failure::new(Code::Malformed, format!("{}: {e}", self.to.name), ""), true)
        })?;
        self.took("offer", clock);

        let clock = self.phase("content");
        let sent = content::send(&self.node, &self.entry, channel, subject, &verdict.missing);
        let content_bytes = sent.await.map_err(|f| (f, true))?;
        self.took("content", clock);

        let clock = self.phase("prepare");
        talk::send(channel, Message::Prepare(Prepare {})).await.map_err(|f| (f, true))?;
        match self.next(channel, READY).await.map_err(|f| (f, true))? {
            Message::Ready(_) => {}
            // Sent after it has removed what it made.
            Message::Failure(f) => return Err((Failure::from_message(&self.to.name, f), false)),
            other => return Err((talk::out_of_place(&self.to.name, &other), true)),
        }
        self.took("prepare", clock);
        Ok((ticket, content_bytes))
    }

    /// The target's next message, with its progress shown and taken for a
    /// sign of life.
    async fn next(&self, channel: &mut Channel, limit: Duration) -> Step<Message> {
        loop {
            let message = tokio::select! {
                message = talk::receive_within(channel, limit) => message?,
                () = self.entry.cancelled() => return Err(cancelled()),
            };
            match message {
                Message::Progress(p) => self.entry.progress(p.bytes, p.bytes_total),
                other => return Ok(other),
            }
        }
    }

    /// Asks the target to undo, and waits until it has; it may have had a
    /// reason of its own.
    async fn discard(&self, channel: &mut Channel, why: &Failure) -> (Left, Option<Failure>) {
        let reason = why.sentence();
        // Even if it cannot be said: the target may have spoken last.
        let _ = talk::send(channel, Message::Discard(Discard { reason })).await;
        loop {
            match talk::receive_within(channel, DISCARDED).await {
                Ok(Message::Discarded(_)) => return (Left::Discarded, None),
                Ok(Message::Failure(f)) => {
                    return (Left::Discarded, Some(Failure::from_message(&self.to.name, f)));
                }
                // Sent before it heard of the discard.
                Ok(Message::Progress(_) | Message::Ready(_) | Message::Verdict(_)) => {}
                Ok(_) | Err(_) => return (Left::Unconfirmed, None),
            }
        }
    }

    async fn depart(mut self, mut ready: Ready, began: Instant) {
        match self.departure(&mut ready).await {
            Outcome::StayedHome { mut failure, target, departure } => {
                let (left, target) = match target {
                    Some(target) => (Left::Discarded, Some(target)),
                    None => self.discard(&mut ready.channel, &failure).await,
                };
                // After a cancellation its reason is only that.
                if !self.entry.live.cancel.is_cancelled() {
                    failure.0.extend(target.into_iter().flat_map(|target| target.0));
                }
                if let Some(departure) = departure {
                    // No state is told: the target has none.
                    let arrived = Arrived::default();
                    let report = self.report(&departure, &arrived, ready.content_bytes, began);
                    self.entry.remember(&report).await;
                }
                self.stayed_home(failure, left).await;
            }
            Outcome::Departed { departure, arrived } => {
                let clock = self.phase("confirm");
                let arrived = self.arrived(&mut ready.channel, arrived).await;
                self.took("confirm", clock);
                match arrived {
                    Ok(arrived) => {
                        let report = self.report(&departure, &arrived, ready.content_bytes, began);
                        self.moved(report).await;
                    }
                    Err(failure) => self.unconfirmed(failure).await,
                }
            }
            Outcome::InDoubt { error, proof } => {
                self.settle(Some(ready.channel), error, proof).await;
            }
        }
    }

    async fn arrived(&self, channel: &mut Channel, early: Option<Arrived>) -> Step<Arrived> {
        if let Some(arrived) = early {
            return Ok(arrived);
        }
        // Not cancellable any more: there is nothing left to save.
        loop {
            match talk::receive_within(channel, ARRIVED).await {
                Ok(Message::Arrived(arrived)) => return Ok(arrived),
                Ok(Message::Failure(f)) => return Err(Failure::from_message(&self.to.name, f)),
                Ok(Message::Progress(_)) => {}
                Ok(other) => return Err(talk::out_of_place(&self.to.name, &other)),
                // Its shim has it; only its agent was lost, and may come back.
                Err(lost) => return self.ask_whether_arrived(lost).await,
            }
        }
    }

    fn report(
        &mut self,
        departure: &transship_api::control::Departure,
        arrived: &Arrived,
        content_bytes: u64,
        began: Instant,
    ) -> Report {
        // The shim's phases lie between our `prepare` and our `confirm`.
        let mut phases = std::mem::take(&mut self.phases);
        let confirm = phases.pop_if(|last| last.phase == "confirm");
        phases.extend(departure.phases.iter().cloned());
        phases.extend(confirm);
        Report {
            migration: self.entry.migration().to_string(),
            namespace: self.key.namespace().into(),
            container: self.key.id().into(),
            source: self.node.name().to_string(),
            target: self.to.name.to_string(),
            target_state: arrived.state.clone(),
            // Its agent does not remember it, its shim has told ours.
            target_pid: if arrived.pid > 0 { arrived.pid } else { departure.target_pid },
            downtime_us: departure.downtime_us,
            total_us: micros(began.elapsed()),
            phases: listed_once(phases),
            image_bytes: departure.image_bytes,
            rootfs_bytes: departure.rootfs_bytes,
            content_bytes,
            memory: departure.memory.clone(),
            ..Default::default()
        }
    }

    /// It runs on the target: what is left of it here goes.
    async fn moved(mut self, mut report: Report) {
        let clock = self.phase("clean up");
        let (state, error) = self.clean_up().await;
        self.took("clean up", clock);
        report.source_state = state;
        report.phases.append(&mut self.phases);
        tracing::info!(downtime_us = report.downtime_us, total_us = report.total_us, "departed");
        self.entry.remember(&report).await;
        self.entry.end(Ending::Departed, &error, End::Moved(Box::new(report))).await;
    }

    /// The state of what remains here, and what went wrong with removing it:
    /// a warning, since the container is safe.
    async fn clean_up(&self) -> (String, String) {
        let state = wait_until_stopped(&self.node, &self.key).await;
        if self.keep {
            return (state, String::new());
        }
        match self.node.daemon.remove(&self.key).await {
            Ok(()) => ("DELETED".into(), String::new()),
            Err(error) => {
                let failure = Failure::from(error);
                tracing::warn!(error = failure.sentence(), "what is left here was not removed");
                (state, format!("it was not removed here: {}", failure.sentence()))
            }
        }
    }

    /// The shims agree that it has gone, but the target's daemon has not said
    /// so. What is left here is kept: it is stopped, and evidence.
    async fn unconfirmed(self, failure: Failure) {
        let outcome = format!(
            "{} has left this node, and {} has not confirmed that it runs; its stopped record was \
             kept here",
            self.key, self.to.name
        );
        self.failed(failure, Ending::Departed, outcome).await;
    }

    async fn stayed_home(self, failure: Failure, left: Left) {
        let state = match self.node.daemon.task(&self.key).await {
            Ok(Some(task)) => {
                format!("{} is {} on {}", self.key, task.status.as_str(), self.node.name())
            }
            Ok(None) => format!("{} does not run on {}", self.key, self.node.name()),
            Err(_) => format!("{} was not touched on {}", self.key, self.node.name()),
        };
        let outcome = match left {
            Left::Nothing => state,
            Left::Discarded => format!("{state}; nothing is left on {}", self.to.name),
            Left::Unconfirmed => {
                format!("{state}; {} cleans up by itself and has not confirmed it", self.to.name)
            }
        };
        self.failed(failure, Ending::StayedHome, outcome).await;
    }

    async fn failed(self, Failure(refusals): Failure, ending: Ending, outcome: String) {
        let sentence = Failure(refusals.clone()).sentence();
        tracing::warn!(ending = ending.as_str(), error = sentence, "migration failed");
        self.entry.end(ending, &sentence, End::Failed { refusals, ending, outcome }).await;
    }

    fn phase(&self, name: &str) -> Instant {
        self.entry.phase(name);
        Instant::now()
    }

    fn took(&mut self, phase: &str, since: Instant) {
        let duration_us = micros(since.elapsed());
        self.phases.push(PhaseTime { phase: phase.into(), duration_us, ..Default::default() });
    }
}

/// What is to be moved, as the target hears of it.
pub async fn offer(
    node: &Node,
    migration: &MigrationId,
    key: &ContainerKey,
    subject: &Subject,
) -> Offer {
    Offer {
        migration: migration.to_string(),
        namespace: key.namespace().into(),
        container: key.id().into(),
        record: Some(subject.record.clone()),
        content: subject.content.clone(),
        host: Some(node.host().await),
        memory_bytes: subject.memory_bytes,
        rootfs_bytes: subject.rootfs_bytes,
        stdio: Some(subject.stdio.clone()),
        runtime: subject.runtime.clone(),
    }
}

/// A target that waits under the ticket.
struct Ready {
    channel: Channel,
    ticket: Ticket,
    content_bytes: u64,
}

/// The last state its daemon told.
async fn wait_until_stopped(node: &Node, key: &ContainerKey) -> String {
    let deadline = Instant::now() + STOPPED;
    loop {
        let state = match node.daemon.task(key).await {
            Ok(Some(task)) => task.status,
            Ok(None) => return "DELETED".into(),
            Err(_) => TaskStatus::Unknown,
        };
        if state == TaskStatus::Stopped || Instant::now() > deadline {
            return state.as_str().into();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Agents and shims each have an offer and a preparation of their own: to
/// whoever asks how long it took they are one.
fn listed_once(phases: Vec<PhaseTime>) -> Vec<PhaseTime> {
    let mut once: Vec<PhaseTime> = Vec::with_capacity(phases.len());
    for phase in phases {
        match once.iter_mut().find(|other| other.phase == phase.phase) {
            Some(same) => same.duration_us = same.duration_us.saturating_add(phase.duration_us),
            None => once.push(phase),
        }
    }
    once
}

fn cancelled() -> Failure {
    Failure(vec![Refusal::new(Code::Cancelled, "the migration was cancelled", "")])
}
