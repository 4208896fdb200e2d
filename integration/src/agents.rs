//! Nodes with `transshipd`: certificates, configuration, the agent's life, and
//! what `transship` answers.

use std::{
    collections::BTreeSet,
    fs,
    ops::Deref,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{Node, Spawned, Things, eventually, until};

const PORT: u16 = 7430;
const AGENT_SOCKET: &str = "/run/transship/agent.sock";

/// Where an agent remembers migrations that ended: to stay, by design.
const RECORDS: &str = "file /var/lib/transship/migrations/";
/// What an agent that runs has given to its shims.
const COPIES: &str = " /run/transship/credentials";
/// The agent itself, and folders made with the first migration: what lies in
/// them is counted by itself.
const STAYS: [&str; 8] = [
    "process transshipd",
    "socket /run/transship/agent.sock",
    "socket /run/transship/arrivals.sock",
    "file /var/lib/transship/pauses.json",
    "folder /var/lib/transship/journal",
    "folder /var/lib/transship/migrations",
    "folder /run/transship/fifo",
    "folder /run/transship/fifo/default",
];

/// A CA in a folder of the host.
pub struct Authority(PathBuf);

impl Authority {
    pub fn create(on: &Node, dir: PathBuf) -> Result<Self> {
        on.ok(&["transshipd", "init-ca", "--dir", &dir.to_string_lossy()])?;
        Ok(Self(dir))
    }

    /// One that was created before.
    pub fn of(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// Certificate and key of `name`, in `out`.
    pub fn issue(&self, on: &Node, name: &str, out: &Path) -> Result<()> {
        let (ca, out) = (self.0.to_string_lossy(), out.to_string_lossy());
        on.ok(&["transshipd", "issue", name, "--dir", &ca, "--out", &out])?;
        Ok(())
    }
}

/// A node with an agent that knows the other one.
pub struct Site {
    agent: Mutex<Option<Spawned>>,
    node: Node,
    peer: (String, String),
}

impl Deref for Site {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl Site {
    fn new(node: Node, peer: &Node, ca: &Authority) -> Result<Self> {
        let peer = (peer.name().to_owned(), peer.address()?.to_owned());
        ca.issue(&node, node.name(), &node.dir().join("trust"))?;
        let site = Self { agent: Mutex::default(), node, peer };
        site.configure("")?;
        Ok(site)
    }

    /// Writes the configuration anew, with `more` lines at its top.
    pub fn configure(&self, more: &str) -> Result<()> {
        self.configure_with(&self.dir().join("trust"), more)
    }

    /// The same with the certificate of another folder.
    pub fn configure_with(&self, trust: &Path, more: &str) -> Result<()> {
        let (name, address) = &self.peer;
        let trust = trust.display();
        let text = format!(
            "listen = \"{}:{PORT}\"\n{more}\n\
             [credentials]\n\
             ca = \"{trust}/ca.pem\"\ncertificate = \"{trust}/node.pem\"\nkey = \"{trust}/node.key\"\n\
             [peers.{name}]\naddress = \"{address}:{PORT}\"\n\
             [limits]\nmemory_reserve_mib = 0\ndisk_reserve_mib = 0\n",
            self.address()?
        );
        fs::write(self.config(), text).context("write the agent's configuration")
    }

    fn config(&self) -> PathBuf {
        self.dir().join("config.toml")
    }

    fn agent(&self) -> MutexGuard<'_, Option<Spawned>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn start_agent(&self) -> Result<()> {
        self.start_agent_with(&[])
    }

    /// Starts the agent with more in its environment (`NAME=VALUE`), and
    /// waits until it serves.
    pub fn start_agent_with(&self, environment: &[&str]) -> Result<()> {
        let config = self.config();
        let config = config.to_string_lossy();
        let mut command = vec!["env"];
        command.extend(environment);
        command.extend(["transshipd", "--config", &config]);
        let mut agent = self.spawn("transshipd", &command)?;
        let socket = self.path(AGENT_SOCKET);
        eventually("transshipd to serve", || {
            if !agent.is_running()? {
                bail!("transshipd ended: {}", agent.output());
            }
            Ok(UnixStream::connect(&socket).is_ok())
        })?;
        *self.agent() = Some(agent);
        Ok(())
    }

    /// Ends the agent, politely or not.
    pub fn stop_agent(&self, signal: Signal) -> Result<()> {
        let mut agent = self.agent().take().context("transshipd does not run")?;
        agent.signal(signal)?;
        agent.wait()?;
        Ok(())
    }

    pub fn signal_agent(&self, signal: Signal) -> Result<()> {
        self.agent().as_ref().context("transshipd does not run")?.signal(signal)
    }

    /// Everything the agent has logged, of all its runs.
    pub fn agent_log(&self) -> String {
        fs::read_to_string(self.dir().join("transshipd.log")).unwrap_or_default()
    }

    /// `transship` with JSON for an answer: what it answered, or its `error`.
    pub fn transship(&self, arguments: &[&str]) -> Result<std::result::Result<Value, Refused>> {
        self.begin(arguments)?.end()
    }

    /// The answer of a `transship` that must succeed.
    pub fn answer(&self, arguments: &[&str]) -> Result<Value> {
        match self.transship(arguments)? {
            Ok(answer) => Ok(answer),
            Err(refused) => bail!("transship {arguments:?} failed: {refused:#?}"),
        }
    }

    /// Starts `transship` and does not wait for its end.
    pub fn begin(&self, arguments: &[&str]) -> Result<Command> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("transship-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let output = self.dir().join(format!("{name}.json"));
        let mut command =
            vec!["sh".into(), "-c".into(), "out=$1; shift; exec \"$@\" > \"$out\"".into()];
        command.extend(["sh".into(), output.to_string_lossy().into_owned()]);
        command.extend(["transship".into(), "--output".into(), "json".into()]);
        command.extend(arguments.iter().map(|&one| one.to_owned()));
        Ok(Command { process: self.spawn(&name, &command)?, output })
    }

    /// Migrates a container to the other node; the report.
    pub fn migrate(&self, container: &str) -> Result<Value> {
        self.answer(&["migrate", container, "--to", &self.peer.0])
    }

    /// The same with a pause that may be long: however busy this machine is, it
    /// is not given up.
    pub fn migrate_whatever_it_takes(&self, container: &str) -> Result<Value> {
        self.answer(&["migrate", container, "--to", &self.peer.0, "--max-pause", "20s"])
    }

    /// The migrations this agent knows, oldest first.
    pub fn migrations(&self) -> Result<Vec<Value>> {
        let all = self.answer(&["status"])?;
        Ok(all.as_array().context("a list of migrations")?.clone())
    }

    /// The running migration of `container`, once it is in `phase`.
    pub fn await_phase(&self, container: &str, phase: &str) -> Result<String> {
        until(&format!("{container} in phase {phase} on {}", self.name()), || {
            let all = self.migrations()?;
            let ours = |one: &&Value| one["container"] == container && one["ending"] == "running";
            let one = all.iter().find(ours).filter(|one| one["phase"] == phase);
            Ok(one.and_then(|one| one["migration"].as_str()).map(str::to_owned))
        })
    }

    pub fn status(&self, container: &str) -> Result<String> {
        Ok(self.task_status(container)?.unwrap_or_else(|| "NONE".into()))
    }

    /// Puts a gate before a program of the node's PATH, open for now.
    pub fn gate(&self, program: &str) -> Result<Gate> {
        let shut = self.dir().join(format!("{program}.shut"));
        self.precede(
            program,
            &format!(
                "if grep -qsx -e any -e \"$1\" {shut}; then touch {shut}.met; fi\n\
                 while grep -qsx -e any -e \"$1\" {shut}; do sleep 0.02; done\n",
                shut = shut.display()
            ),
        )?;
        Ok(Gate(shut))
    }

    /// Has the shell do something before each start of a program of the node's
    /// PATH; `$real` is the program, and `$@` are its arguments.
    pub fn precede(&self, program: &str, with: &str) -> Result<()> {
        let at = self.dir().join("bin").join(program);
        let real = match fs::read_link(&at) {
            Ok(real) => real,
            Err(_) => PathBuf::from(self.sh(&format!("command -v {program}"))?.trim()),
        };
        let script = format!("#!/bin/sh\nreal={}\n{with}\nexec \"$real\" \"$@\"\n", real.display());
        let new = at.with_extension("new");
        fs::write(&new, script)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        fs::rename(&new, at).with_context(|| format!("put something before {program}"))
    }

    /// Slows everything that leaves the node down, so that what takes a
    /// moment takes long enough to be met.
    pub fn slow(&self) -> Result<()> {
        let tc = "tc qdisc add dev eth0 root tbf rate 1mbit burst 16k latency 50ms";
        self.sh(tc).map(drop)
    }

    pub fn fast(&self) -> Result<()> {
        self.sh("tc qdisc del dev eth0 root").map(drop)
    }

    /// What there is to leave behind.
    pub fn inventory(&self) -> Result<Inventory> {
        let list = |arguments: &[&str]| -> Result<BTreeSet<String>> {
            let text = self.ctr_ok(arguments)?;
            Ok(text.lines().map(|line| line.trim().to_owned()).collect())
        };
        Ok(Inventory {
            things: self.everything()?,
            content: list(&["content", "ls", "-q"])?,
            ingests: list(&["content", "active"])?,
        })
    }

    /// Waits until nothing is there that was not there `before`, but the
    /// agent's memory of migrations.
    pub fn nothing_more(&self, before: &Inventory) -> Result<()> {
        self.nothing_but(before, |_| false)
    }

    /// The same, with an exception.
    pub fn nothing_but(&self, before: &Inventory, fine: impl Fn(&str) -> bool) -> Result<()> {
        let mut left = Vec::new();
        let gone = until("everything to be gone", || {
            let now = self.inventory()?;
            left = now.things.beyond(&before.things);
            left.retain(|one| {
                !one.starts_with(RECORDS) && !one.contains(COPIES) && !STAYS.contains(&one.as_str())
            });
            left.extend(now.content.difference(&before.content).map(|d| format!("content {d}")));
            left.extend(now.ingests.difference(&before.ingests).map(|i| format!("ingest {i}")));
            left.retain(|one| !fine(one));
            Ok(left.is_empty().then_some(()))
        });
        if gone.is_err() && !left.is_empty() {
            bail!("left behind on node {}:\n  {}", self.name(), left.join("\n  "));
        }
        gone
    }
}

/// While it is shut, programs that are started wait before they begin.
pub struct Gate(PathBuf);

impl Gate {
    pub fn shut(&self) -> Result<()> {
        self.shut_for("any")
    }

    /// Only for those with this first argument.
    pub fn shut_for(&self, argument: &str) -> Result<()> {
        let _ = fs::remove_file(self.met());
        fs::write(&self.0, argument)?;
        Ok(())
    }

    /// Returns once a program waits.
    pub fn await_one(&self) -> Result<()> {
        eventually(&format!("a program to wait at {}", self.0.display()), || {
            Ok(self.met().exists())
        })
    }

    pub fn open(&self) -> Result<()> {
        fs::remove_file(&self.0)?;
        Ok(())
    }

    fn met(&self) -> PathBuf {
        self.0.with_extension("shut.met")
    }
}

/// Everything on a node that a migration may leave.
pub struct Inventory {
    pub things: Things,
    content: BTreeSet<String>,
    ingests: BTreeSet<String>,
}

/// A `transship` that runs.
pub struct Command {
    pub process: Spawned,
    output: PathBuf,
}

/// What `transship` says when it does not do it.
#[derive(Debug)]
pub struct Refused {
    pub exit: i32,
    pub code: String,
    pub reason: String,
    pub remedy: String,
    pub error: Value,
}

impl Command {
    /// Its answer, once it has ended.
    pub fn end(mut self) -> Result<std::result::Result<Value, Refused>> {
        let exit = self.process.wait()?;
        let text = fs::read_to_string(&self.output)?;
        let said =
            || format!("transship ended with {exit} and said {text:?} {}", self.process.output());
        let value: Value = serde_json::from_str(&text).with_context(said)?;
        let error = &value["error"];
        // A migration's record has a text under the same name.
        if !error.is_object() {
            ensure!(exit == 0, said());
            return Ok(Ok(value));
        }
        ensure!(exit != 0, said());
        let text = |name: &str| error[name].as_str().map(str::to_owned).with_context(said);
        let (code, reason, remedy) = (text("code")?, text("reason")?, text("remedy")?);
        Ok(Err(Refused { exit, code, reason, remedy, error: error.clone() }))
    }
}

/// Two nodes that trust each other, their agents serving.
pub struct Pair {
    pub a: Site,
    pub b: Site,
}

impl Pair {
    pub fn start() -> Result<Self> {
        let pair = Self::without_agents()?;
        pair.a.start_agent()?;
        pair.b.start_agent()?;
        Ok(pair)
    }

    pub fn without_agents() -> Result<Self> {
        let (a, b) = Node::pair()?;
        let ca = Authority::create(&a, a.dir().join("ca"))?;
        let to_a = Site::new(b, &a, &ca)?;
        let to_b = Site::new(a, &to_a.node, &ca)?;
        Ok(Self { a: to_b, b: to_a })
    }
}
