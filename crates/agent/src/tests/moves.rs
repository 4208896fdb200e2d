//! What happens when nothing goes wrong.

use super::world::{Side, World, end, ending, eventually};
use crate::{
    book::{End, Ending},
    control::Control,
    daemon::TaskStatus,
    source,
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
        [
            "inspect", "connect", "offer", "content", "prepare", "rounds", "freeze", "confirm",
            "clean up"
        ]
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

/// The request's wish, then the configuration's; the shim says what it made
/// of it, and the book keeps that.
#[tokio::test]
async fn the_shim_hears_how_memory_is_to_travel_and_its_report_is_kept() {
    let mut world = World::new().await;
    world.a.close().await;
    let fake = world.a.fake.clone();
    world.a = Side::over(&world.dir, "a", fake, |config| {
        config.memory.lanes = Some(3);
        config.memory.max_pause = Some(std::time::Duration::from_millis(9));
    })
    .await;
    let mut request = world.request();
    request.tuning.mut_or_insert_default().lanes = 5;
    let live = source::begin(&world.a.node, &request).await.unwrap();
    let report = moved(end(&live).await);
    assert_eq!((report.memory.lanes, report.memory.expected_downtime_us), (5, 9000));
    assert_eq!(world.a.node.book.report(&live.migration).await.unwrap(), report);
}

#[tokio::test]
async fn one_that_stayed_home_has_a_report_too() {
    let world = World::new().await;
    world.b.fake.state().fail.insert("restore", "no luck");
    let live = world.begin().await.unwrap();
    assert_eq!(ending(&end(&live).await).0, Ending::StayedHome);
    let report = world.a.node.book.report(&live.migration).await.unwrap();
    let phases: Vec<_> = report.phases.iter().map(|p| p.phase.as_str()).collect();
    assert_eq!(phases, ["inspect", "connect", "offer", "content", "prepare", "rounds", "freeze"]);
    assert!(report.target_state.is_empty());
}

#[tokio::test]
async fn the_bandwidth_changes_while_memory_travels_and_only_then() {
    let world = World::new().await;
    let control = Control(world.a.node.clone());
    let book = &world.a.node.book;
    world.a.fake.hold("read");
    let live = world.begin().await.unwrap();
    world.a.fake.until("read").await;
    let early = control.adjust(&book.record(&live.migration).unwrap(), 5).await.unwrap_err();
    assert!(early.sentence().contains("does not travel yet"), "{early:?}");

    world.a.fake.hold("pages");
    world.a.fake.release("read");
    world.a.fake.until("pages").await;
    control.adjust(&book.record(&live.migration).unwrap(), 5).await.unwrap();
    assert_eq!(world.a.fake.adjusted.lock().unwrap()[&world.key], 5);
    let at_target = world.b.node.book.record(&live.migration).unwrap();
    let elsewhere = Control(world.b.node.clone()).adjust(&at_target, 5).await.unwrap_err();
    assert!(elsewhere.sentence().contains("is sent by a"), "{elsewhere:?}");

    world.a.fake.release("pages");
    moved(end(&live).await);
    let late = control.adjust(&book.record(&live.migration).unwrap(), 5).await.unwrap_err();
    assert!(late.sentence().contains("has ended before: departed"), "{late:?}");
}
