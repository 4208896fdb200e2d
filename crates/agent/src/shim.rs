//! The agent's view of the shims on its node.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use thiserror::Error;
use transship_api::{
    control::{
        AbandonRequest, AdjustRequest, DepartEvent, DepartRequest, InspectRequest, InspectResponse,
        SettleRequest, WatchRequest, WatchResponse,
    },
    control_ttrpc::ShimClient,
};
use transship_migration::decide::Told;
use transship_types::{Code, ContainerKey, Epoch, MigrationId, paths};
use ttrpc::{
    asynchronous::{Client, ClientStreamReceiver},
    context,
};

/// Whatever speaks for the shims: theirs is ttrpc, a test's is a fake.
#[async_trait]
pub trait Shims: Send + Sync + 'static {
    async fn inspect(&self, key: &ContainerKey) -> Result<InspectResponse, ShimError>;

    /// Begins a departure. The request's `id` is `key`'s.
    async fn depart(
        &self,
        key: &ContainerKey,
        request: DepartRequest,
    ) -> Result<Box<dyn Departing>, ShimError>;

    /// Ends a departure before its commit: `Ok(None)`, or why it could not.
    async fn abandon(
        &self,
        key: &ContainerKey,
        migration: &MigrationId,
    ) -> Result<Option<String>, ShimError>;

    /// Ends a departure in doubt on the target's proof, or because a person
    /// has `decided`; answers the ending, and why it is in doubt still, if it
    /// is: it `may_lack` pages there.
    async fn settle(
        &self,
        key: &ContainerKey,
        migration: &MigrationId,
        runs_there: bool,
        may_lack: bool,
        decided: Option<Epoch>,
    ) -> Result<(String, String), ShimError>;

    /// Another limit for the pages of a departure under way: bytes per
    /// second, 0 for none.
    async fn adjust(
        &self,
        key: &ContainerKey,
        migration: &MigrationId,
        bandwidth: u64,
    ) -> Result<(), ShimError>;

    /// Notices writes to the container's memory for so long.
    async fn watch(
        &self,
        key: &ContainerKey,
        duration: Duration,
    ) -> Result<WatchResponse, ShimError>;
}

/// A departure under way.
#[async_trait]
pub trait Departing: Send {
    /// The next event; `None` when the shim ended without an outcome. May be
    /// cancelled without losing an event.
    async fn next(&mut self) -> Result<Option<DepartEvent>, ShimError>;
}

#[derive(Debug, Error)]
pub enum ShimError {
    #[error("the shim of {key} does not answer at {}", socket.display())]
    Unreachable {
        key: ContainerKey,
        socket: PathBuf,
        #[source]
        source: ttrpc::Error,
    },
    #[error("the shim of {key} failed to {doing}")]
    Failed {
        key: ContainerKey,
        doing: &'static str,
        #[source]
        source: ttrpc::Error,
    },
}

impl ShimError {
    /// What a settlement has come to that ended with this.
    pub fn told(&self) -> Told {
        match self {
            ShimError::Unreachable { .. } => Told::Gone,
            ShimError::Failed { source: ttrpc::Error::RpcStatus(status), .. }
                if status.code() == ttrpc::Code::NOT_FOUND =>
            {
                Told::NotUnderWay
            }
            ShimError::Failed { .. } => Told::Unclear,
        }
    }

    pub fn code(&self) -> Code {
        match self {
            ShimError::Unreachable { .. } => Code::ForeignRuntime,
            ShimError::Failed { .. } => Code::Runtime,
        }
    }

    pub fn remedy(&self) -> &'static str {
        match self {
            ShimError::Unreachable { .. } => {
                "containers started by another version of the shim must be started again"
            }
            ShimError::Failed { .. } => "see the shim's messages in containerd's log",
        }
    }
}

/// An answer that only takes a look.
const QUICK: Duration = Duration::from_secs(10);
/// An answer that may wait for CRIU to unlock and thaw.
const SLOW: Duration = Duration::from_secs(60);
/// One that waits until all pages have travelled that the target lacks.
const PAYING: Duration = Duration::from_secs(24 * 3600);

/// The shims of this node, by ttrpc.
#[derive(Debug, Clone, Copy, Default)]
pub struct TtrpcShims;

