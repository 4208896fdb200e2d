//! What one shim process serves: the containers of a pod, or a single one.

use std::{
    collections::{HashMap, hash_map::Entry},
    fs, io,
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;
use tracing::warn;
use transship_types::{ContainerKey, paths};

use crate::{
    container::Container,
    error::{Error, Result},
    events::Publisher,
    reaper::Reaper,
};

/// Annotations that put a container into the shim of another one, the first
/// that is present wins (as containerd's own shim has it).
pub const GROUP_ANNOTATIONS: [&str; 2] =
    ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// Cheap to clone; all clones are the same pod.
#[derive(Clone)]
pub struct Pod(Arc<Inner>);

struct Inner {
    namespace: String,
    publisher: Publisher,
    reaper: Reaper,
    shutdown: CancellationToken,
    /// None: an id that is being created.
    containers: Mutex<HashMap<String, Option<Container>>>,
    /// Our control socket, to which every container's path is a link.
    control: PathBuf,
}

impl Pod {
    pub fn new(namespace: &str, publisher: Publisher, reaper: Reaper) -> Self {
        Self(Arc::new(Inner {
            namespace: namespace.to_owned(),
            publisher,
            reaper,
            shutdown: CancellationToken::new(),
            containers: Mutex::default(),
            control: control_dir().join(format!("{}.sock", std::process::id())),
        }))
    }

    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    pub fn publisher(&self) -> &Publisher {
        &self.0.publisher
    }

    pub fn reaper(&self) -> &Reaper {
        &self.0.reaper
    }

    /// Where the control service of this shim listens.
    pub fn control_socket(&self) -> &Path {
        &self.0.control
    }

    /// Cancelled once the shim shall leave.
    pub fn shutdown(&self) -> &CancellationToken {
        &self.0.shutdown
    }

    pub fn find(&self, id: &str) -> Result<Container> {
        let found = self.containers().get(id).cloned().flatten();
        found.ok_or_else(|| Error::NotFound(format!("container {id} is not known to this shim")))
    }

    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    /// Takes an id for a container that is about to be made. Dropping the
    /// reservation without [`Reservation::fill`] gives the id back.
    pub fn reserve(&self, id: &str) -> Result<Reservation> {
        match self.containers().entry(id.to_owned()) {
            Entry::Occupied(_) => Err(Error::AlreadyExists(format!("container {id} exists"))),
            Entry::Vacant(free) => {
                free.insert(None);
                Ok(Reservation { pod: self.clone(), id: id.to_owned(), filled: false })
            }
        }
    }

    /// The container is deleted.
    pub fn remove(&self, key: &ContainerKey) {
        self.containers().remove(key.id());
        let link = paths::shim_socket(key);
        if fs::read_link(&link).is_ok_and(|target| target == self.0.control) {
            remove_quietly(&link);
        }
    }

    /// Lets `key` be reached through its own path.
    fn link(&self, key: &ContainerKey) -> io::Result<()> {
        let link = paths::shim_socket(key);
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => symlink(&self.0.control, link),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Container>>> {
        self.0.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Reservation {
    pod: Pod,
    id: String,
    filled: bool,
}

impl Reservation {
    pub fn fill(mut self, container: Container) {
        self.filled = true;
        if let Err(error) = self.pod.link(container.key()) {
            // The Task API works without; only a migration will not find us.
            warn!(container = self.id, %error, "no control socket for this container");
        }
        self.pod.containers().insert(self.id.clone(), Some(container));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.filled {
            self.pod.containers().remove(&self.id);
        }
    }
}

/// The directory of all shims' control sockets.
pub fn control_dir() -> PathBuf {
    Path::new(paths::RUNTIME_DIR).join("shim")
}

/// Makes a directory, and those above it, that only root may enter.
pub fn private_dir(dir: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(Error::io(format!("make {}", dir.display())))
}

/// After a crash: the socket a container's path leads to, if nobody listens.
pub fn remove_stale_control(key: &ContainerKey) {
    let link = paths::shim_socket(key);
    let target = fs::read_link(&link).unwrap_or_else(|_| link.clone());
    if !answers(&target) {
        remove_quietly(&target);
        remove_quietly(&link);
    }
}

/// Whether somebody listens on a unix socket.
pub fn answers(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

pub fn remove_quietly(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        warn!(path = %path.display(), %error, "cannot remove");
    }
}
