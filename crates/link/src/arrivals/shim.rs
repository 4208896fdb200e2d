//! The shim's side: wait for the connection of a ticket.

use std::{io, os::fd::OwnedFd, path::Path, time::Duration};

use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{TcpStream, UnixStream},
    time,
};
use transship_types::{MigrationId, NodeName, Ticket, paths::ARRIVALS_SOCKET};

use super::{ANSWER_MAX, Answer};
use crate::{Channel, Credentials, LinkError, Trust, accept, sys};

/// A connection that came for us, unread.
#[derive(Debug)]
pub struct Arrival {
    /// Belongs to no runtime yet: whichever drives the handshake gets it.
    pub stream: std::net::TcpStream,
    pub credentials: Credentials,
    /// The only node that may be at its other end.
    pub peer: NodeName,
    /// The only migration that the ticket is for, if it was made for one.
    pub migration: Option<MigrationId>,
}

impl Arrival {
    /// The handshake, and the check that it is the node we wait for.
    pub async fn accept(self) -> Result<Channel, LinkError> {
        let stream = TcpStream::from_std(self.stream).map_err(|source| LinkError::Socket {
            what: "taking a connection over".into(),
            source,
        })?;
        let channel = accept(&Trust::load(&self.credentials)?, stream).await?;
        if channel.peer == self.peer {
            return Ok(channel);
        }
        Err(LinkError::Name {
            why: format!("is not that of {}, for whom the ticket was made", self.peer),
            peer: channel.peer.to_string(),
        })
    }
}

/// Waits at the node's agent for a connection under `ticket`: the first call
/// gets the first, each later one the next. Cancel by dropping.
pub async fn wait(ticket: &Ticket, deadline: Duration) -> Result<Arrival, LinkError> {
    wait_at(Path::new(ARRIVALS_SOCKET), ticket, deadline).await
}

/// The same, at an arrivals socket elsewhere.
pub async fn wait_at(
    socket: &Path,
    ticket: &Ticket,
    deadline: Duration,
) -> Result<Arrival, LinkError> {
    let failed = |source| LinkError::Socket {
        what: format!("asking at {} for an arrival", socket.display()),
        source,
    };
    let asking = async {
        let mut agent = UnixStream::connect(socket).await?;
        agent.write_all(ticket.as_str().as_bytes()).await?;
        answer(&agent).await
    };
    let (bytes, descriptor) = time::timeout(deadline, asking)
        .await
        .map_err(|_| LinkError::Timeout {
            what: "waiting for the source's connection".into(),
            seconds: deadline.as_secs(),
        })?
        .map_err(failed)?;
    if bytes.is_empty() {
        return Err(LinkError::Arrival("the agent cancelled it".into()));
    }
    let answer = serde_json::from_slice(&bytes).map_err(|e| failed(e.into()))?;
    match (answer, descriptor) {
        (Answer::Granted { credentials, peer, migration }, Some(descriptor)) => Ok(Arrival {
            stream: into_stream(descriptor).map_err(failed)?,
            credentials,
            peer,
            migration,
        }),
        (Answer::Granted { .. }, None) => {
            Err(LinkError::Arrival("the agent sent no connection".into()))
        }
        (Answer::Refused { reason }, _) => Err(LinkError::Arrival(reason)),
    }
}

/// Everything the agent says until it closes, and the descriptor beside it.
async fn answer(agent: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = Vec::new();
    let mut descriptor = None;
    let mut buffer = [0; 4096];
    loop {
        let receive = || sys::receive_with(agent, &mut buffer);
        let (n, received) = agent.async_io(Interest::READABLE, receive).await?;
        if n == 0 {
            return Ok((bytes, descriptor));
        }
        bytes.extend_from_slice(&buffer[..n]);
        descriptor = descriptor.or(received);
        if bytes.len() > ANSWER_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long"));
        }
    }
}

fn into_stream(descriptor: OwnedFd) -> io::Result<std::net::TcpStream> {
    let stream = std::net::TcpStream::from(descriptor);
    stream.set_nonblocking(true)?;
    Ok(stream)
}
