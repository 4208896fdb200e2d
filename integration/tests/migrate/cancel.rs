//! Cancelled in every phase in which that can be: the container runs on, and
//! the target has nothing of it. Each phase is held open, so that the wish
//! always comes within it.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use transship_integration::{agents::Command, eventually, images::Image};

use crate::world::{
    FOR_TAR, World, count, counts_on, refused_with, runs_on, unchanged, with_agents,
};

const ID: &str = "staying";

fn begin(world: &World) -> Result<Command> {
    world.a.begin(&["migrate", ID, "--to", "b"])
}

/// SIGINT, as Ctrl-C sends it; returns once the agent knows, so that what is
/// held may go on.
fn interrupt(world: &World, command: &Command) -> Result<()> {
    let so_far = wishes(world);
    command.process.signal(Signal::SIGINT)?;
    eventually("the agent to know of the wish", || Ok(wishes(world) > so_far))
}

fn wishes(world: &World) -> usize {
    world.a.agent_log().matches("asked to cancel").count()
}

/// It was cancelled, it runs, and nothing is left.
fn cancelled(world: &World, command: Command) -> Result<()> {
    let refused = refused_with(command.end()?, "cancelled")?;
    ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
    let outcome = refused.error["outcome"].as_str().unwrap_or_default();
    ensure!(outcome.contains("RUNNING on a"), "{refused:#?}");
    runs_on(&world.a, ID)?;
    world.nothing_on_b()
}

/// The source's shim has the say once its target waits for it.
fn await_shims(world: &World, phase: &str) -> Result<()> {
    world.b.await_phase(ID, "arrive")?;
    world.a.await_phase(ID, phase)?;
    Ok(())
}

#[test]
fn before_the_target_has_anything() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_of(a, Image::Redis, ID, &[], &["sh", "-c", crate::world::COUNTER])?;
        counts_on(a, ID, 0)?;
        let here = a.inventory()?;

        // The target's agent does not answer.
        b.signal_agent(Signal::SIGSTOP)?;
        let command = begin(world)?;
        a.await_phase(ID, "connect")?;
        interrupt(world, &command)?;
        let refused = refused_with(command.end()?, "cancelled")?;
        ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");
        b.signal_agent(Signal::SIGCONT)?;
        world.nothing_on_b()?;

        // It looks at its CRIU.
        let criu = b.gate("criu")?;
        criu.shut_for("--version")?;
        let command = begin(world)?;
        criu.await_one()?;
        a.await_phase(ID, "offer")?;
        interrupt(world, &command)?;
        criu.open()?;
        cancelled(world, command)?;

        // The image is on its way.
        a.slow()?;
        let command = begin(world)?;
        a.await_phase(ID, "content")?;
        eventually("content on its way", || {
            Ok(b.ctr_ok(&["content", "active"])?.contains("transship")
                || b.ctr_ok(&["content", "active"])?.lines().count() > 1)
        })?;
        interrupt(world, &command)?;
        a.fast()?;
        cancelled(world, command)?;

        // The target's shim is being started.
        let shim = b.gate("containerd-shim-transship-v2")?;
        shim.shut()?;
        let command = begin(world)?;
        a.await_phase(ID, "prepare")?;
        shim.await_one()?;
        interrupt(world, &command)?;
        shim.open()?;
        cancelled(world, command)?;

        unchanged(a, &here)?;
        world.remove(a, ID)
    })
}

#[test]
fn while_the_shims_have_it() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        // A large file in memory, and one that is not.
        let script = format!(
            "dd if=/dev/urandom of=/dev/shm/large bs=1M count=16 2> /dev/null; {}",
            crate::world::COUNTER
        );
        world.start(a, ID, &[FOR_TAR], &script)?;
        counts_on(a, ID, 0)?;
        let here = a.inventory()?;

        // The source's CRIU is being started.
        let criu = a.gate("criu")?;
        criu.shut_for("swrk")?;
        let command = begin(world)?;
        await_shims(world, "offer")?;
        criu.await_one()?;
        interrupt(world, &command)?;
        cancelled(world, command)?;
        criu.open()?;

        // The target's CRIU is being started, and the first round waits for it.
        let criu = b.gate("criu")?;
        criu.shut_for("swrk")?;
        let command = begin(world)?;
        await_shims(world, "rounds")?;
        criu.await_one()?;
        interrupt(world, &command)?;
        criu.open()?;
        cancelled(world, command)?;

        // Memory is on its way.
        a.slow()?;
        let command = begin(world)?;
        await_shims(world, "rounds")?;
        interrupt(world, &command)?;
        a.fast()?;
        cancelled(world, command)?;

        // The images are on their way.
        a.slow()?;
        let command = a.begin(&["migrate", ID, "--to", "b", "--max-pause", "60s"])?;
        await_shims(world, "transfer")?;
        let still = count(a, ID)?;
        interrupt(world, &command)?;
        a.fast()?;
        cancelled(world, command)?;
        counts_on(a, ID, still)?;

        // The target restores (CRIU unpacks a tmpfs with tar).
        let tar = b.gate("tar")?;
        tar.shut()?;
        let command = begin(world)?;
        tar.await_one()?;
        await_shims(world, "restore")?;
        interrupt(world, &command)?;
        tar.open()?;
        cancelled(world, command)?;

        // The writable layer is on its way.
        let write = "dd if=/dev/urandom of=/tmp/large bs=1M count=16";
        a.exec_in(ID, &["sh", "-c", write])?.ok()?;
        a.slow()?;
        let command = begin(world)?;
        await_shims(world, "prepare")?;
        interrupt(world, &command)?;
        a.fast()?;
        cancelled(world, command)?;

        unchanged(a, &here)?;
        // And it can still be moved.
        a.migrate(ID)?;
        runs_on(b, ID)?;
        world.remove(b, ID)
    })
}

/// The other ways to stop one, and a second one of the same container.
#[test]
fn by_time_and_by_command() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        world.start_counter(a, ID, &[])?;
        let criu = b.gate("criu")?;

        criu.shut_for("swrk")?;
        let command = begin(world)?;
        let migration = a.await_phase(ID, "rounds")?;
        let busy = refused_with(a.transship(&["migrate", ID, "--to", "b"])?, "busy")?;
        ensure!(busy.reason.contains(&migration) && busy.remedy.contains("cancel"), "{busy:#?}");

        let so_far = wishes(world);
        let cancel = a.begin(&["cancel", &migration])?;
        eventually("the agent to know of the wish", || Ok(wishes(world) > so_far))?;
        criu.open()?;
        let answer = cancel.end()?;
        ensure!(answer.is_ok_and(|answer| answer["cancelled"] == true));
        cancelled(world, command)?;
        let again = a.transship(&["cancel", &migration])?;
        let again = again.err().map(|refused| refused.reason).unwrap_or_default();
        ensure!(again.contains("ended before"), "{again:?}");
        let status = a.answer(&["status", &migration])?;
        ensure!(status["ending"] == "stayed-home" && status["role"] == "source", "{status}");

        criu.shut_for("swrk")?;
        let so_far = wishes(world);
        let command = a.begin(&["migrate", ID, "--to", "b", "--timeout", "1"])?;
        // Wherever it is by then: it gets no further than the gate.
        eventually("the time to be up", || Ok(wishes(world) > so_far))?;
        ensure!(command.process.output().contains("time is up"));
        criu.open()?;
        cancelled(world, command)?;
        world.remove(a, ID)
    })
}
