//! When to freeze: what follows from the rounds so far, as a pure function.
//!
//! A round sends what was written since the one before; meanwhile the
//! container writes again, and that is `left`. While the lanes carry more than
//! it writes, `left` shrinks from round to round, until sending it takes no
//! time that counts. When it does not shrink, more rounds are of no use, and
//! what remains is, in this order and only as far as it is allowed:
//!
//! 1. to slow the container down, step by step;
//! 2. to let it run on the target before everything is there;
//! 3. to give up. It goes on at full speed where it is.
//!
//! As with QEMU, the budget is kept strictly: nobody who asked for 100 ms gets
//! a second. But only rounds can be asked to keep it. What a pause costs
//! without any page is no reason to slow a container down or to give up,
//! because no round changes it: a part of the budget is always the pages' own.

use std::time::Duration;

use transship_types::PAGE;

use crate::options::{Budget, PostCopy, Throttle};

/// So little time to send is lost among everything else in a pause.
const NEGLIGIBLE: Duration = Duration::from_millis(5);

/// Within the budget already, a few rounds more are worth it while each one
/// halves what is left: the pause becomes shorter than it must be.
const POLISH: usize = 8;

/// The part of the budget that pages may take even if everything else takes
/// more than the whole: a pause that is too long in any case does not get
/// noticeably longer by it.
const PAGES_OWN: u32 = 4;

/// A round that leaves more than this part of what it has sent is not getting
/// anywhere.
const SHRINKS: f64 = 0.8;

/// So many rounds that get nowhere, one after the other: the first may have
/// met a burst.
const STALLED: usize = 2;

/// Rounds between two changes of anything. Shrinking by a fifth each time,
/// ten leave a tenth; who has not arrived by then will not.
const ROUNDS: usize = 10;

/// Processor time taken away, in percent, one step after the other.
const STEPS: [u32; 6] = [20, 40, 60, 80, 90, 95];

/// A round of fewer pages (4 MiB) says more about round trips than about what
/// the lanes carry.
const LARGE: u64 = 1024;

/// One round as it was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundFigures {
    /// Pages sent.
    pub pages: u64,
    /// Pages written meanwhile: what a freeze at its end would have to move.
    pub left: u64,
    /// How long it took to find out which pages to send.
    pub scan: Duration,
    /// From the scan to the last page's arrival.
    pub duration: Duration,
    /// Percent of its processor time that the container did without.
    pub throttle: u32,
}

/// What to do after a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Another,
    Freeze,
    /// Take so many percent of its processor time away, then another round.
    Throttle(u32),
    /// Let it run there before all its memory is.
    PostCopy,
    GiveUp {
        reason: String,
        remedy: String,
    },
}

/// What follows from the rounds since the beginning.
pub fn decide(rounds: &[RoundFigures], budget: &Budget) -> Next {
    let Some(last) = rounds.last() else { return Next::Another };
    let sending = time_to_send(last.left, page_rate(rounds));
    if sending <= NEGLIGIBLE {
        return Next::Freeze;
    }
    let room = budget.max_pause.saturating_sub(budget.fixed);
    if added(last, sending, budget) <= room.max(budget.max_pause / PAGES_OWN) {
        let halves = last.left <= last.pages / 2;
        let polish = halves && rounds.len() < POLISH && last.throttle == 0;
        return if polish { Next::Another } else { Next::Freeze };
    }
    if budget.post_copy == PostCopy::Always {
        return Next::PostCopy;
    }
    let alike = rounds.iter().rev().take_while(|round| round.throttle == last.throttle).count();
    let idle = rounds.iter().rev().take(alike).take_while(|round| !shrinks(round)).count();
    // Once it is slowed down it suffers: one round tells enough.
    let patience = if last.throttle == 0 { STALLED } else { 1 };
    if idle < patience && alike < ROUNDS {
        return Next::Another;
    }
    // Looking at all of a large shared memory takes its time, and no round and
    // no throttle makes that less.
    let sending = sending.saturating_sub(budget.beside);
    if sending <= room.max(budget.max_pause / PAGES_OWN) {
        return Next::Freeze;
    }
    let step = STEPS.into_iter().find(|step| *step > last.throttle);
    match (budget.throttle, step, budget.post_copy) {
        (Throttle::Auto, Some(step), _) => Next::Throttle(step),
        (_, _, PostCopy::Auto) => Next::PostCopy,
        _ => give_up(rounds, last, budget),
    }
}

