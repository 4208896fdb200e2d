//! What fails half way: the container runs on at its source, or it has
//! arrived; never both, never neither.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use transship_integration::{eventually, until};

use crate::world::{
    COUNTER, FOR_TAR, World, counts_on, refused_with, runs_on, unchanged, with_agents,
};

const ID: &str = "lucky";

/// CRIU can dump it and the target's CRIU cannot restore it: a file it has
/// open is another one there.
#[test]
fn a_restore_that_fails() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        for (site, text) in [(a, "what it has open"), (b, "something else")] {
            site.sh(&format!("mkdir /run/shared; echo {text} > /run/shared/file"))?;
        }
        let before = b.inventory()?;
        let bind = "--mount=type=bind,src=/run/shared,dst=/shared,options=rbind:rw";
        // With a connection to itself, which must outlive all this.
        let script = format!(
            "exec 3< /shared/file; nc -l -p 5000 -e cat & \
             (while true; do echo ping; sleep 0.05; done) | \
             (until nc 127.0.0.1 5000; do sleep 0.05; done) > /tmp/pongs & {COUNTER}"
        );
        world.start(a, ID, &[bind], &script)?;
        counts_on(a, ID, 0)?;
        let pongs = || Ok::<_, anyhow::Error>(crate::world::read(a, ID, "/tmp/pongs")?.len());
        // The client may have come before the server listened, and try again.
        eventually("the connection to carry something", || Ok(pongs()? > 0))?;
        let here = a.inventory()?;

        let refused = refused_with(a.transship(&["migrate", ID, "--to", "b"])?, "runtime")?;
        ensure!(
            refused.reason.contains("shared/file has bad size"),
            "CRIU's reason is not told: {refused:#?}"
        );
        ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
        runs_on(a, ID)?;
        let so_far = pongs()?;
        eventually("the connection to go on", || Ok(pongs()? > so_far))?;
        unchanged(a, &here)?;
        b.nothing_more(&before)?;

        b.sh("echo what it has open > /run/shared/file")?;
        a.migrate(ID)?;
        runs_on(b, ID)?;
        world.remove(b, ID)
    })
}

#[test]
fn the_targets_agent_dies() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_counter(a, ID, &[FOR_TAR])?;
        let here = a.inventory()?;

        // Before its shim has it: the source goes on, the next agent cleans up.
        let shim = b.gate("containerd-shim-transship-v2")?;
        shim.shut()?;
        let command = a.begin(&["migrate", ID, "--to", "b"])?;
        shim.await_one()?;
        b.stop_agent(Signal::SIGKILL)?;
        let refused = refused_with(command.end()?, "link")?;
        ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
        runs_on(a, ID)?;
        shim.open()?;
        b.start_agent()?;
        world.nothing_on_b()?;
        unchanged(a, &here)?;

        // While the shims have it: they need no agent.
        let tar = b.gate("tar")?;
        tar.shut()?;
        let command = a.begin(&["migrate", ID, "--to", "b"])?;
        tar.await_one()?;
        b.stop_agent(Signal::SIGKILL)?;
        tar.open()?;
        eventually("it to run on b", || Ok(b.status(ID)? == "RUNNING"))?;
        runs_on(b, ID)?;
        ensure!(a.status(ID)? != "RUNNING", "it runs twice");
        b.start_agent()?;
        let answer = command.end()?;
        ensure!(answer.is_ok_and(|report| report["target_state"] == "RUNNING"));
        ensure!(a.status(ID)? == "NONE");
        world.nothing_on_a()?;
        world.remove(b, ID)
    })
}

#[test]
fn the_sources_agent_dies() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_counter(a, ID, &[FOR_TAR])?;
        let here = a.inventory()?;
        let tar = b.gate("tar")?;
        tar.shut()?;
        let command = a.begin(&["migrate", ID, "--to", "b"])?;
        tar.await_one()?;
        a.stop_agent(Signal::SIGKILL)?;
        refused_with(command.end()?, "link")?;
        // Its shim takes that for a cancel.
        eventually("it to go on", || Ok(a.status(ID)? == "RUNNING"))?;
        runs_on(a, ID)?;
        tar.open()?;
        world.nothing_on_b()?;
        a.start_agent()?;
        let ending = until("an ending of the migration", || {
            let ending = a.migrations()?.last().map(|one| one["ending"].clone());
            Ok(ending.filter(|ending| ending != "running" && ending != "in-doubt"))
        })?;
        ensure!(ending == "stayed-home", "{ending}");
        unchanged(a, &here)?;
        runs_on(a, ID)?;
        a.migrate(ID)?;
        runs_on(b, ID)?;
        world.remove(b, ID)
    })
}

#[test]
fn the_targets_shim_and_daemon_die() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_counter(a, ID, &[FOR_TAR])?;
        let here = a.inventory()?;

        let tar = b.gate("tar")?;
        tar.shut()?;
        let command = a.begin(&["migrate", ID, "--to", "b"])?;
        tar.await_one()?;
        b.sh("kill -KILL $(pidof containerd-shim-transship-v2)")?;
        let refused = refused_with(command.end()?, "runtime")?;
        ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
        runs_on(a, ID)?;
        tar.open()?;
        world.nothing_on_b()?;
        unchanged(a, &here)?;

        // The daemon is not needed until the container runs, and then again.
        tar.shut()?;
        let command = a.begin(&["migrate", ID, "--to", "b"])?;
        tar.await_one()?;
        b.stop_containerd(Signal::SIGKILL)?;
        tar.open()?;
        b.start_containerd()?;
        let answer = command.end()?;
        ensure!(answer.as_ref().is_ok_and(|r| r["target_state"] == "RUNNING"), "{answer:#?}");
        ensure!(a.status(ID)? == "NONE");
        runs_on(b, ID)?;
        world.nothing_on_a()?;
        world.remove(b, ID)
    })
}

/// A link that breaks while the container is frozen.
#[test]
fn the_link_breaks() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_counter(a, ID, &[FOR_TAR])?;
        let here = a.inventory()?;
        let tar = b.gate("tar")?;
        tar.shut()?;
        let command = a.begin(&["migrate", ID, "--to", "b"])?;
        tar.await_one()?;
        a.await_phase(ID, "restore")?;
        // Every connection to the other node, of agents and shims (ss(8)).
        let reset = a.sh(&format!("ss -HK dst {}", b.address()?))?;
        ensure!(
            reset.lines().count() >= 2,
            "this kernel resets no connections (CONFIG_INET_DIAG_DESTROY): {reset}"
        );
        eventually("it to go on", || Ok(a.status(ID)? == "RUNNING"))?;
        tar.open()?;
        let refused = refused_with(command.end()?, "runtime")?;
        ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
        runs_on(a, ID)?;
        world.nothing_on_b()?;
        unchanged(a, &here)?;
        world.remove(a, ID)
    })
}
