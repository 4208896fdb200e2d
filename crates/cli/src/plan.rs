//! `transship plan`: what a migration would be like.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use transship_api::control::{LinkReport, PlanRequest, PlanResponse, Prediction, WatchResponse};
use transship_types::quantity;

use crate::{Common, Output, client, error::Failure, print, report, tuning::Tuning};

/// As the shim allows it.
const WATCHES: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(60);

const EXAMPLES: &str = "\
Examples:
  transship plan redis --to node-b
  transship plan redis --to node-b --watch 10s --max-pause 50ms --output json

The container runs on meanwhile; its writes are noticed for a while, as a
migration would notice them, and some tenths of a second of the link are used
to measure it. Nothing is begun on either node. Exits with 0 also if it could
not be moved: `movable` and the reasons say so.";

/// Say what a migration would be like, and begin nothing.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Plan {
    /// The container's id.
    container: String,
    /// A node of transshipd's configuration, or NODE@HOST:PORT.
    #[arg(long, value_name = "NODE")]
    to: String,
    /// containerd's namespace.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// How long its writes are watched.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = watch)]
    watch: Duration,
    #[command(flatten)]
    tuning: Tuning,
}

fn watch(text: &str) -> Result<Duration, String> {
    let time = quantity::duration(text).map_err(|e| e.to_string())?;
    let (least, most) = (WATCHES.start(), WATCHES.end());
    let good = WATCHES.contains(&time);
    good.then_some(time).ok_or_else(|| format!("it must be from {least:?} to {most:?}"))
}

impl Plan {
    pub async fn run(self, common: &Common) -> Result<(), Failure> {
        let what = format!("{}/{} to {} was not planned", self.namespace, self.container, self.to);
        let client = client::connect(common, &what).await?;
        let request = PlanRequest {
            namespace: self.namespace.clone(),
            container: self.container.clone(),
            node: self.to,
            watch_us: self.watch.as_micros().try_into().unwrap_or(u64::MAX),
            tuning: Some(self.tuning.message()).into(),
            ..Default::default()
        };
        let plan = client
            .plan(client::patient(), &request)
            .await
            .map_err(|e| Failure::from_call(&what, &e))?;
        match common.output {
            Output::Json => print::json(&as_json(&plan)),
            Output::Text => {
                let name = format!("{}/{}", self.namespace, self.container);
                text(&name, &plan).iter().for_each(|line| print::line(line));
            }
        }
        Ok(())
    }
}

/// Nobody refuses it, and it would not be given up.
fn movable(plan: &PlanResponse) -> bool {
    plan.refusals.is_empty() && plan.prediction.gives_up.is_empty()
}

fn as_json(plan: &PlanResponse) -> Value {
    let refusals: Vec<_> = plan
        .refusals
        .iter()
        .map(|r| json!({ "code": r.code, "reason": r.reason, "remedy": r.remedy }))
        .collect();
    let remarks: Vec<_> =
        plan.remarks.iter().map(|r| json!({ "about": r.about, "text": r.text })).collect();
    json!({
        "source": plan.source,
        "target": plan.target,
        "movable": movable(plan),
        "refusals": refusals,
        "memory": plan.memory.as_ref().map(memory_json),
        "link": plan.link.as_ref().map(|l| json!({
            "rate": l.rate,
            "round_trip_us": l.round_trip_us,
            "bytes": l.bytes,
        })),
        "prediction": plan.prediction.as_ref().map(|p| json!({
            "rounds": report::rounds_json(&p.rounds),
            "expected_downtime_us": p.expected_downtime_us,
            "expected_total_us": p.expected_total_us,
            "transferred": p.transferred,
            "converges": p.converges,
            "cpu_throttle_percentage": p.cpu_throttle_percentage,
            "gives_up": p.gives_up,
        })),
        "remarks": remarks,
        "rootfs_bytes": plan.rootfs_bytes,
        "content_bytes": plan.content_bytes,
    })
}

fn memory_json(m: &WatchResponse) -> Value {
    json!({
        "backend": m.backend,
        "fallback": m.fallback,
        "processes": m.processes,
        "page_size": m.page_size,
        "pages": m.pages,
        "zero_pages": m.zero_pages,
        "shared_bytes": m.shared_bytes,
        "filled_bytes": m.filled_bytes,
        "huge_bytes": m.huge_bytes,
        "tmpfs_bytes": m.tmpfs_bytes,
        "tmpfs_mounts": m.tmpfs_mounts,
        "written": m.written,
        "interval_us": m.interval_us,
        "written_pages": m.written_pages,
        "hot_pages": m.hot_pages,
        "dirty_pages_rate": m.dirty_pages_rate,
        "arm_us": m.arm_us,
        "scan_us": m.scan_us,
        "stopped_us": m.stopped_us,
    })
}

