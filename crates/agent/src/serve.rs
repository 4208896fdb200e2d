//! From a configuration to a running agent, and its end.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ::time::OffsetDateTime;
use thiserror::Error;
use tokio::{
    net::{TcpListener, UnixListener},
    time,
};
use transship_api::control_ttrpc::create_agent;
use ttrpc::asynchronous::Server;

use crate::{
    control::Control,
    doors::{self, Refused},
    failure::chain,
    listener,
    node::Node,
    source, target,
};

/// Between two looks at what expires.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// For sessions that are told to end: a kill, an unmount, and the peer's
/// answer.
const LAST: Duration = Duration::from_secs(75);

#[derive(Debug, Error)]
pub enum ServeError {
    #[error("{} cannot be made", path.display())]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen on {address}")]
    Listen {
        address: String,
        #[source]
        source: io::Error,
    },
    #[error("another transshipd serves {}", .0.display())]
    Running(PathBuf),
    #[error("the control socket failed")]
    Control(#[source] ttrpc::Error),
}

/// A node that is open for business.
pub struct Serving {
    node: Arc<Node>,
    control: Server,
    /// For those who may not use the other one.
    refusing: Server,
    control_socket: PathBuf,
    arrivals_socket: PathBuf,
    pub address: std::net::SocketAddr,
}

pub async fn open(node: Arc<Node>) -> Result<Serving, ServeError> {
    let runtime = node.places.runtime.clone();
    private_dir(&runtime)?;
    let listening = |source| ServeError::Listen { address: node.config.listen.clone(), source };
    let listener = TcpListener::bind(&node.config.listen).await.map_err(listening)?;
    let address = listener.local_addr().map_err(listening)?;

    let arrivals_socket = runtime.join("arrivals.sock");
    let arrivals = UnixListener::from_std(private_socket(&arrivals_socket)?).map_err(|source| {
        ServeError::Listen { address: arrivals_socket.display().to_string(), source }
    })?;
    node.tasks.spawn({
        let node = node.clone();
        async move {
            tokio::select! {
                served = node.arrivals.serve(arrivals) => {
                    if let Err(error) = served {
                        tracing::error!(%error, "the arrivals socket failed; no container can arrive");
                    }
                }
                () = node.shutdown.cancelled() => {}
            }
        }
    });

    let control_socket = runtime.join("agent.sock");
    let listening =
        |source| ServeError::Listen { address: control_socket.display().to_string(), source };
    let control = UnixListener::from_std(private_socket(&control_socket)?).map_err(listening)?;
    let named = node.config.control.group.clone();
    let group = named.as_deref().map(doors::group).transpose().map_err(listening)?;
    node.identities.sweep();
    if let Some(group) = group {
        doors::open_to(group, &control_socket, &runtime).map_err(listening)?;
    }
    let (admitted, refused) = doors::sort(&node, control, group);
    let mut control = Server::new()
        .add_listener(admitted)
        .register_service(create_agent(Arc::new(Control(node.clone()))));
    let mut refusing = Server::new()
        .add_listener(refused)
        .register_service(create_agent(Arc::new(Refused { group: named })));

    // What a former run left open, before new work can meet it.
    target::owed::take_up(&node);
    target::take_up(&node).await;
    source::resume(&node).await;
    control.start().await.map_err(ServeError::Control)?;
    refusing.start().await.map_err(ServeError::Control)?;
    node.tasks.spawn(listener::serve(node.clone(), listener));
    node.tasks.spawn(remind(node.clone()));
    tracing::info!(node = %node.name(), %address, "transshipd serves");
    Ok(Serving { node, control, refusing, control_socket, arrivals_socket, address })
}

/// Says what expires before it does, to whoever reads the log and runs no
/// `transship check`.
async fn remind(node: Arc<Node>) {
    let mut days = time::interval(DAY);
    loop {
        tokio::select! {
            _ = days.tick() => {}
            () = node.shutdown.cancelled() => return,
        }
        let identity = node.identities.current();
        if let Err(error) = identity.trust.vet() {
            let (error, remedy) = (chain(&error), error.remedy());
            tracing::error!(error, remedy, "no other node will believe this one");
        }
        for (warning, remedy) in identity.warnings(OffsetDateTime::now_utc()) {
            tracing::warn!(remedy, "{warning}");
        }
    }
}

impl Serving {
    /// Ends what is not committed, waits for what is, and removes the sockets.
    pub async fn close(mut self) {
        tracing::info!("transshipd ends");
        self.control.stop_listen().await;
        self.node.shutdown.cancel();
        for live in self.node.book.all_live() {
            live.cancel.cancel();
        }
        self.node.tasks.close();
        if time::timeout(LAST, self.node.tasks.wait()).await.is_err() {
            tracing::warn!("sessions are left to the next run");
        }
        // Only now: the command lines have their outcomes.
        self.control.disconnect().await;
        self.refusing.disconnect().await;
        for socket in [&self.control_socket, &self.arrivals_socket] {
            // It may be gone; the next run removes what is left.
            let _ = fs::remove_file(socket);
        }
        self.node.identities.close();
    }
}

fn private_dir(path: &Path) -> Result<(), ServeError> {
    let failed = |source| ServeError::Directory { path: path.into(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(failed)
}

/// A listening socket of mode 0600. One left behind by a process that died is
/// replaced, one that answers is not.
fn private_socket(path: &Path) -> Result<std::os::unix::net::UnixListener, ServeError> {
    if StdUnixStream::connect(path).is_ok() {
        return Err(ServeError::Running(path.into()));
    }
    let failed = |source| ServeError::Listen { address: path.display().to_string(), source };
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    // The directory is 0700, so nobody gets in between bind and chmod.
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
