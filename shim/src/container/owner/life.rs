//! From Start to Delete of a container's first process.

use containerd_shim_protos::events::task::{
    TaskDelete, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use nix::libc;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Filling, Owner, State, Turn};
use crate::{
    cgroup::oom,
    container::{Origin, Reply, Revival, create::open_stdio},
    error::{Error, Result},
    events::{Event, timestamp},
    fill::{self, Arrived},
    mounts,
    process::{Stage, answer},
    reaper::Exit,
    stdio::Live,
};

/// Exit status of a container that could not be restored: the one containerd
/// gives to a process whose end nobody saw.
const NOT_RESTORED: u32 = 255;

impl Owner {
    pub(super) fn start(&mut self, reply: Reply<u32>) {
        match self.state {
            // Created, and dead already: the exit waits for nothing.
            State::Created if self.held.is_none() => {
                self.turn = Turn::Starting;
                let context = self.context.clone();
                let start = async move { context.oci.start(context.id()).await };
                self.job(start, move |owner, started| {
                    match started {
                        Ok(()) => answer(reply, Ok(owner.started())),
                        Err(error) => answer(reply, Err(error)),
                    }
                    owner.turn_over();
                });
            }
            State::CreatedCheckpoint => self.revive(reply),
            _ => answer(reply, self.refused("start")),
        }
    }

    /// The first process runs: says so, before anything of its end.
    fn started(&mut self) -> u32 {
        self.state = State::Running;
        self.init.stage = Stage::Running;
        let pid = self.init.pid as u32;
        if let Some(cgroup) = &self.cgroup {
            let (publisher, id) = (self.pod.publisher().clone(), self.context.id().to_owned());
            let publish = move || publisher.publish(oom_event(&id));
            match oom::Watch::start(cgroup, publish) {
                Ok(watch) => self.oom = Some(watch),
                Err(error) => warn!(error = error.sentence(), "OOM events are not watched"),
            }
        }
        self.publish(Event::Start(TaskStart {
            container_id: self.context.id().to_owned(),
            pid,
            ..Default::default()
        }));
        info!(pid, "running");
        pid
    }

    /// Start of a container that comes from a checkpoint or another node.
    fn revive(&mut self, reply: Reply<u32>) {
        self.turn = Turn::Starting;
        self.reviving = CancellationToken::new();
        let (context, origin) = (self.context.clone(), self.origin.clone());
        let (prepared, cancelled) = (self.prepared.take(), self.reviving.clone());
        let work = async move {
            let stdio = match prepared {
                Some(prepared) => prepared,
                // An earlier Start has failed with the first one.
                None => open_stdio(&context).await?,
            };
            let mut revival = Revival { context: context.clone(), stdio };
            let (arrived, connected) = match bring(&mut revival, &origin, &cancelled).await {
                Ok(arrived) => (Some(arrived), revival.stdio.connect().await),
                Err(error) => (None, Err(error)),
            };
            match (arrived, connected) {
                (Some(arrived), Ok(live)) => Ok((arrived, live)),
                // What fills its memory, if anything does, ends after it.
                (_arrived, connected) => {
                    if let Err(error) = context.oci.delete(context.id(), true).await {
                        warn!(error = error.sentence(), "cannot clean up after a failed restore");
                    }
                    connected.and_then(|_| Err(Error::Internal("nothing was restored".into())))
                }
            }
        };
        self.job(work, move |owner, revived: Result<(Arrived, Live)>| {
            match revived {
                Ok((arrived, live)) => {
                    owner.init.pid = arrived.pid;
                    owner.init.live = Some(live);
                    if let Some(filling) = arrived.filling {
                        owner.fill(filling);
                    }
                    owner.find_cgroup();
                    let pid = owner.started();
                    owner.watch(String::new(), owner.init.pid);
                    answer(reply, Ok(pid));
                    // The kill came when an arrival could not be stopped any
                    // more; it was answered with a promise.
                    if owner.reviving.is_cancelled()
                        && let Err(error) = owner.init.signal(libc::SIGKILL as u32)
                    {
                        warn!(error = error.sentence(), "a killed arrival runs");
                    }
                }
                Err(error) => {
                    warn!(error = error.sentence(), "not restored");
                    // There is no way back to a container that waits: what it
                    // was made of may be half used up. So it has ended.
                    let status = match error {
                        Error::Cancelled(_) => 128 + libc::SIGKILL as u32,
                        _ => NOT_RESTORED,
                    };
                    owner.held.get_or_insert(Exit::now(status));
                    answer(reply, Err(error));
                }
            }
            owner.turn_over();
        });
    }

