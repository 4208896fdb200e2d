//! A run of the OCI runtime whose CRIU stands at the gate.

use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use tracing::warn;
use transship_api::criu::CriuNetworkLockMethod;
use transship_criu::{Conversation, CriuError, Gate, LIBRARY, features, log};
use transship_migration::{MigrationError, chain};

use crate::{netns, oci::Oci};

/// From the start of a runtime to CRIU's request: two starts of CRIU and some
/// mounts. A host that swaps may need seconds.
const START: Duration = Duration::from_secs(30);

/// How long CRIU gets to undo its work: it thaws and unlocks, or kills what
/// it restored.
const UNDO: Duration = Duration::from_secs(20);

/// CRIU's log in a migration: errors and warnings.
pub const LOG_LEVEL: i32 = 2;

/// How long the last steps may take, from the decision to the runtime's exit.
const FINISH: Duration = Duration::from_secs(60);

/// The runtime, waiting for CRIU, which waits for us.
pub struct Held {
    /// Keeps the directory in which CRIU is found.
    gate: Gate,
    conversation: Option<Conversation>,
    criu_pid: i32,
    /// The first process of a restore, once CRIU has made it.
    restored: Option<i32>,
    runtime: Child,
    oci: Oci,
    mark: u64,
    log: PathBuf,
}

impl Held {
    /// Starts `command` and returns once its CRIU has a request, which is not
    /// released. `log` is where CRIU will write.
    pub async fn start(oci: &Oci, command: Command, log: PathBuf) -> Result<Self, MigrationError> {
        Self::start_at(opened().await?, oci, command, log).await
    }

    /// The same for a migration: with CRIU in this network namespace, if it
    /// shall be in one, and with the library, if there is one, by which it can
    /// be given files.
    pub async fn start_in(
        network: Option<PathBuf>,
        library: Option<PathBuf>,
        oci: &Oci,
        command: Command,
        log: PathBuf,
    ) -> Result<Self, MigrationError> {
        let mut gate = opened().await?;
        if let Some(library) = library {
            gate = gate.hollow(library);
        }
        if let Some(network) = network {
            gate = gate.network(network);
        }
        Self::start_at(gate, oci, command, log).await
    }

    /// The same for a dump whose CRIU gets a mount namespace of its own, in
    /// which memory can be hidden from it, and with the library that keeps
    /// shared objects from it, if there is one.
    pub async fn start_isolated_in(
        network: Option<PathBuf>,
        library: Option<PathBuf>,
        oci: &Oci,
        command: Command,
        log: PathBuf,
    ) -> Result<Self, MigrationError> {
        let mut gate = opened().await?.isolate();
        if let Some(library) = library {
            gate = gate.hollow(library);
        }
        if let Some(network) = network {
            gate = gate.network(network);
        }
        Self::start_at(gate, oci, command, log).await
    }

    async fn start_at(
        mut gate: Gate,
        oci: &Oci,
        mut command: Command,
        log: PathBuf,
    ) -> Result<Self, MigrationError> {
        command.envs(gate.environment());
        let mark = oci.log_mark();
        let mut runtime = command.spawn().map_err(|error| {
            MigrationError::runtime("the OCI runtime", format!("it cannot be started: {error}"))
        })?;
        // It holds the container's ends of its pipes.
        drop(command);
        let conversation = tokio::select! {
            conversation = timeout(START, gate.conversation()) => conversation,
            status = runtime.wait() => {
                let said = oci.said_since(mark).unwrap_or_else(|| match status {
                    Ok(status) => format!("it ended before CRIU was started ({status})"),
                    Err(error) => error.to_string(),
                });
                return Err(MigrationError::runtime("the OCI runtime", said));
            }
        };
        let conversation = conversation
            .map_err(|_| MigrationError::Timeout {
                what: "starting CRIU",
                seconds: START.as_secs(),
            })?
            .map_err(|error| failed("the CRIU gate", &error, None))?;
        let criu_pid = conversation.criu_pid();
        let conversation = Some(conversation);
        Ok(Self {
            gate,
            conversation,
            criu_pid,
            restored: None,
            runtime,
            oci: oci.clone(),
            mark,
            log,
        })
    }

