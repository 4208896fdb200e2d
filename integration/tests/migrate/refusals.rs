//! What is refused before anything is touched: the container runs on, and the
//! target has nothing of it.

use std::{fs, os::unix::fs::PermissionsExt};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use transship_integration::{
    agents::{Authority, Pair, Site},
    daemon::Runtime,
    eventually,
    images::Image,
};

use crate::world::{World, refused_with, runs_on, unchanged, with_agents};

/// Refused with `code`, with a remedy, with these words in the reason; nothing
/// has changed on either node.
fn refuses(world: &World, id: &str, code: &str, words: &str) -> Result<()> {
    refuses_to(world, id, "b", code, words)
}

fn refuses_to(world: &World, id: &str, to: &str, code: &str, words: &str) -> Result<()> {
    let here = world.a.inventory()?;
    let refused = refused_with(world.a.transship(&["migrate", id, "--to", to])?, code)?;
    ensure!(!refused.remedy.is_empty(), "no remedy: {refused:#?}");
    ensure!(refused.reason.contains(words), "no {words:?}: {refused:#?}");
    ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
    unchanged(&world.a, &here)?;
    world.nothing_on_b()
}

#[test]
fn what_cannot_leave() -> Result<()> {
    with_agents(|world| {
        let World { a, .. } = world;
        refuses(world, "nobody", "unknown-container", "nobody")?;
        refuses(world, "no/name", "unknown-container", "no/name")?;

        let id = "counter";
        world.start_counter(a, id, &[])?;
        refuses_to(world, id, "c", "unknown-node", "known are: b")?;
        refuses_to(world, id, "a@10.77.0.1:7430", "unknown-node", "this node itself")?;
        refuses_to(world, id, "b@10.77.0.2:1", "unreachable", "10.77.0.2:1")?;
        refuses_to(world, id, "c@10.77.0.2:7430", "not-trusted", "c")?;
        runs_on(a, id)?;

        a.ctr_ok(&["task", "pause", id])?;
        refuses(world, id, "not-running", "PAUSED")?;
        ensure!(a.status(id)? == "PAUSED");
        a.ctr_ok(&["task", "resume", id])?;

        let mut session =
            a.spawn("session", &["ctr", "task", "exec", "--exec-id", "s", id, "sleep", "900"])?;
        eventually("the session", || Ok(a.ctr_ok(&["task", "ps", id])?.contains("exec_id")))?;
        refuses(world, id, "unsupported", "sleep")?;
        a.ctr_ok(&["task", "kill", "-s", "KILL", "--exec-id", "s", id])?;
        // It removes its fifos as it ends.
        session.wait()?;
        runs_on(a, id)?;

        a.ctr_ok(&["task", "kill", "-s", "KILL", id])?;
        eventually("it to stop", || Ok(a.status(id)? == "STOPPED"))?;
        refuses(world, id, "not-running", "STOPPED")?;
        a.ctr_ok(&["task", "rm", id])?;
        refuses(world, id, "not-running", "no task")?;
        a.ctr_ok(&["container", "rm", id])?;

        let shown = refusing(
            world,
            "stock",
            &["--runtime", Runtime::Stock.name()],
            "foreign-runtime",
            "runc",
        )?;
        ensure!(shown.is_none(), "containers of other runtimes are not listed: {shown:?}");
        refusing(world, "shared", &["--net-host"], "host-network", "network")?;
        a.sh("ip netns add foreign")?;
        let netns = ["--with-ns", "network:/run/netns/foreign"];
        let shown = refusing(world, "pod", &netns, "unsupported", "/run/netns/foreign")?;
        ensure!(shown.as_deref() == Some("unsupported"), "ps says {shown:?}");
        a.sh("ip netns del foreign; umount /run/netns; rm -r /run/netns /run/mount")?;
        a.sh("mkdir /run/only-here")?;
        let bind = "--mount=type=bind,src=/run/only-here,dst=/mnt,options=rbind:rw";
        refusing(world, "bound", &[bind], "mount", "/run/only-here")?;
        a.sh("rmdir /run/only-here")?;
        world.nothing_left()
    })
}

/// Starts a counter with `flags`, which must not leave; the first reason that
/// `ps` shows against it.
fn refusing(
    world: &World,
    id: &str,
    flags: &[&str],
    code: &str,
    words: &str,
) -> Result<Option<String>> {
    let a = &world.a;
    world.start_counter(a, id, flags)?;
    refuses(world, id, code, words)?;
    runs_on(a, id)?;
    let list = a.answer(&["ps"])?;
    let entry =
        list.as_array().and_then(|all| all.iter().find(|one| one["container"] == id).cloned());
    let shown = entry.and_then(|one| one["refusals"][0]["code"].as_str().map(str::to_owned));
    world.remove(a, id)?;
    Ok(shown)
}

