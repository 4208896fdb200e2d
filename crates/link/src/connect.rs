//! Connections as both ends make them: TCP, TLS, hello.

use std::{future::Future, io};

use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use transship_api::session::Hello;
use transship_types::{NodeName, PROTOCOL, Ticket};
use transship_wire::MAX_CONTROL;

use crate::{
    Channel, LinkError, Trust,
    limits::{CONNECT, HANDSHAKE, HELLO, LINGER},
    sys, trust,
};

/// Read from a socket at once. TLS asks for 4 KiB at a time, which would be a
/// system call for each page of a container's memory.
const READ: usize = 128 << 10;

/// A session with the agent of `node`, which must be found at `address`.
pub async fn connect_agent(
    trust: &Trust,
    address: &str,
    node: &NodeName,
) -> Result<Channel, LinkError> {
    connect(trust, address, node, node.agent_dns()).await
}

/// A session with the shim on `node` that waits under `ticket`.
pub async fn connect_ticket(
    trust: &Trust,
    address: &str,
    node: &NodeName,
    ticket: &Ticket,
) -> Result<Channel, LinkError> {
    connect(trust, address, node, node.ticket_dns(ticket)).await
}

async fn connect(
    trust: &Trust,
    address: &str,
    node: &NodeName,
    dns: String,
) -> Result<Channel, LinkError> {
    trust.not_expired()?;
    let unreachable = |source| LinkError::Unreachable { address: address.into(), source };
    let stream = time::timeout(CONNECT, TcpStream::connect(address))
        .await
        .map_err(|_| unreachable(io::ErrorKind::TimedOut.into()))?
        .map_err(unreachable)?;
    sys::tune(&stream).map_err(|source| socket("preparing the socket", source))?;
    let name = ServerName::try_from(dns)
        .map_err(|e| LinkError::Name { peer: node.to_string(), why: e.to_string() })?;

    let peer = format!("{node} at {address}");
    handshake_with(&peer, async {
        let stream = TlsConnector::from(trust.client.clone())
            .connect(name, BufReader::with_capacity(READ, stream))
            .await
            .map_err(|e| LinkError::from_tls(&peer, e).of(node))?;
        let named = proved(&peer, stream.get_ref().1.peer_certificates())?;
        if named != *node {
            let why = format!("names {named}, and {node} was expected");
            return Err(LinkError::Name { peer: peer.clone(), why });
        }
        greet(trust, Channel::over(stream, named)).await
    })
    .await
}

/// The server's side of either kind of session. Which peer may do what is for
/// the caller to decide, by `Channel::peer`.
pub async fn accept(trust: &Trust, stream: TcpStream) -> Result<Channel, LinkError> {
    sys::tune(&stream).map_err(|source| socket("preparing the socket", source))?;
    let peer = match stream.peer_addr() {
        Ok(address) => address.to_string(),
        Err(source) => return Err(socket("asking for the peer's address", source)),
    };
    handshake_with(&peer, async {
        let stream = BufReader::with_capacity(READ, stream);
        let accepting = TlsAcceptor::from(trust.server.clone()).accept(stream).into_fallible();
        let stream = match accepting.await {
            Ok(stream) => stream,
            Err((error, stream)) => {
                let_it_read(stream.into_inner()).await;
                return Err(LinkError::from_tls(&peer, error));
            }
        };
        let named = proved(&peer, stream.get_ref().1.peer_certificates())?;
        greet(trust, Channel::over(stream, named)).await
    })
    .await
}

async fn handshake_with(
    peer: &str,
    work: impl Future<Output = Result<Channel, LinkError>>,
) -> Result<Channel, LinkError> {
    time::timeout(HANDSHAKE, work).await.unwrap_or_else(|_| {
        Err(LinkError::Timeout {
            what: format!("the handshake with {peer}"),
            seconds: HANDSHAKE.as_secs(),
        })
    })
}

/// The node of a verified certificate.
fn proved(
    peer: &str,
    chain: Option<&[rustls_pki_types::CertificateDer<'_>]>,
) -> Result<NodeName, LinkError> {
    let name = |why: String| LinkError::Name { peer: peer.into(), why };
    let first = chain.and_then(|c| c.first()).ok_or_else(|| name("is missing".into()))?;
    trust::node_of(first).map_err(name)
}

/// Hello both ways: each side sends first and then reads, so neither waits
/// for the other's version to disagree with it.
async fn greet(trust: &Trust, mut channel: Channel) -> Result<Channel, LinkError> {
    let peer = channel.peer.to_string();
    let broken = |e| LinkError::from_wire(&peer, e);
    let ours = Hello {
        protocol: PROTOCOL,
        software: concat!("transship ", env!("CARGO_PKG_VERSION")).into(),
        node: trust.node().to_string(),
    };
    // A server that refuses our certificate may have closed already; what it
    // had to say about it comes with the read, and is the better error.
    let sent = channel.writer.control(&ours).await;
    channel.reader.set_control_limit(HELLO);
    let theirs: Hello = channel.reader.control().await.map_err(broken)?;
    sent.map_err(broken)?;
    agree(&theirs, &channel.peer)?;
    channel.reader.set_control_limit(MAX_CONTROL);
    Ok(channel)
}

/// What a peer says of itself, against what it has proved.
pub(crate) fn agree(theirs: &Hello, proved: &NodeName) -> Result<(), LinkError> {
    let peer = proved.to_string();
    if theirs.protocol != PROTOCOL {
        return Err(LinkError::Version { peer, theirs: theirs.protocol, ours: PROTOCOL });
    }
    if theirs.node != proved.as_str() {
        let said: String = theirs.node.chars().take(63).collect();
        return Err(LinkError::Name { why: format!("does not name {said:?}, as it says"), peer });
    }
    Ok(())
}

/// A fatal `unrecognized_name` alert in a TLS record (RFC 8446, 6 and 5.1).
const NOT_SERVED_HERE: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// Turns a connection away whose name is not served here, in a way that the
/// peer can tell from a broken network.
pub async fn turn_away(mut stream: TcpStream) {
    // A peer that does not take seven bytes needs no reason.
    if let Ok(Ok(())) = time::timeout(LINGER, stream.write_all(&NOT_SERVED_HERE)).await {
        let_it_read(stream).await;
    }
}

/// Closing a socket with unread bytes in it sends a reset, which would
/// destroy the alert that tells the peer why. So read a little first.
async fn let_it_read(mut stream: TcpStream) {
    let drain = async {
        stream.shutdown().await?;
        let mut sink = [0; 4096];
        while stream.read(&mut sink).await? > 0 {}
        io::Result::Ok(())
    };
    // Whatever happens now, the connection is refused.
    let _ = time::timeout(LINGER, drain).await;
}

fn socket(what: &str, source: io::Error) -> LinkError {
    LinkError::Socket { what: what.into(), source }
}
