//! The places at which bytes of a stranger come in, for `crates/hostile`.

use transship_api::session::Hello;
use transship_types::NodeName;

use crate::{Route, connect, route};

/// A ClientHello as it is peeked at; whom it is for, if that is somebody here.
pub fn client_hello(bytes: &[u8], here: &NodeName) -> Option<Route> {
    let name = route::hello_name(bytes).ok()??;
    route::parse(&name, here)
}

/// Our own first message, of a peer whose certificate names `proved`.
pub fn hello(bytes: &[u8], proved: &NodeName) -> bool {
    let hello: Result<Hello, _> = transship_wire::decode(bytes.to_vec().into());
    hello.is_ok_and(|hello| connect::agree(&hello, proved).is_ok())
}
