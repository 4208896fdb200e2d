//! How memory travels, between what the agent says and what a migration knows.

use std::time::Duration;

use transship_api::control::{
    FillReport, MemoryReport, PauseReport, PostCopyReport, Progress, RoundReport, Tuning,
};
use transship_memory::Backend;
use transship_migration::{Budget, Options, PostCopy, Throttle, report};
use transship_types::{
    PAGE,
    quantity::micros,
    tuning::{LANES, MAX_PAUSE},
};

use crate::error::{Error, Result};

/// Missing and empty fields mean the default; anything else that is not known
/// here is refused: somebody wanted it.
pub fn options(tuning: Option<&Tuning>) -> Result<Options> {
    let mut options = Options::default();
    let Some(tuning) = tuning else { return Ok(options) };
    if tuning.max_pause_us != 0 {
        let pause = Duration::from_micros(tuning.max_pause_us);
        options.budget.max_pause = within("pause", pause, MAX_PAUSE.contains(&pause))?;
    }
    if tuning.lanes != 0 {
        options.lanes = within("number of lanes", tuning.lanes, LANES.contains(&tuning.lanes))?;
    }
    options.limit.set(match tuning.bandwidth {
        u64::MAX => 0,
        bandwidth => bandwidth,
    });
    options.budget.throttle = match tuning.throttle.as_str() {
        "" => Budget::default().throttle,
        "auto" => Throttle::Auto,
        "never" => Throttle::Never,
        other => return Err(unknown("throttle", other)),
    };
    options.budget.post_copy = match tuning.post_copy.as_str() {
        "" => Budget::default().post_copy,
        "never" => PostCopy::Never,
        "auto" => PostCopy::Auto,
        "always" => PostCopy::Always,
        other => return Err(unknown("post-copy", other)),
    };
    options.compress =
        tuning.compress.parse().map_err(|_| unknown("compress", &tuning.compress))?;
    Ok(options)
}

fn within<T: std::fmt::Debug>(what: &str, value: T, good: bool) -> Result<T> {
    if good { Ok(value) } else { Err(Error::InvalidArgument(format!("{value:?} is no {what}"))) }
}

fn unknown(what: &str, word: &str) -> Error {
    Error::InvalidArgument(format!("{what} {word:?} is not known"))
}

pub fn progress(progress: transship_migration::Progress) -> Progress {
    let mut message = Progress::new();
    message.phase = progress.phase.to_string();
    message.bytes = progress.bytes;
    if let Some(round) = progress.round {
        message.round = round.number;
        message.dirty_bytes = round.dirty_bytes;
        message.rate = round.rate;
        message.expected_downtime_us = micros(round.expected_downtime);
    }
    message
}

pub fn memory_report(memory: &report::Memory) -> MemoryReport {
    let mut message = MemoryReport::new();
    message.backend = memory.backend.as_str().into();
    message.dump = if memory.page_less { "page-less" } else { "ordinary" }.into();
    message.restore = if memory.lazy { "local-lazy" } else { "eager" }.into();
    message.fallback = memory.fallback.clone().unwrap_or_default();
    message.lanes = memory.lanes;
    message.page_size = PAGE;
    message.transferred = memory.transferred;
    message.total = memory.total;
    message.duplicate = memory.duplicate;
    message.normal = memory.normal;
    message.normal_bytes = memory.normal.saturating_mul(PAGE);
    message.compressed = memory.compressed;
    message.dirty_pages_rate = memory.dirty_pages_rate;
    message.dirty_sync_count = memory.rounds.len() as u64;
    message.cpu_throttle_percentage = memory.cpu_throttle_percentage;
    message.expected_downtime_us = micros(memory.expected_downtime);
    message.rounds = memory.rounds.iter().map(round).collect();
    message.pause = Some(pause(&memory.pause)).into();
    if let Some(fill) = &memory.fill {
        message.fill = Some(filled(fill)).into();
    }
    if let Some(late) = &memory.post_copy {
        message.postcopy_requests = late.requests;
        message.post_copy = Some(PostCopyReport {
            pages: late.pages,
            request_bytes: late.request_bytes,
            recoveries: late.recoveries,
            duration_us: micros(late.duration),
            ..Default::default()
        })
        .into();
    }
    message.criu_pages = memory.criu_pages;
    message.shared_bytes = memory.shared_bytes;
    message.given_bytes = memory.given_bytes;
    message
}

