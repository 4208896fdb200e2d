//! The bandwidth that all lanes of a migration share.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{self, Instant};

/// Bytes that may go at once after a silence: as much as 50 ms would carry.
const BURST: f64 = 0.05;

/// A new limit takes effect within this time, also on a lane that waits under
/// the old one.
const LOOK: Duration = Duration::from_millis(100);

/// Bytes per second; changeable while they flow.
#[derive(Debug)]
pub struct RateLimit(Mutex<Bucket>);

impl RateLimit {
    /// 0: no limit.
    pub fn new(bytes_per_s: u64) -> Self {
        Self(Mutex::new(Bucket::new(bytes_per_s, Instant::now())))
    }

    pub fn set(&self, bytes_per_s: u64) {
        self.bucket().set(bytes_per_s, Instant::now());
    }

    /// 0: no limit.
    pub fn get(&self) -> u64 {
        self.bucket().bytes_per_s
    }

    /// Returns once so many bytes may go.
    pub async fn take(&self, bytes: u64) {
        loop {
            let Err(wait) = self.bucket().take(bytes, Instant::now()) else { return };
            time::sleep(wait.min(LOOK)).await;
        }
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        // Every change under this lock is a few numbers.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whoever comes while there is credit may take all he needs, and leaves the
/// debt to the next: so a batch larger than the burst passes as well, and over
/// time no more than the limit does.
#[derive(Debug)]
struct Bucket {
    bytes_per_s: u64,
    credit: f64,
    at: Instant,
}

impl Bucket {
    fn new(bytes_per_s: u64, now: Instant) -> Self {
        Self { bytes_per_s, credit: bytes_per_s as f64 * BURST, at: now }
    }

    fn set(&mut self, bytes_per_s: u64, now: Instant) {
        self.fill(now);
        self.bytes_per_s = bytes_per_s;
        // A debt made under a higher limit would be paid for ages under a
        // lower one.
        self.credit = self.credit.clamp(-(bytes_per_s as f64), bytes_per_s as f64 * BURST);
    }

    fn fill(&mut self, now: Instant) {
        let rate = self.bytes_per_s as f64;
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.credit = (self.credit + rate * since).min(rate * BURST);
        self.at = now;
    }

    /// Or how long to wait before another try.
    fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        if self.bytes_per_s == 0 {
            return Ok(());
        }
        self.fill(now);
        if self.credit > 0.0 {
            self.credit -= bytes as f64;
            return Ok(());
        }
        // A byte more than the debt, so that there is credit afterwards.
        Err(Duration::from_secs_f64((1.0 - self.credit) / self.bytes_per_s as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// Takes as fast as it may by a clock of its own; bytes by `until`.
    fn drain(bucket: &mut Bucket, batch: u64, now: &mut Instant, until: Instant) -> u64 {
        let mut taken = 0;
        while *now < until {
            match bucket.take(batch, *now) {
                Ok(()) => taken += batch,
                Err(wait) => *now += wait,
            }
        }
        taken
    }

    #[test]
    fn as_much_as_the_limit_and_no_more() {
        let mut now = Instant::now();
        for (rate, batch) in [(10 * MB, 1 << 20), (100 * MB, 4096), (MB / 2, 1 << 20)] {
            let mut bucket = Bucket::new(rate, now);
            let end = now + Duration::from_secs(60);
            let taken = drain(&mut bucket, batch, &mut now, end) as f64;
            let (least, most) = (rate as f64 * 60.0, rate as f64 * (60.0 + BURST));
            assert!(taken >= least && taken <= most + batch as f64, "{taken} at {rate}");
        }
    }

    #[test]
    fn a_silence_saves_up_no_more_than_a_burst() {
        let mut now = Instant::now();
        let mut bucket = Bucket::new(10 * MB, now);
        now += Duration::from_secs(3600);
        let end = now + Duration::from_secs(1);
        let taken = drain(&mut bucket, 4096, &mut now, end);
        assert!(taken < 11 * MB, "{taken}");
    }

    #[test]
    fn it_changes_while_it_flows() {
        let mut now = Instant::now();
        let mut bucket = Bucket::new(100 * MB, now);
        assert_eq!(bucket.take(1000 * MB, now), Ok(()));
        // Ten seconds of debt; the new limit forgives most of it.
        bucket.set(MB, now);
        let wait = bucket.take(1, now).unwrap_err();
        assert!(wait <= Duration::from_millis(1001), "{wait:?}");
        now += wait;
        assert_eq!(bucket.take(1, now), Ok(()));
        bucket.set(0, now);
        for _ in 0..100 {
            assert_eq!(bucket.take(1000 * MB, now), Ok(()));
        }
        // No debt was made where there was no limit.
        bucket.set(MB, now);
        assert!(bucket.take(1, now + Duration::from_millis(1)).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn lanes_share_it_and_hear_of_changes() {
        let limit = std::sync::Arc::new(RateLimit::new(MB));
        let start = Instant::now();
        let lane = |limit: std::sync::Arc<RateLimit>| async move {
            for _ in 0..50 {
                limit.take(100_000).await;
            }
        };
        tokio::join!(lane(limit.clone()), lane(limit.clone()));
        let took = start.elapsed().as_secs_f64();
        assert!((9.0..11.0).contains(&took), "{took}");
        // An hour's debt, and no limit any more.
        limit.take(3600 * MB).await;
        let waiting = tokio::spawn({
            let limit = limit.clone();
            async move { limit.take(1).await }
        });
        tokio::task::yield_now().await;
        limit.set(0);
        time::timeout(Duration::from_secs(1), waiting).await.expect("at once").unwrap();
    }
}
