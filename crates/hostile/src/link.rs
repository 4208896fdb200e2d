//! The first bytes of a connection, whoever made it.

use std::sync::Arc;

use prost::Message;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, crypto::ring, pki_types::ServerName,
    version::TLS13,
};
use transship_api::session::Hello;
use transship_link::{Route, fuzz};
use transship_types::{NodeName, Ticket};

fn here() -> NodeName {
    "b".parse().expect("a name")
}

pub fn client_hello(bytes: &[u8]) {
    if let Some(Route::Ticket(ticket)) = fuzz::client_hello(bytes, &here()) {
        assert!(ticket.as_str().parse::<Ticket>().is_ok());
    }
}

pub fn client_hello_seeds() -> Vec<Vec<u8>> {
    let ticket = here().ticket_dns(&Ticket::from_random([7; 16]));
    [here().agent_dns(), ticket, "elsewhere.example".into()].map(tls).into()
}

/// The first message of an ordinary client.
fn tls(name: String) -> Vec<u8> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("a version that it has")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(name).expect("a name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).expect("memory");
    bytes
}

pub fn hello(bytes: &[u8]) {
    if fuzz::hello(bytes, &here()) {
        let hello = Hello::decode(bytes).expect("it was understood");
        assert_eq!((hello.node.as_str(), hello.protocol), ("b", transship_types::PROTOCOL));
    }
}

pub fn hello_seeds() -> Vec<Vec<u8>> {
    let hello = |protocol, node: &str| Hello { protocol, software: "x".into(), node: node.into() };
    [hello(1, "b"), hello(2, "b"), hello(1, "a")].map(|hello| hello.encode_to_vec()).into()
}
