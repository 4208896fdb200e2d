//! Too little memory on the target: said before anything moves, or, where the
//! container has grown on its way, in the middle; it runs on either way.

use std::fs;

use anyhow::{Context, Result, ensure};
use transship_integration::{agents::Site, until};

use crate::world::{World, read, refused_with, runs_on, unchanged, with_agents};

const ID: &str = "hungry";
const MIB: u64 = 1 << 20;

/// Holds 64 MiB that nothing compresses, and 512 more once it is told to; it
/// says how much there is.
const GROWS: &str = "\
    hold() { { head -c $1 /dev/urandom; sleep 900; } | tail -c $1 & }; \
    hold 67108864; echo some > /tmp/size; \
    (until [ -e /tmp/grow ]; do sleep 0.1; done; hold 536870912) & \
    i=0; while true; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; sleep 0.02; done";

/// A bound on all the memory of a node, for as long as this is there.
struct Bound<'a> {
    site: &'a Site,
    file: &'static str,
    none: &'static str,
}

impl<'a> Bound<'a> {
    /// Leaves so many bytes beside what is used now.
    fn leave(site: &'a Site, bytes: u64) -> Result<Self> {
        let (usage, file, none) = if site.is_v1("memory") {
            ("memory.usage_in_bytes", "memory.limit_in_bytes", "-1")
        } else {
            ("memory.current", "memory.max", "max")
        };
        let group = site.cgroup("memory", "")?;
        let text = |name: &str| {
            fs::read_to_string(group.join(name)).with_context(|| format!("{name} of a node"))
        };
        let used: u64 = text(usage)?.trim().parse()?;
        let stat = text("memory.stat")?;
        let names = ["total_inactive_file ", "inactive_file "];
        let cache = names.iter().find_map(|name| stat.lines().find_map(|l| l.strip_prefix(name)));
        let cache: u64 = cache.context("the page cache of a node")?.trim().parse()?;
        let limit = used.saturating_sub(cache) + bytes;
        fs::write(group.join(file), limit.to_string())
            .with_context(|| format!("limit a node to {limit} bytes"))?;
        Ok(Self { site, file, none })
    }
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        let lifted = self
            .site
            .cgroup("memory", "")
            .and_then(|group| Ok(fs::write(group.join(self.file), self.none)?));
        if let Err(error) = lifted {
            eprintln!("a node keeps its bound: {error:#}");
        }
    }
}

/// Bytes of the container's own memory, on its node. Some of its processes
/// have ended by the time they are looked at.
fn held(site: &Site) -> Result<u64> {
    let script = format!(
        "for pid in $(ctr task ps {ID} | awk 'NR > 1 {{ print $1 }}'); do \
           awk '/^RssAnon/ {{ print $2 }}' /proc/$pid/status; done 2> /dev/null; true"
    );
    let lines = site.sh(&script)?;
    Ok(lines.lines().filter_map(|line| line.trim().parse::<u64>().ok()).sum::<u64>() << 10)
}

fn start(world: &World) -> Result<()> {
    world.start(&world.a, ID, &[], GROWS)?;
    until("it to hold its memory", || Ok((held(&world.a)? > 64 * MIB).then_some(())))
}

#[test]
fn a_node_without_room_refuses_in_figures() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world)?;
        let here = a.inventory()?;
        let bound = Bound::leave(b, 80 * MIB)?;
        let refused = refused_with(a.transship(&["migrate", ID, "--to", "b"])?, "space")?;
        ensure!(
            refused.reason.contains("memory (within the control group /)")
                && refused.reason.contains("are needed")
                && refused.reason.contains(" MiB"),
            "{refused:#?}"
        );
        ensure!(!refused.remedy.is_empty(), "{refused:#?}");
        ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
        unchanged(a, &here)?;
        world.nothing_on_b()?;
        runs_on(a, ID)?;

        drop(bound);
        a.migrate(ID)?;
        runs_on(b, ID)?;
        world.remove(b, ID)
    })
}

/// The pages that wait are the shim's, whose control group has the bound: the
/// store refuses more of them before the kernel kills anybody for it.
#[test]
fn one_that_outgrows_the_target_on_its_way_runs_on() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world)?;
        let _bound = Bound::leave(b, 384 * MIB)?;
        let command = a.begin(&["migrate", ID, "--to", "b", "--bandwidth", "4MiB/s"])?;
        let migration = a.await_phase(ID, "rounds")?;
        let pid = a.task_pid(ID)?;
        a.sh(&format!("touch /proc/{pid}/root/tmp/grow"))?;
        until("it to grow", || Ok((held(a)? > 512 * MIB).then_some(())))?;
        a.answer(&["limit", &migration, "--bandwidth", "none"])?;

        let refused = refused_with(command.end()?, "runtime")?;
        ensure!(refused.reason.contains("were set aside"), "{refused:#?}");
        ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
        runs_on(a, ID)?;
        ensure!(read(a, ID, "/tmp/size")?.trim() == "some");
        ensure!(held(a)? > 512 * MIB, "{} bytes are left of its memory", held(a)?);
        world.nothing_on_b()?;
        world.remove(a, ID)
    })
}
