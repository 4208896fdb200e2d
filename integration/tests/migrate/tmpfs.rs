//! The container's tmpfs mounts: they travel beside CRIU's images, and nothing
//! is started for them in the pause.

use std::fs;

use anyhow::{Result, ensure};
use transship_integration::{
    agents::{Pair, Site},
    bench::execs::Watch,
    eventually,
    images::Image,
    until,
    workload::Workload,
};

use crate::world::{FOR_TAR, World, refused_with, with_agents};

const ID: &str = "tmpfs";
const PROGRAM: &str = include_str!("tmpfs.py");
const SCRATCH: &str = "--mount=type=tmpfs,src=tmpfs,dst=/scratch,options=nosuid:noatime:mode=1770:size=320m:nr_inodes=4000";
const READONLY: &str = "--mount=type=tmpfs,src=nothing,dst=/readonly,options=ro:size=1m";

fn start(world: &World, big_mib: u32) -> Result<()> {
    let program = ["python3", "-c", PROGRAM, &big_mib.to_string()];
    world.start_of(&world.a, Image::Python, ID, &[SCRATCH, READONLY, FOR_TAR], &program)?;
    let ready = world.a.path(format!("/proc/{}/root/ready", world.a.task_pid(ID)?));
    eventually("the files to be made", || Ok(ready.exists()))
}

/// `number`: from 1 on.
fn verify(site: &Site, number: u32) -> Result<()> {
    let root = format!("/proc/{}/root", site.task_pid(ID)?);
    fs::write(site.path(format!("{root}/verify-{number}")), "")?;
    let answer = site.path(format!("{root}/answer-{number}"));
    let wrong = until("an answer", || {
        Ok(answer.exists().then(|| fs::read_to_string(&answer)).transpose()?)
    })?;
    ensure!(wrong.is_empty(), "on {}: {wrong}", site.name());
    Ok(())
}

/// Where each tmpfs is mounted, and how, both as a mount and as a file system.
fn mounts(site: &Site) -> Result<Vec<String>> {
    let table = fs::read_to_string(site.path(format!("/proc/{}/mountinfo", site.task_pid(ID)?)))?;
    let mut mounts: Vec<_> = table
        .lines()
        .filter(|line| line.contains(" - tmpfs "))
        .map(|line| {
            // Groups of mounts have numbers of the whole machine.
            let words = line.split(' ').skip(3).filter(|word| !word.starts_with("shared:"));
            words.collect::<Vec<_>>().join(" ")
        })
        // Files that are masked are the container's /dev/null, and CRIU binds
        // the node's.
        .filter(|mount| mount.starts_with("/ "))
        .collect();
    mounts.sort();
    ensure!(mounts.len() >= 6, "{mounts:#?}");
    Ok(mounts)
}

#[test]
fn files_of_every_kind_go_and_come_back() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world, 0)?;
        verify(a, 1)?;
        let before = mounts(a)?;
        a.migrate(ID)?;
        ensure!(mounts(b)? == before, "{before:#?} are now {:#?}", mounts(b)?);
        verify(b, 2)?;
        b.migrate(ID)?;
        ensure!(mounts(a)? == before, "{before:#?} are now {:#?}", mounts(a)?);
        verify(a, 3)?;
        world.remove(a, ID)?;
        for site in [a, b] {
            site.ctr_ok(&["image", "rm", "--sync", Image::Python.reference()])?;
        }
        world.nothing_left()
    })
}

#[test]
fn much_of_it_goes_as_well_and_is_charged_to_the_container() -> Result<()> {
    const MIB: u32 = 200;
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world, MIB)?;
        a.migrate(ID)?;
        verify(b, 1)?;
        let charged = match b.is_v1("memory") {
            true => "memory.usage_in_bytes",
            false => "memory.current",
        };
        let group = b.cgroup("memory", &format!("default/{ID}"))?;
        let charged: u64 = fs::read_to_string(group.join(charged))?.trim().parse()?;
        ensure!(charged > u64::from(MIB) << 20, "{charged} bytes are charged to the container");
        world.remove(b, ID)
    })
}

/// A tmpfs that does not fit, found out while the container stands still.
#[test]
fn what_cannot_be_made_leaves_it_where_it_was() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world, 0)?;
        let mounted = b.sh("cat /proc/self/mountinfo")?.lines().count();
        // By now the bundle of an arrival has something in the way.
        let bundle = "/run/containerd/io.containerd.runtime.v2.task/default";
        let tar = a.gate("tar")?;
        tar.shut()?;
        let migration = a.begin(&["migrate", ID, "--to", b.name()])?;
        tar.await_one()?;
        b.sh(&format!("touch {bundle}/{ID}/tmpfs"))?;
        tar.open()?;
        let refused = refused_with(migration.end()?, "runtime")?;
        ensure!(refused.reason.contains("tmpfs"), "{refused:#?}");
        verify(a, 1)?;
        world.nothing_on_b()?;
        ensure!(b.sh("cat /proc/self/mountinfo")?.lines().count() == mounted);
        a.migrate(ID)?;
        verify(b, 2)?;
        world.remove(b, ID)
    })
}

/// Programs that were started while a container on its way stood still, on
/// both nodes.
fn started_in_the_pause(flags: &[&str]) -> Result<Vec<String>> {
    let watch = Watch::start()?;
    let Pair { a, b } = &Pair::start()?;
    let mut run = vec!["run", "-d", "--runtime", "io.containerd.transship.v2"];
    run.extend(flags);
    run.extend([a.image(Image::Workload)?, ID, "workload", "--mib", "16"]);
    a.ctr_ok(&run)?;
    Workload::of(a, ID)?.ask("reset")?;
    a.migrate(ID)?;
    let gaps = Workload::of(b, ID)?.ask("gaps")?;
    let pause = gaps.ticker[0];
    watch.between(pause.start_ns, pause.start_ns + pause.gap_ns)
}

#[test]
fn nothing_is_started_in_the_pause() -> Result<()> {
    let started = started_in_the_pause(&[SCRATCH, READONLY])?;
    ensure!(started.is_empty(), "{started:#?}");
    // And one of them would be seen.
    let started = started_in_the_pause(&[FOR_TAR])?;
    // Of one that has ended the command is not known any more.
    let tars = started.iter().filter(|one| one.is_empty() || one.starts_with("tar --"));
    ensure!(tars.count() == 2 && started.len() == 2, "one at either end: {started:#?}");
    Ok(())
}
