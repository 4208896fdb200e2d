//! A source that has proved who it is and means ill. Whatever it sends, in
//! whatever order: the target refuses in time, says so, and keeps nothing.

use std::{sync::Arc, time::Duration};

use futures::FutureExt;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use transship_api::session::{
    Alive, Batch, Commit, Image, ImagesEnd, Lane, Pass, Present, RoundEnd, ShimMessage, SmallImage,
    SmallImages, shim_message::Message,
};
use transship_link::{Channel, in_memory};
use transship_types::{PAGE, Space, Ticket};
use transship_wire::WireError;

use super::world::good_ticket;
use crate::{
    Connecting, Journal, MigrationError, Options, arrive, depart,
    fake::{FakeSource, FakeStore, FakeTarget, manifest, subject},
    journal::Role,
    limits,
    pages::space_name,
};

/// What the source does, one after the other.
enum Act {
    Say(Message),
    Data(usize),
    EndData,
    /// Bytes as they are.
    Raw(Vec<u8>),
    /// Connects once more, and does this there.
    Connect(Vec<Act>),
    /// Goes on for ever with a byte now and then.
    Trickle,
}
use Act::{Connect, Data, EndData, Raw, Say, Trickle};

/// With so many lanes.
fn begin(lanes: u32) -> Act {
    Say(Message::Manifest(transship_api::session::Manifest { lanes, ..manifest() }))
}

fn lane(number: u32) -> Act {
    Say(Message::Lane(Lane { number }))
}

fn batch(first: u64, pages: u64) -> Act {
    Say(Message::Batch(Batch {
        round: 1,
        space: Some(space_name(Space::Process(1))),
        pages: vec![first, pages],
        wire_bytes: (pages * PAGE) as u32,
        ..Default::default()
    }))
}

fn present(pages: &[u64], last: bool) -> Act {
    let space = Some(space_name(Space::Process(1)));
    Say(Message::Present(Present { space, pages: pages.to_vec(), last }))
}

fn round(number: u32, batches: u64, last: bool) -> Act {
    Say(Message::RoundEnd(RoundEnd { number, batches, last }))
}

fn image(name: &str, size: u64) -> Act {
    Say(Message::Image(Image { name: name.into(), size }))
}

fn small(names: &[&str]) -> Act {
    let image = |name: &&str| SmallImage { name: (*name).into(), content: b"x"[..].into() };
    Say(Message::SmallImages(SmallImages { images: names.iter().map(image).collect() }))
}

fn end(count: u32) -> Act {
    Say(Message::ImagesEnd(ImagesEnd { count, bytes: 0 }))
}

/// Does it, as far as the target lets it, and keeps what it has connected.
async fn act(
    channel: &mut Channel,
    lanes: &mpsc::UnboundedSender<Connecting>,
    open: &mut Vec<Channel>,
    script: Vec<Act>,
) -> Result<(), WireError> {
    for act in script {
        match act {
            Say(message) => {
                channel.writer.control(&ShimMessage { message: Some(message) }).await?;
            }
            Data(bytes) => channel.writer.data(&vec![7; bytes]).await?,
            EndData => channel.writer.end_data().await?,
            Raw(bytes) => raw(channel, &bytes).await?,
            Connect(script) => {
                let (mut near, far) = ends();
                let _ = lanes.send(std::future::ready(Ok(far)).boxed());
                // What happens there shows here.
                let _ = Box::pin(self::act(&mut near, lanes, open, script)).await;
                open.push(near);
            }
            Trickle => loop {
                channel.writer.data(b"x").await?;
                tokio::time::sleep(Duration::from_secs(20)).await;
            },
        }
        channel.writer.flush().await?;
    }
    Ok(())
}

/// A control frame of these bytes, whatever they are.
async fn raw(channel: &mut Channel, bytes: &[u8]) -> Result<(), WireError> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Anything {
        #[prost(bytes, tag = "20")]
        small_images: Vec<u8>,
    }
    channel.writer.control(&Anything { small_images: bytes.to_vec() }).await
}

fn ends() -> (Channel, Channel) {
    in_memory::pair("b".parse().unwrap(), "a".parse().unwrap())
}