/// How long the pause would be if the freeze came now.
pub fn expected_pause(rounds: &[RoundFigures], budget: &Budget) -> Duration {
    let Some(last) = rounds.last() else { return budget.fixed };
    let sending = time_to_send(last.left, page_rate(rounds));
    budget.fixed + added(last, sending, budget)
}

/// The pages' part of the pause.
fn added(last: &RoundFigures, sending: Duration, budget: &Budget) -> Duration {
    last.scan + sending.saturating_sub(budget.beside)
}

/// Pages per second that the lanes carry, as the last round with a load for
/// them showed; 0: nothing was sent yet.
pub fn page_rate(rounds: &[RoundFigures]) -> f64 {
    let large = rounds.iter().rev().find(|round| round.pages >= LARGE);
    let best = large.or_else(|| rounds.iter().max_by_key(|round| round.pages));
    best.map_or(0.0, |round| {
        let sending = round.duration.saturating_sub(round.scan);
        round.pages as f64 / sending.as_secs_f64().max(1e-4)
    })
}

/// Pages per second that the container writes anew, as of one round.
pub fn dirty_rate(round: &RoundFigures) -> f64 {
    round.left as f64 / round.duration.as_secs_f64().max(1e-4)
}

fn shrinks(round: &RoundFigures) -> bool {
    round.left as f64 <= round.pages as f64 * SHRINKS
}

fn time_to_send(pages: u64, rate: f64) -> Duration {
    /// Beyond this nobody compares any more, and a Duration has its limits.
    const EVER: f64 = 1e9;
    if pages == 0 {
        return Duration::ZERO;
    }
    Duration::from_secs_f64((pages as f64 / rate.max(1e-6)).min(EVER))
}

