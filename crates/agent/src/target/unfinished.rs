//! Arrivals that a former run of this agent left behind.
//!
//! While the agent was gone the shims may have gone on, so nothing is removed
//! before it is certain that the container will not run: its start fails once
//! its shim has lost the agent or the source.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{self, Instant},
};
use tracing::Instrument;
use transship_types::ContainerKey;

use crate::{
    book::{Ending, Role},
    daemon::{Arriving, TaskStatus},
    failure::{Failure, chain},
    node::Node,
};

/// The shims' own deadlines are shorter: by then they have decided.
const DECIDED: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_secs(1);

/// Takes them up in the background, once the daemon answers: it may be
/// starting as we are.
///
/// Answers, once it has looked, how many there were.
pub fn take_up(node: &Arc<Node>) -> JoinHandle<usize> {
    let node = node.clone();
    node.tasks.clone().spawn(async move {
        let found = tokio::select! {
            found = look(&node) => found,
            () = node.shutdown.cancelled() => return 0,
        };
        let mut taken = 0;
        for (key, arriving) in found {
            // One that has begun since we started is not ours to end.
            if node.book.is_live(&key) {
                continue;
            }
            let span = tracing::info_span!("unfinished arrival", container = %key);
            node.tasks.spawn(settle(node.clone(), key, arriving).instrument(span));
            taken += 1;
        }
        taken
    })
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

async fn settle(node: Arc<Node>, key: ContainerKey, arriving: Box<dyn Arriving>) {
    let ending = tokio::select! {
        runs = decided(&node, &key) => if runs {
            tracing::info!("it runs: kept");
            arriving.keep().await.map(|()| Ending::Arrived)
        } else {
            tracing::info!("it does not run: removed");
            arriving.undo().await.map(|()| Ending::Discarded)
        },
        () = node.shutdown.cancelled() => return,
    };
    match ending {
        Ok(ending) => write_down(&node, &key, ending).await,
        Err(error) => {
            let error = Failure::from(error).sentence();
            tracing::error!(error, "an unfinished arrival could not be ended");
        }
    }
}

/// Whether it runs here, once that is certain.
pub(super) async fn decided(node: &Node, key: &ContainerKey) -> bool {
    let deadline = Instant::now() + DECIDED;
    loop {
        match node.daemon.task(key).await {
            Ok(Some(task)) => match task.status {
                TaskStatus::Running | TaskStatus::Paused => return true,
                // It ran here to its end, or its start failed.
                TaskStatus::Stopped => return task.pid > 0,
                TaskStatus::Created | TaskStatus::Unknown => {}
            },
            Ok(None) => return false,
            // The daemon may be starting as we are. While it is silent
            // nothing is certain, however long.
            Err(_) => {
                time::sleep(LOOK).await;
                continue;
            }
        }
        if Instant::now() > deadline {
            return false;
        }
        time::sleep(LOOK).await;
    }
}

/// The peer that waits for proof finds it in the record.
async fn write_down(node: &Node, key: &ContainerKey, ending: Ending) {
    for record in node.book.records() {
        let open = matches!(record.ending, Ending::Running | Ending::InDoubt);
        if record.role == Role::Target && record.key == *key && open {
            let error = "transshipd was restarted during the migration";
            let change = |r: &mut crate::book::Record| (r.ending, r.error) = (ending, error.into());
            if let Err(failure) = node.book.change(&record.migration, change).await {
                tracing::error!(error = failure.sentence(), "an ending was not written down");
            }
        }
    }
}
