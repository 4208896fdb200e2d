//! How a migration went: for programs every figure, for people the ones that
//! matter.

use serde_json::{Value, json};
use transship_api::control::{
    FillReport, MemoryReport, PauseReport, PostCopyReport, Report, RoundReport,
};

use crate::print;

pub fn as_json(r: &Report) -> Value {
    let phases: Vec<_> = r
        .phases
        .iter()
        .map(|p| json!({ "phase": p.phase, "duration_us": p.duration_us }))
        .collect();
    json!({
        "migration": r.migration,
        "namespace": r.namespace,
        "container": r.container,
        "source": r.source,
        "target": r.target,
        "source_state": r.source_state,
        "target_state": r.target_state,
        "target_pid": r.target_pid,
        "downtime_us": r.downtime_us,
        "expected_downtime_us": r.memory.expected_downtime_us,
        "total_us": r.total_us,
        "phases": phases,
        "image_bytes": r.image_bytes,
        "rootfs_bytes": r.rootfs_bytes,
        "content_bytes": r.content_bytes,
        "memory": r.memory.as_ref().map(memory),
    })
}

/// Names as in `control.proto`; those of QEMU's `query-migrate` with `_`.
fn memory(m: &MemoryReport) -> Value {
    json!({
        "backend": m.backend,
        "dump": m.dump,
        "restore": m.restore,
        "fallback": m.fallback,
        "lanes": m.lanes,
        "page_size": m.page_size,
        "transferred": m.transferred,
        "total": m.total,
        "duplicate": m.duplicate,
        "normal": m.normal,
        "normal_bytes": m.normal_bytes,
        "compressed": m.compressed,
        "dirty_pages_rate": m.dirty_pages_rate,
        "dirty_sync_count": m.dirty_sync_count,
        "cpu_throttle_percentage": m.cpu_throttle_percentage,
        "postcopy_requests": m.postcopy_requests,
        "post_copy": m.post_copy.as_ref().map(|p| json!({
            "pages": p.pages,
            "request_bytes": p.request_bytes,
            "recoveries": p.recoveries,
            "duration_us": p.duration_us,
        })),
        "expected_downtime_us": m.expected_downtime_us,
        "criu_pages": m.criu_pages,
        "shared_bytes": m.shared_bytes,
        "given_bytes": m.given_bytes,
        "rounds": rounds_json(&m.rounds),
        "pause": m.pause.as_ref().map(|p| json!({
            "freeze_us": p.freeze_us,
            "final_scan_us": p.final_scan_us,
            "final_send_us": p.final_send_us,
            "dump_us": p.dump_us,
            "transfer_us": p.transfer_us,
            "restore_us": p.restore_us,
            "resume_us": p.resume_us,
        })),
        "fill": m.fill.as_ref().map(|f| json!({
            "faults": f.faults,
            "fault_latency": f.fault_latency,
            "pages": f.pages,
            "duration_us": f.duration_us,
        })),
    })
}

pub fn rounds_json(rounds: &[RoundReport]) -> Vec<Value> {
    let round = |r: &RoundReport| {
        json!({
            "number": r.number,
            "dirty_pages": r.dirty_pages,
            "zero_pages": r.zero_pages,
            "wire_bytes": r.wire_bytes,
            "scan_us": r.scan_us,
            "duration_us": r.duration_us,
        })
    };
    rounds.iter().map(round).collect()
}

/// A container that moved.
pub fn text(r: &Report) -> Vec<String> {
    let mut lines =
        vec![format!("{}/{} moved from {} to {}", r.namespace, r.container, r.source, r.target)];
    lines.push(format!(
        "  {} there (pid {}), {} here",
        r.target_state, r.target_pid, r.source_state
    ));
    lines.push(format!(
        "  downtime {}{}, total {}",
        print::micros(r.downtime_us),
        expected(r.memory.expected_downtime_us),
        print::micros(r.total_us)
    ));
    lines.extend(figures(r));
    lines
}

