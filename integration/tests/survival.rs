//! containerd and the shim may die, each without the other.

use anyhow::Context;
use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;
use transship_integration::{eventually, inside, promise, stdio::Stdio};

promise! {
    /// containerd is killed and comes back: it finds the container as it was,
    /// and everything still works on it.
    fn containers_outlive_containerd(world) {
        let mut world = world;
        let io = Stdio::output(&world.node)?;
        let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done";
        let pid = world.run("one", &[], &["sh", "-c", script], &io)?;
        io.stdout.await_text("ready")?;
        world.node.stop_containerd(Signal::SIGKILL)?;
        world.node.start_containerd()?;
        world.api = world.node.api()?;

        let found = world.api.get("one", "")?;
        assert_eq!((found.status(), found.pid), (Status::Running, pid));
        let extra = Stdio::output(&world.node)?;
        assert_eq!(world.api.exec_to_end("one", "extra", &["echo", "still here"], &extra)?.status, 0);
        assert_eq!(extra.stdout.await_end()?, "still here\n");
        world.api.pause("one")?;
        world.api.resume("one")?;
        world.api.kill("one", "", Signal::SIGTERM)?;
        assert_eq!(world.api.wait("one", "")?.status, 9);
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// A container that ends while containerd is away: containerd (1.7) takes
    /// its shim for leaked when it is back, and nothing of it may stay.
    fn a_container_that_ended_in_containerds_absence_is_cleaned_up(world) {
        let mut world = world;
        let io = Stdio::with_input(&world.node)?;
        world.run("one", &[], &["sh", "-c", "echo ready; read line; exit 11"], &io)?;
        io.stdout.await_text("ready")?;
        world.node.stop_containerd(Signal::SIGKILL)?;
        io.send("go\n")?;
        io.stdout.await_end().context("the container ends without containerd")?;
        world.node.start_containerd()?;
        world.api = world.node.api()?;
        eventually("containerd to notice", || match world.api.get("one", "") {
            Ok(process) => Ok(process.status() == Status::Stopped && process.exit_status == 11),
            Err(status) => Ok(status.code() == tonic::Code::NotFound),
        })?;
        // Where containerd kept it, it is deleted like any other.
        let _ = world.api.delete("one");
        world.forget("one")?;
        world.finish_after_crash()
    }
}

promise! {
    /// The shim is killed: containerd runs `delete`, and neither the
    /// container's processes nor anything else of it stays.
    fn a_killed_shim_leaves_nothing(world) {
        let events = world.api.events()?;
        world.run_idle("one")?;
        let shims = world.shims()?;
        assert_eq!(shims.len(), 1, "one shim for one container");
        inside::kill(shims[0], Signal::SIGKILL)?;
        eventually("containerd to notice", || Ok(world.api.get("one", "").is_err()))?;
        // Nobody waited for the process: its end is told as a kill.
        let exit = events.await_one("one", "exit")?;
        assert_eq!(exit.status, 137);
        events.await_one("one", "delete")?;
        world.forget("one")?;
        world.finish_after_crash()
    }
}

promise! {
    /// The same, while containerd is away: it cleans up when it is back.
    fn a_shim_killed_in_containerds_absence_leaves_nothing(world) {
        let mut world = world;
        world.run_idle("one")?;
        let shim = world.shims()?[0];
        world.node.stop_containerd(Signal::SIGKILL)?;
        inside::kill(shim, Signal::SIGKILL)?;
        eventually("the shim to be gone", || Ok(world.shims()?.is_empty()))?;
        world.node.start_containerd()?;
        world.api = world.node.api()?;
        eventually("containerd to notice", || Ok(world.api.get("one", "").is_err()))?;
        world.forget("one")?;
        world.finish_after_crash()
    }
}

promise! {
    /// Processes that the container's first one leaves behind die with it.
    fn orphans_end_with_their_container(world) {
        let io = Stdio::output(&world.node)?;
        world.run("one", &[], &["sh", "-c", "setsid sleep 1000 & echo started; exit 0"], &io)?;
        io.stdout.await_text("started")?;
        assert_eq!(world.api.wait("one", "")?.status, 0);
        world.remove("one")?;
        world.finish()
    }
}
