//! Rounds, pause and total, played through with the engine's own decisions.
//!
//! How many pages a container writes in a given time was measured for one
//! interval and for the whole watch. Shorter than an interval it counts in
//! proportion. Beyond it, what is written again and again (the hot set) is
//! written already, and only the rest grows:
//!
//! ```text
//! pages  │              ·····  total
//!        │        ·····
//!        │  ●─────●            interval, watch: measured
//!        │ ╱
//!        └────────────▶ time
//! ```

use std::time::Duration;

use transship_api::control::{LinkReport, Prediction, RoundReport, WatchResponse};
use transship_migration::{
    Budget,
    policy::{self, Next, RoundFigures},
};
use transship_types::{PAGE, quantity::micros};

/// CRIU saves and restores what lies beside private memory, both inside the
/// pause: bytes per second, as measured for 1 GiB on a small machine.
const CRIU_SAVES: f64 = 1e9;

/// CRIU fills shared objects from its images, bytes per second, measured alike.
const CRIU_FILLS: f64 = 1e9;

/// Shared memory is looked through once more while the container stands still,
/// bytes per second, measured alike.
const LOOKED_THROUGH: f64 = 4.5e9;

/// Reading a page, and putting it into its place in the target's store.
const PER_PAGE: Duration = Duration::from_micros(2);

/// Of a zero page there is only its number on the wire.
const ZERO_BYTES: u64 = 4;

/// Offer, preparation, commit, clean-up: what a migration takes in any case.
const BESIDE: Duration = Duration::from_millis(300);

/// The engine ends long before; this is for a mistake of ours.
const ROUNDS_MAX: usize = 100;

/// The memory of a container, as it was watched.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Behaviour {
    pub pages: u64,
    pub zero_pages: u64,
    /// Writes were noticed; otherwise everything travels in the pause.
    pub noticed: bool,
    pub interval: Duration,
    /// Pages written in one interval, on average.
    pub per_interval: f64,
    pub watched: Duration,
    /// Pages written in all of it.
    pub written: u64,
    pub scan: Duration,
    /// What CRIU saves inside the pause.
    pub in_pause: u64,
    /// Bytes of shared objects, and of those that CRIU fills there.
    pub shared: u64,
    pub filled: u64,
}

impl Behaviour {
    pub fn new(m: &WatchResponse) -> Self {
        let intervals = m.written.len();
        let sum: u64 = m.written.iter().sum();
        let interval = Duration::from_micros(m.interval_us);
        Self {
            // Of both kinds: they go in rounds alike.
            pages: m.pages.saturating_add(m.shared_bytes / PAGE),
            zero_pages: m.zero_pages.min(m.pages),
            noticed: intervals > 0,
            interval,
            per_interval: sum as f64 / intervals.max(1) as f64,
            watched: interval * u32::try_from(intervals).unwrap_or(u32::MAX),
            written: m.written_pages,
            scan: Duration::from_micros(m.scan_us),
            in_pause: m.tmpfs_bytes,
            shared: m.shared_bytes,
            filled: m.filled_bytes.min(m.shared_bytes),
        }
    }

    /// Pages written in so much time.
    fn writes(&self, time: Duration) -> u64 {
        let (interval, time) = (self.interval.as_secs_f64().max(1e-6), time.as_secs_f64());
        let pages = if time <= interval {
            self.per_interval * time / interval
        } else {
            let rest = (self.watched.as_secs_f64() - interval).max(1e-6);
            let colder = (self.written as f64 - self.per_interval).max(0.0);
            // A watch of one interval tells nothing of longer times: as bad
            // as it can be.
            let growth = if self.watched > self.interval {
                colder / rest
            } else {
                self.per_interval / interval
            };
            self.per_interval + growth * (time - interval)
        };
        (pages.round() as u64).min(self.pages)
    }
}

/// What the lanes will carry.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    bytes_per_second: f64,
    round_trip: Duration,
}

impl Way {
    /// `bandwidth` 0: no limit.
    pub fn new(link: &LinkReport, bandwidth: u64) -> Self {
        let limit = if bandwidth == 0 { u64::MAX } else { bandwidth };
        let bytes_per_second = link.rate.min(limit).max(1) as f64;
        Self { bytes_per_second, round_trip: Duration::from_micros(link.round_trip_us) }
    }

    fn takes(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64((bytes as f64 / self.bytes_per_second).min(1e9))
    }