/// What is the same for one that moved and one that did not.
pub fn figures(r: &Report) -> Vec<String> {
    let pages = r
        .memory
        .as_ref()
        .map_or(String::new(), |m| format!("{} of pages, ", print::bytes(m.transferred)));
    let state = if r.memory.is_some() { "state" } else { "memory and state" };
    let mut lines = vec![format!(
        "  sent {pages}{} of {state}, {} of files, {} of image content",
        print::bytes(r.image_bytes),
        print::bytes(r.rootfs_bytes),
        print::bytes(r.content_bytes)
    )];
    if let Some(memory) = r.memory.as_ref() {
        lines.extend(memory_text(memory));
    }
    let phases: Vec<_> =
        r.phases.iter().map(|p| format!("{} {}", p.phase, print::micros(p.duration_us))).collect();
    if !phases.is_empty() {
        lines.push(format!("  phases: {}", phases.join(", ")));
    }
    lines
}

fn expected(us: u64) -> String {
    if us == 0 { String::new() } else { format!(" (expected {})", print::micros(us)) }
}

fn memory_text(m: &MemoryReport) -> Vec<String> {
    let mut lines = vec![format!(
        "  memory: {} in {}, writes noticed by {}, {} dump, {} restore, {}",
        print::bytes(m.total),
        print::count(m.dirty_sync_count, "round"),
        m.backend,
        m.dump,
        m.restore,
        print::count(m.lanes.into(), "lane"),
    )];
    if !m.fallback.is_empty() {
        lines.push(format!("  not as planned: {}", m.fallback));
    }
    if m.cpu_throttle_percentage > 0 {
        lines.push(format!("  slowed down by {} % for it", m.cpu_throttle_percentage));
    }
    lines.extend(rounds_text(&m.rounds));
    lines.push(format!(
        "  pages: {} with content, {} zero, {} saved by CRIU; compression saved {}",
        m.normal,
        m.duplicate,
        m.criu_pages,
        print::bytes(m.compressed)
    ));
    lines.extend(m.pause.as_ref().map(pause_text));
    lines.extend(m.post_copy.as_ref().map(|p| late_text(m.postcopy_requests, p)));
    lines.extend(m.fill.as_ref().map(fill_text));
    lines
}

pub fn rounds_text(rounds: &[RoundReport]) -> Vec<String> {
    if rounds.is_empty() {
        return vec![];
    }
    let row = |r: &RoundReport| {
        vec![
            format!("  {}", r.number),
            r.dirty_pages.to_string(),
            r.zero_pages.to_string(),
            print::bytes(r.wire_bytes),
            print::micros(r.scan_us),
            print::micros(r.duration_us),
        ]
    };
    let rows: Vec<_> = rounds.iter().map(row).collect();
    print::layout(&["  ROUND", "DIRTY PAGES", "ZERO", "WIRE", "SCAN", "TIME"], &rows)
}

fn pause_text(p: &PauseReport) -> String {
    let parts = [
        ("freeze", p.freeze_us),
        ("final scan", p.final_scan_us),
        ("final send", p.final_send_us),
        ("dump", p.dump_us),
        ("transfer", p.transfer_us),
        ("restore", p.restore_us),
        ("resume", p.resume_us),
    ];
    let parts: Vec<_> =
        parts.iter().map(|(name, us)| format!("{name} {}", print::micros(*us))).collect();
    format!("  pause (parts overlap): {}", parts.join(", "))
}

fn late_text(requests: u64, p: &PostCopyReport) -> String {
    let mut text = format!(
        "  after it ran: {} in {}, of which {} brought {}",
        print::count(p.pages, "page"),
        print::micros(p.duration_us),
        print::count(requests, "request"),
        print::bytes(p.request_bytes),
    );
    if p.recoveries > 0 {
        let again = print::count(p.recoveries.into(), "time");
        text += &format!("; the link was made again {again}");
    }
    text
}

fn fill_text(f: &FillReport) -> String {
    let mut text = format!("  filled: {} pages in {}", f.pages, print::micros(f.duration_us));
    let faults = print::count(f.faults, "fault");
    match (quantile(&f.fault_latency, 50), quantile(&f.fault_latency, 99)) {
        (Some(half), Some(most)) => {
            text += &format!("; {faults}, half of them {half}, 99 % {most}");
        }
        _ => text += &format!("; {faults}"),
    }
    text
}

