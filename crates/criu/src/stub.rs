//! What the OCI runtime starts when it wants CRIU.
//!
//! `criu swrk N` speaks RPC on descriptor N. The stub gives that descriptor to
//! the gate, puts the one it gets back in its place and becomes the real CRIU:
//! same pid, same parent, same cgroup. For a dump through an isolated gate it
//! enters a mount namespace of its own first; a restore must not have that.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, RawFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{self, Command},
};

use crate::{features, packet::Packet, sys, tar};

/// Where the gate listens.
pub(crate) const GATE: &str = "TRANSSHIP_GATE";
/// The real CRIU.
pub(crate) const CRIU: &str = "TRANSSHIP_CRIU";
/// Set: CRIU gets its own mount namespace.
pub(crate) const ISOLATE: &str = "TRANSSHIP_ISOLATE";
/// The network namespace that CRIU is to be in.
pub(crate) const NETWORK: &str = "TRANSSHIP_NETWORK";
/// The library that CRIU is started with ([`Gate::hollow`](crate::Gate)).
pub(crate) const HOLLOW: &str = "TRANSSHIP_HOLLOW";
/// What that library calls the file with its list.
const HOLLOW_LIST: &str = "TRANSSHIP_HOLLOW_LIST";
/// Beside the gate's socket: that list, once there is one.
pub(crate) const LIST: &str = "hollow";
/// The loader's list of libraries to load first.
const PRELOAD: &str = "LD_PRELOAD";
/// Beside the gate's socket: a directory with programs that CRIU finds first.
pub(crate) const PROGRAMS: &str = "bin";
/// Beside the gate's socket: what CRIU and the stub say on stderr.
pub(crate) const STDERR: &str = "criu.err";

/// Out of the way of CRIU's first descriptors; any free number would do.
const COPIES_ABOVE: RawFd = 16;

/// When this process was started under the name `criu` it is the stub, under
/// the name `tar` what CRIU calls by it, and this call does not return. Call it first in `main`: every millisecond here
/// is one of the container's pause.
pub fn become_criu_if_asked() {
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_default();
    let name = Path::new(&name).file_name();
    if name == Some(OsStr::new("tar")) {
        let arguments: Vec<OsString> = arguments.collect();
        tar::run(&arguments);
    }
    if name != Some(OsStr::new("criu")) {
        return;
    }
    let arguments: Vec<OsString> = arguments.collect();
    let gate = env::var_os(GATE).map(PathBuf::from);
    let error = run(gate.as_deref(), &arguments);
    complain(gate.as_deref(), &error);
    process::exit(127);
}

/// Returns only with an error.
fn run(gate: Option<&Path>, arguments: &[OsString]) -> io::Error {
    let Some(criu) = features::find_criu() else {
        return io::Error::new(io::ErrorKind::NotFound, "no criu in PATH");
    };
    if let Some(namespace) = env::var_os(NETWORK)
        && let Err(error) = sys::join_network_namespace(Path::new(&namespace))
    {
        let shown = Path::new(&namespace).display();
        return io::Error::new(error.kind(), format!("entering the network {shown}: {error}"));
    }
    if env::var_os(ISOLATE).is_some()
        && let Err(error) = sys::own_mount_namespace()
    {
        return io::Error::new(error.kind(), format!("a mount namespace for CRIU: {error}"));
    }
    // Last: whoever has the conversation finds this process where it will stay.
    if let (Some(gate), Some(number)) = (gate, rpc_descriptor(arguments))
        && let Err(error) = hand_over(gate, number)
    {
        return error;
    }
    let mut command = Command::new(&criu);
    command.arg0("criu").args(arguments);
    forget_the_gate(&mut command, gate);
    if let (Some(gate), Some(library)) = (gate, env::var_os(HOLLOW)) {
        command.env(HOLLOW_LIST, gate.with_file_name(LIST));
        command.env(PRELOAD, preloads(library, env::var_os(PRELOAD)));
    }
    let error = command.exec();
    io::Error::new(error.kind(), format!("executing {}: {error}", criu.display()))
}

fn rpc_descriptor(arguments: &[OsString]) -> Option<RawFd> {
    match arguments {
        [verb, number, ..] if verb == "swrk" => number.to_str()?.parse().ok(),
        _ => None,
    }
}

/// Ours and those of others. What CRIU starts has them too, and takes no notice.
fn preloads(library: OsString, others: Option<OsString>) -> OsString {
    let mut all = library;
    if let Some(others) = others.filter(|others| !others.is_empty()) {
        all.push(":");
        all.push(others);
    }
    all
}

/// On restore the runtime starts CRIU with the *container's* stdout and stderr
/// and names them in the request (`inherit_fd`). What CRIU or its loader
/// prints must not land in the container's log: the container's two move to
/// other numbers, which the gate puts into the request.
fn hand_over(gate: &Path, number: RawFd) -> io::Result<()> {
    let rpc = sys::inherited(number)?;
    let stdout = sys::copy_above(1, COPIES_ABOVE)?;
    let stderr = sys::copy_above(2, COPIES_ABOVE)?;
    let own = open_stderr(gate)?;
    sys::place(own.try_clone()?.into(), 1)?;
    sys::place(own.into(), 2)?;

    let socket = sys::connect_to(gate)?;
    let hello = Packet { bytes: Hello { stdout, stderr }.encode(), descriptors: vec![rpc] };
    sys::send(socket.as_fd(), &hello, true)?;
    drop(hello);
    let answer = sys::receive(socket.as_fd(), 64, true)?;
    let Some(ours) = answer.and_then(|mut packet| packet.descriptors.pop()) else {
        return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the gate gave no socket"));
    };
    sys::place(ours, number)
}

fn open_stderr(gate: &Path) -> io::Result<File> {
    let path = gate.with_file_name(STDERR);
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// CRIU and what it starts see the world as without us, but for the programs
/// that we do better.
fn forget_the_gate(command: &mut Command, gate: Option<&Path>) {
    for ours in [GATE, CRIU, ISOLATE, NETWORK, HOLLOW] {
        command.env_remove(ours);
    }
    let dir = gate.and_then(Path::parent);
    let kept = env::var_os("PATH").and_then(|path| {
        let ours = dir.map(|dir| dir.join(PROGRAMS));
        let others = env::split_paths(&path).filter(|entry| Some(entry.as_path()) != dir);
        env::join_paths(ours.into_iter().chain(others)).ok()
    });
    if let Some(path) = kept {
        command.env("PATH", path);
    }
}

/// To the gate's file if there is one: our stderr may be the container's.
fn complain(gate: Option<&Path>, error: &io::Error) {
    let line = format!("criu stub: {error}\n");
    let told = gate.and_then(|gate| open_stderr(gate).ok()?.write_all(line.as_bytes()).ok());
    if told.is_none() && gate.is_none() {
        eprint!("{line}");
    }
}

/// The stub's only message: where the container's stdout and stderr are now.
/// Stub and gate are one binary, so its shape may change with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    pub stdout: RawFd,
    pub stderr: RawFd,
}

impl Hello {
    pub fn encode(self) -> Vec<u8> {
        [self.stdout.to_ne_bytes(), self.stderr.to_ne_bytes()].concat()
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (stdout, stderr) = bytes.split_first_chunk::<4>()?;
        Some(Self {
            stdout: RawFd::from_ne_bytes(*stdout),
            stderr: RawFd::from_ne_bytes(stderr.try_into().ok()?),
        })
    }
}
