//! Memory that is written while it moves: every page arrives, CRIU saves
//! almost none of them, and nothing of how that was done stays behind.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use transship_integration::{agents::Site, eventually, images::Image, until, workload::Workload};

use crate::world::{World, refused_with, with_agents};

const ID: &str = "memory";

/// What CRIU's images of a container may have that brings no page: some
/// files for each process.
const IMAGES: u64 = 4 << 20;

fn start(world: &World, arguments: &[&str]) -> Result<Workload> {
    let mut program = vec!["workload"];
    program.extend(arguments);
    world.start_of(&world.a, Image::Workload, ID, &[], &program)?;
    Workload::of(&world.a, ID)
}

/// The report's part about memory, which must have gone the fast way.
fn fast(report: &Value) -> Result<&Value> {
    let memory = &report["memory"];
    let is = |name: &str, value: &str| memory[name] == value;
    ensure!(
        is("dump", "page-less") && is("restore", "local-lazy") && is("fallback", ""),
        "{report:#}"
    );
    let backend = memory["backend"].as_str().unwrap_or_default();
    if backend != "write-protect" {
        eprintln!("writes are noticed by {backend} on this kernel");
    }
    ensure!(report["image_bytes"].as_u64().context("image_bytes")? < IMAGES, "{report:#}");
    Ok(memory)
}

fn number(of: &Value, name: &str) -> Result<u64> {
    of[name].as_u64().with_context(|| format!("{name} in {of:#}"))
}

/// The process of the workload whose memory is served, without asking a shim.
fn served(site: &Site) -> Result<Option<u32>> {
    let found = site.sh("for one in /proc/[0-9]*; do \
           if grep -qs ' um' $one/smaps && grep -qx workload $one/comm; then \
             echo ${one#/proc/}; fi; done; true")?;
    Ok(found.lines().next().map(str::parse).transpose()?)
}

/// No process of the container has memory that somebody watches or serves.
fn untouched(site: &Site) -> Result<bool> {
    let script = format!(
        "for pid in $(ctr task ps {ID} | awk 'NR > 1 {{ print $1 }}'); do \
           grep VmFlags /proc/$pid/smaps; done"
    );
    let flags = site.sh(&script)?;
    ensure!(flags.contains(" rd "), "no process: {flags}");
    // Missing, write-protected, minor: proc_pid_smaps(5).
    Ok(!flags.split_whitespace().any(|flag| ["um", "uw", "ui"].contains(&flag)))
}

fn quota(site: &Site) -> Result<String> {
    let pid = site.task_pid(ID)?;
    let script = format!(
        "path=$(awk -F: '$2 ~ /(^|,)cpu(,|$)/ || $1 == 0 {{ print $3; exit }}' /proc/{pid}/cgroup); \
         cat /sys/fs/cgroup/cpu$path/cpu.cfs_quota_us /sys/fs/cgroup$path/cpu.max 2> /dev/null"
    );
    Ok(site.sh(&format!("{script} || true"))?.trim().to_owned())
}

#[test]
fn memory_that_is_written_arrives_and_comes_back_at_once() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        let here =
            start(world, &["--mib", "96", "--processes", "3", "--threads", "2", "--rate", "20"])?;
        let pages = here.verify()?;

        let report = a.migrate(ID)?;
        let memory = fast(&report)?;
        ensure!(number(memory, "total")? >= pages * 4096, "{report:#}");
        ensure!(number(memory, "dirty_sync_count")? >= 2, "{report:#}");
        // At once: it waits for the pages that are still on their way.
        let back = b.migrate(ID)?;
        fast(&back)?;

        let here = Workload::of(a, ID)?;
        ensure!(here.verify()? == pages);
        eventually("nobody to serve its memory", || untouched(a))?;
        world.remove(a, ID)?;
        b.ctr_ok(&["image", "rm", "--sync", Image::Workload.reference()])?;
        a.ctr_ok(&["image", "rm", "--sync", Image::Workload.reference()])?;
        world.nothing_left()
    })
}

#[test]
fn it_verifies_where_it_has_arrived() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world, &["--mib", "64", "--processes", "2", "--threads", "4", "--rate", "50"])?;
        fast(&a.migrate(ID)?)?;
        // While pages are still missing, and when none is any more.
        let there = Workload::of(b, ID)?;
        let pages = there.verify()?;
        eventually("nobody to serve its memory", || untouched(b))?;
        ensure!(there.verify()? == pages);
        world.remove(b, ID)
    })
}