/// What becomes of an arrival from such a source.
async fn refused(case: &str, script: Vec<Act>) -> MigrationError {
    let directory = tempfile::tempdir().unwrap();
    let mut target = FakeTarget::new(directory.path(), None);
    let (lanes, queue) = mpsc::unbounded_channel();
    (target.store, target.lanes) =
        (Some(Arc::new(FakeStore::new(None))), Some(Arc::new(queue.into())));
    let ((mut near, far), cancel) = (ends(), CancellationToken::new());
    let (ticket, mut open) = (good_ticket(), Vec::new());
    let source = async {
        // It may be turned away in the middle; it hears why all the same.
        let _ = act(&mut near, &lanes, &mut open, script).await;
        loop {
            match near.reader.control::<ShimMessage>().await {
                Ok(ShimMessage { message: Some(Message::Refused(_)) }) => break true,
                Ok(_) => {}
                Err(_) => break false,
            }
        }
    };
    // Longer than any deadline on the way.
    let both = async { tokio::join!(arrive(far, &mut target, &ticket, &cancel), source) };
    let both = timeout(Duration::from_secs(3600), both).await;
    let (arrived, told) = both.unwrap_or_else(|_| panic!("{case}: it waits for ever"));
    let error = arrived.err().unwrap_or_else(|| panic!("{case}: it arrived"));
    assert!(!target.running && target.is_clean(), "{case}: something is left");
    assert!(told, "{case}: the source was not told ({error:?})");
    error
}

#[tokio::test]
async fn messages_out_of_phase_are_refused() {
    let other = transship_api::session::Manifest {
        ticket: Ticket::from_random([1; 16]).to_string(),
        ..manifest()
    };
    for (case, script) in [
        ("no manifest", vec![Say(Message::Pass(Pass::default()))]),
        ("another ticket", vec![Say(Message::Manifest(other))]),
        ("a second manifest", vec![begin(0), begin(0)]),
        ("nothing of ours", vec![begin(0), Say(Message::Prepared(Default::default()))]),
        (
            "a pass after images",
            vec![begin(0), small(&["a.img"]), Say(Message::Pass(Pass::default()))],
        ),
        ("pages without a lane", vec![begin(0), present(&[1, 1], true)]),
        ("a round without a lane", vec![begin(0), round(1, 0, false)]),
        ("a batch in the first connection", vec![begin(0), batch(1, 1)]),
        ("data for no run", vec![begin(0), Data(10)]),
        ("a commit too early", vec![begin(0), Say(Message::Commit(Commit { epoch: 3 }))]),
    ] {
        let error = refused(case, script).await;
        let foreign = match &error {
            MigrationError::Malformed { .. } => true,
            MigrationError::Wire(wire) => matches!(wire, WireError::Unexpected { .. }),
            _ => false,
        };
        assert!(foreign, "{case}: {error:?}");
    }
}

#[tokio::test]
async fn images_that_cannot_be_are_refused() {
    for (case, script) in [
        ("a path", vec![begin(0), image("../x", 1)]),
        ("a path among small ones", vec![begin(0), small(&["core-1.img", "a/b"])]),
        ("one of the target's own", vec![begin(0), small(&["transship-shared-7"])]),
        ("a name twice", vec![begin(0), small(&["a.img"]), image("a.img", 1)]),
        ("a name twice in one message", vec![begin(0), small(&["a.img", "a.img"])]),
        ("more than was said", vec![begin(0), image("a.img", 9), Data(10), EndData]),
        ("less than was said", vec![begin(0), image("a.img", 11), Data(10), EndData]),
        ("no images", vec![begin(0), end(1)]),
        ("too many in one message", vec![begin(0), Raw([0x0a, 0].repeat(20_000))]),
        ("too long a message", vec![begin(0), Raw(vec![0; limits::MESSAGE])]),
    ] {
        let error = refused(case, script).await;
        let foreign = match &error {
            MigrationError::Malformed { .. } | MigrationError::Image { .. } => true,
            MigrationError::Wire(wire) => {
                matches!(wire, WireError::TooMany { .. } | WireError::TooLong { .. })
            }
            _ => false,
        };
        assert!(foreign, "{case}: {error:?}");
    }
}

