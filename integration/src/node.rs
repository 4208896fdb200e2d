//! A node from the outside: start, run programs in it, look into it.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs,
    io::BufReader,
    path::{Path, PathBuf},
    process::{self, Child, ChildStdin, Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::{Switch, cgroups::NodeCgroups, daemon, inside, inside::Plan, locate, rlimits, until};

/// A program in a node that runs longer is hung.
const RUN_LIMIT: &str = "120";

/// A computer of its own, as far as containerd and CRIU can tell.
pub struct Node {
    name: String,
    plan: Plan,
    plan_json: String,
    init: i32,
    address: Option<String>,
    supervisor: Child,
    lifeline: Option<ChildStdin>,
    environment: Vec<(String, String)>,
    pub(crate) containerd: Mutex<Option<Spawned>>,
    pub(crate) imported: Mutex<HashSet<String>>,
    // Dropped after the node's own end was awaited.
    switch: Option<Arc<Switch>>,
}

impl Node {
    /// One node without a network, containerd running in it.
    pub fn start(name: &str) -> Result<Self> {
        let node = Self::bare(name, None)?;
        node.start_containerd()?;
        Ok(node)
    }

    /// Nodes that reach each other, started at the same time.
    pub fn start_all(names: &[&str]) -> Result<Vec<Self>> {
        let switch = Arc::new(Switch::start()?);
        thread::scope(|scope| {
            let starting: Vec<_> = (1u8..)
                .zip(names)
                .map(|(number, name)| {
                    let switch = Arc::clone(&switch);
                    scope.spawn(move || {
                        let node = Self::bare(name, Some((switch, number)))?;
                        node.start_containerd()?;
                        Ok(node)
                    })
                })
                .collect();
            starting
                .into_iter()
                .map(|one| one.join().map_err(|_| anyhow::anyhow!("starting a node panicked"))?)
                .collect()
        })
    }

    /// Two nodes, `a` and `b`.
    pub fn pair() -> Result<(Self, Self)> {
        let mut nodes = Self::start_all(&["a", "b"])?.into_iter();
        nodes.next().zip(nodes.next()).context("two nodes")
    }

    /// A node in which nothing runs yet but its pid 1, on a port of a switch.
    pub fn bare(name: &str, port: Option<(Arc<Switch>, u8)>) -> Result<Self> {
        // Unique per process and within it: tests in parallel, and a run
        // that starts while an older one is still being cleaned up.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("{}-{}-{name}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(format!("transship-{unique}"));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let plan = Plan { name: name.to_owned(), dir, cgroups: NodeCgroups::of(&unique)? };
        let plan_json = serde_json::to_string(&plan)?;
        let mut supervisor = Command::new(locate::helper()?)
            .args(["supervise", &plan_json])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a node's supervisor")?;
        let lifeline = supervisor.stdin.take();
        let lines = supervisor.stdout.take().context("output of a node's supervisor")?;
        let mut node = Self {
            name: name.to_owned(),
            plan,
            plan_json,
            init: 0,
            address: None,
            supervisor,
            lifeline,
            environment: Vec::new(),
            containerd: Mutex::new(None),
            imported: Mutex::new(HashSet::new()),
            switch: None,
        };
        node.init = inside::await_ready(&mut BufReader::new(lines))
            .with_context(|| format!("start node {name}"))?;
        if let Some((switch, number)) = port {
            node.address = Some(switch.plug(node.init, number)?);
            node.switch = Some(switch);
        }
        node.environment = node.prepare_environment()?;
        Ok(node)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Pid of the node's pid 1, as the host counts.
    pub fn init(&self) -> i32 {
        self.init
    }

    /// Its address on the switch.
    pub fn address(&self) -> Result<&str> {
        self.address.as_deref().with_context(|| format!("node {} is not on a network", self.name))
    }

    pub fn switch(&self) -> Option<&Switch> {
        self.switch.as_deref()
    }

    pub(crate) fn cgroups(&self) -> &NodeCgroups {
        &self.plan.cgroups
    }

    /// A folder that host and node see at the same path.
    pub fn dir(&self) -> &Path {
        &self.plan.dir
    }

    /// A file of the node as the host can open it.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        Path::new(&format!("/proc/{}/root", self.init))
            .join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// A cgroup of the node, by its path inside: `controller` names a v1
    /// hierarchy where there is one, the unified one otherwise.
    pub fn cgroup(&self, controller: &str, inside: &str) -> Result<PathBuf> {
        let mut roots: Vec<_> = self.plan.cgroups.roots().collect();
        roots.sort_by_key(|(hierarchy, _)| hierarchy.unified);
        let chosen = roots.into_iter().find(|(hierarchy, _)| {
            hierarchy.unified || hierarchy.options.split(',').any(|option| option == controller)
        });
        let (_, root) = chosen.with_context(|| format!("no hierarchy with {controller}"))?;
        Ok(root.join(inside.trim_start_matches('/')))
    }

    /// Whether `controller` is one of v1 here.
    pub fn is_v1(&self, controller: &str) -> bool {
        self.plan
            .cgroups
            .hierarchies()
            .iter()
            .any(|one| one.options.split(',').any(|option| option == controller))
    }

    /// crun refuses a host where the unified hierarchy has controllers beside
    /// those of v1; runc does not mind. Here a node becomes a plain v1 host.
    pub fn suit_crun(&self) -> Result<()> {
        if self.is_v1("memory") {
            self.sh(
                "! mountpoint -q /sys/fs/cgroup/unified || busybox umount /sys/fs/cgroup/unified",
            )?;
        }
        Ok(())
    }

    /// Runs a program in the node to its end, with nothing on its input.
    pub fn run<S: AsRef<OsStr>>(&self, command: &[S]) -> Result<Done> {
        // Within the node, so that what hangs is killed there.
        let mut all =
            vec![OsStr::new("timeout"), OsStr::new("--kill-after=5"), OsStr::new(RUN_LIMIT)];
        all.extend(command.iter().map(AsRef::as_ref));
        let output =
            self.command(&all).stdin(Stdio::null()).output().context("run a program in a node")?;
        Ok(Done::new(&self.name, command, output))
    }

    /// `run` of a program that must succeed; what it printed.
    pub fn ok<S: AsRef<OsStr>>(&self, command: &[S]) -> Result<String> {
        self.run(command)?.ok()
    }

    pub fn sh(&self, script: &str) -> Result<String> {
        self.ok(&["sh", "-c", script])
    }

    /// A program of the node, to be started with the caller's own wishes for
    /// its standard streams.
    pub fn command<S: AsRef<OsStr>>(&self, command: &[S]) -> Command {
        // `bare` found the helper, so it is there.
        let helper = locate::helper().unwrap_or_else(|_| "transship-node".into());
        let mut outer = Command::new(helper);
        outer.arg("exec").arg(&self.plan_json).arg(self.init.to_string()).args(command);
        outer.envs(self.environment.iter().map(|(key, value)| (key, value)));
        outer
    }

    /// Starts a program in the node with its output in `dir()/NAME.log`.
    pub fn spawn<S: AsRef<OsStr>>(&self, name: &str, command: &[S]) -> Result<Spawned> {
        let path = self.dir().join(format!("{name}.log"));
        let log = fs::OpenOptions::new().create(true).append(true).open(&path)?;
        let child = self
            .command(command)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {name} in node {}", self.name))?;
        Ok(Spawned { outer: child, name: name.to_owned(), log: path })
    }

    /// Programs under test under all their names, and what only machines like
    /// some test machines need.
    fn prepare_environment(&self) -> Result<Vec<(String, String)>> {
        let bin = self.dir().join("bin");
        fs::create_dir(&bin)?;
        let built = locate::bin_dir()?;
        for (name, program) in daemon::PROGRAMS {
            let program = built.join(program);
            if program.exists() {
                std::os::unix::fs::symlink(&program, bin.join(name))?;
            }
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let mut environment =
            vec![("PATH".to_owned(), format!("{}:{path}:/usr/sbin:/sbin", bin.display()))];
        // Not there until a test puts a gate there, with which it holds CRIU.
        environment.push(("TRANSSHIP_TAR".to_owned(), bin.join("tar").display().to_string()));
        if let Some(criu) = rlimits::criu_wrapper()? {
            // By a name of the node's own, so that a test can put a gate there.
            let named = bin.join("criu");
            std::os::unix::fs::symlink(criu, &named)?;
            environment.push(("TRANSSHIP_CRIU".to_owned(), named.display().to_string()));
        }
        Ok(environment)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if thread::panicking() {
            daemon::show_log(self);
        }
        drop(self.lifeline.take());
        let _ = self.supervisor.wait();
    }
}

/// A program that ran in a node.
#[derive(Debug)]
pub struct Done {
    node: String,
    command: String,
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Done {
    fn new<S: AsRef<OsStr>>(node: &str, command: &[S], output: Output) -> Self {
        let words: Vec<_> = command.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        Self {
            node: node.to_owned(),
            command: words.join(" "),
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Its output, if it succeeded.
    pub fn ok(self) -> Result<String> {
        if self.code != 0 {
            bail!(
                "{}: {} ended with {}: {}{}",
                self.node,
                self.command,
                self.code,
                self.stdout,
                self.stderr
            );
        }
        Ok(self.stdout)
    }

    /// What it complained of, if it failed.
    pub fn failed(self) -> Result<String> {
        if self.code == 0 {
            bail!(
                "{}: {} succeeded, but should not: {}{}",
                self.node,
                self.command,
                self.stdout,
                self.stderr
            );
        }
        Ok(self.stderr)
    }
}

/// A program that runs in a node.
pub struct Spawned {
    outer: Child,
    name: String,
    pub log: PathBuf,
}

impl Spawned {
    /// Pid of the program itself, as the host counts: the only child of the
    /// process that entered the node for it.
    pub fn pid(&self) -> Result<i32> {
        let outer = self.outer.id();
        until(&format!("{} to start", self.name), || {
            let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))
                .with_context(|| format!("{} ended: {}", self.name, self.output()))?;
            Ok(children.split_whitespace().next().map(str::parse).transpose()?)
        })
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        inside::kill(self.pid()?, signal)
    }

    pub fn wait(&mut self) -> Result<i32> {
        Ok(self.outer.wait()?.code().unwrap_or(-1))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.outer.try_wait()?.is_none())
    }

    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// What a test started does not outlive it.
impl Drop for Spawned {
    fn drop(&mut self) {
        if let Ok(None) = self.outer.try_wait() {
            let outer = self.outer.id();
            let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"));
            for child in children.unwrap_or_default().split_whitespace() {
                let _ = child.parse().map(|pid| inside::kill(pid, Signal::SIGKILL));
            }
            let _ = self.outer.wait();
        }
    }
}
