//! The demonstration behind `make demo`: a Redis with data and a client that
//! keeps writing moves from node a to node b and back.
//!
//! What happens is told on standard error; the last line, on standard output,
//! is JSON. The exit status is 0 only if every key is there and both daemons
//! tell the truth.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use transship_integration::{
    agents::{Pair, Site},
    eventually,
    images::Image,
    until,
};

/// Keys that are there before anything moves.
const KEYS: u64 = 100_000;

/// What runs in the container: a server, and a client that writes over one
/// connection. Neither can go on without the other.
const COMMAND: &str = "redis-server --save '' --protected-mode no --enable-debug-command yes &
    redis-writer 127.0.0.1:6379 1000";

/// Confirmed writes that a node must see after each move.
const PROGRESS: u64 = 100;

fn main() -> ExitCode {
    match demo() {
        Ok(result) => {
            println!("{result}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The last line; fields in the order they are read.
#[derive(Serialize)]
struct Summary {
    moved: usize,
    /// What the client saw, once per move.
    pause_ms: Vec<f64>,
    /// Keys of the data set that hold their value.
    keys_before: u64,
    keys_after: u64,
    source_state: String,
    target_state: String,
}

fn demo() -> Result<String> {
    say("starting nodes a and b: containerd and transshipd in each");
    let Pair { a, b } = Pair::start()?;
    let image = a.image(Image::Redis)?;
    say("starting redis on a, with a client that writes all the time");
    let runtime = "io.containerd.transship.v2";
    a.ctr_ok(&["run", "-d", "--runtime", runtime, image, "redis", "sh", "-c", COMMAND])?;
    eventually("the client to write", || Ok(number(&a, &["get", "w:acked"])? > 0))?;
    redis(&a, &["debug", "populate", &KEYS.to_string(), "key", "100"])?;
    let keys_before = intact(&a)?;
    say(&format!("{keys_before} keys on a"));
    ensure!(keys_before == KEYS, "redis has {keys_before} keys of {KEYS}");

    let mut pauses = Vec::new();
    for (from, to) in [(&a, &b), (&b, &a)] {
        pauses.push(move_once(from, to)?);
    }
    let keys_after = intact(&a)?;
    ensure!(keys_after == keys_before, "{keys_before} keys before, {keys_after} after");
    verify(&a)?;
    let (source_state, target_state) = (b.status("redis")?, a.status("redis")?);
    let moved = pauses.len();
    let summary =
        Summary { moved, pause_ms: pauses, keys_before, keys_after, source_state, target_state };
    Ok(serde_json::to_string(&summary)?)
}

/// Keys of the data set that hold the value which `DEBUG POPULATE` gave them.
fn intact(node: &Site) -> Result<u64> {
    const COUNT: &str = "local good = 0 \
        for i = 0, tonumber(ARGV[1]) - 1 do \
          local value = redis.call('get', 'key:' .. i) \
          local wanted = 'value:' .. i \
          if value and string.sub(value, 1, #wanted) == wanted then good = good + 1 end \
        end \
        return good";
    number(node, &["eval", COUNT, "0", &KEYS.to_string()])
}

/// Moves the container; how long the client had to wait, in milliseconds.
fn move_once(from: &Site, to: &Site) -> Result<f64> {
    redis(from, &["del", "w:gap_us"])?;
    let report = from.migrate("redis")?;
    let reached = number(to, &["get", "w:acked"])?;
    eventually("the client to go on", || {
        Ok(number(to, &["get", "w:acked"])? >= reached + PROGRESS)
    })?;
    let pause = number(to, &["get", "w:gap_us"])? as f64 / 1000.0;
    let own = report["downtime_us"].as_f64().context("downtime_us in the report")? / 1000.0;
    say(&format!(
        "{} -> {}: the client waited {pause:.1} ms (by our own count {own:.1} ms)",
        from.name(),
        to.name()
    ));
    let (here, there) = (from.status("redis")?, to.status("redis")?);
    ensure!(here == "NONE" && there == "RUNNING", "source says {here}, target {there}");
    Ok((pause * 10.0).round() / 10.0)
}

/// Every key that the client had confirmed holds what it wrote.
fn verify(node: &Site) -> Result<()> {
    const CHECK: &str = "local n = tonumber(redis.call('get', 'w:acked')) \
        for i = 1, n do \
          if redis.call('get', 'w:' .. i) ~= tostring(i) then return 'w:' .. i .. ' is wrong' end \
        end \
        return n";
    let said = redis(node, &["eval", CHECK, "0"])?;
    let checked: u64 = said.parse().with_context(|| format!("redis says {said}"))?;
    say(&format!("all {checked} keys of the client hold what it wrote"));
    Ok(())
}

fn number(node: &Site, command: &[&str]) -> Result<u64> {
    let said = redis(node, command)?;
    Ok(said.parse().unwrap_or(0))
}

/// One command to the Redis in the container.
fn redis(node: &Site, command: &[&str]) -> Result<String> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    until("redis-cli", || {
        let exec = format!("ask-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let mut words = vec!["task", "exec", "--exec-id", &exec, "redis", "redis-cli"];
        words.extend(command);
        // Redis may not listen yet; what it says then is on its stderr.
        let done = node.ctr(&words)?;
        Ok(done.ok().ok().map(|said| said.trim().to_owned()))
    })
}

fn say(text: &str) {
    eprintln!("demo: {text}");
}
