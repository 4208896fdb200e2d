//! Something is killed in the middle: one container remains, and nothing else.

use anyhow::{Result, ensure};
use transship_integration::eventually;

use crate::world::{World, refused_with, runs_on, with_agents};

/// runc mounts the root filesystem a second time, in its own directory, and
/// unmounts it as it ends. One that is killed does not.
#[test]
fn a_runtime_killed_on_the_target_leaves_no_mount() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_counter(a, "c", &[])?;
        let migration = a.begin(&["migrate", "c", "--to", b.name()])?;
        eventually("runc to be killed", || Ok(b.sh("pkill -KILL -f 'restore --detach'").is_ok()))?;
        let refused = refused_with(migration.end()?, "runtime")?;
        ensure!(!refused.reason.is_empty(), "{refused:?}");
        runs_on(a, "c")?;
        world.nothing_on_b()?;
        world.remove(a, "c")?;
        world.nothing_on_a()
    })
}
