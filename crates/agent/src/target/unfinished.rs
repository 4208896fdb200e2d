//! Arrivals that a former run of this agent left behind.
//!
//! While the agent was gone the shims may have gone on, so nothing is removed
//! before it is certain that the container will not run: its start fails once
//! its shim has lost the agent or the source. What the daemon does not show
//! any more the shim's journal may tell ([`decide::became`]).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{self, Instant},
};
use tracing::Instrument;
use transship_migration::decide::{self, Became, Journaled, Seen};
use transship_types::{ContainerKey, MigrationId};

use crate::{
    book::{End, Ending, Entry, Record, Role},
    daemon::{Arriving, TaskStatus},
    failure::{Failure, chain},
    node::Node,
};

/// The shims' own deadlines are shorter: by then they have decided.
const DECIDED: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_secs(1);

/// Why an arrival stays in doubt on the node that it came to.
pub(super) const UNKNOWABLE: &str =
    "the container is gone, and the journal that would tell whether it had run is damaged";

/// What is open under one name: a container has one migration at a time, so
/// that more than one can only be left of a crash.
struct Open {
    entry: Entry,
    also: Vec<MigrationId>,
}

/// Takes them up in the background, once the daemon answers: it may be
/// starting as we are. When this returns, no new offer can come between.
///
/// The task answers, once it has looked, how many there were.
pub async fn take_up(node: &Arc<Node>) -> JoinHandle<usize> {
    let mut open = reopened(node).await;
    let node = node.clone();
    node.tasks.clone().spawn(async move {
        let found = tokio::select! {
            found = look(&node) => found,
            () = node.shutdown.cancelled() => return 0,
        };
        let mut taken = 0;
        let mut begin = |key: ContainerKey, arriving, open| {
            let span = tracing::info_span!("unfinished arrival", container = %key);
            node.tasks.spawn(settle(node.clone(), key, arriving, open).instrument(span));
            taken += 1;
        };
        for (key, arriving) in found {
            let open = open.remove(&key);
            // One that has begun since we started is not ours to end.
            if open.is_some() || !node.book.is_live(&key) {
                begin(key, Some(arriving), open);
            }
        }
        // Those whose lease has gone already: only our record is missing.
        for (key, open) in open {
            begin(key, None, Some(open));
        }
        taken
    })
}

async fn reopened(node: &Node) -> BTreeMap<ContainerKey, Open> {
    let mut open: BTreeMap<ContainerKey, Open> = BTreeMap::new();
    for record in node.book.records() {
        if record.role != Role::Target || record.has_ended() {
            continue;
        }
        let (key, migration) = (record.key.clone(), record.migration.clone());
        if let Some(open) = open.get_mut(&key) {
            open.also.push(migration);
        } else if let Ok(entry) = node.book.reopen(record).await {
            entry.too_late("its shim decides, and what became of it is found out");
            open.insert(key, Open { entry, also: Vec::new() });
        }
    }
    open
}

async fn look(node: &Node) -> Vec<(ContainerKey, Box<dyn Arriving>)> {
    let mut told = false;
    loop {
        match node.daemon.unfinished().await {
            Ok(found) => return found,
            Err(error) if !told => {
                tracing::warn!(error = chain(&error), "the daemon is not there yet");
                told = true;
            }
            Err(_) => {}
        }
        time::sleep(LOOK).await;
    }
}

/// Without `arriving` it has been kept or undone before.
async fn settle(
    node: Arc<Node>,
    key: ContainerKey,
    arriving: Option<Box<dyn Arriving>>,
    open: Option<Open>,
) {
    let migration = open.as_ref().map(|open| open.entry.migration().clone());
    let became = tokio::select! {
        became = decided(&node, &key, migration.as_ref(), arriving.is_some()) => became,
        () = node.shutdown.cancelled() => return,
    };
    let ended = match (became, arriving) {
        (Became::Arrived, Some(arriving)) => {
            tracing::info!("it has arrived: kept");
            arriving.keep().await.map(|()| Ending::Arrived)
        }
        (Became::Never, Some(arriving)) => {
            tracing::info!("it does not run: removed");
            arriving.undo().await.map(|()| Ending::Discarded)
        }
        (Became::Arrived, None) => Ok(Ending::Arrived),
        (Became::Never, None) => Ok(Ending::Discarded),
        (Became::Open | Became::Unknowable, _) => Ok(Ending::InDoubt),
    };
    match (ended, open) {
        (Ok(ending), Some(open)) => write_down(&node, open, ending).await,
        (Ok(_), None) => {}
        (Err(error), _) => {
            let error = Failure::from(error).sentence();
            tracing::error!(error, "an unfinished arrival could not be ended");
        }
    }
}

/// What became of it, once that is certain.
pub(super) async fn decided(
    node: &Node,
    key: &ContainerKey,
    migration: Option<&MigrationId>,
    leased: bool,
) -> Became {
    let deadline = Instant::now() + DECIDED;
    loop {
        let seen = match node.daemon.task(key).await {
            Ok(Some(task)) => match task.status {
                TaskStatus::Running | TaskStatus::Paused => Seen::Runs,
                TaskStatus::Stopped => Seen::Ended { had_process: task.pid > 0 },
                TaskStatus::Created | TaskStatus::Unknown => Seen::Unborn,
            },
            Ok(None) => Seen::Gone,
            // It may be starting as we are.
            Err(_) => Seen::Silent,
        };
        // After the look: what the shim has written down is older than that.
        let journaled = migration.map(|m| node.book.journaled(m, Role::Target));
        let late = Instant::now() > deadline;
        match decide::became(seen, leased, journaled.unwrap_or(Journaled::Absent), late) {
            Became::Open => time::sleep(LOOK).await,
            became => return became,
        }
    }
}

/// The peer that waits for proof finds it in the record.
async fn write_down(node: &Node, open: Open, ending: Ending) {
    let error = match ending {
        Ending::InDoubt => UNKNOWABLE,
        _ => "transshipd was restarted during the migration",
    };
    for migration in open.also {
        let change = |r: &mut Record| (r.ending, r.error) = (ending, error.into());
        if let Err(failure) = node.book.change(&migration, change).await {
            tracing::error!(error = failure.sentence(), "an ending was not written down");
        }
    }
    open.entry.end(ending, error, End::of(ending, Failure::cancelled(error))).await;
}
