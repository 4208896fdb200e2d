//! A container: what the shim knows of it and who may touch it.
//!
//! One task owns each container ([`owner::Owner`]); everybody else holds a
//! [`Container`] and asks. The owner never waits: whatever takes time (the
//! OCI runtime, a checkpoint, a migration) runs as a job beside it and comes
//! back with its result. So State, Kill, Wait and Pids answer at any time.
//!
//! ```text
//!            Create (plain)                  Create (checkpoint or ticket)
//!                 ▼                                      ▼
//!              Created ──────────Start──────┐    CreatedCheckpoint   pid 0
//!                 │                         ▼       │ Start = restore::restore
//!                 │            ┌───────── Running ◀─┘         or arrive::arrive
//!                 │      Pausing│           ▲ │
//!                 │            ▼      Resume│ │
//!                 │          Paused ────────┘ │      Occupation::frozen/thawed
//!                 │            │              │      move between the two also
//!                 └────────────┴──── exit ────┴──▶ Stopped ──Delete──▶ gone
//! ```
//!
//! # Seams
//!
//! * A restore: Start of a container in `CreatedCheckpoint` calls
//!   `restore::restore(&mut Revival, images) -> Result<i32>` or
//!   `arrive::arrive(&mut Revival, ticket) -> Result<i32>`; both answer the
//!   pid of the restored first process, a child of the shim by then.
//!   [`Revival::command`] is the OCI runtime's `restore` with the container's
//!   stdio or console socket attached; the caller adds the environment of the
//!   gate and further options, then [`Revival::id`] last. The owner connects
//!   the stdio afterwards. The future is dropped when the container is killed
//!   meanwhile; it must leave nothing behind then but what
//!   `OCI runtime delete --force` removes.
//! * A checkpoint: `checkpoint::checkpoint(&Dump, &Occupation) -> Result<()>`.
//! * A migration: [`Container::occupy`] gives an [`Occupation`]: as long as it
//!   is held, nobody pauses, checkpoints, updates, deletes or execs. It tells
//!   the owner what is true: [`Occupation::frozen`], [`Occupation::thawed`].
//!   The end of the processes is seen by the owner itself.

mod create;
mod occupation;
mod owner;
mod revival;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use containerd_shim_protos::{api::ExecProcessRequest, protobuf::well_known_types::any::Any};
use tokio::sync::{mpsc, oneshot};
use transship_types::{ContainerKey, Ticket};

pub use self::{
    create::{Head, create},
    occupation::Occupation,
    revival::{Dump, Revival},
};
use crate::{
    error::{Error, Result},
    oci::Oci,
    options::{CheckpointOptions, RuntimeOptions},
    reaper::Exit,
    stdio::Urls,
};

pub type Reply<T> = oneshot::Sender<Result<T>>;

/// What stays the same as long as the container lives.
#[derive(Debug)]
pub struct Context {
    pub key: ContainerKey,
    pub bundle: PathBuf,
    /// Where the root filesystem is mounted (by us, at Create); None if it
    /// came ready in the bundle.
    pub rootfs: Option<PathBuf>,
    pub options: RuntimeOptions,
    pub oci: Oci,
    pub urls: Urls,
    /// Of the OCI spec.
    pub annotations: BTreeMap<String, String>,
    /// The container has a pid namespace of its own: with its first process
    /// all others end.
    pub private_pids: bool,
}

impl Context {
    pub fn id(&self) -> &str {
        self.key.id()
    }

    /// The whole OCI spec, read anew: most containers live and die without
    /// anybody asking for it.
    pub fn spec(&self) -> Result<oci_spec::runtime::Spec> {
        let path = self.bundle.join("config.json");
        let text = fs::read(&path).map_err(Error::io(format!("read {}", path.display())))?;
        serde_json::from_slice(&text).map_err(|error| {
            Error::Internal(format!("read {}: {}", path.display(), Error::json(&error)))
        })
    }

    /// The root of the container's filesystem.
    pub fn root(&self) -> Result<PathBuf> {
        if let Some(rootfs) = &self.rootfs {
            return Ok(rootfs.clone());
        }
        let spec = self.spec()?;
        let root = spec.root().as_ref().map(|root| root.path().clone());
        Ok(self.bundle.join(root.unwrap_or_else(|| "rootfs".into())))
    }

    pub fn pid_file(&self) -> PathBuf {
        self.bundle.join("init.pid")
    }

    /// Where CRIU keeps its logs, until Delete.
    pub fn criu_work(&self) -> PathBuf {
        match self.options.criu_work_path.as_str() {
            "" => self.bundle.join("work"),
            path => Path::new(path).to_owned(),
        }
    }
}

/// Where a container comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Fresh,
    Checkpoint { images: PathBuf, parent: Option<PathBuf> },
    Arrival(Ticket),
}

