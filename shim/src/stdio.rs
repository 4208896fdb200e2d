//! Standard input and output of a container's process.
//!
//! ```text
//!             client                shim                    container
//! stdin    fifo ───────────────▶ pump ─────────▶ pipe ───────▶ 0
//! stdout   fifo ◀── or file ──── pump ◀───────── pipe ◀─────── 1
//! stderr   fifo ◀── or file ──── pump ◀───────── pipe ◀─────── 2
//! logger   fd 3, 4 ◀──────────────────────────── pipe ◀─────── 1, 2
//! terminal fifos ◀─────────────▶ pump ◀────────▶ pty ◀───────▶ 0, 1, 2
//! ```
//!
//! The container always has pipes of the shim (never the client's fifo), so
//! that it outlives its client and so that CRIU finds descriptors it knows
//! how to restore. The shim holds both ends of an output fifo: whoever reads
//! it may go away and come back, nothing is lost and no writer gets SIGPIPE.
//!
//! Use: [`Prepared::open`] before the OCI runtime runs, [`Prepared::attach`]
//! to the runtime's command, [`Prepared::connect`] once it has succeeded.

mod console;
mod logger;
mod pump;
mod uri;

use std::{fs, io, os::fd::OwnedFd, path::Path, process::Stdio, sync::Arc, time::Duration};

use nix::{
    fcntl::OFlag,
    unistd::{Gid, Uid, fchown, pipe2},
};
use tokio::{net::unix::pipe, process::Command, sync::mpsc, task::JoinSet, time::timeout};
use transship_types::ContainerKey;

pub use self::uri::Urls;
use self::{
    console::{Console, ConsoleSocket},
    logger::Logger,
    pump::Sink,
    uri::Output,
};
use crate::error::{Error, Result};

/// After the process has ended, its output may still be on the way; what
/// holds the pipe open longer (a daemonised child) does not hold up Delete.
const DRAIN: Duration = Duration::from_secs(2);

/// User and group that own the container's ends of its pipes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// Stdio that waits for its process.
pub struct Prepared {
    urls: Urls,
    kind: Wiring,
    logger: Option<Logger>,
}

enum Wiring {
    Pipes { stdin: Option<Pipe>, stdout: Option<Pipe>, stderr: Option<Pipe> },
    Terminal { socket: ConsoleSocket, output: Option<OwnedFd> },
}

/// A pipe: the end for the container, and ours (none if a logger has it).
struct Pipe {
    theirs: OwnedFd,
    ours: Option<OwnedFd>,
}

impl Prepared {
    /// Opens what `urls` ask for. For a process of `key`; an exec's id stands
    /// in for the container's, as containerd's own shim has it.
    pub async fn open(key: &ContainerKey, urls: &Urls, owner: Owner) -> Result<Self> {
        let mut logger = None;
        let kind = if urls.terminal {
            let socket = ConsoleSocket::bind()?;
            let mut output = None;
            if let Output::Logger(command) = Output::parse(&urls.stdout)? {
                let (read, write) = pipe()?;
                let (no_stderr, _) = pipe()?;
                logger = Some(Logger::run(key, &command, read, no_stderr).await?);
                output = Some(write);
            }
            Wiring::Terminal { socket, output }
        } else if let Output::Logger(command) = Output::parse(&urls.stdout)? {
            let (out_read, out_write) = pipe()?;
            let (err_read, err_write) = pipe()?;
            logger = Some(Logger::run(key, &command, out_read, err_read).await?);
            let stdin = if urls.stdin.is_empty() { None } else { Some(Pipe::to(owner)?) };
            Wiring::Pipes {
                stdin,
                stdout: Some(Pipe { theirs: out_write, ours: None }),
                stderr: Some(Pipe { theirs: err_write, ours: None }),
            }
        } else {
            Output::parse(&urls.stderr)?;
            let wanted = |url: &str, make: fn(Owner) -> Result<Pipe>| {
                (!url.is_empty()).then(|| make(owner)).transpose()
            };
            Wiring::Pipes {
                stdin: wanted(&urls.stdin, Pipe::to)?,
                stdout: wanted(&urls.stdout, Pipe::from)?,
                stderr: wanted(&urls.stderr, Pipe::from)?,
            }
        };
        Ok(Self { urls: urls.clone(), kind, logger })
    }

