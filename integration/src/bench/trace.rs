//! One pause in all detail: what the container, our programs, CRIU and the
//! kernel tell of it, on one time line.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use super::now;
use crate::agents::Site;

/// At a time of [`now`].
#[derive(Debug, Clone)]
pub struct Event {
    pub at_ns: u64,
    pub who: String,
    pub what: String,
}

// --- CRIU's logs ---------------------------------------------------------------

/// Between two looks at a log: what its times can be wrong by.
const LOOK: Duration = Duration::from_millis(1);
const TAIL: u64 = 4096;

/// Follows a log of CRIU, which counts time from CRIU's start and is removed
/// with the container's bundle.
pub struct CriuLog {
    who: String,
    stop: Arc<AtomicBool>,
    following: JoinHandle<Option<(File, u64)>>,
}

impl CriuLog {
    /// The `dump` or `restore` of a container on a node.
    pub fn follow(site: &Site, container: &str, step: &str) -> Self {
        // Where containerd lets the bundle's `work` point to.
        let work = format!("/var/lib/containerd/io.containerd.runtime.v2.task/default/{container}");
        let path = site.path(work).join(format!("{step}.log"));
        let stop = Arc::new(AtomicBool::new(false));
        let ours = Arc::clone(&stop);
        let following = thread::spawn(move || follow(&path, &ours));
        Self { who: format!("{} criu", site.name()), stop, following }
    }

    /// Lines after which nothing was logged for `at_least`, with how long, and
    /// those that tell of a notification.
    pub fn events(self, at_least: Duration) -> Result<Vec<Event>> {
        self.stop.store(true, Ordering::Relaxed);
        let found = self.following.join().ok().flatten();
        let (log, began) = found.with_context(|| format!("no log of {}", self.who))?;
        let text = read(&log, 0)?;
        let lines: Vec<_> = text.lines().filter_map(stamped).collect();
        let mut events = Vec::new();
        for (index, (at, line)) in lines.iter().enumerate() {
            let next = lines.get(index + 1).map_or(*at, |(next, _)| *next);
            let took = Duration::from_nanos(next.saturating_sub(*at));
            let what = if took >= at_least {
                format!("{line}  [{:.1} ms until the next line]", took.as_secs_f64() * 1000.0)
            } else if line.contains("scripts") {
                (*line).to_owned()
            } else {
                continue;
            };
            events.push(Event { at_ns: began + at, who: self.who.clone(), what });
        }
        Ok(events)
    }
}

/// The log, and when it began: no later than any look minus the newest time
/// that was in it, and the tightest of those is right by a look's distance.
fn follow(path: &Path, stop: &AtomicBool) -> Option<(File, u64)> {
    let (mut log, mut began, mut seen) = (None, u64::MAX, 0);
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(LOOK);
        log = log.or_else(|| File::open(path).ok());
        let Some(log) = &log else { continue };
        let length = log.metadata().ok()?.len();
        if length == seen {
            continue;
        }
        seen = length;
        let time = now().ok()?;
        let tail = read(log, length.saturating_sub(TAIL)).ok()?;
        if let Some((last, _)) = tail.lines().rev().find_map(stamped) {
            began = began.min(time.saturating_sub(last));
        }
    }
    Some((log?, began))
}

fn read(file: &File, from: u64) -> Result<String> {
    let length = file.metadata()?.len().saturating_sub(from);
    let mut bytes = vec![0; usize::try_from(length)?];
    file.read_exact_at(&mut bytes, from)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `(12.345678) text`: nanoseconds, and the text.
fn stamped(line: &str) -> Option<(u64, &str)> {
    let (time, text) = line.strip_prefix('(')?.split_once(") ")?;
    let (seconds, micros) = time.split_once('.')?;
    let (seconds, micros): (u64, u64) = (seconds.parse().ok()?, micros.parse().ok()?);
    Some((seconds * 1_000_000_000 + micros * 1000, text.trim_start()))
}

// --- our own logs ----------------------------------------------------------------

/// What agents and shims have logged: those of a shim go through containerd.
pub fn logged(site: &Site) -> Vec<Event> {
    let log = |name: &str| -> PathBuf { site.dir().join(format!("{name}.log")) };
    let mut events = Vec::new();
    for (who, path) in [("agent", log("transshipd")), ("shim", log("containerd"))] {
        for line in std::fs::read_to_string(path).unwrap_or_default().lines() {
            // containerd's own lines begin otherwise.
            let ours = !line.starts_with("time=");
            if let Some((at_ns, what)) = ours.then(|| dated(line)).flatten() {
                events.push(Event { at_ns, who: format!("{} {who}", site.name()), what });
            }
        }
    }
    events
}

/// A line that has a time somewhere, and the line without it.
fn dated(line: &str) -> Option<(u64, String)> {
    let line = &uncoloured(line);
    let start = line.find("20").filter(|at| line.as_bytes().get(at + 10) == Some(&b'T'))?;
    let end = start + line[start..].find('Z')?;
    let text = format!("{}{}", &line[..start], &line[end + 1..]);
    // Without the spans: there is one migration.
    let text = text.rsplit_once("}: ").map_or(text.as_str(), |(_, event)| event);
    Some((instant(&line[start..end])?, text.trim().to_owned()))
}

fn uncoloured(line: &str) -> String {
    let mut out = String::new();
    for (index, part) in line.split("\u{1b}[").enumerate() {
        let text = if index == 0 { part } else { part.split_once('m').map_or("", |p| p.1) };
        out.push_str(text);
    }
    out
}

/// Nanoseconds since 1970 of `2026-01-02T03:04:05.678`, UTC.
fn instant(text: &str) -> Option<u64> {
    let (date, time) = text.split_once('T')?;
    let mut date = date.splitn(3, '-').map(str::parse::<u64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let mut time = time.splitn(3, ':');
    let (hour, minute) = (time.next()?.parse::<u64>().ok()?, time.next()?.parse::<u64>().ok()?);
    let (second, fraction) = time.next()?.split_once('.')?;
    let nanos: u64 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    // Days by the calendar that begins in March: leap days come last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day;
    let days = days.checked_sub(719_469)?;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second.parse::<u64>().ok()?;
    Some(seconds * 1_000_000_000 + nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_from_all_logs() {
        assert_eq!(stamped("(01.000250) pie: 7"), Some((1_000_250_000, "pie: 7")));
        assert_eq!(stamped("Warn (criu/x.c:1)"), None);
        assert_eq!(instant("1970-01-01T00:00:01.5"), Some(1_500_000_000));
        assert_eq!(instant("2024-02-29T12:00:00.000000001"), Some(1_709_208_000_000_000_001));
        let agent = "\u{1b}[2m2024-03-01T00:00:00.25Z\u{1b}[0m INFO moved";
        assert_eq!(dated(agent), Some((1_709_251_200_250_000_000, "INFO moved".into())));
        let shim = "2024-03-01T00:00:00.250000Z  INFO container{id=\"c\"}: stopped status=0";
        assert_eq!(dated(shim), Some((1_709_251_200_250_000_000, "stopped status=0".into())));
        assert_eq!(dated("no time here"), None);
    }
}
