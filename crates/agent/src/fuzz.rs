//! The places at which bytes of a peer or of a client come in, for
//! `crates/hostile`.

use bytes::Bytes;
use protobuf::Message as _;
use transship_api::{
    control::{LimitRequest, MigrateRequest, PlanRequest, StatusRequest, Tuning},
    session::{AgentMessage, agent_message::Message},
};

use crate::{
    book::Record,
    config::Limits,
    containerd::blob::Blob,
    offer, preflight, source,
    tuning::{self, Memory},
};

/// One message of an agent, and what is looked at before it is believed.
pub fn message(bytes: &[u8]) -> bool {
    let Ok(message) = transship_wire::decode::<AgentMessage>(Bytes::copy_from_slice(bytes)) else {
        return false;
    };
    let offer = match message.message {
        Some(Message::Offer(offer)) => offer,
        Some(Message::Consider(consider)) => consider.offer.unwrap_or_default(),
        Some(Message::Blob(blob)) => {
            return blob.descriptor.is_some_and(|blob| Blob::try_from(&blob).is_ok());
        }
        _ => return true,
    };
    let Ok(offer) = offer::check(offer) else { return false };
    preflight::judge(&offer, &preflight::Facts::default(), &Limits::default());
    // What is written for our own containerd can be read again.
    let (network, mounts) = (offer.spec.network(), offer.spec.bind_mounts());
    let again = crate::containerd::spec::Spec::read(&offer.spec.write(), &offer.key)
        .expect("what was written");
    assert_eq!((again.network(), again.bind_mounts()), (network, mounts));
    true
}

/// A request on the control socket: which one says the first byte.
pub fn request(bytes: &[u8]) -> bool {
    let Some((which, bytes)) = bytes.split_first() else { return false };
    let (key, wish) = match which % 4 {
        0 => match MigrateRequest::parse_from_bytes(bytes) {
            Ok(request) => {
                ((request.namespace, request.container), request.tuning.unwrap_or_default())
            }
            Err(_) => return false,
        },
        1 => match PlanRequest::parse_from_bytes(bytes) {
            Ok(request) => ((request.namespace, request.container), Tuning::default()),
            Err(_) => return false,
        },
        2 => return StatusRequest::parse_from_bytes(bytes).is_ok(),
        _ => return LimitRequest::parse_from_bytes(bytes).is_ok(),
    };
    let Ok(tuning) = tuning::choose(&wish, &Memory::default()) else { return false };
    tuning::budget(&tuning);
    source::key(&key.0, &key.1).is_ok()
}

/// A record of the book as it is on the disk.
pub fn record(bytes: &[u8]) -> bool {
    let Ok(record) = serde_json::from_slice::<Record>(bytes) else { return false };
    let again = serde_json::to_vec(&record).expect("a record serialises");
    assert_eq!(serde_json::from_slice::<Record>(&again).expect("what was written"), record);
    true
}