#[tokio::test]
async fn pages_that_cannot_be_are_refused() {
    let one = || Connect(vec![lane(0), batch(1, 2), Data(2 * PAGE as usize), EndData]);
    let with = |rest: Vec<Act>| [begin(1), one()].into_iter().chain(rest).collect::<Vec<_>>();
    let many: Vec<u64> = (0..limits::PRESENT_CHUNK as u64 + 1).flat_map(|n| [2 * n, 1]).collect();
    for (case, script) in [
        (
            "a page that never came",
            with(vec![present(&[1, 3], true), round(1, 1, true), small(&["a"]), end(1)]),
        ),
        ("after the last", with(vec![present(&[1, 1], true), present(&[3, 1], false)])),
        ("out of order", with(vec![present(&[4, 1, 1, 1], true)])),
        ("overlapping", with(vec![present(&[1, 2, 2, 1], true)])),
        ("beyond every address", with(vec![present(&[u64::MAX, 2], true)])),
        ("more ranges than a message has", with(vec![present(&many, false)])),
        ("a last round without them", with(vec![round(1, 1, true)])),
        ("half of them", with(vec![present(&[1, 1], false), round(1, 1, true)])),
        ("more batches than said", with(vec![round(1, 0, false)])),
        ("a round twice", with(vec![round(1, 1, false), round(1, 1, false)])),
        ("images before the last round", with(vec![small(&["a"]), end(1)])),
        ("too many pages in a batch", vec![begin(1), Connect(vec![lane(0), batch(1, 257)])]),
        ("a second first connection", vec![begin(1), Connect(vec![begin(1)])]),
        ("a lane of no number", vec![begin(1), Connect(vec![lane(16)])]),
        ("two lanes of one number", vec![begin(2), Connect(vec![lane(0)]), Connect(vec![lane(0)])]),
        (
            "too long a message on a lane",
            vec![begin(1), Connect(vec![lane(0), Raw(vec![0; limits::LANE_MESSAGE])])],
        ),
    ] {
        refused(case, script).await;
    }
}

/// The other way round: what a target sends is no longer than what it needs.
#[tokio::test]
async fn a_target_that_says_too_much_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let mut source = FakeSource::new(directory.path(), None);
    let journal = Journal::create(directory.path(), subject(Role::Source)).unwrap();
    let (near, mut far) = ends();
    let (options, cancel) = (Options::default(), CancellationToken::new());
    let departing = depart(near, &mut source, manifest(), journal, &options, &cancel, &|_| {});
    // It is cut off in the middle.
    let (departure, _) = tokio::join!(departing, raw(&mut far, &[0; limits::MESSAGE]));
    let error = departure.error.unwrap().error;
    assert!(matches!(error, MigrationError::Wire(WireError::TooLong { .. })), "{error:?}");
    assert!(source.is_running());
}

/// Half-open, silent or a byte at a time: nobody is waited for without end.
/// The clock is ours: a thread that waits for bytes would keep it from running
/// ahead by itself.
#[tokio::test(start_paused = true)]
async fn who_says_too_little_is_not_waited_for() {
    for (case, script) in [
        ("nothing at all", vec![]),
        ("nothing after the manifest", vec![begin(0)]),
        ("no lanes", vec![begin(2)]),
        ("a lane that is silent", vec![begin(1), Connect(vec![]), round(1, 1, false)]),
        ("an image that trickles", vec![begin(0), image("a.img", 1 << 20), Trickle]),
        ("a pass that trickles", vec![begin(0), Say(Message::Pass(Pass::default())), Trickle]),
        (
            "a batch that trickles",
            vec![begin(1), Connect(vec![lane(0), batch(1, 2)]), round(1, 1, false)],
        ),
        ("half a run", vec![begin(0), Say(Message::Alive(Alive {})), image("a.img", 9), Data(1)]),
    ] {
        let hours_pass = async {
            loop {
                tokio::time::advance(Duration::from_secs(1)).await;
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let error = tokio::select! {
            error = refused(case, script) => error,
            () = hours_pass => unreachable!("it goes on for ever"),
        };
        let late = match &error {
            MigrationError::Timeout { .. } | MigrationError::Wire(WireError::Deadline(_)) => true,
            // A stream of x is no pass either.
            MigrationError::Rootfs(_) => case.contains("pass"),
            _ => false,
        };
        assert!(late, "{case}: {error:?}");
    }
}
