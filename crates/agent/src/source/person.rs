//! A person decides a doubt, because the target cannot be asked any more.
//!
//! First the book, with an epoch above that of everything said before; then
//! our shim; then, if the copy here runs on, the target, as soon as it
//! answers ([`super::fence`]).

use tokio::time;
use transship_migration::decide::{self, Choice, Needed, Obeyed, Told};
use transship_types::{Code, Epoch};

use super::{
    Source, fence,
    settle::{AGAIN, Asked, Proof, Settled},
};
use crate::{
    book::{Decision, End, Ending, Request, Resolved},
    daemon::TaskStatus,
    failure::Failure,
};

impl Source {
    /// Whether a person has to, and may; a refusal is told at once.
    pub(super) async fn consider(&self, request: Request) -> Option<Settled> {
        let Request { choice, answer } = request;
        let target = &self.to.name;
        let asked = self.inquire().await.ok();
        let refused = match decide::needs_person(asked) {
            Needed::No(_) => {
                tracing::info!("asked to decide, but the target has proof");
                let proof = asked.and_then(|standing| Proof::told_by(target, standing))?;
                return Some(Settled::Proved(proof, Some(answer)));
            }
            Needed::NotYet => Failure::new(
                Code::Busy,
                format!("{target} answers, and does not know yet what became of it"),
                format!(
                    "wait: it is asked again and again; `transship status` on {target} says more"
                ),
            ),
            Needed::Yes => {
                let known = self.entry.record().map_or(Epoch(1), |record| record.epoch());
                let decision = Decision::new(choice, decide::raised(known));
                match self.entry.decide(Some(decision.clone())).await {
                    Ok(()) => return Some(Settled::Decided(decision, Some(answer))),
                    Err(failure) => failure,
                }
            }
        };
        // Whoever asked may have gone.
        let _ = answer.send(Err(refused));
        None
    }

    /// The decision is in the book.
    pub(super) async fn obey(&self, decision: &Decision) -> Obeyed {
        let Decision { choice, epoch, .. } = *decision;
        tracing::warn!(choice = choice.as_str(), "decided by a person, without proof");
        loop {
            let told = self.tell_once(choice == Choice::Discard, false, Some(epoch)).await;
            let told = told.unwrap_or(Told::Unclear);
            let obeyed = match self.node.daemon.task(&self.key).await {
                Ok(task) => {
                    let runs = task.is_some_and(|task| task.status == TaskStatus::Running);
                    decide::after_decision(choice, told, runs)
                }
                Err(_) if told == Told::Settled => Obeyed::Done,
                // Its silence proves nothing.
                Err(_) => Obeyed::Wait,
            };
            match obeyed {
                Obeyed::Wait => time::sleep(AGAIN).await,
                obeyed => return obeyed,
            }
        }
    }

    pub(super) async fn decided(self, decision: Decision, asked: Option<Asked>) {
        let (node, key, target) = (self.node.clone(), self.key.clone(), self.to.name.clone());
        let (ending, outcome) = match decision.choice {
            Choice::RunHere => (
                Ending::StayedHome,
                format!(
                    "{key} runs on {}; {target} is told as soon as it answers, and ends its copy",
                    node.name()
                ),
            ),
            Choice::Discard => (
                Ending::Discarded,
                format!(
                    "{key} was given up on {}: it runs on {target}, or nowhere; its stopped record was kept here",
                    node.name()
                ),
            ),
        };
        let error = format!("a person has decided: {}", decision.choice.as_str());
        let record = self.entry.record();
        let Failure(refusals) = Failure::new(Code::Link, error.clone(), "");
        let end = End::Failed { refusals, ending, outcome: outcome.clone() };
        self.entry.end(ending, &error, end).await;
        if let Some(mut record) = record {
            record.ending = ending;
            if record.must_fence() {
                fence::begin(&node, record);
            }
        }
        if let Some(asked) = asked {
            let _ = asked.send(Ok(Resolved { by_proof: false, ending, outcome }));
        }
    }

    /// There is nothing here to decide about: who asked learns it, and the
    /// target is asked as before.
    pub(super) async fn withdraw(&self, asked: Option<Asked>) {
        if let Err(failure) = self.entry.decide(None).await {
            tracing::error!(error = failure.sentence(), "a decision was not taken back");
        }
        let reason =
            format!("there is no frozen copy of {} on {} any more", self.key, self.node.name());
        tracing::warn!(reason, "the decision is void");
        if let Some(asked) = asked {
            let remedy = "see what the daemon shows of it here and on the other node";
            let _ = asked.send(Err(Failure::new(Code::NotRunning, reason, remedy)));
        }
        time::sleep(AGAIN).await;
    }
}
