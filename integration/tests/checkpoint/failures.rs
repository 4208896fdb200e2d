//! Dumps and restores that cannot work: a clear reason, and nothing harmed.

use std::{fs, thread};

use anyhow::{Result, anyhow, ensure};
use transship_integration::{eventually, images::Image};

use crate::{api::Api, world::World};

#[test]
fn what_criu_cannot_dump_is_said_and_goes_on() -> Result<()> {
    let world = World::start("refused")?;
    let id = "refused";
    // userfaultfd(UFFD_USER_MODE_ONLY), numbered as on this machine.
    let number = if cfg!(target_arch = "aarch64") { 282 } else { 323 };
    let program = format!(
        "import ctypes, os, time
held = ctypes.CDLL(None).syscall({number}, 1)
assert held >= 0
count = 0
while True:
    count += 1
    open('/tmp/count.new', 'w').write(str(count))
    os.rename('/tmp/count.new', '/tmp/count')
    time.sleep(0.02)"
    );
    world.run(Image::Python, id, &[], &["python3", "-c", &program])?;
    let count = world.count_beyond(id, 2)?;
    let error = format!("{:#}", world.api.checkpoint(id, &world.options(id)).unwrap_err());
    ensure!(error.contains("userfaultfd") && error.contains("Error ("), "{error}");
    ensure!(error.contains("dump.log"), "the log is not named: {error}");
    ensure!(world.status(id)? == "RUNNING", "it is {}", world.status(id)?);
    world.count_beyond(id, count)?;
    world.remove(id)
}

#[test]
fn a_process_put_in_by_exec_is_named() -> Result<()> {
    let world = World::start("exec")?;
    let id = "exec";
    world.run_counter(id, &[], "")?;
    world.node.ctr_ok(&["task", "exec", "-d", "--exec-id", "guest", id, "sleep", "1000"])?;
    let error = format!("{:#}", world.api.checkpoint(id, &world.options(id)).unwrap_err());
    ensure!(error.contains("sleep (pid ") && error.contains("exec"), "{error}");
    ensure!(world.status(id)? == "RUNNING");
    world.node.ctr_ok(&["task", "kill", "-s", "KILL", "--exec-id", "guest", id])?;
    eventually("the guest's end", || {
        Ok(world.node.ctr_ok(&["task", "ps", id])?.lines().count() <= 3)
    })?;
    world.checkpoint(id, &world.options(id))?;
    world.restore(id)?;
    world.remove(id)
}

#[test]
fn a_restore_that_fails_leaves_a_stopped_task_and_no_mount() -> Result<()> {
    let world = World::start("broken")?;
    let id = "broken";
    world.run_counter(id, &[], "")?;
    world.checkpoint(id, &world.options(id))?;
    let pages = fs::read_dir(world.images_of(id))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("mm-")));
    fs::write(pages.expect("an image of the memory map"), b"broken")?;

    world.api.create(id, Some(&world.images_of(id)), None, false)?;
    let error = format!("{:#}", world.api.start(id).unwrap_err());
    ensure!(error.contains("Error (") && error.contains("restore.log"), "{error}");
    ensure!(world.status(id)? == "STOPPED", "it is {}", world.status(id)?);
    let mounts = world.node.sh("cat /proc/self/mountinfo")?;
    ensure!(!mounts.contains("criu-root"), "{mounts}");
    world.delete_task(id)?;
    world.node.ctr_ok(&["container", "rm", id])?;
    world.nothing_left()
}

/// Killed while CRIU restores it: it has ended, and CRIU and the OCI runtime
/// have undone what they did.
#[test]
fn a_kill_during_the_restore_undoes_it() -> Result<()> {
    let world = World::start("killed")?;
    let id = "killed";
    // Memory enough that the restore does not end before it is seen.
    let program = "import os, time
memory = bytearray(os.urandom(1 << 20) * 256)
open('/tmp/count', 'w').write('3')
while True: time.sleep(1)";
    world.run(Image::Python, id, &[], &["python3", "-c", program])?;
    world.count_beyond(id, 2)?;
    world.checkpoint(id, &world.options(id))?;
    world.api.create(id, Some(&world.images_of(id)), None, false)?;
    // Held fast as soon as it restores, so that the kill cannot come too late.
    let log =
        format!("/run/containerd/io.containerd.runtime.v2.task/default/{id}/work/restore.log");
    let stop = format!("until [ -e {log} ] && kill -STOP $(pgrep -x criu); do :; done");
    let mut stopper = world.node.spawn("stopper", &["timeout", "60", "sh", "-c", &stop])?;
    let other = Api::of(&world.node)?;
    let started = thread::scope(|scope| {
        let start = scope.spawn(|| other.start(id));
        ensure!(stopper.wait()? == 0, "CRIU was not seen: {}", stopper.output());
        world.node.ctr_ok(&["task", "kill", "-s", "KILL", id])?;
        world.node.sh("kill -CONT $(pgrep -x criu)")?;
        start.join().map_err(|_| anyhow!("Start panicked"))
    })?;
    ensure!(started.is_err(), "Start answered {started:?} for a killed container");
    eventually("it to stop", || Ok(world.status(id)? == "STOPPED"))?;
    ensure!(world.api.wait(id)? == 137);
    world.delete_task(id)?;
    world.node.ctr_ok(&["container", "rm", id])?;
    eventually("CRIU's end", || Ok(world.node.run(&["pgrep", "-x", "criu"])?.code != 0))?;
    world.nothing_left()
}
