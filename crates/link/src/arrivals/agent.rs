//! The agent's side: which tickets are out, who waits under them, and the
//! hand-over.

use std::{
    collections::HashMap,
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::socket::{MsgFlags, recv};
use tokio::{
    io::{AsyncReadExt, Interest},
    net::{TcpStream, UnixListener, UnixStream},
    sync::{Notify, Semaphore},
    time::{self, Instant},
};
use transship_types::{MigrationId, NodeName, Ticket};

use super::{Answer, TICKET};
use crate::{Credentials, LinkError, local::Peer, sys};

/// For a shim to say its ticket, which it does at once.
const ASK: Duration = Duration::from_secs(5);

/// For a connection whose shim is not there yet. The source connects only
/// after the target said that its shim waits, so this is for a stray.
const SHIM: Duration = Duration::from_secs(10);

/// Shims that have connected and not yet said their ticket.
const ASKING: usize = 64;

/// Connections under one ticket: the first carries the migration, and sixteen
/// for pages are more than any link needs.
pub const CONNECTIONS: u32 = 17;

/// The tickets of this node.
#[derive(Clone, Debug)]
pub struct Arrivals(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    credentials: Mutex<Credentials>,
    slots: Mutex<HashMap<Ticket, Slot>>,
    changed: Notify,
}

#[derive(Debug)]
struct Slot {
    peer: NodeName,
    migration: Option<MigrationId>,
    /// Never, once it stays.
    expires: Option<Instant>,
    shim: Option<UnixStream>,
    /// How many connections have come for it, whether they got through or not.
    came: u32,
    /// A shim has waited.
    asked: bool,
}

impl Slot {
    fn has_expired(&self) -> bool {
        self.expires.is_some_and(|expires| expires <= Instant::now())
    }

    /// One that stays gets as many as its shim asks for: links may break as
    /// often as they do.
    fn is_used_up(&self) -> bool {
        self.came >= CONNECTIONS && self.expires.is_some()
    }
}

impl Arrivals {
    pub fn new(credentials: Credentials) -> Self {
        let (credentials, slots) = (credentials.into(), Mutex::default());
        Self(Arc::new(Inner { credentials, slots, changed: Notify::new() }))
    }

    /// Connections from now on are accepted with these.
    pub fn renew(&self, credentials: Credentials) {
        *self.credentials() = credentials;
    }

    /// Makes `ticket` valid for connections from `peer` (which the shim
    /// checks, after its handshake) for `lifetime`, or until the registration
    /// is dropped. Each is for a shim that asks for it: one that asks once
    /// gets one, and whoever connects after that is turned away.
    pub fn register(&self, ticket: Ticket, peer: NodeName, lifetime: Duration) -> Registration {
        let expires = Some(Instant::now() + lifetime);
        let slot = Slot { peer, migration: None, expires, shim: None, came: 0, asked: false };
        self.slots().insert(ticket.clone(), slot);
        Registration { ticket, arrivals: self.clone() }
    }

    /// Serves the arrivals socket until it fails. Cancel by dropping.
    pub async fn serve(&self, listener: UnixListener) -> io::Result<()> {
        let asking = Arc::new(Semaphore::new(ASKING));
        loop {
            let Ok(permit) = asking.clone().acquire_owned().await else {
                return Ok(());
            };
            let (stream, _) = listener.accept().await?;
            let arrivals = self.clone();
            tokio::spawn(async move {
                arrivals.admit(stream).await;
                drop(permit);
            });
        }
    }

    async fn admit(&self, mut shim: UnixStream) {
        if let Err(stranger) = Peer::enters(&shim, None) {
            tracing::warn!(%stranger, "refused at the arrivals socket");
            let answer = Answer::Refused { reason: "this socket is for root alone".into() };
            let _ = send(&shim, &answer, None).await;
            return;
        }
        let mut said = [0; TICKET];
        let ticket = match time::timeout(ASK, shim.read_exact(&mut said)).await {
            Ok(Ok(_)) => str::from_utf8(&said).ok().and_then(|t| t.parse::<Ticket>().ok()),
            _ => None,
        };
        let refusal = match ticket {
            None => Some((shim, "no ticket was said")),
            Some(ticket) => self.attach(&ticket, shim),
        };
        if let Some((shim, reason)) = refusal {
            tracing::warn!(reason, "a shim asked for an arrival and was refused");
            let answer = Answer::Refused { reason: reason.into() };
            // It is refused whether it hears so or not.
            let _ = send(&shim, &answer, None).await;
        }
    }

    /// Gives the stream back, with the reason, when it cannot wait.
    fn attach(&self, ticket: &Ticket, shim: UnixStream) -> Option<(UnixStream, &'static str)> {
        match self.slots().get_mut(ticket) {
            None => return Some((shim, "the ticket is not known here, or was cancelled")),
            Some(slot) if slot.has_expired() => {
                return Some((shim, "the ticket has expired"));
            }
            Some(Slot { shim: Some(waits), .. }) if !has_left(waits) => {
                return Some((shim, "another shim waits under the ticket"));
            }
            Some(slot) => {
                slot.shim = Some(shim);
                slot.asked = true;
            }
        }
        self.0.changed.notify_waiters();
        None
    }

    /// Passes an accepted connection, unread, to the shim that waits for it.
    /// It counts against the ticket, whether it works or not.
    pub async fn hand_over(&self, ticket: &Ticket, stream: TcpStream) -> Result<(), LinkError> {
        match self.slots().get_mut(ticket) {
            None => return Err(refused("the ticket is not known here, or was cancelled")),
            Some(slot) if slot.is_used_up() => return Err(refused("the ticket is used up")),
            Some(slot) => slot.came += 1,
        }
        let (shim, peer, migration) = time::timeout(SHIM, self.waiting_shim(ticket))
            .await
            .map_err(|_| refused("no shim waits under the ticket"))??;
        let answer = Answer::Granted { credentials: self.credentials().clone(), peer, migration };
        send(&shim, &answer, Some(&stream)).await.map_err(|source| LinkError::Socket {
            what: "handing a connection over".into(),
            source,
        })
    }

    /// Takes the shim that waits, or the next one that will.
    async fn waiting_shim(
        &self,
        ticket: &Ticket,
    ) -> Result<(UnixStream, NodeName, Option<MigrationId>), LinkError> {
        self.until(ticket, |slot| {
            if slot.has_expired() {
                return Some(Err(refused("the ticket has expired")));
            }
            let shim = slot.shim.take().filter(|shim| !has_left(shim))?;
            Some(Ok((shim, slot.peer.clone(), slot.migration.clone())))
        })
        .await?
    }

    /// Looks at the ticket's slot now and after every change, until `look`
    /// has found what it looks for.
    async fn until<T>(
        &self,
        ticket: &Ticket,
        look: impl Fn(&mut Slot) -> Option<T>,
    ) -> Result<T, LinkError> {
        loop {
            // Before the look, so that no change is missed between the two.
            let changed = self.0.changed.notified();
            match self.slots().get_mut(ticket).map(&look) {
                None => return Err(refused("the ticket was cancelled")),
                Some(Some(found)) => return Ok(found),
                Some(None) => {}
            }
            changed.await;
        }
    }

    fn credentials(&self) -> MutexGuard<'_, Credentials> {
        self.0.credentials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Ticket, Slot>> {
        // Every change under this lock is a single step: a panic elsewhere
        // cannot leave the map half changed.
        self.0.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A ticket that is out. Dropping it cancels the arrival: a shim that waits is
/// told so.
#[derive(Debug)]
#[must_use]
pub struct Registration {
    ticket: Ticket,
    arrivals: Arrivals,
}

impl Registration {
    /// Makes the ticket good for this migration only, which is for the shim
    /// to check: the source names it after the handshake.
    pub fn bound_to(self, migration: MigrationId) -> Self {
        if let Some(slot) = self.arrivals.slots().get_mut(&self.ticket) {
            slot.migration = Some(migration);
        }
        self
    }

    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// From now on the ticket does not expire: the container runs here, and
    /// its source may come back under it, over and over, with what it owes.
    pub fn stay(&self) {
        if let Some(slot) = self.arrivals.slots().get_mut(&self.ticket) {
            slot.expires = None;
        }
    }

    /// Resolves once a shim waits under the ticket, or has waited.
    pub async fn shim_waits(&self) -> Result<(), LinkError> {
        self.arrivals.until(&self.ticket, |slot| slot.asked.then_some(())).await
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Closing the shim's stream without an answer is the cancellation.
        self.arrivals.slots().remove(&self.ticket);
        self.arrivals.0.changed.notify_waiters();
    }
}

/// A shim that stopped waiting and may ask again.
fn has_left(shim: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    matches!(recv(shim.as_raw_fd(), &mut [0], flags), Ok(0))
}

fn refused(reason: &str) -> LinkError {
    LinkError::Arrival(reason.into())
}

/// One message: an empty socket's buffer always has room for it.
async fn send(shim: &UnixStream, answer: &Answer, stream: Option<&TcpStream>) -> io::Result<()> {
    let bytes = serde_json::to_vec(answer)?;
    let sent = shim.async_io(Interest::WRITABLE, || sys::send_with(shim, &bytes, stream)).await?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
