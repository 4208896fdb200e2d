//! Both ends of a migration in one process: whatever fails, at most one of
//! them runs the container, and one does unless the ending is in doubt.

mod hostile;
mod memory;
mod post_copy;
mod world;

use std::time::Duration;

use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;
use transship_types::{PageSet, Space, Ticket};

use self::world::{Link, Setup, World, good_ticket, is_empty, link};
use crate::{
    Evidence, Journal, MigrationError, Options, Phase, Wanted, arrive, depart,
    fake::{FakeSource, FakeTarget, Step, manifest, subject},
    handoff::Ending,
    journal::Role,
    report::Restored,
    settle,
};

/// The phases of a container whose pages travel in the images.
fn without_memory() -> impl Iterator<Item = Phase> {
    let memory = [Phase::Rounds, Phase::PostCopy, Phase::Fill];
    Phase::ORDER.into_iter().filter(move |phase| !memory.contains(phase))
}

#[tokio::test]
async fn a_container_moves() {
    let world = World::run(Setup::default(), |_, _, _| {}).await;
    assert_eq!(world.departure.ending, Ending::Departed);
    assert!(world.departure.error.is_none(), "{:?}", world.departure.error);
    assert_eq!(world.departure.target_pid, Some(4242));
    assert_eq!(world.departure.image_bytes, (3 << 20) + 9);
    assert!(world.source.ended && !world.source.is_running());
    assert!(world.target.running);
    assert_eq!(world.arrival.unwrap().pid, 4242);
    assert!(is_empty(&world.directory.path().join("source-journal")));
    let phases: Vec<_> = world.departure.times.times().iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, without_memory().collect::<Vec<_>>());
}

#[tokio::test]
async fn a_failing_step_leaves_it_where_it_was() {
    for step in Step::ALL.into_iter().filter(|step| *step != Step::Discard) {
        let world = World::run(Setup::failing(step), |_, _, _| {}).await;
        world.stayed_home(&format!("{step:?}"));
    }
}

#[tokio::test]
async fn a_ticket_for_another_container_is_refused() {
    let ticket = Ticket::from_random([1; 16]);
    let world = World::run(Setup { ticket, ..Setup::default() }, |_, _, _| {}).await;
    world.stayed_home("wrong ticket");
    assert_eq!(world.arrival.err().unwrap().code(), transship_types::Code::Malformed);
}

