//! What a migration costs, beside what others cost: the parts of `bench`.
//!
//! Every contestant moves the same program with the same memory between the
//! same two nodes; who is meant by ours, B1, B2 and B3 is told in
//! `docs/benchmarks.md`.

pub mod bundle;
pub mod chart;
pub mod criu;
pub mod execs;
pub mod ours;
pub mod raw;
pub mod trace;

use std::{collections::BTreeMap, str::FromStr, time::Duration};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::workload::Answer;

/// What the container does while it moves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Load {
    pub mib: usize,
    /// MiB written in a second, all over the memory.
    pub rate: usize,
}

/// As many as a server has that uses both cores.
const PROCESSES: usize = 2;
const THREADS: usize = 2;

impl Load {
    pub fn idle(mib: usize) -> Self {
        Self { mib, rate: 0 }
    }

    pub fn command(self) -> Vec<String> {
        let words = [
            ("--mib", self.mib),
            ("--processes", PROCESSES),
            ("--threads", THREADS),
            ("--rate", self.rate),
        ];
        let mut command = vec!["workload".to_owned()];
        command.extend(words.iter().flat_map(|(name, value)| [(*name).into(), value.to_string()]));
        command
    }

    pub fn name(self) -> String {
        let size = match self.mib {
            mib if mib >= 1024 && mib.is_multiple_of(1024) => format!("{} GiB", mib / 1024),
            mib => format!("{mib} MiB"),
        };
        match self.rate {
            0 => format!("{size} idle"),
            rate => format!("{size}, {rate} MiB/s"),
        }
    }

    pub fn pages(self) -> u64 {
        let threads = PROCESSES * THREADS;
        (self.mib * 256 / threads * threads) as u64
    }
}

/// `MIB` or `MIB@RATE`.
impl FromStr for Load {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (mib, rate) = text.split_once('@').unwrap_or((text, "0"));
        let number = |text: &str| {
            text.parse().with_context(|| format!("{text:?} in a load (MIB or MIB@MIB_PER_S)"))
        };
        Ok(Self { mib: number(mib)?, rate: number(rate)? })
    }
}

/// One move of one contestant.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Move {
    /// The longest gap that the container's ticker or its readers saw.
    pub pause_ms: f64,
    pub ticker_ms: f64,
    pub client_ms: f64,
    /// When the ticker's gap began, by [`now`].
    pub pause_start_ns: u64,
    /// By the contestant's own count.
    pub own_ms: Option<f64>,
    /// From the request until all memory was there.
    pub total_ms: f64,
    /// From the end of the pause until all memory was there.
    pub until_filled_ms: f64,
    /// When the contestant had done what, counted from the request.
    pub steps_ms: BTreeMap<String, f64>,
    /// Programs that were started within the pause.
    pub execs: Vec<String>,
    /// What our report says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<serde_json::Value>,
    /// Memory that had content when the move began.
    pub anonymous_bytes: u64,
}

impl Move {
    /// `answer` was given after the move, `begun` and `filled` are times of
    /// [`now`].
    fn seen(answer: &Answer, begun: u64, filled: u64, execs: &execs::Watch) -> Result<Self> {
        let pause = answer.pause();
        let ticker = answer.ticker.first().context("a gap of the ticker")?;
        let end = pause.start_ns + pause.gap_ns;
        Ok(Self {
            pause_ms: ms(pause.gap_ns),
            ticker_ms: ms(ticker.gap_ns),
            client_ms: ms(answer.client.gap_ns),
            pause_start_ns: ticker.start_ns,
            total_ms: ms(filled.saturating_sub(begun)),
            until_filled_ms: ms(filled.saturating_sub(end)),
            execs: execs.between(ticker.start_ns, ticker.start_ns + ticker.gap_ns)?,
            ..Self::default()
        })
    }
}

pub fn ms(ns: u64) -> f64 {
    (ns as f64 / 1000.0).round() / 1000.0
}

/// CLOCK_REALTIME: the one clock that a restored container shares with its
/// host. CRIU puts it into a time namespace where the others leave out the
/// time between dump and restore.
pub fn now() -> Result<u64> {
    let time = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME)?);
    Ok(time.as_nanos() as u64)
}

/// Middle and extremes of some measurements.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Result<Self> {
        let mut values: Vec<_> = values.into_iter().collect();
        ensure!(!values.is_empty(), "nothing was measured");
        values.sort_unstable_by(f64::total_cmp);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Ok(Self {
            median: f64::midpoint(low, high),
            least: values[0],
            most: values[values.len() - 1],
        })
    }
}

/// Anonymous memory of a process and all its descendants, as the host sees
/// them below `proc`.
fn anonymous(proc: &std::path::Path, pid: u32) -> Result<u64> {
    let of = proc.join(pid.to_string());
    let rollup = std::fs::read_to_string(of.join("smaps_rollup"))?;
    let kib = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"))
        .and_then(|line| line.split_whitespace().next())
        .context("Anonymous in smaps_rollup")?;
    let mut sum = kib.parse::<u64>()? << 10;
    for task in std::fs::read_dir(of.join("task"))? {
        let children = std::fs::read_to_string(task?.path().join("children"))?;
        for child in children.split_whitespace() {
            sum += anonymous(proc, child.parse()?)?;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_two() -> Result<()> {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0])?;
        assert_eq!((spread.median, spread.least, spread.most), (2.5, 1.0, 4.0));
        assert!(Spread::of([]).is_err());
        Ok(())
    }

    #[test]
    fn a_load_is_divided_among_all_threads() {
        assert_eq!(Load::idle(16).pages(), 4096);
        assert_eq!(Load { mib: 1024, rate: 50 }.name(), "1 GiB, 50 MiB/s");
    }

    #[test]
    fn loads_are_read_as_they_are_written() -> Result<()> {
        assert_eq!("256".parse::<Load>()?, Load::idle(256));
        assert_eq!("1024@50".parse::<Load>()?, Load { mib: 1024, rate: 50 });
        assert!("1024@".parse::<Load>().is_err());
        Ok(())
    }
}
