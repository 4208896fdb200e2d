//! What arrives: the processes, their connection, their files, their streams.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use transship_integration::{agents::Site, events::Event, eventually, images::Image, until};

use crate::world::{
    COUNTER, World, connections, count, counts_on, refused_with, runs_on, with_agents,
};

#[test]
fn redis_goes_and_comes_back_with_its_connection() -> Result<()> {
    with_agents(|world| {
        there_and_back(world, &[])?;
        world.nothing_left()
    })
}

/// The same under the other OCI runtime, chosen by the container's options.
#[test]
fn redis_goes_and_comes_back_with_crun() -> Result<()> {
    with_agents(|world| {
        for site in [&world.a, &world.b] {
            site.suit_crun()?;
        }
        let options = world.a.dir().join("crun.toml");
        fs::write(&options, "BinaryName = \"crun\"\n")?;
        there_and_back(world, &["--runtime-config-path", &options.to_string_lossy()])?;
        // CRIU makes the container's group in every hierarchy of the kernel,
        // and in one that the node has not mounted crun does not find it.
        world.nothing_left_but(|one| one.starts_with("cgroup /sys/fs/cgroup/unified "))
    })
}

fn there_and_back(world: &World, flags: &[&str]) -> Result<()> {
    let World { a, b, .. } = world;
    let script = "redis-server --save '' --protected-mode no > /dev/null & \
                      redis-writer 127.0.0.1:6379 500 & wait";
    world.start_of(a, Image::Redis, "redis", flags, &["sh", "-c", script])?;
    writes_beyond(a, 10)?;
    let connection = connections(a, "redis")?;
    ensure!(connection.len() == 2, "both ends of one connection: {connection:?}");

    let there = a.migrate("redis")?;
    arrived(&there, "a", "b")?;
    ensure!(there["content_bytes"].as_u64() > Some(1 << 20), "the image is streamed: {there}");
    ensure!(a.status("redis")? == "NONE" && b.status("redis")? == "RUNNING");
    ensure!(there["target_pid"] == b.task_pid("redis")?, "{there}");
    every_key(b)?;
    ensure!(
        connections(b, "redis")? == connection,
        "{:?} is not {connection:?}",
        connections(b, "redis")?
    );

    let back = b.migrate("redis")?;
    arrived(&back, "b", "a")?;
    ensure!(back["content_bytes"] == 0, "the image is there: {back}");
    every_key(a)?;
    ensure!(
        connections(a, "redis")? == connection,
        "{:?} is not {connection:?}",
        connections(a, "redis")?
    );

    world.remove(a, "redis")?;
    for site in [a, b] {
        site.ctr_ok(&["image", "rm", "--sync", Image::Redis.reference()])?;
    }
    Ok(())
}

fn arrived(report: &Value, from: &str, to: &str) -> Result<()> {
    ensure!(report["source"] == from && report["target"] == to, "{report}");
    ensure!(report["source_state"] == "DELETED", "{report}");
    ensure!(report["target_state"] == "RUNNING", "{report}");
    let number = |name: &str| report[name].as_u64().with_context(|| format!("{name}: {report}"));
    let (pause, total) = (number("downtime_us")?, number("total_us")?);
    ensure!(0 < pause && pause < total, "{report}");
    ensure!(number("image_bytes")? > 10_000, "{report}");
    let phases = report["phases"].as_array().context("phases")?;
    let names: Vec<_> = phases.iter().filter_map(|phase| phase["phase"].as_str()).collect();
    let wanted = ["inspect", "connect", "content", "freeze", "dump", "restore", "commit"];
    ensure!(wanted.iter().all(|name| names.contains(name)), "{names:?}");
    ensure!(report["migration"].as_str().is_some_and(|id| id.len() == 32), "{report}");
    Ok(())
}

fn redis(site: &Site, command: &str) -> Result<String> {
    let done = site.exec_in("redis", &["sh", "-c", &format!("redis-cli {command}")])?;
    Ok(done.ok()?.trim().to_owned())
}

