//! A person decides a doubt, and the other side comes back.

use transship_api::control::{ResolveRequest, ResolveResponse};
use transship_types::Code;

use super::world::{Side, World, end, ending, eventually};
use crate::{
    book::{Ending, Live, Role},
    daemon::TaskStatus,
    failure::Step,
    resolve,
};

/// In doubt on `a`; `b` runs it, has written that down, and cannot be reached.
async fn in_doubt() -> (World, std::sync::Arc<Live>) {
    let (world, live) = World::in_doubt().await;
    eventually("b has it", || world.at_target() == Some(Ending::Arrived)).await;
    (world, live)
}

async fn decide(side: &Side, choice: &str) -> Step<ResolveResponse> {
    let record = side.node.book.records().pop().unwrap();
    let request = ResolveRequest { choice: choice.into(), ..Default::default() };
    resolve::resolve(&side.node, record, &request).await
}

fn of(side: &Side) -> crate::book::Record {
    side.node.book.records().pop().unwrap()
}

#[tokio::test]
async fn what_runs_here_by_decision_ends_there_as_soon_as_it_hears() {
    let (world, live) = in_doubt().await;
    let answer = decide(&world.a, "run-here").await.unwrap();
    assert_eq!((answer.by.as_str(), answer.ending.as_str()), ("person", "stayed-home"));
    assert_eq!(ending(&end(&live).await).0, Ending::StayedHome);
    // The risk that was taken.
    assert_eq!(world.runs_on(), "both");
    let decision = of(&world.a).decision.unwrap();
    assert!(!decision.followed && decision.epoch.0 == 2, "{decision:?}");
    // Nothing is left to decide.
    assert_eq!(decide(&world.a, "discard").await.unwrap_err().0[0].code, Code::NotRunning);

    world.cable.reroute(world.b.address());
    eventually("b follows", || of(&world.a).decision.unwrap().followed).await;
    assert_eq!(world.runs_on(), "a");
    assert_eq!(world.at_target(), Some(Ending::Discarded));
    for side in [&world.a, &world.b] {
        let record = of(side);
        assert!(record.decision.unwrap().both_ran && record.error.contains("ran"));
        let doubt = resolve::doubt(&side.node, &of(side), None).unwrap();
        assert!(doubt.both_ran && doubt.followed);
    }
    // The container is free to move again.
    let live = world.begin().await.unwrap();
    assert_eq!((ending(&end(&live).await).0, world.runs_on()), (Ending::Departed, "b"));
}

/// The decision is on disk; both agents end before it was told or followed.
#[tokio::test]
async fn a_decision_survives_restarts_of_both() {
    let (mut world, _live) = in_doubt().await;
    decide(&world.a, "run-here").await.unwrap();
    world.a.close().await;
    // It dies between its record and the act.
    world.b.fake.hold("end");
    let a = Side::over(&world.dir, "a", world.a.fake.clone(), |_| {}).await;
    world.cable.reroute(world.b.address());
    world.b.fake.until("end").await;
    let fake = world.b.fake.clone();
    world.cable.reroute("127.0.0.1:1".into());
    world.cable.cut();
    fake.state().fail.insert("end", "it dies");
    fake.release("end");
    world.b.close().await;
    assert_eq!(fake.status(&world.key), Some(TaskStatus::Running));

    let b = Side::over(&world.dir, "b", fake, |_| {}).await;
    world.cable.reroute(b.address());
    eventually("b follows", || of(&a).decision.unwrap().followed).await;
    assert_eq!(of(&b).ending, Ending::Discarded);
    assert_eq!(b.fake.status(&world.key), None);
}

#[tokio::test]
async fn what_is_discarded_here_never_runs_here_again() {
    let (world, live) = in_doubt().await;
    let answer = decide(&world.a, "discard").await.unwrap();
    assert_eq!((answer.by.as_str(), answer.ending.as_str()), ("person", "discarded"));
    assert_eq!(ending(&end(&live).await).0, Ending::Discarded);
    world.cable.reroute(world.b.address());
    assert_eq!(world.runs_on(), "b");
    assert_eq!(world.at_target(), Some(Ending::Arrived));
}

#[tokio::test]
async fn nobody_decides_while_there_is_proof_to_be_had() {
    // It answers, and knows.
    let (world, _live) = in_doubt().await;
    world.cable.reroute(world.b.address());
    match decide(&world.a, "run-here").await {
        Ok(answer) => {
            assert_eq!((answer.by.as_str(), answer.ending.as_str()), ("proof", "departed"));
        }
        // It was faster by itself.
        Err(failure) => assert_eq!(failure.0[0].code, Code::NotRunning, "{failure:?}"),
    }
    assert_eq!((world.runs_on(), of(&world.a).decision), ("b", None));

    // It answers, and does not know yet.
    let world = World::new().await;
    world.b.fake.hold("running");
    let live = world.begin().await.unwrap();
    world.b.fake.until("running").await;
    world.cable.cut();
    live.watch().wait_for(|v| v.in_doubt).await.unwrap();
    let refused = decide(&world.a, "run-here").await.unwrap_err();
    assert_eq!(refused.0[0].code, Code::Busy, "{refused:?}");
    world.b.fake.release("running");
    assert_eq!((ending(&end(&live).await).0, world.runs_on()), (Ending::Departed, "b"));
}

#[tokio::test]
async fn only_a_doubt_is_decided() {
    let world = World::new().await;
    world.a.fake.hold("pages");
    let live = world.begin().await.unwrap();
    world.a.fake.until("pages").await;
    for (side, choice, code) in [
        (&world.a, "run-here", Code::Busy),
        (&world.b, "run-here", Code::NotRunning),
        (&world.b, "discard", Code::Busy),
        (&world.a, "as you like", Code::Malformed),
    ] {
        let refused = decide(side, choice).await.unwrap_err();
        assert_eq!(refused.0[0].code, code, "{refused:?}");
    }
    world.a.fake.release("pages");
    assert_eq!(ending(&end(&live).await).0, Ending::Departed);
}

/// Whoever has not sent it has nothing to say about it.
#[tokio::test]
async fn another_node_decides_nothing() {
    use transship_api::session::{Decision, agent_message::Message};
    let world = World::new().await;
    let live = world.begin().await.unwrap();
    assert_eq!(ending(&end(&live).await).0, Ending::Departed);
    let c = Side::new(&world.dir, "c", |_| {}).await;
    let name = "b".parse().unwrap();
    let channel =
        transship_link::connect_agent(&c.node.trust(), &world.b.address(), &name).await.unwrap();
    let decision = Decision { migration: live.migration.to_string(), epoch: 9 };
    let limit = std::time::Duration::from_secs(10);
    let answer = crate::talk::ask(channel, Message::Decision(decision), limit).await.unwrap();
    let Message::Standing(standing) = answer else { panic!("{answer:?}") };
    assert_eq!((standing.state.as_str(), world.runs_on()), ("unknown", "b"));
    assert_eq!(of(&world.b).role, Role::Target);
}
