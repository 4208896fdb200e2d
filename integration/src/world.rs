//! One node, one runtime, and what most tests do with them.

use std::fs;

use anyhow::{Context, Result};
use containerd_client::types::v1::Status;
use nix::sys::signal::Signal;

use crate::{
    Node, Things,
    api::{Answer, Api},
    daemon::Runtime,
    eventually,
    images::Image,
    stdio::Stdio,
};

/// A node of its own for one test, with what was there before it.
pub struct World {
    pub node: Node,
    pub api: Api,
    pub runtime: Runtime,
    pub image: &'static str,
    before: Things,
}

impl World {
    pub fn new(runtime: Runtime) -> Result<Self> {
        Self::on(Node::start("one")?, runtime)
    }

    /// With containerd and shims logging as they do by default.
    pub fn quiet(runtime: Runtime) -> Result<Self> {
        let node = Node::bare("one", None)?;
        node.start_containerd_at("info")?;
        Self::on(node, runtime)
    }

    fn on(node: Node, runtime: Runtime) -> Result<Self> {
        let image = node.image(Image::Busybox)?;
        let api = node.api()?;
        let before = node.everything()?;
        Ok(Self { node, api, runtime, image, before })
    }

    /// A container without a task; `flags` are those of `ctr container create`.
    pub fn container(&self, id: &str, flags: &[&str], command: &[&str]) -> Result<()> {
        self.container_of(self.image, id, flags, command)
    }

    pub fn container_of(
        &self,
        image: &str,
        id: &str,
        flags: &[&str],
        command: &[&str],
    ) -> Result<()> {
        let mut arguments = vec!["container", "create", "--runtime", self.runtime.name()];
        arguments.extend(flags);
        arguments.extend([image, id]);
        arguments.extend(command);
        self.node.ctr_ok(&arguments)?;
        Ok(())
    }

    /// A container that runs; its pid in the node.
    pub fn run(&self, id: &str, flags: &[&str], command: &[&str], io: &Stdio) -> Result<u32> {
        self.container(id, flags, command)?;
        let pid = self.api.create(id, &io.streams, None).context("create")?;
        self.api.start(id, "").context("start")?;
        Ok(pid)
    }

    /// One that only waits.
    pub fn run_idle(&self, id: &str) -> Result<u32> {
        self.run(id, &[], &["sleep", "100000"], &Stdio::null())
    }

    /// Killed, deleted, record removed.
    pub fn remove(&self, id: &str) -> Result<()> {
        // One that ended by itself cannot be killed, which is no matter.
        let _ = self.api.kill(id, "", Signal::SIGKILL);
        self.await_status(id, Status::Stopped)?;
        self.api.delete(id).context("delete")?;
        self.forget(id)
    }

    /// Removes the record of a container without a task.
    pub fn forget(&self, id: &str) -> Result<()> {
        self.node.ctr_ok(&["container", "rm", id])?;
        Ok(())
    }

    pub fn await_status(&self, id: &str, wanted: Status) -> Result<()> {
        eventually(&format!("{id} to be {wanted:?}"), || Ok(self.api.status(id, "")? == wanted))
    }

    /// Pids of the runtime's shims, as the host counts.
    pub fn shims(&self) -> Result<Vec<i32>> {
        let mut found = Vec::new();
        let namespace = fs::read_link(format!("/proc/{}/ns/pid", self.node.init()))?;
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else {
                continue;
            };
            // Any process may end while we look at it.
            let Ok(own) = fs::read_link(path.join("ns/pid")) else { continue };
            let Ok(command) = fs::read(path.join("cmdline")) else { continue };
            let first = command.split(|byte| *byte == 0).next().unwrap_or_default();
            if own == namespace && String::from_utf8_lossy(first).ends_with(self.runtime.binary()) {
                found.push(pid);
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// A file of a container's cgroup.
    pub fn cgroup_file(&self, id: &str, controller: &str, file: &str) -> Result<String> {
        let path = self.node.cgroup(controller, &format!("default/{id}"))?.join(file);
        Ok(fs::read_to_string(&path).with_context(|| path.display().to_string())?.trim().to_owned())
    }

    /// The end of every test: nothing of it is left on the node.
    pub fn finish(self) -> Result<()> {
        self.node.nothing_left(&self.before)
    }

    /// The end of a test after a crash: containerd's own shim leaves its
    /// socket then, and nothing else. Ours is to leave nothing.
    pub fn finish_after_crash(self) -> Result<()> {
        if self.runtime == Runtime::Stock {
            self.node.sh("rm -f /run/containerd/s/*")?;
        }
        self.finish()
    }
}

/// The code of a call that must fail.
pub fn refusal<T: std::fmt::Debug>(answer: Answer<T>) -> Result<tonic::Code> {
    match answer {
        Err(status) => Ok(status.code()),
        Ok(answer) => anyhow::bail!("succeeded with {answer:?}, but should not"),
    }
}

/// Declares one promise as a test per runtime: containerd's own shim shows
/// that the test is right, ours under its two names that the shim is.
#[macro_export]
macro_rules! promise {
    ($(#[$doc:meta])* fn $name:ident($world:ident) $body:block) => {
        $(#[$doc])*
        mod $name {
            use super::*;

            fn check($world: $crate::World) -> ::anyhow::Result<()> $body

            #[test]
            fn stock() -> ::anyhow::Result<()> {
                check($crate::World::new($crate::daemon::Runtime::Stock)?)
            }

            #[test]
            fn transship() -> ::anyhow::Result<()> {
                check($crate::World::new($crate::daemon::Runtime::Transship)?)
            }
        }
    };
}
