//! What pauses have cost on this node, for the prediction of the next.
//!
//! Most of a pause is not pages: CRIU stops the tasks, describes them, and
//! makes them anew on the other node. How long that takes here nobody can
//! know but by having seen it, so the last few are remembered in a small file.
//! Nothing depends on it but how good a prediction is.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tracing::debug;

use crate::{Budget, Departure, handoff::Ending};

/// Enough for a median that one odd pause does not move, and few enough that
/// another kernel or another CRIU is noticed soon.
const KEPT: usize = 16;

/// A file beyond this is not ours.
const FILE_MAX: u64 = 64 << 10;

/// The pauses that one file tells of.
#[derive(Debug, Clone)]
pub struct History {
    path: PathBuf,
}

/// One pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Pause {
    /// Without scanning, and without sending for which everybody waited.
    fixed_us: u64,
    /// CRIU's dump, beside which pages are sent.
    dump_us: u64,
}

impl History {
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Puts what is known into the budget; without any knowledge that stays
    /// as it is.
    pub fn inform(&self, budget: &mut Budget) {
        let pauses = self.read();
        if let Some(fixed) = median(pauses.iter().map(|pause| pause.fixed_us)) {
            budget.fixed = fixed;
        }
        if let Some(dump) = median(pauses.iter().map(|pause| pause.dump_us)) {
            budget.beside = dump;
        }
    }

    /// Remembers how a departure went, if it tells anything about pauses.
    pub fn add(&self, departure: &Departure) {
        let Some(pause) = pause(departure) else { return };
        let mut pauses = self.read();
        pauses.push(pause);
        let first = pauses.len().saturating_sub(KEPT);
        if let Err(error) = write(&self.path, &pauses[first..]) {
            debug!(%error, "a pause is not remembered");
        }
    }

    /// A file that cannot be read or understood is as good as none.
    fn read(&self) -> Vec<Pause> {
        let small = |meta: fs::Metadata| meta.is_file() && meta.len() <= FILE_MAX;
        if !fs::metadata(&self.path).is_ok_and(small) {
            return Vec::new();
        }
        let text = fs::read(&self.path).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }
}

/// Only a pause in which all pages went by lane tells of others like it.
fn pause(departure: &Departure) -> Option<Pause> {
    let memory = departure.memory.as_ref().filter(|memory| memory.page_less)?;
    if departure.ending != Ending::Departed {
        return None;
    }
    let scan = memory.rounds.last().map_or(Duration::ZERO, |round| round.scan);
    let waited = memory.pause.final_send.saturating_sub(memory.pause.dump);
    let fixed = departure.times.downtime().saturating_sub(scan + waited);
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Some(Pause { fixed_us: micros(fixed), dump_us: micros(memory.pause.dump) })
}

fn median(values: impl Iterator<Item = u64>) -> Option<Duration> {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied().map(Duration::from_micros)
}

/// Whole or not at all: several shims may write it at a time, and the last one
/// wins.
fn write(path: &Path, pauses: &[Pause]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let beside = path.with_extension(std::process::id().to_string());
    let mut file =
        fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(&serde_json::to_vec(pauses)?)?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_the_last_pauses_is_what_counts() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::at(directory.path().join("deep").join("pauses.json"));
        let mut budget = Budget::default();
        let unknown = budget.clone();
        history.inform(&mut budget);
        assert_eq!((budget.fixed, budget.beside), (unknown.fixed, unknown.beside));

        let pauses = [50, 10, 40, 9000, 30]
            .map(|millis| Pause { fixed_us: millis * 1000, dump_us: millis * 500 });
        write(&history.path, &pauses).unwrap();
        history.inform(&mut budget);
        assert_eq!(budget.fixed, Duration::from_millis(40));
        assert_eq!(budget.beside, Duration::from_millis(20));
    }

    #[test]
    fn a_file_that_makes_no_sense_is_as_good_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::at(directory.path().join("pauses.json"));
        for text in ["", "{", "[{\"fixed_us\": -1}]", "[[[[", &"[".repeat(70_000)] {
            fs::write(&history.path, text).unwrap();
            assert_eq!(history.read(), [], "{text:.20}");
        }
    }
}