fn acked(site: &Site) -> Result<u64> {
    Ok(redis(site, "get w:acked")?.parse().unwrap_or_default())
}

fn writes_beyond(site: &Site, start: u64) -> Result<u64> {
    until(&format!("writes beyond {start}"), || {
        Ok(Some(acked(site)?).filter(|number| *number > start))
    })
}

/// Whatever was confirmed is there, and the writer goes on.
fn every_key(site: &Site) -> Result<()> {
    let last = acked(site)?;
    let script =
        format!("for n in $(seq 1 {last}); do echo exists w:$n; done | redis-cli | sort | uniq -c");
    let found = site.exec_in("redis", &["sh", "-c", &script])?.ok()?;
    ensure!(found.split_whitespace().eq([&*last.to_string(), "1"]), "of {last}: {found}");
    writes_beyond(site, last)?;
    Ok(())
}

/// The parts of a process that a user would miss, and files of every kind.
#[test]
fn a_container_arrives_with_all_that_is_its_own() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        let id = "whole";
        let log = a.dir().join("whole.log");
        let flags = [
            "--env",
            "TRAVELS=by night",
            "--hostname",
            "wanderer",
            "--user",
            "65534:65533",
            "--cwd",
            "/var",
            "--log-uri",
            &format!("file://{}", log.display()),
        ];
        let script = format!("trap 'exit 7' TERM; {}", COUNTER.replace("sleep", "echo $i; sleep"));
        world.start(a, id, &flags, &script)?;
        as_root(a, id, CHANGES)?;
        let before = (as_root(a, id, LISTING)?, process(a, id)?);
        let started = count(a, id)?;

        let api = b.api()?;
        let events = api.events()?;
        let report = a.migrate(id)?;
        ensure!(report["rootfs_bytes"].as_u64() > Some(3 << 20), "{report}");
        let after = (as_root(b, id, LISTING)?, process(b, id)?);
        differ(&before.0, &after.0)?;
        ensure!(after.1 == before.1, "{:#?}\nis not\n{:#?}", after.1, before.1);
        ensure!(as_root(b, id, "hostname")?.trim() == "wanderer");
        counts_on(b, id, started)?;

        b.ctr_ok(&["task", "pause", id])?;
        ensure!(b.status(id)? == "PAUSED");
        let still = count(b, id)?;
        b.ctr_ok(&["task", "resume", id])?;
        counts_on(b, id, still)?;

        b.ctr_ok(&["task", "kill", "-s", "TERM", id])?;
        let exit = until("its exit", || {
            let own = |e: &Event| e.what == "exit" && e.process == id;
            Ok(events.of(id).into_iter().find(own))
        })?;
        ensure!(exit.status == 7, "{exit:?}");
        deleted_with(b, id, 7)?;
        b.ctr_ok(&["container", "rm", id])?;
        every_line(&fs::read_to_string(&log)?)?;
        forget_image(world)?;
        world.nothing_left()
    })
}

const CHANGES: &str = "set -e
mkdir -p /data/deep/er
echo new > /data/deep/er/file
chown 1000:1001 /data/deep/er/file; chmod 4750 /data/deep/er/file
chmod 1777 /data/deep
ln /data/deep/er/file /data/second-name
ln -s /data/deep /data/link; ln -s nowhere /data/dangling
mkfifo /data/fifo; mknod /data/null c 1 3
dd if=/dev/urandom of=/data/random bs=1M count=3 2> /dev/null
truncate -s 5000000 /data/sparse; echo end >> /data/sparse
touch -t 200102030405 /data/old; touch '/data/a name
of two lines'
echo changed:x:7:7::/:/bin/sh >> /etc/passwd
rm /etc/group
rmdir /usr/sbin; echo a file now > /usr/sbin
rmdir /home; mkdir -m 700 /home
chown 12:34 /root";

/// Everything but what changes while we look. Size and links of a directory
/// are the file system's own business.
const LISTING: &str =
    "find /bin /sbin /usr /etc /var /data /home /root /lib /lib64 -xdev > /tmp/all