    pub fn conversation(&mut self) -> Result<&mut Conversation, MigrationError> {
        let missing = || MigrationError::runtime("CRIU", "it has ended already");
        self.conversation.as_mut().ok_or_else(missing)
    }

    /// CRIU, which waits, is to find these shared objects empty.
    pub fn empty(&self, objects: &[(u64, u64)]) -> Result<(), MigrationError> {
        self.gate.empty(objects).map_err(|error| failed("dump", &error, None))
    }

    pub fn criu_pid(&self) -> i32 {
        self.criu_pid
    }

    /// The first process of a restore, once CRIU has made it.
    pub fn restored(&self) -> Option<i32> {
        self.restored
    }

    /// Amends the request: packets are kept away in the way that costs least
    /// of the pause, if this CRIU can.
    pub async fn lock_network_quickly(&mut self) -> Result<(), MigrationError> {
        if features::locks_network_with_nftables().await {
            self.conversation()?
                .amend(|request| request.network_lock(CriuNetworkLockMethod::Nftables));
        }
        Ok(())
    }

    /// CRIU gets its request.
    pub async fn release(&mut self, step: &'static str) -> Result<(), MigrationError> {
        let released = self.conversation()?.release().await;
        released.map_err(|error| failed(step, &error, None))
    }

    /// Returns once CRIU has stopped every task, and waits.
    pub async fn until_frozen(&mut self) -> Result<(), MigrationError> {
        match self.conversation()?.until_frozen().await {
            Ok(_) => Ok(()),
            Err(error) => Err(failed("freeze", &error, Some(&self.log))),
        }
    }

    /// Returns once CRIU has sent this notification, and waits.
    pub async fn until(&mut self, step: &'static str, script: &str) -> Result<(), MigrationError> {
        match self.conversation()?.until(script).await {
            Ok(_) => Ok(()),
            Err(error) => Err(failed(step, &error, Some(&self.log))),
        }
    }

    /// A restore, from its release to the last point at which nothing has
    /// happened yet: every process is there, none has run an instruction, no
    /// packet has been let through, and CRIU kills them all if we go away.
    ///
    /// That is `post-restore`. At `pre-resume`, the later one, CRIU ignores
    /// whether its notification was answered and lets the processes run.
    pub async fn bring(&mut self, fresh_network: bool) -> Result<(), CriuError> {
        let Some(conversation) = &mut self.conversation else { return Err(CriuError::Closed) };
        conversation.release().await?;
        self.restored = conversation.until("setup-namespaces").await?.pid;
        if fresh_network && let Some(pid) = self.restored {
            // Only now the namespace is complete.
            conversation.until("post-setup-namespaces").await?;
            netns::set_up(pid).await;
        }
        conversation.until("post-restore").await?;
        Ok(())
    }

    /// The same, with its failure told by CRIU's log.
    pub async fn bring_for_migration(&mut self, fresh_network: bool) -> Result<(), MigrationError> {
        let brought = self.bring(fresh_network).await;
        brought.map_err(|error| failed("restore", &error, Some(&self.log)))
    }

    /// Lets CRIU and then the runtime do the rest; both must succeed. After a
    /// failure the processes may run nevertheless: [`abandon`](Self::abandon)
    /// ends them.
    pub async fn finish(&mut self, step: &'static str) -> Result<(), MigrationError> {
        let Some(conversation) = self.conversation.take() else {
            return Err(MigrationError::runtime(step, "CRIU has ended already"));
        };
        let rest = async {
            let outcome = conversation.finish().await;
            let status = self.runtime.wait().await;
            (outcome, status)
        };
        let (outcome, status) = timeout(FINISH, rest)
            .await
            .map_err(|_| MigrationError::Timeout { what: step, seconds: FINISH.as_secs() })?;
        let outcome = outcome.map_err(|error| failed(step, &error, Some(&self.log)))?;
        if !outcome.success {
            return Err(with_log(step, outcome.to_string(), Some(&self.log)));
        }
        match status {
            Ok(status) if status.success() => Ok(()),
            status => {
                let said = self.oci.said_since(self.mark).unwrap_or_else(|| format!("{status:?}"));
                Err(MigrationError::runtime(step, said))
            }
        }
    }

