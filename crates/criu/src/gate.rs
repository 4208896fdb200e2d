//! Where the stubs of one runtime call come in.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};
use tracing::debug;
use transship_types::paths::RUNTIME_DIR;

use crate::{
    CriuError, Kind, Side,
    conversation::{Conversation, request_type},
    features,
    packet::{Packet, Socket},
    stub, sys,
};

/// The file name of `transship-hollow`.
pub const LIBRARY: &str = "libtransship_hollow.so";

/// The tar for CRIU in place of our own, where there is such a file.
const TAR: &str = "TRANSSHIP_TAR";

/// More than CRIU says before it gives up; a loop of warnings must not fill
/// an error message.
const MAX_STDERR: u64 = 2048;

/// A door for the `criu` that one run of the OCI runtime will start. Dropping
/// it closes every session that is not a [`Conversation`] yet and removes its
/// directory.
pub struct Gate {
    dir: Arc<GateDir>,
    criu: PathBuf,
    isolated: bool,
    network: Option<PathBuf>,
    hollow: Option<PathBuf>,
    sessions: mpsc::Receiver<Result<Conversation, CriuError>>,
    listening: AbortHandle,
}

/// The directory with the socket, the `criu` link and CRIU's `tar`; removed on drop. A
/// conversation keeps it as well, for CRIU's stderr.
#[derive(Debug)]
pub(crate) struct GateDir(PathBuf);

impl Gate {
    /// A private directory under `/run/transship/gate`.
    pub async fn open() -> Result<Gate, CriuError> {
        let criu = features::find_criu().ok_or(CriuError::NoCriu)?;
        Self::open_in(&Path::new(RUNTIME_DIR).join("gate"), criu)
    }

    /// The same elsewhere, for another CRIU. The socket's path must fit into
    /// the 108 bytes of `sockaddr_un`.
    pub fn open_in(parent: &Path, criu: PathBuf) -> Result<Gate, CriuError> {
        let dir = Arc::new(GateDir::create(parent)?);
        let socket = dir.socket();
        let listener = sys::listener(&socket)
            .and_then(Socket::new)
            .map_err(CriuError::file("listening at", &socket))?;
        // One at a time is enough: a runtime runs one CRIU after the other.
        let (found, sessions) = mpsc::channel(1);
        let listening = tokio::spawn(listen(listener, dir.clone(), found)).abort_handle();
        Ok(Gate { dir, criu, isolated: false, network: None, hollow: None, sessions, listening })
    }

    /// CRIU gets a mount namespace of its own, into which the host's mounts
    /// still come, but out of which none goes: [`Hider`](crate::Hider) needs
    /// that. Only for a dump. On restore CRIU's working directory would lie in
    /// a foreign namespace and its mounts would fail (EINVAL).
    pub fn isolate(mut self) -> Self {
        self.isolated = true;
        self
    }

    /// CRIU runs in this network namespace: for a dump the container's own,
    /// for a restore the one the container is to be in, with its loopback
    /// interface up already. CRIU then neither saves nor makes nor locks a
    /// namespace. Nothing but that is saved by it: the OCI runtimes have CRIU
    /// leave out what is in the namespace anyway. Sockets are kept as before.
    ///
    /// It keeps packets away from each established connection only, not from
    /// listening sockets: a connection that is made while the container is
    /// frozen would be lost. So use it where loopback is all there is, or
    /// where somebody else holds the packets.
    ///
    /// CRIU does not send `network-lock` for such a dump: the first
    /// notification with every task stopped is `query-ext-files`. For a
    /// restore the namespace must belong to the container's user namespace.
    pub fn network(mut self, namespace: impl Into<PathBuf>) -> Self {
        self.network = Some(namespace.into());
        self
    }

    /// CRIU is started with this library (`transship-hollow`), so that a dump
    /// can be made to find shared objects empty ([`empty`](Self::empty)), and
    /// a restore be given files
    /// ([`Amendments::inherit`](crate::Amendments::inherit)). A CRIU that
    /// cannot load it says so and does without.
    pub fn hollow(mut self, library: impl Into<PathBuf>) -> Self {
        self.hollow = Some(library.into());
        self
    }

