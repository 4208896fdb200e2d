//! What happens when nothing goes wrong.

use super::world::{World, end, ending, eventually};
use crate::{
    book::{End, Ending},
    daemon::TaskStatus,
};

fn moved(end: End) -> transship_api::control::Report {
    match end {
        End::Moved(report) => *report,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_container_moves_with_its_image() {
    let world = World::new().await;
    let report = moved(world.migrate().await);
    assert_eq!(world.runs_on(), "b");
    assert_eq!((report.source.as_str(), report.target.as_str()), ("a", "b"));
    assert_eq!(
        (report.source_state.as_str(), report.target_state.as_str()),
        ("DELETED", "RUNNING")
    );
    assert_eq!((report.target_pid, report.downtime_us), (77, 7));
    assert_eq!(report.content_bytes, 8 + 2500 + 10);
    let phases: Vec<_> = report.phases.iter().map(|p| p.phase.as_str()).collect();
    assert_eq!(
        phases,
        ["inspect", "connect", "offer", "content", "prepare", "confirm", "clean up"]
    );

    assert!(world.a.fake.state().containers.is_empty());
    assert_eq!(world.at_target(), Some(Ending::Arrived));
    let state = world.b.fake.state();
    assert!(state.leases.is_empty(), "the lease was given up");
    assert_eq!(state.blobs, world.a.fake.state().blobs);
}

#[tokio::test]
async fn what_the_target_has_is_not_sent() {
    let world = World::new().await;
    let blobs = world.a.fake.state().blobs.clone();
    world.b.fake.state().blobs = blobs;
    assert_eq!(moved(world.migrate().await).content_bytes, 0);
}

#[tokio::test]
async fn keep_leaves_the_stopped_record() {
    let world = World::new().await;
    let mut request = world.request();
    request.keep = true;
    let live = crate::source::begin(&world.a.node, &request).await.unwrap();
    let report = moved(end(&live).await);
    assert_eq!(report.source_state, "STOPPED");
    assert_eq!(world.a.fake.status(&world.key), Some(TaskStatus::Stopped));
    assert_eq!(world.runs_on(), "b");
}

/// The container is safe; that its old record could not be removed is told.
#[tokio::test]
async fn a_failed_clean_up_is_not_a_failed_migration() {
    let world = World::new().await;
    world.a.fake.state().fail.insert("remove", "disk full");
    let report = moved(world.migrate().await);
    assert_eq!(report.source_state, "STOPPED");
    let record = &world.a.node.book.records()[0];
    assert_eq!(record.ending, Ending::Departed);
    assert!(record.error.contains("disk full"), "{}", record.error);
}

#[tokio::test]
async fn there_and_back() {
    let world = World::new().await;
    moved(world.migrate().await);
    let mut request = world.request();
    request.node = format!("a@{}", world.a.address());
    let live = crate::source::begin(&world.b.node, &request).await.unwrap();
    moved(end(&live).await);
    assert_eq!(world.runs_on(), "a");
}

#[tokio::test]
async fn a_container_moves_once_at_a_time() {
    let world = World::new().await;
    world.a.fake.hold("pages");
    let live = world.begin().await.unwrap();
    world.a.fake.until("pages").await;
    let (second, codes, _) = ending(&world.migrate().await);
    assert_eq!((second, codes), (Ending::StayedHome, vec![transship_types::Code::Busy]));
    world.a.fake.release("pages");
    moved(end(&live).await);
    eventually("b runs it", || world.runs_on() == "b").await;
}

/// Start was answered with an error although the container runs.
#[tokio::test]
async fn a_lost_answer_of_the_daemon_loses_no_container() {
    let world = World::new().await;
    world.b.fake.state().fail.insert("running", "the answer got lost");
    let end = world.migrate().await;
    assert_eq!(world.runs_on(), "b", "{end:?}");
    assert_eq!(world.at_target(), Some(Ending::Arrived));
}
