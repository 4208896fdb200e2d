//! The harness keeps its own promises: nodes are apart from each other and
//! from the host, and leave nothing.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result};
use transship_integration::{Node, eventually, images::Image};

#[test]
fn two_nodes_run_a_container_of_the_same_name_and_leave_nothing() -> Result<()> {
    let (a, b) = Node::pair()?;
    let mut traces: Vec<PathBuf> = vec![a.dir().to_owned(), b.dir().to_owned()];
    for node in [&a, &b] {
        traces.push(node.cgroup("memory", "")?);
        traces.push(node.cgroup("pids", "")?);
        let image = node.image(Image::Busybox)?;
        let before = node.everything()?;
        node.ctr_ok(&["run", "-d", image, "same", "sleep", "1000"])?;
        assert_eq!(node.task_status("same")?.as_deref(), Some("RUNNING"));
        assert_eq!(node.sh("hostname")?.trim(), node.name());
        let memory = node.cgroup("memory", "default/same")?;
        assert!(memory.is_dir(), "{} is the container's cgroup", memory.display());
        assert!(!node.everything()?.beyond(&before).is_empty(), "a running container is seen");
        node.ctr_ok(&["task", "kill", "-s", "KILL", "same"])?;
        eventually("same to stop", || Ok(node.task_status("same")?.as_deref() == Some("STOPPED")))?;
        node.ctr_ok(&["task", "rm", "same"])?;
        node.ctr_ok(&["container", "rm", "same"])?;
        node.nothing_left(&before)?;
    }
    a.ok(&["busybox", "ping", "-c", "1", "-W", "5", b.address()?])?;
    drop((a, b));
    for trace in traces {
        assert!(!trace.exists(), "{} is left", trace.display());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    assert!(
        !mounts.contains("/run/containerd/io.containerd.runtime.v2.task"),
        "mounts stay in the node"
    );
    Ok(())
}

#[test]
fn every_image_runs() -> Result<()> {
    let node = Node::start("images")?;
    for (image, command, expected) in [
        (Image::Busybox, &["echo", "hello"][..], "hello"),
        (Image::Redis, &["redis-server", "--version"], "Redis server v="),
        (Image::Postgres, &["postgres", "--version"], "postgres (PostgreSQL)"),
        (Image::Python, &["python3", "-c", "import ssl, ctypes, json; print(6 * 7)"], "42"),
    ] {
        let reference = node.image(image)?;
        let mut arguments = vec!["run", "--rm", reference, "one"];
        arguments.extend(command);
        let output = node.ctr_ok(&arguments)?;
        assert!(output.contains(expected), "{reference}: {output}");
    }
    let pause = node.image(Image::Pause)?;
    node.ctr_ok(&["run", "-d", pause, "pod"])?;
    assert_eq!(node.task_status("pod")?.as_deref(), Some("RUNNING"));
    Ok(())
}

/// However the harness ends, the node ends with it: here it is killed.
#[test]
fn a_node_goes_with_its_harness() -> Result<()> {
    let mut harness = Command::new(env::current_exe()?)
        .args(["--exact", "keeps_a_node", "--ignored", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()?;
    let lines =
        BufReader::new(harness.stdout.take().context("output of the other harness")?).lines();
    let traces: Vec<PathBuf> = lines
        .map_while(Result::ok)
        .filter_map(|line| line.strip_prefix("TRACE ").map(PathBuf::from))
        .take(2)
        .collect();
    assert!(traces.len() == 2 && traces.iter().all(|trace| trace.exists()), "{traces:?}");
    harness.kill()?;
    harness.wait()?;
    for trace in traces {
        eventually(&format!("{} to be gone", trace.display()), || Ok(!Path::new(&trace).exists()))?;
    }
    Ok(())
}

#[test]
#[ignore = "the other process of a_node_goes_with_its_harness"]
fn keeps_a_node() -> Result<()> {
    let node = Node::start("kept")?;
    node.ctr_ok(&["run", "-d", node.image(Image::Busybox)?, "one", "sleep", "1000"])?;
    println!(
        "\nTRACE {}\nTRACE {}",
        node.dir().display(),
        node.cgroup("memory", "default/one")?.display()
    );
    loop {
        thread::park();
    }
}
