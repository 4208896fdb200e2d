//! Our contestant: `transship migrate`, and what its report says.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Load, Move, execs::Watch, now};
use crate::{
    agents::{Pair, Site},
    eventually,
    images::Image,
    workload::Workload,
};

const RUNTIME: &str = "io.containerd.transship.v2";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// The name of the container that [`migrate`] will move next.
pub fn next_id() -> String {
    format!("ours-{}", COUNT.load(Ordering::Relaxed))
}

/// Moves a workload from node `a` to node `b` with more arguments for
/// `transship migrate`.
pub fn migrate(load: Load, pair: &Pair, more: &[&str], watch: &Watch) -> Result<Move> {
    let id = next_id();
    COUNT.fetch_add(1, Ordering::Relaxed);
    let Pair { a, b } = pair;
    let image = a.image(Image::Workload)?;
    let command = load.command();
    let mut run = vec!["run", "-d", "--runtime", RUNTIME, image, &id];
    run.extend(command.iter().map(String::as_str));
    a.ctr_ok(&run)?;
    let workload = Workload::of(a, &id)?;
    let anonymous_bytes = super::anonymous(&a.path("/proc"), a.task_pid(&id)?)?;
    workload.ask("reset")?;
    let begun = now()?;
    let mut arguments = vec!["migrate", &id, "--to", b.name()];
    arguments.extend(more);
    let report = a.answer(&arguments)?;
    let ended = now()?;

    let workload = Workload::of(b, &id)?;
    let answer = workload.ask("gaps")?;
    let mut moved = Move::seen(&answer, begun, ended, watch)?;
    moved.own_ms = report["downtime_us"].as_f64().map(|us| us / 1000.0);
    moved.anonymous_bytes = anonymous_bytes;
    moved.report = Some(report);
    let pages = workload.verify()?;
    ensure!(pages == load.pages(), "{pages} pages of {} were there", load.pages());
    remove(b, &id)?;
    a.ctr_ok(&["container", "rm", &id]).or_else(|error| match a.status(&id)?.as_str() {
        // Whoever moved it away may have removed its record.
        "NONE" => Ok(String::new()),
        _ => Err(error),
    })?;
    Ok(moved)
}

fn remove(site: &Site, id: &str) -> Result<()> {
    site.ctr_ok(&["task", "kill", "--signal", "KILL", id])?;
    eventually("a container to end", || Ok(site.status(id)? == "STOPPED"))?;
    site.ctr_ok(&["task", "rm", id])?;
    site.ctr_ok(&["container", "rm", id])?;
    Ok(())
}

/// The part of a report on memory, in figures.
pub struct Figures<'a>(&'a Value);

impl<'a> Figures<'a> {
    pub fn of(moved: &'a Move) -> Result<Self> {
        let report = moved.report.as_ref().context("a report")?;
        let memory = &report["memory"];
        ensure!(
            memory.is_object(),
            "the report says nothing of memory: no rounds were made, or transship is too old"
        );
        Ok(Self(report))
    }

    fn number(&self, path: &str) -> Result<f64> {
        self.0
            .pointer(path)
            .and_then(Value::as_f64)
            .with_context(|| format!("the report has no number {path}"))
    }

    /// What went over the wire for memory and state, for each byte that had to:
    /// all that was there, and what was written again between two rounds.
    pub fn wire_over_needed(&self, moved: &Move) -> Result<f64> {
        let sent = self.number("/memory/transferred")? + self.number("/image_bytes")?;
        let page = self.number("/memory/page_size")?;
        let rounds = self.0["memory"]["rounds"].as_array().context("rounds in the report")?;
        let mut again = 0.0;
        for round in rounds.iter().skip(1) {
            let figure = |name: &str| round[name].as_f64().context("a figure of a round");
            again += figure("dirty_pages")? - figure("zero_pages")?;
        }
        let zero = self.number("/memory/duplicate")? * page;
        let there = (moved.anonymous_bytes as f64 - zero).max(page);
        Ok(sent / (there + again.max(0.0) * page))
    }

    /// Bytes in a second of the first round, which carries everything.
    pub fn throughput(&self) -> Result<f64> {
        let bytes = self.number("/memory/rounds/0/wire_bytes")?;
        Ok(bytes / (self.number("/memory/rounds/0/duration_us")? / 1e6))
    }

    pub fn lanes(&self) -> Result<usize> {
        Ok(self.number("/memory/lanes")? as usize)
    }

    /// How far the pause was from what had been predicted, of the pause.
    pub fn predict_error_pct(&self) -> Result<f64> {
        let expected = self.number("/memory/expected_downtime_us")?;
        let was = self.number("/downtime_us")?;
        ensure!(expected > 0.0, "the report predicts no pause");
        Ok((expected - was).abs() / was * 100.0)
    }
}
