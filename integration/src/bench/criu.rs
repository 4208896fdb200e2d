//! B1 and B2: what runc and CRIU do by themselves, as fast as they can be made
//! to. Images in memory, `/run` a tmpfs with CRIU's cache of kernel features,
//! the network locked by nftables, the receiver waiting before the dump
//! begins, and each next program started by the one before it.

use std::{
    collections::BTreeMap,
    fs,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail, ensure};

use super::{Load, Move, bundle::Bundles, execs::Watch, ms, now};
use crate::{Node, Spawned, bin_dir, eventually, workload::Workload};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// B1: checkpoint, stream, restore.
    StopAndCopy,
    /// B2: CRIU's lazy pages.
    Lazy,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::StopAndCopy => "stop",
            Self::Lazy => "lazy",
        }
    }
}

/// Where images lie in a node: tmpfs.
const IMAGES: &str = "/run/bench/images";
pub const RUNC_ROOT: &str = "/run/bench/runc";
const PORT: u16 = 7500;

/// CRIU's lazy pages need pipes of 4 MiB. A root without CAP_SYS_RESOURCE gets
/// no more than this limit of the host's, and CRIU fails for it after the
/// container is gone.
const PIPE_LIMIT: &str = "/proc/sys/fs/pipe-max-size";
const PIPE: u64 = 4 << 20;

/// The host's limit, raised as long as this lives.
pub struct Pipes(Option<String>);

impl Pipes {
    pub fn widen() -> Result<Self> {
        let was = fs::read_to_string(PIPE_LIMIT)?;
        if was.trim().parse::<u64>()? >= PIPE {
            return Ok(Self(None));
        }
        fs::write(PIPE_LIMIT, PIPE.to_string()).context("allow larger pipes")?;
        Ok(Self(Some(was)))
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        if let Some(was) = &self.0 {
            let _ = fs::write(PIPE_LIMIT, was);
        }
    }
}

/// Moves a workload from node `a` to node `b`.
pub fn migrate(
    kind: Kind,
    load: Load,
    (a, b): (&Node, &Node),
    bundles: &Bundles,
    watch: &Watch,
) -> Result<Move> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let id = format!("{}-{}", kind.name(), COUNT.fetch_add(1, Ordering::Relaxed));
    let bundle = bundles.bundle(&id, load)?;
    let bundle = bundle.to_string_lossy();
    let helper = bin_dir()?.join("bench-node");
    let helper = helper.to_string_lossy();
    let run = format!(
        "mkdir -p {IMAGES} {RUNC_ROOT}; \
         runc --root {RUNC_ROOT} run -d -b {bundle} {id} </dev/null >/dev/null 2>&1"
    );
    a.sh(&run).context("start the workload")?;
    let workload = Workload::at(a, pid(a, &id)?)?;
    b.sh(&format!("mkdir -p {IMAGES} {RUNC_ROOT}"))?;
    let anonymous_bytes = super::anonymous(&a.path("/proc"), pid(a, &id)?)?;

    let listen = format!("{}:{PORT}", b.address()?);
    let page_server = format!("{}:{}", a.address()?, PORT + 1);
    let name = kind.name();
    let mut restore = b.spawn(
        &format!("restore-{id}"),
        &[&helper, "restore", name, &id, &bundle, IMAGES, &listen, &page_server],
    )?;
    eventually("the receiver to listen", || Ok(says(&mut restore)?.contains("listening")))?;
    workload.ask("reset")?;
    let begun = now()?;
    let mut checkpoint = a.spawn(
        &format!("checkpoint-{id}"),
        &[&helper, "checkpoint", name, &id, IMAGES, &listen, &page_server],
    )?;
    end(&mut restore)?;
    end(&mut checkpoint)?;
    let mut times = BTreeMap::new();
    for line in [checkpoint.output(), restore.output()].concat().lines() {
        if line.starts_with('{') {
            times.extend(serde_json::from_str::<BTreeMap<String, u64>>(line)?);
        }
    }
    let restored = *times.get("restored").context("the end of a restore")?;
    let filled = times.get("filled").copied().unwrap_or(restored);

    let there = pid(b, &id)?;
    let workload = Workload::at(b, there)?;
    let answer = workload.ask("gaps")?;
    let mut moved = Move::seen(&answer, begun, filled, watch)?;
    moved.anonymous_bytes = anonymous_bytes;
    moved.own_ms = Some(ms(restored.saturating_sub(begun)));
    moved.steps_ms =
        times.into_iter().map(|(step, at)| (step, ms(at.saturating_sub(begun)))).collect();
    let pages = workload.verify()?;
    ensure!(pages == load.pages(), "{pages} pages of {} were there", load.pages());
    for (node, must) in [(a, false), (b, true)] {
        let gone = node.run(&["runc", "--root", RUNC_ROOT, "delete", "-f", &id])?;
        ensure!(gone.code == 0 || !must, "remove {id}: {}", gone.stderr);
        node.sh(&format!("rm -rf {IMAGES}"))?;
    }
    fs::remove_dir_all(bundles.dir().join(&id))?;
    Ok(moved)
}

/// Pid of the container's first process, within the node.
fn pid(node: &Node, id: &str) -> Result<u32> {
    let state = node.ok(&["runc", "--root", RUNC_ROOT, "state", id])?;
    let state: serde_json::Value = serde_json::from_str(&state)?;
    let pid = state["pid"].as_u64().with_context(|| format!("pid in {state}"))?;
    Ok(u32::try_from(pid)?)
}

fn says(process: &mut Spawned) -> Result<String> {
    let said = process.output();
    if !process.is_running()? {
        bail!("bench-node ended: {said}");
    }
    Ok(said)
}

fn end(process: &mut Spawned) -> Result<()> {
    let code = process.wait()?;
    ensure!(code == 0, "bench-node ended with {code}: {}", process.output());
    Ok(())
}