#[tokio::test]
async fn cancelled_before_the_commit_it_stays() {
    for phase in without_memory().filter(|phase| *phase < Phase::Commit) {
        let world = World::run(Setup::default(), |now, _, cancel| {
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
    let world = World::run(Setup::default(), |now, _, cancel| {
        if now.phase == Phase::Commit {
            cancel.cancel();
        }
    })
    .await;
    assert_eq!(world.departure.ending, Ending::Departed);
    assert!(world.target.running && world.source.ended);
}

#[tokio::test]
async fn a_link_cut_before_the_commit_leaves_it_at_the_source() {
    for phase in without_memory().filter(|phase| *phase < Phase::Commit) {
        let world = World::run(Setup::default(), |now, cut, _| {
            if now.phase == phase {
                cut.all();
            }
        })
        .await;
        world.stayed_home(&format!("link cut in {phase}"));
    }
}

#[tokio::test]
async fn a_link_cut_after_the_commit_is_never_two_running() {
    let world = World::run(Setup::default(), |now, cut, _| {
        if now.phase == Phase::Commit {
            cut.all();
        }
    })
    .await;
    // The source cannot know whether its commit arrived: it stands still.
    assert_eq!(world.departure.ending, Ending::InDoubt);
    assert!(!world.source.is_running() && !world.source.ended);
    let journals = world.directory.path().join("source-journal");
    let path = std::fs::read_dir(journals).unwrap().next().unwrap().unwrap().path();
    let last = crate::journal::read(&path).unwrap().pop().unwrap();
    assert_eq!(last.state, crate::journal::State::Committed);

    // Proof that came another way ends the doubt, whichever it is.
    let World { mut source, departure, directory, .. } = world;
    let runs_there = world.target.running;
    let proof = if runs_there { Evidence::RunsThere } else { Evidence::NotThere };
    let settled = settle(&mut source, departure.doubt.unwrap(), proof, None).await;
    let (ending, settled) = settled.unwrap();
    settled.unwrap();
    assert_eq!(ending, if runs_there { Ending::Departed } else { Ending::StayedHome });
    assert_ne!(source.is_running(), runs_there);
    assert!(is_empty(&directory.path().join("source-journal")));
}

#[tokio::test]
async fn a_target_that_cannot_discard_does_not_refuse() {
    // It fails to resume, and then cannot prove that nothing runs there.
    struct Stuck(FakeTarget);
    #[async_trait::async_trait]
    impl crate::Target for Stuck {
        fn root(&self) -> std::path::PathBuf {
            self.0.root()
        }
        fn images(&self) -> std::path::PathBuf {
            self.0.images()
        }
        async fn prepare(&mut self, manifest: &crate::Manifest) -> Result<(), MigrationError> {
            self.0.prepare(manifest).await
        }
        async fn restore(
            &mut self,
            present: Vec<(Space, PageSet)>,
            wanted: Option<mpsc::UnboundedSender<Wanted>>,
        ) -> Result<Restored, MigrationError> {
            self.0.restore(present, wanted).await
        }
        async fn resume(&mut self) -> Result<u32, MigrationError> {
            Err(MigrationError::runtime("resume", "it hangs"))
        }
        async fn discard(&mut self) -> Result<(), MigrationError> {
            Err(MigrationError::runtime("discard", "it hangs"))
        }
        fn journal(&self, manifest: &crate::Manifest) -> Result<Journal, MigrationError> {
            self.0.journal(manifest)
        }
    }

    let directory = tempfile::tempdir().unwrap();
    let mut source = FakeSource::new(directory.path(), None);
    let mut target = Stuck(FakeTarget::new(directory.path(), None));
    let journals = directory.path().join("source-journal");
    let journal = Journal::create(&journals, subject(Role::Source)).unwrap();
    let Link { near, far, .. } = link(&Handle::current());
    let never = CancellationToken::new();
    let arriving = async {
        let ticket = good_ticket();
        let arrival = arrive(far, &mut target, &ticket, &never).await;
        assert!(arrival.is_err());
    };
    let options = Options::default();
    let departing = depart(near, &mut source, manifest(), journal, &options, &never, &|_| {});
    let (departure, ()) = tokio::join!(departing, arriving);
    assert_eq!(departure.ending, Ending::InDoubt);
    assert!(!source.is_running() && !source.ended);
}

#[tokio::test(start_paused = true)]
async fn a_target_that_stops_reading_does_not_keep_it_frozen() {
    let directory = tempfile::tempdir().unwrap();
    let mut source = FakeSource::new(directory.path(), None);
    let journals = directory.path().join("source-journal");
    let journal = Journal::create(&journals, subject(Role::Source)).unwrap();
    let Link { near, mut far, cut: _cut } = link(&Handle::current());
    let never = CancellationToken::new();
    let stopped = async {
        use transship_api::session::{Waiting, shim_message::Message};
        crate::bulk::hear(&mut far.reader).await.unwrap();
        crate::bulk::say(&mut far.writer, Message::Waiting(Waiting { lanes: 0 })).await.unwrap();
        // Alive, and its link too; but it takes nothing any more.
        std::future::pending::<()>().await;
    };
    let options = Options::default();
    let departing = depart(near, &mut source, manifest(), journal, &options, &never, &|_| {});
    let departure = tokio::select! {
        departure = departing => departure,
        () = stopped => unreachable!(),
        () = tokio::time::sleep(Duration::from_secs(3600)) => panic!("it stands still for ever"),
    };
    assert_eq!(departure.ending, Ending::StayedHome);
    let phase = departure.error.unwrap().phase;
    assert_eq!(phase, Phase::Transfer);
    assert!(source.is_running());
}