    /// CRIU, which has not gone on since every task stands still, is to save
    /// no contents of these objects (device and inode, as stat(2) tells them).
    /// Whether it obeys is seen in its images only.
    pub fn empty(&self, objects: &[(u64, u64)]) -> Result<(), CriuError> {
        let list = self.dir.0.join(stub::LIST);
        let text: String =
            objects.iter().map(|(device, inode)| format!("{device} {inode}\n")).collect();
        // Nobody reads half of it.
        let fresh = self.dir.0.join("hollow.new");
        fs::write(&fresh, text)
            .and_then(|()| fs::rename(&fresh, &list))
            .map_err(CriuError::file("writing", &list))
    }

    /// Removes the gates of processes that were killed and could not.
    pub fn sweep() {
        sweep(&Path::new(RUNTIME_DIR).join("gate"));
    }

    /// What the OCI runtime's process must see.
    pub fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut path = self.dir.0.clone().into_os_string();
        if let Some(inherited) = std::env::var_os("PATH") {
            path.push(":");
            path.push(inherited);
        }
        let mut environment = vec![
            ("PATH".into(), path),
            (stub::GATE.into(), self.dir.socket().into_os_string()),
            (stub::CRIU.into(), self.criu.clone().into_os_string()),
        ];
        if self.isolated {
            environment.push((stub::ISOLATE.into(), "1".into()));
        }
        if let Some(library) = &self.hollow {
            environment.push((stub::HOLLOW.into(), library.clone().into_os_string()));
        }
        if let Some(network) = &self.network {
            environment.push((stub::NETWORK.into(), network.clone().into_os_string()));
        }
        environment
    }

    #[cfg(any(test, feature = "fake"))]
    pub fn socket(&self) -> PathBuf {
        self.dir.socket()
    }

    /// Waits for the first DUMP or RESTORE. VERSION and FEATURE_CHECK sessions
    /// pass unseen. A runtime that fails before it starts CRIU never gets
    /// here: wait for its exit at the same time.
    pub async fn conversation(&mut self) -> Result<Conversation, CriuError> {
        self.sessions.recv().await.ok_or(CriuError::Closed)?
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl GateDir {
    fn create(parent: &Path) -> Result<Self, CriuError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(CriuError::file("creating", parent))?;
        let path = parent.join(random_name().map_err(CriuError::file("naming a gate in", parent))?);
        DirBuilder::new().mode(0o700).create(&path).map_err(CriuError::file("creating", &path))?;
        let dir = GateDir(path);
        // Not our path but our process: the stub is this very binary even
        // when an upgrade has replaced the file.
        let own = format!("/proc/{}/exe", std::process::id());
        let programs = dir.0.join(stub::PROGRAMS);
        fs::create_dir(&programs).map_err(CriuError::file("creating", &programs))?;
        let tar = std::env::var_os(TAR).map(PathBuf::from).filter(|tar| tar.exists());
        let tar = tar.unwrap_or_else(|| own.clone().into());
        for (program, link) in [(own.into(), dir.0.join("criu")), (tar, programs.join("tar"))] {
            symlink(&program, &link).map_err(CriuError::file("linking", &link))?;
        }
        Ok(dir)
    }

    pub fn socket(&self) -> PathBuf {
        self.0.join("gate.sock")
    }

    /// What the stub or CRIU printed, if anything.
    pub fn stderr(&self) -> Option<String> {
        let mut bytes = Vec::new();
        let file = File::open(self.0.join(stub::STDERR)).ok()?;
        file.take(MAX_STDERR).read_to_end(&mut bytes).ok()?;
        let text = String::from_utf8_lossy(&bytes).trim().to_owned();
        (!text.is_empty()).then_some(text)
    }
}

