//! The same where the container runs on the target before its memory is there.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use super::{
    memory::too_fast,
    world::{Setup, World, is_empty},
};
use crate::{
    Evidence, Phase, PostCopy, Throttle,
    fake::Step,
    handoff::Ending,
    journal::{self, State},
    settle,
};

/// Writes faster than the link carries, and may run before its pages are there.
fn late() -> Setup {
    let mut setup = too_fast(Throttle::Never);
    setup.options.budget.post_copy = PostCopy::Auto;
    setup
}

fn last_record(world: &World) -> State {
    let journals = world.directory.path().join("journal");
    let path = std::fs::read_dir(journals).unwrap().next().unwrap().unwrap().path();
    journal::read(&path).unwrap().pop().unwrap().state
}

#[tokio::test]
async fn it_runs_before_its_memory_is_there_and_gets_all_of_it() {
    let world = World::run(late(), |_, _, _| {}).await;
    world.departed("post-copy");
    let report = world.departure.memory.as_ref().unwrap();
    let late = report.post_copy.unwrap();
    assert!(late.pages > 0 && late.requests > 0 && late.request_bytes > 0, "{late:?}");
    assert_eq!(late.recoveries, 0);
    assert!(report.fill.is_some());
    assert_eq!(last_record(&world), State::Released, "recorded once all was there");
    let phases: Vec<_> = world.departure.times.times().iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, Phase::ORDER);
}

#[tokio::test]
async fn without_need_no_page_is_late() {
    let mut setup = late();
    setup.options.budget.max_pause = Duration::from_secs(3600);
    let world = World::run(setup, |_, _, _| {}).await;
    world.departed("no need");
    assert_eq!(world.departure.memory.unwrap().post_copy, None);
}

#[tokio::test]
async fn a_link_that_breaks_while_pages_are_owed_costs_only_time() {
    let cut = AtomicU32::new(0);
    let world = World::run(late(), |now, cuts, _| {
        // Some bytes of them have gone, three times over.
        let begun = now.phase == Phase::PostCopy && now.bytes > 0;
        if begun && cut.fetch_add(1, Ordering::SeqCst) < 3 {
            cuts.all();
        }
    })
    .await;
    world.departed("cut while owed");
    let late = world.departure.memory.unwrap().post_copy.unwrap();
    // A connection may break once more before it is complete.
    assert!(late.recoveries > 0, "{late:?}");
}

#[tokio::test]
async fn lanes_that_break_while_pages_are_owed_cost_only_time() {
    let cut = AtomicU32::new(0);
    let world = World::run(late(), |now, cuts, _| {
        if now.phase == Phase::PostCopy && cut.fetch_add(1, Ordering::SeqCst) == 0 {
            cuts.lanes();
        }
    })
    .await;
    world.departed("lanes cut while owed");
}

#[tokio::test]
async fn whatever_fails_before_the_commit_leaves_it_where_it_was() {
    for phase in Phase::ORDER.into_iter().filter(|phase| *phase < Phase::Commit) {
        let world = World::run(late(), |now, cut, _| {
            if now.phase == phase {
                cut.all();
            }
        })
        .await;
        world.stayed_home(&format!("link cut in {phase}"));
    }
    for step in [Step::Guard, Step::Restore, Step::Resume, Step::LastScan, Step::Lie] {
        let mut setup = Setup { source_fails: Some(step), target_fails: Some(step), ..late() };
        if matches!(step, Step::LastScan | Step::Lie) {
            let memory = crate::fake::FakeMemory::new(1024, 256, Some(step));
            setup.memory = Some(std::sync::Arc::new(memory));
        }
        World::run(setup, |_, _, _| {}).await.stayed_home(&format!("{step:?}"));
    }
}

#[tokio::test]
async fn a_doubt_with_debts_is_settled_by_paying_them() {
    let world = World::run(late(), |now, cut, _| {
        if now.phase == Phase::Commit {
            cut.all();
        }
    })
    .await;
    assert_eq!(world.departure.ending, Ending::InDoubt);
    let World { mut source, target, departure, arrival, rest, directory } = world;
    let doubt = departure.doubt.unwrap();
    assert!(doubt.owes());
    if !target.running {
        // The cut was faster than the commit.
        let (ending, _) = settle(&mut source, doubt, Evidence::NotThere, None).await.unwrap();
        assert_eq!(ending, Ending::StayedHome);
        return;
    }
    assert!(arrival.is_ok() && !source.is_running() && !source.ended);
    let (ending, settled) = settle(&mut source, doubt, Evidence::MayLack, None).await.unwrap();
    settled.unwrap();
    assert_eq!(ending, Ending::Departed);
    assert!(source.ended, "its tasks end only now");
    rest.unwrap().await.unwrap();
    let contents = target.store.unwrap().contents(&target.present);
    assert!(source.memory.unwrap().contents() == contents, "the memory differs");
    assert!(is_empty(&directory.path().join("source-journal")));
}

#[tokio::test]
async fn lost_there_while_pages_are_owed_it_stays_as_it_is_here() {
    let setup = Setup { target_fails: Some(Step::Fill), ..late() };
    let world = World::run(setup, |_, _, _| {}).await;
    assert_eq!(world.departure.ending, Ending::InDoubt);
    assert!(!world.source.is_running() && !world.source.ended, "a person may still save it");
    let error = world.departure.error.unwrap().to_string();
    assert!(error.contains("lost there") && error.contains("Fill fails"), "{error}");
    assert!(world.departure.doubt.unwrap().owes());
    world.rest.unwrap().await.unwrap();
}