fn give_up(rounds: &[RoundFigures], last: &RoundFigures, budget: &Budget) -> Next {
    let expected = expected_pause(rounds, budget);
    let mib = |rate: f64| (rate * PAGE as f64 / f64::from(1 << 20)).round();
    let slowed = match last.throttle {
        0 => String::new(),
        percent => format!(", with {percent} % of its processor time taken away"),
    };
    let reason = format!(
        "it writes {} MiB/s{slowed}, and the lanes carry {} MiB/s: after {} rounds the pause would \
         still be {} ms, and {} ms are allowed",
        mib(dirty_rate(last)),
        mib(page_rate(rounds)),
        rounds.len(),
        expected.as_millis(),
        budget.max_pause.as_millis(),
    );
    let mut remedies = Vec::new();
    if budget.throttle == Throttle::Never {
        remedies.push("let it be slowed down (--throttle auto)".to_owned());
    }
    if budget.post_copy == PostCopy::Never {
        remedies.push("let it run before its memory is there (--post-copy auto)".to_owned());
    }
    // Rounded up, so that the same rounds would meet it.
    let enough = expected.as_millis().div_ceil(50) * 50;
    remedies.push(format!("allow a longer pause (--max-pause {enough}ms)"));
    Next::GiveUp { reason, remedy: remedies.join(", or ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = (1 << 20) / PAGE;

    /// In MiB and milliseconds.
    fn round(pages: u64, left: u64, duration: u64, throttle: u32) -> RoundFigures {
        RoundFigures {
            pages: pages * MIB,
            left: left * MIB,
            scan: Duration::from_millis(1),
            duration: Duration::from_millis(duration + 1),
            throttle,
        }
    }

    fn budget(max_pause: u64, throttle: Throttle, post_copy: PostCopy) -> Budget {
        let fixed = Duration::from_millis(40);
        let beside = Duration::from_millis(10);
        Budget { max_pause: Duration::from_millis(max_pause), fixed, beside, throttle, post_copy }
    }

    #[test]
    fn it_freezes_when_little_is_left_and_gives_up_when_that_never_comes() {
        use Next::{Another, Freeze, PostCopy as Post, Throttle as Slow};
        let strict = budget(100, Throttle::Never, PostCopy::Never);
        let slow = budget(100, Throttle::Auto, PostCopy::Never);
        let late = budget(100, Throttle::Auto, PostCopy::Auto);
        let late_only = budget(100, Throttle::Never, PostCopy::Auto);
        let always = budget(100, Throttle::Auto, PostCopy::Always);
        let slow_host = Budget { fixed: Duration::from_millis(150), ..slow.clone() };
        let tiny = budget(1, Throttle::Never, PostCopy::Never);
        // 400 MiB/s throughout, unless said otherwise.
        let whole = round(1024, 200, 2560, 0);
        let stuck = |throttle| round(200, 200, 500, throttle);
        // Of which 300 ms are spent on finding out what to send.
        let look = |pages, left| RoundFigures {
            scan: Duration::from_millis(300),
            ..round(pages, left, 300 + pages * 5 / 2, 0)
        };
        let table: &[(&str, &[RoundFigures], &Budget, Next)] = &[
            ("nothing sent yet", &[], &strict, Another),
            ("idle", &[round(1024, 0, 2560, 0)], &strict, Freeze),
            ("an empty container", &[round(0, 0, 0, 0)], &strict, Freeze),
            ("idle, and a budget that no pause meets", &[round(1024, 1, 2560, 0)], &tiny, Freeze),
            ("too much is left", &[whole], &strict, Another),
            ("within the budget, and shrinking", &[round(1024, 20, 2560, 0)], &strict, Another),
            (
                "no longer halved",
                &[whole, round(200, 20, 500, 0), round(20, 12, 50, 0)],
                &strict,
                Freeze,
            ),
            ("one burst", &[whole, stuck(0)], &strict, Another),
            ("a long look, and shrinking", &[look(64, 20)], &slow, Another),
            (
                "a long look that leaves little",
                &[look(64, 20), look(20, 19), look(19, 19)],
                &slow,
                Freeze,
            ),
            ("a long look that leaves much", &[look(64, 60), look(60, 60)], &slow, Slow(20)),
            ("no way", &[whole, stuck(0), stuck(0)], &slow, Slow(20)),
            ("that was not enough", &[whole, stuck(0), stuck(0), stuck(20)], &slow, Slow(40)),
            ("it helps", &[stuck(0), stuck(0), round(200, 100, 500, 40)], &slow, Another),
            (
                "within the budget, and suffering",
                &[stuck(0), stuck(0), round(200, 20, 500, 40)],
                &slow,
                Freeze,
            ),
            ("the last step", &[stuck(0), stuck(90)], &slow, Slow(95)),
            ("all steps, then late", &[stuck(0), stuck(95)], &late, Post),
            ("no steps, then late", &[stuck(0), stuck(0)], &late_only, Post),
            ("late at once", &[whole], &always, Post),
            (
                "a pause that is too long without any page",
                &[whole, round(200, 12, 500, 0), round(12, 8, 30, 0)],
                &slow_host,
                Freeze,
            ),
            ("and with too many of them", &[whole, stuck(0), stuck(0)], &slow_host, Slow(20)),
            ("late, but there is no need", &[round(1024, 0, 2560, 0)], &always, Freeze),
        ];
        for (case, rounds, budget, next) in table {
            assert_eq!(decide(rounds, budget), *next, "{case}");
        }
        for (case, rounds, budget) in [
            ("stalled", vec![whole, stuck(0), stuck(0)], &strict),
            ("slowed down in vain", vec![whole, stuck(0), stuck(0), stuck(95)], &slow),
            ("for ever a little less", vec![round(200, 150, 500, 0); ROUNDS], &strict),
            ("a budget that these pages do not meet", vec![round(200, 190, 500, 0); 2], &tiny),
        ] {
            let next = decide(&rounds, budget);
            assert!(matches!(next, Next::GiveUp { .. }), "{case}: {next:?}");
        }
    }

    #[test]
    fn giving_up_says_why_and_what_would_help() {
        let stuck = round(200, 200, 500, 0);
        let Next::GiveUp { reason, remedy } =
            decide(&[stuck, stuck], &budget(100, Throttle::Never, PostCopy::Never))
        else {
            panic!("it goes on")
        };
        assert_eq!(
            reason,
            "it writes 399 MiB/s, and the lanes carry 400 MiB/s: after 2 rounds the pause would \
             still be 531 ms, and 100 ms are allowed"
        );
        for word in ["--throttle auto", "--max-pause 550ms"] {
            assert!(remedy.contains(word), "{remedy}");
        }
        let stuck = round(200, 200, 500, 95);
        let Next::GiveUp { reason, remedy } =
            decide(&[stuck], &budget(100, Throttle::Auto, PostCopy::Never))
        else {
            panic!("it goes on")
        };
        assert!(reason.contains("95 % of its processor time"), "{reason}");
        assert!(!remedy.contains("--throttle"), "{remedy}");
    }

    #[test]
    fn the_rate_is_that_of_a_round_with_a_load() {
        let rate = |rounds: &[RoundFigures]| (page_rate(rounds) / MIB as f64).round() as u64;
        assert_eq!(rate(&[]), 0);
        assert_eq!(rate(&[round(1000, 1, 1000, 0)]), 1000);
        // The second carried next to nothing.
        assert_eq!(rate(&[round(1000, 1, 1000, 0), round(1, 0, 10, 0)]), 1000);
        // The link has become slower.
        assert_eq!(rate(&[round(1000, 100, 1000, 0), round(100, 10, 1000, 0)]), 100);
    }

    #[test]
    fn the_prediction_counts_what_is_left() {
        let budget = budget(100, Throttle::Auto, PostCopy::Never);
        let millis = |rounds: &[RoundFigures]| expected_pause(rounds, &budget).as_millis();
        assert_eq!(millis(&[]), 40);
        assert_eq!(millis(&[round(1000, 0, 1000, 0)]), 41);
        assert_eq!(millis(&[round(1000, 5, 1000, 0)]), 41, "beside CRIU");
        assert_eq!(millis(&[round(1000, 50, 1000, 0)]), 81);
    }

    /// Whatever a container does, the rounds end.
    #[test]
    fn no_container_is_followed_for_ever() {
        let budget = budget(100, Throttle::Auto, PostCopy::Never);
        for writes in [0, 1, 50, 100, 300, 399, 400, 401, 2000, 100_000] {
            let mut rounds = Vec::new();
            let (mut pages, mut throttle) = (1024, 0);
            loop {
                let duration = pages * 1000 / 400 + 3;
                let written = writes * (100 - u64::from(throttle)) / 100;
                let left = (written * duration / 1000).min(1024);
                rounds.push(round(pages, left, duration, throttle));
                pages = left;
                match decide(&rounds, &budget) {
                    Next::Another => {}
                    Next::Throttle(step) => throttle = step,
                    Next::Freeze => break,
                    other => {
                        assert!(writes > 5000, "{writes} MiB/s: {other:?}");
                        break;
                    }
                }
                assert!(rounds.len() < 100, "{writes} MiB/s");
            }
        }
    }
}
