//! What is said before anything moves, with nothing touched on either side.

use transship_api::control::{PlanRequest, PlanResponse};
use transship_types::Code;

use super::world::{IMAGE, SPEC, Side, World};
use crate::{failure::Step, plan::plan, tests::world::nodes};

async fn ask(world: &World, change: impl FnOnce(&mut PlanRequest)) -> Step<PlanResponse> {
    let mut request = PlanRequest {
        namespace: world.key.namespace().into(),
        container: world.key.id().into(),
        node: format!("b@{}", world.cable.address),
        watch_us: 200_000,
        ..Default::default()
    };
    change(&mut request);
    plan(&world.a.node, &request).await
}

fn codes(plan: &PlanResponse) -> Vec<&str> {
    plan.refusals.iter().map(|r| r.code.as_str()).collect()
}

#[tokio::test]
async fn a_plan_has_everything_and_begins_nothing() {
    let world = World::new().await;
    let plan = ask(&world, |_| {}).await.unwrap();
    assert_eq!((plan.source.as_str(), plan.target.as_str()), ("a", "b"));
    assert!(plan.refusals.is_empty(), "{plan:?}");
    // The image is missing there.
    assert_eq!(plan.content_bytes, 8 + 2500 + 10);
    assert_eq!(plan.memory.written_pages, 6);
    assert!(plan.link.bytes > 0 && plan.link.rate > 0 && plan.link.round_trip_us > 0, "{plan:?}");
    let p = &plan.prediction;
    assert!(p.converges && !p.rounds.is_empty() && p.expected_downtime_us > 0, "{p:?}");
    let about: Vec<_> = plan.remarks.iter().map(|r| r.about.as_str()).collect();
    assert!(about.contains(&"shared-memory"), "{about:?}");

    assert_eq!(world.runs_on(), "a");
    for side in [&world.a, &world.b] {
        assert!(side.node.book.records().is_empty());
        assert!(side.fake.state().leases.is_empty());
    }
    assert!(world.b.fake.state().blobs.is_empty());
}

#[tokio::test]
async fn what_the_target_would_refuse_is_in_the_plan() {
    let world = World::new().await;
    world.b.fake.run(&world.key, IMAGE, SPEC);
    world.b.fake.state().disk_free = 0;
    let plan = ask(&world, |_| {}).await.unwrap();
    assert_eq!(codes(&plan), ["name-taken", "space"]);
    assert!(plan.prediction.is_some(), "it is said all the same");
}

#[tokio::test]
async fn without_a_target_there_is_still_the_container() {
    let world = World::new().await;
    let plan = ask(&world, |r| r.node = "b@127.0.0.1:1".into()).await.unwrap();
    assert_eq!(codes(&plan), ["unreachable"]);
    assert!(plan.memory.is_some() && plan.link.is_none() && plan.prediction.is_none());
}

#[tokio::test]
async fn a_node_that_does_not_admit_us_is_not_measured() {
    let world = World::new().await;
    let c = Side::new(&world.dir, "c", |config| config.receive_from = nodes("[]")).await;
    let plan = ask(&world, |r| r.node = format!("c@{}", c.address())).await.unwrap();
    assert_eq!(codes(&plan), ["not-allowed"]);
    assert!(plan.link.is_none(), "{plan:?}");
}

#[tokio::test]
async fn what_cannot_be_planned_is_an_error() {
    let world = World::new().await;
    type Change = fn(&mut PlanRequest);
    let cases: [(Code, Change); 4] = [
        (Code::UnknownContainer, |r| r.container = "nobody".into()),
        (Code::UnknownNode, |r| r.node = "nowhere".into()),
        (Code::Malformed, |r| r.watch_us = u64::MAX),
        (Code::Malformed, |r| r.tuning.mut_or_insert_default().lanes = 99),
    ];
    for (code, change) in cases {
        let failure = ask(&world, change).await.unwrap_err();
        assert_eq!(failure.0[0].code, code, "{failure:?}");
    }
    world.a.fake.hold("read");
    let live = world.begin().await.unwrap();
    world.a.fake.until("read").await;
    assert_eq!(ask(&world, |_| {}).await.unwrap_err().0[0].code, Code::Busy);
    world.a.fake.release("read");
    super::world::end(&live).await;
}
