//! What arrives: the processes, their connection, their files, their streams.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use transship_integration::{agents::Site, eventually, images::Image, until};

use crate::world::{World, read, runs_on, with_agents};

#[test]
fn redis_goes_and_comes_back_with_its_connection() -> Result<()> {
    with_agents(|world| {
        let World { a, b, .. } = world;
        let script = "redis-server --save '' --protected-mode no > /dev/null & \
                      redis-writer 127.0.0.1:6379 500 & wait";
        world.start_of(a, Image::Redis, "redis", &[], &["sh", "-c", script])?;
        writes_beyond(a, 10)?;
        let connection = connections(a)?;
        ensure!(connection.len() == 2, "both ends of one connection: {connection:?}");

        let there = a.migrate("redis")?;
        arrived(&there, "a", "b")?;
        ensure!(there["content_bytes"].as_u64() > Some(1 << 20), "the image is streamed: {there}");
        ensure!(a.status("redis")? == "NONE" && b.status("redis")? == "RUNNING");
        ensure!(there["target_pid"] == b.task_pid("redis")?, "{there}");
        every_key(b)?;
        ensure!(connections(b)? == connection, "{:?} is not {connection:?}", connections(b)?);

        let back = b.migrate("redis")?;
        arrived(&back, "b", "a")?;
        ensure!(back["content_bytes"] == 0, "the image is there: {back}");
        every_key(a)?;
        ensure!(connections(a)? == connection, "{:?} is not {connection:?}", connections(a)?);

        world.remove(a, "redis")?;
        for site in [a, b] {
            site.ctr_ok(&["image", "rm", "--sync", Image::Redis.reference()])?;
        }
        world.nothing_left()
    })
}

fn arrived(report: &Value, from: &str, to: &str) -> Result<()> {
    ensure!(report["source"] == from && report["target"] == to, "{report}");
    ensure!(report["source_state"] == "DELETED", "{report}");
    ensure!(report["target_state"] == "RUNNING", "{report}");
    let number = |name: &str| report[name].as_u64().with_context(|| format!("{name}: {report}"));
    let (pause, total) = (number("downtime_us")?, number("total_us")?);
    ensure!(0 < pause && pause < total, "{report}");
    ensure!(number("image_bytes")? > 100_000, "{report}");
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

/// Established connections to Redis, by both addresses.
fn connections(site: &Site) -> Result<Vec<String>> {
    let pid = site.task_pid("redis")?;
    let text = site.sh(&format!("cat /proc/{pid}/net/tcp"))?;
    let mut found: Vec<_> = text
        .lines()
        .map(|line| line.split_whitespace().skip(1).take(3).collect::<Vec<_>>())
        // 01: established (tcp_states.h). Those of redis-cli are gone.
        .filter(|fields| fields.get(2) == Some(&"01"))
        .map(|fields| fields.join(" "))
        .collect();
    found.sort();
    Ok(found)
}
