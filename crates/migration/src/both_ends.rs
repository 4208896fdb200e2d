//! Both ends of a migration in one process: whatever fails, at most one of
//! them runs the container, and one does unless the ending is in doubt.

use std::{path::Path, sync::Mutex, time::Duration};

use tempfile::TempDir;
use tokio::{io::duplex, task::AbortHandle};
use tokio_util::sync::CancellationToken;
use transship_link::{BoxRead, BoxWrite, Channel};
use transship_types::{PageSet, Space, Ticket};
use transship_wire::{Reader, Writer};

use crate::{
    Arrived, Departure, Journal, MigrationError, Options, Phase, Progress, arrive, depart,
    fake::{FakeSource, FakeTarget, Step, manifest, subject},
    handoff::Ending,
    journal::Role,
    report::Restored,
    settle,
};

/// Two channels joined by a relay that a test can cut.
struct Link {
    near: Channel,
    far: Channel,
    cut: AbortHandle,
}

fn link() -> Link {
    // Small, so that the relay carries every phase in several pieces.
    const BUFFER: usize = 64 << 10;
    let (near, mut near_end) = duplex(BUFFER);
    let (far, mut far_end) = duplex(BUFFER);
    let relay = tokio::spawn(async move {
        let _ = tokio::io::copy_bidirectional(&mut near_end, &mut far_end).await;
    });
    let channel = |stream: tokio::io::DuplexStream, peer: &str| {
        let (read, write) = tokio::io::split(stream);
        Channel {
            reader: Reader::new(Box::new(read) as BoxRead),
            writer: Writer::new(Box::new(write) as BoxWrite),
            peer: peer.parse().unwrap(),
        }
    };
    Link { near: channel(near, "b"), far: channel(far, "a"), cut: relay.abort_handle() }
}

struct World {
    source: FakeSource,
    target: FakeTarget,
    departure: Departure,
    arrival: Result<Arrived, MigrationError>,
    directory: TempDir,
}

impl World {
    /// `at` is called when the source enters a phase.
    async fn run(
        source_fails: Option<Step>,
        target_fails: Option<Step>,
        ticket: Ticket,
        at: impl Fn(Phase, &AbortHandle, &CancellationToken) + Send + Sync,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path().join("source-images");
        std::fs::create_dir(&images).unwrap();
        let mut source = FakeSource::new(&images, source_fails);
        let mut target = FakeTarget::new(directory.path(), target_fails);
        let journals = directory.path().join("source-journal");
        let journal = Journal::create(&journals, subject(Role::Source)).unwrap();
        let Link { near, far, cut } = link();
        let cancel = CancellationToken::new();
        let never = CancellationToken::new();
        let last = Mutex::new(None);
        let progress = |progress: Progress| {
            if last.lock().unwrap().replace(progress.phase) != Some(progress.phase) {
                at(progress.phase, &cut, &cancel);
            }
        };
        let options = Options::default();
        let departing =
            depart(near, &mut source, manifest(), journal, &options, &cancel, &progress);
        let arriving = arrive(far, &mut target, &ticket, &never);
        let both = async { tokio::join!(departing, arriving) };
        let (departure, arrival) =
            tokio::time::timeout(Duration::from_secs(60), both).await.expect("both ends end");
        Self { source, target, departure, arrival, directory }
    }

    fn stayed_home(&self, case: &str) {
        assert_eq!(self.departure.ending, Ending::StayedHome, "{case}");
        assert!(self.departure.error.is_some(), "{case}: a reason");
        assert!(self.source.is_running(), "{case}: runs at the source");
        assert!(!self.source.ended && !self.target.running, "{case}: and only there");
        assert!(self.arrival.is_err(), "{case}");
        assert!(self.target.is_clean(), "{case}: nothing is left at the target");
        assert!(is_empty(&self.directory.path().join("source-journal")), "{case}: settled");
    }
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().next().is_none()
}

fn good_ticket() -> Ticket {
    subject(Role::Target).ticket
}

#[tokio::test]
async fn a_container_moves() {
    let world = World::run(None, None, good_ticket(), |_, _, _| {}).await;
    assert_eq!(world.departure.ending, Ending::Departed);
    assert!(world.departure.error.is_none(), "{:?}", world.departure.error);
    assert_eq!(world.departure.target_pid, Some(4242));
    assert_eq!(world.departure.image_bytes, (3 << 20) + 9);
    assert!(world.source.ended && !world.source.is_running());
    assert!(world.target.running);
    assert_eq!(world.arrival.unwrap().pid, 4242);
    assert!(is_empty(&world.directory.path().join("source-journal")));
    let phases: Vec<_> = world.departure.times.times().iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, Phase::ORDER);
}

#[tokio::test]
async fn a_failing_step_leaves_it_where_it_was() {
    for step in Step::ALL.into_iter().filter(|step| *step != Step::Discard) {
        let world = World::run(Some(step), Some(step), good_ticket(), |_, _, _| {}).await;
        world.stayed_home(&format!("{step:?}"));
    }
}

#[tokio::test]
async fn a_ticket_for_another_container_is_refused() {
    let world = World::run(None, None, Ticket::from_random([1; 16]), |_, _, _| {}).await;
    world.stayed_home("wrong ticket");
    assert_eq!(world.arrival.err().unwrap().code(), transship_types::Code::Malformed);
}

#[tokio::test]
async fn cancelled_before_the_commit_it_stays() {
    for phase in Phase::ORDER.into_iter().filter(|phase| *phase < Phase::Commit) {
        let world = World::run(None, None, good_ticket(), |now, _, cancel| {
            if now == phase {
                cancel.cancel();
            }
        })
        .await;
        world.stayed_home(&format!("cancelled in {phase}"));
    }
}

#[tokio::test]
async fn cancelled_after_the_commit_it_goes_on() {
    let world = World::run(None, None, good_ticket(), |now, _, cancel| {
        if now == Phase::Commit {
            cancel.cancel();
        }
    })
    .await;
    assert_eq!(world.departure.ending, Ending::Departed);
    assert!(world.target.running && world.source.ended);
}

#[tokio::test]
async fn a_link_cut_before_the_commit_leaves_it_at_the_source() {
    for phase in Phase::ORDER.into_iter().filter(|phase| *phase < Phase::Commit) {
        let world = World::run(None, None, good_ticket(), |now, cut, _| {
            if now == phase {
                cut.abort();
            }
        })
        .await;
        world.stayed_home(&format!("link cut in {phase}"));
    }
}

#[tokio::test]
async fn a_link_cut_after_the_commit_is_never_two_running() {
    let world = World::run(None, None, good_ticket(), |now, cut, _| {
        if now == Phase::Commit {
            cut.abort();
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
    let ending = settle(&mut source, departure.doubt.unwrap(), runs_there).await.unwrap();
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
        ) -> Result<Restored, MigrationError> {
            self.0.restore(present).await
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
    let Link { near, far, .. } = link();
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
    let Link { near, mut far, cut: _cut } = link();
    let never = CancellationToken::new();
    let stopped = async {
        use transship_api::session::{Waiting, shim_message::Message};
        crate::lanes::hear(&mut far.reader).await.unwrap();
        crate::lanes::say(&mut far.writer, Message::Waiting(Waiting {})).await.unwrap();
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
