//! Post-copy: a container runs on the target while pages of it are still at
//! its source, whatever becomes of the link meanwhile.

use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use transship_integration::{
    agents::{Command, Site},
    eventually,
    images::Image,
    workload::Workload,
};

use crate::world::{World, with_agents};

const ID: &str = "late";

/// Writes all of its memory again before a round can carry half of it.
const BUSY: [&str; 7] = ["workload", "--mib", "24", "--threads", "2", "--rate", "40"];

/// Slowly enough that the pages which follow can be met on their way.
const ALWAYS: [&str; 8] =
    ["migrate", ID, "--to", "b", "--post-copy", "always", "--bandwidth", "6MiB/s"];

fn start(world: &World) -> Result<()> {
    world.start_of(&world.a, Image::Workload, ID, &[], &BUSY)
}

/// What the report says of the pages that followed.
fn late(report: &Value) -> Result<&Value> {
    let late = &report["memory"]["post_copy"];
    ensure!(late["pages"].as_u64().is_some_and(|pages| pages > 0), "{report:#}");
    Ok(late)
}

/// Every connection between the agents' port here and anybody ends at once,
/// at both ends, and no new one comes to be.
fn cut(site: &Site) -> Result<()> {
    site.sh(
        "nft -f - << 'END'\n\
         table inet cut {\n\
           chain in { type filter hook input priority 0; tcp dport 7430 reject with tcp reset; }\n\
           chain out { type filter hook output priority 0; tcp sport 7430 reject with tcp reset; }\n\
         }\nEND",
    )
    .map(drop)
}

/// The source has tried to connect again, in vain.
fn await_loss(world: &World) -> Result<()> {
    eventually("the source to notice", || {
        let log = fs::read_to_string(world.a.dir().join("containerd.log"))?;
        Ok(log.contains("the target is not reached"))
    })
}

fn heal(site: &Site) -> Result<()> {
    site.sh("nft delete table inet cut").map(drop)
}

/// A migration that has come so far that it runs on `b` and lacks pages.
fn owed(world: &World) -> Result<Command> {
    start(world)?;
    let command = world.a.begin(&ALWAYS)?;
    world.a.await_phase(ID, "post-copy")?;
    Ok(command)
}

/// The end of such a one: all of it is on `b`, and nothing on `a`.
fn arrived(world: &World, command: Command) -> Result<Value> {
    let report = command.end()?.map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
    late(&report)?;
    Workload::of(&world.b, ID)?.verify()?;
    ensure!(world.a.status(ID)? == "NONE");
    Ok(report)
}

#[test]
fn it_runs_before_its_memory_is_there_and_can_go_back() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        let command = owed(world)?;
        // It runs, and reads all of its memory, while most of that is not here.
        ensure!(b.status(ID)? == "RUNNING");
        ensure!(a.status(ID)? != "NONE", "its source keeps what is owed");
        Workload::of(b, ID)?.verify()?;
        let report = arrived(world, command)?;
        let asked = report["memory"]["postcopy_requests"].as_u64().context("requests")?;
        ensure!(asked > 0, "{report:#}");

        // Nothing of it is left that a second migration would meet.
        b.migrate(ID)?;
        Workload::of(a, ID)?.verify()?;
        world.remove(a, ID)?;
        b.ctr_ok(&["image", "rm", "--sync", Image::Workload.reference()])?;
        a.ctr_ok(&["image", "rm", "--sync", Image::Workload.reference()])?;
        world.nothing_left()
    })
}

#[test]
fn a_link_that_is_lost_meanwhile_is_made_again() -> Result<()> {
    with_agents(|world| {
        let command = owed(world)?;
        cut(&world.b)?;
        await_loss(world)?;
        // Neither has decided anything by itself.
        ensure!(world.b.status(ID)? == "RUNNING" && world.a.status(ID)? != "NONE");
        heal(&world.b)?;
        let report = arrived(world, command)?;
        ensure!(late(&report)?["recoveries"].as_u64() > Some(0), "{report:#}");
        world.remove(&world.b, ID)
    })
}

#[test]
fn an_agent_that_starts_anew_lets_the_source_come_back() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        let command = owed(world)?;
        cut(b)?;
        b.stop_agent(Signal::SIGKILL)?;
        // Somebody in the container waits for pages meanwhile.
        let verified = thread::scope(|scope| {
            let waiting = scope.spawn(|| Workload::of(b, ID)?.verify());
            await_loss(world)?;
            b.start_agent()?;
            heal(b)?;
            waiting.join().expect("no panic")
        });
        verified?;
        let report = arrived(world, command)?;
        ensure!(late(&report)?["recoveries"].as_u64() > Some(0), "{report:#}");
        ensure!(a.migrations()?.iter().all(|one| one["ending"] != "in-doubt"));
        world.remove(b, ID)
    })
}
