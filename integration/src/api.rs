//! containerd's own API, for what `ctr` cannot ask or does not show: exit
//! times, single processes, several waiters, options of any type.

use std::{future::Future, path::Path};

use anyhow::{Context, Result};
use containerd_client::{
    connect,
    services::v1::{
        CheckpointTaskRequest, CloseIoRequest, CreateTaskRequest, DeleteProcessRequest,
        DeleteTaskRequest, ExecProcessRequest, GetRequest, KillRequest, ListPidsRequest,
        MetricsRequest, PauseTaskRequest, ResizePtyRequest, ResumeTaskRequest, StartRequest,
        UpdateTaskRequest, WaitRequest,
        snapshots::{MountsRequest, snapshots_client::SnapshotsClient},
        tasks_client::TasksClient,
    },
    types::v1::{Process, ProcessInfo, Status},
};
use prost_types::Any;
use serde_json::Value;
use tokio::runtime::Runtime as Tokio;
use tonic::{Code, Request, transport::Channel};

use crate::{
    Node, daemon,
    events::Events,
    stdio::{Stdio, Streams},
    wait::PATIENCE,
};

pub const NAMESPACE: &str = "default";

/// A connection to a node's containerd. Answers errors as containerd gives
/// them: tests match their code.
pub struct Api {
    tokio: Tokio,
    channel: Channel,
}

/// What a call answers.
pub type Answer<T> = std::result::Result<T, tonic::Status>;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    pub status: u32,
    /// Nanoseconds since the epoch; 0 where it was not told.
    pub at: i128,
}

impl Exit {
    fn new(status: u32, at: Option<prost_types::Timestamp>) -> Self {
        let at = at.map(|at| i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos));
        Self { status, at: at.unwrap_or_default() }
    }
}

impl Node {
    pub fn api(&self) -> Result<Api> {
        Api::connect(&self.path(daemon::SOCKET))
    }
}

impl Api {
    fn connect(socket: &Path) -> Result<Self> {
        let tokio =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let channel = tokio.block_on(connect(socket)).context("connect to containerd")?;
        Ok(Self { tokio, channel })
    }

