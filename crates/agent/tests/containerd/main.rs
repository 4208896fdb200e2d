//! The agent's containerd module against real containerds: what arrives stays
//! and works, what is undone leaves nothing, and what cannot be is refused by
//! name. Each test has its own containerds (see `node`).

mod node;

use std::{fs, io::Read, path::Path};

use node::{Node, image, in_private, wait_until};
use tempfile::TempDir;
use transship_agent::{
    containerd::Containerd,
    daemon::{Arrival, Arriving, Daemon, DaemonError, TaskStatus},
};
use transship_api::session::Descriptor;
use transship_types::{Code, ContainerKey, Ticket};

const IMAGE: &str = "docker.io/library/test:1";
const RUNTIME: &str = "--runtime io.containerd.runc.v2";

/// A node with an image and a container of it that says hello and then waits;
/// and a node that has nothing.
struct World {
    source: Node,
    target: Node,
    key: ContainerKey,
    files: TempDir,
}

impl World {
    /// `id` is the container's, and unique among these tests: control groups
    /// are the host's.
    async fn with(id: &str) -> World {
        let (source, target) = (Node::start().await, Node::start().await);
        let files = TempDir::with_prefix("transship-agent-test-").unwrap();
        let archive = image(files.path(), IMAGE, "1");
        source.ctr(&format!("images import {}", archive.display()));
        let key = ContainerKey::new("default", id).unwrap();
        World { source, target, key, files }
    }

    fn run(&self) {
        let id = self.key.id();
        let command = "sh /etc/hello";
        let hello = self.files.path().join("hello");
        fs::write(&hello, "echo hello; exec sleep 1000\n").unwrap();
        let mount =
            format!("--mount type=bind,src={},dst=/etc/hello,options=bind:ro", hello.display());
        self.source.ctr(&format!("run -d {RUNTIME} --label a=b {mount} {IMAGE} {id} {command}"));
    }

    /// What the source says about the container; then its task is ended,
    /// because both nodes of a test share the directory of runc's states.
    async fn leave(&self) -> Arrival {
        let described = self.source.daemon.describe(&self.key).await.unwrap();
        let task = described.task.expect("it runs");
        assert_eq!(task.status, TaskStatus::Running);
        assert_eq!(described.snapshot_key, self.key.id());
        let content = self.source.daemon.origin_of(&self.key).await.unwrap();
        self.source.stop(self.key.id());
        self.source.ctr(&format!("tasks rm {} --force", self.key.id()));
        Arrival {
            key: self.key.clone(),
            record: described.record,
            ticket: Ticket::from_random([7; 16]),
            stdio: task.stdio,
            content,
        }
    }

    async fn bring(&self, arriving: &mut dyn Arriving, content: &[Descriptor]) -> usize {
        let missing = self.target.daemon.missing("default", content).await.unwrap();
        for descriptor in content.iter().filter(|d| missing.contains(&d.digest)) {
            copy(&self.source.daemon, arriving, descriptor).await.unwrap();
        }
        missing.len()
    }
}

