//! Runs an OCI runtime through the gate and prints what CRIU is asked and
//! says, with times:
//! `watch [--hold SCRIPT] [--refuse SCRIPT] [--images DIR] [--level N] [--quick]
//! [--network NAMESPACE] -- runc checkpoint …`.
//!
//! `--quick` asks for what a migration asks for: no freezer, no packet filter,
//! and memory hidden from a dump that will be refused.
//!
//! With `--images` the word `@images` among the arguments becomes a directory
//! in memory, filled from DIR before and copied to DIR afterwards.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use transship_api::criu::CriuNetworkLockMethod;
use transship_criu::{Gate, Hider, Kind, images::MemoryDir, stub};

fn main() -> anyhow::Result<ExitCode> {
    stub::become_criu_if_asked();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(watch())
}

async fn watch() -> anyhow::Result<ExitCode> {
    let mut arguments = env::args().skip(1);
    let (mut hold, mut refuse, mut saved, mut level, mut quick) = (None, None, None, None, false);
    let mut network = None;
    let program = loop {
        match arguments.next().as_deref() {
            Some("--hold") => hold = arguments.next(),
            Some("--refuse") => refuse = arguments.next(),
            Some("--images") => saved = arguments.next().map(PathBuf::from),
            Some("--level") => level = arguments.next().map(|level| level.parse()).transpose()?,
            Some("--network") => network = arguments.next(),
            Some("--quick") => quick = true,
            Some("--") => break arguments.next().context("no program")?,
            other => bail!(
                "watch [--hold SCRIPT] [--refuse SCRIPT] [--images DIR] [--level N] [--quick] \
                 [--network NAMESPACE] -- PROGRAM…, not {other:?}"
            ),
        }
    };
    let images = MemoryDir::create(None)?;
    if let Some(dir) = &saved {
        fill(&images, dir)?;
    }
    let in_memory = images.path().display().to_string();
    let arguments: Vec<String> = arguments.collect();
    let arguments =
        arguments.into_iter().map(|word| if word == "@images" { in_memory.clone() } else { word });
    let begin = Instant::now();
    let tell = |text: String| eprintln!("{:9.3} {text}", begin.elapsed().as_secs_f64() * 1e3);
    let checkpoints = arguments.clone().any(|word| word == "checkpoint");
    let mut gate = Gate::open().await?;
    if quick && checkpoints {
        gate = gate.isolate();
    }
    if let Some(network) = network {
        gate = gate.network(network);
    }
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .envs(gate.environment())
        .stdin(Stdio::null())
        .spawn()?;
    let mut talk = tokio::select! {
        talk = gate.conversation() => talk?,
        status = child.wait() => {
            tell(format!("the runtime ended without CRIU: {}", status?));
            return Ok(ExitCode::FAILURE);
        }
    };
    tell(format!("{} by CRIU {}: {:?}", talk.kind(), talk.criu_pid(), talk.options()));
    talk.amend(|request| {
        if let Some(level) = level {
            request.log_level(level);
        }
        if quick {
            request.freeze_cgroup(None);
            request.network_lock(CriuNetworkLockMethod::Skip);
        }
    });
    let hidden = match talk.options().pid {
        Some(pid) if quick && refuse.is_some() && talk.kind() == Kind::Dump => {
            Some(Hider::prepare(talk.criu_pid())?.hide(&[pid])?)
        }
        _ => None,
    };
    tell("prepared".into());
    talk.release().await?;
    tell("released".into());
    if let Some(script) = refuse.as_ref().or(hold.as_ref()) {
        let notified = talk.until(script).await?;
        tell(format!("held {notified:?}"));
        if refuse.is_some() {
            talk.acknowledge(false).await?;
        } else {
            tokio::time::sleep(Duration::from_secs(1)).await;
            talk.pass().await?;
        }
        tell("let go".into());
    }
    let kind = talk.kind();
    let outcome = talk.finish().await?;
    drop(hidden);
    tell(format!("{kind}: {outcome} {outcome:?}"));
    let status =
        if kind == Kind::Restore && hold.is_some() { None } else { Some(child.wait().await?) };
    tell(format!("runtime: {status:?}"));
    if let Some(dir) = &saved {
        save(&images, dir)?;
    }
    Ok(if outcome.success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn fill(images: &MemoryDir, from: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(from)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = entry.file_name().into_string().ok().context("an odd file name")?;
        io::copy(&mut fs::File::open(entry.path())?, &mut images.create_file(&name)?)?;
    }
    Ok(())
}

fn save(images: &MemoryDir, to: &Path) -> anyhow::Result<()> {
    for (name, _) in images.files()? {
        let name = name.into_string().ok().context("an odd file name")?;
        io::copy(&mut images.open(&name)?, &mut fs::File::create(to.join(&name))?)?;
    }
    Ok(())
}
