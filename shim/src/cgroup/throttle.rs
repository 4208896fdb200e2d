//! Slowing a container down by its CPU quota, and putting the quota back.
//!
//! A share of what the container *uses*, not of what the host has: one thread
//! that writes memory on a host of 64 CPUs would not notice half of them gone.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use libcgroups::common::write_cgroup_file_str;
use tracing::warn;

use super::{Cgroup, flat, read};
use crate::error::{Error, Result};

/// The kernel refuses less quota per period.
const LEAST_US: u64 = 1000;

/// The kernel's own period, for groups that never had a quota.
const PERIOD_US: u64 = 100_000;

/// Below this share of one CPU a container uses nothing worth taking away; it
/// also covers one whose use could not be measured.
const LEAST_USE: f64 = 0.05;

/// A container's quota in our hands. Dropped, it is what it was.
#[derive(Debug)]
pub struct Throttle {
    quota: Quota,
    usage: Option<Usage>,
    since: Instant,
    /// CPUs it used when it was first slowed down; what it uses later is our
    /// own doing.
    cpus: Option<f64>,
    /// What the file held before it was first changed.
    before: Option<String>,
}

impl Throttle {
    /// Changes nothing yet, but begins to measure.
    pub fn new(cgroup: &Cgroup) -> Result<Self> {
        let quota = Quota::find(cgroup)?;
        let usage = Usage::find(cgroup);
        Ok(Self { quota, usage, since: Instant::now(), cpus: None, before: None })
    }

    /// Takes away `percent` of what the container uses by itself.
    pub fn slow_down(&mut self, percent: u32) -> Result<()> {
        let now = self.quota.read()?;
        let limit = self.quota.parse(self.before.as_deref().unwrap_or(&now))?;
        let cpus = *self.cpus.get_or_insert_with(|| {
            self.usage.as_ref().and_then(|usage| usage.cpus(self.since.elapsed())).unwrap_or(0.0)
        });
        let cpus = limit.cpus().map_or(cpus, |limit| cpus.min(limit)).max(LEAST_USE);
        let left = cpus * f64::from(100 - percent.min(99)) / 100.0;
        let quota = (limit.period_us as f64 * left) as u64;
        self.quota.write(&self.quota.text(quota.max(LEAST_US), limit.period_us))?;
        self.before.get_or_insert(now);
        Ok(())
    }

    /// As before. A group that is gone needs nothing.
    pub fn restore(&mut self) -> Result<()> {
        let Some(before) = self.before.take() else { return Ok(()) };
        match self.quota.write(&before) {
            Err(_) if !self.quota.path().exists() => Ok(()),
            Err(error) => {
                self.before = Some(before);
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            warn!(error = error.sentence(), "the container stays slowed down");
        }
    }
}

/// Where the quota stands.
#[derive(Debug)]
enum Quota {
    /// `cpu.cfs_quota_us`, beside `cpu.cfs_period_us`, which stays.
    V1(PathBuf),
    /// `cpu.max`: both, in one line.
    V2(PathBuf),
}

struct Limit {
    /// None: unlimited.
    quota_us: Option<u64>,
    period_us: u64,
}

impl Limit {
    fn cpus(&self) -> Option<f64> {
        self.quota_us.map(|quota| quota as f64 / self.period_us as f64)
    }
}

impl Quota {
    fn find(cgroup: &Cgroup) -> Result<Self> {
        let directory = cgroup.required("cpu")?;
        let quota = match cgroup {
            Cgroup::V1(_) => Quota::V1(directory.join("cpu.cfs_quota_us")),
            Cgroup::V2(_) => Quota::V2(directory.join("cpu.max")),
        };
        quota.read().map(|_| quota)
    }

    fn path(&self) -> &Path {
        let (Quota::V1(path) | Quota::V2(path)) = self;
        path
    }

    fn read(&self) -> Result<String> {
        Ok(read(self.path())?.trim().to_owned())
    }

    fn write(&self, text: &str) -> Result<()> {
        let path = self.path();
        write_cgroup_file_str(path, &format!("{text}\n"))
            .map_err(Error::other(format!("write {text} to {}", path.display())))
    }

    fn parse(&self, text: &str) -> Result<Limit> {
        let number = |text: &str| text.parse::<u64>().ok().filter(|number| *number > 0);
        let (quota, period) = match self {
            Quota::V1(path) => {
                (text.to_owned(), read(&path.with_file_name("cpu.cfs_period_us"))?.trim().into())
            }
            Quota::V2(_) => match text.split_once(' ') {
                Some((quota, period)) => (quota.to_owned(), period.to_owned()),
                None => (text.to_owned(), String::new()),
            },
        };
        // Unlimited is "-1" or "max": no positive number either way.
        Ok(Limit { quota_us: number(&quota), period_us: number(&period).unwrap_or(PERIOD_US) })
    }

