//! The link is cut, or an agent ends, in every phase: one container remains.

use std::path::Path;

use transship_migration::{
    Journal,
    journal::{self, State, Subject},
};
use transship_types::{Epoch, MigrationId, Ticket};

use super::world::{Side, World, end, ending, eventually};
use crate::{
    book::{Book, Ending, Record, Role},
    daemon::TaskStatus,
};

/// Points before the commit, and the side that is held there.
const BEFORE: [(&str, char); 7] = [
    ("read", 'a'),
    ("write", 'b'),
    ("create", 'b'),
    ("start", 'b'),
    ("pages", 'a'),
    ("restore", 'b'),
    ("prepared", 'a'),
];

#[tokio::test]
async fn a_cut_before_the_commit_leaves_it_on_the_source() {
    for (point, side) in BEFORE {
        let world = World::new().await;
        let held = if side == 'a' { &world.a } else { &world.b };
        held.fake.hold(point);
        let live = world.begin().await.unwrap();
        held.fake.until(point).await;
        world.cable.cut();
        held.fake.release(point);
        // The last two are cut between the shims as well, where the source's
        // may already have sent its commit into the void.
        let (ending, _, outcome) = ending(&end(&live).await);
        assert_eq!(ending, Ending::StayedHome, "{point}: {outcome}");
        eventually(point, || world.runs_on() == "a").await;
        world.nothing_left().await;
    }
}

/// The target has the commit, the source does not know: it asks.
#[tokio::test]
async fn a_cut_after_the_commit_is_settled_by_the_targets_proof() {
    for (point, side) in [("committed", 'a'), ("running", 'b')] {
        let world = World::new().await;
        let held = if side == 'a' { &world.a } else { &world.b };
        // The target must have it before the cut.
        world.b.fake.hold("running");
        held.fake.hold(point);
        let live = world.begin().await.unwrap();
        world.b.fake.until("running").await;
        held.fake.until(point).await;
        world.cable.cut();
        held.fake.release(point);
        world.b.fake.release("running");
        let (ending, _, outcome) = ending(&end(&live).await);
        assert_eq!((ending, world.runs_on()), (Ending::Departed, "b"), "{point}: {outcome}");
        assert_eq!(world.at_target(), Some(Ending::Arrived), "{point}");
    }
}

/// The source's agent ends in doubt; its next run takes the doubt up.
#[tokio::test]
async fn a_doubt_survives_a_restart_of_the_source() {
    let (mut world, live) = World::in_doubt().await;
    world.a.close().await;
    drop(live);

    world.cable.reroute(world.b.address());
    let a = Side::over(&world.dir, "a", world.a.fake.clone(), |_| {}).await;
    let settled = || a.node.book.records()[0].ending == Ending::Departed;
    eventually("the doubt ends", settled).await;
    assert_eq!(world.runs_on(), "b");
    assert!(world.a.fake.state().containers.is_empty());
}

/// A shim that hangs when the proof comes is told until it has taken it.
#[tokio::test]
async fn a_shim_is_told_of_the_proof_until_it_hears() {
    let world = World::new().await;
    world.a.fake.state().deaf = 20;
    world.b.fake.hold("running");
    let live = world.begin().await.unwrap();
    world.b.fake.until("running").await;
    world.cable.cut();
    world.b.fake.release("running");
    let (ending, _, outcome) = ending(&end(&live).await);
    assert_eq!((ending, world.runs_on()), (Ending::Departed, "b"), "{outcome}");
    assert_eq!(world.a.fake.state().deaf, 0);
}

/// Where a crash of the target's agent may leave its records, and what the
/// next run makes of them.
#[tokio::test]
async fn an_open_record_is_settled_by_what_is_left() {
    use State::{Prepared, Released, Running};
    use TaskStatus as T;
    let cases = [
        // Kept or undone, but not written down.
        (Some(T::Running), false, Some(Running), Ending::Arrived),
        (None, false, None, Ending::Discarded),
        (None, false, Some(Prepared), Ending::Discarded),
        // Somebody else's, of the same name.
        (Some(T::Running), false, Some(Prepared), Ending::Discarded),
        // The machine was restarted.
        (None, true, Some(Running), Ending::Discarded),
        (None, true, Some(Released), Ending::Arrived),
    ];
    let world = World::new().await;
    for (n, (task, leased, written, expected)) in cases.into_iter().enumerate() {
        let (case, name) = (format!("{task:?} {leased} {written:?}"), format!("c{n}"));
        let fake = super::fake::Fake::new(world.dir.path().join(&name).join("run/arrivals.sock"));
        if let Some(status) = task {
            fake.run(&world.key, "x", "{}");
            fake.set_status(&world.key, status);
        }
        if leased {
            fake.state().leases.insert(world.key.clone());
        }
        let state = world.dir.path().join(&name).join("state");
        let migration = left_open(&state, &world, written).await;
        let side = Side::over(&world.dir, &name, fake, |_| {}).await;
        eventually(&case, || side.node.book.record(&migration).unwrap().has_ended()).await;
        assert_eq!(side.node.book.record(&migration).unwrap().ending, expected, "{case}");
        assert!(side.fake.state().leases.is_empty(), "{case}");
        assert_eq!(side.fake.status(&world.key), task, "{case}: it was not touched");
    }
}

