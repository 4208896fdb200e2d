//! Peers and strangers that mean ill, at the agent's port.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time,
};
use transship_api::session::{Blob, Offer, Prepare, Verdict, agent_message::Message};
use transship_link::{Channel, Trust, connect_agent};
use transship_types::Code;

use super::world::{Side, World};
use crate::{offer::tests::offer, talk};

const SOON: Duration = Duration::from_secs(20);

async fn from(source: [u8; 4], to: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(to.parse().unwrap()).await.unwrap()
}

/// What the agent answers to bytes that are no TLS, until it closes.
async fn answer(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // It may be reset before it is written to, which is an answer as well.
    let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await;
    let read = time::timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("it hangs");
    drop(read);
    bytes
}

#[tokio::test]
async fn one_address_does_not_keep_the_others_out() {
    let dir = tempfile::tempdir().unwrap();
    crate::authority::init(&dir.path().join("ca")).unwrap();
    let side = Side::new(&dir, "b", |config| config.limits.connections = 4).await;
    let to = side.address();
    // They say nothing, and hold what they have.
    let mut silent = vec![from([127, 0, 0, 2], &to).await, from([127, 0, 0, 2], &to).await];
    let mut more = from([127, 0, 0, 2], &to).await;
    assert!(answer(&mut more).await.is_empty(), "a third one was let in");
    let mut other = from([127, 0, 0, 3], &to).await;
    assert!(!answer(&mut other).await.is_empty(), "another address was kept out");
    // What is given back can be had again.
    silent.clear();
    let again = async {
        while answer(&mut from([127, 0, 0, 2], &to).await).await.is_empty() {
            time::sleep(Duration::from_millis(5)).await;
        }
    };
    time::timeout(SOON, again).await.expect("its places are lost");
}

/// Node `a` in other hands: a connection of its own to `b`.
async fn hostile(world: &World) -> Channel {
    let trust: &Trust = &world.a.node.trust();
    connect_agent(trust, &world.b.address(), &"b".parse().unwrap()).await.unwrap()
}

/// What `b` says to these messages, one after the other, in the end.
async fn last_word(world: &World, messages: Vec<Message>) -> Option<Message> {
    let mut channel = hostile(world).await;
    for message in messages {
        let _ = talk::send(&mut channel, message).await;
    }
    let mut last = None;
    while let Ok(Ok(message)) = time::timeout(SOON, talk::receive(&mut channel)).await {
        last = Some(message);
        if let Some(Message::Failure(_)) = &last {
            break;
        }
    }
    last
}

#[tokio::test]
async fn what_is_out_of_turn_ends_the_session() {
    let world = World::new().await;
    let blob = || Message::Blob(Blob::default());
    for message in [blob(), Message::Prepare(Prepare {}), Message::Verdict(Verdict::default())] {
        let said = last_word(&world, vec![message]).await;
        let Some(Message::Failure(failure)) = said else { panic!("{said:?}") };
        assert_eq!(failure.code, Code::Malformed.to_string());
    }
    world.nothing_left().await;
}

#[tokio::test]
async fn an_offer_that_cannot_be_is_refused_and_nothing_is_made() {
    let world = World::new().await;
    let many = Offer { content: vec![offer().content[0].clone(); 1025], ..offer() };
    for bad in [Offer { container: "../x".into(), ..offer() }, many, Offer::default()] {
        let said = last_word(&world, vec![Message::Offer(bad)]).await;
        let Some(Message::Verdict(verdict)) = said else { panic!("{said:?}") };
        assert!(verdict.ticket.is_empty());
        assert_eq!(verdict.refusals[0].code, Code::Malformed.to_string());
    }
    assert!(world.b.node.book.records().is_empty());
    world.nothing_left().await;
}
