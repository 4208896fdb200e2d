//! What the helper `transship-node` does: the side of a node that must be a
//! process of its own.

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    thread,
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl::{set_child_subreaper, set_pdeathsig},
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, sethostname, setsid},
};
use serde::{Deserialize, Serialize};

use crate::cgroups::NodeCgroups;

/// What a node is made from; travels to the helper as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    /// The node's folder on the host, seen at the same path from inside.
    pub dir: PathBuf,
    pub cgroups: NodeCgroups,
}

/// Folders every node has for itself, on tmpfs: they are gone with the node.
/// `/run` must be tmpfs for CRIU to remember what the kernel can (criu.kdat).
const PRIVATE: [&str; 5] =
    ["/run", "/var/lib/containerd", "/var/lib/transship", "/etc/transship", "/etc/containerd"];

const READY: &str = "ready";
const ENCLOSED: &str = "pid ";
const ENDED: &str = "ended";

/// The lines that [`supervise`] prints once the node stands: the pid of its
/// pid 1, as seen from the host.
pub fn await_ready(supervisor: &mut impl BufRead) -> Result<i32> {
    // Two processes write them, in any order.
    let (mut pid, mut ready) = (None, false);
    for line in supervisor.lines() {
        let line = line.context("read from the node's supervisor")?;
        if line == ENDED {
            break;
        }
        match line.strip_prefix(ENCLOSED) {
            Some(number) => pid = Some(number.parse().with_context(|| format!("pid in {line:?}"))?),
            None => ready |= line == READY,
        }
        if let (Some(pid), true) = (pid, ready) {
            return Ok(pid);
        }
    }
    bail!("the node ended before it was ready; its reason is on standard error")
}

/// Outside the node: keeps it until standard input ends, then removes every
/// trace. In a session of its own, so that an interrupt from the keyboard
/// reaches the harness and not the one that cleans up after it.
pub fn supervise(plan: &Plan) -> Result<()> {
    let _ = setsid();
    // The node's pid 1 outlives its parent for a moment: it is ours then.
    set_child_subreaper(true)?;
    let lived = plan.cgroups.create().and_then(|()| live(plan));
    let removed = plan.cgroups.remove();
    if env::var_os("TRANSSHIP_KEEP").is_none() {
        let _ = fs::remove_dir_all(&plan.dir);
    }
    lived.and(removed)
}

/// From the start of the node to the death of its last process.
fn live(plan: &Plan) -> Result<()> {
    let mut stage = this_program("enclose", plan)?
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the node")?;
    let lines = BufReader::new(stage.stdout.take().context("the node's output")?);
    thread::spawn(move || {
        for line in lines.lines().map_while(Result::ok) {
            // A harness that is gone already is noticed below.
            let _ = writeln!(io::stdout(), "{line}");
        }
        let _ = writeln!(io::stdout(), "{ENDED}");
    });
    // Blocks until the harness closes its end or is gone.
    let _ = io::stdin().read_to_end(&mut Vec::new());
    let _ = stage.kill();
    while waitpid(None, None).is_ok() {}
    Ok(())
}

/// Between host and node: joins the cgroups, then makes the namespaces. Its
/// child is pid 1 of the node.
pub fn enclose(plan: &Plan) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    plan.cgroups.enter_roots()?;
    unshare(CloneFlags::CLONE_NEWCGROUP).context("make a cgroup namespace")?;
    plan.cgroups.settle()?;
    unshare(
        CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .context("make the node's namespaces")?;
    let mut init = this_program("init", plan)?.spawn().context("start the node's pid 1")?;
    println!("{ENCLOSED}{}", init.id());
    init.wait()?;
    Ok(())
}

/// Pid 1 of the node: makes its mounts, then reaps until it is killed.
pub fn init(plan: &Plan) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    sethostname(&plan.name)?;
    mounts(plan)?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("run ip")?;
    if !up.success() {
        bail!("ip link set lo up: {up}");
    }
    // Blocked before anybody can die: nothing is missed between two waits.
    let deaths = SigSet::from(Signal::SIGCHLD);
    deaths.thread_block()?;
    println!("{READY}");
    loop {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
        {
        }
        deaths.wait()?;
    }
}

fn mounts(plan: &Plan) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("make mounts private")?;
    for dir in PRIVATE {
        fs::create_dir_all(dir).with_context(|| format!("create {dir}"))?;
        mounted("tmpfs", dir, "mode=755")?;
    }
    fs::create_dir_all("/run/lock")?;
    mounted("proc", "/proc", "")?;
    // A new sysfs shows the node's network; the cgroups below it are mounted
    // again to show the node's part of them only. The host's go first: hidden
    // mounts of other cgroup namespaces are no part of a computer.
    umount2("/sys", MntFlags::MNT_DETACH).context("detach the host's /sys")?;
    mounted("sysfs", "/sys", "")?;
    if plan.cgroups.hierarchies().iter().any(|one| one.mount != Path::new("/sys/fs/cgroup")) {
        mounted("tmpfs", "/sys/fs/cgroup", "mode=755")?;
    }
    for hierarchy in plan.cgroups.hierarchies() {
        fs::create_dir_all(&hierarchy.mount)?;
        let kind = if hierarchy.unified { "cgroup2" } else { "cgroup" };
        mounted(kind, &hierarchy.mount, &hierarchy.options)?;
    }
    Ok(())
}

fn mounted(kind: &str, at: impl AsRef<Path>, options: &str) -> Result<()> {
    let at = at.as_ref();
    mount(Some(kind), at, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mount {kind} on {}", at.display()))
}

/// Runs a program as a process of the node whose pid 1 is `init`, and ends
/// as it ended.
pub fn exec(plan: &Plan, init: i32, command: &[String]) -> Result<i32> {
    plan.cgroups.enter()?;
    let open = |kind: &str| {
        let path = format!("/proc/{init}/ns/{kind}");
        fs::File::open(&path)
            .with_context(|| format!("{path} (is node {} still there?)", plan.name))
    };
    // Mounts last: the paths above are the host's.
    let namespaces = ["cgroup", "net", "uts", "ipc", "pid", "mnt"].map(open);
    for namespace in namespaces {
        setns(namespace?, CloneFlags::empty()).context("enter the node")?;
    }
    env::set_current_dir("/")?;
    let (program, arguments) = command.split_first().context("no program named")?;
    let status = Command::new(program)
        .args(arguments)
        .status()
        .with_context(|| format!("run {program} in node {}", plan.name))?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
}

/// The network that nodes share: a namespace with a bridge, kept until
/// standard input ends.
pub fn switch() -> Result<()> {
    let _ = setsid();
    unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
    for arguments in ["link add br0 type bridge", "link set br0 up", "link set lo up"] {
        let status = Command::new("ip").args(arguments.split(' ')).status().context("run ip")?;
        if !status.success() {
            bail!("ip {arguments}: {status}");
        }
    }
    println!("{ENCLOSED}{}\n{READY}", process::id());
    let _ = io::stdin().read_to_end(&mut Vec::new());
    Ok(())
}

fn this_program(verb: &str, plan: &Plan) -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.arg0("transship-node").arg(verb).arg(serde_json::to_string(plan)?);
    Ok(command)
}

/// A pid as `nix` wants it, for those who kill what they started.
pub fn kill(pid: i32, signal: Signal) -> Result<()> {
    nix::sys::signal::kill(Pid::from_raw(pid), signal)
        .with_context(|| format!("send {signal} to {pid}"))
}
