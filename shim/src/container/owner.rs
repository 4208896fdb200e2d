//! The task that owns one container, see [`super`].

mod exec;
mod life;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::Arc,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info_span, warn};
use transship_types::CHECKPOINT_ANNOTATION;

use super::{Context, Dump, Listed, Occupation, Origin, Reply, Report, Request, Status};
use crate::{
    cgroup::{Cgroup, oom},
    error::{Error, Result},
    events::Event,
    fill,
    options::CheckpointOptions,
    pod::Pod,
    process::{Process, Stage, answer},
    reaper::Exit,
    stdio::Prepared,
};

/// What happens to the container's first process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Created,
    CreatedCheckpoint,
    Running,
    Pausing,
    Paused,
    Stopped,
}

/// Who has the turn: one change of the container at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Free,
    /// Of a moment; others wait.
    Brief,
    /// Start of the first process: its exit is held back until TaskStart.
    Starting,
    /// A checkpoint: exits are held back until TaskCheckpointed.
    Checkpoint,
    /// A migration: others are refused.
    Migration,
}

struct Filling {
    stop: Arc<dyn Fn() + Send + Sync>,
    /// Closed at the end.
    end: watch::Receiver<()>,
}

impl Filling {
    async fn ended(mut end: watch::Receiver<()>) {
        while end.changed().await.is_ok() {}
    }
}

type After = Box<dyn FnOnce(&mut Owner) + Send>;

pub struct Owner {
    pod: Pod,
    context: Arc<Context>,
    origin: Origin,
    state: State,
    init: Process,
    execs: HashMap<String, exec::Exec>,
    turn: Turn,
    /// The turn's holder found the container paused.
    was_paused: bool,
    waiting: VecDeque<Request>,
    jobs: FuturesUnordered<BoxFuture<'static, After>>,
    /// The first process has ended, but something must be published before.
    held: Option<Exit>,
    killing_rest: bool,
    /// Stdio of a container in CreatedCheckpoint.
    prepared: Option<Prepared>,
    reviving: CancellationToken,
    /// Its memory is still being put in place.
    filling: Option<Filling>,
    cgroup: Option<Cgroup>,
    oom: Option<oom::Watch>,
    deleting: Option<Reply<(u32, Option<Exit>)>>,
    gone: bool,
    requests: mpsc::UnboundedSender<Request>,
}

/// Starts the owner of a container that was just made.
pub fn spawn(
    pod: Pod,
    context: Arc<Context>,
    origin: Origin,
    init: Process,
    prepared: Option<Prepared>,
) -> mpsc::UnboundedSender<Request> {
    let (requests, received) = mpsc::unbounded_channel();
    let span = info_span!("container", id = context.id());
    let mut owner = Owner {
        state: if origin == Origin::Fresh { State::Created } else { State::CreatedCheckpoint },
        pod,
        context,
        origin,
        init,
        execs: HashMap::new(),
        turn: Turn::Free,
        was_paused: false,
        waiting: VecDeque::new(),
        jobs: FuturesUnordered::new(),
        held: None,
        killing_rest: false,
        prepared,
        reviving: CancellationToken::new(),
        filling: None,
        cgroup: None,
        oom: None,
        deleting: None,
        gone: false,
        requests: requests.clone(),
    };
    if owner.init.pid > 0 {
        owner.find_cgroup();
        owner.watch(String::new(), owner.init.pid);
    }
    tokio::spawn(owner.run(received).instrument(span));
    requests
}

