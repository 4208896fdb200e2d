//! The Task API. A handler finds the container, asks its owner to act (which
//! publishes, so that events keep their order) and answers.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::{Message, well_known_types::any::Any},
    shim::oci::ProcessDetails,
    shim_async::{Task, create_task},
    ttrpc::{
        self,
        r#async::{Service, TtrpcContext},
    },
};
use tracing::debug;

use crate::{
    container::{self, Listed},
    error::{Error, Result},
    events::timestamp,
    options::CheckpointOptions,
    pod::Pod,
};

/// containerd 2.0 renamed the service; messages and methods are the same.
const V2: &str = "containerd.task.v2.Task";
const V3: &str = "containerd.task.v3.Task";

/// The service under both of its names.
pub fn services(pod: &Pod) -> std::collections::HashMap<String, Service> {
    let tasks: Arc<dyn Task + Send + Sync> = Arc::new(Tasks { pod: pod.clone() });
    let mut services = create_task(tasks.clone());
    if let Some(v2) = create_task(tasks).remove(V3) {
        services.insert(V2.to_owned(), v2);
    }
    services
}

struct Tasks {
    pod: Pod,
}

#[async_trait]
impl Task for Tasks {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        debug!(id = request.id, "create");
        let pid = container::create(&self.pod, request).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        debug!(id = request.id, exec = request.exec_id, "start");
        let pid = self.pod.find(&request.id)?.start(&request.exec_id).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let report = self.pod.find(&request.id)?.state(&request.exec_id).await?;
        let status = match report.status {
            container::Status::Created => Status::CREATED,
            container::Status::Running => Status::RUNNING,
            container::Status::Pausing => Status::PAUSING,
            container::Status::Paused => Status::PAUSED,
            container::Status::Stopped => Status::STOPPED,
        };
        // containerd's own shim answers the process's id here: of an exec it
        // is the exec's.
        let id = if request.exec_id.is_empty() { request.id } else { request.exec_id.clone() };
        Ok(StateResponse {
            id,
            bundle: report.bundle.display().to_string(),
            pid: report.pid,
            status: status.into(),
            stdin: report.urls.stdin,
            stdout: report.urls.stdout,
            stderr: report.urls.stderr,
            terminal: report.urls.terminal,
            exit_status: report.exit.map_or(0, |exit| exit.status),
            exited_at: report.exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        debug!(id = request.id, exec = request.exec_id, "delete");
        let (pid, exit) = self.pod.find(&request.id)?.delete(&request.exec_id).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let listed = self.pod.find(&request.id)?.pids().await?;
        let processes = listed.into_iter().map(process_info).collect::<Result<_>>()?;
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.pod.find(&request.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.pod.find(&request.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let options = CheckpointOptions::decode(request.options.as_ref())?;
        self.pod.find(&request.id)?.checkpoint(options, &request.path).await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        debug!(id = request.id, exec = request.exec_id, signal = request.signal, "kill");
        let container = self.pod.find(&request.id)?;
        container.kill(&request.exec_id, request.signal, request.all).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.pod.find(&request.id)?.exec(request).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let cells = |count: u32| {
            u16::try_from(count).map_err(|_| {
                Error::InvalidArgument(format!("a terminal cannot be {count} characters wide"))
            })
        };
        let (width, height) = (cells(request.width)?, cells(request.height)?);
        self.pod.find(&request.id)?.resize(&request.exec_id, width, height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let container = self.pod.find(&request.id)?;
        if request.stdin {
            container.close_stdin(&request.exec_id).await?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.pod.find(&request.id)?;
        let resources = request.resources.into_option().unwrap_or_default().value;
        serde_json::from_slice::<oci_spec::runtime::LinuxResources>(&resources).map_err(
            |error| {
                let why = Error::json(&error);
                Error::InvalidArgument(format!("the resources are no LinuxResources: {why}"))
            },
        )?;
        container.update(resources).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.pod.find(&request.id)?.wait(&request.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.pod.find(&request.id)?.stats().await?;
        Ok(StatsResponse { stats: Some(stats).into(), ..Default::default() })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        // Asked before Create as well, for the shim alone.
        let task_pid = match self.pod.find(&request.id) {
            Ok(container) => container.state("").await.map_or(0, |report| report.pid),
            Err(_) => 0,
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        // Asked after each container of a pod; the last one means it.
        if self.pod.is_empty() {
            debug!(id = request.id, "shutdown");
            self.pod.shutdown().cancel();
        }
        Ok(Empty::new())
    }
}

fn process_info((pid, exec): Listed) -> Result<ProcessInfo> {
    let info = match exec {
        None => None,
        Some(exec_id) => Some(Any {
            type_url: "containerd.runc.v1.ProcessDetails".into(),
            value: ProcessDetails { exec_id, ..Default::default() }
                .write_to_bytes()
                .map_err(Error::other("encode ProcessDetails"))?,
            ..Default::default()
        }),
    };
    Ok(ProcessInfo { pid, info: info.into(), ..Default::default() })
}
