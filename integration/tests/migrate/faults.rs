//! Something is killed in the middle: one container remains, and nothing else.

use anyhow::{Result, ensure};
use transship_integration::eventually;

use crate::world::{COUNTER, World, counts_on, refused_with, runs_on, with_agents};

/// A CRIU that is killed after its dump lets the tasks go on, so what was
/// dumped is not what is here any more; and it leaves a packet filter behind.
#[test]
fn a_criu_killed_on_the_source_hands_nothing_over() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        // The target waits for a tar that unpacks it.
        let script = format!("echo here > /dev/shm/file; {COUNTER}");
        world.start(a, "c", &[], &script)?;
        counts_on(a, "c", 0)?;
        let tar = b.gate("tar")?;
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