/// The container is gone, and nobody can tell whether it has run: no answer.
#[tokio::test]
async fn a_damaged_journal_is_not_guessed() {
    let world = World::new().await;
    let state = world.dir.path().join("c/state");
    let migration = left_open(&state, &world, Some(State::Released)).await;
    let path = journal::path(&state.join("journal"), &migration, Role::Target);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let fake = super::fake::Fake::new(world.dir.path().join("c/run/arrivals.sock"));
    fake.state().leases.insert(world.key.clone());
    let side = Side::over(&world.dir, "c", fake, |_| {}).await;
    let doubt = || side.node.book.record(&migration).unwrap().ending == Ending::InDoubt;
    eventually("it says so", doubt).await;
    assert!(path.exists(), "what is left is evidence");
}

/// An arrival in the book of a node whose agent is not there, and what its
/// shim has written last.
async fn left_open(state: &Path, world: &World, written: Option<State>) -> MigrationId {
    let migration = MigrationId::from_random([3; 16]);
    let (key, peer) = (world.key.clone(), "a".parse().unwrap());
    let record = Record::new(migration.clone(), key.clone(), Role::Target, peer);
    let book = Book::open(&state.join("migrations")).unwrap();
    drop(book.begin(record).await.unwrap());
    let Some(written) = written else { return migration };
    let subject = Subject {
        role: Role::Target,
        migration: migration.clone(),
        ticket: Ticket::from_random([4; 16]),
        namespace: key.namespace().into(),
        container: key.id().into(),
        peer: "a".parse().unwrap(),
        epoch: Epoch(1),
    };
    let mut journal = Journal::create(&state.join("journal"), subject).unwrap();
    journal.record(written).unwrap();
    migration
}

/// The target's agent ends in the middle. What it leaves is taken up.
#[tokio::test]
async fn an_unfinished_arrival_is_taken_up() {
    for (status, runs) in [(Some(TaskStatus::Running), true), (None, false)] {
        let world = World::new().await;
        let c = super::fake::Fake::new(world.dir.path().join("c/run/arrivals.sock"));
        c.state().leases.insert(world.key.clone());
        c.run(&world.key, "x", "{}");
        if let (Some(kept), None) = (c.state().containers.get_mut(&world.key), status) {
            kept.task = None;
        }
        let side = Side::over(&world.dir, "c", c, |_| {}).await;
        eventually("taken up", || side.fake.state().leases.is_empty()).await;
        assert_eq!(side.fake.state().containers.contains_key(&world.key), runs);
    }
}

/// Looking for what a former run left must not find what this one does.
#[tokio::test]
async fn an_arrival_under_way_is_not_unfinished() {
    let world = World::new().await;
    world.b.fake.hold("create");
    let live = world.begin().await.unwrap();
    world.b.fake.until("create").await;
    assert!(!world.b.fake.state().leases.is_empty());
    assert_eq!(crate::target::take_up(&world.b.node).await.await.unwrap(), 0);
    world.b.fake.release("create");
    assert_eq!(ending(&end(&live).await).0, Ending::Departed);
}

#[tokio::test]
async fn an_agent_that_ends_takes_its_migrations_back() {
    for (point, side) in [("read", 'a'), ("create", 'b'), ("pages", 'a')] {
        let mut world = World::new().await;
        let held = if side == 'a' { world.a.fake.clone() } else { world.b.fake.clone() };
        held.hold(point);
        let live = world.begin().await.unwrap();
        held.until(point).await;
        let ended = end(&live);
        let closing = async {
            // What is held goes on once the shutdown is under way.
            eventually("cancelled", || live.cancel.is_cancelled()).await;
            held.release(point);
        };
        let (ended, (), ()) = tokio::join!(ended, world.a.close(), closing);
        let (ending, _, outcome) = ending(&ended);
        assert_eq!(ending, Ending::StayedHome, "{point}: {outcome}");
        assert_eq!(world.runs_on(), "a", "{point}");
        world.nothing_left().await;
    }
}

/// The target's agent ends while it prepares: its source is told.
#[tokio::test]
async fn a_target_that_ends_discards() {
    let mut world = World::new().await;
    world.b.fake.hold("create");
    let live = world.begin().await.unwrap();
    world.b.fake.until("create").await;
    let fake = world.b.fake.clone();
    let node = world.b.node.clone();
    let releasing = async {
        eventually("shutting down", || node.shutdown.is_cancelled()).await;
        fake.release("create");
    };
    let ended = async { end(&live).await };
    let (ended, (), ()) = tokio::join!(ended, world.b.close(), releasing);
    let (ending, codes, outcome) = ending(&ended);
    assert_eq!(ending, Ending::StayedHome, "{outcome}");
    assert_eq!(codes, [transship_types::Code::Cancelled]);
    assert_eq!(world.runs_on(), "a");
    world.nothing_left().await;
}

/// The target's daemon dies while its shim goes on: nobody may conclude from
/// its silence that the container does not run.
#[tokio::test]
async fn a_daemon_that_dies_proves_nothing() {
    let world = World::new().await;
    world.b.fake.hold("restore");
    let live = world.begin().await.unwrap();
    world.b.fake.until("restore").await;
    world.b.fake.die(true);
    world.b.fake.release("restore");
    world.b.fake.until("running").await;
    eventually("it has left", || world.a.fake.status(&world.key) != Some(TaskStatus::Running))
        .await;
    assert_ne!(world.at_target(), Some(Ending::Discarded));

    world.b.fake.die(false);
    let (ending, _, outcome) = ending(&end(&live).await);
    assert_eq!((ending, world.runs_on()), (Ending::Departed, "b"), "{outcome}");
    assert_eq!(world.at_target(), Some(Ending::Arrived));
}
