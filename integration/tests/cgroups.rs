//! Limits and statistics.

use anyhow::{Context, Result};
use containerd_shim_protos::{
    cgroups::metrics as v1, cgroups_v2::metrics as v2, protobuf::Message,
};
use nix::sys::signal::Signal;
use serde_json::json;
use transship_integration::{World, eventually, promise, stdio::Stdio};

/// Memory, processor time (ns) and processes, whichever version told them.
struct Figures {
    memory: u64,
    limit: u64,
    cpu: u64,
    pids: u64,
}

fn figures(world: &World, id: &str) -> Result<Figures> {
    let data = world.api.metrics(id)?;
    if data.type_url.contains("cgroups.v1") {
        let metrics = v1::Metrics::parse_from_bytes(&data.value)?;
        Ok(Figures {
            memory: metrics.memory.usage.usage,
            limit: metrics.memory.usage.limit,
            cpu: metrics.cpu.usage.total,
            pids: metrics.pids.current,
        })
    } else {
        let metrics =
            v2::Metrics::parse_from_bytes(&data.value).with_context(|| data.type_url.clone())?;
        Ok(Figures {
            memory: metrics.memory.usage,
            limit: metrics.memory.usage_limit,
            cpu: metrics.cpu.usage_usec * 1000,
            pids: metrics.pids.current,
        })
    }
}

promise! {
    fn statistics_are_those_of_the_container(world) {
        let io = Stdio::output(&world.node)?;
        let script = "x=$(head -c 8000000 /dev/zero | tr '\\0' a); echo full; sleep 1000 & sleep 1000 & wait; echo $x";
        world.run("one", &["--memory-limit", "67108864"], &["sh", "-c", script], &io)?;
        io.stdout.await_text("full")?;
        eventually("three processes", || Ok(figures(&world, "one")?.pids == 3))?;
        let now = figures(&world, "one")?;
        assert!((8_000_000..67_108_864).contains(&now.memory), "{} bytes", now.memory);
        assert_eq!(now.limit, 67_108_864);
        assert!(now.cpu > 1_000_000, "{} ns", now.cpu);
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    /// New limits hold at once, and in the kernel's own files.
    fn limits_can_be_changed_while_it_runs(world) {
        world.run_idle("one")?;
        let resources = json!({
            "memory": {"limit": 134_217_728},
            "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
            "pids": {"limit": 33},
        });
        world.api.update("one", &resources)?;
        let file = |controller: &str, on_v1: &str, on_v2: &str| {
            let name = if world.node.is_v1(controller) { on_v1 } else { on_v2 };
            world.cgroup_file("one", controller, name)
        };
        assert_eq!(file("memory", "memory.limit_in_bytes", "memory.max")?, "134217728");
        assert_eq!(file("pids", "pids.max", "pids.max")?, "33");
        if world.node.is_v1("cpu") {
            assert_eq!(world.cgroup_file("one", "cpu", "cpu.cfs_quota_us")?, "50000");
            assert_eq!(world.cgroup_file("one", "cpu", "cpu.shares")?, "512");
        } else {
            assert_eq!(world.cgroup_file("one", "cpu", "cpu.max")?, "50000 100000");
        }
        assert_eq!(figures(&world, "one")?.limit, 134_217_728);
        // A limit that cannot be: refused, and the old one stays.
        assert!(world.api.update("one", &json!({"memory": {"limit": 1}})).is_err());
        assert_eq!(file("memory", "memory.limit_in_bytes", "memory.max")?, "134217728");
        world.remove("one")?;
        world.finish()
    }
}

promise! {
    fn the_limit_on_processes_holds(world) {
        world.run_idle("one")?;
        world.api.update("one", &json!({"pids": {"limit": 4}}))?;
        let io = Stdio::output(&world.node)?;
        let script = "for i in 1 2 3 4 5 6; do sleep 1000 & done; echo made all; wait";
        world.api.exec("one", "extra", &["sh", "-c", script], &io.streams)?;
        world.api.start("one", "extra")?;
        io.stderr.await_text("fork")?;
        world.api.kill_all("one", Signal::SIGKILL)?;
        world.api.wait("one", "")?;
        world.remove("one")?;
        world.finish()
    }
}
