//! containerd in a node, and the ways to it.

use std::{fs, os::unix::net::UnixStream};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::{Done, Node, eventually, images};

/// Programs under test: the name in a node's PATH, and what was built.
pub(crate) const PROGRAMS: [(&str, &str); 4] = [
    ("containerd-shim-transship-v2", "containerd-shim-transship-v2"),
    // The same program; the name decides which options clients send.
    ("containerd-shim-runc-v2-transship", "containerd-shim-transship-v2"),
    ("transshipd", "transshipd"),
    ("transship", "transship"),
];

pub const SOCKET: &str = "/run/containerd/containerd.sock";

/// What a test does not need starts slower than all it does need.
const CONFIG: &str = r#"version = 2
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.restart",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.nri.v1.nri",
]
"#;

/// The runtimes a promise is tested with: containerd's own shim shows that
/// the test is right, ours that the shim is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Stock,
    Transship,
    TransshipAsRunc,
}

impl Runtime {
    pub const ALL: [Self; 3] = [Self::Stock, Self::Transship, Self::TransshipAsRunc];

    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "io.containerd.runc.v2",
            Self::Transship => "io.containerd.transship.v2",
            Self::TransshipAsRunc => "io.containerd.runc.v2-transship",
        }
    }

    /// The file name of the shim.
    pub fn binary(self) -> &'static str {
        match self {
            Self::Stock => "containerd-shim-runc-v2",
            Self::Transship => "containerd-shim-transship-v2",
            Self::TransshipAsRunc => "containerd-shim-runc-v2-transship",
        }
    }
}

impl Node {
    /// Starts containerd and waits until it answers. It and the shims say all
    /// they can: for the tests that fail.
    pub fn start_containerd(&self) -> Result<()> {
        self.start_containerd_at("debug")
    }

    /// The same with another level of its log, which is the shims' as well.
    pub fn start_containerd_at(&self, level: &str) -> Result<()> {
        let config = self.dir().join("containerd.toml");
        fs::write(&config, format!("{CONFIG}[debug]\n  level = \"{level}\"\n"))?;
        // One left by a killed predecessor would look like an answer.
        let _ = fs::remove_file(self.path(SOCKET));
        let mut containerd = self.spawn(
            "containerd",
            &["containerd".as_ref(), "--config".as_ref(), config.as_os_str()],
        )?;
        eventually("containerd to listen", || {
            if !containerd.is_running()? {
                anyhow::bail!("containerd ended: {}", containerd.output());
            }
            Ok(UnixStream::connect(self.path(SOCKET)).is_ok())
        })?;
        *self.containerd.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(containerd);
        // Listening comes before the services are up.
        self.ctr(&["version"])?.ok()?;
        Ok(())
    }

    /// Ends containerd, politely or not; the shims stay.
    pub fn stop_containerd(&self, signal: Signal) -> Result<()> {
        let containerd =
            self.containerd.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        let mut containerd = containerd.context("containerd does not run")?;
        containerd.signal(signal)?;
        containerd.wait()?;
        Ok(())
    }

    pub fn ctr(&self, arguments: &[&str]) -> Result<Done> {
        let mut command = vec!["ctr"];
        command.extend(arguments);
        self.run(&command)
    }

    /// `ctr` that must succeed; what it printed.
    pub fn ctr_ok(&self, arguments: &[&str]) -> Result<String> {
        self.ctr(arguments)?.ok()
    }

    /// The reference of an image, which is built and imported when first
    /// asked for.
    pub fn image(&self, image: images::Image) -> Result<&'static str> {
        let reference = image.reference();
        let mut imported = self.imported.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !imported.contains(reference) {
            let archive = images::archive(image)?;
            self.ctr_ok(&[
                "image",
                "import",
                "--snapshotter",
                "overlayfs",
                &archive.to_string_lossy(),
            ])?;
            imported.insert(reference.to_owned());
        }
        Ok(reference)
    }

    /// Runs a program in a container's namespaces through the task API.
    pub fn exec_in(&self, container: &str, command: &[&str]) -> Result<Done> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("exec-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let mut arguments = vec!["task", "exec", "--exec-id", &id, container];
        arguments.extend(command);
        self.ctr(&arguments)
    }

    /// The state of a task as `ctr` prints it; nothing where there is none.
    pub fn task_status(&self, container: &str) -> Result<Option<String>> {
        Ok(self.task_line(container)?.map(|(_, status)| status))
    }

    /// The pid of a task's first process, within the node.
    pub fn task_pid(&self, container: &str) -> Result<u32> {
        let line = self.task_line(container)?;
        line.map(|(pid, _)| pid).with_context(|| format!("{container} has no task"))
    }

    fn task_line(&self, container: &str) -> Result<Option<(u32, String)>> {
        let list = self.ctr_ok(&["task", "ls"])?;
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(container));
        let read = |line: &str| -> Result<(u32, String)> {
            let mut words = line.split_whitespace().skip(1);
            let (pid, status) = (words.next().context("pid")?, words.next().context("status")?);
            Ok((pid.parse()?, status.to_owned()))
        };
        line.map(read).transpose().with_context(|| format!("read {list:?}"))
    }
}

/// The end of containerd's log (the shims' messages are in it), for a test
/// that failed.
pub fn show_log(node: &Node) {
    const LINES: usize = 60;
    let log = fs::read_to_string(node.dir().join("containerd.log")).unwrap_or_default();
    let wanted: Vec<_> = log
        .lines()
        .filter(|line| !line.contains("level=debug") && !line.contains("loading plugin"))
        .collect();
    eprintln!("--- node {}: the end of containerd's log", node.name());
    for line in wanted.iter().skip(wanted.len().saturating_sub(LINES)) {
        eprintln!("{line}");
    }
}
