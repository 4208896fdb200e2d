//! The workload as an OCI bundle, with the very spec that containerd gives
//! the container of ours: for runc without containerd.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    Node,
    bench::Load,
    images::{self, Image},
};

/// Bundles in a folder that all nodes see, sharing a root file system: nobody
/// but ours has to move files.
pub struct Bundles {
    dir: PathBuf,
    spec: Value,
}

impl Bundles {
    /// Asks the containerd of `node` for a spec.
    pub fn create(node: &Node) -> Result<Self> {
        const NAME: &str = "bench-spec";
        let dir = node.dir().join("bundles");
        fs::create_dir(&dir)?;
        images::root(Image::Workload, &dir.join("rootfs"))?;
        let image = node.image(Image::Workload)?;
        node.ctr_ok(&["run", "-d", image, NAME, "sleep", "100000"])?;
        let config = format!("/run/containerd/io.containerd.runtime.v2.task/default/{NAME}");
        let spec = fs::read(node.path(config).join("config.json"))
            .context("read the spec that containerd made")?;
        node.ctr_ok(&["task", "kill", "--signal", "KILL", NAME])?;
        crate::eventually("a container to end", || {
            Ok(node.task_status(NAME)?.as_deref() == Some("STOPPED"))
        })?;
        node.ctr_ok(&["task", "rm", NAME])?;
        node.ctr_ok(&["container", "rm", NAME])?;
        Ok(Self { dir, spec: serde_json::from_slice(&spec)? })
    }

    /// A bundle for one container.
    pub fn bundle(&self, id: &str, load: Load) -> Result<PathBuf> {
        let bundle = self.dir.join(id);
        fs::create_dir(&bundle)?;
        // Traces of the one before.
        for old in fs::read_dir(self.rootfs().join("workload"))? {
            fs::remove_file(old?.path())?;
        }
        let criu = bundle.join("criu.conf");
        // By runc's defaults it would call iptables-restore in the pause.
        fs::write(&criu, "network-lock nftables\n")?;
        let mut spec = self.spec.clone();
        spec["process"]["args"] = json!(load.command());
        spec["root"]["path"] = json!(self.rootfs());
        spec["linux"]["cgroupsPath"] = json!(format!("/bench/{id}"));
        spec["annotations"]["org.criu.config"] = json!(criu);
        fs::write(bundle.join("config.json"), serde_json::to_vec(&spec)?)?;
        Ok(bundle)
    }

    fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}