sort /tmp/all | while read -r one; do
  if [ -d \"$one\" ] && [ ! -L \"$one\" ]; then stat -c '%f %u %g %Y %n' \"$one\"
  else stat -c '%f %u %g %s %h %t:%T %Y %N' \"$one\"; fi
done 2>&1
find /data /etc /usr/sbin -type f -exec md5sum {} + | sort; du -k /data/sparse";

fn as_root(site: &Site, id: &str, script: &str) -> Result<String> {
    site.ctr_ok(&["task", "exec", "--exec-id", "root", "--user", "0:0", id, "sh", "-c", script])
}

/// What the kernel says of the first process.
fn process(site: &Site, id: &str) -> Result<Vec<String>> {
    let pid = site.task_pid(id)?;
    let script = format!(
        "cd /proc/{pid}; tr '\\0' '\\n' < environ; readlink cwd; tr '\\0' ' ' < cmdline; echo; \
         grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|SigCgt|NSpid)' status | \
         sed 's/^NSpid.*\\t/NSpid /'; cat oom_score_adj; grep -E 'open files|processes' limits; \
         sed 's/.*://' cgroup | sort -u"
    );
    Ok(site.sh(&script)?.lines().map(str::to_owned).collect())
}

fn differ(before: &str, after: &str) -> Result<()> {
    let only = |one: &str, other: &str| -> Vec<String> {
        one.lines().filter(|line| !other.lines().any(|o| o == *line)).map(str::to_owned).collect()
    };
    ensure!(before == after, "gone: {:#?}\nnew: {:#?}", only(before, after), only(after, before));
    Ok(())
}

/// The log has every number once, in order, however often it moved.
fn every_line(log: &str) -> Result<()> {
    let numbers: Vec<u64> =
        log.lines().map(|line| line.trim().parse()).collect::<Result<_, _>>()?;
    let wanted: Vec<u64> = (1..=numbers.len() as u64).collect();
    ensure!(numbers == wanted && numbers.len() > 5, "the log is not complete: {numbers:?}");
    Ok(())
}

/// Deletes a stopped task; `ctr` tells its exit status in a warning.
fn deleted_with(site: &Site, id: &str, status: u32) -> Result<()> {
    let done = site.ctr(&["task", "rm", id])?;
    ensure!(done.code == 0 && done.stderr.contains(&format!("exit code {status}")), "{done:?}");
    Ok(())
}

fn forget_image(world: &World) -> Result<()> {
    world.b.ctr_ok(&["image", "rm", "--sync", Image::Busybox.reference()])?;
    Ok(())
}

/// With `--keep` the record stays, so the name is taken for a way back.
#[test]
fn a_kept_record_is_stopped_and_in_the_way() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        let id = "kept";
        world.start_counter(a, id, &[])?;
        let report = a.answer(&["migrate", id, "--to", "b", "--keep"])?;
        ensure!(report["source_state"] == "STOPPED", "{report}");
        ensure!(a.status(id)? == "STOPPED" && b.status(id)? == "RUNNING");

        let refused = refused_with(b.transship(&["migrate", id, "--to", "a"])?, "name-taken")?;
        ensure!(refused.reason.contains(id) && refused.remedy.contains("remove"), "{refused:?}");
        runs_on(b, id)?;

        // Killed without having run on.
        deleted_with(a, id, 137)?;
        a.ctr_ok(&["container", "rm", id])?;
        world.nothing_on_a()?;

        // Output nobody had read when it left is read on the target.
        world.remove(b, id)?;
        let script = format!("{}; done", COUNTER.replace("done", "echo number $i"));
        world.start(a, id, &[], &script)?;
        counts_on(a, id, 3)?;
        a.migrate(id)?;
        let attached = b.spawn("attach", &["ctr", "task", "attach", id])?;
        eventually("output on the target", || Ok(attached.output().contains("number ")))?;
        drop(attached);
        world.remove(b, id)?;
        forget_image(world)?;
        world.nothing_left()
    })
}
