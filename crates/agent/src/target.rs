//! A migration as its target sees it, and the other questions a peer asks.
//!
//! ```text
//! Offer ─▶ preflight ─▶ Verdict ─▶ blobs ─▶ Prepare ─▶ create ─▶ start ─▶ Ready
//!              │                     │                   │        │
//!              ▼                     ▼ Discard, lost link, failure ▼
//!           refused                          undo ◀─────────── Start fails
//!                                                              Start returns ─▶ Arrived
//! ```
//!
//! Before `start` the agent decides: whatever goes wrong is undone. From
//! `start` on the shims decide between themselves. The agent then waits for
//! its daemon's answer, also when its own peer is gone: a lost agent
//! connection says nothing about the container. Only a source that says
//! `Discard` makes it stop a start, because only the source knows that it has
//! never let go.

mod content;
mod overruled;
pub mod owed;
mod questions;
mod unfinished;

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinHandle, time};
use tracing::Instrument;
use transship_api::session::{
    Arrived, Discarded, Offer, Prepare, Progress, Ready, Verdict, agent_message::Message,
};
use transship_link::{Channel, arrivals::Registration};
use transship_migration::decide::Became;
use transship_types::{Code, NodeName, Ticket};
use transship_wire::WireError;

use crate::{
    book::{End, Ending, Entry, Record, Role},
    daemon::{Arrival, Arriving, DaemonError, TaskStatus},
    failure::{Failure, Step, to_session},
    node::{Node, random},
    offer::{self, Checked},
    preflight, talk,
};

pub use overruled::resolve;
pub use unfinished::take_up;

/// A peer that has connected says at once what it wants.
const FIRST: Duration = Duration::from_secs(30);
/// The source sends content or goes on; a disk that is slow to read is the
/// longest wait.
const NEXT: Duration = Duration::from_secs(60);
/// How often the source hears that an unpacking still goes on.
const ALIVE: Duration = Duration::from_secs(5);
/// From Start to our shim's question for its connection.
const WAITS: Duration = Duration::from_secs(60);
/// For a source whose shim has the ticket to use it.
const TICKET: Duration = Duration::from_secs(120);
/// For a start that was told to stop.
const STOP: Duration = Duration::from_secs(30);

/// Serves one peer's connection to its end.
pub async fn serve(node: Arc<Node>, mut channel: Channel) {
    channel.writer.set_deadline(talk::WRITE);
    loop {
        let message = tokio::select! {
            message = time::timeout(FIRST, talk::receive(&mut channel)) => message,
            () = node.shutdown.cancelled() => return,
        };
        let message = match message {
            Ok(Ok(message)) => message,
            Ok(Err(WireError::Closed)) | Err(_) => return,
            Ok(Err(error)) => {
                tracing::info!(peer = %channel.peer, %error, "a session broke off");
                return;
            }
        };
        let answer = match (message, node.refuses(&channel.peer)) {
            // Also for a peer that might send once and may not any more: its
            // container stands still until it knows what became of it.
            (Message::Inquiry(inquiry), _) => {
                Ok(questions::standing(&node, &channel.peer, &inquiry.migration))
            }
            (Message::Decision(decision), _) => {
                overruled::follow(&node, &channel.peer, decision).await
            }
            (_, Some(refusal)) => Err(Failure(vec![refusal])),
            (Message::Offer(offer), None) => return arrival(node, channel, offer).await,
            (Message::Probe(_), None) => Ok(questions::probe(&node).await),
            (Message::Consider(what), None) => Ok(questions::consider(&node, what).await),
            (Message::LinkProbe(_), None) => questions::link_probe(&node, &mut channel).await,
            (other, None) => Err(talk::out_of_place(&channel.peer, &other)),
        };
        let answered = match answer {
            Ok(answer) => talk::send(&mut channel, answer).await,
            Err(failure) => {
                // The peer may be in the middle of something that has no place
                // for it; the session ends with this.
                let _ = talk::send(&mut channel, Message::Failure(failure.to_message())).await;
                Err(failure)
            }
        };
        if let Err(failure) = answered {
            tracing::info!(peer = %channel.peer, error = failure.sentence(), "a session ended");
            return;
        }
    }
}

