//! Two nodes to play with: `hack/two-nodes.sh up`, `enter a`, `down`.
//!
//! `up` keeps the nodes in a process of its own that waits for `down`; what
//! the other commands need to find them lies in a file.
#![forbid(unsafe_code)]

use std::{
    env,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio, exit},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{SigSet, Signal},
    unistd::setsid,
};
use serde::{Deserialize, Serialize};
use transship_integration::{Node, eventually, images::Image, inside};

const USAGE: &str = "usage: two-nodes.sh up | down | status | enter NODE [COMMAND…]
  up      start nodes a and b: namespaces, tmpfs /run, a network, containerd with our shim
  down    stop everything in them and remove every trace
  status  say what runs where
  enter   run a command (a shell by default) in node a or b";

const STATE: &str = "/run/transship-two-nodes.json";

#[derive(Serialize, Deserialize)]
struct State {
    keeper: i32,
    nodes: Vec<Entry>,
}

/// What entering a node needs.
#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    address: String,
    dir: PathBuf,
    entry: Vec<String>,
    environment: Vec<(String, String)>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["up"] => up(),
        ["keep"] => keep(),
        ["down"] => down(),
        ["status"] => status(),
        ["enter", node, command @ ..] => enter(node, command),
        _ => {
            eprintln!("{USAGE}");
            exit(2)
        }
    }
}

fn up() -> Result<()> {
    if let Some(state) = running()? {
        bail!(
            "nodes are up already (kept by process {}); two-nodes.sh down stops them",
            state.keeper
        );
    }
    let mut keeper = Command::new(env::current_exe()?)
        .arg("keep")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the keeper of the nodes")?;
    // The keeper closes its output once the nodes stand.
    keeper.stdout.take().context("output of the keeper")?.read_to_end(&mut Vec::new())?;
    if running()?.is_none() {
        bail!("the nodes did not start");
    }
    status()
}

/// Holds the nodes until it is told to end.
fn keep() -> Result<()> {
    let _ = setsid();
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    let nodes = Node::start_all(&["a", "b"])?;
    let mut entries = Vec::new();
    for node in &nodes {
        for image in [Image::Busybox, Image::Redis] {
            node.image(image)?;
        }
        let entry = node.command(&[] as &[&str]);
        let text = |os: &std::ffi::OsStr| os.to_string_lossy().into_owned();
        let words = [entry.get_program()].into_iter().chain(entry.get_args()).map(text).collect();
        let environment =
            entry.get_envs().filter_map(|(key, value)| Some((text(key), text(value?)))).collect();
        entries.push(Entry {
            name: node.name().into(),
            address: node.address()?.into(),
            dir: node.dir().into(),
            entry: words,
            environment,
        });
    }
    let state = State { keeper: std::process::id().try_into()?, nodes: entries };
    let mut file = File::create(STATE).with_context(|| format!("write {STATE}"))?;
    serde_json::to_writer(&mut file, &state)?;
    file.flush()?;
    // Tells `up`; nothing is printed any more.
    let nowhere = File::options().write(true).open("/dev/null")?;
    nix::unistd::dup2_stdout(&nowhere)?;
    signals.wait()?;
    drop(nodes);
    fs::remove_file(STATE).with_context(|| format!("remove {STATE}"))
}

fn down() -> Result<()> {
    let Some(state) = running()? else {
        println!("no nodes are up");
        return Ok(());
    };
    inside::kill(state.keeper, Signal::SIGTERM)?;
    eventually("the nodes to be gone", || Ok(!Path::new(STATE).exists()))?;
    println!("nodes are down");
    Ok(())
}

fn status() -> Result<()> {
    let Some(state) = running()? else {
        println!("no nodes are up");
        return Ok(());
    };
    for node in state.nodes {
        println!("node {} at {}, logs in {}", node.name, node.address, node.dir.display());
    }
    println!("hack/two-nodes.sh enter a ctr task ls");
    Ok(())
}

fn enter(name: &str, command: &[&str]) -> Result<()> {
    let state = running()?.context("no nodes are up; two-nodes.sh up starts them")?;
    let node = state.nodes.into_iter().find(|node| node.name == name);
    let node = node.with_context(|| format!("there is no node {name}, only a and b"))?;
    let (program, arguments) = node.entry.split_first().context("entry of the node")?;
    let command = if command.is_empty() { &["bash"][..] } else { command };
    Err(Command::new(program).args(arguments).args(command).envs(node.environment).exec())
        .with_context(|| format!("enter node {name}"))
}

/// The nodes that are up. A file whose keeper is gone is removed: the nodes
/// went with it.
fn running() -> Result<Option<State>> {
    let text = match fs::read_to_string(STATE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("read {STATE}"))?,
    };
    let state: State = serde_json::from_str(&text).with_context(|| format!("read {STATE}"))?;
    let program = fs::read_link(format!("/proc/{}/exe", state.keeper));
    if program.ok().and_then(|path| path.file_name().map(|name| name == "two-nodes")) != Some(true)
    {
        fs::remove_file(STATE)?;
        return Ok(None);
    }
    Ok(Some(state))
}
