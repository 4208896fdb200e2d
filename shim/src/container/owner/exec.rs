//! Further processes in a container.

use std::fs;

use containerd_shim_protos::{
    api::ExecProcessRequest,
    events::task::{TaskExecAdded, TaskExecStarted, TaskExit},
};
use transship_types::ContainerKey;

use super::{Owner, State};
use crate::{
    container::Reply,
    error::{Error, Result},
    events::{Event, timestamp},
    oci,
    process::{Process, Stage, answer},
    reaper::Exit,
    stdio::{Live, Owner as StdioOwner, Prepared, Urls},
};

/// An exec and what it shall run, as the OCI spec's `process` in JSON.
pub struct Exec {
    pub process: Process,
    spec: Vec<u8>,
}

impl Owner {
    pub(super) fn add_exec(&mut self, request: ExecProcessRequest) -> Result<()> {
        if self.state != State::Running || self.held.is_some() {
            return self.refused("exec in");
        }
        let id = request.exec_id;
        // It becomes a file name and a key: containerd's rules, checked again.
        ContainerKey::new(self.context.key.namespace(), &id)
            .map_err(|error| Error::InvalidArgument(error.to_string()))?;
        if self.execs.contains_key(&id) {
            return Err(Error::AlreadyExists(format!("process {id} exists")));
        }
        let spec = with_terminal(&request.spec.value, request.terminal)?;
        let urls = Urls {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        self.execs.insert(id.clone(), Exec { process: Process::new(urls), spec });
        self.publish(Event::ExecAdded(TaskExecAdded {
            container_id: self.context.id().to_owned(),
            exec_id: id,
            ..Default::default()
        }));
        Ok(())
    }

    pub(super) fn start_exec(&mut self, id: String, reply: Reply<u32>) {
        if self.state != State::Running || self.held.is_some() {
            return answer(reply, self.refused("exec in"));
        }
        let container = self.context.id().to_owned();
        let Some(exec) = self.execs.get_mut(&id) else {
            let text = format!("process {id} does not exist in {container}");
            return answer(reply, Err(Error::NotFound(text)));
        };
        if exec.process.stage != Stage::Added {
            let text = format!("process {id} was started before");
            return answer(reply, Err(Error::FailedPrecondition(text)));
        }
        exec.process.stage = Stage::Starting;
        let (spec, urls) = (std::mem::take(&mut exec.spec), exec.process.urls.clone());
        let (context, exec_id) = (self.context.clone(), id.clone());
        let work = async move {
            let owner = StdioOwner { uid: context.options.io_uid, gid: context.options.io_gid };
            let prepared = Prepared::open(&context.key, &urls, owner).await?;
            let spec_file = context.bundle.join(format!("{exec_id}.process.json"));
            let pid_file = context.bundle.join(format!("{exec_id}.pid"));
            fs::write(&spec_file, spec)
                .map_err(Error::io(format!("write {}", spec_file.display())))?;
            let mut command = context.oci.command("exec");
            command.arg("--detach").arg("--process").arg(&spec_file);
            command.arg("--pid-file").arg(&pid_file);
            let ran = match prepared.attach(&mut command) {
                Ok(()) => {
                    command.arg(context.id());
                    context.oci.finish("exec", command).await
                }
                Err(error) => Err(error),
            };
            crate::pod::remove_quietly(&spec_file);
            ran?;
            let live = prepared.connect().await?;
            let pid = oci::read_pid(&pid_file);
            crate::pod::remove_quietly(&pid_file);
            Ok((pid?, live))
        };
        self.job(work, move |owner, started| owner.exec_started(id, started, reply));
    }

    fn exec_started(&mut self, id: String, started: Result<(i32, Live)>, reply: Reply<u32>) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        match started {
            Ok((pid, live)) => {
                exec.process.pid = pid;
                exec.process.live = Some(live);
                exec.process.stage = Stage::Running;
                self.publish(Event::ExecStarted(TaskExecStarted {
                    container_id: self.context.id().to_owned(),
                    exec_id: id.clone(),
                    pid: pid as u32,
                    ..Default::default()
                }));
                answer(reply, Ok(pid as u32));
                self.watch(id, pid);
            }
            Err(error) => {
                // It never ran; who waits for it must not wait for ever.
                exec.process.end(Exit::now(255));
                answer(reply, Err(error));
            }
        }
        self.exec_settled();
    }

    pub(super) fn exec_ended(&mut self, id: &str, exit: Exit) {
        let Some(exec) = self.execs.get_mut(id) else { return };
        exec.process.end(exit);
        let pid = exec.process.pid as u32;
        self.publish(Event::Exit(TaskExit {
            container_id: self.context.id().to_owned(),
            id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        }));
        self.exec_settled();
    }

    /// A held exit, or a request that waits for starting execs, may go on.
    fn exec_settled(&mut self) {
        self.settle();
        if self.turn == super::Turn::Free {
            self.turn_over();
        }
    }

    pub(super) fn delete_exec(&mut self, id: &str, reply: Reply<(u32, Option<Exit>)>) {
        let deletable = match self.execs.get(id) {
            None => Err(Error::NotFound(format!(
                "process {id} does not exist in {}",
                self.context.id()
            ))),
            Some(exec) if matches!(exec.process.stage, Stage::Starting | Stage::Running) => {
                Err(Error::FailedPrecondition(format!("cannot delete process {id}: it runs")))
            }
            Some(_) => Ok(()),
        };
        if let Err(error) = deletable {
            return answer(reply, Err(error));
        }
        let Some(mut exec) = self.execs.remove(id) else { return };
        let (pid, exit) = (exec.process.pid as u32, exec.process.exit);
        let live = exec.process.live.take();
        let drain = async move {
            if let Some(live) = live {
                live.drain().await;
            }
        };
        self.job(drain, move |_, ()| answer(reply, Ok((pid, exit))));
    }
}

/// The request's word on the terminal wins over the process's.
fn with_terminal(process: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let invalid = |error: serde_json::Error| {
        Error::InvalidArgument(format!("the process to exec: {}", Error::json(&error)))
    };
    let mut process: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(process).map_err(invalid)?;
    process.insert("terminal".into(), terminal.into());
    serde_json::to_vec(&process).map_err(invalid)
}