async fn arrival(node: Arc<Node>, mut channel: Channel, offer: Offer) {
    let admitted = admit(&node, &channel.peer, offer).await;
    let (offer, entry, missing) = match admitted {
        Ok(admitted) => admitted,
        Err(Failure(refusals)) => {
            let refusals = refusals.iter().map(to_session).collect();
            let verdict = Verdict { refusals, ..Default::default() };
            // A peer that is gone needs no verdict.
            let _ = talk::send(&mut channel, Message::Verdict(verdict)).await;
            return;
        }
    };
    let span = tracing::info_span!("arrival", id = %entry.migration(), container = %offer.key, from = %channel.peer);
    let target = Target { node, entry, channel, offer };
    target.run(missing).instrument(span).await;
}

/// Every reason against it, or a place in the book.
async fn admit(
    node: &Arc<Node>,
    peer: &NodeName,
    offer: Offer,
) -> Step<(Checked, Entry, Vec<String>)> {
    let offer = offer::check(offer)?;
    let facts = preflight::gather(node, &offer).await?;
    let refusals = preflight::judge(&offer, &facts, &node.config.limits);
    if !refusals.is_empty() {
        let reasons = Failure(refusals);
        tracing::info!(container = %offer.key, from = %peer, reasons = reasons.sentence(), "offer refused");
        return Err(reasons);
    }
    let record =
        Record::new(offer.migration.clone(), offer.key.clone(), Role::Target, peer.clone());
    let entry = node.book.begin(record).await?;
    Ok((offer, entry, facts.missing))
}

struct Target {
    node: Arc<Node>,
    entry: Entry,
    channel: Channel,
    offer: Checked,
}

/// Why an arrival ends early.
enum Stop {
    /// The source asks for it and waits for an answer.
    Discard,
    /// The source cannot be heard or told any more.
    Lost(Failure),
    /// We cannot go on; the source is told.
    Failed(Failure),
}

type Until<T> = Result<T, Stop>;

impl Target {
    async fn run(mut self, missing: Vec<String>) {
        tracing::info!(missing = missing.len(), "offer accepted");
        let ticket = match random() {
            Ok(bytes) => Ticket::from_random(bytes),
            Err(failure) => return self.ended(Ok(()), Stop::Failed(failure)).await,
        };
        let mut arriving = match self.node.daemon.arrival(&self.offer.key).await {
            Ok(arriving) => arriving,
            Err(e) => return self.ended(Ok(()), Stop::Failed(e.into())).await,
        };
        if let Err(stop) = self.until_created(arriving.as_mut(), &ticket, missing).await {
            let undone = arriving.undo().await;
            return self.ended(undone, stop).await;
        }
        self.start(arriving, ticket).await;
    }

    async fn until_created(
        &mut self,
        arriving: &mut dyn Arriving,
        ticket: &Ticket,
        missing: Vec<String>,
    ) -> Until<()> {
        let verdict =
            Verdict { ticket: ticket.to_string(), missing: missing.clone(), ..Default::default() };
        self.tell(Message::Verdict(verdict)).await?;
        self.entry.phase("content");
        content::receive(self, arriving, missing).await?;
        self.entry.phase("prepare");
        self.create(arriving, ticket).await
    }

    async fn create(&mut self, arriving: &mut dyn Arriving, ticket: &Ticket) -> Until<()> {
        let arrival = Arrival {
            key: self.offer.key.clone(),
            record: self.offer.record.clone(),
            ticket: ticket.clone(),
            stdio: self.offer.stdio.clone(),
            content: self.offer.content.clone(),
        };
        // Not dropped half way: what the daemon is doing for us would go on
        // behind the back of the undo.
        let mut creating = arriving.create(&arrival);
        let mut stop = None;
        let created = loop {
            tokio::select! {
                created = &mut creating => break created,
                message = talk::receive(&mut self.channel), if stop.is_none() => {
                    stop = Some(unwelcome(&self.channel, message));
                }
                () = self.entry.cancelled(), if stop.is_none() => {
                    stop = Some(Stop::Failed(cancelled()));
                }
                () = time::sleep(ALIVE), if stop.is_none() => {
                    let alive = Progress { phase: "prepare".into(), bytes: 0, bytes_total: 0 };
                    if let Err(lost) = talk::send(&mut self.channel, Message::Progress(alive)).await {
                        stop = Some(Stop::Lost(lost));
                    }
                }
            }
        };
        match (stop, created) {
            (Some(stop), _) => Err(stop),
            (None, Err(error)) => Err(Stop::Failed(error.into())),
            (None, Ok(())) => Ok(()),
        }
    }

