//! In doubt: the commit may or may not have reached the target. The container
//! stays stopped here, and the target is asked until it has proof.

use std::{sync::Arc, time::Duration};

use tokio::time;
use tracing::Instrument;
use transship_api::{
    control::{Departure, Report, Tuning},
    session::{Arrived, Inquiry, agent_message::Message},
};
use transship_link::{Channel, connect_agent};
use transship_migration::decide::{self, Journaled, Resume, Standing, Told};
use transship_types::{Code, NodeName};

use super::{ARRIVED, Left, Source};
use crate::{
    book::{Ending, Record, Role},
    failure::{Failure, Step, chain},
    node::{Destination, Node},
    shim::ShimError,
    talk,
};

/// Between two questions: short for a person who waits, long for a network.
const AGAIN: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 2000 });
const ANSWER: Duration = Duration::from_secs(10);

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
    fn told_by(target: &NodeName, standing: Standing) -> Option<Self> {
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

/// Takes up what a former run of this agent left open. A departure that may
/// have been decided is asked about; anything earlier has ended, since the
/// target discards what loses its source.
pub async fn resume(node: &Arc<Node>) {
    for record in node.book.records() {
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
        channel: Option<Channel>,
        error: String,
        proof: Option<Proof>,
    ) {
        let clock = self.phase("in doubt");
        tracing::warn!(error, "in doubt: asking the target");
        if let Err(failure) = self.entry.in_doubt(&error).await {
            tracing::error!(error = failure.sentence(), "the doubt was not written down");
        }
        let (mut channel, mut proof) = (channel, proof);
        let proof = loop {
            let asking = async {
                let proof = match proof.take() {
                    Some(proof) => proof,
                    None => self.proof(channel.take()).await,
                };
                let settled = self.tell_shim(&proof).await;
                (proof, settled)
            };
            tokio::select! {
                (proof, settled) = asking => match settled {
                    true => break proof,
                    false => time::sleep(AGAIN).await,
                },
                // The record says "in doubt"; the next run takes it up.
                () = self.node.shutdown.cancelled() => return,
            }
        };
        self.took("in doubt", clock);
        match proof {
            Proof::Runs { arrived, .. } => {
                let report = self.bare_report(&arrived);
                self.moved(report).await;
            }
            Proof::Never(failure) => self.stayed_home(failure, Left::Discarded).await,
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
        let mut last = String::new();
        loop {
            let shims = &self.node.shims;
            let settled = shims.settle(&self.key, self.entry.migration(), runs_there, may_lack);
            let told = match settled.await {
                Ok((ending, error)) if ending == "in-doubt" => {
                    tracing::warn!(error, "it runs there, and lacks pages that are here");
                    return false;
                }
                Ok((ending, _)) => {
                    tracing::info!(ending, "settled");
                    Told::Settled
                }
                Err(error) => {
                    let text = chain(&error);
                    if text != last {
                        tracing::warn!(error = text, "the shim did not settle");
                        last = text;
                    }
                    error.told()
                }
            };
            if !decide::tell_again(told) {
                return true;
            }
            time::sleep(AGAIN).await;
        }
    }

    async fn proof(&self, mut channel: Option<Channel>) -> Proof {
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
        let Destination { name, address } = &self.to;
        let trust = self.node.trust();
        let channel = connect_agent(&trust, address, name).await?;
        let inquiry = Inquiry { migration: self.entry.migration().to_string() };
        match talk::ask(channel, Message::Inquiry(inquiry), ANSWER).await? {
            Message::Standing(standing) => Ok(Proof::told_by(name, Standing::of(&standing.state))),
            other => Err(talk::out_of_place(name, &other)),
        }
    }

    /// What is known of a departure whose shim could not tell.
    fn bare_report(&mut self, arrived: &Arrived) -> Report {
        let began = time::Instant::now();
        self.report(&Departure::default(), arrived, 0, began)
    }
}