#[test]
fn what_cannot_arrive() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        let id = "guest";
        world.start_counter(a, id, &[])?;

        // The name is taken, by a container or by a snapshot alone.
        let image = b.image(Image::Busybox)?;
        b.ctr_ok(&["container", "create", image, id])?;
        refused_with(a.transship(&["migrate", id, "--to", "b"])?, "name-taken")?;
        b.ctr_ok(&["container", "rm", id])?;
        b.ctr_ok(&["snapshot", "prepare", id])?;
        let refused = refused_with(a.transship(&["migrate", id, "--to", "b"])?, "name-taken")?;
        ensure!(refused.reason.contains("snapshot"), "{refused:#?}");
        b.ctr_ok(&["snapshot", "rm", id])?;
        b.ctr_ok(&["image", "rm", "--sync", image])?;
        world.nothing_on_b()?;
        runs_on(a, id)?;

        // A layer that is on neither node.
        let layer = a.ctr_ok(&["content", "ls"])?;
        let largest = |line: &str| line.split_whitespace().next().map(str::to_owned);
        let layer = layer.lines().find(|line| line.contains("MB") || line.contains("MiB"));
        let layer = layer.and_then(largest).unwrap_or_default();
        a.ctr_ok(&["content", "rm", &layer])?;
        refuses(world, id, "image", &layer)?;
        runs_on(a, id)?;
        world.remove(a, id)
    })
}

/// A second world for what takes other agents or daemons.
#[test]
fn nodes_that_are_not_fit() -> Result<()> {
    let pair = Pair::without_agents()?;
    World::of(pair)?.run(|world| {
        let World { a, b, .. } = world;
        a.start_agent()?;
        let id = "guest";
        world.start_counter(a, id, &[])?;
        refuses(world, id, "unreachable", "b")?;

        let other = Authority::create(b, b.dir().join("other-ca"))?;
        other.issue(b, "b", &b.dir().join("other"))?;
        b.configure_with(&b.dir().join("other"), "")?;
        with_agent(b, &[], || refuses(world, id, "not-trusted", "b"))?;

        let ca = Authority::of(a.dir().join("ca"));
        ca.issue(b, "c", &b.dir().join("misnamed"))?;
        b.configure_with(&b.dir().join("misnamed"), "")?;
        with_agent(b, &[], || refuses(world, id, "not-trusted", "b"))?;

        b.configure("receive_from = [\"z*\"]")?;
        with_agent(b, &[], || refuses(world, id, "not-allowed", "takes no containers from a"))?;
        b.configure("")?;

        with_agent(b, &["TRANSSHIP_CRIU=/nonexistent"], || {
            refuses(world, id, "criu", "no working CRIU")
        })?;
        let old = fake_criu(b, "4.0")?;
        with_agent(b, &[&old], || refuses(world, id, "criu", "4.0.0 is too old"))?;

        b.start_agent()?;
        let newer = fake_criu(a, "9.1")?;
        a.stop_agent(Signal::SIGTERM)?;
        with_agent(a, &[&newer], || refuses(world, id, "criu", "cannot read images of 9.1.0"))?;
        a.start_agent()?;

        b.stop_containerd(Signal::SIGTERM)?;
        let refused = refused_with(a.transship(&["migrate", id, "--to", "b"])?, "daemon")?;
        ensure!(refused.remedy.contains("containerd"), "{refused:#?}");
        b.sh("mount -t tmpfs -o size=6m none /var/lib/containerd")?;
        b.start_containerd()?;
        refused_with(a.transship(&["migrate", id, "--to", "b"])?, "space")?;
        b.stop_containerd(Signal::SIGTERM)?;
        b.sh("umount /var/lib/containerd; rm -rf /run/mount")?;
        b.start_containerd()?;
        world.nothing_on_b()?;
        runs_on(a, id)?;

        // And it was none of the container's fault.
        a.migrate(id)?;
        runs_on(b, id)?;
        world.remove(b, id)
    })
}

fn with_agent(site: &Site, environment: &[&str], check: impl FnOnce() -> Result<()>) -> Result<()> {
    site.start_agent_with(environment)?;
    check()?;
    site.stop_agent(Signal::SIGTERM)
}

/// A program that claims to be this CRIU; how the environment names it.
fn fake_criu(site: &Site, version: &str) -> Result<String> {
    let path = site.dir().join(format!("criu-{version}"));
    fs::write(&path, format!("#!/bin/sh\necho Version: {version}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(format!("TRANSSHIP_CRIU={}", path.display()))
}
