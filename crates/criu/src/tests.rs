//! The gate between two fakes: what is held, changed and passed, and what
//! happens when one of the three goes away.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use prost::Message;
use tempfile::TempDir;
use tokio::time::timeout;
use transship_api::criu::{CriuOpts, CriuReq, CriuReqType, InheritFd};

use crate::{
    Conversation, CriuError, Gate, Kind, Remembered, Side, fake,
    fake::{FakeCriu, FakeRuntime},
    fields::Fields,
    packet::MAX_PACKET,
};

struct World {
    gate: Gate,
    runtime: FakeRuntime,
    criu: FakeCriu,
    dir: TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let gate = Gate::open_in(dir.path(), PathBuf::from("/nonexistent/criu")).unwrap();
        let (runtime, criu) = fake::connect(&gate.socket()).await.unwrap();
        Self { gate, runtime, criu, dir }
    }

    async fn asked(r#type: CriuReqType) -> (Self, Conversation) {
        let mut world = Self::new().await;
        world.runtime.request(r#type, Some(world.options())).await.unwrap();
        let talk = soon(world.gate.conversation()).await.unwrap();
        (world, talk)
    }

    fn options(&self) -> CriuOpts {
        CriuOpts {
            images_dir_fd: -1,
            pid: Some(77),
            notify_scripts: Some(true),
            ..Default::default()
        }
    }
}

/// A hang is a failure, not a stuck test run.
async fn soon<F: Future>(what: F) -> F::Output {
    timeout(Duration::from_secs(10), what).await.expect("it hangs")
}

const DUMP: [&str; 4] = ["pre-dump", "network-lock", "query-ext-files", "post-dump"];

