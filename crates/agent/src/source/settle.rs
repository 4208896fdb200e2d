//! In doubt: the commit may or may not have reached the target. The container
//! stays stopped here, and the target is asked until it has proof, or until a
//! person decides ([`super::person`]).

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time,
};
use tracing::Instrument;
use transship_api::{
    control::{Departure, Report, Tuning},
    session::{Arrived, Inquiry, agent_message::Message},
};
use transship_link::{Channel, connect_agent};
use transship_migration::decide::{self, Journaled, Obeyed, Resume, Standing, Told};
use transship_types::{Code, Epoch, NodeName};

use super::{ARRIVED, Left, Source, fence};
use crate::{
    book::{Decision, Ending, Record, Request, Resolved, Role},
    failure::{Failure, Step, chain},
    node::{Destination, Node},
    shim::ShimError,
    talk,
};

/// Between two questions: short for a person who waits, long for a network.
pub(super) const AGAIN: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 2000 });
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// What became of the container, from the target's mouth.
pub(super) enum Proof {
    /// It may lack pages of its memory until the target says that it has all.
    Runs {
        arrived: Arrived,
        whole: bool,
    },
    Never(Failure),
}

impl Proof {
    pub(super) fn told_by(target: &NodeName, standing: Standing) -> Option<Self> {
        let arrived = Arrived { pid: 0, state: "RUNNING".into() };
        if standing == Standing::Owed {
            // No ending follows, but that our shim may go on.
            return Some(Proof::Runs { arrived, whole: false });
        }
        Some(match decide::on_standing(standing)? {
            decide::Proof::RunsThere => Proof::Runs { arrived, whole: true },
            decide::Proof::NeverThere => Proof::Never(Failure::new(
                Code::Link,
                format!("the link to {target} broke, and {target} has discarded the container"),
                "see the network, then try again",
            )),
        })
    }
}

pub(super) type Asked = oneshot::Sender<Step<Resolved>>;

/// What ends a doubt, and who waits for it.
pub(super) enum Settled {
    Proved(Proof, Option<Asked>),
    Decided(Decision, Option<Asked>),
}

/// Takes up what a former run of this agent left open. A departure that may
/// have been decided is asked about; anything earlier has ended, since the
/// target discards what loses its source.
pub async fn resume(node: &Arc<Node>) {
    for record in node.book.records() {
        if record.must_fence() {
            fence::begin(node, record);
            continue;
        }
        let open = matches!(record.ending, Ending::Running | Ending::InDoubt);
        if record.role != Role::Source || !open {
            continue;
        }
        let Record { key, peer, address, keep, departing, .. } = record.clone();
        let span =
            tracing::info_span!("migration", id = %record.migration, container = %key, to = %peer);
        let Ok(entry) = node.book.reopen(record).await else { continue };
        let to = Destination { name: peer, address };
        // What is left to do moves no memory.
        let tuning = Tuning::default();
        let source = Source { node: node.clone(), entry, key, to, keep, tuning, phases: vec![] };
        let error = "transshipd was restarted during the migration";
        let work = async move {
            let journaled = source.journaled();
            let shim_lives = !departing || source.shim_lives().await;
            match decide::after_restart(departing, shim_lives, journaled) {
                Resume::Ask => source.settle(None, error.into(), None).await,
                Resume::StayedHome => {
                    source.stayed_home(Failure::cancelled(error), Left::Unconfirmed).await;
                }
            }
        };
        node.tasks.spawn(work.instrument(span));
    }
}

impl Source {
    fn journaled(&self) -> Journaled {
        self.node.book.journaled(self.entry.migration(), Role::Source)
    }

    /// Only a socket that nobody answers says that it does not.
    async fn shim_lives(&self) -> bool {
        !matches!(self.node.shims.inspect(&self.key).await, Err(ShimError::Unreachable { .. }))
    }

    pub(super) async fn settle(
        mut self,
        mut channel: Option<Channel>,
        error: String,
        mut proof: Option<Proof>,
    ) {
        let clock = self.phase("in doubt");
        let mut requests = self.entry.requests();
        tracing::warn!(error, "in doubt: asking the target");
        if let Err(failure) = self.entry.in_doubt(&error).await {
            tracing::error!(error = failure.sentence(), "the doubt was not written down");
        }
        // The record says "in doubt", or what was decided; if this ends
        // before, the next run takes it up.
        let shutdown = self.node.shutdown.clone();
        loop {
            let settled = tokio::select! {
                settled = self.settled(&mut channel, proof.take(), &mut requests) => settled,
                () = shutdown.cancelled() => return,
            };
            match settled {
                Settled::Proved(proof, asked) => {
                    let settled = tokio::select! {
                        settled = self.tell_shim(&proof) => settled,
                        () = shutdown.cancelled() => return,
                    };
                    if settled {
                        self.took("in doubt", clock);
                        return self.proved(proof, asked).await;
                    }
                    time::sleep(AGAIN).await;
                }
                Settled::Decided(decision, asked) => {
                    let obeyed = tokio::select! {
                        obeyed = self.obey(&decision) => obeyed,
                        () = shutdown.cancelled() => return,
                    };
                    match obeyed {
                        Obeyed::Done => return self.decided(decision, asked).await,
                        Obeyed::Withdraw | Obeyed::Wait => self.withdraw(asked).await,
                    }
                }
            }
        }
    }