    fn takes_pages(&self, pages: u64, zero: u64) -> Duration {
        let work = PER_PAGE.saturating_mul(u32::try_from(pages).unwrap_or(u32::MAX));
        self.takes(wire_bytes(pages, zero)).max(work)
    }
}

fn wire_bytes(pages: u64, zero: u64) -> u64 {
    (pages - zero).saturating_mul(PAGE).saturating_add(zero * ZERO_BYTES)
}

/// `before`: bytes of files and image content that go first.
pub fn predict(container: &Behaviour, way: &Way, budget: &Budget, before: u64) -> Prediction {
    let eager = saved_by_criu(container.in_pause, way)
        + looked_through(container.shared)
        + filled_by_criu(container.filled);
    let mut prediction = Prediction::default();
    let mut rounds: Vec<RoundFigures> = Vec::new();
    let (mut pages, mut zero, mut throttle) = (container.pages, container.zero_pages, 0);
    while container.noticed && rounds.len() < ROUNDS_MAX {
        let duration = container.scan + way.takes_pages(pages, zero) + way.round_trip;
        let running = duration.mul_f64(f64::from(100 - throttle.min(100)) / 100.0);
        let left = container.writes(running);
        let scan = container.scan;
        rounds.push(RoundFigures { pages, left, scan, duration, throttle });
        prediction.rounds.push(round(rounds.len(), pages, zero, container.scan, duration));
        // What is written is hardly ever zeros.
        (pages, zero) = (left, 0);
        match policy::decide(&rounds, budget) {
            Next::Another => {}
            Next::Throttle(percent) => throttle = percent,
            Next::Freeze => {
                prediction.converges = true;
                break;
            }
            Next::PostCopy => break,
            Next::GiveUp { reason, .. } => {
                prediction.gives_up = reason;
                break;
            }
        }
    }
    let pause = eager
        + if container.noticed {
            policy::expected_pause(&rounds, budget)
        } else {
            // One pass, while it stands still.
            budget.fixed + way.takes_pages(container.pages, container.zero_pages)
        };
    if !container.noticed {
        prediction.converges = pause <= budget.max_pause;
    }
    let in_pause = if container.noticed { wire_bytes(pages, 0) } else { wire_bytes(pages, zero) };
    let rounds_took: Duration = rounds.iter().map(|round| round.duration).sum();
    prediction.expected_downtime_us = micros(pause);
    prediction.expected_total_us = micros(BESIDE + way.takes(before) + rounds_took + pause);
    prediction.transferred = in_pause + prediction.rounds.iter().map(|r| r.wire_bytes).sum::<u64>();
    prediction.cpu_throttle_percentage = throttle;
    prediction
}

/// What so many bytes beside private memory cost inside the pause.
pub fn saved_by_criu(bytes: u64, way: &Way) -> Duration {
    way.takes(bytes) + Duration::from_secs_f64((bytes as f64 / CRIU_SAVES).min(1e9))
}

/// What so many bytes of shared memory cost inside the pause in any case.
pub fn looked_through(bytes: u64) -> Duration {
    Duration::from_secs_f64((bytes as f64 / LOOKED_THROUGH).min(1e9))
}

/// What so many bytes cost inside the pause that have come before.
pub fn filled_by_criu(bytes: u64) -> Duration {
    Duration::from_secs_f64((bytes as f64 / CRIU_FILLS).min(1e9))
}