#[tokio::test]
async fn a_request_is_held_until_it_is_released() {
    let (world, mut talk) = World::asked(CriuReqType::Dump).await;
    assert_eq!(talk.kind(), Kind::Dump);
    assert_eq!(talk.options().pid, Some(77));
    assert_eq!(talk.criu_pid(), std::process::id() as i32);
    let nothing = timeout(Duration::from_millis(100), world.criu.receive()).await;
    assert!(nothing.is_err(), "CRIU got it before the release");
    talk.release().await.unwrap();
    let request = soon(world.criu.receive()).await.unwrap().unwrap();
    assert_eq!(request.r#type, CriuReqType::Dump as i32);
}

#[tokio::test]
async fn amendments_reach_criu_and_unknown_fields_stay() {
    let mut world = World::new().await;
    let mut opts = Fields::parse(&world.options().encode_to_vec()).unwrap();
    opts.set_bytes(900, b"from a newer runtime");
    let mut request = Fields::default();
    request.set_varint(1, CriuReqType::Restore as u64);
    request.set_bytes(2, &opts.encode());
    request.set_varint(901, 5);
    world.runtime.send_bytes(request.encode()).await.unwrap();

    let mut talk = soon(world.gate.conversation()).await.unwrap();
    let remembered = Remembered { tcp_established: true, file_locks: true, ..Default::default() };
    talk.amend(|request| {
        remembered.apply(request);
        request.log_level(2);
        request.external("mnt[/x]:/y");
    });
    assert_eq!(talk.options().tcp_established, Some(true));
    talk.release().await.unwrap();

    let bytes = soon(world.criu.receive_bytes()).await.unwrap().unwrap();
    let fields = Fields::parse(&bytes).unwrap();
    assert_eq!(fields.varint(901), Some(5));
    let opts = fields.bytes(2).unwrap();
    assert_eq!(Fields::parse(opts).unwrap().bytes(900), Some(b"from a newer runtime".as_slice()));
    let opts = CriuOpts::decode(opts).unwrap();
    assert_eq!(opts.file_locks, Some(true));
    assert_eq!(opts.tcp_close, None);
    assert_eq!(opts.log_level, Some(2));
    assert_eq!(opts.external, ["mnt[/x]:/y"]);
    assert_eq!(Remembered::of_dump(&opts), remembered);
}

#[tokio::test]
async fn the_runtimes_descriptors_become_ours() {
    let mut world = World::new().await;
    let file = world.dir.path().join("inside");
    File::create(&file).unwrap();
    let dir: OwnedFd = File::open(world.dir.path()).unwrap().into();
    let pipe = |number| InheritFd { key: format!("pipe:[{number}]"), fd: number };
    let opts = CriuOpts {
        images_dir_fd: dir.as_raw_fd(),
        work_dir_fd: Some(dir.as_raw_fd()),
        inherit_fd: vec![pipe(0), pipe(1), pipe(2), pipe(9)],
        ..world.options()
    };
    world.runtime.request(CriuReqType::Restore, Some(opts)).await.unwrap();
    let mut talk = soon(world.gate.conversation()).await.unwrap();
    talk.release().await.unwrap();
    let opts = soon(world.criu.receive()).await.unwrap().unwrap().opts.unwrap();
    drop(dir);
    for fd in [opts.images_dir_fd, opts.work_dir_fd.unwrap()] {
        let path = format!("/proc/{}/fd/{fd}/inside", std::process::id());
        assert!(std::fs::exists(&path).unwrap(), "{path}");
    }
    let numbers: Vec<i32> = opts.inherit_fd.iter().map(|entry| entry.fd).collect();
    assert_eq!(numbers, [0, fake::MOVED.0, fake::MOVED.1, 9]);
}

#[tokio::test]
async fn an_amended_images_dir_wins() {
    let (world, mut talk) = World::asked(CriuReqType::Dump).await;
    let dir: OwnedFd = File::open(world.dir.path()).unwrap().into();
    let number = dir.as_raw_fd();
    talk.amend(|request| request.images_dir(dir));
    talk.release().await.unwrap();
    let opts = soon(world.criu.receive()).await.unwrap().unwrap().opts.unwrap();
    assert_eq!(opts.images_dir_fd, number);
}

/// CRIU's part of a dump; `Some(false)` ends it as a refusal does.
async fn dump(criu: FakeCriu) -> Vec<(&'static str, Option<bool>)> {
    criu.receive().await.unwrap().unwrap();
    let mut answers = Vec::new();
    for script in DUMP {
        let answer = criu.notify(script).await.unwrap_or(None);
        answers.push((script, answer));
        if answer != Some(true) {
            break;
        }
    }
    let success = answers.iter().all(|(_, answer)| *answer == Some(true));
    let _ = criu.respond(CriuReqType::Dump, success).await;
    answers
}

#[tokio::test]
async fn notifications_come_in_order_and_one_is_held() {
    let (world, mut talk) = World::asked(CriuReqType::Dump).await;
    let criu = tokio::spawn(dump(world.criu));
    let runtime = world.runtime;
    let (seen, mut scripts) = tokio::sync::mpsc::unbounded_channel();
    let runtime = tokio::spawn(async move {
        while let Some((response, _)) = runtime.receive().await.unwrap() {
            let Some(notify) = response.notify else { return response.success };
            seen.send(notify.script.unwrap()).unwrap();
            runtime.answer(true).await.unwrap();
        }
        panic!("no answer for the runtime");
    });
    talk.release().await.unwrap();
    let held = soon(talk.until("post-dump")).await.unwrap();
    assert_eq!((held.script.as_str(), held.pid), ("post-dump", Some(4242)));
    for script in &DUMP[..3] {
        assert_eq!(soon(scripts.recv()).await.as_deref(), Some(*script));
    }
    assert!(scripts.try_recv().is_err(), "the held one was passed on");
    soon(talk.pass()).await.unwrap();
    assert_eq!(soon(scripts.recv()).await.as_deref(), Some("post-dump"));
    assert!(soon(talk.finish()).await.unwrap().success);
    assert!(soon(runtime).await.unwrap());
    assert!(soon(criu).await.unwrap().iter().all(|(_, answer)| *answer == Some(true)));
}

/// Without a network namespace of its own there is no `network-lock`.
#[tokio::test]
async fn the_decision_is_not_passed_by() {
    let (world, mut talk) = World::asked(CriuReqType::Dump).await;
    let criu = tokio::spawn(dump(world.criu));
    let runtime = world.runtime;
    let runtime = tokio::spawn(async move { runtime.agree_to_everything().await });
    talk.release().await.unwrap();
    let error = soon(talk.until("no-such-script")).await.unwrap_err();
    assert!(matches!(error, CriuError::Missed { .. }), "{error}");
    drop(talk);
    assert_eq!(soon(criu).await.unwrap().last(), Some(&("post-dump", None)));
    let _ = soon(runtime).await.unwrap();
}

#[tokio::test]
async fn every_dump_says_when_it_is_frozen() {
    for scripts in [&DUMP[..], &["pre-dump", "query-ext-files", "post-dump"]] {
        let (world, mut talk) = World::asked(CriuReqType::Dump).await;
        let criu = world.criu;
        tokio::spawn(async move {
            criu.receive().await.unwrap();
            for script in scripts {
                criu.notify(script).await.unwrap();
            }
        });
        let runtime = world.runtime;
        tokio::spawn(async move { runtime.agree_to_everything().await });
        talk.release().await.unwrap();
        assert_eq!(soon(talk.until_frozen()).await.unwrap().script, scripts[1]);
    }
}

#[tokio::test]
async fn post_dump_can_be_refused() {
    let (world, mut talk) = World::asked(CriuReqType::Dump).await;
    let criu = tokio::spawn(dump(world.criu));
    let runtime = world.runtime;
    let runtime = tokio::spawn(async move { runtime.agree_to_everything().await.unwrap() });
    talk.release().await.unwrap();
    soon(talk.until("post-dump")).await.unwrap();
    talk.acknowledge(false).await.unwrap();
    assert!(!soon(talk.finish()).await.unwrap().success);
    let (scripts, answer) = soon(runtime).await.unwrap();
    assert_eq!(scripts, DUMP[..3], "the runtime saw what we answered ourselves");
    assert!(!answer.unwrap().success);
    assert_eq!(soon(criu).await.unwrap().last(), Some(&("post-dump", Some(false))));
}

/// crun does not ask for notifications at a dump; we need them nevertheless.
#[tokio::test]
async fn a_runtime_that_wants_no_notifications_gets_none() {
    let mut world = World::new().await;
    let opts = CriuOpts { notify_scripts: None, ..world.options() };
    world.runtime.request(CriuReqType::Dump, Some(opts)).await.unwrap();
    let mut talk = soon(world.gate.conversation()).await.unwrap();
    let criu = world.criu;
    let criu = tokio::spawn(async move {
        let opts = criu.receive().await.unwrap().unwrap().opts.unwrap();
        assert_eq!(opts.notify_scripts, Some(true));
        for script in DUMP {
            assert_eq!(criu.notify(script).await.unwrap(), Some(true));
        }
        criu.respond(CriuReqType::Dump, true).await.unwrap();
    });
    talk.release().await.unwrap();
    soon(talk.until("post-dump")).await.unwrap();
    assert!(soon(talk.finish()).await.unwrap().success);
    soon(criu).await.unwrap();
    let (scripts, answer) = soon(world.runtime.agree_to_everything()).await.unwrap();
    assert!(scripts.is_empty() && answer.unwrap().success, "{scripts:?}");
}

#[tokio::test]
async fn dropping_a_held_conversation_lets_criu_roll_back() {
    let (world, mut talk) = World::asked(CriuReqType::Dump).await;
    let criu = tokio::spawn(dump(world.criu));
    let runtime = world.runtime;
    let runtime = tokio::spawn(async move { runtime.agree_to_everything().await });
    talk.release().await.unwrap();
    soon(talk.until("post-dump")).await.unwrap();
    drop(talk);
    assert_eq!(soon(criu).await.unwrap().last(), Some(&("post-dump", None)));
    assert!(soon(runtime).await.unwrap().unwrap().1.is_none(), "the runtime waits for nobody");
}

#[tokio::test]
async fn criu_may_die_at_every_point() {
    for died_after in 0..=DUMP.len() {
        let (world, mut talk) = World::asked(CriuReqType::Dump).await;
        let (runtime, criu) = (world.runtime, world.criu);
        tokio::spawn(async move { runtime.agree_to_everything().await });
        let scripted = tokio::spawn(async move {
            criu.receive().await.unwrap();
            for script in &DUMP[..died_after] {
                criu.notify(script).await.unwrap();
            }
        });
        talk.release().await.unwrap();
        let error = soon(talk.finish()).await.unwrap_err();
        let CriuError::CriuDied { during, .. } = &error else { panic!("{died_after}: {error}") };
        let expected = died_after.checked_sub(1).map_or("its request", |last| DUMP[last]);
        assert_eq!(during, expected);
        soon(scripted).await.unwrap();
    }
}

#[tokio::test]
async fn criu_may_die_before_the_release() {
    let (world, mut talk) = World::asked(CriuReqType::Restore).await;
    std::fs::write(world.gate.socket().with_file_name("criu.err"), "no such library\n").unwrap();
    drop(world.criu);
    let error = match talk.release().await {
        Err(error) => error,
        Ok(()) => soon(talk.until("pre-resume")).await.unwrap_err(),
    };
    assert!(error.to_string().ends_with("no such library"), "{error}");
}

#[tokio::test]
async fn an_early_answer_is_not_awaited_for_ever() {
    let (world, mut talk) = World::asked(CriuReqType::Restore).await;
    talk.release().await.unwrap();
    world.criu.receive().await.unwrap();
    world.criu.respond(CriuReqType::Restore, false).await.unwrap();
    let error = soon(talk.until("pre-resume")).await.unwrap_err();
    assert!(matches!(error, CriuError::Ended { kind: Kind::Restore, .. }), "{error}");
    let (_, answer) = soon(world.runtime.agree_to_everything()).await.unwrap();
    assert!(!answer.unwrap().success, "the runtime must learn it, too");
    assert!(!soon(talk.finish()).await.unwrap().success);
}

#[tokio::test]
async fn the_runtime_may_die_before_the_decision() {
    for died_after in 0..DUMP.len() {
        let (world, mut talk) = World::asked(CriuReqType::Dump).await;
        let criu = tokio::spawn(dump(world.criu));
        let runtime = world.runtime;
        tokio::spawn(async move {
            for _ in 0..died_after {
                runtime.receive().await.unwrap();
                runtime.answer(true).await.unwrap();
            }
        });
        talk.release().await.unwrap();
        let error = soon(talk.finish()).await.unwrap_err();
        assert!(matches!(error, CriuError::RuntimeDied { .. }), "{died_after}: {error}");
        let answers = soon(criu).await.unwrap();
        assert_ne!(answers.last().unwrap().1, Some(true), "CRIU must roll back");
    }
}

#[tokio::test]
async fn after_the_decision_nobody_is_needed() {
    let (world, mut talk) = World::asked(CriuReqType::Dump).await;
    let criu = world.criu;
    let criu = tokio::spawn(async move {
        criu.receive().await.unwrap();
        assert_eq!(criu.notify("post-dump").await.unwrap(), Some(true));
        // Some versions say more after the decision.
        assert_eq!(criu.notify("network-unlock").await.unwrap(), Some(true));
        criu.respond(CriuReqType::Dump, true).await.unwrap();
    });
    talk.release().await.unwrap();
    soon(talk.until("post-dump")).await.unwrap();
    drop(world.runtime);
    talk.acknowledge(true).await.unwrap();
    assert!(soon(talk.finish()).await.unwrap().success);
    soon(criu).await.unwrap();
}

#[tokio::test]
async fn version_sessions_pass_unseen() {
    let mut world = World::new().await;
    world.runtime.request(CriuReqType::Version, None).await.unwrap();
    let asked = soon(world.criu.receive()).await.unwrap().unwrap();
    assert_eq!(asked.r#type, CriuReqType::Version as i32);
    world.criu.respond(CriuReqType::Version, true).await.unwrap();
    let (answer, _) = soon(world.runtime.receive()).await.unwrap().unwrap();
    assert!(answer.success);
    drop((world.runtime, world.criu));

    let (runtime, _criu) = soon(fake::connect(&world.gate.socket())).await.unwrap();
    let opts = CriuOpts { images_dir_fd: -1, ..Default::default() };
    runtime.request(CriuReqType::Dump, Some(opts)).await.unwrap();
    assert_eq!(soon(world.gate.conversation()).await.unwrap().kind(), Kind::Dump);
}

#[tokio::test]
async fn one_session_may_ask_for_the_version_first() {
    let mut world = World::new().await;
    world.runtime.request(CriuReqType::FeatureCheck, None).await.unwrap();
    soon(world.criu.receive()).await.unwrap().unwrap();
    world.criu.respond(CriuReqType::FeatureCheck, true).await.unwrap();
    soon(world.runtime.receive()).await.unwrap().unwrap();
    world.runtime.request(CriuReqType::Restore, Some(world.options())).await.unwrap();
    assert_eq!(soon(world.gate.conversation()).await.unwrap().kind(), Kind::Restore);
}

#[tokio::test]
async fn a_descriptor_comes_through() {
    let (world, mut talk) = World::asked(CriuReqType::Restore).await;
    let (mut reader, writer) = std::io::pipe().unwrap();
    let criu = world.criu;
    tokio::spawn(async move {
        criu.receive().await.unwrap();
        criu.notify_with("orphan-pts-master", vec![writer.into()]).await.unwrap();
        criu.respond(CriuReqType::Restore, true).await.unwrap();
    });
    let runtime = world.runtime;
    let runtime = tokio::spawn(async move {
        let (_, mut descriptors) = runtime.receive().await.unwrap().unwrap();
        let mut master = File::from(descriptors.pop().unwrap());
        master.write_all(b"pty").unwrap();
        runtime.answer(true).await.unwrap();
        runtime.receive().await.unwrap().unwrap().0
    });
    talk.release().await.unwrap();
    let outcome = soon(talk.finish()).await.unwrap();
    assert_eq!((outcome.success, outcome.pid), (true, Some(4242)));
    assert!(soon(runtime).await.unwrap().success);
    let mut text = String::new();
    // Ends only when no copy of the write end is left anywhere.
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "pty");
}

#[tokio::test]
async fn malformed_packets_are_errors() {
    let hostile: [(&str, Vec<u8>); 4] = [
        ("noise", vec![0xff; 40]),
        ("no type", {
            let mut fields = Fields::default();
            fields.set_varint(3, 1);
            fields.encode()
        }),
        (
            "no options",
            CriuReq { r#type: CriuReqType::Dump.into(), ..Default::default() }.encode_to_vec(),
        ),
        ("options of another type", vec![0x08, 1, 0x10, 1]),
    ];
    for (what, bytes) in hostile {
        let mut world = World::new().await;
        world.runtime.send_bytes(bytes).await.unwrap();
        let result = soon(world.gate.conversation()).await;
        let Err(error) = result else { panic!("{what} was accepted") };
        assert!(
            matches!(error, CriuError::Malformed { from: Side::Runtime, .. }),
            "{what}: {error}"
        );
        assert!(soon(world.criu.receive()).await.unwrap().is_none(), "{what}: CRIU waits on");
    }
    let (world, mut talk) = World::asked(CriuReqType::Dump).await;
    talk.release().await.unwrap();
    world.criu.send_bytes(vec![0xff; 40]).await.unwrap();
    let error = soon(talk.until("post-dump")).await.unwrap_err();
    assert!(matches!(error, CriuError::Malformed { from: Side::Criu, .. }), "{error}");
}

#[tokio::test]
async fn an_oversized_packet_is_refused() {
    let mut world = World::new().await;
    let opts = CriuOpts { log_file: Some("x".repeat(MAX_PACKET)), ..world.options() };
    // The kernel's own limit may come first; then the gate never sees it.
    if world.runtime.request(CriuReqType::Dump, Some(opts)).await.is_ok() {
        let Err(error) = soon(world.gate.conversation()).await else { panic!("accepted") };
        assert!(matches!(error, CriuError::Talk { with: Side::Runtime, .. }), "{error}");
    }
}

#[tokio::test]
async fn a_gate_leaves_nothing_behind() {
    let (world, talk) = World::asked(CriuReqType::Dump).await;
    let dir = world.gate.socket().parent().unwrap().to_owned();
    assert!(std::fs::read_link(dir.join("criu")).unwrap().ends_with("exe"));
    drop(world.gate);
    assert!(dir.exists(), "a conversation still needs CRIU's stderr");
    drop(talk);
    for _ in 0..1000 {
        if !dir.exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{} is still there", dir.display());
}
