//! The time line of one pause: `hack/pause-trace.sh`.
//!
//! ```text
//! bench-trace [MIB[@MIB_PER_S]]
//! ```
#![forbid(unsafe_code)]

use std::{env, time::Duration};

use anyhow::{Context, Result};
use transship_integration::{
    agents::Pair,
    bench::{
        Load,
        execs::Watch,
        ours,
        trace::{CriuLog, Event, logged},
    },
};

/// Silence of CRIU that is worth a line.
const STANDS_OUT: Duration = Duration::from_millis(1);
/// What is told of before and after the pause.
const AROUND_NS: u64 = 20_000_000;

fn main() -> Result<()> {
    let load = env::args().nth(1).map_or(Ok(Load::idle(256)), |text| text.parse())?;
    let watch = Watch::start()?;
    let pair = Pair::start()?;
    // CRIU has learned what the kernel can when it comes to the second.
    ours::migrate(Load::idle(16), &pair, &[], &watch)?;
    let id = ours::next_id();
    let logs = [CriuLog::follow(&pair.a, &id, "dump"), CriuLog::follow(&pair.b, &id, "restore")];
    let moved = ours::migrate(load, &pair, &[], &watch)?;
    let (from, to) = (moved.pause_start_ns, moved.pause_start_ns + (moved.ticker_ms * 1e6) as u64);

    let event = |at_ns: u64, who: &str, what: String| Event { at_ns, who: who.into(), what };
    let mut events = vec![
        event(from, "container", "last instruction".into()),
        event(to, "container", "runs again".into()),
    ];
    for log in logs {
        events.extend(log.events(STANDS_OUT)?);
    }
    for site in [&pair.a, &pair.b] {
        events.extend(logged(site));
    }
    for exec in watch.since(from.saturating_sub(AROUND_NS), to + AROUND_NS)? {
        let command = if exec.command.is_empty() { "(gone already)" } else { &exec.command };
        events.push(event(exec.at_ns, "exec", command.to_owned()));
    }
    events.retain(|event| event.at_ns + AROUND_NS >= from && event.at_ns <= to + AROUND_NS);
    events.sort_by_key(|event| event.at_ns);
    println!("{:>9}  {:10}  what", "ms", "who");
    for Event { at_ns, who, what } in &events {
        let ms = (*at_ns as f64 - from as f64) / 1e6;
        println!("{ms:9.2}  {who:10}  {}", what.chars().take(160).collect::<String>());
    }
    println!(
        "\n{}: paused {:.1} ms, {:.1} ms by our own count, {} programs started",
        load.name(),
        moved.ticker_ms,
        moved.own_ms.unwrap_or_default(),
        moved.execs.len()
    );
    let report = moved.report.context("a report")?;
    println!("parts of the pause: {}", report["memory"]["pause"]);
    Ok(())
}