impl Drop for GateDir {
    fn drop(&mut self) {
        // Nothing can be done about a failure; /run does not outlive a boot.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A gate leads to the program of the process that opened it, by its pid: one
/// that leads nowhere is nobody's.
fn sweep(parent: &Path) {
    for gate in fs::read_dir(parent).into_iter().flatten().flatten() {
        let link = gate.path().join("criu");
        if fs::symlink_metadata(&link).is_ok() && !link.exists() {
            let _ = fs::remove_dir_all(gate.path());
        }
    }
}

fn random_name() -> io::Result<String> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Owns the sessions that have not shown yet what they are.
async fn listen(
    listener: Socket,
    dir: Arc<GateDir>,
    found: mpsc::Sender<Result<Conversation, CriuError>>,
) {
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            stub = listener.accept() => match stub {
                Ok(stub) => {
                    sessions.spawn(session(stub, dir.clone()));
                }
                Err(source) => {
                    let _ = found.send(Err(CriuError::Talk { with: Side::Stub, source })).await;
                    return;
                }
            },
            Some(done) = sessions.join_next() => match done {
                Ok(Ok(None)) | Err(_) => {}
                Ok(Ok(Some(conversation))) => {
                    let _ = found.send(Ok(conversation)).await;
                }
                Ok(Err(error)) => {
                    let _ = found.send(Err(error)).await;
                }
            },
        }
    }
}

/// From the stub's hello to the first DUMP or RESTORE, or to the end of a
/// session that has none.
async fn session(stub: Socket, dir: Arc<GateDir>) -> Result<Option<Conversation>, CriuError> {
    let (criu_pid, uid) = stub.peer().map_err(CriuError::talk(Side::Stub))?;
    let own = nix::unistd::geteuid().as_raw();
    let hello = stub.receive().await.map_err(CriuError::talk(Side::Stub))?;
    let hello = hello.and_then(|mut packet| {
        let moved = stub::Hello::decode(&packet.bytes)?;
        Some((moved, packet.descriptors.pop()?))
    });
    let Some((moved, runtime)) = hello.filter(|_| uid == own) else {
        debug!(criu_pid, uid, "something else than the stub knocked at the gate");
        return Ok(None);
    };
    let runtime = Socket::new(runtime).map_err(CriuError::talk(Side::Runtime))?;
    let (ours, theirs) = sys::pair().map_err(CriuError::talk(Side::Stub))?;
    let criu = Socket::new(ours).map_err(CriuError::talk(Side::Criu))?;
    let answer = Packet { bytes: vec![1], descriptors: vec![theirs] };
    stub.send(&answer).await.map_err(CriuError::talk(Side::Stub))?;
    drop((stub, answer));

    loop {
        tokio::select! {
            packet = runtime.receive() => {
                let Some(packet) = packet.map_err(CriuError::talk(Side::Runtime))? else {
                    return Ok(None);
                };
                let kind = match request_type(&packet) {
                    Ok(number) => Kind::of_request(number),
                    Err(source) => {
                        return Err(CriuError::Malformed { from: Side::Runtime, source });
                    }
                };
                match kind {
                    Some(kind) => {
                        return Conversation::begin(kind, packet, runtime, criu, criu_pid, moved, dir)
                            .map(Some);
                    }
                    None => criu.send(&packet).await.map_err(CriuError::talk(Side::Criu))?,
                }
            }
            packet = criu.receive() => {
                let Some(packet) = packet.map_err(CriuError::talk(Side::Criu))? else {
                    return Ok(None);
                };
                runtime.send(&packet).await.map_err(CriuError::talk(Side::Runtime))?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_gates_of_the_dead_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let gate = Gate::open_in(parent.path(), "/bin/true".into()).unwrap();
        let (dead, unfinished) = (parent.path().join("dead"), parent.path().join("unfinished"));
        fs::create_dir(&dead).unwrap();
        fs::create_dir(&unfinished).unwrap();
        symlink("/proc/0/exe", dead.join("criu")).unwrap();
        sweep(parent.path());
        assert!(!dead.exists() && unfinished.exists() && gate.dir.0.exists());
    }

    #[tokio::test]
    async fn a_gate_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let gates = parent.path().join("gates");
        let gate = Gate::open_in(&gates, "/bin/true".into()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&gates), mode(&gate.dir.0), mode(&gate.socket())), (0o700, 0o700, 0o600));
    }
}
