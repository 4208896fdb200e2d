//! What nobody finds in a log: a container's environment, which is in its
//! memory as well, its annotations, and the ticket it travels under.

use std::fs;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use transship_integration::agents::{Pair, Site};

use crate::world::{World, refused_with, runs_on};

const CANARY: &str = "canary-in-a-container";

/// Agents at their most talkative, and so are the shims, whose messages are
/// in containerd's log.
#[test]
fn no_log_shows_what_is_in_a_container() -> Result<()> {
    World::of(Pair::without_agents()?)?.run(|world| {
        let World { a, b, .. } = world;
        for site in [a, b] {
            site.start_agent_with(&["RUST_LOG=trace"])?;
        }
        let (environment, annotation) = (format!("TOKEN={CANARY}"), format!("note={CANARY}"));
        let id = "guest";
        world.start_counter(a, id, &["--env", &environment, "--annotation", &annotation])?;
        a.answer(&["migrate", id, "--to", "b", "--max-pause", "60s"])?;
        runs_on(b, id)?;
        let ticket = ticket(b, id)?;
        // One that fails has more to say.
        a.stop_agent(Signal::SIGTERM)?;
        a.start_agent_with(&["RUST_LOG=trace", "TRANSSHIP_CRIU=/nonexistent"])?;
        let refused = refused_with(b.transship(&["migrate", id, "--to", "a"])?, "criu")?;
        ensure!(!format!("{refused:?}").contains(CANARY), "{refused:#?}");

        for site in [a, b] {
            for log in ["transshipd.log", "containerd.log"] {
                let text = fs::read_to_string(site.dir().join(log))?;
                ensure!(text.lines().count() > 20, "{log} of {} says little", site.name());
                for secret in [&ticket, CANARY, "PRIVATE KEY"] {
                    let shown = text.lines().find(|line| line.contains(secret));
                    ensure!(shown.is_none(), "{log} of {}: {shown:?}", site.name());
                }
            }
        }
        world.remove(b, id)
    })
}

/// Under which it has come, as its spec says.
fn ticket(site: &Site, id: &str) -> Result<String> {
    let pid = site.task_pid(id)?;
    let bundle = format!("/run/containerd/io.containerd.runtime.v2.task/default/{id}");
    let spec = site.sh(&format!("cat {bundle}/config.json"))?;
    let said = spec.split("dev.transship.ticket").nth(1).and_then(|rest| rest.split('"').nth(2));
    ensure!(said.is_some_and(|ticket| ticket.len() == 32), "no ticket of {pid} in {bundle}");
    Ok(said.unwrap_or_default().to_owned())
}