    /// Lets the filling go on beside everything else.
    fn fill(&mut self, filling: fill::Filling) {
        let (open, end) = watch::channel(());
        self.filling = Some(Filling { stop: filling.stop, end });
        self.job(filling.rest, |owner, ()| {
            owner.filling = None;
            drop(open);
        });
    }

    // --- signals, pause, update -------------------------------------------

    pub(super) fn kill(&mut self, exec: &str, signal: u32, all: bool, reply: Reply<()>) {
        if !exec.is_empty() {
            let told = self.process(exec).and_then(|process| process.signal(signal));
            return answer(reply, told);
        }
        if self.held.is_some() || self.state == State::Stopped {
            return answer(reply, Err(Error::NotFound("process already finished".into())));
        }
        if self.state == State::CreatedCheckpoint {
            return answer(reply, self.kill_unborn(signal));
        }
        let occupied = matches!(self.turn, Turn::Migration | Turn::Checkpoint);
        // Killing thaws. Not under a dump, not under a migration: there the
        // signal waits until the processes run again.
        let by_runtime = !occupied && (all || self.state == State::Paused);
        if !by_runtime {
            return answer(reply, self.init.signal(signal));
        }
        let context = self.context.clone();
        // Not every runtime thaws what it kills.
        let thaws = self.state == State::Paused && signal == libc::SIGKILL as u32;
        let frozen = self.cgroup.clone().filter(|_| thaws);
        let kill = async move {
            context.oci.kill(context.id(), signal, all).await?;
            let Some(cgroup) = frozen else { return Ok(()) };
            let thawed = tokio::task::spawn_blocking(move || cgroup.thaw()).await;
            thawed.map_err(Error::other("thaw a killed container"))?
        };
        self.job(kill, move |owner, killed| {
            let ended = owner.held.is_some() || owner.state == State::Stopped;
            answer(
                reply,
                match killed {
                    Err(_) if ended => Err(Error::NotFound("process already finished".into())),
                    killed => killed,
                },
            );
        });
    }

    /// There is no process yet: what would end it prevents it.
    fn kill_unborn(&mut self, signal: u32) -> Result<()> {
        if ![libc::SIGKILL, libc::SIGTERM].contains(&(signal as i32)) {
            return self.refused("signal");
        }
        if self.turn == Turn::Starting {
            self.reviving.cancel();
        } else {
            self.held = Some(Exit::now(128 + signal));
            self.settle();
        }
        Ok(())
    }

    pub(super) fn pause(&mut self, reply: Reply<()>) {
        if self.state != State::Running || self.held.is_some() {
            return answer(reply, self.refused("pause"));
        }
        self.state = State::Pausing;
        self.turn = Turn::Brief;
        let context = self.context.clone();
        self.job(async move { context.oci.pause(context.id()).await }, move |owner, paused| {
            if owner.state == State::Pausing {
                owner.state = if paused.is_ok() { State::Paused } else { State::Running };
            }
            if paused.is_ok() {
                owner.publish_paused();
            }
            answer(reply, paused);
            owner.turn_over();
        });
    }

    pub(super) fn resume(&mut self, reply: Reply<()>) {
        if self.state != State::Paused || self.held.is_some() {
            return answer(reply, self.refused("resume"));
        }
        self.turn = Turn::Brief;
        let context = self.context.clone();
        self.job(async move { context.oci.resume(context.id()).await }, move |owner, resumed| {
            if resumed.is_ok() {
                if owner.state == State::Paused {
                    owner.state = State::Running;
                }
                owner.publish_resumed();
            }
            answer(reply, resumed);
            owner.turn_over();
        });
    }

    pub(super) fn update(&mut self, resources: Vec<u8>, reply: Reply<()>) {
        if !matches!(self.state, State::Created | State::Running | State::Paused) {
            return answer(reply, self.refused("update"));
        }
        self.turn = Turn::Brief;
        let context = self.context.clone();
        let update = async move { context.oci.update(context.id(), &resources).await };
        self.job(update, move |owner, updated| {
            answer(reply, updated);
            owner.turn_over();
        });
    }

    pub(super) fn publish_paused(&self) {
        let container_id = self.context.id().to_owned();
        self.publish(Event::Paused(TaskPaused { container_id, ..Default::default() }));
    }

    pub(super) fn publish_resumed(&self) {
        let container_id = self.context.id().to_owned();
        self.publish(Event::Resumed(TaskResumed { container_id, ..Default::default() }));
    }

