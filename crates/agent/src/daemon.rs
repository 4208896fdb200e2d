//! What the agent needs of the daemon that keeps the containers.
//!
//! Only implementations of these traits talk to a daemon; everything else in
//! the agent is written against them, so that a whole migration can run in a
//! test without any daemon at all. Messages of the session protocol serve as
//! records: what arrives from a peer has been checked by `offer` before it
//! reaches a daemon.

use std::{error::Error, future::Future, pin::Pin};

use async_trait::async_trait;
use bytes::Bytes;
use thiserror::Error;
use transship_api::session::{Container, Descriptor, Stdio};
use transship_types::{Code, ContainerKey, Refusal, Ticket};

/// A local daemon. Namespaces are containerd's; a daemon without them has
/// one, named `default`.
#[async_trait]
pub trait Daemon: Send + Sync + 'static {
    /// For people: `containerd 1.7.24`.
    async fn version(&self) -> Result<String, DaemonError>;

    /// The container as the daemon knows it.
    async fn describe(&self, key: &ContainerKey) -> Result<Description, DaemonError>;

    /// Every container whose runtime is ours, of one namespace or of all.
    async fn list(&self, namespace: Option<&str>) -> Result<Vec<Listed>, DaemonError>;

    /// `None`: the container has no task.
    async fn task(&self, key: &ContainerKey) -> Result<Option<Task>, DaemonError>;

    /// What already bears this name, as a phrase for people (`a container`,
    /// `a snapshot of overlayfs`); `None` when it is free.
    async fn taken(
        &self,
        key: &ContainerKey,
        snapshotter: &str,
    ) -> Result<Option<String>, DaemonError>;

    /// Whether the daemon has this snapshotter.
    async fn has_snapshotter(&self, name: &str) -> Result<bool, DaemonError>;

    /// What an image consists of for this platform: the top descriptor first,
    /// then index, manifest, config and layers.
    async fn content_of(
        &self,
        namespace: &str,
        image: &str,
    ) -> Result<Vec<Descriptor>, DaemonError>;

    /// What this container's own file system lies on, as [`content_of`] gives
    /// it. Refuses a container that was not made from an image, and one whose
    /// image name stands for something else by now.
    ///
    /// [`content_of`]: Daemon::content_of
    async fn origin_of(&self, key: &ContainerKey) -> Result<Vec<Descriptor>, DaemonError> {
        let image = self.describe(key).await?.record.image;
        self.content_of(key.namespace(), &image).await
    }

    /// The digests among `content` that are not here yet.
    async fn missing(
        &self,
        namespace: &str,
        content: &[Descriptor],
    ) -> Result<Vec<String>, DaemonError>;

    /// The bytes of one blob.
    async fn read_blob(
        &self,
        namespace: &str,
        descriptor: &Descriptor,
    ) -> Result<Box<dyn BlobReader>, DaemonError>;

    /// Bytes that may still be written below the daemon's root.
    async fn free_disk(&self) -> Result<u64, DaemonError>;

    /// Opens an arrival under this name: takes a lease, changes nothing else.
    async fn arrival(&self, key: &ContainerKey) -> Result<Box<dyn Arriving>, DaemonError>;

    /// Arrivals that an agent left behind when it died: those whose lease is
    /// still there.
    async fn unfinished(&self) -> Result<Vec<(ContainerKey, Box<dyn Arriving>)>, DaemonError>;

    /// Deletes a stopped task with its container and snapshot. What is gone
    /// already is no error.
    async fn remove(&self, key: &ContainerKey) -> Result<(), DaemonError>;

    /// Kills and deletes the container with its snapshot, unless it was made
    /// after `made_by`, in seconds since the epoch: then it is another one of
    /// that name. Answers whether there was one that ran.
    async fn end(&self, key: &ContainerKey, made_by: i64) -> Result<bool, DaemonError>;
}

/// A container on its way in. Whatever it makes in the daemon it can undo;
/// one that is neither kept nor undone is found again by
/// [`Daemon::unfinished`].
#[async_trait]
pub trait Arriving: Send {
    /// A blob to be written under the arrival's lease.
    async fn blob(&mut self, descriptor: &Descriptor) -> Result<Box<dyn BlobWriter>, DaemonError>;

