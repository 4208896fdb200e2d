//! What a ticket is good for, and for whom.

use tokio::net::TcpStream;
use transship_api::session::{Inquiry, Offer, agent_message::Message};
use transship_link::{connect_agent, connect_ticket};
use transship_types::{Code, Ticket};

use super::{
    fake::RUNTIME,
    world::{Side, World, end, host},
};
use crate::{book::End, talk};

/// A target that was admitted to hand out a ticket, and the ticket.
async fn offer(from: &Side, to: &Side, offer: Offer) -> Result<Ticket, String> {
    let trust = &from.node.trust();
    let channel = connect_agent(trust, &to.address(), to.node.name()).await.unwrap();
    let limit = std::time::Duration::from_secs(20);
    match talk::ask(channel, Message::Offer(offer), limit).await.unwrap() {
        Message::Verdict(verdict) => match verdict.refusals.first() {
            None => Ok(verdict.ticket.parse().unwrap()),
            Some(refusal) => Err(refusal.code.clone()),
        },
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_ticket_is_worth_nothing_once_its_migration_is_over() {
    let world = World::new().await;
    let live = world.begin().await.unwrap();
    assert!(matches!(end(&live).await, End::Moved(_)));
    let ticket = world.b.fake.state().tickets[&world.key].clone();
    let trust = &world.a.node.trust();
    let again = connect_ticket(trust, &world.b.address(), world.b.node.name(), &ticket).await;
    assert!(again.is_err(), "{:?}", again.map(|channel| channel.peer));
    // And the agent serves on.
    TcpStream::connect(world.b.address()).await.unwrap();
}

#[tokio::test]
async fn a_migration_is_offered_once() {
    let world = World::new().await;
    let live = world.begin().await.unwrap();
    assert!(matches!(end(&live).await, End::Moved(_)));
    // As after the container's end there.
    world.b.fake.state().containers.clear();
    let mut replay = crate::offer::tests::offer();
    replay.host = Some(host());
    replay.record.as_mut().unwrap().runtime = RUNTIME.into();
    let another = offer(&world.a, &world.b, replay.clone()).await;
    another.expect("nothing else is wrong with it");
    replay.migration = live.migration.to_string();
    replay.container = "another".into();
    let refused = offer(&world.a, &world.b, replay).await.unwrap_err();
    assert_eq!(refused, Code::Malformed.as_str());
}

/// How a container fared is for the node that sent it.
#[tokio::test]
async fn another_node_learns_nothing_of_a_migration() {
    let world = World::new().await;
    let c = Side::new(&world.dir, "c", |_| {}).await;
    let live = world.begin().await.unwrap();
    assert!(matches!(end(&live).await, End::Moved(_)));
    let inquiry = Message::Inquiry(Inquiry { migration: live.migration.to_string() });
    for (side, state) in [(&world.a, "arrived"), (&c, "unknown")] {
        let (trust, b) = (&side.node.trust(), &world.b);
        let channel = connect_agent(trust, &b.address(), b.node.name()).await.unwrap();
        let answer = talk::ask(channel, inquiry.clone(), std::time::Duration::from_secs(20)).await;
        assert!(matches!(answer.unwrap(), Message::Standing(s) if s.state == state), "{state}");
    }
}
