//! The only code that talks to containerd.
//!
//! On the source it describes a container, finds the content of its image and
//! reads it; on the target it takes that content in, unpacks it and creates
//! the container that waits for its arrival. Everything made for an arrival
//! carries the id of its lease, so that undoing it needs no memory of our own
//! (an agent that died and came back can do it) and never touches what
//! somebody else made:
//!
//! ```text
//!   open ──▶ blob … ──▶ create ──▶ start ──▶ keep
//!     └─────────┴──────────┴─────────┴─────▶ undo
//! ```
//!
//! | Made for an arrival | Recognised as ours by |
//! |---|---|
//! | lease: keeps content and snapshots from the garbage collector | its label |
//! | ingests: blobs under way | their reference begins with the lease's id |
//! | image record, snapshot, container record | label `dev.transship.arrival` |
//! | task, fifos | the container record |
//!
//! `keep` removes those marks once the container runs; from then on `undo`
//! finds nothing that it may remove.

mod arriving;
pub(crate) mod blob;
mod content;
mod daemon;
mod error;
mod image;
mod inspect;
mod lease;
mod plugins;
pub mod spec;
mod stdio;
mod task;
mod undo;
mod unpack;
mod walk;

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use containerd_client::services::v1::{
    containers_client::ContainersClient, content_client::ContentClient, diff_client::DiffClient,
    images_client::ImagesClient, introspection_client::IntrospectionClient,
    leases_client::LeasesClient, namespaces_client::NamespacesClient,
    snapshots::snapshots_client::SnapshotsClient, tasks_client::TasksClient,
    version_client::VersionClient,
};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};
use transship_types::paths::RUNTIME_DIR;

pub use arriving::ContainerdArrival;
pub use error::{ContainerdError, Doing, Object};

use lease::Lease;

type Result<T> = std::result::Result<T, ContainerdError>;

/// Where containerd listens unless told otherwise.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

/// Looking something up is a read of a local database.
const LOOK_UP: Duration = Duration::from_secs(15);
/// A change may wait for the disk, or for a garbage collection that holds
/// containerd's lock.
const CHANGE: Duration = Duration::from_secs(60);

/// containerd's own limit for one message (its `max_recv_message_size`);
/// tonic's default is a quarter of it, and a spec with many labels exceeds that.
const MESSAGE_MAX: usize = 16 << 20;

/// A connection to one containerd. Cheap to clone; connects when first used
/// and again after containerd was restarted.
#[derive(Clone)]
pub struct Containerd {
    channel: Channel,
    socket: Arc<PathBuf>,
    /// Fifos of arriving containers.
    fifos: Arc<PathBuf>,
}

impl Containerd {
    pub fn at(socket: &Path) -> Self {
        let socket = Arc::new(socket.to_owned());
        let path = Arc::clone(&socket);
        let connect = tower::service_fn(move |_| {
            let path = Arc::clone(&path);
            async move { UnixStream::connect(path.as_path()).await.map(TokioIo::new) }
        });
        // The address is not used: the connector knows the socket.
        let channel = Endpoint::from_static("http://containerd")
            .connect_timeout(LOOK_UP)
            .connect_with_connector_lazy(connect);
        Self { channel, socket, fifos: Arc::new(Path::new(RUNTIME_DIR).join("fifo")) }
    }

    /// "v1.7.24": also the cheapest proof that containerd answers.
    pub async fn daemon_version(&self) -> Result<String> {
        let answer = self
            .ask(
                Object::Containerd.doing("ask the version of"),
                LOOK_UP,
                VersionClient::new(self.channel.clone()).version(()),
            )
            .await?;
        Ok(answer.version)
    }

    /// Waits for one answer, but not for ever.
    ///
    /// The limit is ours alone and is not told to containerd: when it passes,
    /// the stream is cancelled, which reaches the shim behind it as well.
    async fn ask<T>(
        &self,
        doing: Doing,
        limit: Duration,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        match timeout(limit, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.failed(doing, &status)),
            Err(_) => Err(ContainerdError::Slow { doing, limit }),
        }
    }

    fn failed(&self, doing: Doing, status: &Status) -> ContainerdError {
        ContainerdError::from_status(&self.socket, doing, status)
    }

    fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX)
    }

    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX)
    }

    fn diff(&self) -> DiffClient<Channel> {
        DiffClient::new(self.channel.clone())
    }

    fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX)
    }

    fn introspection(&self) -> IntrospectionClient<Channel> {
        IntrospectionClient::new(self.channel.clone())
    }

    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_MAX)
    }

    fn namespaces(&self) -> NamespacesClient<Channel> {
        NamespacesClient::new(self.channel.clone())
    }

    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }
}

/// One namespace, and the lease (if any) that holds whatever is made in it.
#[derive(Clone)]
struct Scope {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Scope {
    fn of(namespace: &str) -> Result<Self> {
        let value = header("namespace", namespace)?;
        Ok(Self { namespace: value, lease: None })
    }

    /// What is made in this scope belongs to the lease.
    fn under(lease: &Lease) -> Result<Self> {
        let scope = Self::of(lease.key.namespace())?;
        Ok(Self { lease: Some(header("lease", &lease.id)?), ..scope })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            metadata.insert("containerd-lease", lease.clone());
        }
        request
    }
}

fn header(what: &str, text: &str) -> Result<MetadataValue<Ascii>> {
    text.parse().map_err(|_| {
        ContainerdError::malformed(format!("the {what} {text:?} is no name that containerd knows"))
    })
}
