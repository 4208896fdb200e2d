//! Tasks: what they do, starting them, ending them.

use std::time::Duration;

use containerd_client::{
    services::v1::{
        DeleteContainerRequest, DeleteTaskRequest, GetRequest, KillRequest, StartRequest,
        WaitRequest, snapshots::RemoveSnapshotRequest,
    },
    types::v1::{Process, Status},
};
use nix::sys::signal::Signal;
use tokio::time::{Instant, timeout_at};
use tonic::Code as Grpc;
use transship_api::session::Stdio;
use transship_types::{Code, ContainerKey};

use super::{
    CHANGE, Containerd, ContainerdError, LOOK_UP, Object, Result, Scope, lease::absent_is_fine,
    stdio,
};
use crate::daemon::{Task, TaskStatus};

/// Between SIGKILL and the exit: the kernel may have to tear down a lot of
/// memory, and the runtime's shim has to notice.
const DIES_WITHIN: Duration = Duration::from_secs(30);
/// How long one wait for an exit lasts before the task is looked at again: a
/// shim that died meanwhile sends no exit.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A departed task's exit is on its way when its container is removed.
const EXITS_WITHIN: Duration = Duration::from_secs(10);

impl Containerd {
    /// None: the container has no task.
    pub(super) async fn task_state(&self, key: &ContainerKey) -> Result<Option<Task>> {
        let request = GetRequest { container_id: key.id().to_owned(), exec_id: String::new() };
        let request = Scope::of(key.namespace())?.request(request);
        let doing = Object::Task(key.clone()).doing("look up");
        match self.ask(doing, LOOK_UP, self.tasks().get(request)).await {
            Ok(answer) => Ok(answer.process.map(task_of)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts the task. For an arrival that takes as long as the migration,
    /// so it has no limit: a lost containerd ends it, and so does its shim.
    pub(super) async fn start_task(&self, key: &ContainerKey) -> Result<u32> {
        let request = StartRequest { container_id: key.id().to_owned(), exec_id: String::new() };
        let request = Scope::of(key.namespace())?.request(request);
        let doing = Object::Task(key.clone()).doing("start");
        match self.tasks().start(request).await {
            Ok(answer) => Ok(answer.into_inner().pid),
            Err(status) => Err(self.failed(doing, &status)),
        }
    }

    /// Kills and deletes the task, if there is one. On return there is none.
    pub(super) async fn end_task(&self, key: &ContainerKey) -> Result<()> {
        let end = Instant::now() + DIES_WITHIN;
        loop {
            match self.task_state(key).await? {
                None => return Ok(()),
                Some(Task { status: TaskStatus::Stopped, .. }) => {
                    return self.delete_task(key).await;
                }
                Some(_) => self.kill_task(key).await?,
            }
            // Some tasks die without an exit to wait for (created, never
            // started): deleting is then all that is left to try.
            if !self.exits_before(key, end.min(Instant::now() + LOOK_AGAIN)).await {
                match self.delete_task(key).await {
                    Ok(()) => return Ok(()),
                    Err(error) if Instant::now() >= end => return Err(error),
                    Err(error) => tracing::debug!(%error, "the task does not end yet"),
                }
            }
        }
    }

    async fn kill_task(&self, key: &ContainerKey) -> Result<()> {
        let request = KillRequest {
            container_id: key.id().to_owned(),
            exec_id: String::new(),
            signal: Signal::SIGKILL as u32,
            all: true,
        };
        let request = Scope::of(key.namespace())?.request(request);
        let doing = Object::Task(key.clone()).doing("kill");
        match self.ask(doing, CHANGE, self.tasks().kill(request)).await {
            // It has no process (any more).
            Err(e) if matches!(e.grpc(), Some(Grpc::FailedPrecondition | Grpc::NotFound)) => Ok(()),
            other => other.map(drop),
        }
    }

    pub(super) async fn delete_task(&self, key: &ContainerKey) -> Result<()> {
        let request = DeleteTaskRequest { container_id: key.id().to_owned() };
        let request = Scope::of(key.namespace())?.request(request);
        let doing = Object::Task(key.clone()).doing("delete");
        absent_is_fine(self.ask(doing, CHANGE, self.tasks().delete(request)).await)
    }

    /// Whether the task's exit came in time.
    async fn exits_before(&self, key: &ContainerKey, end: Instant) -> bool {
        let request = WaitRequest { container_id: key.id().to_owned(), exec_id: String::new() };
        let Ok(scope) = Scope::of(key.namespace()) else { return false };
        let exit = timeout_at(end, self.tasks().wait(scope.request(request))).await;
        matches!(exit, Ok(Ok(_)))
    }

    /// Deletes a container whose task has ended: task, record, snapshot, and
    /// the fifos of whoever had started it. It never kills: whoever asks for
    /// this believes that the container lives elsewhere, and is wrong if it
    /// still runs here.
    pub(super) async fn remove_container(&self, key: &ContainerKey) -> Result<()> {
        if let Some(task) = self.task_state(key).await? {
            let ended = task.status == TaskStatus::Stopped || self.ends_by_itself(key).await?;
            if !ended {
                let reason = format!("container {key} has not stopped, so it is not removed");
                let remedy = "stop it if it runs elsewhere: `ctr task kill`, then `ctr task rm`";
                return Err(ContainerdError::unfit(Code::Busy, reason, remedy));
            }
            self.delete_task(key).await?;
            stdio::remove_fifos_of(&task.stdio);
        }
        match self.container(key).await {
            Ok(container) => {
                // The record first: a snapshot that nothing refers to is
                // collected even if we die in between.
                self.delete_container(key).await?;
                let (snapshotter, snapshot) = (&container.snapshotter, &container.snapshot_key);
                if !snapshot.is_empty() {
                    self.delete_snapshot(key.namespace(), snapshotter, snapshot).await?;
                }
                Ok(())
            }
            other => absent_is_fine(other),
        }
    }

    /// Kills it first: it must not run here, whatever it does.
    pub(super) async fn end_container(&self, key: &ContainerKey, made_by: i64) -> Result<bool> {
        let container = match self.container(key).await {
            Ok(container) => container,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error),
        };
        if container.created_at.is_some_and(|made| made.seconds > made_by) {
            return Ok(false);
        }
        let task = self.task_state(key).await?;
        let ran = task
            .is_some_and(|task| matches!(task.status, TaskStatus::Running | TaskStatus::Paused));
        self.end_task(key).await?;
        self.remove_container(key).await?;
        Ok(ran)
    }

    async fn ends_by_itself(&self, key: &ContainerKey) -> Result<bool> {
        self.exits_before(key, Instant::now() + EXITS_WITHIN).await;
        let task = self.task_state(key).await?;
        Ok(task.is_none_or(|task| task.status == TaskStatus::Stopped))
    }

    pub(super) async fn delete_container(&self, key: &ContainerKey) -> Result<()> {
        let request = DeleteContainerRequest { id: key.id().to_owned() };
        let request = Scope::of(key.namespace())?.request(request);
        let doing = Object::Container(key.clone()).doing("delete");
        absent_is_fine(self.ask(doing, CHANGE, self.containers().delete(request)).await)
    }

    pub(super) async fn delete_snapshot(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> Result<()> {
        let request =
            RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let request = Scope::of(namespace)?.request(request);
        let doing = Object::Snapshot(format!("{key} of {snapshotter}")).doing("delete");
        absent_is_fine(self.ask(doing, CHANGE, self.snapshots().remove(request)).await)
    }
}

fn task_of(process: Process) -> Task {
    let status = match process.status() {
        Status::Created => TaskStatus::Created,
        Status::Running => TaskStatus::Running,
        // On its way there: its processes are being frozen.
        Status::Paused | Status::Pausing => TaskStatus::Paused,
        Status::Stopped => TaskStatus::Stopped,
        Status::Unknown => TaskStatus::Unknown,
    };
    let stdio = Stdio {
        stdin: process.stdin,
        stdout: process.stdout,
        stderr: process.stderr,
        terminal: process.terminal,
    };
    Task { pid: process.pid, status, stdio }
}
