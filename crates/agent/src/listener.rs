//! The node's one TCP port: who comes in, and where it goes.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

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
/// kernel's queue; each one that is taken must identify itself in time. One
/// address holds no more than half of them, whether it is a node or a stranger
/// that says nothing: then nobody keeps the others out alone.
pub async fn serve(node: Arc<Node>, listener: TcpListener) {
    let most = node.config.limits.connections;
    let (room, crowd) = (Arc::new(Semaphore::new(most)), Crowd::default());
    let share = most.div_ceil(2);
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
            Ok((stream, address)) => match crowd.enter(address.ip(), share) {
                Some(place) => {
                    let (node, held) = (node.clone(), (permit, place));
                    drop(node.tasks.clone().spawn(admit(node, stream, held)));
                }
                // Closed without a word: a word would have to be waited for.
                None => tracing::debug!(%address, share, "it has its share of connections"),
            },
            Err(error) => refused(&error).await,
        }
    }
}

/// Who holds how many connections.
#[derive(Clone, Default)]
struct Crowd(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Crowd {
    /// `None`: this address holds `most` already.
    fn enter(&self, address: IpAddr, most: usize) -> Option<Place> {
        let mut held = self.held();
        let count = held.entry(address).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Place { crowd: self.clone(), address })
    }

    fn held(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // Every change under this lock is a number.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place; dropped with it.
struct Place {
    crowd: Crowd,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.crowd.held();
        if let Some(count) = held.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.address);
            }
        }
    }
}

async fn refused(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    time::sleep(PAUSE).await;
}

async fn admit(node: Arc<Node>, stream: TcpStream, held: (OwnedSemaphorePermit, Place)) {
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
    drop(held);
    if let Err(error) = done {
        // Whoever scans the network gets here: no more than a line.
        tracing::info!(peer, error = chain(&error), "a connection was refused");
    }
}
