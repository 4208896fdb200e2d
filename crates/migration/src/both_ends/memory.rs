//! The same with memory that travels by lane.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::world::{Cuts, Setup, World, patient};
use crate::{
    Budget, Compress, Options, Phase, Throttle,
    fake::{FakeMemory, Step},
    handoff::Ending,
    pages::RateLimit,
};

/// Two processes of 2 MiB each that write now and then.
fn memory() -> Arc<FakeMemory> {
    Arc::new(FakeMemory::new(512, 100, None))
}

fn with_memory() -> Setup {
    Setup { memory: Some(memory()), ..Setup::default() }
}

#[tokio::test]
async fn memory_arrives_as_it_was_at_the_freeze() {
    for (size, writes, lanes) in [(1, 0, 1), (512, 0, 2), (512, 100, 1), (2048, 4000, 3)] {
        let case = format!("{size} pages, {writes} writes, {lanes} lanes");
        let memory = Some(Arc::new(FakeMemory::new(size, writes, None)));
        let options = Options { lanes, ..patient() };
        let world = World::run(Setup { memory, options, ..Setup::default() }, |_, _, _| {}).await;
        world.departed(&case);

        let report = world.departure.memory.unwrap();
        assert!(report.page_less && report.lazy && report.fallback.is_none(), "{case}");
        assert_eq!((report.lanes, report.criu_pages), (lanes, 3), "{case}");
        let pages = world.source.memory.unwrap().contents().len() as u64;
        assert_eq!(report.total, pages * 4096, "{case}");
        assert_eq!(report.fill.unwrap().pages, pages, "{case}");
        assert!(report.rounds.len() >= 2, "{case}: one while it runs, and that of the pause");
        assert_eq!(report.rounds[0].dirty_pages, 2 * size, "{case}");
        let phases: Vec<_> =
            world.departure.times.times().iter().map(|(phase, _)| *phase).collect();
        let order = Phase::ORDER.into_iter().filter(|phase| *phase != Phase::PostCopy);
        assert_eq!(phases, order.collect::<Vec<_>>(), "{case}");
    }
}

#[tokio::test]
async fn a_failing_step_leaves_it_where_it_was() {
    let steps = Step::ALL.into_iter().chain(Step::OF_MEMORY);
    for step in steps.filter(|step| *step != Step::Discard) {
        let memory = Some(Arc::new(FakeMemory::new(512, 100, Some(step))));
        let setup = Setup { memory, ..Setup::failing(step) };
        World::run(setup, |_, _, _| {}).await.stayed_home(&format!("{step:?}"));
    }
}

#[tokio::test]
async fn the_source_hears_why_the_target_takes_no_more() {
    let setup = Setup { memory: Some(memory()), ..Setup::failing(Step::Store) };
    let world = World::run(setup, |_, _, _| {}).await;
    world.stayed_home("store");
    let error = world.departure.error.unwrap().to_string();
    assert!(error.contains("set aside"), "{error}");
}

#[tokio::test]
async fn cancelled_before_the_commit_it_stays() {
    for phase in Phase::ORDER.into_iter().filter(|phase| *phase < Phase::Commit) {
        let world = World::run(with_memory(), |now, _, cancel| {
            if now.phase == phase {
                cancel.cancel();
            }
        })
        .await;
        world.stayed_home(&format!("cancelled in {phase}"));
    }
}

#[tokio::test]
async fn cancelled_after_the_commit_it_goes_on() {
    for phase in [Phase::Commit, Phase::Depart, Phase::Fill] {
        let world = World::run(with_memory(), |now, _, cancel| {
            if now.phase == phase {
                cancel.cancel();
            }
        })
        .await;
        world.departed(&format!("cancelled in {phase}"));
    }
}

#[tokio::test]
async fn a_link_cut_before_the_commit_leaves_it_at_the_source() {
    for phase in Phase::ORDER.into_iter().filter(|phase| *phase < Phase::Commit) {
        let world = World::run(with_memory(), |now, cut, _| {
            if now.phase == phase {
                cut.all();
            }
        })
        .await;
        world.stayed_home(&format!("link cut in {phase}"));
    }
}

#[tokio::test]
async fn lanes_cut_while_they_are_needed_leave_it_at_the_source() {
    // Later all pages may have passed already.
    for phase in [Phase::Prepare, Phase::Rounds, Phase::Freeze, Phase::Dump] {
        let world = World::run(with_memory(), |now, cut, _| {
            if now.phase == phase {
                cut.lanes();
            }
        })
        .await;
        world.stayed_home(&format!("lanes cut in {phase}"));
    }
}

#[tokio::test]
async fn lanes_cut_later_lose_nothing() {
    for phase in [Phase::Transfer, Phase::Restore, Phase::Commit, Phase::Depart] {
        let world = World::run(with_memory(), |now, cut, _| {
            if now.phase == phase {
                cut.lanes();
            }
        })
        .await;
        match world.departure.ending {
            Ending::Departed => world.departed(&format!("lanes cut in {phase}")),
            _ => world.stayed_home(&format!("lanes cut in {phase}")),
        }
    }
}

#[tokio::test]
async fn a_link_cut_after_the_commit_is_never_two_running() {
    let world = World::run(with_memory(), |now, cut, _| {
        if now.phase == Phase::Commit {
            cut.all();
        }
    })
    .await;
    assert_eq!(world.departure.ending, Ending::InDoubt);
    assert!(!world.source.is_running() && !world.source.ended);
}

#[tokio::test]
async fn only_figures_are_lost_if_the_target_does_not_say_that_it_is_filled() {
    let setup = Setup { target_fails: Some(Step::Fill), ..with_memory() };
    let world = World::run(setup, |_, _, _| {}).await;
    world.departed("no word of the fill");
    let report = world.departure.memory.unwrap();
    assert!(report.lazy && report.fill.is_none());
}