    /// Gives `command` (create, exec, restore of the OCI runtime) its stdio,
    /// or the option by which it hands over the terminal. To be called while
    /// options may still be added, before the id.
    pub fn attach(&self, command: &mut Command) -> Result<()> {
        match &self.kind {
            Wiring::Terminal { socket, .. } => {
                command.arg("--console-socket").arg(socket.path());
            }
            Wiring::Pipes { stdin, stdout, stderr } => {
                let end = |pipe: &Option<Pipe>| -> Result<Stdio> {
                    let Some(pipe) = pipe else { return Ok(Stdio::null()) };
                    let copy = pipe.theirs.try_clone();
                    copy.map(Stdio::from).map_err(Error::io("duplicate a pipe of the container"))
                };
                command.stdin(end(stdin)?).stdout(end(stdout)?).stderr(end(stderr)?);
            }
        }
        Ok(())
    }

    /// Whether the process gets something as descriptor `number`; nothing
    /// means `/dev/null`.
    pub fn feeds(&self, number: usize) -> bool {
        match &self.kind {
            Wiring::Terminal { .. } => true,
            Wiring::Pipes { stdin, stdout, stderr } => {
                [stdin, stdout, stderr].get(number).is_some_and(|pipe| pipe.is_some())
            }
        }
    }

    /// Opens every output once and closes it again: one that cannot be opened
    /// must not be found out when the process runs already.
    pub fn rehearse(&self) -> Result<()> {
        if self.logger.is_some() {
            return Ok(());
        }
        let one_file = OneFile::of(&self.urls)?;
        one_file.sink(&self.urls.stdout)?;
        one_file.sink(&self.urls.stderr)?;
        Ok(())
    }

    /// Begins to copy, once the runtime has succeeded. Lets go of the
    /// container's ends, so that its exit is seen as the end of its output.
    pub async fn connect(self) -> Result<Live> {
        let (copying, copied) = mpsc::channel(1);
        let mut live =
            Live { stdin: None, console: None, pumps: JoinSet::new(), copied, logger: self.logger };
        match self.kind {
            Wiring::Pipes { stdin, stdout, stderr } => {
                if let Some(write) = stdin.and_then(|pipe| pipe.ours) {
                    let write = pipe::Sender::from_owned_fd(write)
                        .map_err(Error::io("watch the stdin pipe"))?;
                    let read = live.open_stdin(&self.urls.stdin)?;
                    live.pumps.spawn(pump::copy_in(read, Sink::Pipe(write)));
                }
                let one_file = OneFile::of(&self.urls)?;
                for (url, pipe) in [(&self.urls.stdout, stdout), (&self.urls.stderr, stderr)] {
                    let Some(read) = pipe.and_then(|pipe| pipe.ours) else { continue };
                    let read = pipe::Receiver::from_owned_fd(read)
                        .map_err(Error::io("watch an output pipe"))?;
                    live.pumps.spawn(pump::copy_out(read, one_file.sink(url)?, copying.clone()));
                }
            }
            Wiring::Terminal { socket, output } => {
                let console = Arc::new(Console::new(socket.receive().await?)?);
                if !self.urls.stdin.is_empty() {
                    let read = live.open_stdin(&self.urls.stdin)?;
                    live.pumps.spawn(pump::copy_in(read, Sink::Console(console.clone())));
                }
                let sink = match output {
                    Some(write) => Sink::Pipe(
                        pipe::Sender::from_owned_fd(write)
                            .map_err(Error::io("watch the logger's pipe"))?,
                    ),
                    None => OneFile::of(&self.urls)?.sink(&self.urls.stdout)?,
                };
                live.pumps.spawn(pump::copy_console(console.clone(), sink, copying));
                live.console = Some(console);
            }
        }
        Ok(live)
    }
}