/// The bucket within which so many percent of the faults were served.
fn quantile(buckets: &[u64], percent: u64) -> Option<String> {
    let all = buckets.iter().fold(0u64, |sum, n| sum.saturating_add(*n));
    let wanted = all.saturating_mul(percent).div_ceil(100);
    let mut sum = 0u64;
    let at = buckets.iter().position(|n| {
        sum = sum.saturating_add(*n);
        sum >= wanted && wanted > 0
    })?;
    // The last bucket has no upper bound; a peer may send many.
    let bound = |bucket: usize| 16u64.checked_shl(u32::try_from(bucket).ok()?);
    Some(if at + 1 < buckets.len() {
        format!("within {}", print::micros(bound(at)?))
    } else {
        format!("beyond {}", print::micros(bound(at.saturating_sub(1))?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let round = RoundReport {
            number: 1,
            dirty_pages: 262_144,
            zero_pages: 1000,
            wire_bytes: 1 << 30,
            scan_us: 3_000,
            duration_us: 900_000,
            ..Default::default()
        };
        let memory = MemoryReport {
            backend: "write-protect".into(),
            dump: "ordinary".into(),
            restore: "eager".into(),
            fallback: "this CRIU reads pages itself".into(),
            lanes: 4,
            total: 1 << 30,
            transferred: 2 << 20,
            dirty_sync_count: 1,
            expected_downtime_us: 20_000,
            rounds: vec![round],
            pause: Some(PauseReport { freeze_us: 1500, ..Default::default() }).into(),
            postcopy_requests: 3,
            post_copy: Some(PostCopyReport {
                pages: 100,
                request_bytes: 4096,
                recoveries: 1,
                duration_us: 2000,
                ..Default::default()
            })
            .into(),
            fill: Some(FillReport {
                faults: 100,
                fault_latency: vec![0, 60, 38, 1, 1],
                pages: 5,
                duration_us: 1000,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        Report { downtime_us: 21_000, memory: Some(memory).into(), ..Default::default() }
    }

    #[test]
    fn expected_and_actual_stand_side_by_side() {
        let json = as_json(&report());
        assert_eq!(
            (&json["downtime_us"], &json["expected_downtime_us"]),
            (&json!(21_000), &json!(20_000))
        );
        let text = text(&report()).join("\n");
        assert!(text.contains("downtime 21.0 ms (expected 20.0 ms)"), "{text}");
        for words in [
            "1 round,",
            "4 lanes",
            "not as planned: this CRIU",
            "262144",
            "freeze 1.5 ms",
            "100 pages in 2.0 ms, of which 3 requests brought",
            "made again 1 time",
            "within 32 µs, 99 % within 128 µs",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    /// Programs read what `control.proto` names; a field that is missing here
    /// would be missing there.
    #[test]
    fn every_field_is_in_the_json() {
        use protobuf::MessageFull;
        let json = as_json(&report());
        let memory = &json["memory"];
        for (value, descriptor) in [
            (&json, Report::descriptor()),
            (memory, MemoryReport::descriptor()),
            (&memory["rounds"][0], RoundReport::descriptor()),
            (&memory["pause"], PauseReport::descriptor()),
            (&memory["post_copy"], PostCopyReport::descriptor()),
            (&memory["fill"], FillReport::descriptor()),
        ] {
            for field in descriptor.fields() {
                assert!(!value[field.name()].is_null(), "{} in {value}", field.name());
            }
        }
    }

    #[test]
    fn without_memory_there_is_nothing_to_tell_of_it() {
        let report = Report::default();
        assert_eq!(as_json(&report)["memory"], Value::Null);
        assert!(text(&report).join("\n").contains("of memory and state"));
    }

    #[test]
    fn quantiles_are_buckets() {
        assert_eq!(quantile(&[], 50), None);
        assert_eq!(quantile(&[0, 0], 50), None);
        assert_eq!(quantile(&[1, 0, 0], 99).unwrap(), "within 16 µs");
        assert_eq!(quantile(&[1, 1, 8], 50).unwrap(), "beyond 32 µs");
        assert_eq!(quantile(&[0; 80], 50), None);
        let mut far = vec![0; 80];
        far[79] = 1;
        assert_eq!(quantile(&far, 50), None);
    }
}