#[tokio::test]
async fn pages_that_cannot_be_hidden_travel_in_the_images() {
    let setup = Setup { hides_nothing: true, ..with_memory() };
    let world = World::run(setup, |_, _, _| {}).await;
    world.departed("not hidden");
    let report = world.departure.memory.unwrap();
    assert!(!report.page_less && !report.lazy);
    assert_eq!(report.fallback.unwrap(), "it was asked not to");
    assert!(world.target.present.is_empty());
    assert_eq!(world.target.store.unwrap().bytes(), 0, "nothing stays in the store");
}

#[tokio::test]
async fn a_target_that_takes_no_lanes_gets_images() {
    let world = World::run(Setup { store: false, ..with_memory() }, |_, _, _| {}).await;
    world.departed("no store");
    assert!(world.departure.memory.is_none());
}

#[tokio::test]
async fn files_written_in_a_long_first_round_do_not_wait_for_the_pause() {
    let layer = tempfile::tempdir().unwrap();
    let file = layer.path().join("log");
    std::fs::write(&file, "before").unwrap();
    let memory = Some(Arc::new(FakeMemory::new(2500, 100, None)));
    // 20 MB take longer than a round that counts as long.
    let limit = Arc::new(RateLimit::new(6_000_000));
    let options = Options { limit, compress: Compress::Never, ..patient() };
    let setup = Setup { memory, options, layer: Some(layer.path().into()), ..Setup::default() };
    let passes = AtomicU32::new(0);
    let world = World::run(setup, |now, _, _| match (now.phase, now.round) {
        (Phase::Rounds, Some(round)) if round.number == 1 => {
            std::fs::write(&file, "within the first round").unwrap();
        }
        // What a pass says of itself.
        (Phase::Rounds, None) if now.bytes > 0 => {
            passes.fetch_add(1, Ordering::SeqCst);
        }
        (Phase::Freeze, _) => std::fs::write(&file, "at the freeze").unwrap(),
        _ => {}
    })
    .await;
    world.departed("a long first round");
    assert_eq!(passes.into_inner(), 1, "between the first two rounds");
    let arrived = world.directory.path().join("root").join("log");
    assert_eq!(std::fs::read_to_string(arrived).unwrap(), "at the freeze");
}

/// Writes 1 MiB whenever nobody looks, over a link of 8 MB/s.
pub(super) fn too_fast(throttle: Throttle) -> Setup {
    let memory = Some(Arc::new(FakeMemory::new(1024, 256, None)));
    let fixed = Duration::from_millis(10);
    let max_pause = Duration::from_millis(30);
    let budget = Budget { max_pause, fixed, throttle, ..Budget::default() };
    let limit = Arc::new(RateLimit::new(8_000_000));
    // These pages would shrink to nothing.
    let compress = Compress::Never;
    let options = Options { budget, limit, compress, ..Options::default() };
    Setup { memory, options, ..Setup::default() }
}

#[tokio::test]
async fn one_that_writes_faster_than_the_link_is_slowed_down() {
    let world = World::run(too_fast(Throttle::Auto), |_, _, _| {}).await;
    world.departed("slowed down");
    let report = world.departure.memory.unwrap();
    assert!(report.cpu_throttle_percentage > 0, "{report:?}");
    let throttle = &world.source.memory.as_ref().unwrap().throttle;
    assert_eq!(throttle.load(Ordering::SeqCst), 0, "its images are those of a free container");
}

#[tokio::test]
async fn whatever_ends_a_later_round_leaves_it_at_the_source() {
    type End = fn(&Cuts, &CancellationToken, &CancellationToken);
    let ends: [(&str, End); 4] = [
        ("link cut", |cuts, _, _| cuts.all()),
        ("lanes cut", |cuts, _, _| cuts.lanes()),
        ("cancelled", |_, cancel, _| cancel.cancel()),
        ("arrival cancelled", |_, _, cancel| cancel.cancel()),
    ];
    for (what, end) in ends {
        let setup = too_fast(Throttle::Auto);
        let cancel_arrival = setup.cancel_arrival.clone();
        let world = World::run(setup, |now, cuts, cancel| {
            if now.round.is_some_and(|round| round.number == 2) {
                end(cuts, cancel, &cancel_arrival);
            }
        })
        .await;
        world.stayed_home(what);
        assert_eq!(world.departure.error.unwrap().phase, Phase::Rounds, "{what}");
    }
}

#[tokio::test]
async fn cancelled_while_it_is_slowed_down_it_runs_on_at_full_speed() {
    let setup = too_fast(Throttle::Auto);
    let memory = setup.memory.clone().unwrap();
    let world = World::run(setup, |_, _, cancel| {
        if memory.throttle.load(Ordering::SeqCst) > 0 {
            cancel.cancel();
        }
    })
    .await;
    world.stayed_home("cancelled while slowed down");
}

#[tokio::test]
async fn given_up_it_runs_on_and_may_try_again() {
    let world = World::run(too_fast(Throttle::Never), |_, _, _| {}).await;
    world.stayed_home("given up");
    let failed = world.departure.error.unwrap();
    assert_eq!(failed.phase, Phase::Rounds, "it never stood still");
    assert!(failed.to_string().contains("--throttle auto"), "{failed}");
    assert!(world.departure.memory.unwrap().rounds.len() > 1);

    let mut again = too_fast(Throttle::Never);
    again.options.budget.max_pause = Duration::from_secs(3600);
    again.memory = world.source.memory;
    World::run(again, |_, _, _| {}).await.departed("again");
}
