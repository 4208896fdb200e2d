//! What will take long or is risky, and why, in sentences.

use transship_api::control::{PlanResponse, Remark, Tuning, WatchResponse};
use transship_types::quantity::micros;

use super::predict::{self, Way};
use crate::tuning;

/// Less is lost among everything else in a pause.
const WORTH_A_WORD: u64 = 1 << 20;
const MANY_PROCESSES: u32 = 100;

pub fn remarks(plan: &PlanResponse, tuning: &Tuning) -> Vec<Remark> {
    let mut remarks = Vec::new();
    let mut say = |about: &str, text: String| {
        remarks.push(Remark { about: about.into(), text, ..Default::default() });
    };
    if let Some(memory) = plan.memory.as_ref() {
        let way = plan.link.as_ref().map(|link| Way::new(link, tuning.bandwidth));
        of_memory(memory, way.as_ref(), &mut say);
    }
    if let Some(p) = plan.prediction.as_ref() {
        if !p.gives_up.is_empty() {
            say("writes", format!("it would be given up, and run on here: {}", p.gives_up));
        }
        if p.cpu_throttle_percentage > 0 {
            let percent = p.cpu_throttle_percentage;
            say("throttle", format!("it would be slowed down by {percent} % before it moves"));
        }
        let wanted = micros(tuning::budget(tuning).max_pause);
        if p.expected_downtime_us > wanted && p.gives_up.is_empty() {
            let (found, wanted) = (millis(p.expected_downtime_us), millis(wanted));
            say("pause", format!("{found} are expected, and {wanted} are asked for"));
        }
    }
    if tuning::wants_post_copy(tuning) {
        say(
            "post-copy",
            "between its start on the target and the last page it needs both nodes: without \
             either, or the link, it stands still, and if the source is lost for good so is it"
                .into(),
        );
    }
    let files = plan.rootfs_bytes.saturating_add(plan.content_bytes);
    if files >= WORTH_A_WORD {
        say("files", format!("{} of files and image content go first, while it runs", mib(files)));
    }
    remarks
}

fn of_memory(m: &WatchResponse, way: Option<&Way>, say: &mut impl FnMut(&str, String)) {
    let takes = |bytes| {
        let takes = way.map(|way| millis(micros(predict::saved_by_criu(bytes, way))));
        takes.map(|takes| format!(", about {takes}")).unwrap_or_default()
    };
    if m.backend == "none" {
        let why = &m.fallback;
        say("tracking", format!("all of it travels inside the pause: {why}"));
    } else if !m.fallback.is_empty() {
        say("tracking", format!("not the best way to notice writes is used: {}", m.fallback));
    }
    if m.shared_bytes >= WORTH_A_WORD {
        let looked = millis(micros(predict::looked_through(m.shared_bytes)));
        let size = mib(m.shared_bytes);
        let mut text =
            format!("{size} of shared memory are looked through inside the pause, about {looked}");
        if m.filled_bytes > 0 {
            let filled = millis(micros(predict::filled_by_criu(m.filled_bytes)));
            text += &format!("; CRIU fills {} of it there, about {filled}", mib(m.filled_bytes));
        }
        say("shared-memory", text);
    }
    if m.tmpfs_bytes >= WORTH_A_WORD {
        let (size, takes) = (mib(m.tmpfs_bytes), takes(m.tmpfs_bytes));
        say("tmpfs", format!("{size} of files in tmpfs travel inside the pause{takes}"));
    }
    if m.huge_bytes > 0 {
        let size = mib(m.huge_bytes);
        say("huge-pages", format!("{size} of huge pages are restored before it runs again"));
    }
    if m.processes > MANY_PROCESSES {
        say("processes", format!("{} processes are dumped and restored one by one", m.processes));
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn millis(us: u64) -> String {
    format!("{} ms", us.div_ceil(1000))
}

#[cfg(test)]
mod tests {
    use transship_api::control::{LinkReport, Prediction};

    use super::*;

    fn about(plan: &PlanResponse, tuning: &Tuning) -> Vec<String> {
        remarks(plan, tuning).into_iter().map(|r| r.about).collect()
    }

    fn plan(memory: WatchResponse) -> PlanResponse {
        PlanResponse {
            memory: Some(memory).into(),
            link: Some(LinkReport { rate: 100 << 20, ..Default::default() }).into(),
            ..Default::default()
        }
    }

    #[test]
    fn nothing_is_said_without_a_reason() {
        let memory = WatchResponse {
            backend: "write-protect".into(),
            shared_bytes: 4096,
            tmpfs_bytes: 4096,
            tmpfs_mounts: 5,
            processes: 3,
            ..Default::default()
        };
        let none: [&str; 0] = [];
        assert_eq!(about(&plan(memory), &Tuning::default()), none);
    }

    #[test]
    fn everything_has_its_word() {
        let memory = WatchResponse {
            backend: "none".into(),
            fallback: "an old kernel".into(),
            shared_bytes: 128 << 20,
            filled_bytes: 8 << 20,
            tmpfs_bytes: 2 << 20,
            huge_bytes: 2 << 20,
            processes: 1000,
            ..Default::default()
        };
        let mut plan = plan(memory);
        plan.rootfs_bytes = 5 << 20;
        plan.prediction = Some(Prediction {
            expected_downtime_us: 200_000,
            cpu_throttle_percentage: 40,
            ..Default::default()
        })
        .into();
        let tuning = Tuning { post_copy: "auto".into(), ..Default::default() };
        assert_eq!(
            about(&plan, &tuning),
            [
                "tracking",
                "shared-memory",
                "tmpfs",
                "huge-pages",
                "processes",
                "throttle",
                "pause",
                "post-copy",
                "files"
            ]
        );
        let said = remarks(&plan, &tuning);
        let shared = &said[1].text;
        assert!(shared.contains("128 MiB") && shared.contains("CRIU fills 8 MiB"), "{said:?}");
        assert!(shared.contains("about 30 ms") && shared.contains("about 9 ms"), "{said:?}");
        assert!(said[6].text.contains("200 ms are expected, and 100 ms"), "{said:?}");
    }
}
