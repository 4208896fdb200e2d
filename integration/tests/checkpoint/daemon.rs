//! The commands that people know, `ctr` above all.

use std::fs;

use anyhow::{Result, ensure};
use transship_integration::{Node, bin_dir, daemon::Runtime, eventually, images::Image, until};

use crate::world::World;

/// Topics of the container's events in what `ctr events` printed.
fn topics(log: &str, id: &str) -> Vec<String> {
    log.lines()
        .filter(|line| line.contains(&format!("\"{id}\"")))
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with("/tasks/")))
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_task_goes_on_after_a_checkpoint_or_stops_with_it() -> Result<()> {
    let world = World::start("task")?;
    let (node, id) = (&world.node, "task");
    // `ctr` passes its flags to runtimes of one name only: in its place we go.
    std::os::unix::fs::symlink(
        bin_dir()?.join("containerd-shim-transship-v2"),
        node.dir().join("bin").join(Runtime::Stock.binary()),
    )?;
    let events = node.spawn("events", &["ctr", "events"])?;
    world.run_counter(id, &["--runtime", Runtime::Stock.name()], "")?;
    let pid = node.task_pid(id)?;
    let shim =
        node.sh(&format!("readlink /proc/$(awk '/^PPid/ {{ print $2 }}' /proc/{pid}/status)/exe"))?;
    ensure!(shim.contains("transship"), "the shim is {shim}");
    eventually("events to be told", || Ok(topics(&events.output(), id).len() >= 2))?;
    let told = topics(&events.output(), id).len();

    let (images, work) = (node.dir().join("images"), node.dir().join("work"));
    let (images, work) = (images.to_string_lossy(), work.to_string_lossy());
    let paths = ["--image-path", &images, "--work-path", &work];
    node.ctr_ok(&[&["task", "checkpoint"][..], &paths, &[id]].concat())?;
    ensure!(world.status(id)? == "RUNNING");
    world.count_beyond(id, world.count(id)?)?;
    ensure!(fs::exists(format!("{images}/inventory.img"))?, "no images in {images}");
    ensure!(fs::exists(format!("{work}/dump.log"))?, "no log in {work}");
    eventually("the checkpoint's event", || {
        Ok(topics(&events.output(), id).contains(&"/tasks/checkpointed".to_owned()))
    })?;
    let log = topics(&events.output(), id);
    let place = |topic: &str| log[told..].iter().position(|told| told == topic);
    ensure!(place("/tasks/paused").is_some(), "{log:?}");
    ensure!(place("/tasks/paused") < place("/tasks/resumed"), "{log:?}");

    fs::remove_dir_all(&*images)?;
    node.ctr_ok(&[&["task", "checkpoint", "--exit"][..], &paths, &[id]].concat())?;
    eventually("it to stop", || Ok(world.status(id)? == "STOPPED"))?;
    ensure!(world.api.wait(id)? == 137, "CRIU ends a task by SIGKILL");
    let log = until("its exit to be told", || {
        let log = topics(&events.output(), id);
        Ok(log.contains(&"/tasks/exit".to_owned()).then_some(log))
    })?;
    let last = |topic: &str| log.iter().rposition(|told| told == topic);
    ensure!(last("/tasks/checkpointed") < last("/tasks/exit"), "{log:?}");
    node.ctr(&["task", "rm", id])?;

    // The same container again, afresh.
    node.ctr_ok(&["task", "start", "-d", "--null-io", id])?;
    world.count_beyond(id, 2)?;
    world.remove(id)
}

#[test]
fn the_state_is_paused_while_the_container_is_frozen() -> Result<()> {
    let world = World::start("paused")?;
    let (node, id) = (&world.node, "paused");
    // Enough memory that the dump takes a while.
    let program = "import os, time
memory = bytearray(os.urandom(1 << 20) * 256)
count = 0
while True:
    count += 1
    open('/tmp/count.new', 'w').write(str(count))
    os.rename('/tmp/count.new', '/tmp/count')
    time.sleep(0.02)";
    world.run(Image::Python, id, &[], &["python3", "-c", program])?;
    world.count_beyond(id, 2)?;
    let images = node.dir().join("images");
    let command = ["ctr", "task", "checkpoint", "--image-path", &images.to_string_lossy(), id];
    let mut dump = node.spawn("dump", &command)?;
    eventually("PAUSED", || Ok(world.status(id)? == "PAUSED"))?;
    ensure!(dump.wait()? == 0, "{}", dump.output());
    ensure!(world.status(id)? == "RUNNING");
    world.count_beyond(id, world.count(id)?)?;
    world.remove(id)
}

#[test]
fn the_annotation_decides_for_clients_that_cannot() -> Result<()> {
    let world = World::start("annotated")?;
    for (id, annotation, status) in [("stops", "stop", "STOPPED"), ("stays", "continue", "RUNNING")]
    {
        let annotation = format!("dev.transship.checkpoint={annotation}");
        world.run_counter(id, &["--annotation", &annotation], "")?;
        world.api.checkpoint_as_you_like(id)?;
        eventually(&format!("{id} to be {status}"), || Ok(world.status(id)? == status))?;
    }
    Ok(())
}

/// A checkpoint image and back, on this node or on another one.
fn by_image(from: &World, to: &Node, to_world: Option<&World>, runtime: Runtime) -> Result<()> {
    let (node, id, image) = (&from.node, "moved", "example.org/checkpoint:1");
    let reference = node.image(Image::Busybox)?;
    let script = "echo kept > /kept; i=0; \
                  while true; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done";
    node.ctr_ok(&["run", "-d", "--runtime", runtime.name(), reference, id, "sh", "-c", script])?;
    from.count_beyond(id, 2)?;
    node.ctr_ok(&["container", "checkpoint", "--rw", "--image", "--task", id, image])?;
    ensure!(from.status(id)? == "RUNNING", "it goes on after a checkpoint");
    let count = from.count(id)?;
    from.remove(id)?;
    if to_world.is_some() {
        let archive = node.dir().join("checkpoint.tar");
        let archive = archive.to_string_lossy();
        node.ctr_ok(&["image", "export", "--local", "--skip-manifest-json", &archive, image])?;
        to.ctr_ok(&["image", "import", "--no-unpack", "--index-name", image, &archive])?;
    }
    let world = to_world.unwrap_or(from);
    to.ctr_ok(&["container", "restore", "--rw", "--live", id, image])?;
    ensure!(world.status(id)? == "RUNNING", "it is {}", world.status(id)?);
    let again = world.count_beyond(id, count / 2)?;
    world.count_beyond(id, again)?;
    ensure!(world.inside(id, "cat /kept")? == "kept\n");
    world.remove(id)
}

#[test]
fn by_a_checkpoint_image_on_the_same_node() -> Result<()> {
    let world = World::start("same")?;
    for runtime in [Runtime::Transship, Runtime::TransshipAsRunc] {
        by_image(&world, &world.node, None, runtime)?;
        world.node.ctr_ok(&["image", "rm", "example.org/checkpoint:1"])?;
    }
    Ok(())
}

#[test]
fn by_a_checkpoint_image_on_another_node() -> Result<()> {
    let (here, there) = (World::start("here")?, World::start("there")?);
    by_image(&here, &there.node, Some(&there), Runtime::Transship)
}