    async fn settled(
        &self,
        channel: &mut Option<Channel>,
        proof: Option<Proof>,
        requests: &mut mpsc::Receiver<Request>,
    ) -> Settled {
        if let Some(proof) = proof {
            return Settled::Proved(proof, None);
        }
        // Of a former run, which may not have acted upon it.
        if let Some(decision) = self.entry.record().and_then(|record| record.decision) {
            return Settled::Decided(decision, None);
        }
        loop {
            tokio::select! {
                proof = self.proof(channel) => return Settled::Proved(proof, None),
                Some(request) = requests.recv() => {
                    if let Some(settled) = self.consider(request).await {
                        return settled;
                    }
                }
            }
        }
    }

    async fn proved(self, proof: Proof, asked: Option<Asked>) {
        let (target, key) = (self.to.name.clone(), self.key.clone());
        let mut this = self;
        let (ending, outcome) = match proof {
            Proof::Runs { arrived, .. } => {
                let report = this.bare_report(&arrived);
                this.moved(report).await;
                (Ending::Departed, format!("{key} runs on {target}"))
            }
            Proof::Never(failure) => {
                this.stayed_home(failure, Left::Discarded).await;
                (Ending::StayedHome, format!("{key} runs on here; {target} has discarded it"))
            }
        };
        if let Some(asked) = asked {
            // Whoever asked may have gone.
            let _ = asked.send(Ok(Resolved { by_proof: true, ending, outcome }));
        }
    }

    /// Until it has an answer: a shim in doubt learns of the proof from nobody
    /// else. It may not wait for one yet. False if it is in doubt still: the
    /// target lacks pages, and they could not be sent.
    async fn tell_shim(&self, proof: &Proof) -> bool {
        let (runs_there, may_lack) = match proof {
            Proof::Runs { whole, .. } => (true, !whole),
            Proof::Never(_) => (false, false),
        };
        loop {
            match self.tell_once(runs_there, may_lack, None).await {
                None => return false,
                Some(told) if !decide::tell_again(told) => return true,
                Some(_) => time::sleep(AGAIN).await,
            }
        }
    }

    /// `None`: it is in doubt still.
    pub(super) async fn tell_once(
        &self,
        runs_there: bool,
        may_lack: bool,
        decided: Option<Epoch>,
    ) -> Option<Told> {
        let (shims, migration) = (&self.node.shims, self.entry.migration());
        match shims.settle(&self.key, migration, runs_there, may_lack, decided).await {
            Ok((ending, error)) if ending == "in-doubt" => {
                tracing::warn!(error, "it runs there, and lacks pages that are here");
                None
            }
            Ok((ending, _)) => {
                tracing::info!(ending, "settled");
                Some(Told::Settled)
            }
            Err(error) => {
                tracing::warn!(error = chain(&error), "the shim did not settle");
                Some(error.told())
            }
        }
    }

    async fn proof(&self, channel: &mut Option<Channel>) -> Proof {
        let mut last = String::new();
        loop {
            let asked = match channel.take() {
                Some(mut channel) => self.wait(&mut channel).await,
                None => self.ask().await,
            };
            match asked {
                Ok(Some(proof)) => return proof,
                Ok(None) => {}
                Err(failure) if failure.sentence() != last => {
                    last = failure.sentence();
                    tracing::warn!(error = last, "still in doubt");
                }
                Err(_) => {}
            }
            time::sleep(AGAIN).await;
        }
    }

    /// The connection of the migration itself: its end may still come.
    async fn wait(&self, channel: &mut Channel) -> Step<Option<Proof>> {
        loop {
            match talk::receive_within(channel, ANSWER).await? {
                Message::Arrived(arrived) => {
                    return Ok(Some(Proof::Runs { arrived, whole: false }));
                }
                Message::Failure(f) => {
                    return Ok(Some(Proof::Never(Failure::from_message(&self.to.name, f))));
                }
                _ => {}
            }
        }
    }

    /// For a container that has departed: `lost` is the answer only if the
    /// target's agent does not come back to give a better one.
    pub(super) async fn ask_whether_arrived(&self, lost: Failure) -> Step<Arrived> {
        tracing::warn!(error = lost.sentence(), "asking the target whether it has arrived");
        let asking = async {
            loop {
                match self.ask().await {
                    Ok(Some(Proof::Runs { arrived, .. })) => return Ok(arrived),
                    Ok(Some(Proof::Never(failure))) => return Err(failure),
                    Ok(None) | Err(_) => time::sleep(AGAIN).await,
                }
            }
        };
        tokio::select! {
            answer = time::timeout(ARRIVED, asking) => answer.unwrap_or(Err(lost)),
            () = self.node.shutdown.cancelled() => Err(lost),
        }
    }

    async fn ask(&self) -> Step<Option<Proof>> {
        Ok(Proof::told_by(&self.to.name, self.inquire().await?))
    }

    /// The target's answer, which `status` shows.
    pub(super) async fn inquire(&self) -> Step<Standing> {
        let standing = self.standing().await;
        match &standing {
            Ok(standing) => self.entry.answered(standing.as_str()),
            Err(failure) => self.entry.answered(&failure.sentence()),
        }
        standing
    }

    async fn standing(&self) -> Step<Standing> {
        let Destination { name, address } = &self.to;
        let channel = connect_agent(&self.node.trust(), address, name).await?;
        let inquiry = Inquiry { migration: self.entry.migration().to_string() };
        match talk::ask(channel, Message::Inquiry(inquiry), ANSWER).await? {
            Message::Standing(standing) => Ok(Standing::of(&standing.state)),
            other => Err(talk::out_of_place(name, &other)),
        }
    }

    /// What is known of a departure whose shim could not tell.
    fn bare_report(&mut self, arrived: &Arrived) -> Report {
        let began = time::Instant::now();
        self.report(&Departure::default(), arrived, 0, began)
    }
}