    /// From here on the shims decide.
    async fn start(mut self, arriving: Box<dyn Arriving>, ticket: Ticket) {
        let peer = self.channel.peer.clone();
        let registration = self.node.arrivals.register(ticket, peer, TICKET);
        let mut registration = Some(registration.bound_to(self.offer.migration.clone()));
        let mut start = tokio::spawn(arriving.start());
        let stop = match self.until_waiting(&mut start, registration.as_ref()).await {
            Ok(None) => match self.tell(Message::Ready(Ready {})).await {
                Ok(()) => self.until_started(&mut start).await,
                Err(stop) => Err(stop),
            },
            // Nobody has connected yet: whatever runs here is not an arrival.
            Ok(Some(failure)) => {
                let undone = arriving.undo().await;
                return self.ended(undone, Stop::Failed(failure)).await;
            }
            Err(stop) => Err(stop),
        };
        let started = match stop {
            Ok(started) => started,
            Err(stop) => {
                // A shim that still waits for its connection gives up now.
                registration = None;
                match (&stop, time::timeout(STOP, &mut start).await) {
                    // It never let go, whatever its shim told ours.
                    (Stop::Discard, started) => {
                        let stop = match started {
                            // The reason for the discard may be here.
                            Ok(Ok(Err(error))) => Stop::Failed(error.into()),
                            _ => stop,
                        };
                        let undone = arriving.undo().await;
                        return self.ended(undone, stop).await;
                    }
                    (_, Ok(started)) => joined(started),
                    // The shims still talk; the agent has no say.
                    (_, Err(_)) => tokio::select! {
                        started = start => joined(started),
                        () = self.node.shutdown.cancelled() => {
                            tracing::warn!("left to the next run of transshipd");
                            return;
                        }
                    },
                }
            }
        };
        let (node, migration) = (self.node.clone(), self.offer.migration.clone());
        self.outcome(arriving, started).await;
        owed::keep(&node, &migration, registration);
    }

    /// Until our shim waits for its connection; or why Start came back before.
    async fn until_waiting(
        &mut self,
        start: &mut Start,
        waits: Option<&Registration>,
    ) -> Until<Option<Failure>> {
        self.entry.phase("start");
        tokio::select! {
            waiting = shim_waits(waits) => {
                waiting.map(|()| None).map_err(|e| Stop::Failed(e.into()))
            }
            started = start => Ok(Some(match joined(started) {
                Err(error) => error.into(),
                Ok(_) => Failure::new(
                    Code::Runtime,
                    "the container started without waiting for its arrival",
                    "see that the runtime on the target is Transship's shim",
                ),
            })),
            message = talk::receive(&mut self.channel) => Err(unwelcome(&self.channel, message)),
            () = self.entry.cancelled() => Err(Stop::Failed(cancelled())),
            () = time::sleep(WAITS) => {
                Err(Stop::Failed(Failure::timeout("waiting for the new container's shim", WAITS)))
            }
        }
    }

    /// The daemon's answer, unless the source stops it.
    async fn until_started(&mut self, start: &mut Start) -> Until<Result<u32, DaemonError>> {
        self.entry.phase("arrive");
        tokio::select! {
            started = start => Ok(joined(started)),
            message = talk::receive(&mut self.channel) => Err(unwelcome(&self.channel, message)),
            () = self.entry.cancelled() => Err(Stop::Failed(cancelled())),
        }
    }

    async fn outcome(mut self, arriving: Box<dyn Arriving>, started: Result<u32, DaemonError>) {
        let error = match started {
            Ok(pid) => {
                let state = self.task().await.ok().flatten();
                return self.arrived(arriving, pid, state).await;
            }
            Err(error) => error,
        };
        // The daemon may have lost the answer, or itself, and not the
        // container: its shim goes on without it.
        tracing::warn!(%error, "Start failed");
        let became = tokio::select! {
            became = unfinished::decided(
                &self.node,
                &self.offer.key,
                Some(self.entry.migration()),
                true,
            ) => became,
            () = self.node.shutdown.cancelled() => {
                tracing::warn!("left to the next run of transshipd");
                return;
            }
        };
        match became {
            Became::Arrived => {
                // Gone since: it has run here to its end.
                let state = self.task().await.ok().flatten().unwrap_or((0, TaskStatus::Stopped));
                self.arrived(arriving, state.0, Some(state)).await;
            }
            Became::Never | Became::Open => {
                let undone = arriving.undo().await;
                self.ended(undone, Stop::Failed(error.into())).await;
            }
            Became::Unknowable => {
                let why = unfinished::UNKNOWABLE;
                let failure = Failure::new(Code::Internal, why, "`transship resolve` decides");
                let end = End::of(Ending::InDoubt, failure);
                self.entry.end(Ending::InDoubt, why, end).await;
            }
        }
    }

