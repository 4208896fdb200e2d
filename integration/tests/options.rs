//! Runtime options in every form that clients send them, under both names of
//! our shim.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use containerd_shim_protos::{protobuf::Message as _, shim::oci};
use nix::sys::signal::Signal;
use prost::Message;
use prost_types::Any;
use transship_integration::{World, daemon::Runtime, eventually, promise, stdio::Stdio};

/// What containerd's client sends to a runtime it does not know by name
/// (`containerd.linux.runc.CreateOptions`); the fields used here.
#[derive(Clone, PartialEq, Message)]
struct LegacyOptions {
    #[prost(bool, tag = "1")]
    no_pivot_root: bool,
    #[prost(string, tag = "9")]
    shim_cgroup: String,
}

/// `runtimeoptions.v1.Options`: Docker and CRI.
#[derive(Clone, PartialEq, Message)]
struct Configured {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(string, tag = "2")]
    config_path: String,
}

fn any(type_url: &str, value: Vec<u8>) -> Option<Any> {
    Some(Any { type_url: type_url.into(), value })
}

fn runc_options(options: &oci::Options) -> Result<Option<Any>> {
    Ok(any("containerd.runc.v1.Options", options.write_to_bytes()?))
}

/// A cgroup for shims, in every hierarchy.
fn shims_cgroup(world: &World) -> Result<()> {
    world.node.sh("for h in /sys/fs/cgroup /sys/fs/cgroup/*; do [ ! -f $h/cgroup.procs ] || mkdir -p $h/shims; done")?;
    // A v1 cpuset takes nobody before it has processors and memory.
    world.node.sh("cd /sys/fs/cgroup/cpuset 2>/dev/null || exit 0; for f in cpus mems; do cat cpuset.$f >shims/cpuset.$f; done")?;
    Ok(())
}

fn remove_shims_cgroup(world: &World) -> Result<()> {
    eventually("the cgroup for shims to be empty", || {
        Ok(world
            .node
            .run(&[
                "sh",
                "-c",
                "find /sys/fs/cgroup -depth -type d -name shims -exec rmdir {} + 2>/dev/null",
            ])?
            .code
            == 0)
    })
}

/// The folder in which an OCI runtime keeps the state of container `one`.
fn state_in(world: &World, root: &str) -> bool {
    world.node.path(format!("{root}/default/one")).is_dir()
}

fn start(world: &World, options: Option<Any>) -> Result<()> {
    world.container("one", &[], &["sleep", "1000"])?;
    world.api.create("one", &Stdio::null().streams, options).context("create")?;
    world.api.start("one", "").context("start")?;
    Ok(())
}

promise! {
    fn none_at_all_means_runc(world) {
        start(&world, None)?;
        assert!(state_in(&world, "/run/containerd/runc"));
        world.remove("one")?;
        world.finish()
    }
}

/// `BinaryName` and `Root`: crun, with its state where it was told to.
fn choose_crun(world: World) -> Result<()> {
    world.node.suit_crun()?;
    let root = world.node.dir().join("crun");
    let options = oci::Options {
        binary_name: "crun".into(),
        root: root.display().to_string(),
        ..Default::default()
    };
    start(&world, runc_options(&options)?)?;
    assert!(root.join("default/one/status").is_file(), "crun's state");
    let io = Stdio::output(&world.node)?;
    assert_eq!(
        world.api.exec_to_end("one", "extra", &["sh", "-c", "echo hi; exit 5"], &io)?.status,
        5
    );
    assert_eq!(io.stdout.await_end()?, "hi\n");
    world.api.pause("one")?;
    world.api.resume("one")?;
    assert_eq!(world.api.pids("one")?.len(), 1);
    world.api.update("one", &serde_json::json!({"pids": {"limit": 44}}))?;
    assert_eq!(world.cgroup_file("one", "pids", "pids.max")?, "44");
    world.api.kill("one", "", Signal::SIGKILL)?;
    assert_eq!(world.api.wait("one", "")?.status, 137);
    world.remove("one")?;
    assert!(!root.join("default/one").exists());
    world.finish()
}

promise! {
    fn another_runtime_can_be_chosen(world) { choose_crun(world) }
}

#[test]
fn another_runtime_can_be_chosen_under_the_other_name() -> Result<()> {
    choose_crun(World::new(Runtime::TransshipAsRunc)?)
}

