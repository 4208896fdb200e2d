//! The phases of a migration, in order, and how long each one took.

use std::{fmt, time::Duration, time::Instant};

/// What a migration is doing; the names appear in progress, reports and logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The source's OCI runtime is started and held; both agree on ticket and
    /// manifest.
    Offer,
    /// The writable layer travels while the container runs; the target's OCI
    /// runtime is started and held.
    Prepare,
    /// Memory travels while the container runs, round after round.
    Rounds,
    /// The container stops: CRIU seizes every task.
    Freeze,
    /// CRIU writes its images; what changed in the writable layer follows.
    Dump,
    /// The images travel.
    Transfer,
    /// CRIU restores on the target, up to the last step.
    Restore,
    /// The decision is written down and sent.
    Commit,
    /// It runs on the target, and some of its memory is still at the source.
    PostCopy,
    /// The source's tasks end.
    Depart,
    /// It runs on the target, which puts the rest of its memory in place.
    Fill,
}

impl Phase {
    pub const ORDER: [Phase; 11] = [
        Phase::Offer,
        Phase::Prepare,
        Phase::Rounds,
        Phase::Freeze,
        Phase::Dump,
        Phase::Transfer,
        Phase::Restore,
        Phase::Commit,
        Phase::PostCopy,
        Phase::Depart,
        Phase::Fill,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Offer => "offer",
            Phase::Prepare => "prepare",
            Phase::Rounds => "rounds",
            Phase::Freeze => "freeze",
            Phase::Dump => "dump",
            Phase::Transfer => "transfer",
            Phase::Restore => "restore",
            Phase::Commit => "commit",
            Phase::PostCopy => "post-copy",
            Phase::Depart => "depart",
            Phase::Fill => "fill",
        }
    }

    /// Whether the container stands still in this phase.
    pub fn is_pause(self) -> bool {
        (Phase::Freeze..=Phase::Commit).contains(&self)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Measures phases as they follow one another.
#[derive(Debug)]
pub struct Stopwatch {
    current: Phase,
    since: Instant,
    ended: Vec<(Phase, Duration)>,
}

impl Stopwatch {
    pub fn start(phase: Phase) -> Self {
        Self { current: phase, since: Instant::now(), ended: Vec::new() }
    }

    pub fn phase(&self) -> Phase {
        self.current
    }

    pub fn enter(&mut self, next: Phase) {
        let now = Instant::now();
        self.ended.push((self.current, now - self.since));
        self.current = next;
        self.since = now;
    }

    /// Every phase so far, the current one up to now.
    pub fn times(&self) -> Vec<(Phase, Duration)> {
        let mut times = self.ended.clone();
        times.push((self.current, self.since.elapsed()));
        times
    }

    /// How long the container stood still, as far as the source can tell.
    pub fn downtime(&self) -> Duration {
        self.times().iter().filter(|(phase, _)| phase.is_pause()).map(|(_, time)| *time).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_frozen_phases_count_as_downtime() {
        let mut watch = Stopwatch::start(Phase::Offer);
        for phase in &Phase::ORDER[1..] {
            watch.enter(*phase);
        }
        let names: Vec<_> = watch.times().iter().map(|(phase, _)| *phase).collect();
        assert_eq!(names, Phase::ORDER);
        let pause: Vec<_> = Phase::ORDER.into_iter().filter(|p| p.is_pause()).collect();
        assert_eq!(
            pause,
            [Phase::Freeze, Phase::Dump, Phase::Transfer, Phase::Restore, Phase::Commit]
        );
    }
}