    /// Makes everything up to the task: image record, unpacked layers,
    /// snapshot, container record (its spec carries the ticket as an
    /// annotation), stdio, and the task by `Create`, which our shim answers
    /// without a process.
    async fn create(&mut self, arrival: &Arrival) -> Result<(), DaemonError>;

    /// The daemon's `Start`. Resolves once the container runs (its pid) or
    /// will not. Detached from `self`, so that an undo can overtake it.
    fn start(&self) -> Pin<Box<dyn Future<Output = Result<u32, DaemonError>> + Send>>;

    /// It has arrived: gives up the lease and nothing else.
    async fn keep(self: Box<Self>) -> Result<(), DaemonError>;

    /// Removes everything this arrival made: task, container, snapshot, image
    /// record if it was ours, stdio files, lease. Goes on after an error and
    /// returns the first one.
    async fn undo(self: Box<Self>) -> Result<(), DaemonError>;
}

/// Everything the daemon is told about an arriving container.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub key: ContainerKey,
    pub record: Container,
    pub ticket: Ticket,
    /// The source's stdio: only its kind matters here.
    pub stdio: Stdio,
    /// The image's content, the top descriptor first; empty when the
    /// container has no image.
    pub content: Vec<Descriptor>,
}

#[async_trait]
pub trait BlobReader: Send {
    /// The next bytes, never none; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, DaemonError>;
}

/// Dropping it without a commit gives the blob up.
#[async_trait]
pub trait BlobWriter: Send {
    async fn write(&mut self, bytes: Bytes) -> Result<(), DaemonError>;
    /// Checks size and digest, and makes the blob readable.
    async fn commit(self: Box<Self>) -> Result<(), DaemonError>;
}

#[derive(Debug, Clone)]
pub struct Description {
    pub record: Container,
    pub snapshot_key: String,
    pub task: Option<Task>,
}

#[derive(Debug, Clone)]
pub struct Task {
    pub pid: u32,
    pub status: TaskStatus,
    pub stdio: Stdio,
}

/// As the daemon reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskStatus {
    Created,
    Running,
    Paused,
    Stopped,
    Unknown,
}

impl TaskStatus {
    /// The word `ctr task ls` prints.
    pub fn as_str(self) -> &'static str {
        match self {
            TaskStatus::Created => "CREATED",
            TaskStatus::Running => "RUNNING",
            TaskStatus::Paused => "PAUSED",
            TaskStatus::Stopped => "STOPPED",
            TaskStatus::Unknown => "UNKNOWN",
        }
    }
}

/// One line of a list.
#[derive(Debug, Clone)]
pub struct Listed {
    pub key: ContainerKey,
    pub image: String,
    pub task: Option<Task>,
}

/// A daemon that refused, failed, or could not be reached. The text names the
/// object; `source` says why.
#[derive(Debug, Error)]
pub enum DaemonError {
    #[error("{what} does not exist")]
    NotFound { what: String },
    #[error("{what} exists already")]
    Exists { what: String },
    #[error("{address} does not answer")]
    Unavailable {
        /// Its name and where it was looked for.
        address: String,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// `doing` reads after "failed": `to unpack the image docker.io/…`.
    #[error("failed {doing}")]
    Failed {
        doing: String,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A blob whose bytes are not what its descriptor says.
    #[error("blob {digest}: {why}")]
    Blob { digest: String, why: String },
    /// It will not do it, for a reason with a code of its own.
    #[error("{0}")]
    Refused(Box<Refusal>),
}

impl DaemonError {
    pub fn failed(
        doing: impl Into<String>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        DaemonError::Failed { doing: doing.into(), source: source.into() }
    }

    pub fn code(&self) -> Code {
        match self {
            DaemonError::NotFound { .. } => Code::UnknownContainer,
            DaemonError::Exists { .. } => Code::NameTaken,
            DaemonError::Blob { .. } => Code::Image,
            DaemonError::Refused(refusal) => refusal.code,
            DaemonError::Unavailable { .. } | DaemonError::Failed { .. } => Code::Daemon,
        }
    }
}
