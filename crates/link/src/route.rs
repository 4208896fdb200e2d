//! Whom an accepted connection is for, told from the first message of TLS
//! without taking it off the socket.

use std::io;

use nix::sys::socket::{MsgFlags, recv};
use rustls::server::Acceptor;
use std::os::fd::AsRawFd;
use tokio::{io::Interest, net::TcpStream, time};
use transship_types::{NodeName, Ticket};

use crate::{
    LinkError,
    limits::{CLIENT_HELLO, FIRST},
};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// For the agent itself.
    Agent,
    /// For the shim that waits under this ticket.
    Ticket(Ticket),
}

/// Peeks until the ClientHello is complete. Reads nothing: whoever gets the
/// socket does the handshake from its first byte.
pub async fn route(stream: &TcpStream, here: &NodeName) -> Result<Route, LinkError> {
    let peer = stream.peer_addr().map_or_else(|_| "a peer".into(), |a| a.to_string());
    match time::timeout(FIRST, server_name(stream, &peer)).await {
        Ok(name) => parse(&name?, here)
            .ok_or(LinkError::NotANode { peer, why: "it asks for a name not served here".into() }),
        Err(_) => Err(LinkError::Timeout {
            what: format!("the first message of {peer}"),
            seconds: FIRST.as_secs(),
        }),
    }
}

pub(crate) fn parse(name: &str, here: &NodeName) -> Option<Route> {
    let agent = here.agent_dns();
    if name == agent {
        return Some(Route::Agent);
    }
    let ticket = name.strip_suffix(&agent)?.strip_suffix('.')?;
    Some(Route::Ticket(ticket.parse().ok()?))
}

async fn server_name(stream: &TcpStream, peer: &str) -> Result<String, LinkError> {
    let not_a_node = |why: &str| LinkError::NotANode { peer: peer.into(), why: why.into() };
    let broken = |source| LinkError::Socket { what: format!("reading from {peer}"), source };
    let mut seen = [0; CLIENT_HELLO];
    loop {
        let ready = stream.ready(Interest::READABLE).await.map_err(broken)?;
        // Inside `try_io`, so that "not complete yet" clears the readiness as
        // "nothing there" would, and the next wait is for new bytes. Bytes
        // that come in between set it again.
        let mut outcome = Ok(None);
        let io = stream.try_io(Interest::READABLE, || {
            let n = recv(stream.as_raw_fd(), &mut seen, MsgFlags::MSG_PEEK)?;
            outcome = hello_name(&seen[..n]);
            match outcome {
                Ok(None) if n < CLIENT_HELLO => Err(io::ErrorKind::WouldBlock.into()),
                Ok(None) => {
                    outcome = Err("its first message is too long".into());
                    Ok(())
                }
                _ => Ok(()),
            }
        });
        match (io, outcome) {
            (Ok(()), Ok(Some(name))) => return Ok(name),
            (Ok(()), Err(why)) => return Err(not_a_node(&why)),
            (Err(e), _) if e.kind() != io::ErrorKind::WouldBlock => return Err(broken(e)),
            // Nothing more will come.
            _ if ready.is_read_closed() => {
                return Err(not_a_node("it left before its first message was complete"));
            }
            _ => {}
        }
    }
}

/// `None` as long as the hello is not complete.
pub(crate) fn hello_name(mut bytes: &[u8]) -> Result<Option<String>, String> {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        // Reading from a slice into memory cannot fail but by a full buffer.
        if acceptor.read_tls(&mut bytes).map_err(|e| e.to_string())? == 0 {
            break;
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let name = accepted.client_hello().server_name().map(str::to_string);
                return name.map(Some).ok_or_else(|| "it names no server".into());
            }
            Err((error, _)) => return Err(error.to_string()),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_whom_they_are_for() {
        let here: NodeName = "a".parse().unwrap();
        let ticket = Ticket::from_random([7; 16]);
        for (name, route) in [
            ("a.transship.internal".to_string(), Some(Route::Agent)),
            (here.ticket_dns(&ticket), Some(Route::Ticket(ticket.clone()))),
            ("b.transship.internal".into(), None),
            ("xa.transship.internal".into(), None),
            ("x.a.transship.internal".into(), None),
            (format!("{ticket}.b.transship.internal"), None),
            (format!("{ticket}a.transship.internal"), None),
            ("transship.internal".into(), None),
            ("".into(), None),
        ] {
            assert_eq!(parse(&name, &here), route, "{name}");
        }
    }
}
