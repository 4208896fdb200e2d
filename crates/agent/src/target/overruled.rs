//! A person has decided about an arrival, on the other node or on this one:
//! nothing of it runs here any more.

use std::{sync::Arc, time::Duration};

use tokio::time;
use transship_api::session::{Decision as Told, Standing as Answer, agent_message::Message};
use transship_migration::decide::{self, Choice, Overrule};
use transship_types::{Code, Epoch, NodeName};

use super::questions::standing;
use crate::{
    book::{Decision, Ending, Record, Resolved, Role},
    failure::{Failure, Step},
    node::Node,
};

/// An arrival under way that is cancelled: as long as its shim may take.
const STOPPED: Duration = Duration::from_secs(60);

/// The source's copy runs on. Only the node that it came from may say so.
pub async fn follow(node: &Arc<Node>, peer: &NodeName, told: Told) -> Step<Message> {
    let asked = || standing(node, peer, &told.migration);
    let record = told.migration.parse().ok().and_then(|m| node.book.record(&m));
    let Some(record) = record.filter(|r| r.role == Role::Target && r.peer == *peer) else {
        return Ok(asked());
    };
    let discarded = record.ending == Ending::Discarded;
    let decided = Epoch(told.epoch);
    match decide::on_decision(record.epoch(), decided, discarded) {
        Overrule::Stale => return Ok(asked()),
        Overrule::Done => {}
        Overrule::Follow => {
            tracing::warn!(id = %record.migration, container = %record.key, from = %peer,
                "a person has decided that it runs there");
            give_up(node, &record, Choice::RunHere, decided).await?;
        }
    }
    let record = node.book.record(&record.migration);
    let ran = record.and_then(|r| r.decision).is_some_and(|decision| decision.both_ran);
    let Message::Standing(answer) = asked() else { return Ok(asked()) };
    Ok(Message::Standing(Answer { ran, ..answer }))
}

/// Somebody gives up, on this node, what had come to it.
pub async fn resolve(node: &Arc<Node>, record: &Record, choice: Choice) -> Step<Resolved> {
    let peer = &record.peer;
    if choice == Choice::RunHere {
        let reason = format!("{} came from {peer}, and only {peer} can let it go here", record.key);
        let remedy = format!("`--discard` here, or decide on {peer}");
        return Err(Failure::new(Code::NotRunning, reason, remedy));
    }
    if node.book.live(&record.migration).is_some() {
        let reason = "it is under way, and its shim decides";
        return Err(Failure::new(Code::Busy, reason, "wait, or `transship cancel` it"));
    }
    give_up(node, record, choice, decide::raised(record.epoch())).await?;
    let outcome = format!(
        "nothing of {} is left on {}; {peer} goes on with its copy once it has \
                           asked",
        record.key,
        node.name()
    );
    Ok(Resolved { by_proof: false, ending: Ending::Discarded, outcome })
}

/// The book first; then the copy; then the book again.
async fn give_up(node: &Arc<Node>, record: &Record, choice: Choice, epoch: Epoch) -> Step<()> {
    let migration = &record.migration;
    if record.epoch() < epoch {
        let decision = Some(Decision::new(choice, epoch));
        node.book.change(migration, |r| r.decision = decision).await?;
    }
    if let Some(live) = node.book.live(migration) {
        live.cancel.cancel();
        let mut watch = live.watch();
        let ended = watch.wait_for(|view| view.end.is_some());
        time::timeout(STOPPED, ended)
            .await
            .map_err(|_| Failure::timeout("the end of an arrival that was overruled", STOPPED))?
            .map_err(|_| Failure::cancelled("transshipd is shutting down"))?;
    }
    let Some(now) = node.book.record(migration) else { return Ok(()) };
    let mut ran = false;
    if now.ending != Ending::Discarded {
        if let Some(later) = moved_on(node, &now) {
            let reason = format!("{} has arrived here, and was moved since ({later})", now.key);
            tracing::error!(reason, "a decision of the source cannot be followed: both may run");
            return Err(Failure::new(Code::NotRunning, reason, "see where it runs, and end one"));
        }
        // One that was made under this name later is another one.
        let made_by = if now.ended > 0 { now.ended } else { i64::MAX };
        ran = node.daemon.end(&now.key, made_by).await?;
    }
    if ran {
        tracing::error!(id = %migration, "it ran here as well as on {}; this copy was ended", now.peer);
    }
    let change = |r: &mut Record| {
        if r.ending != Ending::Discarded || ran {
            r.error = match ran {
                true => format!("it ran here as well as on {}, until a person's decision", r.peer),
                false => "a person has decided".to_string(),
            };
        }
        r.ending = Ending::Discarded;
        if let Some(decision) = &mut r.decision {
            decision.followed = true;
            decision.both_ran |= ran && decision.choice == Choice::RunHere;
        }
    };
    node.book.change(migration, change).await
}

/// The migration, if any, by which it has left this node since, or tries to.
fn moved_on(node: &Node, arrived: &Record) -> Option<String> {
    let later = |r: &Record| r.role == Role::Source && r.started >= arrived.started;
    let left = |r: &Record| r.ending == Ending::Departed || !r.has_ended();
    let mut records = node.book.records().into_iter();
    let found = records.find(|r| r.key == arrived.key && later(r) && left(r));
    found.map(|r| r.migration.to_string())
}
