//! Each thing a container may have, checkpointed and restored.

use std::{fs, path::Path};

use anyhow::{Result, ensure};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use transship_integration::{eventually, images::Image, until};

use crate::world::World;

/// Runs a counter with `prelude`, checkpoints it with its end and restores
/// it; `probe` must print the same before and after, and the count go on.
fn survives(id: &str, flags: &[&str], prelude: &str, probe: &str) -> Result<String> {
    let world = World::start(id)?;
    world.run_counter(id, flags, prelude)?;
    let seen = world.inside(id, probe)?;
    let options = world.options(id);
    survives_in(&world, id, &options, probe, &seen)?;
    world.remove(id)?;
    world.nothing_left()?;
    Ok(seen)
}

fn survives_in(
    world: &World,
    id: &str,
    options: &CheckpointOptions,
    probe: &str,
    seen: &str,
) -> Result<()> {
    let count = world.count(id)?;
    world.checkpoint(id, options)?;
    world.restore(id)?;
    let after = world.inside(id, probe)?;
    ensure!(after == seen, "{id}: before\n{seen}\nafter\n{after}");
    world.count_beyond(id, count)?;
    Ok(())
}

/// Mount point, root, options and type of every mount, in order of its path.
/// What masks a file is `/dev/null` before and after, once the container's and
/// once the host's.
const MOUNTS: &str = "awk '{ t=$0; sub(/.* - /, \"\", t); split(t, f, \" \"); \
                      if ($4 == \"/null\") print $5, $4; else print $5, $4, $6, f[1] }' \
                      /proc/1/mountinfo | sed 's/,relatime//' | sort";

#[test]
fn external_bind_mounts() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut flags = Vec::new();
    for name in ["hosts", "hostname", "resolv.conf"] {
        let file = dir.path().join(name);
        fs::write(&file, format!("this is {name}\n"))?;
        flags.push(format!(
            "--mount=type=bind,src={},dst=/etc/{name},options=rbind:ro",
            file.display()
        ));
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let probe = format!("cat /etc/hosts /etc/hostname /etc/resolv.conf; {MOUNTS}");
    let seen = survives("binds", &flags, "", &probe)?;
    ensure!(seen.contains("this is hosts") && seen.contains("/etc/resolv.conf"), "{seen}");
    Ok(())
}

#[test]
fn masked_and_read_only_paths_of_proc() -> Result<()> {
    let probe = format!("cat /proc/keys /proc/timer_list | wc -c; {MOUNTS}");
    let seen = survives("masked", &[], "", &probe)?;
    ensure!(seen.starts_with("0\n") && seen.contains("/proc/keys /null\n"), "{seen}");
    Ok(())
}

#[test]
fn read_only_root() -> Result<()> {
    let flags = ["--read-only", "--mount=type=tmpfs,src=tmpfs,dst=/tmp,options=rw"];
    let probe = format!("touch /x 2>&1; {MOUNTS}");
    let seen = survives("readonly", &flags, "", &probe)?;
    ensure!(seen.contains("Read-only file system"), "{seen}");
    Ok(())
}

#[test]
fn tmpfs_and_shared_memory() -> Result<()> {
    let flags = ["--mount=type=tmpfs,src=tmpfs,dst=/scratch,options=rw:size=1048576"];
    let prelude = "echo in-tmpfs > /scratch/file; echo in-shm > /dev/shm/file";
    let probe = format!("cat /scratch/file /dev/shm/file; {MOUNTS}");
    let seen = survives("tmpfs", &flags, prelude, &probe)?;
    ensure!(seen.contains("in-tmpfs\nin-shm\n"), "{seen}");
    Ok(())
}

#[test]
fn deleted_files_that_are_open() -> Result<()> {
    let prelude = "
        echo small > /tmp/a; exec 3</tmp/a; rm /tmp/a
        dd if=/dev/urandom of=/tmp/b bs=1M count=3 2>/dev/null; exec 4</tmp/b; rm /tmp/b
        echo linked > /tmp/c; ln /tmp/c /tmp/d; exec 5</tmp/c; rm /tmp/c";
    let probe = "for fd in 3 4 5; do md5sum < /proc/1/fd/$fd; done; ls /tmp";
    let seen = survives("deleted", &[], prelude, probe)?;
    ensure!(seen.lines().count() == 5, "{seen}");
    Ok(())
}

#[test]
fn seccomp_filter() -> Result<()> {
    let seen = survives("seccomp", &["--seccomp"], "", "grep -E '^Seccomp' /proc/1/status")?;
    ensure!(seen.contains("Seccomp:\t2"), "{seen}");
    Ok(())
}

