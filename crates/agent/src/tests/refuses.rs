//! What is refused, with nothing touched on either side.

use std::collections::HashSet;

use futures::FutureExt;
use transship_api::session::{
    Consider, Inquiry, LinkProbe, Prepare, Probe, agent_message::Message,
};
use transship_types::Code;

use super::world::{IMAGE, SPEC, Side, World, ending, nodes};
use crate::{
    book::{End, Ending},
    daemon::TaskStatus,
    source, talk,
};

/// One change to the world, and the code it is refused with.
async fn refused(change: impl FnOnce(&mut World)) -> (Vec<Code>, World) {
    let mut world = World::new().await;
    change(&mut world);
    let before = world.a.fake.status(&world.key);
    let (ending, codes, outcome) = ending(&world.migrate().await);
    assert_eq!(ending, Ending::StayedHome);
    assert_eq!(world.a.fake.status(&world.key), before, "{outcome}");
    assert!(world.b.fake.state().leases.is_empty());
    assert_ne!(world.at_target(), Some(Ending::Arrived));
    (codes, world)
}

#[tokio::test]
async fn what_the_source_knows_is_refused_there() {
    let (codes, _) = refused(|w| w.a.fake.state().containers.clear()).await;
    assert_eq!(codes, [Code::UnknownContainer]);
    let (codes, _) = refused(|w| w.a.fake.set_status(&w.key, TaskStatus::Stopped)).await;
    assert_eq!(codes, [Code::NotRunning]);
    let (codes, _) = refused(|w| {
        w.a.fake.state().containers.get_mut(&w.key).unwrap().record.runtime = "io.x.runc.v2".into();
    })
    .await;
    assert_eq!(codes, [Code::ForeignRuntime]);
    let (codes, _) = refused(|w| {
        w.a.fake.state().containers.get_mut(&w.key).unwrap().task = None;
    })
    .await;
    assert_eq!(codes, [Code::NotRunning]);
}

#[tokio::test]
async fn the_target_gives_every_reason_at_once() {
    let (codes, world) = refused(|w| {
        w.a.fake.run(&w.key, IMAGE, "{}");
        w.b.fake.run(&w.key, IMAGE, SPEC);
        w.b.fake.state().disk_free = 0;
    })
    .await;
    let wanted = HashSet::from([Code::NameTaken, Code::HostNetwork, Code::Space]);
    assert_eq!(codes.into_iter().collect::<HashSet<_>>(), wanted);
    // What bears the name there was not touched.
    assert_eq!(world.b.fake.status(&world.key), Some(TaskStatus::Running));
    assert!(world.at_target().is_none());
}

#[tokio::test]
async fn an_image_on_neither_node_is_refused_and_nothing_is_left() {
    let (codes, world) = refused(|w| {
        w.a.fake.state().blobs.retain(|_, bytes| bytes.len() != 10);
    })
    .await;
    assert_eq!(codes, [Code::Image]);
    world.nothing_left().await;
}

#[tokio::test]
async fn a_node_that_is_unknown_or_not_there_is_refused() {
    let world = World::new().await;
    for (node, code) in [
        ("nowhere", Code::UnknownNode),
        ("b@nonsense", Code::UnknownNode),
        ("B@127.0.0.1:1", Code::UnknownNode),
        ("a@127.0.0.1:1", Code::UnknownNode),
        ("b@127.0.0.1:1", Code::Unreachable),
    ] {
        let mut request = world.request();
        request.node = node.into();
        let codes = match source::begin(&world.a.node, &request).await {
            Ok(live) => ending(&super::world::end(&live).await).1,
            Err(failure) => failure.0.iter().map(|r| r.code).collect(),
        };
        assert_eq!(codes, [code], "{node}");
    }
    assert_eq!(world.runs_on(), "a");
}

#[tokio::test]
async fn a_node_of_another_ca_is_refused() {
    let (ours, theirs) = (World::new().await, World::new().await);
    ours.cable.reroute(theirs.b.address());
    let (_, codes, _) = ending(&ours.migrate().await);
    assert_eq!(codes, [Code::NotTrusted]);
    assert_eq!(ours.runs_on(), "a");
}

#[tokio::test]
async fn another_node_under_the_address_is_refused() {
    let world = World::new().await;
    let c = Side::new(&world.dir, "c", |_| {}).await;
    world.cable.reroute(c.address());
    let (_, codes, _) = ending(&world.migrate().await);
    assert_eq!(codes, [Code::NotTrusted]);
    assert_eq!(world.runs_on(), "a");
}

