//! `transship resolve`: what a person decides about a migration in doubt.

use std::{sync::Arc, time::Duration};

use tokio::time;
use transship_api::control::{Doubt, ResolveRequest, ResolveResponse};
use transship_migration::decide::{Choice, Journaled};
use transship_types::Code;

use crate::{
    book::{Ending, Live, Record, Resolved, Role},
    failure::{Failure, Step},
    node::Node,
    target,
};

/// A question to the target, and what our shim takes to thaw or to kill.
const OBEYED: Duration = Duration::from_secs(120);

pub async fn resolve(
    node: &Arc<Node>,
    record: Record,
    request: &ResolveRequest,
) -> Step<ResolveResponse> {
    let choice = Choice::of(&request.choice).ok_or_else(|| {
        let reason = format!("{:.40?} is no decision", request.choice);
        Failure::new(Code::Malformed, reason, "it is run-here or discard")
    })?;
    if record.has_ended() {
        let reason = format!("it has ended: {}", record.ending.as_str());
        return Err(Failure::new(Code::NotRunning, reason, "see `transship status`"));
    }
    let resolved = match record.role {
        Role::Source => at_source(node, &record, choice).await?,
        Role::Target => target::resolve(node, &record, choice).await?,
    };
    let Resolved { by_proof, ending, outcome } = resolved;
    Ok(ResolveResponse {
        by: if by_proof { "proof" } else { "person" }.into(),
        ending: ending.as_str().into(),
        outcome,
        ..Default::default()
    })
}

async fn at_source(node: &Node, record: &Record, choice: Choice) -> Step<Resolved> {
    let busy = |reason: &str, remedy: &str| Failure::new(Code::Busy, reason, remedy);
    let live = node.book.live(&record.migration);
    let asked = match &live {
        Some(live) => live.resolve(choice).await,
        None => None,
    };
    let Some(answered) = asked else {
        let remedy = "wait, or `transship cancel` it, which is possible until its commit";
        return Err(busy("it is under way and not in doubt", remedy));
    };
    match time::timeout(OBEYED, answered).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(Failure::cancelled("transshipd is shutting down")),
        Err(_) => {
            let reason = "the shim of the container has not answered yet";
            Err(busy(reason, "it is told again; `transship status` shows what was decided"))
        }
    }
}

/// What is known of a doubt, for `status`.
pub fn doubt(node: &Node, record: &Record, live: Option<&Live>) -> Option<Doubt> {
    if record.ending != Ending::InDoubt && record.decision.is_none() {
        return None;
    }
    let journal = match node.book.journaled(&record.migration, record.role) {
        Journaled::Absent => "none",
        Journaled::Damaged => "damaged",
        Journaled::Last(state) => state.as_str(),
    };
    let answer = live.and_then(|live| live.watch().borrow().answer.clone());
    let (asked, answer) = answer.unwrap_or_default();
    let mut doubt = Doubt {
        since: record.in_doubt_since,
        journal: journal.into(),
        asked,
        answer,
        ..Default::default()
    };
    if let Some(decision) = &record.decision {
        doubt.decision = decision.choice.as_str().into();
        doubt.decided = decision.at;
        doubt.followed = decision.followed;
        doubt.both_ran = decision.both_ran;
    }
    Some(doubt)
}