/// It writes far more than goes through, so that the rounds have no end.
#[test]
fn cancelled_in_its_rounds_it_is_as_it_was() -> Result<()> {
    with_agents(|world| {
        let World { a, .. } = world;
        let here = start(world, &["--mib", "64", "--threads", "2", "--rate", "40"])?;
        let before = quota(a)?;
        let command = a.begin(&["migrate", ID, "--to", "b", "--bandwidth", "4MiB/s"])?;
        a.await_phase(ID, "rounds")?;
        command.process.signal(Signal::SIGINT)?;
        let refused = refused_with(command.end()?, "cancelled")?;
        ensure!(refused.error["ending"] == "stayed-home", "{refused:#?}");

        ensure!(a.status(ID)? == "RUNNING");
        ensure!(untouched(a)?, "its memory is still watched");
        ensure!(quota(a)? == before, "{} is not {before}", quota(a)?);
        here.verify()?;
        world.nothing_on_b()?;

        // And it can still go.
        fast(&a.migrate(ID)?)?;
        Workload::of(&world.b, ID)?.verify()?;
        world.remove(&world.b, ID)
    })
}

/// Killed while its pages are still on their way: no page has anybody to go
/// to, and nothing of them stays.
#[test]
fn one_that_is_killed_while_it_is_filled_leaves_nothing() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world, &["--mib", "256", "--processes", "2"])?;
        fast(&a.migrate(ID)?)?;
        world.remove(b, ID)?;
        for site in [a, b] {
            site.ctr_ok(&["image", "rm", "--sync", Image::Workload.reference()])?;
        }
        world.nothing_left()
    })
}

/// The kernel would give it zeros for the pages that nobody brings any more;
/// its guardian sees to it that nobody reads them.
#[test]
fn it_does_not_outlive_a_shim_that_is_killed_while_it_is_filled() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        // Filled faster than we look, now and then: then it goes back for
        // another try.
        let mut sites = [a, b];
        start(world, &["--mib", "384", "--rate", "5"])?;
        for _ in 0..6 {
            let [from, to] = sites;
            let command = from.begin(&["migrate", ID, "--to", to.name()])?;
            let shim = "pkill -STOP -f '^[^ ]*containerd-shim-transship-v2 .*-id memory'";
            eventually("it to run there", || Ok(to.status(ID).is_ok_and(|one| one == "RUNNING")))?;
            to.sh(shim)?;
            if let Some(pid) = served(to)? {
                // Which would clean up after the shim, and kill it as well.
                to.sh("pkill -STOP -x containerd")?;
                to.sh(&shim.replace("STOP", "KILL"))?;
                let gone = eventually("it to be gone", || {
                    Ok(to.sh(&format!("! test -d /proc/{pid}")).is_ok())
                });
                to.sh("pkill -CONT -x containerd")?;
                drop(command);
                return gone;
            }
            to.sh(&shim.replace("STOP", "CONT"))?;
            command.end()?.map_err(|refused| anyhow::anyhow!("{refused:#?}"))?;
            sites.reverse();
        }
        anyhow::bail!("its memory was always there before we looked")
    })
}

/// Other clients see nothing of the filling: the container runs.
#[test]
fn everything_works_while_it_is_filled() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        start(world, &["--mib", "256", "--rate", "5"])?;
        fast(&a.migrate(ID)?)?;
        ensure!(b.status(ID)? == "RUNNING");
        ensure!(b.exec_in(ID, &["echo", "hello"])?.ok()?.trim() == "hello");
        b.ctr_ok(&["task", "pause", ID])?;
        ensure!(b.status(ID)? == "PAUSED");
        b.ctr_ok(&["task", "resume", ID])?;
        let pages = until("its answer", || Ok(Some(Workload::of(b, ID)?.verify()?)))?;
        ensure!(pages >= 256 << 8);
        // It waits for the last page, and has them all.
        let images = b.dir().join("images");
        b.ctr_ok(&["task", "checkpoint", "--image-path", &images.to_string_lossy(), ID])?;
        ensure!(Workload::of(b, ID)?.verify()? == pages);
        world.remove(b, ID)
    })
}

/// A CRIU that goes back to where it can see every page: all of them travel
/// in its images, and arrive as well.
#[test]
fn a_criu_that_sees_every_page_saves_them_all() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        a.precede(
            "criu",
            "[ \"$(readlink /proc/self/ns/mnt)\" = \"$(readlink /proc/1/ns/mnt)\" ] || \
               exec nsenter --mount=/proc/1/ns/mnt \"$real\" \"$@\"",
        )?;
        start(world, &["--mib", "64", "--processes", "2"])?;
        let report = a.migrate(ID)?;
        let memory = &report["memory"];
        // Whether we hear of it in time to say so is up to how fast it goes
        // there.
        let said = memory["dump"] == "ordinary" && memory["fallback"] != "";
        let seen = number(memory, "criu_pages")? >= 64 << 8;
        ensure!(said || seen, "{report:#}");
        ensure!(number(&report, "image_bytes")? > 64 << 20, "{report:#}");
        Workload::of(b, ID)?.verify()?;
        world.remove(b, ID)
    })
}
