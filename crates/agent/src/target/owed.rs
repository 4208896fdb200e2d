//! Containers that run here before all of their pages do.
//!
//! Their source may come back under the ticket as often as the link breaks,
//! and also after this agent was restarted: the shim's journal says so.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use tokio::time;
use transship_link::arrivals::Registration;
use transship_migration::journal::{self, Subject};
use transship_types::MigrationId;

use crate::node::Node;

/// Between two looks at whether the last page has come.
const LOOK: Duration = Duration::from_secs(1);

/// After its registration: nobody asks under a ticket that is made anew before
/// the shim comes back to it.
const LIFETIME: Duration = Duration::from_secs(120);

/// Keeps the ticket of an arrival as long as pages are owed to it.
pub fn keep(node: &Arc<Node>, migration: &MigrationId, registration: Option<Registration>) {
    let path = node.book.journals().join(format!("{migration}.target"));
    let Some(subject) = journal::owed(&path) else { return };
    watch(node, path, subject, registration);
}

/// The same for those that an earlier run of this agent knew.
pub fn take_up(node: &Arc<Node>) {
    let Ok(entries) = fs::read_dir(node.book.journals()) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if let Some(subject) = journal::owed(&path) {
            watch(node, path, subject, None);
        }
    }
}

fn watch(node: &Arc<Node>, path: PathBuf, subject: Subject, registration: Option<Registration>) {
    let registration = registration.unwrap_or_else(|| {
        let made = node.arrivals.register(subject.ticket, subject.peer, LIFETIME);
        made.bound_to(subject.migration.clone())
    });
    registration.stay();
    let shutdown = node.shutdown.clone();
    let migration = subject.migration;
    tracing::info!(%migration, "it runs here, and some of its pages are still to come");
    node.tasks.spawn(async move {
        let _ticket = registration;
        while journal::owed(&path).is_some() {
            tokio::select! {
                () = time::sleep(LOOK) => {}
                () = shutdown.cancelled() => return,
            }
        }
        tracing::info!(%migration, "nothing is owed to it any more");
        // What the record of its ending would have done.
        let _ = fs::remove_file(&path);
    });
}
