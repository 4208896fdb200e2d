//! Our shim beside containerd's own for runc: `make bench-shim`.
//!
//! Time: a container's life of `true`, from the request to create its task
//! (which starts the shim) to the answer to the request to delete it. Memory:
//! the shim of one idle container. Both in turns on the same node, medians,
//! shims logging as they do by default. The last line is JSON.
#![forbid(unsafe_code)]

use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use transship_integration::{World, bin_dir, daemon::Runtime, stdio::Stdio};

/// Odd, for a median that was measured.
const LIVES: usize = 31;
const IDLE: usize = 5;
/// The first ones fill caches that belong to neither side.
const WARM_UP: usize = 3;

/// A shim has settled when its memory is the same at two looks this far
/// apart.
const SETTLED: Duration = Duration::from_millis(300);

const SIDES: [Runtime; 2] = [Runtime::Stock, Runtime::Transship];

fn main() -> Result<()> {
    let bin = bin_dir()?;
    if !bin.ends_with("release") {
        eprintln!(
            "bench-shim: the shim in {} is no release build; `make bench-shim` makes one",
            bin.display()
        );
    }
    let mut world = World::quiet(Runtime::Stock)?;
    let mut lives = [Vec::new(), Vec::new()];
    for round in 0..WARM_UP + LIVES {
        // Neither side always follows the other.
        for turn in 0..SIDES.len() {
            let side = (round + turn) % SIDES.len();
            world.runtime = SIDES[side];
            let took = life(&world, &format!("life-{side}-{round}"))?;
            if round >= WARM_UP {
                lives[side].push(took);
            }
        }
    }
    let mut memory = [Vec::new(), Vec::new()];
    for round in 0..IDLE {
        for (side, runtime) in SIDES.into_iter().enumerate() {
            world.runtime = runtime;
            memory[side].push(idle(&world, &format!("idle-{side}-{round}"))?);
        }
    }

    let [stock_life, our_life] = lives.map(|mut lives| median(&mut lives));
    let [stock_memory, our_memory] = memory.map(|all| {
        let mut rss: Vec<_> = all.iter().map(|one| one.rss).collect();
        let mut pss: Vec<_> = all.iter().map(|one| one.pss).collect();
        Memory { rss: median(&mut rss), pss: median(&mut pss) }
    });
    println!("{:34} {:>12} {:>14} {:>14}", "", "start to exit", "resident", "proportional");
    for (name, life, memory) in [
        (Runtime::Stock.binary(), stock_life, stock_memory),
        (Runtime::Transship.binary(), our_life, our_memory),
    ] {
        let milliseconds = life.as_secs_f64() * 1000.0;
        println!("{name:34} {milliseconds:>10.1} ms {:>10} KiB {:>10} KiB", memory.rss, memory.pss);
    }
    let start = our_life.as_secs_f64() / stock_life.as_secs_f64();
    let rss = our_memory.rss as f64 / stock_memory.rss as f64;
    // Three digits say enough, and more would claim too much.
    println!("{{\"start_ratio\":{start:.3},\"rss_ratio\":{rss:.3}}}");
    Ok(())
}

/// One container, from the request to create its task until it is deleted.
fn life(world: &World, id: &str) -> Result<Duration> {
    world.container(id, &[], &["true"])?;
    let io = Stdio::null();
    let begun = Instant::now();
    world.api.create(id, &io.streams, None)?;
    world.api.start(id, "")?;
    let exit = world.api.wait(id, "")?;
    world.api.delete(id)?;
    let took = begun.elapsed();
    if exit.status != 0 {
        bail!("{} of {id} ended with {}", world.runtime.name(), exit.status);
    }
    world.forget(id)?;
    Ok(took)
}

/// In KiB.
#[derive(Clone, Copy, PartialEq)]
struct Memory {
    rss: u64,
    pss: u64,
}

/// The memory of a shim whose only container does nothing.
fn idle(world: &World, id: &str) -> Result<Memory> {
    world.run_idle(id)?;
    let shim = *world.shims()?.first().context("no shim runs")?;
    let mut last = memory_of(shim)?;
    loop {
        sleep(SETTLED);
        let now = memory_of(shim)?;
        if now == last {
            break;
        }
        last = now;
    }
    world.remove(id)?;
    Ok(last)
}

fn memory_of(pid: i32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line
            .and_then(|line| line.split_whitespace().next())
            .with_context(|| format!("{name} in {path}"))?;
        Ok(number.parse()?)
    };
    Ok(Memory { rss: field("Rss:")?, pss: field("Pss:")? })
}

fn median<T: Ord + Copy>(values: &mut [T]) -> T {
    values.sort_unstable();
    values[values.len() / 2]
}
