//! Something is killed in the middle: one container remains, and nothing else.

use anyhow::{Result, ensure};
use transship_integration::eventually;

use crate::world::{COUNTER, FOR_TAR, World, count, counts_on, refused_with, runs_on, with_agents};

/// A counter, and a tmpfs that CRIU needs a tar for.
fn start(world: &World) -> Result<()> {
    world.start(&world.a, "c", &[FOR_TAR], &format!("echo here > /dev/shm/file; {COUNTER}"))?;
    counts_on(&world.a, "c", 0)
}

/// A CRIU that is killed lets the tasks go on, so what it dumped is not what is
/// here any more; and it leaves a packet filter behind.
#[test]
fn a_criu_killed_in_its_dump_hands_nothing_over() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world)?;
        let tar = a.gate("tar")?;
        tar.shut()?;
        let migration = a.begin(&["migrate", "c", "--to", b.name()])?;
        tar.await_one()?;
        a.sh("pkill -KILL -x criu")?;
        tar.open()?;
        refused_with(migration.end()?, "runtime")?;
        runs_on(a, "c")?;
        let rules = a.sh(&format!("nsenter -t {} -n nft list ruleset", a.task_pid("c")?))?;
        ensure!(!rules.contains("CRIU"), "nothing gets out of it: {rules}");
        world.remove(a, "c")?;
        world.nothing_left()
    })
}

/// By then the freezer keeps the tasks where they are: what was dumped is what
/// is there.
#[test]
fn a_criu_killed_after_its_dump_is_not_needed() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world)?;
        // The target waits for a tar that unpacks it.
        let tar = b.gate("tar")?;
        tar.shut()?;
        let migration = a.begin(&["migrate", "c", "--to", b.name()])?;
        tar.await_one()?;
        let frozen = format!("cat /proc/{}/cgroup", a.task_pid("c")?);
        let group = a.sh(&format!("{frozen} | sed -n 's/.*:freezer://p'"))?;
        let state = format!("cat /sys/fs/cgroup/freezer{}/freezer.state", group.trim());
        eventually("the freezer to hold it", || Ok(a.sh(&state)?.trim() == "FROZEN"))?;
        a.sh("pkill -KILL -x criu")?;
        let counted = count(a, "c")?;
        tar.open()?;
        ensure!(migration.end()?.is_ok_and(|report| report["target_state"] == "RUNNING"));
        ensure!(a.status("c")? == "NONE", "it runs twice");
        counts_on(b, "c", counted)?;
        world.remove(b, "c")?;
        world.nothing_on_a()
    })
}

/// runc mounts the root filesystem a second time, in its own directory, and
/// unmounts it as it ends. One that is killed does not.
#[test]
fn a_runtime_killed_on_the_target_leaves_no_mount() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_counter(a, "c", &[])?;
        let migration = a.begin(&["migrate", "c", "--to", b.name()])?;
        let kill = "grep -q /criu-root /proc/self/mountinfo && pkill -KILL -f '[r]estore --detach'";
        eventually("runc to be killed", || Ok(b.sh(kill).is_ok()))?;
        let refused = refused_with(migration.end()?, "runtime")?;
        ensure!(!refused.reason.is_empty(), "{refused:?}");
        runs_on(a, "c")?;
        // Its empty cgroups stay behind, as those of any runc that is killed.
        eventually("the task to be gone", || Ok(b.status("c")? == "NONE"))?;
        ensure!(!b.sh("cat /proc/self/mountinfo")?.contains("criu-root"));
        ensure!(b.ctr_ok(&["container", "ls", "-q"])?.is_empty());
        world.remove(a, "c")?;
        world.nothing_on_a()
    })
}