    /// `&mut` because a channel must not be shared between threads.
    async fn task(&mut self) -> Result<Option<(u32, TaskStatus)>, DaemonError> {
        let task = self.node.daemon.task(&self.offer.key).await?;
        Ok(task.map(|task| (task.pid, task.status)))
    }

    async fn arrived(
        self,
        arriving: Box<dyn Arriving>,
        pid: u32,
        state: Option<(u32, TaskStatus)>,
    ) {
        let error = match arriving.keep().await {
            Ok(()) => String::new(),
            Err(error) => {
                let failure = Failure::from(error);
                tracing::warn!(error = failure.sentence(), "the arrival's lease was not given up");
                failure.sentence()
            }
        };
        let state = state.map_or("RUNNING", |(_, status)| status.as_str()).to_string();
        tracing::info!(pid, state, "arrived");
        let Target { entry, mut channel, .. } = self;
        // Written down before it is said: it is the source's proof.
        entry.end(Ending::Arrived, &error, End::Moved(Box::default())).await;
        // A source that is gone asks again.
        let _ = talk::send(&mut channel, Message::Arrived(Arrived { pid, state })).await;
        let _ = channel.writer.close().await;
    }

    /// It does not run here: write that down, and say it if anybody listens.
    async fn ended(mut self, undone: Result<(), DaemonError>, stop: Stop) {
        let why = match &stop {
            Stop::Discard => Failure::cancelled("the source discarded it"),
            Stop::Lost(failure) | Stop::Failed(failure) => failure.clone(),
        };
        let mut ending = Ending::Discarded;
        if let Err(error) = undone {
            tracing::error!(%error, "not everything that was made for the arrival was removed");
            // Only a container that certainly does not run is a proof; a
            // daemon that does not answer proves nothing.
            if !matches!(self.task().await, Ok(None | Some((_, TaskStatus::Stopped)))) {
                ending = Ending::InDoubt;
            }
        }
        tracing::info!(why = why.sentence(), "discarded");
        let Target { node, entry, mut channel, .. } = self;
        entry.end(ending, &why.sentence(), End::of(ending, why.clone())).await;
        if ending != Ending::Discarded {
            // The source goes on asking; this finds an answer for it.
            take_up(&node).await;
            return;
        }
        let answer = match stop {
            Stop::Discard => Message::Discarded(Discarded {}),
            Stop::Failed(failure) => Message::Failure(failure.to_message()),
            Stop::Lost(_) => return,
        };
        let _ = talk::send(&mut channel, answer).await;
        // The source may have sent a discard of its own meanwhile; taking it
        // off the socket keeps our answer from being reset.
        let _ = time::timeout(STOP, talk::receive(&mut channel)).await;
    }

    async fn tell(&mut self, message: Message) -> Until<()> {
        talk::send(&mut self.channel, message).await.map_err(Stop::Lost)
    }
}

type Start = JoinHandle<Result<u32, DaemonError>>;

/// For ever, once the ticket has been given up.
async fn shim_waits(waits: Option<&Registration>) -> Result<(), transship_link::LinkError> {
    match waits {
        Some(waits) => waits.shim_waits().await,
        None => std::future::pending().await,
    }
}

fn joined(
    joined: Result<Result<u32, DaemonError>, tokio::task::JoinError>,
) -> Result<u32, DaemonError> {
    joined.unwrap_or_else(|e| Err(DaemonError::failed("to start the task", e)))
}

/// What a message means while none is due.
fn unwelcome(channel: &Channel, message: Result<Message, WireError>) -> Stop {
    match message {
        Ok(Message::Discard(discard)) => {
            let reason: String = discard.reason.chars().take(300).collect();
            tracing::info!(reason, "the source discards");
            Stop::Discard
        }
        Ok(other) => Stop::Failed(talk::out_of_place(&channel.peer, &other)),
        Err(error) => Stop::Lost(Failure::wire(&format!("listening to {}", channel.peer), &error)),
    }
}

fn cancelled() -> Failure {
    Failure::cancelled("the migration was cancelled at the target")
}

/// Nothing but a mark that the source goes on.
fn is_prepare(message: &Message) -> bool {
    matches!(message, Message::Prepare(Prepare {}))
}