#[test]
fn limits_of_the_cgroup() -> Result<()> {
    let world = World::start("limits")?;
    let id = "limits";
    let flags = ["--memory-limit", "67108864", "--cpus", "0.5"];
    world.run_counter(id, &flags, "")?;
    let limits = || -> Result<Vec<String>> {
        let names: &[(&str, &str)] = if world.node.is_v1("memory") {
            &[
                ("memory", "memory.limit_in_bytes"),
                ("cpu", "cpu.cfs_quota_us"),
                ("pids", "pids.max"),
            ]
        } else {
            &[("memory", "memory.max"), ("cpu", "cpu.max"), ("pids", "pids.max")]
        };
        let read = |(controller, file): &(&str, &str)| {
            let path = world.node.cgroup(controller, &format!("default/{id}"))?.join(file);
            Ok(fs::read_to_string(path)?.trim().to_owned())
        };
        names.iter().map(read).collect()
    };
    let before = limits()?;
    ensure!(before[0] == "67108864" && before[1].starts_with("50000"), "{before:?}");
    survives_in(&world, id, &world.options(id), "true", "")?;
    ensure!(limits()? == before, "{:?} is not {before:?}", limits()?);
    world.node.ctr_ok(&["task", "metrics", id])?;
    world.remove(id)
}

#[test]
fn a_process_that_must_not_be_dumped() -> Result<()> {
    let world = World::start("nondumpable")?;
    let id = "nondumpable";
    // PR_SET_DUMPABLE 4, PR_GET_DUMPABLE 3.
    let program = "import ctypes, time
libc = ctypes.CDLL(None)
libc.prctl(4, 0)
count = 0
while True:
    count += 1
    open('/tmp/dumpable', 'w').write(str(libc.prctl(3)))
    open('/tmp/count.new', 'w').write(str(count))
    import os; os.rename('/tmp/count.new', '/tmp/count')
    time.sleep(0.05)";
    world.run(Image::Python, id, &[], &["python3", "-c", program])?;
    world.count_beyond(id, 2)?;
    survives_in(&world, id, &world.options(id), "cat /tmp/dumpable", "0")?;
    world.remove(id)
}

#[test]
fn established_tcp_and_file_locks() -> Result<()> {
    let world = World::start("tcp")?;
    let id = "tcp";
    let program = "import fcntl, os, socket, time
listener = socket.create_server(('127.0.0.1', 5000))
near = socket.create_connection(('127.0.0.1', 5000))
far, _ = listener.accept()
lock = open('/tmp/lock', 'w')
fcntl.flock(lock, fcntl.LOCK_EX)
count = 0
while True:
    count += 1
    near.sendall(b'%10d' % count)
    got = far.recv(10, socket.MSG_WAITALL)
    assert int(got) == count, got
    open('/tmp/count.new', 'w').write(str(count))
    os.rename('/tmp/count.new', '/tmp/count')
    time.sleep(0.02)";
    world.run(Image::Python, id, &[], &["python3", "-c", program])?;
    world.count_beyond(id, 2)?;
    let locked = "flock -n /tmp/lock true && echo free || echo locked";
    ensure!(world.inside(id, locked)? == "locked\n");

    // Without leave to do so CRIU refuses, and the container goes on.
    let refused = format!("{:#}", world.api.checkpoint(id, &world.options(id)).unwrap_err());
    ensure!(refused.contains("tcp") || refused.contains("lock"), "{refused}");
    ensure!(world.status(id)? == "RUNNING");
    world.count_beyond(id, world.count(id)?)?;
    fs::remove_dir_all(world.images_of(id))?;

    let options = CheckpointOptions { open_tcp: true, file_locks: true, ..world.options(id) };
    survives_in(&world, id, &options, locked, "locked\n")?;
    world.remove(id)
}

