//! The node's one TCP port: who comes in, and where it goes.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time,
};
use transship_link::{Route, accept, route, turn_away};

use crate::{failure::chain, node::Node, target};

/// After an error of `accept` itself, which mostly means that the process has
/// no descriptors left.
const PAUSE: Duration = Duration::from_millis(200);

/// Accepts until the shutdown. Connections beyond the limit wait in the
/// kernel's queue; each one that is taken must identify itself in time.
pub async fn serve(node: Arc<Node>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(node.config.limits.connections));
    loop {
        let permit = tokio::select! {
            permit = room.clone().acquire_owned() => permit,
            () = node.shutdown.cancelled() => return,
        };
        let Ok(permit) = permit else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = node.shutdown.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => drop(node.tasks.spawn(admit(node.clone(), stream, permit))),
            Err(error) => refused(&error).await,
        }
    }
}

async fn refused(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    time::sleep(PAUSE).await;
}

async fn admit(node: Arc<Node>, stream: TcpStream, permit: OwnedSemaphorePermit) {
    let peer = stream.peer_addr().map_or_else(|_| "unknown".into(), |a| a.to_string());
    let done = match route(&stream, node.name()).await {
        Ok(Route::Agent) => match accept(&node.trust(), stream).await {
            Ok(channel) => {
                target::serve(node, channel).await;
                Ok(())
            }
            Err(error) => Err(error),
        },
        Ok(Route::Ticket(ticket)) => node.arrivals.hand_over(&ticket, stream).await,
        Err(error) => {
            turn_away(stream).await;
            Err(error)
        }
    };
    drop(permit);
    if let Err(error) = done {
        // Whoever scans the network gets here: no more than a line.
        tracing::info!(peer, error = chain(&error), "a connection was refused");
    }
}