#[tokio::test]
async fn a_node_that_may_not_send_here_is_refused_whatever_it_asks() {
    let world = World::new().await;
    let c = Side::new(&world.dir, "c", |config| config.receive_from = nodes(r#"["x*"]"#)).await;
    // It would fail at once, and otherwise.
    c.fake.die(true);
    let to = format!("c@{}", c.address());
    let mut request = world.request();
    request.node = to.clone();
    let live = source::begin(&world.a.node, &request).await.unwrap();
    let end = super::world::end(&live).await;
    assert_eq!(ending(&end).1, [Code::NotAllowed]);
    let End::Failed { refusals, .. } = end else { panic!("it moved") };
    assert!(refusals[0].reason.contains("c: it takes no containers from a"), "{refusals:?}");
    assert!(refusals[0].remedy.contains("add a to `receive_from`"), "{refusals:?}");
    assert!(c.node.book.records().is_empty(), "nothing was written down");
    assert_eq!(world.runs_on(), "a");

    let offer = crate::offer::tests::offer();
    for message in [
        Message::Probe(Probe {}),
        Message::Offer(offer.clone()),
        Message::Consider(Consider { offer: Some(offer) }),
        Message::LinkProbe(LinkProbe {}),
        Message::Prepare(Prepare {}),
    ] {
        let shown = format!("{message:?}");
        match ask(&world.a, &c, message).await {
            Message::Failure(refused) => assert_eq!(refused.code, "not-allowed", "{shown}"),
            other => panic!("{shown}: {other:?}"),
        }
    }
    let inquiry = Message::Inquiry(Inquiry { migration: live.migration.to_string() });
    assert!(
        matches!(ask(&world.a, &c, inquiry).await, Message::Standing(s) if s.state == "unknown")
    );
    let checked = crate::check::check(&world.a.node, &to).await;
    assert!(checked.iter().any(|r| r.detail.contains("takes no containers from a")), "{checked:?}");
}

async fn ask(from: &Side, to: &Side, question: Message) -> Message {
    let (trust, name) = (&from.node.trust(), to.node.name());
    let channel = transship_link::connect_agent(trust, &to.address(), name).await.unwrap();
    talk::ask(channel, question, std::time::Duration::from_secs(20)).await.unwrap()
}

#[tokio::test]
async fn a_node_sends_to_whom_it_may_and_dials_nobody_else() {
    let mut world = World::new().await;
    world.a.close().await;
    let fake = world.a.fake.clone();
    world.a = Side::over(&world.dir, "a", fake, |c| c.send_to = nodes(r#"["x*"]"#)).await;
    // Whoever is dialled would say so.
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.cable.reroute(nobody.local_addr().unwrap().to_string());
    let (ending, codes, _) = ending(&world.migrate().await);
    assert_eq!((ending, codes), (Ending::StayedHome, vec![Code::NotAllowed]));
    let checked = crate::check::check(&world.a.node, &world.request().node).await;
    assert!(checked.iter().any(|r| r.detail == "a sends no containers to b"), "{checked:?}");
    let dialled = nobody.accept().now_or_never();
    assert!(dialled.is_none(), "{dialled:?}");
    assert!(world.a.node.book.records().is_empty());
}

#[tokio::test]
async fn tuning_that_cannot_be_is_refused_before_anything() {
    let world = World::new().await;
    for (post_copy, lanes, code) in [
        ("sometimes", 1, Code::Malformed),
        ("", 99, Code::Malformed),
        ("auto", 1, Code::Unsupported),
    ] {
        let mut request = world.request();
        let tuning = request.tuning.mut_or_insert_default();
        (tuning.post_copy, tuning.lanes) = (post_copy.into(), lanes);
        let codes = match source::begin(&world.a.node, &request).await {
            Ok(live) => ending(&super::world::end(&live).await).1,
            Err(failure) => failure.0.iter().map(|r| r.code).collect(),
        };
        assert_eq!(codes, [code], "{post_copy} {lanes}");
    }
    assert_eq!(world.runs_on(), "a");
    assert!(world.at_target().is_none());
}

/// Whatever fails on the target before the commit is undone there.
#[tokio::test]
async fn a_failure_on_the_target_leaves_nothing() {
    for point in ["lease", "write", "create", "start", "restore"] {
        let world = World::new().await;
        world.b.fake.state().fail.insert(point, "no luck");
        let (ending, codes, outcome) = ending(&world.migrate().await);
        assert_eq!(ending, Ending::StayedHome, "{point}: {outcome}");
        assert!(codes.contains(&Code::Daemon), "{point}: {codes:?}");
        assert_eq!(world.runs_on(), "a", "{point}");
        assert!(outcome.contains("redis is RUNNING on a"), "{point}: {outcome}");
        world.nothing_left().await;
    }
}
