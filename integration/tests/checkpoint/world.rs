//! A container that is checkpointed, ended and brought back.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use transship_integration::{Node, Things, daemon::Runtime, eventually, images::Image, until};

use crate::api::Api;

pub struct World {
    pub node: Node,
    pub api: Api,
    before: Things,
}

impl World {
    pub fn start(name: &str) -> Result<Self> {
        let node = Node::start(name)?;
        let api = Api::of(&node)?;
        for image in [Image::Busybox, Image::Python] {
            node.image(image)?;
        }
        let before = node.everything()?;
        Ok(Self { node, api, before })
    }

    /// Starts `program` of `image` under our shim, by the name at which
    /// containerd looks into checkpoint options, with more of `ctr run`'s
    /// flags.
    pub fn run(&self, image: Image, id: &str, flags: &[&str], program: &[&str]) -> Result<()> {
        let reference = self.node.image(image)?;
        let mut arguments = vec!["run", "-d", "--runtime", Runtime::TransshipAsRunc.name()];
        arguments.extend(flags);
        arguments.extend([reference, id]);
        arguments.extend(program);
        self.node.ctr_ok(&arguments)?;
        Ok(())
    }

    /// A container for a shell script, without a task.
    pub fn create(&self, id: &str, flags: &[&str], script: &str) -> Result<()> {
        let image = self.node.image(Image::Busybox)?;
        let create = ["container", "create", "--runtime", Runtime::TransshipAsRunc.name()];
        self.node.ctr_ok(&[&create[..], flags, &[image, id, "sh", "-c", script]].concat())?;
        Ok(())
    }

    /// A shell script that counts in /tmp/count after what `prelude` does.
    pub fn run_counter(&self, id: &str, flags: &[&str], prelude: &str) -> Result<()> {
        let script = format!(
            "{prelude}\ni=0; while true; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done"
        );
        self.run(Image::Busybox, id, flags, &["sh", "-c", &script])?;
        self.count_beyond(id, 2).map(drop)
    }

    /// A file as the container's first process sees it.
    pub fn read(&self, id: &str, path: &str) -> Result<String> {
        let pid = self.node.task_pid(id)?;
        self.node.sh(&format!("cat /proc/{pid}/root{path}"))
    }

    pub fn count(&self, id: &str) -> Result<u64> {
        until("a count", || Ok(self.read(id, "/tmp/count")?.trim().parse().ok()))
    }

    pub fn count_beyond(&self, id: &str, start: u64) -> Result<u64> {
        until(&format!("{id} to count beyond {start}"), || {
            let count = self.read(id, "/tmp/count").unwrap_or_default();
            Ok(count.trim().parse().ok().filter(|count| *count > start))
        })
    }

    pub fn status(&self, id: &str) -> Result<String> {
        self.node.task_status(id)?.with_context(|| format!("{id} has no task"))
    }

    pub fn images_of(&self, id: &str) -> PathBuf {
        self.node.dir().join("images").join(id)
    }

    pub fn options(&self, id: &str) -> CheckpointOptions {
        CheckpointOptions {
            exit: true,
            image_path: self.images_of(id).display().to_string(),
            ..Default::default()
        }
    }

    /// Checkpoints it with its end, and deletes the task.
    pub fn checkpoint(&self, id: &str, options: &CheckpointOptions) -> Result<()> {
        self.api.checkpoint(id, options)?;
        eventually(&format!("{id} to stop"), || Ok(self.status(id)? == "STOPPED"))?;
        self.delete_task(id)
    }

    /// By `ctr`, which removes its fifos, too; it exits as the task did.
    pub fn delete_task(&self, id: &str) -> Result<()> {
        let done = self.node.ctr(&["task", "rm", id])?;
        let left = self.node.task_status(id)?;
        ensure!(left.is_none(), "{id} is still {left:?}: {}", done.stderr);
        Ok(())
    }

    /// Brings it back; answers the pid.
    pub fn restore(&self, id: &str) -> Result<u32> {
        self.restore_with(id, "")
    }

    /// With another OCI runtime than runc.
    pub fn restore_with(&self, id: &str, binary: &str) -> Result<u32> {
        let before = self.api.create_with(id, Some(&self.images_of(id)), None, false, binary)?;
        ensure!(before == 0, "a restoring task has pid 0 before Start, not {before}");
        ensure!(self.status(id)? == "CREATED", "it is {}", self.status(id)?);
        let pid = self.api.start(id)?;
        ensure!(self.status(id)? == "RUNNING", "it is {}", self.status(id)?);
        ensure!(pid > 0 && self.node.task_pid(id)? == pid, "the pid is not {pid}");
        Ok(pid)
    }

    /// Ends the container and removes it.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.node.ctr_ok(&["task", "kill", "-s", "KILL", id])?;
        eventually(&format!("{id} to stop"), || Ok(self.status(id)? == "STOPPED"))?;
        self.delete_task(id)?;
        self.node.ctr_ok(&["container", "rm", id])?;
        Ok(())
    }

    /// Nothing is left of what the test has made.
    pub fn nothing_left(&self) -> Result<()> {
        self.node.nothing_left(&self.before)
    }

    /// What `script` prints inside the container.
    pub fn inside(&self, id: &str, script: &str) -> Result<String> {
        self.node.exec_in(id, &["sh", "-c", script])?.ok()
    }
}
