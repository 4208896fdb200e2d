//! Agents that have no more than `transshipd.service` leaves them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use transship_integration::agents::Pair;

use crate::world::{World, runs_on};

const UNIT: &str = include_str!("../../../crates/agent/transshipd.service");

/// What `ProtectSystem=strict` does: everything read-only but the two
/// directories, in a mount namespace of the agent's own.
const STRICT: &str = "mount --make-rprivate / && \
    for own in /run/transship /var/lib/transship; do \
        mkdir -p -m 700 $own && mount --bind $own $own || exit; \
    done; \
    for other in / /run /var /var/lib /etc /usr; do \
        ! mountpoint -q $other || mount -o remount,bind,ro $other || exit; \
    done; \
    ! touch /run/agent-was-here 2> /dev/null || exit; exec \"$@\"";

/// Its capabilities, its view of the file system, no new privileges: systemd
/// would do it with the same system calls.
#[test]
fn a_container_moves_between_agents_that_may_do_little() -> Result<()> {
    let unit: BTreeMap<_, _> = UNIT.lines().filter_map(|line| line.split_once('=')).collect();
    ensure!(unit["ProtectSystem"] == "strict" && unit["NoNewPrivileges"] == "yes");
    let capabilities: Vec<_> = unit["CapabilityBoundingSet"]
        .split(' ')
        .map(|one| one.strip_prefix("CAP_").map(|name| format!("+{}", name.to_lowercase())))
        .collect::<Option<_>>()
        .context("capabilities")?;
    let bounds = format!("--bounding-set=-all,{}", capabilities.join(","));
    let under = ["unshare", "-m", "sh", "-c", STRICT, "sh"];
    let with = ["setpriv", "--no-new-privs", "--inh-caps=-all", &bounds];
    let restricted = [&under[..], &with[..]].concat();
    World::of(Pair::without_agents()?)?.run(|world| {
        let World { a, b, .. } = world;
        for site in [a, b] {
            site.start_agent_with(&restricted)?;
        }
        let id = "guest";
        world.start_counter(a, id, &[])?;
        a.answer(&["migrate", id, "--to", "b", "--max-pause", "60s"])?;
        runs_on(b, id)?;
        b.answer(&["migrate", id, "--to", "a", "--max-pause", "60s"])?;
        runs_on(a, id)?;
        let checked = a.transship(&["check", "--to", "b"])?;
        ensure!(checked.is_ok(), "{checked:?}");
        world.remove(a, id)
    })
}