promise! {
    /// The gid that owns a container's pipes (runc gives them to the user that
    /// the process runs as).
    fn pipes_belong_to_whom_the_options_name(world) {
        let options = oci::Options { io_uid: 1234, io_gid: 4321, ..Default::default() };
        let io = Stdio::output(&world.node)?;
        world.container("one", &[], &["sh", "-c", "stat -Lc %u:%g /proc/self/fd/1; sleep 1000"])?;
        world.api.create("one", &io.streams, runc_options(&options)?)?;
        world.api.start("one", "")?;
        io.stdout.await_text("0:4321")?;
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// A cgroup for the shim itself.
    fn the_shim_goes_where_the_options_say(world) {
        let options = oci::Options { shim_cgroup: "/shims".into(), ..Default::default() };
        shims_cgroup(&world)?;
        start(&world, runc_options(&options)?)?;
        let shim = world.shims()?[0];
        let procs = fs::read_to_string(world.node.cgroup("memory", "shims/cgroup.procs")?)?;
        assert!(procs.lines().any(|pid| pid == shim.to_string()), "{shim} in {procs:?}");
        world.remove("one")?;
        remove_shims_cgroup(&world)?;
        world.finish()
    }
}

/// Forms that only a runtime of another name than runc's is ever sent:
/// containerd itself refuses them where the name begins with that.
fn ours() -> Result<World> {
    World::new(Runtime::Transship)
}

#[test]
fn the_old_type_of_options_is_understood() -> Result<()> {
    let world = ours()?;
    let options = LegacyOptions { shim_cgroup: "/shims".into(), ..Default::default() };
    shims_cgroup(&world)?;
    start(&world, any("containerd.linux.runc.CreateOptions", options.encode_to_vec()))?;
    let procs = fs::read_to_string(world.node.cgroup("memory", "shims/cgroup.procs")?)?;
    assert!(
        procs.lines().any(|pid| Ok(vec![pid.parse().unwrap_or(0)]) == world.shims().map_err(drop))
    );
    world.remove("one")?;
    remove_shims_cgroup(&world)?;
    world.finish()
}

/// A TOML file, as Docker and CRI name one in their configuration.
#[test]
fn options_can_come_from_a_file() -> Result<()> {
    let world = ours()?;
    world.node.suit_crun()?;
    let root = world.node.dir().join("state");
    let file = world.node.dir().join("options.toml");
    fs::write(&file, format!("BinaryName = \"crun\"\nRoot = \"{}\"\n", root.display()))?;
    start(&world, configured(&file))?;
    assert!(root.join("default/one/status").is_file(), "crun's state");
    world.remove("one")?;
    world.finish()
}

fn configured(file: &Path) -> Option<Any> {
    let options = Configured { type_url: String::new(), config_path: file.display().to_string() };
    any("runtimeoptions.v1.Options", options.encode_to_vec())
}

/// Ignoring options would run the container with settings nobody wanted.
#[test]
fn what_is_not_understood_is_refused_by_name() -> Result<()> {
    let world = ours()?;
    world.container("one", &[], &["sleep", "1000"])?;
    let bad = world.node.dir().join("bad.toml");
    fs::write(&bad, "BinaryName = [\n")?;
    let missing = world.node.dir().join("missing.toml");
    for (options, named) in [
        (any("example.v9.Options", vec![8, 1]), "example.v9.Options"),
        (configured(&bad), "bad.toml"),
        (configured(&missing), "missing.toml"),
    ] {
        let error = world.api.create("one", &Stdio::null().streams, options).expect_err(named);
        assert!(error.message().contains(named), "{named} in {error:?}");
    }
    world.api.create("one", &Stdio::null().streams, None).context("afterwards")?;
    world.remove("one")?;
    world.finish()
}

/// The client decides by the runtime's name what it sends; `ctr` with its own
/// flags, under both names.
#[test]
fn ctr_can_choose_the_runtime() -> Result<()> {
    for runtime in [Runtime::Transship, Runtime::TransshipAsRunc] {
        let world = World::new(runtime)?;
        let name = runtime.name();
        let done = world.node.ctr(&[
            "run",
            "--rm",
            "--runtime",
            name,
            world.image,
            "one",
            "echo",
            "hi",
        ])?;
        assert_eq!((done.code, done.stdout.as_str()), (0, "hi\n"), "{}", done.stderr);
        world.finish()?;
    }
    Ok(())
}

/// `-info` names the runtime and tells what it can do.
#[test]
fn the_shim_describes_itself() -> Result<()> {
    let world = World::new(Runtime::Transship)?;
    let version = world.node.ok(&[world.runtime.binary(), "-v"])?;
    assert!(version.contains("io.containerd.transship.v2"), "{version}");
    world.node.sh(&format!("{} -info </dev/null >/dev/null", world.runtime.binary()))?;
    world.finish()
}