/// What a client may know of a process.
#[derive(Debug, Clone)]
pub struct Report {
    pub status: Status,
    pub pid: u32,
    pub bundle: PathBuf,
    pub urls: Urls,
    pub exit: Option<Exit>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Created,
    Running,
    Pausing,
    Paused,
    Stopped,
}

/// A process of the container and, if it is one of ours, its exec id.
pub type Listed = (u32, Option<String>);

/// A container, by way of its owner. An empty `exec` means the container's
/// first process.
#[derive(Clone)]
pub struct Container {
    context: std::sync::Arc<Context>,
    requests: mpsc::UnboundedSender<Request>,
}

pub(crate) enum Request {
    State { exec: String, reply: Reply<Report> },
    Start { exec: String, reply: Reply<u32> },
    Exec { request: Box<ExecProcessRequest>, reply: Reply<()> },
    Kill { exec: String, signal: u32, all: bool, reply: Reply<()> },
    Wait { exec: String, reply: Reply<Exit> },
    Pause { reply: Reply<()> },
    Resume { reply: Reply<()> },
    Update { resources: Vec<u8>, reply: Reply<()> },
    Delete { exec: String, reply: Reply<(u32, Option<Exit>)> },
    Pids { reply: Reply<Vec<Listed>> },
    Stats { reply: Reply<Any> },
    Resize { exec: String, width: u16, height: u16, reply: Reply<()> },
    CloseStdin { exec: String, reply: Reply<()> },
    Checkpoint { options: Option<CheckpointOptions>, path: PathBuf, reply: Reply<()> },
    Occupy { reply: Reply<Occupation> },
    Frozen { reply: Reply<()> },
    Thawed { reply: Reply<()> },
    Released,
}

impl Container {
    pub fn key(&self) -> &ContainerKey {
        &self.context.key
    }

    pub fn context(&self) -> &std::sync::Arc<Context> {
        &self.context
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        // The owner drops what it cannot answer any more when it ends.
        let _ = self.requests.send(request(reply));
        answer.await.unwrap_or_else(|_| Err(Error::gone(self.context.id())))
    }

    pub async fn state(&self, exec: &str) -> Result<Report> {
        self.ask(|reply| Request::State { exec: exec.into(), reply }).await
    }

    /// Answers the pid.
    pub async fn start(&self, exec: &str) -> Result<u32> {
        self.ask(|reply| Request::Start { exec: exec.into(), reply }).await
    }

    pub async fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        self.ask(|reply| Request::Exec { request: Box::new(request), reply }).await
    }

    pub async fn kill(&self, exec: &str, signal: u32, all: bool) -> Result<()> {
        self.ask(|reply| Request::Kill { exec: exec.into(), signal, all, reply }).await
    }

    pub async fn wait(&self, exec: &str) -> Result<Exit> {
        self.ask(|reply| Request::Wait { exec: exec.into(), reply }).await
    }

    pub async fn pause(&self) -> Result<()> {
        self.ask(|reply| Request::Pause { reply }).await
    }

    pub async fn resume(&self) -> Result<()> {
        self.ask(|reply| Request::Resume { reply }).await
    }

    /// Applies LinuxResources of the OCI spec, as JSON.
    pub async fn update(&self, resources: Vec<u8>) -> Result<()> {
        self.ask(|reply| Request::Update { resources, reply }).await
    }

    /// Answers the pid it had and how it ended, if it ever ran.
    pub async fn delete(&self, exec: &str) -> Result<(u32, Option<Exit>)> {
        self.ask(|reply| Request::Delete { exec: exec.into(), reply }).await
    }

    pub async fn pids(&self) -> Result<Vec<Listed>> {
        self.ask(|reply| Request::Pids { reply }).await
    }

    /// Metrics in the type that containerd's own shim gives.
    pub async fn stats(&self) -> Result<Any> {
        self.ask(|reply| Request::Stats { reply }).await
    }

    pub async fn resize(&self, exec: &str, width: u16, height: u16) -> Result<()> {
        self.ask(|reply| Request::Resize { exec: exec.into(), width, height, reply }).await
    }

    pub async fn close_stdin(&self, exec: &str) -> Result<()> {
        self.ask(|reply| Request::CloseStdin { exec: exec.into(), reply }).await
    }

    /// Options None: the client could not say; the annotation decides.
    pub async fn checkpoint(&self, options: Option<CheckpointOptions>, path: &str) -> Result<()> {
        let path = PathBuf::from(path);
        self.ask(|reply| Request::Checkpoint { options, path, reply }).await
    }

    /// The container for a migration alone, see the module's seams. Refused
    /// unless it runs (or is paused) and nothing else is under way.
    pub async fn occupy(&self) -> Result<Occupation> {
        self.ask(|reply| Request::Occupy { reply }).await
    }
}