    // --- the end ----------------------------------------------------------

    pub(super) fn init_ended(&mut self, exit: Exit) {
        self.held = Some(exit);
        if !self.context.private_pids {
            // Nothing else ends with it, and no exec may outlive it.
            self.killing_rest = true;
            let context = self.context.clone();
            let kill =
                async move { context.oci.kill(context.id(), libc::SIGKILL as u32, true).await };
            self.job(kill, |owner, killed| {
                if let Err(error) = killed {
                    warn!(error = error.sentence(), "cannot kill what the first process left");
                }
                owner.killing_rest = false;
                owner.settle();
            });
        }
        self.settle();
    }

    /// Publishes the exit of the first process, once it may be: after its
    /// start, after a checkpoint that ended it, and after all execs' exits.
    pub(super) fn settle(&mut self) {
        let busy = matches!(self.turn, Turn::Starting | Turn::Checkpoint) || self.killing_rest;
        let execs_run = self
            .execs
            .values()
            .any(|exec| matches!(exec.process.stage, Stage::Starting | Stage::Running));
        if busy || execs_run {
            return;
        }
        let Some(exit) = self.held.take() else { return };
        if self.oom.take().is_some_and(|watch| watch.missed()) {
            self.publish(oom_event(self.context.id()));
        }
        self.state = State::Stopped;
        if let Some(filling) = &self.filling {
            (filling.stop)();
        }
        self.init.end(exit);
        let id = self.context.id().to_owned();
        info!(status = exit.status, "stopped");
        self.publish(Event::Exit(TaskExit {
            container_id: id.clone(),
            id,
            pid: self.init.pid as u32,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        }));
        if let Some(reply) = self.deleting.take() {
            self.deleted(reply);
        }
    }

    pub(super) fn delete(&mut self, reply: Reply<(u32, Option<Exit>)>) {
        let alive =
            !matches!(self.state, State::Stopped | State::Created | State::CreatedCheckpoint);
        if alive || self.deleting.is_some() {
            return answer(reply, self.refused("delete"));
        }
        self.turn = Turn::Brief;
        let (context, live) = (self.context.clone(), self.init.live.take());
        // A created container has a process that waits to be started.
        let force = self.state == State::Created;
        let filling = self.filling.as_ref().map(|filling| filling.end.clone());
        let work = async move {
            if let Some(end) = filling
                && timeout(fill::END, Filling::ended(end)).await.is_err()
            {
                warn!("what filled its memory does not end");
            }
            if !force && let Some(live) = live {
                live.drain().await;
            }
            context.oci.delete(context.id(), force).await?;
            match &context.rootfs {
                Some(rootfs) => mounts::unmount(rootfs).await,
                None => Ok(()),
            }
        };
        self.job(work, move |owner, deleted: Result<()>| match deleted {
            Err(error) => {
                answer(reply, Err(error));
                owner.turn_over();
            }
            Ok(()) if owner.init.pid > 0 && owner.init.exit.is_none() => {
                owner.deleting = Some(reply);
                owner.turn_over();
            }
            Ok(()) => owner.deleted(reply),
        });
    }

    fn deleted(&mut self, reply: Reply<(u32, Option<Exit>)>) {
        let (pid, exit) = (self.init.pid as u32, self.init.exit);
        self.publish(Event::Delete(TaskDelete {
            container_id: self.context.id().to_owned(),
            pid,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        }));
        self.pod.remove(&self.context.key);
        answer(reply, Ok((pid, exit)));
        self.gone = true;
    }
}

async fn bring(
    revival: &mut Revival,
    origin: &Origin,
    cancel: &CancellationToken,
) -> Result<Arrived> {
    let context = revival.context.clone();
    match origin {
        Origin::Checkpoint { images, .. } => tokio::select! {
            restored = crate::restore::restore(revival, images) => {
                restored.map(|pid| Arrived { pid, filling: None })
            }
            () = cancel.cancelled() => Err(Error::killed_unborn(context.id())),
        },
        // It decides itself whether it can still be stopped: dropped in the
        // middle, it might run here and be told otherwise to its source.
        Origin::Arrival(ticket) => crate::arrive::arrive(revival, ticket, cancel).await,
        Origin::Fresh => Err(Error::Internal("a fresh container is not restored".into())),
    }
}

fn oom_event(id: &str) -> Event {
    Event::Oom(TaskOOM { container_id: id.to_owned(), ..Default::default() })
}