fn text(name: &str, plan: &PlanResponse) -> Vec<String> {
    let verdict = match (plan.refusals.is_empty(), plan.prediction.as_ref()) {
        (false, _) => "it cannot be moved now",
        (true, Some(p)) if !p.gives_up.is_empty() => "it would be given up",
        (true, Some(_)) => "it can be moved",
        (true, None) => "nobody refuses it",
    };
    let mut lines = vec![format!("{name} from {} to {}: {verdict}", plan.source, plan.target)];
    for refusal in &plan.refusals {
        lines.push(format!("  why not: {} ({})", refusal.reason, refusal.code));
        if !refusal.remedy.is_empty() {
            lines.push(format!("    remedy: {}", refusal.remedy));
        }
    }
    lines.extend(plan.memory.as_ref().map(memory_text).unwrap_or_default());
    lines.extend(plan.link.as_ref().map(link_text));
    lines.push(format!(
        "  first     {} of files, {} of image content",
        print::bytes(plan.rootfs_bytes),
        print::bytes(plan.content_bytes)
    ));
    lines.extend(plan.prediction.as_ref().map(prediction_text).unwrap_or_default());
    lines.extend(plan.remarks.iter().map(|r| format!("  mind      {}: {}", r.about, r.text)));
    lines
}

fn memory_text(m: &WatchResponse) -> Vec<String> {
    let size = |pages: u64| print::bytes(pages.saturating_mul(m.page_size));
    let mut lines = vec![format!(
        "  memory    {} in {}, {} of it zero; {} shared",
        size(m.pages),
        if m.processes == 1 { "1 process".into() } else { format!("{} processes", m.processes) },
        size(m.zero_pages),
        print::bytes(m.shared_bytes)
    )];
    if !m.written.is_empty() {
        let watched = m.interval_us.saturating_mul(m.written.len() as u64);
        lines.push(format!(
            "  writes    {} in {}, {} of it again and again; {}/s in intervals of {}",
            size(m.written_pages),
            print::micros(watched),
            size(m.hot_pages),
            size(m.dirty_pages_rate),
            print::micros(m.interval_us)
        ));
        lines.push(format!(
            "  watching  by {}: {} to begin with, {} for a scan, a process stood still for {} \
             at most",
            m.backend,
            print::micros(m.arm_us),
            print::micros(m.scan_us),
            print::micros(m.stopped_us)
        ));
    }
    lines
}

fn link_text(l: &LinkReport) -> String {
    format!(
        "  link      {}, round trip {} (found out with {})",
        print::rate(l.rate),
        print::micros(l.round_trip_us),
        print::bytes(l.bytes)
    )
}

fn prediction_text(p: &Prediction) -> Vec<String> {
    let mut lines = report::rounds_text(&p.rounds);
    let slowed = match p.cpu_throttle_percentage {
        0 => String::new(),
        percent => format!(", slowed down by {percent} %"),
    };
    lines.push(format!(
        "  expected  pause {}, total {}, {} of pages on the wire{slowed}",
        print::micros(p.expected_downtime_us),
        print::micros(p.expected_total_us),
        print::bytes(p.transferred)
    ));
    lines
}

#[cfg(test)]
mod tests {
    use protobuf::MessageFull;
    use transship_api::control::{Refusal, Remark, RoundReport};

    use super::*;

    fn plan() -> PlanResponse {
        PlanResponse {
            source: "a".into(),
            target: "b".into(),
            memory: Some(WatchResponse {
                backend: "write-protect".into(),
                page_size: 4096,
                processes: 2,
                pages: 2560,
                written: vec![256, 256],
                interval_us: 100_000,
                written_pages: 300,
                ..Default::default()
            })
            .into(),
            link: Some(LinkReport { rate: 100 << 20, ..Default::default() }).into(),
            prediction: Some(Prediction {
                rounds: vec![RoundReport { number: 1, ..Default::default() }],
                expected_downtime_us: 64_000,
                ..Default::default()
            })
            .into(),
            remarks: vec![Remark { about: "tmpfs".into(), ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn every_field_is_in_the_json() {
        let mut plan = plan();
        plan.refusals.push(Refusal::default());
        let json = as_json(&plan);
        for (value, descriptor) in [
            (&json, PlanResponse::descriptor()),
            (&json["memory"], WatchResponse::descriptor()),
            (&json["link"], LinkReport::descriptor()),
            (&json["prediction"], Prediction::descriptor()),
            (&json["refusals"][0], Refusal::descriptor()),
            (&json["remarks"][0], Remark::descriptor()),
        ] {
            for field in descriptor.fields() {
                assert!(!value[field.name()].is_null(), "{} in {value}", field.name());
            }
        }
        assert_eq!(json["movable"], false);
    }

    #[test]
    fn people_read_what_it_would_be_like() {
        let mut plan = plan();
        let said = text("default/c", &plan).join("\n");
        for words in [
            "default/c from a to b: it can be moved",
            "10.0 MiB in 2 processes",
            "1.2 MiB in 200.0 ms",
            "100.0 MiB/s",
            "pause 64.0 ms",
        ] {
            assert!(said.contains(words), "{words}: {said}");
        }
        plan.prediction.mut_or_insert_default().gives_up = "too fast".into();
        assert!(text("c", &plan)[0].ends_with("it would be given up") && !movable(&plan));
        plan.prediction.take();
        plan.refusals.push(Refusal { reason: "full".into(), ..Default::default() });
        let said = text("c", &plan).join("\n");
        assert!(said.contains("cannot be moved now\n  why not: full"), "{said}");
    }

    #[test]
    fn a_watch_has_bounds() {
        assert_eq!(watch("3s"), Ok(Duration::from_secs(3)));
        for wrong in ["3", "1ms", "61s", "1h"] {
            assert!(watch(wrong).is_err(), "{wrong}");
        }
    }
}