impl Owner {
    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<Request>) {
        while !self.gone {
            tokio::select! {
                Some(request) = requests.recv() => self.handle(request),
                Some(after) = self.jobs.next() => after(&mut self),
            }
        }
    }

    /// Runs `work` beside the owner and `then` in it.
    fn job<T: Send + 'static>(
        &mut self,
        work: impl Future<Output = T> + Send + 'static,
        then: impl FnOnce(&mut Owner, T) + Send + 'static,
    ) {
        let after = work.map(|done| Box::new(move |owner: &mut Owner| then(owner, done)) as After);
        self.jobs.push(after.boxed());
    }

    fn handle(&mut self, request: Request) {
        let Some(request) = self.in_turn(request) else { return };
        match request {
            Request::State { exec, reply } => answer(reply, self.report(&exec)),
            Request::Start { exec, reply } if exec.is_empty() => self.start(reply),
            Request::Start { exec, reply } => self.start_exec(exec, reply),
            Request::Exec { request, reply } => answer(reply, self.add_exec(*request)),
            Request::Kill { exec, signal, all, reply } => self.kill(&exec, signal, all, reply),
            Request::Wait { exec, reply } => match self.process(&exec) {
                Ok(process) => process.wait(reply),
                Err(error) => answer(reply, Err(error)),
            },
            Request::Pause { reply } => self.pause(reply),
            Request::Resume { reply } => self.resume(reply),
            Request::Update { resources, reply } => self.update(resources, reply),
            Request::Delete { exec, reply } if exec.is_empty() => self.delete(reply),
            Request::Delete { exec, reply } => self.delete_exec(&exec, reply),
            Request::Pids { reply } => self.pids(reply),
            Request::Stats { reply } => answer(reply, self.stats()),
            Request::Resize { exec, width, height, reply } => {
                let resized = self.process(&exec).and_then(|process| match &process.live {
                    Some(live) => live.resize(width, height),
                    None => Ok(()),
                });
                answer(reply, resized);
            }
            Request::CloseStdin { exec, reply } => {
                let closed = self.process(&exec).map(|process| {
                    process.live.iter_mut().for_each(|live| live.close_stdin());
                });
                answer(reply, closed);
            }
            Request::Checkpoint { options, path, reply } => self.checkpoint(options, path, reply),
            Request::Occupy { reply } => {
                let taken = self.occupy(Turn::Migration);
                answer(reply, taken);
            }
            Request::Frozen { reply } => {
                self.frozen();
                answer(reply, Ok(()));
            }
            Request::Thawed { reply } => {
                self.thawed();
                answer(reply, Ok(()));
            }
            Request::Released => self.released(),
        }
    }

    /// Gives the request back if it may go on now; else it waits or is
    /// refused.
    fn in_turn(&mut self, request: Request) -> Option<Request> {
        let changes = match &request {
            Request::Start { .. }
            | Request::Exec { .. }
            | Request::Pause { .. }
            | Request::Resume { .. }
            | Request::Update { .. }
            | Request::Delete { .. }
            | Request::Checkpoint { .. }
            | Request::Occupy { .. } => true,
            Request::State { .. }
            | Request::Kill { .. }
            | Request::Wait { .. }
            | Request::Pids { .. }
            | Request::Stats { .. }
            | Request::Resize { .. }
            | Request::CloseStdin { .. }
            | Request::Frozen { .. }
            | Request::Thawed { .. }
            | Request::Released => false,
        };
        let execs_start = self.execs.values().any(|exec| exec.process.stage == Stage::Starting);
        // An exec under way would be lost to a dump that does not know it.
        let waits_for_execs =
            matches!(request, Request::Checkpoint { .. } | Request::Occupy { .. }) && execs_start;
        match self.turn {
            _ if !changes => Some(request),
            Turn::Free if waits_for_execs => {
                self.waiting.push_back(request);
                None
            }
            Turn::Free => self.unless_filling(request),
            Turn::Brief | Turn::Starting | Turn::Checkpoint => {
                self.waiting.push_back(request);
                None
            }
            Turn::Migration => {
                self.refuse(request, "is being migrated");
                None
            }
        }
    }

    /// CRIU cannot dump a container whose memory is still being put in place:
    /// such a request comes back when that has ended.
    fn unless_filling(&mut self, request: Request) -> Option<Request> {
        let dumps = matches!(request, Request::Checkpoint { .. } | Request::Occupy { .. });
        let Some(filling) = self.filling.as_ref().filter(|_| dumps) else { return Some(request) };
        let ended = timeout(fill::WAIT, Filling::ended(filling.end.clone()));
        self.job(ended, move |owner, ended| match ended {
            Ok(()) => owner.handle(request),
            Err(_) => owner.refuse(request, "still has memory on its way from its last migration"),
        });
        None
    }

    fn refuse(&self, request: Request, why: &str) {
        let error = Error::FailedPrecondition(format!("container {} {why}", self.context.id()));
        match request {
            Request::Start { reply, .. } => answer(reply, Err(error)),
            Request::Exec { reply, .. }
            | Request::Pause { reply }
            | Request::Resume { reply }
            | Request::Update { reply, .. }
            | Request::Checkpoint { reply, .. } => answer(reply, Err(error)),
            Request::Delete { reply, .. } => answer(reply, Err(error)),
            Request::Occupy { reply } => answer(reply, Err(error)),
            _ => {}
        }
    }

    /// The turn is over: an exit that was held back, then whoever waits.
    fn turn_over(&mut self) {
        self.turn = Turn::Free;
        self.settle();
        for _ in 0..self.waiting.len() {
            if self.turn != Turn::Free {
                break;
            }
            if let Some(next) = self.waiting.pop_front() {
                self.handle(next);
            }
        }
    }

    fn process(&mut self, exec: &str) -> Result<&mut Process> {
        if exec.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs.get_mut(exec).map(|exec| &mut exec.process).ok_or_else(|| {
            Error::NotFound(format!("process {exec} does not exist in {}", self.context.id()))
        })
    }

    fn report(&mut self, exec: &str) -> Result<Report> {
        let state = self.state;
        let bundle = self.context.bundle.clone();
        let process = self.process(exec)?;
        let status = match state {
            State::Paused if process.exit.is_none() => Status::Paused,
            State::Pausing if process.exit.is_none() => Status::Pausing,
            _ if exec.is_empty() => match state {
                State::Created | State::CreatedCheckpoint => Status::Created,
                State::Stopped => Status::Stopped,
                State::Running | State::Pausing | State::Paused => Status::Running,
            },
            _ => match process.stage {
                Stage::Added | Stage::Starting => Status::Created,
                Stage::Running => Status::Running,
                Stage::Stopped => Status::Stopped,
            },
        };
        Ok(Report {
            status,
            pid: process.pid as u32,
            bundle,
            urls: process.urls.clone(),
            exit: process.exit,
        })
    }

    fn refused<T>(&self, what: &str) -> Result<T> {
        let state = match self.state {
            State::Created | State::CreatedCheckpoint => "created",
            State::Running => "running",
            State::Pausing => "pausing",
            State::Paused => "paused",
            State::Stopped => "stopped",
        };
        Err(Error::FailedPrecondition(format!(
            "cannot {what} container {}: it is {state}",
            self.context.id()
        )))
    }

    fn pids(&mut self, reply: Reply<Vec<Listed>>) {
        let execs: HashMap<u32, String> = self
            .execs
            .iter()
            .filter(|(_, exec)| exec.process.pid > 0 && exec.process.exit.is_none())
            .map(|(id, exec)| (exec.process.pid as u32, id.clone()))
            .collect();
        if self.state == State::Stopped {
            return answer(reply, Ok(Vec::new()));
        }
        if self.init.pid == 0 {
            // Not restored yet. A containerd that has just been started takes
            // a task without any process for a leak, and deletes it.
            return answer(reply, Ok(vec![(std::process::id(), None)]));
        }
        let from_cgroup = self.cgroup.as_ref().and_then(|cgroup| cgroup.pids().ok());
        let context = self.context.clone();
        let list = async move {
            match from_cgroup {
                Some(pids) => Ok(pids),
                None => context.oci.ps(context.id()).await,
            }
        };
        self.job(list, move |_, pids: Result<Vec<u32>>| {
            let named = |pids: Vec<u32>| {
                pids.into_iter().map(|pid| (pid, execs.get(&pid).cloned())).collect()
            };
            answer(reply, pids.map(named));
        });
    }

    fn stats(&self) -> Result<containerd_shim_protos::protobuf::well_known_types::any::Any> {
        match &self.cgroup {
            Some(cgroup) => cgroup.metrics(),
            None => Err(Error::NotFound(format!("container {} has no cgroup", self.context.id()))),
        }
    }

    fn find_cgroup(&mut self) {
        match Cgroup::of_process(self.init.pid) {
            Ok(cgroup) => self.cgroup = Some(cgroup),
            Err(error) => warn!(error = error.sentence(), "no cgroup, so no metrics"),
        }
    }

    fn watch(&mut self, exec: String, pid: i32) {
        let exit = self.pod.reaper().watch(pid);
        let exit = async { exit.await.unwrap_or(Exit::now(255)) };
        self.job(exit, move |owner, exit| match exec.as_str() {
            "" => owner.init_ended(exit),
            exec => owner.exec_ended(exec, exit),
        });
    }

    // --- checkpoint and migration -----------------------------------------

    fn occupy(&mut self, turn: Turn) -> Result<Occupation> {
        let fit = match self.state {
            State::Running => true,
            // CRIU seizes without the freezer when a container moves; one that
            // stands in it would never answer.
            State::Paused => turn != Turn::Migration,
            _ => false,
        };
        if !fit || self.held.is_some() {
            return self.refused(if turn == Turn::Migration { "migrate" } else { "checkpoint" });
        }
        self.turn = turn;
        self.was_paused = self.state == State::Paused;
        Ok(Occupation {
            context: self.context.clone(),
            pid: self.init.pid,
            cgroup: self.cgroup.clone(),
            owner: self.requests.clone(),
        })
    }

    fn frozen(&mut self) {
        if self.state == State::Running {
            self.state = State::Paused;
            self.publish_paused();
        }
    }

    fn thawed(&mut self) {
        if self.state == State::Paused && !self.was_paused {
            self.state = State::Running;
            self.publish_resumed();
        }
    }

    fn released(&mut self) {
        match self.turn {
            Turn::Migration | Turn::Checkpoint => {
                // Its holder may have failed between freezing and thawing;
                // it undoes that itself, so what is left is to say so.
                if self.held.is_none() && self.init.exit.is_none() {
                    self.thawed();
                }
                self.turn_over();
            }
            Turn::Free | Turn::Brief | Turn::Starting => {}
        }
    }

    fn checkpoint(&mut self, options: Option<CheckpointOptions>, path: PathBuf, reply: Reply<()>) {
        let occupation = match self.occupy(Turn::Checkpoint) {
            Ok(occupation) => occupation,
            Err(error) => return answer(reply, Err(error)),
        };
        let options = options.unwrap_or_else(|| CheckpointOptions {
            exit: self.context.annotations.get(CHECKPOINT_ANNOTATION).is_some_and(|v| v == "stop"),
            ..CheckpointOptions::default()
        });
        let or = |given: &str, default: PathBuf| {
            if given.is_empty() { default } else { PathBuf::from(given) }
        };
        let dump = Dump {
            images: or(&options.image_path, path),
            work: or(&options.work_path, self.context.criu_work()),
            options,
        };
        let images = dump.images.display().to_string();
        let work = async move {
            let done = crate::checkpoint::checkpoint(&dump, &occupation).await;
            (done, occupation)
        };
        self.job(work, move |owner, (done, occupation)| {
            if done.is_ok() {
                let id = owner.context.id().to_owned();
                owner.publish(Event::Checkpointed(
                    containerd_shim_protos::events::task::TaskCheckpointed {
                        container_id: id,
                        checkpoint: images,
                        ..Default::default()
                    },
                ));
            }
            answer(reply, done);
            drop(occupation);
        });
    }

    fn publish(&self, event: Event) {
        self.pod.publisher().publish(event);
    }
}
