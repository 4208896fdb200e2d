//! The server process: one thread that serves containerd and the agent.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::{
        fs::{OpenOptionsExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use containerd_shim_protos::ttrpc::r#async::{Server, transport::Listener};
use futures::Stream;
use nix::{libc, sys::prctl::set_child_subreaper};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{Level, debug, error, info, warn};
use transship_link::local::Peer;

use crate::{
    control,
    error::{Error, Result},
    events::Publisher,
    pod::{Pod, control_dir, private_dir, remove_quietly},
    reaper::Reaper,
    task,
};

/// Threads for blocking calls: a migration uses a few, a container none.
const BLOCKING_THREADS: usize = 16;
const BLOCKING_THREAD_KEEP: Duration = Duration::from_secs(1);
/// To bring the last events to containerd before the shim leaves.
const FLUSH: Duration = Duration::from_secs(2);

pub struct Setup {
    pub namespace: String,
    /// containerd's ttrpc socket, for events.
    pub events: String,
    /// Of the container the shim was started for.
    pub bundle: PathBuf,
    pub socket: PathBuf,
    pub listener: UnixListener,
}

/// Serves until containerd shuts the shim down.
pub fn serve(setup: Setup) -> Result<()> {
    set_child_subreaper(true).map_err(|e| Error::io("become a subreaper")(e.into()))?;
    // The bundle goes when its container does; a pod lives on.
    std::env::set_current_dir("/").map_err(Error::io("leave the bundle"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_THREAD_KEEP)
        .build()
        .map_err(Error::io("start the runtime"))?;
    runtime.block_on(run(setup))
}

async fn run(setup: Setup) -> Result<()> {
    let reaper = Reaper::start()?;
    let publisher = Publisher::new(&setup.namespace, &setup.events);
    let pod = Pod::new(&setup.namespace, publisher, reaper);

    setup.listener.set_nonblocking(true).map_err(Error::io("prepare the socket"))?;
    let listener = Listener::try_from(setup.listener).map_err(Error::io("serve the socket"))?;
    let mut tasks = Server::new().add_listener(listener).register_service(task::services(&pod));
    tasks.start().await.map_err(Error::other("serve the Task API"))?;
    let control = match serve_control(&pod).await {
        Ok(server) => Some(server),
        Err(error) => {
            // Containers run without; they cannot be migrated then.
            warn!(error = error.sentence(), "no control socket");
            None
        }
    };
    debug!(bundle = %setup.bundle.display(), "serving");

    until_shutdown(&pod).await?;
    pod.publisher().flush(FLUSH).await;
    remove_quietly(&setup.socket);
    remove_quietly(pod.control_socket());
    // containerd waits for its connection to close; what it still has to
    // hear has been answered.
    drop((tasks, control));
    Ok(())
}

/// The control service, on a socket that only root can reach.
async fn serve_control(pod: &Pod) -> Result<Server> {
    private_dir(&control_dir())?;
    let path = pod.control_socket();
    // Only a dead process can have had our pid.
    remove_quietly(path);
    let doing = || format!("serve {}", path.display());
    let listener = UnixListener::bind(path).map_err(Error::io(doing()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(Error::io(doing()))?;
    listener.set_nonblocking(true).map_err(Error::io(doing()))?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(Error::io(doing()))?;
    let listener = Listener::new(of_root(listener));
    let mut server = Server::new().add_listener(listener).register_service(control::services(pod));
    server.start().await.map_err(Error::other(doing()))?;
    Ok(server)
}

/// Connections of root, or of whoever runs us. The mode of the socket says so
/// to the kernel; this asks the kernel who has come, in case the mode has been
/// changed.
fn of_root(
    listener: tokio::net::UnixListener,
) -> impl Stream<Item = io::Result<tokio::net::UnixStream>> {
    futures::stream::unfold(listener, |listener| async {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => return Some((Err(error), listener)),
            };
            match Peer::enters(&stream, None) {
                Ok(_) => return Some((Ok(stream), listener)),
                Err(stranger) => warn!(%stranger, "refused at the control socket"),
            }
        }
    })
}

/// Signals do not end a shim that has containers: it is the one that knows
/// how they end.
async fn until_shutdown(pod: &Pod) -> Result<()> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(Error::io("subscribe to SIGTERM"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(Error::io("subscribe to SIGINT"))?;
    loop {
        let name = tokio::select! {
            () = pod.shutdown().cancelled() => return Ok(()),
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        if pod.is_empty() {
            info!(signal = name, "leaving");
            return Ok(());
        }
        warn!(signal = name, "ignored: there are containers");
    }
}

/// Logs go to containerd, through the fifo in the bundle of the container the
/// shim was started for (the current directory).
pub fn log(debug: bool) {
    let Ok(fifo) = open_log(Path::new("log")) else { return };
    let level = if debug { Level::DEBUG } else { Level::INFO };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .with_writer(Mutex::new(Lossy(fifo)))
        .init();
    std::panic::set_hook(Box::new(|panic| error!(%panic, "the shim has a fault")));
}

/// For reading as well: containerd may be away, and a shim must neither wait
/// for it nor die of SIGPIPE.
fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// A log that nobody reads loses lines instead of blocking.
struct Lossy(File);

impl Write for Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.0.write(line) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(line.len()),
            done => done,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