#[async_trait]
impl Shims for TtrpcShims {
    async fn inspect(&self, key: &ContainerKey) -> Result<InspectResponse, ShimError> {
        let request = InspectRequest { id: key.id().into(), ..Default::default() };
        let (client, failed) = connect(key, "be inspected").await?;
        client.inspect(within(QUICK), &request).await.map_err(failed)
    }

    async fn depart(
        &self,
        key: &ContainerKey,
        request: DepartRequest,
    ) -> Result<Box<dyn Departing>, ShimError> {
        let (client, failed) = connect(key, "begin a departure").await?;
        // No deadline: it takes as long as the memory is large.
        let events = client.depart(context::with_timeout(0), &request).await.map_err(failed)?;
        Ok(Box::new(Stream { key: key.clone(), events }))
    }

    async fn abandon(
        &self,
        key: &ContainerKey,
        migration: &MigrationId,
    ) -> Result<Option<String>, ShimError> {
        let request = AbandonRequest {
            id: key.id().into(),
            migration: migration.to_string(),
            ..Default::default()
        };
        let (client, failed) = connect(key, "abandon a departure").await?;
        let answer = client.abandon(within(SLOW), &request).await.map_err(failed)?;
        Ok((!answer.abandoned).then_some(answer.detail))
    }

    async fn settle(
        &self,
        key: &ContainerKey,
        migration: &MigrationId,
        runs_there: bool,
        may_lack: bool,
        decided: Option<Epoch>,
    ) -> Result<(String, String), ShimError> {
        let request = SettleRequest {
            id: key.id().into(),
            migration: migration.to_string(),
            runs_there,
            may_lack,
            decided: decided.map_or(0, |epoch| epoch.0),
            ..Default::default()
        };
        let (client, failed) = connect(key, "settle a departure").await?;
        // Pages may have to travel first, over whatever link there is.
        let limit = if may_lack { PAYING } else { SLOW };
        let answer = client.settle(within(limit), &request).await.map_err(failed)?;
        Ok((answer.ending, answer.error))
    }

    async fn adjust(
        &self,
        key: &ContainerKey,
        migration: &MigrationId,
        bandwidth: u64,
    ) -> Result<(), ShimError> {
        let request = AdjustRequest {
            id: key.id().into(),
            migration: migration.to_string(),
            bandwidth,
            ..Default::default()
        };
        let (client, failed) = connect(key, "change the bandwidth").await?;
        client.adjust(within(QUICK), &request).await.map(drop).map_err(failed)
    }

    async fn watch(
        &self,
        key: &ContainerKey,
        duration: Duration,
    ) -> Result<WatchResponse, ShimError> {
        let duration_us = duration.as_micros().try_into().unwrap_or(u64::MAX);
        let request = WatchRequest { id: key.id().into(), duration_us, ..Default::default() };
        let (client, failed) = connect(key, "watch its memory").await?;
        client.watch(within(duration + SLOW), &request).await.map_err(failed)
    }
}

struct Stream {
    key: ContainerKey,
    events: ClientStreamReceiver<DepartEvent>,
}

#[async_trait]
impl Departing for Stream {
    async fn next(&mut self) -> Result<Option<DepartEvent>, ShimError> {
        self.events.recv().await.map_err(|source| ShimError::Failed {
            key: self.key.clone(),
            doing: "depart",
            source,
        })
    }
}

/// A new connection each time: calls are few, and a shim may have been
/// replaced since the last one.
async fn connect(
    key: &ContainerKey,
    doing: &'static str,
) -> Result<(ShimClient, impl FnOnce(ttrpc::Error) -> ShimError), ShimError> {
    let socket = paths::shim_socket(key);
    let client = Client::connect(&address(&socket)).await.map_err(|source| {
        ShimError::Unreachable { key: key.clone(), socket: socket.clone(), source }
    })?;
    let key = key.clone();
    Ok((ShimClient::new(client), move |source| ShimError::Failed { key, doing, source }))
}

fn address(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}

fn within(limit: Duration) -> context::Context {
    context::with_timeout(limit.as_nanos().try_into().unwrap_or(i64::MAX))
}