    /// All events from now on.
    pub fn events(&self) -> Result<Events> {
        Events::subscribe(&self.tokio, self.channel.clone())
    }

    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }

    /// No call may hang a test.
    fn block<T>(&self, call: impl Future<Output = Answer<tonic::Response<T>>>) -> Answer<T> {
        self.tokio.block_on(async {
            match tokio::time::timeout(PATIENCE, call).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(tonic::Status::new(Code::DeadlineExceeded, "the call hangs")),
            }
        })
    }

    /// Creates the task of a container that exists, with these options.
    pub fn create(&self, id: &str, streams: &Streams, options: Option<Any>) -> Answer<u32> {
        self.create_from(id, streams, options, None)
    }

    pub fn create_from(
        &self,
        id: &str,
        streams: &Streams,
        options: Option<Any>,
        checkpoint: Option<containerd_client::types::Descriptor>,
    ) -> Answer<u32> {
        let mounts = MountsRequest { snapshotter: "overlayfs".into(), key: id.into() };
        let mut snapshots = SnapshotsClient::new(self.channel.clone());
        let rootfs = self.block(snapshots.mounts(request(mounts)))?.mounts;
        let wanted = CreateTaskRequest {
            container_id: id.into(),
            rootfs,
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            terminal: streams.terminal,
            checkpoint,
            options,
            ..Default::default()
        };
        Ok(self.block(self.tasks().create(request(wanted)))?.pid)
    }

    /// Starts the task, or a process added to it.
    pub fn start(&self, id: &str, exec: &str) -> Answer<u32> {
        let wanted = StartRequest { container_id: id.into(), exec_id: exec.into() };
        Ok(self.block(self.tasks().start(request(wanted)))?.pid)
    }

    /// Adds a process: its OCI `process` object is that of the container with
    /// other arguments.
    pub fn exec(&self, id: &str, exec: &str, arguments: &[&str], streams: &Streams) -> Answer<()> {
        let process = serde_json::json!({
            "args": arguments,
            "cwd": "/",
            "terminal": streams.terminal,
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "user": {"uid": 0, "gid": 0},
        });
        let wanted = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            terminal: streams.terminal,
            spec: Some(json_any("Process", &process)),
        };
        self.block(self.tasks().exec(request(wanted)))
    }

    /// `exec`, started, run to its end, deleted.
    pub fn exec_to_end(
        &self,
        id: &str,
        exec: &str,
        arguments: &[&str],
        io: &Stdio,
    ) -> Answer<Exit> {
        self.exec(id, exec, arguments, &io.streams)?;
        self.start(id, exec)?;
        self.wait(id, exec)?;
        self.delete_exec(id, exec)
    }

    pub fn get(&self, id: &str, exec: &str) -> Answer<Process> {
        let wanted = GetRequest { container_id: id.into(), exec_id: exec.into() };
        let answer = self.block(self.tasks().get(request(wanted)))?;
        answer.process.ok_or_else(|| tonic::Status::internal("no process in the answer"))
    }

    pub fn status(&self, id: &str, exec: &str) -> Answer<Status> {
        Ok(self.get(id, exec)?.status())
    }

    pub fn kill(&self, id: &str, exec: &str, signal: nix::sys::signal::Signal) -> Answer<()> {
        self.send(id, exec, signal, false)
    }

    pub fn kill_all(&self, id: &str, signal: nix::sys::signal::Signal) -> Answer<()> {
        self.send(id, "", signal, true)
    }

    fn send(
        &self,
        id: &str,
        exec: &str,
        signal: nix::sys::signal::Signal,
        all: bool,
    ) -> Answer<()> {
        let signal = (signal as i32).unsigned_abs();
        let wanted = KillRequest { container_id: id.into(), exec_id: exec.into(), signal, all };
        self.block(self.tasks().kill(request(wanted)))
    }

    pub fn wait(&self, id: &str, exec: &str) -> Answer<Exit> {
        let wanted = WaitRequest { container_id: id.into(), exec_id: exec.into() };
        let answer = self.block(self.tasks().wait(request(wanted)))?;
        Ok(Exit::new(answer.exit_status, answer.exited_at))
    }

    /// Several waits at once; each must answer.
    pub fn wait_many(
        &self,
        id: &str,
        waiters: usize,
        then: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<Exit>> {
        let waits: Vec<_> = (0..waiters)
            .map(|_| {
                let mut tasks = self.tasks();
                let wanted = WaitRequest { container_id: id.into(), exec_id: String::new() };
                self.tokio.spawn(async move {
                    tokio::time::timeout(PATIENCE, tasks.wait(request(wanted))).await
                })
            })
            .collect();
        then()?;
        let answers = waits.into_iter().map(|wait| {
            let answer = self.tokio.block_on(wait)?.context("a wait hangs")??.into_inner();
            Ok(Exit::new(answer.exit_status, answer.exited_at))
        });
        answers.collect()
    }

    pub fn delete(&self, id: &str) -> Answer<Exit> {
        let wanted = DeleteTaskRequest { container_id: id.into() };
        let answer = self.block(self.tasks().delete(request(wanted)))?;
        Ok(Exit::new(answer.exit_status, answer.exited_at))
    }

    pub fn delete_exec(&self, id: &str, exec: &str) -> Answer<Exit> {
        let wanted = DeleteProcessRequest { container_id: id.into(), exec_id: exec.into() };
        let answer = self.block(self.tasks().delete_process(request(wanted)))?;
        Ok(Exit::new(answer.exit_status, answer.exited_at))
    }

    pub fn pause(&self, id: &str) -> Answer<()> {
        self.block(self.tasks().pause(request(PauseTaskRequest { container_id: id.into() })))
    }

    pub fn resume(&self, id: &str) -> Answer<()> {
        self.block(self.tasks().resume(request(ResumeTaskRequest { container_id: id.into() })))
    }

    pub fn pids(&self, id: &str) -> Answer<Vec<ProcessInfo>> {
        let wanted = ListPidsRequest { container_id: id.into() };
        Ok(self.block(self.tasks().list_pids(request(wanted)))?.processes)
    }

    pub fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> Answer<()> {
        let wanted =
            ResizePtyRequest { container_id: id.into(), exec_id: exec.into(), width, height };
        self.block(self.tasks().resize_pty(request(wanted)))
    }

    pub fn close_stdin(&self, id: &str, exec: &str) -> Answer<()> {
        let wanted = CloseIoRequest { container_id: id.into(), exec_id: exec.into(), stdin: true };
        self.block(self.tasks().close_io(request(wanted)))
    }

    /// New limits, as the OCI spec writes `linux.resources`.
    pub fn update(&self, id: &str, resources: &Value) -> Answer<()> {
        let wanted = UpdateTaskRequest {
            container_id: id.into(),
            resources: Some(json_any("LinuxResources", resources)),
            ..Default::default()
        };
        self.block(self.tasks().update(request(wanted)))
    }

    pub fn checkpoint(
        &self,
        id: &str,
        options: Option<Any>,
    ) -> Answer<Vec<containerd_client::types::Descriptor>> {
        let wanted =
            CheckpointTaskRequest { container_id: id.into(), options, ..Default::default() };
        Ok(self.block(self.tasks().checkpoint(request(wanted)))?.descriptors)
    }

    /// The statistics of one task, in the type its cgroup version has.
    pub fn metrics(&self, id: &str) -> Answer<Any> {
        let wanted = MetricsRequest { filters: vec![format!("id=={id}")] };
        let metrics = self.block(self.tasks().metrics(request(wanted)))?.metrics;
        let first = metrics.into_iter().find(|metric| metric.id == id);
        first.and_then(|metric| metric.data).ok_or_else(|| tonic::Status::not_found("no metrics"))
    }
}

/// Within containerd's default namespace, and not for ever.
pub(crate) fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("containerd-namespace", tonic::metadata::MetadataValue::from_static(NAMESPACE));
    request
}

/// An OCI object as containerd's clients wrap it.
fn json_any(kind: &str, value: &Value) -> Any {
    Any {
        type_url: format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}"),
        value: value.to_string().into_bytes(),
    }
}