/// All memory travelled in CRIU's images.
pub fn ordinary_report(why: &str) -> MemoryReport {
    let mut message = MemoryReport::new();
    message.backend = Backend::None.as_str().into();
    message.dump = "ordinary".into();
    message.restore = "eager".into();
    message.fallback = why.into();
    message.page_size = PAGE;
    message
}

fn round(round: &report::Round) -> RoundReport {
    let mut message = RoundReport::new();
    message.number = round.number;
    message.dirty_pages = round.dirty_pages;
    message.zero_pages = round.zero_pages;
    message.wire_bytes = round.wire_bytes;
    message.scan_us = micros(round.scan);
    message.duration_us = micros(round.duration);
    message
}

fn pause(pause: &report::Pause) -> PauseReport {
    let mut message = PauseReport::new();
    message.freeze_us = micros(pause.freeze);
    message.final_scan_us = micros(pause.final_scan);
    message.final_send_us = micros(pause.final_send);
    message.dump_us = micros(pause.dump);
    message.transfer_us = micros(pause.transfer);
    message.restore_us = micros(pause.restore);
    message.resume_us = micros(pause.resume);
    message
}

fn filled(fill: &report::Fill) -> FillReport {
    let mut message = FillReport::new();
    message.faults = fill.faults;
    message.fault_latency = fill.fault_latency.clone();
    message.pages = fill.pages;
    message.duration_us = micros(fill.duration);
    message
}

#[cfg(test)]
mod tests {
    use transship_migration::{Codec, Compress};

    use super::*;

    #[test]
    fn what_is_not_said_is_the_default() {
        let shown = |options: Options| {
            format!("{:?} {} {:?}", options.budget, options.limit.get(), options.compress)
        };
        for given in [None, Some(&Tuning::new())] {
            let options = options(given).unwrap();
            assert_eq!(options.lanes, Options::default().lanes);
            assert_eq!(shown(options), shown(Options::default()));
        }
    }

    #[test]
    fn every_field_finds_its_place() {
        let tuning = Tuning {
            max_pause_us: 30_000,
            throttle: "never".into(),
            post_copy: "auto".into(),
            lanes: 3,
            bandwidth: 1 << 20,
            compress: "zstd".into(),
            ..Tuning::default()
        };
        let options = options(Some(&tuning)).unwrap();
        assert_eq!(options.budget.max_pause, Duration::from_millis(30));
        assert_eq!(options.budget.throttle, Throttle::Never);
        assert_eq!(options.budget.post_copy, PostCopy::Auto);
        assert_eq!((options.lanes, options.limit.get()), (3, 1 << 20));
        assert_eq!(options.compress, Compress::With(Codec::Zstd));
    }

    #[test]
    fn no_limit_can_be_said() {
        let tuning = Tuning { bandwidth: u64::MAX, ..Tuning::default() };
        assert_eq!(options(Some(&tuning)).unwrap().limit.get(), 0);
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        let refused =
            |tuning: Tuning| options(Some(&tuning)).expect_err("it should be refused").sentence();
        let wrong = |word: &str| word.to_owned();
        for text in [
            refused(Tuning { throttle: wrong("maybe"), ..Tuning::default() }),
            refused(Tuning { post_copy: wrong("Never"), ..Tuning::default() }),
            refused(Tuning { compress: wrong("gzip"), ..Tuning::default() }),
        ] {
            assert!(text.ends_with("is not known"), "{text}");
        }
        refused(Tuning { lanes: 1000, ..Tuning::default() });
        refused(Tuning { max_pause_us: 1, ..Tuning::default() });
    }
}