    fn text(&self, quota_us: u64, period_us: u64) -> String {
        match self {
            Quota::V1(_) => quota_us.to_string(),
            Quota::V2(_) => format!("{quota_us} {period_us}"),
        }
    }
}

/// CPU time a group has used, from one moment on.
#[derive(Debug)]
struct Usage {
    path: PathBuf,
    start: Duration,
}

impl Usage {
    fn find(cgroup: &Cgroup) -> Option<Self> {
        let path = match cgroup {
            Cgroup::V1(_) => cgroup.directory("cpuacct")?.join("cpuacct.usage"),
            Cgroup::V2(_) => cgroup.directory("cpu")?.join("cpu.stat"),
        };
        let start = Self::read(&path)?;
        Some(Self { path, start })
    }

    fn read(path: &Path) -> Option<Duration> {
        let text = fs::read_to_string(path).ok()?;
        match text.trim().parse() {
            Ok(nanos) => Some(Duration::from_nanos(nanos)),
            Err(_) => flat(&text).get("usage_usec").copied().map(Duration::from_micros),
        }
    }

    fn cpus(&self, elapsed: Duration) -> Option<f64> {
        let used = Self::read(&self.path)?.saturating_sub(self.start);
        (!elapsed.is_zero()).then(|| used.as_secs_f64() / elapsed.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;
    use crate::cgroup::scratch::Scratch;

    /// A group as a directory of plain files.
    fn v2(dir: &Path, max: &str) -> Throttle {
        fs::write(dir.join("cpu.max"), max).unwrap();
        fs::write(dir.join("cpu.stat"), "usage_usec 0\nuser_usec 0\n").unwrap();
        Throttle::new(&Cgroup::V2(dir.into())).unwrap()
    }

    /// The first line: a real file ends with what was written to it last.
    fn content(dir: &Path, file: &str) -> String {
        let text = fs::read_to_string(dir.join(file)).unwrap();
        text.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn a_share_of_what_was_used_is_left_and_then_all_of_it() {
        for (before, used_cpus, percent, during) in [
            ("max 100000\n", 1.0, 50, "50000 100000"),
            ("max 100000\n", 4.0, 75, "100000 100000"),
            // A limit that stood there bounds what it can have used.
            ("50000 100000\n", 4.0, 50, "25000 100000"),
            ("max 20000\n", 1.0, 90, "2000 20000"),
            // Never less than the kernel takes, and never nothing.
            ("max 100000\n", 0.0, 100, "1000 100000"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let mut throttle = v2(dir.path(), before);
            throttle.cpus = Some(used_cpus);
            throttle.slow_down(percent).unwrap();
            assert_eq!(content(dir.path(), "cpu.max"), during, "{before} {used_cpus} {percent}");
            // A second step starts from the same use and the same limit.
            throttle.slow_down(percent).unwrap();
            assert_eq!(content(dir.path(), "cpu.max"), during);
            drop(throttle);
            assert_eq!(content(dir.path(), "cpu.max"), before.trim());
        }
    }

    #[test]
    fn what_was_never_changed_is_not_written_back() {
        let dir = tempfile::tempdir().unwrap();
        let throttle = v2(dir.path(), "max 100000");
        fs::write(dir.path().join("cpu.max"), "70000 100000").unwrap();
        drop(throttle);
        assert_eq!(content(dir.path(), "cpu.max"), "70000 100000");
    }

    /// On the hierarchy of this host, with a process that does nothing else
    /// than use its CPU.
    #[test]
    fn a_real_group_is_slowed_down_and_put_back() {
        let busy = "while :; do :; done";
        let Some(group) = Scratch::create("throttle", &["cpu", "cpuacct"], busy) else { return };
        if Quota::find(&group.cgroup).is_err() {
            eprintln!("NOT TESTED: this host's groups take no quota");
            return;
        }
        let throttled = || {
            let directory = group.cgroup.directory("cpu").unwrap();
            flat(&read(&directory.join("cpu.stat")).unwrap())["nr_throttled"]
        };
        let before = Quota::find(&group.cgroup).unwrap().read().unwrap();
        let mut throttle = Throttle::new(&group.cgroup).unwrap();
        let usage = throttle.usage.as_ref().expect("its use is accounted");
        while Usage::read(&usage.path).unwrap() < usage.start + Duration::from_millis(100) {
            sleep(Duration::from_millis(5));
        }
        throttle.slow_down(90).unwrap();
        let cpus = throttle.cpus.unwrap();
        assert!(cpus > 0.0 && cpus <= 2.0, "{cpus}");
        let during = throttle.quota.parse(&throttle.quota.read().unwrap()).unwrap();
        assert!(during.cpus().unwrap() <= cpus.max(LEAST_USE) / 10.0 + 0.011, "{cpus}");
        while throttled() == 0 {
            sleep(Duration::from_millis(5));
        }
        drop(throttle);
        assert_eq!(Quota::find(&group.cgroup).unwrap().read().unwrap(), before);
    }
}
