//! Several containers in one shim, as Kubernetes and `ctr`'s label ask for.

use anyhow::Result;
use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;
use transship_integration::{World, eventually, inside, promise, stdio::Stdio};

const GROUP: &str = "io.containerd.runc.v2.group=pod";
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id=first";

fn run(world: &World, id: &str, annotation: &str) -> Result<u32> {
    world.run(id, &["--annotation", annotation], &["sleep", "1000"], &Stdio::null())
}

fn share_one_shim(world: World, annotation: &str) -> Result<()> {
    run(&world, "first", annotation)?;
    let shim = world.shims()?;
    assert_eq!(shim.len(), 1);
    let second = run(&world, "second", annotation)?;
    assert_eq!(world.shims()?, shim, "the second container is the first one's shim's");
    world.run_idle("apart")?;
    assert_eq!(world.shims()?.len(), 2, "one without the annotation is not");
    world.remove("apart")?;

    // Each has its own life.
    let io = Stdio::output(&world.node)?;
    assert_eq!(world.api.exec_to_end("second", "extra", &["echo", "hello"], &io)?.status, 0);
    assert_eq!(io.stdout.await_end()?, "hello\n");
    world.api.kill("first", "", Signal::SIGTERM)?;
    world.api.kill("first", "", Signal::SIGKILL).ok();
    world.await_status("first", Status::Stopped)?;
    let left = world.api.get("second", "")?;
    assert_eq!((left.status(), left.pid), (Status::Running, second));
    world.remove("first")?;
    assert_eq!(
        world.api.status("second", "")?,
        Status::Running,
        "also after the first one is deleted"
    );
    assert_eq!(world.shims()?, shim);
    world.remove("second")?;
    eventually("the shim to end with its last container", || Ok(world.shims()?.is_empty()))?;
    world.finish()
}

promise! {
    fn a_group_shares_a_shim(world) { share_one_shim(world, GROUP) }
}

promise! {
    fn a_kubernetes_pod_shares_a_shim(world) { share_one_shim(world, SANDBOX) }
}

promise! {
    /// The shim of a pod is killed: all its containers are cleaned up.
    fn a_killed_shim_takes_the_pod_with_it(world) {
        for id in ["first", "second"] {
            run(&world, id, GROUP)?;
        }
        inside::kill(world.shims()?[0], Signal::SIGKILL)?;
        for id in ["first", "second"] {
            eventually("containerd to notice", || Ok(world.api.get(id, "").is_err()))?;
            world.forget(id)?;
        }
        world.finish_after_crash()
    }
}