impl Pipe {
    /// For the container to read.
    fn to(owner: Owner) -> Result<Self> {
        let (theirs, ours) = pipe()?;
        give(&theirs, owner)?;
        Ok(Self { theirs, ours: Some(ours) })
    }

    /// For the container to write.
    fn from(owner: Owner) -> Result<Self> {
        let (ours, theirs) = pipe()?;
        give(&theirs, owner)?;
        Ok(Self { theirs, ours: Some(ours) })
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe2(OFlag::O_CLOEXEC).map_err(|e| Error::io("make a pipe for the container")(e.into()))
}

fn give(end: &OwnedFd, owner: Owner) -> Result<()> {
    if owner.uid == 0 && owner.gid == 0 {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    fchown(end, Some(uid), Some(gid)).map_err(|e| {
        Error::io(format!("give a pipe to user {} group {}", owner.uid, owner.gid))(e.into())
    })
}

/// stdout and stderr may name the same file; then both append to one opening.
struct OneFile(Option<Arc<fs::File>>);

impl OneFile {
    fn of(urls: &Urls) -> Result<Self> {
        match Output::parse(&urls.stdout)? {
            Output::File(path) => open_file(&path).map(|file| Self(Some(Arc::new(file)))),
            _ => Ok(Self(None)),
        }
    }

    fn sink(&self, url: &str) -> Result<Sink> {
        if let Some(file) = &self.0 {
            return Ok(Sink::File(file.clone()));
        }
        match Output::parse(url)? {
            Output::Nothing => Ok(Sink::Null),
            Output::File(path) => Ok(Sink::File(Arc::new(open_file(&path)?))),
            Output::Fifo(path) if is_fifo(&path) => {
                let fifo = pipe::OpenOptions::new().read_write(true).open_sender(&path);
                fifo.map(Sink::Fifo).map_err(Error::io(format!("open the fifo {}", path.display())))
            }
            Output::Fifo(path) => Ok(Sink::File(Arc::new(open_file(&path)?))),
            Output::Logger(_) => Err(Error::InvalidArgument(format!(
                "stderr goes to the logger {url}, stdout does not; a logger takes both"
            ))),
        }
    }
}

fn is_fifo(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo())
}

fn open_file(path: &Path) -> Result<fs::File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(Error::io(format!("make {}", parent.display())))?;
    }
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .map_err(Error::io(format!("open the output file {}", path.display())))
}

/// Stdio of a process that runs (or has ended and was not deleted yet).
pub struct Live {
    /// Our writer on the stdin fifo: while it is open, a client that detaches
    /// is no end of file to the container.
    stdin: Option<pipe::Sender>,
    console: Option<Arc<Console>>,
    pumps: JoinSet<()>,
    /// Closed once all output of the process was copied.
    copied: mpsc::Receiver<()>,
    logger: Option<Logger>,
}

impl Live {
    fn open_stdin(&mut self, url: &str) -> Result<pipe::Receiver> {
        let path = uri::fifo_path(url);
        let open = || -> io::Result<_> {
            let read = pipe::OpenOptions::new().open_receiver(path)?;
            Ok((read, pipe::OpenOptions::new().open_sender(path)?))
        };
        let (read, keeper) = open().map_err(Error::io(format!("open the stdin fifo {url}")))?;
        self.stdin = Some(keeper);
        Ok(read)
    }

    /// From now on the end of the client's input is the container's.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sets the terminal's size; without a terminal there is nothing to do.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        match &self.console {
            Some(console) => {
                console.resize(width, height).map_err(Error::io("resize the terminal"))
            }
            None => Ok(()),
        }
    }

    /// The process has ended and is deleted: nobody reads its stdin any more,
    /// its output is copied to the end, at most for [`DRAIN`]. A client that
    /// wants output reads it before it deletes.
    pub async fn drain(mut self) {
        let _ = timeout(DRAIN, self.copied.recv()).await;
        self.pumps.shutdown().await;
        self.stdin = None;
        if let Some(logger) = self.logger {
            logger.end().await;
        }
    }
}

#[cfg(test)]
mod tests;
