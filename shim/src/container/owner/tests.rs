//! The order of events, with a shell script in place of the OCI runtime.

use std::{fs, path::Path, time::Duration};

use containerd_shim_protos::{
    api::{CreateTaskRequest, ExecProcessRequest},
    events::task::{TaskDelete, TaskExit, TaskStart},
    protobuf::{Message, well_known_types::any::Any},
    shim::oci::Options,
};
use nix::{libc, sys::prctl::set_child_subreaper};

use super::*;
use crate::{
    container::{Container, create},
    events::{Publisher, Recorded},
    reaper::Reaper,
};

/// Its `create` leaves a process behind that sleeps until `start` tells it to
/// go on with what the bundle's file `does` says.
const RUNTIME: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/container/owner/fake-runtime.sh");

struct World {
    dir: tempfile::TempDir,
    pod: Pod,
    events: Recorded,
}

impl World {
    fn new(does: &str) -> Self {
        set_child_subreaper(true).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let world = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        world("does", does);
        world("config.json", r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#);
        let (publisher, events) = Publisher::recording("test");
        let pod = Pod::new("test", publisher, Reaper::start().unwrap());
        Self { dir, pod, events }
    }

    fn path(&self, file: &str) -> std::path::PathBuf {
        self.dir.path().join(file)
    }

    async fn create(&self) -> Container {
        let options = Options {
            binary_name: RUNTIME.into(),
            root: self.path("state").to_str().unwrap().into(),
            ..Default::default()
        };
        let request = CreateTaskRequest {
            id: "c".into(),
            bundle: self.dir.path().to_str().unwrap().into(),
            options: Some(Any {
                type_url: "containerd.runc.v1.Options".into(),
                value: options.write_to_bytes().unwrap(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        create(&self.pod, request).await.unwrap();
        self.pod.find("c").unwrap()
    }

    async fn topics(&mut self, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        for _ in 0..count {
            topics.push(self.events.next().await.0);
        }
        topics
    }
}

fn exec(id: &str) -> ExecProcessRequest {
    ExecProcessRequest {
        id: "c".into(),
        exec_id: id.into(),
        spec: Some(Any { value: b"{}".to_vec(), ..Default::default() }).into(),
        ..Default::default()
    }
}

async fn until_exists(path: &Path) {
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn an_exit_before_the_start_is_published_waits_for_it() {
    let mut world = World::new("exit 3");
    // The runtime's `start` returns only after the process has ended.
    let late = "while kill -0 $(cat \"$bundle/init.pid\") 2>/dev/null && \
                ! grep -q 'State:.Z' /proc/$(cat \"$bundle/init.pid\")/status; do :; done";
    fs::write(world.path("start-late"), late).unwrap();
    let container = world.create().await;
    let pid = container.start("").await.unwrap();
    assert_eq!(container.wait("").await.unwrap().status, 3);
    container.delete("").await.unwrap();

    assert_eq!(world.events.next().await.0, "/tasks/create");
    let (topic, bytes) = world.events.next().await;
    assert_eq!(topic, "/tasks/start");
    assert_eq!(TaskStart::parse_from_bytes(&bytes).unwrap().pid, pid);
    let (topic, bytes) = world.events.next().await;
    let exit = TaskExit::parse_from_bytes(&bytes).unwrap();
    assert_eq!((topic.as_str(), exit.pid, exit.exit_status), ("/tasks/exit", pid, 3));
    assert_eq!((exit.container_id.as_str(), exit.id.as_str()), ("c", "c"));
    let (topic, bytes) = world.events.next().await;
    let delete = TaskDelete::parse_from_bytes(&bytes).unwrap();
    assert_eq!((topic.as_str(), delete.exit_status), ("/tasks/delete", 3));
    assert!(world.pod.is_empty());
}

#[tokio::test]
async fn the_first_process_ends_last() {
    let mut world = World::new("while [ ! -e \"$bundle/end\" ]; do sleep 0.01; done; exit 1");
    let wait = "while [ ! -e \"$bundle/end-exec\" ]; do sleep 0.01; done; exit 2";
    fs::write(world.path("exec-does"), wait).unwrap();
    let container = world.create().await;
    container.start("").await.unwrap();
    container.exec(exec("e")).await.unwrap();
    let clash = container.exec(exec("e")).await.unwrap_err();
    assert!(matches!(clash, Error::AlreadyExists(_)), "{clash:?}");
    let pid = container.start("e").await.unwrap();
    assert!(matches!(container.delete("e").await.unwrap_err(), Error::FailedPrecondition(_)));

    // The first process ends and is reaped; it may not be told yet.
    fs::write(world.path("end"), "").unwrap();
    let init = container.state("").await.unwrap().pid;
    until_gone(init).await;
    assert_eq!(container.state("").await.unwrap().status, Status::Running);
    assert!(matches!(container.exec(exec("f")).await, Err(Error::FailedPrecondition(_))));
    fs::write(world.path("end-exec"), "").unwrap();
    assert_eq!(container.wait("").await.unwrap().status, 1);
    let (exec_pid, exit) = container.delete("e").await.unwrap();
    assert_eq!((exec_pid, exit.unwrap().status), (pid, 2));

    let topics = world.topics(4).await;
    assert_eq!(
        topics,
        ["/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started"]
    );
    for (id, status) in [("e", 2), ("c", 1)] {
        let (topic, bytes) = world.events.next().await;
        let exit = TaskExit::parse_from_bytes(&bytes).unwrap();
        assert_eq!((topic.as_str(), exit.id.as_str()), ("/tasks/exit", id));
        assert_eq!(exit.exit_status, status);
    }
}

async fn until_gone(pid: u32) {
    while Path::new(&format!("/proc/{pid}")).exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn state_and_kill_answer_while_the_runtime_is_busy() {
    let mut world = World::new("sleep 1000");
    let busy = "touch \"$bundle/pausing\"; while [ ! -e \"$bundle/paused\" ]; do sleep 0.01; done";
    fs::write(world.path("pause-does"), busy).unwrap();
    let container = world.create().await;
    container.start("").await.unwrap();
    let pausing = tokio::spawn({
        let container = container.clone();
        async move { container.pause().await }
    });
    until_exists(&world.path("pausing")).await;
    assert_eq!(container.state("").await.unwrap().status, Status::Pausing);
    // Signal 0 only asks; it must not wait for its turn.
    container.kill("", 0, false).await.unwrap();
    fs::write(world.path("paused"), "").unwrap();
    pausing.await.unwrap().unwrap();
    assert_eq!(container.state("").await.unwrap().status, Status::Paused);
    assert!(matches!(container.delete("").await, Err(Error::FailedPrecondition(_))));
    container.resume().await.unwrap();
    container.kill("", libc::SIGKILL as u32, false).await.unwrap();
    assert_eq!(container.wait("").await.unwrap().status, 137);
    let again = container.kill("", libc::SIGTERM as u32, false).await.unwrap_err();
    assert!(matches!(again, Error::NotFound(_)), "{again:?}");
    let topics = world.topics(5).await;
    let wanted =
        ["/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed", "/tasks/exit"];
    assert_eq!(topics, wanted);
}

#[tokio::test]
async fn an_occupied_container_refuses_changes_and_tells_its_state() {
    let mut world = World::new("sleep 1000");
    let container = world.create().await;
    assert!(matches!(container.occupy().await, Err(Error::FailedPrecondition(_))), "not started");
    container.start("").await.unwrap();
    let occupation = container.occupy().await.unwrap();
    for refused in [
        container.pause().await,
        container.update(b"{}".to_vec()).await,
        container.exec(exec("e")).await,
        container.checkpoint(None, "/nowhere").await,
        container.occupy().await.map(drop),
    ] {
        let Err(Error::FailedPrecondition(text)) = refused else { panic!("{refused:?}") };
        assert!(text.contains("migrated"), "{text}");
    }
    occupation.frozen().await.unwrap();
    assert_eq!(container.state("").await.unwrap().status, Status::Paused);
    // Its holder dies: the container is what it was before.
    drop(occupation);
    while container.state("").await.unwrap().status != Status::Running {}
    container.kill("", libc::SIGKILL as u32, false).await.unwrap();
    container.wait("").await.unwrap();
    let topics = world.topics(5).await;
    let wanted =
        ["/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed", "/tasks/exit"];
    assert_eq!(topics, wanted);
}

#[tokio::test]
async fn a_container_that_was_never_started_ends_before_it_is_deleted() {
    let mut world = World::new("exit 0");
    let container = world.create().await;
    assert_eq!(container.state("").await.unwrap().status, Status::Created);
    container.kill("", libc::SIGKILL as u32, false).await.unwrap();
    let (pid, exit) = container.delete("").await.unwrap();
    assert!(pid > 0);
    assert_eq!(exit.unwrap().status, 137);
    assert!(matches!(container.state("").await, Err(Error::NotFound(_))), "it is gone");
    let topics = world.topics(3).await;
    assert_eq!(topics, ["/tasks/create", "/tasks/exit", "/tasks/delete"]);
}

#[tokio::test]
async fn what_start_will_restore_has_no_process_and_can_be_killed() {
    let mut world = World::new("");
    let spec = r#"{"annotations":{"dev.transship.ticket":"0123456789abcdef0123456789abcdef"}}"#;
    fs::write(world.path("config.json"), spec).unwrap();
    let container = world.create().await;
    let report = container.state("").await.unwrap();
    assert_eq!((report.status, report.pid), (Status::Created, 0));
    assert!(!world.path("calls").exists(), "the OCI runtime is left alone");
    container.kill("", libc::SIGTERM as u32, false).await.unwrap();
    assert_eq!(container.wait("").await.unwrap().status, 143);
    container.delete("").await.unwrap();
    let topics = world.topics(3).await;
    assert_eq!(topics, ["/tasks/create", "/tasks/exit", "/tasks/delete"]);
}
