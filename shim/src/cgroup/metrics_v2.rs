//! `io.containerd.cgroups.v2.Metrics` from the files of a v2 group.

use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat, RdmaEntry, RdmaStat,
};
use libcgroups::stats::{parse_nested_keyed_data, supported_page_sizes};

use super::{flat, number, text};

pub fn collect(directory: &Path) -> Metrics {
    let directory = Some(directory);
    Metrics {
        pids: Some(pids(directory)).into(),
        cpu: Some(cpu(directory)).into(),
        memory: Some(memory(directory)).into(),
        memory_events: Some(memory_events(directory)).into(),
        io: Some(io(directory)).into(),
        rdma: Some(rdma(directory)).into(),
        hugetlb: hugetlb(directory),
        ..Default::default()
    }
}

fn pids(directory: Option<&Path>) -> PidsStat {
    let limit = match number(directory, "pids.max") {
        u64::MAX => 0,
        limit => limit,
    };
    PidsStat { current: number(directory, "pids.current"), limit, ..Default::default() }
}

fn cpu(directory: Option<&Path>) -> CPUStat {
    let stat = text(directory, "cpu.stat");
    let stat = flat(&stat);
    let of = |key| stat.get(key).copied().unwrap_or(0);
    CPUStat {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        nr_bursts: of("nr_bursts"),
        burst_usec: of("burst_usec"),
        psi: pressure(directory, "cpu.pressure").into(),
        ..Default::default()
    }
}

fn memory(directory: Option<&Path>) -> MemoryStat {
    let stat = text(directory, "memory.stat");
    let stat = flat(&stat);
    let of = |key| stat.get(key).copied().unwrap_or(0);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault"),
        workingset_activate: of("workingset_activate"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: number(directory, "memory.current"),
        usage_limit: number(directory, "memory.max"),
        max_usage: number(directory, "memory.peak"),
        swap_usage: number(directory, "memory.swap.current"),
        swap_limit: number(directory, "memory.swap.max"),
        swap_max_usage: number(directory, "memory.swap.peak"),
        psi: pressure(directory, "memory.pressure").into(),
        ..Default::default()
    }
}

fn memory_events(directory: Option<&Path>) -> MemoryEvents {
    let events = text(directory, "memory.events");
    let events = flat(&events);
    let of = |key| events.get(key).copied().unwrap_or(0);
    MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
        oom_group_kill: of("oom_group_kill"),
        ..Default::default()
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and a line `full`.
fn pressure(directory: Option<&Path>, file: &str) -> Option<PSIStats> {
    let text = text(directory, file);
    if text.is_empty() {
        return None;
    }
    let mut stats = PSIStats::default();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let kind = fields.next();
        let mut data = PSIData::default();
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            Some("some") => stats.some = Some(data).into(),
            Some("full") => stats.full = Some(data).into(),
            _ => {}
        }
    }
    Some(stats)
}

fn io(directory: Option<&Path>) -> IOStat {
    let devices = directory
        .and_then(|directory| parse_nested_keyed_data(&directory.join("io.stat")).ok())
        .unwrap_or_default();
    let entry = |(device, values): (String, Vec<String>)| {
        let (major, minor) = device.split_once(':')?;
        let of = |key: &str| {
            values
                .iter()
                .filter_map(|value| value.split_once('='))
                .find(|(name, _)| *name == key)
                .and_then(|(_, value)| value.parse().ok())
                .unwrap_or(0)
        };
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: of("rbytes"),
            wbytes: of("wbytes"),
            rios: of("rios"),
            wios: of("wios"),
            ..Default::default()
        })
    };
    let mut usage: Vec<IOEntry> = devices.into_iter().filter_map(entry).collect();
    usage.sort_by_key(|entry| (entry.major, entry.minor));
    IOStat { usage, psi: pressure(directory, "io.pressure").into(), ..Default::default() }
}

fn rdma(directory: Option<&Path>) -> RdmaStat {
    let entries = |file| {
        let devices = directory
            .and_then(|directory| parse_nested_keyed_data(&directory.join(file)).ok())
            .unwrap_or_default();
        let entry = |(device, values): (String, Vec<String>)| {
            let mut entry = RdmaEntry { device, ..Default::default() };
            for (key, value) in values.iter().filter_map(|value| value.split_once('=')) {
                let value = value.parse().unwrap_or(u32::MAX);
                match key {
                    "hca_handle" => entry.hca_handles = value,
                    "hca_object" => entry.hca_objects = value,
                    _ => {}
                }
            }
            entry
        };
        devices.into_iter().map(entry).collect::<Vec<_>>()
    };
    RdmaStat { current: entries("rdma.current"), limit: entries("rdma.max"), ..Default::default() }
}

fn hugetlb(directory: Option<&Path>) -> Vec<HugeTlbStat> {
    let sizes = supported_page_sizes().unwrap_or_default();
    let stat = |size: String| {
        let file = |what| format!("hugetlb.{size}.{what}");
        directory.filter(|directory| directory.join(file("current")).exists())?;
        let events = text(directory, &file("events"));
        Some(HugeTlbStat {
            current: number(directory, &file("current")),
            max: number(directory, &file("max")),
            failcnt: flat(&events).get("max").copied().unwrap_or(0),
            pagesize: size,
            ..Default::default()
        })
    };
    sizes.into_iter().filter_map(stat).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_group_is_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        for (file, content) in [
            ("memory.current", "8192\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 7\npgfault 9\n"),
            ("memory.events", "low 0\noom 1\noom_kill 1\n"),
            ("memory.pressure", "some avg10=1.50 avg60=0.00 avg300=0.00 total=12\n"),
            ("cpu.stat", "usage_usec 3\nuser_usec 2\nsystem_usec 1\n"),
            ("io.stat", "8:16 rbytes=1 wbytes=2 rios=3 wios=4\n8:0 rbytes=5 wbytes=0\n"),
            ("pids.current", "2\n"),
            ("pids.max", "100\n"),
        ] {
            fs::write(dir.path().join(file), content).unwrap();
        }
        let got = collect(dir.path());
        assert_eq!((got.memory.usage, got.memory.usage_limit), (8192, u64::MAX));
        assert_eq!((got.memory.anon, got.memory.pgfault), (7, 9));
        assert_eq!(got.memory_events.oom_kill, 1);
        assert_eq!((got.memory.psi.some.avg10, got.memory.psi.some.total), (1.5, 12));
        assert_eq!(got.cpu.usage_usec, 3);
        assert!(got.cpu.psi.is_none());
        let io: Vec<_> = got.io.usage.iter().map(|e| (e.minor, e.rbytes, e.wios)).collect();
        assert_eq!(io, [(0, 5, 0), (16, 1, 4)]);
        assert_eq!((got.pids.current, got.pids.limit), (2, 100));
    }
}
