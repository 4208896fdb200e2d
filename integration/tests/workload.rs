//! The workload tells the truth: what moves memory is judged by it.

use std::{fs, os::unix::fs::FileExt};

use anyhow::{Context, Result};
use transship_integration::{Node, eventually, images::Image, workload::Workload};

#[test]
fn all_pages_are_checked_while_they_are_written() -> Result<()> {
    let node = Node::start("workload")?;
    let workload =
        start(&node, &["--mib", "8", "--processes", "2", "--threads", "2", "--rate", "20"])?;
    assert_eq!(workload.verify()?, 8 * 256);
    let before = workload.ask("stats")?.dirtied;
    eventually("pages to be written", || Ok(workload.ask("stats")?.dirtied > before + 1000))?;
    assert_eq!(workload.verify()?, 8 * 256);
    // And none any more, once it is told so.
    workload.ask("rate 0")?;
    let still = workload.ask("stats")?.dirtied;
    assert_eq!(workload.ask("stats")?.dirtied, still);
    Ok(())
}

#[test]
fn one_wrong_byte_is_found() -> Result<()> {
    let node = Node::start("workload")?;
    let workload = start(&node, &["--mib", "4"])?;
    let pid = node.task_pid("memory")?;
    let process = node.path(format!("/proc/{pid}"));
    let maps = fs::read_to_string(process.join("maps"))?;
    // The only mapping of that size; in its middle there are pages.
    let range = maps.lines().find_map(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let bound = |text| u64::from_str_radix(text, 16).ok();
        Some((bound(start)?, bound(end)?)).filter(|(start, end)| (end - start) >> 20 == 4)
    });
    let (start, end) = range.with_context(|| format!("the workload's memory in {maps}"))?;
    let memory = fs::OpenOptions::new().read(true).write(true).open(process.join("mem"))?;
    let at = start + (end - start) / 2 + 77;
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at)?;
    memory.write_all_at(&[byte[0] ^ 0x10], at)?;
    let found = workload.ask("verify")?;
    assert_eq!((found.pages, found.bad), (4 * 256, 1));
    assert!(workload.verify().is_err());
    Ok(())
}

fn start(node: &Node, arguments: &[&str]) -> Result<Workload> {
    let image = node.image(Image::Workload)?;
    let mut command = vec!["run", "-d", image, "memory", "workload"];
    command.extend(arguments);
    node.ctr_ok(&command)?;
    Workload::of(node, "memory")
}