#[test]
fn a_terminal() -> Result<()> {
    let world = World::start("tty")?;
    let id = "tty";
    let log = world.node.dir().join("first.log");
    let script = "i=0; while true; do i=$((i+1)); echo count $i; sleep 0.05; done";
    world.create(id, &["-t"], script)?;
    world.api.create(id, None, Some(&log), true)?;
    world.api.start(id)?;
    eventually("output on the terminal", || {
        Ok(fs::read_to_string(&log).unwrap_or_default().contains("count 3"))
    })?;
    world.api.resize(id, 100, 30)?;
    let size = "stty size < /proc/1/fd/0; tty < /proc/1/fd/0";
    let before = world.inside(id, size)?;
    ensure!(before.starts_with("30 100\n"), "{before}");
    world.checkpoint(id, &world.options(id))?;

    let log = world.node.dir().join("second.log");
    world.api.create(id, Some(&world.images_of(id)), Some(&log), true)?;
    world.api.start(id)?;
    let first = until("output on the restored terminal", || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let complete = text.rfind('\n').map(|end| text[..end].to_owned()).unwrap_or_default();
        Ok(complete
            .lines()
            .find_map(|line| line.trim().strip_prefix("count ")?.parse::<u64>().ok()))
    })?;
    ensure!(first > 3, "it counts from {first}");
    world.api.resize(id, 120, 40)?;
    let after = world.inside(id, size)?;
    ensure!(after.starts_with("40 120\n"), "{after}");
    world.remove(id)
}

/// CRIU and the OCI runtime run with the container's own output while they
/// restore it; none of their words may be in it.
#[test]
fn output_goes_on_and_is_the_containers_alone() -> Result<()> {
    let world = World::start("output")?;
    let id = "output";
    let log = world.node.dir().join("first.log");
    let script =
        "i=0; while true; do i=$((i+1)); echo count $i; echo count $i >&2; sleep 0.05; done";
    let flags = ["--log-uri", &format!("file://{}", log.display())];
    world.run(Image::Busybox, id, &flags, &["sh", "-c", script])?;
    let counts = |log: &Path| fs::read_to_string(log).unwrap_or_default();
    eventually("output", || Ok(counts(&log).contains("count 3\n")))?;
    world.checkpoint(id, &world.options(id))?;
    let last = counts(&log).lines().count();

    let log = world.node.dir().join("second.log");
    world.api.create(id, Some(&world.images_of(id)), Some(&log), false)?;
    world.api.start(id)?;
    eventually("output again", || Ok(counts(&log).lines().count() > 10))?;
    for line in counts(&log).lines() {
        ensure!(line.starts_with("count "), "{line:?} is not of the container");
    }
    ensure!(last >= 3);
    world.remove(id)
}

/// crun reaches CRIU through a library, and wants no notifications of a dump.
#[test]
fn with_crun() -> Result<()> {
    let world = World::start("crun")?;
    let id = "crun";
    // crun takes no host with both kinds of cgroups.
    world.node.sh("umount /sys/fs/cgroup/unified || true")?;
    let script = "i=0; while true; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done";
    world.create(id, &[], script)?;
    world.api.create_with(id, None, None, false, "/usr/bin/crun")?;
    world.api.start(id)?;
    world.count_beyond(id, 2)?;
    let options = CheckpointOptions { exit: false, ..world.options(id) };
    world.api.checkpoint(id, &options)?;
    ensure!(world.status(id)? == "RUNNING");
    world.count_beyond(id, world.count(id)?)?;
    fs::remove_dir_all(world.images_of(id))?;

    let count = world.count(id)?;
    world.checkpoint(id, &world.options(id))?;
    world.restore_with(id, "/usr/bin/crun")?;
    world.count_beyond(id, count)?;
    ensure!(world.inside(id, "echo hello")? == "hello\n");
    world.remove(id)
}

#[test]
fn what_is_restored_is_like_any_other_container() -> Result<()> {
    let world = World::start("alive")?;
    let id = "alive";
    world.run_counter(id, &[], "trap 'exit 7' TERM")?;
    world.checkpoint(id, &world.options(id))?;
    let pid = world.restore(id)?;
    // A child of the shim, which therefore sees its end.
    let parent = world.node.sh(&format!("awk '/^PPid/ {{ print $2 }}' /proc/{pid}/status"))?;
    let name = world.node.sh(&format!("cat /proc/{}/comm", parent.trim()))?;
    ensure!(name.starts_with("containerd-shim"), "its parent is {name}");

    world.node.ctr_ok(&["task", "pause", id])?;
    ensure!(world.status(id)? == "PAUSED");
    let still = world.count(id)?;
    world.node.ctr_ok(&["task", "resume", id])?;
    world.count_beyond(id, still)?;

    // Once more, of what was restored.
    fs::remove_dir_all(world.images_of(id))?;
    world.checkpoint(id, &world.options(id))?;
    world.restore(id)?;
    world.count_beyond(id, still)?;

    world.node.ctr_ok(&["task", "kill", "-s", "TERM", id])?;
    ensure!(world.api.wait(id)? == 7, "its own exit status is lost");
    world.delete_task(id)?;
    world.node.ctr_ok(&["container", "rm", id])?;
    world.nothing_left()
}