    /// Fails if CRIU is gone, however it went: nobody has held the tasks since.
    pub fn is_held(&self, step: &'static str) -> Result<(), MigrationError> {
        if is_running(self.criu_pid, |comm| comm == "criu") {
            return Ok(());
        }
        Err(MigrationError::runtime(step, "CRIU ended while it held the container"))
    }

    /// CRIU at `post-dump` is told to kill the tasks. From here on nothing
    /// that fails may wake them.
    pub async fn accept_dump(mut self) -> Result<(), MigrationError> {
        let Some(mut conversation) = self.conversation.take() else { return Ok(()) };
        let rest = async {
            conversation.acknowledge(true).await?;
            let outcome = conversation.finish().await;
            if let Err(error) = self.runtime.wait().await {
                warn!(%error, "the OCI runtime's end was not seen");
            }
            outcome
        };
        match timeout(FINISH, rest).await {
            Ok(Ok(outcome)) if outcome.success => Ok(()),
            Ok(Ok(outcome)) => Err(with_log("dump", outcome.to_string(), Some(&self.log))),
            Ok(Err(error)) => Err(failed("dump", &error, Some(&self.log))),
            Err(_) => {
                Err(MigrationError::Timeout { what: "CRIU's end", seconds: FINISH.as_secs() })
            }
        }
    }

    /// Closes CRIU's socket, upon which it undoes what it did, and returns
    /// once it and the runtime are gone. CRIU is never killed: that would
    /// leave its packet filter and its parasite behind.
    pub async fn abandon(mut self) -> Result<(), MigrationError> {
        // Whatever CRIU makes of it: the end of the first process is the end
        // of its pid namespace.
        if let Some(pid) = self.restored {
            let _ = signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        drop(self.conversation.take());
        let gone = timeout(UNDO, self.runtime.wait()).await.is_ok();
        if !gone {
            // The runtime hangs, not CRIU: it holds nothing that needs care.
            if let Err(error) = self.runtime.kill().await {
                warn!(%error, "the OCI runtime cannot be killed");
            }
        }
        let deadline = Instant::now() + UNDO;
        while is_running(self.criu_pid, |comm| comm == "criu")
            || self.restored.is_some_and(|pid| is_running(pid, |_| true))
        {
            if Instant::now() > deadline {
                let seconds = UNDO.as_secs();
                return Err(MigrationError::Timeout { what: "CRIU's undoing", seconds });
            }
            // CRIU is the runtime's child or was reparented: no wait for it.
            sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }
}

/// The library for shared objects that CRIU is started with: beside this
/// program, or where `make install` puts it.
pub fn library() -> Option<PathBuf> {
    let own = env::current_exe().ok()?;
    let beside = own.parent()?;
    let installed = beside.parent().map(|prefix| prefix.join("lib/transship"));
    let found = [Some(beside.to_owned()), installed].into_iter().flatten();
    let found = found.map(|folder| folder.join(LIBRARY)).find(|path| path.is_file())?;
    // The loader's list knows no quotes.
    let plain = found.to_str().is_some_and(|path| !path.contains([' ', ':']));
    plain.then_some(found)
}

async fn opened() -> Result<Gate, MigrationError> {
    Gate::open().await.map_err(|error| failed("the CRIU gate", &error, None))
}

/// Whether the pid is still that of a process, not a zombie, with such a name.
fn is_running(pid: i32, name: impl Fn(&str) -> bool) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // `PID (comm) STATE …`, see proc_pid_stat(5).
    let Some((comm, rest)) = stat.rsplit_once(')') else { return false };
    let Some((_, comm)) = comm.split_once('(') else { return false };
    name(comm) && !rest.trim_start().starts_with(['Z', 'X'])
}

fn failed(step: &'static str, error: &CriuError, log: Option<&Path>) -> MigrationError {
    with_log(step, chain(error), log)
}

fn with_log(step: &'static str, reason: String, path: Option<&Path>) -> MigrationError {
    match path.and_then(log::explain) {
        Some(lines) => MigrationError::runtime(step, format!("{reason}\n{lines}")),
        None => MigrationError::runtime(step, reason),
    }
}