async fn copy(
    source: &Containerd,
    arriving: &mut dyn Arriving,
    descriptor: &Descriptor,
) -> Result<(), DaemonError> {
    let mut reader = source.read_blob("default", descriptor).await?;
    let mut writer = arriving.blob(descriptor).await?;
    while let Some(bytes) = reader.next().await? {
        writer.write(bytes).await?;
    }
    writer.commit().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_arrives_and_is_kept() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-kept").await;
    world.run();
    let arrival = world.leave().await;
    let (target, key, id) = (&world.target, &world.key, world.key.id());

    let mut arriving = target.daemon.arrival(key).await.unwrap();
    // index, manifest, configuration and two layers
    assert_eq!(world.bring(&mut *arriving, &arrival.content).await, 5);
    // The collector runs while nothing but the lease holds what came.
    target.collect_garbage();
    assert_eq!(target.daemon.missing("default", &arrival.content).await.unwrap(), [""; 0]);
    arriving.create(&arrival).await.unwrap();

    let task = target.daemon.task(key).await.unwrap().unwrap();
    assert_eq!(task.status, TaskStatus::Created);
    let info = target.ctr(&format!("containers info {id}"));
    assert!(info.contains(arrival.ticket.as_str()), "no ticket in {info}");

    assert_ne!(arriving.start().await.unwrap(), 0);
    target.wait_for_status(id, "RUNNING");
    let mut hello = [0; 6];
    fs::File::open(&task.stdio.stdout).unwrap().read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello\n");
    let version = target.ctr(&format!("tasks exec --exec-id v {id} cat /etc/version"));
    assert_eq!(version, "1");

    // It has arrived: nobody may undo it now, not even by its lease.
    let (found, again) = target.daemon.unfinished().await.unwrap().pop().unwrap();
    assert_eq!(found, *key);
    let error = again.undo().await.unwrap_err();
    assert_eq!(error.code(), Code::Busy, "{error}");
    arriving.keep().await.unwrap();
    assert!(target.daemon.unfinished().await.unwrap().is_empty());
    target.collect_garbage();

    let info = target.ctr(&format!("containers info {id}"));
    assert!(!info.contains("dev.transship"), "a mark stays in {info}");
    assert!(info.contains(r#""a": "b""#), "a label is lost in {info}");
    assert_eq!(target.ctr("images ls -q").trim(), IMAGE);
    assert_eq!(target.ctr("leases ls -q"), "");
    // It can go on from here: its image is complete.
    let origin = target.daemon.origin_of(key).await.unwrap();
    assert_eq!(origin.len(), 5);
    assert_eq!(target.daemon.missing("default", &origin).await.unwrap(), [""; 0]);

    let error = target.daemon.remove(key).await.unwrap_err();
    assert_eq!(error.code(), Code::Busy, "{error}");
    target.stop(id);
    target.daemon.remove(key).await.unwrap();
    target.daemon.remove(key).await.unwrap();
    assert_eq!(target.ctr("containers ls -q"), "");
    assert!(!Path::new(&task.stdio.stdout).exists());
    // The image's own two snapshots stay, as after any pull.
    target.collect_garbage();
    assert_eq!(target.ctr("snapshots ls").lines().count(), 3);
    target.ctr(&format!("run --rm {RUNTIME} {IMAGE} tsagent-kept-again cat /etc/version"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undo_leaves_nothing() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-undone").await;
    world.run();
    let arrival = world.leave().await;
    let target = &world.target;
    let before = target.inventory();
    let layer = arrival.content.last().unwrap();

    for stage in ["opened", "half a blob", "all blobs", "created", "failed to create"] {
        let mut arriving = target.daemon.arrival(&world.key).await.unwrap();
        if stage == "half a blob" {
            let mut writer = arriving.blob(layer).await.unwrap();
            writer.write(vec![0; 10].into()).await.unwrap();
            assert_ne!(target.ctr("content active").lines().count(), 1);
        }
        if matches!(stage, "all blobs" | "created" | "failed to create") {
            world.bring(&mut *arriving, &arrival.content).await;
        }
        if stage == "created" {
            arriving.create(&arrival).await.unwrap();
            assert_eq!(target.task_status(world.key.id()).as_deref(), Some("CREATED"));
        }
        if stage == "failed to create" {
            let mut bad = arrival.clone();
            bad.record.runtime = "io.containerd.nobody.v1".into();
            let error = arriving.create(&bad).await.unwrap_err();
            assert_eq!(error.code(), Code::Runtime, "{error}");
        }
        assert_ne!(target.inventory(), before, "{stage}: nothing was there to undo");
        // The agent dies; the next one finds what it left.
        drop(arriving);
        let mut unfinished = target.daemon.unfinished().await.unwrap();
        let (key, again) = unfinished.pop().expect("the lease is a record of it");
        assert_eq!(key, world.key);
        again.undo().await.unwrap();
        assert_eq!(target.inventory(), before, "{stage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stdio_keeps_its_kind() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-stdio").await;
    world.run();
    let arrival = world.leave().await;
    let (target, id) = (&world.target, world.key.id());
    let before = target.inventory();
    let log = world.files.path().join("log");
    let file = format!("file://{}", log.display());

    let mut terminal = arrival.clone();
    terminal.stdio.terminal = true;
    let spec = terminal.record.spec.as_mut().unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&spec.value).unwrap();
    json["process"]["terminal"] = true.into();
    spec.value = json.to_string().into();
    let mut logged = arrival.clone();
    logged.stdio.stdin.clear();
    logged.stdio.stdout = file.clone();
    logged.stdio.stderr = file.clone();
    let mut silent = arrival.clone();
    silent.stdio = Default::default();

    for (arrival, terminal, stdout, output) in [
        (
            terminal,
            true,
            "/run/transship/fifo/default/tsagent-stdio/tsagent-stdio-stdout",
            "hello\r\n",
        ),
        (logged, false, file.as_str(), "hello\n"),
        (silent, false, "", ""),
    ] {
        let mut arriving = target.daemon.arrival(&world.key).await.unwrap();
        world.bring(&mut *arriving, &arrival.content).await;
        arriving.create(&arrival).await.unwrap();
        arriving.start().await.unwrap();
        let stdio = target.daemon.task(&world.key).await.unwrap().unwrap().stdio;
        assert_eq!((stdio.terminal, stdio.stdout.as_str()), (terminal, stdout));
        if !output.is_empty() {
            let path = stdout.trim_start_matches("file://");
            wait_until("the log is written", || {
                path != log.to_string_lossy() || log.metadata().is_ok_and(|m| m.len() > 0)
            });
            let mut read = vec![0; output.len()];
            fs::File::open(path).unwrap().read_exact(&mut read).unwrap();
            assert_eq!(String::from_utf8(read).unwrap(), output);
        }
        // Stopped again, it may be undone even though it had been started.
        target.stop(id);
        arriving.undo().await.unwrap();
        assert_eq!(target.inventory(), before, "{stdout:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undo_spares_what_others_made() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-spared").await;
    world.run();
    let arrival = world.leave().await;
    let target = &world.target;
    // The same image, and a container of the same name.
    let archive = image(world.files.path(), IMAGE, "1");
    target.ctr(&format!("images import {}", archive.display()));
    let id = world.key.id();
    target.ctr(&format!("run -d {RUNTIME} {IMAGE} {id} sleep 1000"));
    // An import leaves a blob that nothing refers to.
    target.collect_garbage();
    let before = target.inventory();

    let taken = target.daemon.taken(&world.key, "overlayfs").await.unwrap();
    assert_eq!(taken.as_deref(), Some("a container"));
    let mut arriving = target.daemon.arrival(&world.key).await.unwrap();
    assert_eq!(world.bring(&mut *arriving, &arrival.content).await, 0);
    let error = arriving.create(&arrival).await.unwrap_err();
    assert_eq!(error.code(), Code::NameTaken, "{error}");
    arriving.undo().await.unwrap();
    assert_eq!(target.inventory(), before);
    assert_eq!(target.task_status(id).as_deref(), Some("RUNNING"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_users_tag_is_not_moved() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-tag").await;
    world.run();
    let arrival = world.leave().await;
    let target = &world.target;
    let other = image(world.files.path(), IMAGE, "2");
    target.ctr(&format!("images import {}", other.display()));
    let tag = |node: &Node| {
        let table = node.ctr("images ls");
        let line = table.lines().find(|line| line.starts_with(IMAGE)).expect("the tag").to_owned();
        line.split_whitespace().nth(2).expect("its digest").to_owned()
    };
    let theirs = tag(target);

    let mut arriving = target.daemon.arrival(&world.key).await.unwrap();
    // The first layer is the same in both.
    assert_eq!(world.bring(&mut *arriving, &arrival.content).await, 4);
    arriving.create(&arrival).await.unwrap();
    arriving.start().await.unwrap();
    arriving.keep().await.unwrap();
    assert_eq!(tag(target), theirs);
    let described = target.daemon.describe(&world.key).await.unwrap();
    let name = format!("transship.internal/image@{}", tag(&world.source));
    assert_eq!(described.record.image, name);
    let id = world.key.id();
    assert_eq!(target.ctr(&format!("tasks exec --exec-id v {id} cat /etc/version")), "1");
    let origin = target.daemon.origin_of(&world.key).await.unwrap();
    assert_eq!(origin[0].digest, tag(&world.source));
}

#[tokio::test(flavor = "multi_thread")]
async fn content_of_another_namespace_needs_no_bytes() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-shared").await;
    world.run();
    let arrival = world.leave().await;
    let target = &world.target;
    let archive = image(world.files.path(), IMAGE, "1");
    target.ctr_in("other", &format!("images import --no-unpack {}", archive.display()));

    let mut arriving = target.daemon.arrival(&world.key).await.unwrap();
    assert_eq!(world.bring(&mut *arriving, &arrival.content).await, 0);
    arriving.create(&arrival).await.unwrap();
    // Gone there, it must stay here.
    target.ctr_in("other", &format!("images rm --sync {IMAGE}"));
    arriving.start().await.unwrap();
    arriving.keep().await.unwrap();
    target.collect_garbage();
    let origin = target.daemon.origin_of(&world.key).await.unwrap();
    assert_eq!(target.daemon.missing("default", &origin).await.unwrap(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_containerd_is_survived() {
    if !in_private() {
        return;
    }
    let mut world = World::with("tsagent-restart").await;
    world.run();
    let arrival = world.leave().await;
    let before = world.target.inventory();
    let mut arriving = world.target.daemon.arrival(&world.key).await.unwrap();
    world.bring(&mut *arriving, &arrival.content).await;
    arriving.create(&arrival).await.unwrap();

    world.target.kill_containerd();
    let error = arriving.start().await.unwrap_err();
    assert_eq!(error.code(), Code::Daemon, "{error}");
    let error = arriving.undo().await.unwrap_err();
    assert_eq!(error.code(), Code::Daemon, "{error}");
    world.target.start_containerd().await;
    let (_, again) = world.target.daemon.unfinished().await.unwrap().pop().unwrap();
    again.undo().await.unwrap();
    assert_eq!(world.target.inventory(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_not_the_blob_are_refused() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-bytes").await;
    world.run();
    let arrival = world.leave().await;
    let target = &world.target;
    let before = target.inventory();
    let layer = arrival.content.last().unwrap();
    let size = usize::try_from(layer.size).unwrap();

    let mut arriving = target.daemon.arrival(&world.key).await.unwrap();
    for (what, bytes) in [("wrong", size), ("too short", size - 1)] {
        let mut writer = arriving.blob(layer).await.unwrap();
        writer.write(vec![0; bytes].into()).await.unwrap();
        let error = writer.commit().await.unwrap_err();
        assert_eq!(error.code(), Code::Image, "{what}: {error}");
    }
    let mut writer = arriving.blob(layer).await.unwrap();
    let error = writer.write(vec![0; size + 1].into()).await.unwrap_err();
    assert_eq!(error.code(), Code::Image, "too long: {error}");
    drop(writer);
    // What was spoilt does not spoil the next attempt.
    let mut half = arriving.blob(layer).await.unwrap();
    half.write(vec![0; size / 2].into()).await.unwrap();
    drop(half);
    copy(&world.source.daemon, &mut *arriving, layer).await.unwrap();

    let error = arriving.create(&arrival).await.unwrap_err();
    assert_eq!(error.code(), Code::Image, "blobs are missing: {error}");
    arriving.undo().await.unwrap();
    assert_eq!(target.inventory(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_move_is_refused_by_name() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-refused").await;
    let (source, key) = (&world.source, &world.key);
    let says = |error: DaemonError, code: Code, part: &str| {
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(part), "{part:?} is not in {error}");
    };

    let error = source.daemon.describe(key).await.unwrap_err();
    says(error, Code::UnknownContainer, &key.to_string());

    let root = world.files.path().join("base-1");
    source
        .ctr(&format!("run -d {RUNTIME} --rootfs {} tsagent-root /bin/sleep 1000", root.display()));
    let rootfs = ContainerKey::new("default", "tsagent-root").unwrap();
    let error = source.daemon.origin_of(&rootfs).await.unwrap_err();
    says(error, Code::Image, "tsagent-root");
    source.stop("tsagent-root");

    source.ctr(&format!("containers create {RUNTIME} {IMAGE} {}", key.id()));
    let described = source.daemon.describe(key).await.unwrap();
    assert!(described.task.is_none());
    assert_eq!(source.daemon.task(key).await.unwrap().map(|t| t.pid), None);
    assert_eq!(source.daemon.origin_of(key).await.unwrap().len(), 5);
    let newer = image(world.files.path(), IMAGE, "2");
    source.ctr(&format!("images import {}", newer.display()));
    says(source.daemon.origin_of(key).await.unwrap_err(), Code::Image, "is not what container");
    source.ctr(&format!("images rm {IMAGE}"));
    says(source.daemon.origin_of(key).await.unwrap_err(), Code::Image, IMAGE);

    assert!(source.daemon.has_snapshotter("overlayfs").await.unwrap());
    assert!(!source.daemon.has_snapshotter("devmapper").await.unwrap());
    assert!(source.daemon.free_disk().await.unwrap() > 0);
    assert_eq!(world.target.daemon.taken(key, "overlayfs").await.unwrap(), None);
    assert_eq!(world.target.daemon.taken(key, "nobody").await.unwrap(), None);

    let nowhere = world.files.path().join("no.sock");
    let error = Containerd::at(&nowhere).version().await.unwrap_err();
    says(error, Code::Daemon, &nowhere.display().to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_has_ours_only_and_a_namespace_comes_and_goes() {
    if !in_private() {
        return;
    }
    let world = World::with("tsagent-listed").await;
    let source = &world.source;
    source.ctr(&format!("containers create {RUNTIME} {IMAGE} tsagent-theirs"));
    for (runtime, id) in [
        (transship_types::RUNTIME, "tsagent-one"),
        (transship_types::RUNTIME_AS_RUNC, "tsagent-two"),
    ] {
        source.ctr(&format!("containers create --runtime {runtime} {IMAGE} {id}"));
    }
    for namespace in [None, Some("default")] {
        let listed = source.daemon.list(namespace).await.unwrap();
        let ids: Vec<_> = listed.iter().map(|entry| entry.key.id()).collect();
        assert_eq!(ids, ["tsagent-one", "tsagent-two"]);
        assert!(listed.iter().all(|entry| entry.image == IMAGE && entry.task.is_none()));
    }
    assert!(source.daemon.list(Some("empty")).await.unwrap().is_empty());

    let before = world.target.inventory();
    let key = ContainerKey::new("brand-new", "tsagent-new").unwrap();
    let arriving = world.target.daemon.arrival(&key).await.unwrap();
    assert!(world.target.ctr("namespaces ls -q").contains("brand-new"));
    arriving.undo().await.unwrap();
    assert_eq!(world.target.inventory(), before);
}
