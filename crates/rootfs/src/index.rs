//! What the target has, and what it looked like here when it was sent.

use std::collections::BTreeMap;

use rustix::fs::{FileType, Stat, Timespec};

/// The state of the target after a pass, as far as it differs from the image.
#[derive(Debug, Clone)]
pub struct Index {
    pub(crate) root: Known,
}

/// One name in a directory.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) mark: Mark,
    /// Only directories have any.
    pub(crate) children: Children,
}

pub(crate) type Children = BTreeMap<Vec<u8>, Known>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The target has nothing of that name (a whiteout, or never was there).
    Absent,
    Entry(Stamp),
}

impl Known {
    pub(crate) const ABSENT: Self = Self { mark: Mark::Absent, children: BTreeMap::new() };

    pub(crate) fn stamp(&self) -> Option<&Stamp> {
        match &self.mark {
            Mark::Absent => None,
            Mark::Entry(stamp) => Some(stamp),
        }
    }

    /// The same, but the next pass sends it again whatever it looks like.
    pub(crate) fn doubted(&self) -> Self {
        let mut doubted = self.clone();
        if let Mark::Entry(stamp) = &mut doubted.mark {
            stamp.settled = false;
        }
        doubted
    }
}

/// What tells whether an entry has changed. The ctime decides: every change
/// of content or metadata moves it and no program can set it. The rest costs
/// nothing and guards against clocks that were set back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) mode: u32,
    owner: (u32, u32),
    special: u64,
    pub(crate) size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
    /// A change right after this stamp would have moved the ctime.
    pub(crate) settled: bool,
    /// A directory that hides the image's directory of the same name.
    pub(crate) opaque: bool,
}

impl Stamp {
    /// `now` is read before `stat`, from the clock that stamps ctimes.
    /// `mapped_unseen`: stores through a mapping leave no trace here.
    #[allow(clippy::unnecessary_cast, reason = "the fields of stat differ between architectures")]
    pub(crate) fn new(stat: &Stat, now: Timespec, mapped_unseen: bool) -> Self {
        let changed = (stat.st_ctime, stat.st_ctime_nsec as i64);
        let file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            mode: stat.st_mode,
            owner: (stat.st_uid, stat.st_gid),
            special: stat.st_rdev,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec as i64),
            changed,
            settled: settled(changed, (now.tv_sec, now.tv_nsec))
                && !(mapped_unseen && file && stat.st_size > 0),
            opaque: false,
        }
    }

    pub(crate) fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.file_type() == FileType::Directory
    }

    pub(crate) fn object(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Whether the target still has what is here now.
    pub(crate) fn holds(&self, now: &Self) -> bool {
        self.settled && self.looks_like(now)
    }

    pub(crate) fn looks_like(&self, other: &Self) -> bool {
        let plain = |stamp: &Self| Self { settled: true, opaque: false, ..*stamp };
        plain(self) == plain(other)
    }
}

/// Whether a ctime is old enough that a change after `now` gets another one.
///
/// Before Linux 6.13 ctimes come from a clock that ticks every 1 to 10 ms:
/// two writes within a tick look like one. ext4 with 128-byte inodes keeps
/// seconds only, which shows as zero nanoseconds.
fn settled(changed: (i64, i64), now: (i64, i64)) -> bool {
    const TICKS: i64 = 20_000_000;
    const SECONDS: i64 = 2_000_000_000;
    let margin = if changed.1 == 0 { SECONDS } else { TICKS };
    let seconds = now.0.saturating_sub(changed.0);
    let age = seconds.saturating_mul(1_000_000_000).saturating_add(now.1 - changed.1);
    age > margin
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ctime_settles_once_the_clock_has_moved_on() {
        let ms = 1_000_000;
        for (changed, now, expected) in [
            ((10, 5), (10, 5), false),
            ((10, 5), (10, 5 + 20 * ms), false),
            ((10, 5), (10, 6 + 20 * ms), true),
            ((10, 990 * ms), (11, 5 * ms), false),
            ((10, 990 * ms), (11, 20 * ms), true),
            // Whole seconds: perhaps nothing finer exists.
            ((10, 0), (10, 900 * ms), false),
            ((10, 0), (12, 1), true),
            // The clock was set back.
            ((10, 5), (9, 5), false),
            ((i64::MIN, 5), (i64::MAX, 5), true),
        ] {
            assert_eq!(settled(changed, now), expected, "{changed:?} at {now:?}");
        }
    }

    #[test]
    fn anything_that_moves_is_a_change() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let later = |seconds| Timespec { tv_sec: i64::MAX / 2 + seconds, tv_nsec: 0 };
        let stat = rustix::fs::stat(file.path()).unwrap();
        let one = Stamp::new(&stat, later(0), false);
        assert!(one.holds(&Stamp::new(&stat, later(1), false)));
        let mut other = stat;
        other.st_ctime_nsec = (other.st_ctime_nsec + 1) % 1_000_000_000;
        assert!(!one.holds(&Stamp::new(&other, later(1), false)));
        let mut bigger = stat;
        bigger.st_size += 1;
        assert!(!one.holds(&Stamp::new(&bigger, later(1), false)));
        assert!(Stamp::new(&bigger, later(0), false).settled);
        assert!(!Stamp::new(&bigger, later(0), true).settled);
    }
}