fn round(number: usize, pages: u64, zero: u64, scan: Duration, duration: Duration) -> RoundReport {
    RoundReport {
        number: number as u32,
        dirty_pages: pages,
        zero_pages: zero,
        wire_bytes: wire_bytes(pages, zero),
        scan_us: micros(scan),
        duration_us: micros(duration),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use transship_migration::Throttle;

    use super::*;

    const GIB: u64 = (1 << 30) / PAGE;
    const MIB: u64 = (1 << 20) / PAGE;

    /// Watched for 3 s: so many MiB in each 100 ms, so many in all.
    fn container(per_interval: u64, written: u64) -> Behaviour {
        Behaviour::new(&WatchResponse {
            pages: GIB,
            written: vec![per_interval * MIB; 30],
            interval_us: 100_000,
            written_pages: written * MIB,
            scan_us: 1000,
            ..Default::default()
        })
    }

    fn gigabit() -> Way {
        Way::new(&LinkReport { rate: 110 << 20, round_trip_us: 300, ..Default::default() }, 0)
    }

    fn predicted(container: &Behaviour) -> Prediction {
        predict(container, &gigabit(), &Budget::default(), 0)
    }

    #[test]
    fn an_idle_container_takes_one_round_and_the_least_pause() {
        let idle = predicted(&container(0, 0));
        assert!(idle.converges && idle.gives_up.is_empty(), "{idle:?}");
        assert_eq!((idle.rounds.len(), idle.cpu_throttle_percentage), (1, 0));
        let fixed = micros(Budget::default().fixed);
        assert_eq!(idle.expected_downtime_us, fixed + 1000);
        // 1 GiB over 110 MiB/s.
        assert!((9_000_000..11_000_000).contains(&idle.expected_total_us), "{idle:?}");
        assert_eq!(idle.transferred, 1 << 30);
    }

    #[test]
    fn more_writing_means_more_rounds_and_never_a_shorter_pause() {
        let mut before = predicted(&container(0, 0));
        for per_interval in [1, 3, 5] {
            let now = predicted(&container(per_interval, per_interval * 30));
            assert!(now.converges, "{per_interval}: {now:?}");
            assert!(now.rounds.len() >= before.rounds.len(), "{per_interval}");
            assert!(now.expected_downtime_us >= before.expected_downtime_us, "{per_interval}");
            before = now;
        }
        assert!(before.rounds.len() > 2);
    }

    /// 500 MiB/s over a link of 110.
    #[test]
    fn faster_than_the_link_it_is_slowed_down_or_given_up() {
        let fast = container(50, 1000);
        let slowed = predicted(&fast);
        assert!(slowed.converges && slowed.cpu_throttle_percentage >= 80, "{slowed:?}");
        let never = Budget { throttle: Throttle::Never, ..Default::default() };
        let given_up = predict(&fast, &gigabit(), &never, 0);
        assert!(!given_up.converges && given_up.gives_up.contains("MiB/s"), "{given_up:?}");
    }

    /// The same pages again and again are a hot set, and not a rate.
    #[test]
    fn a_hot_set_does_not_grow_with_time() {
        let hot = container(4, 4);
        let pages = |time| hot.writes(Duration::from_millis(time)) / MIB;
        assert_eq!((pages(50), pages(100), pages(5000)), (2, 4, 4));
        let cold = container(4, 120);
        assert_eq!(cold.writes(Duration::from_secs(1)) / MIB, 40);
        assert_eq!(cold.writes(Duration::from_secs(10_000)), GIB, "there is no more than all");
    }

    #[test]
    fn what_criu_saves_is_in_the_pause() {
        let plain = container(1, 1);
        let shared = Behaviour { in_pause: 110 << 20, ..plain.clone() };
        let more = predicted(&shared).expected_downtime_us - predicted(&plain).expected_downtime_us;
        assert!((1_000_000..1_300_000).contains(&more), "{more}");
    }

    #[test]
    fn shared_memory_goes_in_rounds_and_is_looked_at_in_the_pause() {
        let of = |shared_bytes, filled_bytes| {
            predicted(&Behaviour::new(&WatchResponse {
                shared_bytes,
                filled_bytes,
                written: vec![0; 30],
                interval_us: 100_000,
                ..Default::default()
            }))
        };
        let (none, given, filled) = (of(0, 0), of(1 << 30, 0), of(1 << 30, 1 << 30));
        assert_eq!(given.transferred - none.transferred, 1 << 30);
        let more = given.expected_downtime_us - none.expected_downtime_us;
        assert!((150_000..300_000).contains(&more), "{more}");
        let more = filled.expected_downtime_us - given.expected_downtime_us;
        assert!((1_000_000..1_200_000).contains(&more), "{more}");
    }

    #[test]
    fn zero_pages_cost_next_to_nothing() {
        let mut zero = container(0, 0);
        zero.zero_pages = GIB;
        let prediction = predicted(&zero);
        assert!(prediction.transferred < 2 << 20 && prediction.converges, "{prediction:?}");
    }

    #[test]
    fn without_tracking_everything_is_in_the_pause() {
        let blind = Behaviour::new(&WatchResponse { pages: GIB, ..Default::default() });
        let prediction = predicted(&blind);
        assert!(prediction.rounds.is_empty() && !prediction.converges);
        assert!(prediction.expected_downtime_us > 9_000_000, "{prediction:?}");
    }

    #[test]
    fn a_limit_is_the_rate() {
        let link = LinkReport { rate: 1 << 30, ..Default::default() };
        let idle = container(0, 0);
        let limited = predict(&idle, &Way::new(&link, 100 << 20), &Budget::default(), 0);
        assert!(limited.expected_total_us > 10_000_000, "{limited:?}");
    }
}
