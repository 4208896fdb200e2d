//! `io.containerd.cgroups.v1.Metrics` from the files of the v1 controllers.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
    MemoryStat, Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
};
use libcgroups::stats::supported_page_sizes;

use super::{flat, number, text};

/// USER_HZ, in which cpuacct.stat counts: 100 on every Linux (time(7)).
const NANOSECONDS_PER_TICK: u64 = 10_000_000;

pub fn collect(directories: &BTreeMap<String, PathBuf>) -> Metrics {
    let of = |controller: &str| directories.get(controller).map(PathBuf::as_path);
    Metrics {
        hugetlb: hugetlb(of("hugetlb")),
        pids: of("pids").map(|directory| pids(Some(directory))).into(),
        cpu: Some(cpu(of("cpu"), of("cpuacct"))).into(),
        memory: of("memory").map(|directory| memory(Some(directory))).into(),
        memory_oom_control: of("memory").map(|directory| oom(Some(directory))).into(),
        blkio: of("blkio").map(|directory| blkio(Some(directory))).into(),
        rdma: of("rdma").map(|directory| rdma(Some(directory))).into(),
        ..Default::default()
    }
}

fn pids(directory: Option<&Path>) -> PidsStat {
    // 0 is "no limit" in this message.
    let limit = match number(directory, "pids.max") {
        u64::MAX => 0,
        limit => limit,
    };
    PidsStat { current: number(directory, "pids.current"), limit, ..Default::default() }
}

fn cpu(cpu: Option<&Path>, cpuacct: Option<&Path>) -> CPUStat {
    let ticks = text(cpuacct, "cpuacct.stat");
    let ticks = flat(&ticks);
    let nanoseconds =
        |key| ticks.get(key).copied().unwrap_or(0).saturating_mul(NANOSECONDS_PER_TICK);
    let per_cpu = text(cpuacct, "cpuacct.usage_percpu");
    let throttling = text(cpu, "cpu.stat");
    let throttling = flat(&throttling);
    let throttled = |key| throttling.get(key).copied().unwrap_or(0);
    CPUStat {
        usage: Some(CPUUsage {
            total: number(cpuacct, "cpuacct.usage"),
            kernel: nanoseconds("system"),
            user: nanoseconds("user"),
            per_cpu: per_cpu.split_whitespace().filter_map(|n| n.parse().ok()).collect(),
            ..Default::default()
        })
        .into(),
        throttling: Some(Throttle {
            periods: throttled("nr_periods"),
            throttled_periods: throttled("nr_throttled"),
            throttled_time: throttled("throttled_time"),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn memory(directory: Option<&Path>) -> MemoryStat {
    let stat = text(directory, "memory.stat");
    let stat = flat(&stat);
    let of = |key| stat.get(key).copied().unwrap_or(0);
    let entry = |name: &str| {
        Some(MemoryEntry {
            limit: number(directory, &format!("memory.{name}limit_in_bytes")),
            usage: number(directory, &format!("memory.{name}usage_in_bytes")),
            max: number(directory, &format!("memory.{name}max_usage_in_bytes")),
            failcnt: number(directory, &format!("memory.{name}failcnt")),
            ..Default::default()
        })
        .into()
    };
    MemoryStat {
        cache: of("cache"),
        rss: of("rss"),
        rss_huge: of("rss_huge"),
        mapped_file: of("mapped_file"),
        dirty: of("dirty"),
        writeback: of("writeback"),
        pg_pg_in: of("pgpgin"),
        pg_pg_out: of("pgpgout"),
        pg_fault: of("pgfault"),
        pg_maj_fault: of("pgmajfault"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        hierarchical_memory_limit: of("hierarchical_memory_limit"),
        hierarchical_swap_limit: of("hierarchical_memsw_limit"),
        total_cache: of("total_cache"),
        total_rss: of("total_rss"),
        total_rss_huge: of("total_rss_huge"),
        total_mapped_file: of("total_mapped_file"),
        total_dirty: of("total_dirty"),
        total_writeback: of("total_writeback"),
        total_pg_pg_in: of("total_pgpgin"),
        total_pg_pg_out: of("total_pgpgout"),
        total_pg_fault: of("total_pgfault"),
        total_pg_maj_fault: of("total_pgmajfault"),
        total_inactive_anon: of("total_inactive_anon"),
        total_active_anon: of("total_active_anon"),
        total_inactive_file: of("total_inactive_file"),
        total_active_file: of("total_active_file"),
        total_unevictable: of("total_unevictable"),
        usage: entry(""),
        swap: entry("memsw."),
        kernel: entry("kmem."),
        kernel_tcp: entry("kmem.tcp."),
        ..Default::default()
    }
}

fn oom(directory: Option<&Path>) -> MemoryOomControl {
    let control = text(directory, "memory.oom_control");
    let control = flat(&control);
    let of = |key| control.get(key).copied().unwrap_or(0);
    MemoryOomControl {
        oom_kill_disable: of("oom_kill_disable"),
        under_oom: of("under_oom"),
        oom_kill: of("oom_kill"),
        ..Default::default()
    }
}

fn hugetlb(directory: Option<&Path>) -> Vec<HugetlbStat> {
    if directory.is_none() {
        return Vec::new();
    }
    let sizes = supported_page_sizes().unwrap_or_default();
    let stat = |size: String| {
        let of = |what| number(directory, &format!("hugetlb.{size}.{what}"));
        HugetlbStat {
            usage: of("usage_in_bytes"),
            max: of("max_usage_in_bytes"),
            failcnt: of("failcnt"),
            pagesize: size,
            ..Default::default()
        }
    };
    sizes.into_iter().map(stat).collect()
}

/// CFQ and BFQ have recursive files of their own; elsewhere the throttling
/// layer's are all there is.
fn blkio(directory: Option<&Path>) -> BlkIOStat {
    let first = |names: [&str; 3]| {
        names
            .into_iter()
            .map(|name| entries(&text(directory, name)))
            .find(|entries| !entries.is_empty())
            .unwrap_or_default()
    };
    let recursive = |what: &str| {
        first([
            &format!("blkio.{what}_recursive"),
            &format!("blkio.bfq.{what}_recursive"),
            &format!("blkio.throttle.{what}_recursive"),
        ])
    };
    BlkIOStat {
        io_service_bytes_recursive: recursive("io_service_bytes"),
        io_serviced_recursive: recursive("io_serviced"),
        io_queued_recursive: recursive("io_queued"),
        io_service_time_recursive: recursive("io_service_time"),
        io_wait_time_recursive: recursive("io_wait_time"),
        io_merged_recursive: recursive("io_merged"),
        io_time_recursive: recursive("time"),
        sectors_recursive: recursive("sectors"),
        ..Default::default()
    }
}

/// `8:0 Read 4096`, or `8:0 4096`; the line `Total 4096` is none of a device.
fn entries(text: &str) -> Vec<BlkIOEntry> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (major, minor) = fields.next()?.split_once(':')?;
            let (second, third) = (fields.next()?, fields.next());
            let (op, value) = match third {
                Some(value) => (second, value),
                None => ("", second),
            };
            Some(BlkIOEntry {
                op: op.to_owned(),
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                value: value.parse().ok()?,
                ..Default::default()
            })
        })
        .collect()
}

fn rdma(directory: Option<&Path>) -> RdmaStat {
    RdmaStat {
        current: rdma_entries(&text(directory, "rdma.current")),
        limit: rdma_entries(&text(directory, "rdma.max")),
        ..Default::default()
    }
}

/// `mlx4_0 hca_handle=2 hca_object=max`
fn rdma_entries(text: &str) -> Vec<RdmaEntry> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let mut entry = RdmaEntry { device: fields.next()?.to_owned(), ..Default::default() };
            for (key, value) in fields.filter_map(|field| field.split_once('=')) {
                let value = value.parse().unwrap_or(u32::MAX);
                match key {
                    "hca_handle" => entry.hca_handles = value,
                    "hca_object" => entry.hca_objects = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_controller_comes_from_its_own_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mut directories = BTreeMap::new();
        for (controller, file, content) in [
            ("memory", "memory.usage_in_bytes", "4096\n"),
            ("memory", "memory.stat", "cache 1\nrss 2\ntotal_pgfault 3\n"),
            ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            ("pids", "pids.current", "5\n"),
            ("pids", "pids.max", "max\n"),
            ("cpuacct", "cpuacct.usage", "77\n"),
            ("cpuacct", "cpuacct.stat", "user 3\nsystem 4\n"),
            ("cpuacct", "cpuacct.usage_percpu", "30 47 \n"),
            ("cpu", "cpu.stat", "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n"),
            ("blkio", "blkio.throttle.io_serviced_recursive", "8:0 Read 6\nTotal 6\n"),
        ] {
            let directory = dir.path().join(controller);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join(file), content).unwrap();
            directories.insert(controller.to_owned(), directory);
        }
        let got = collect(&directories);
        assert_eq!(
            (got.memory.usage.usage, got.memory.rss, got.memory.total_pg_fault),
            (4096, 2, 3)
        );
        assert_eq!(got.memory_oom_control.oom_kill, 2);
        assert_eq!((got.pids.current, got.pids.limit), (5, 0));
        assert_eq!((got.cpu.usage.total, got.cpu.usage.user), (77, 30_000_000));
        assert_eq!(got.cpu.usage.per_cpu, [30, 47]);
        assert_eq!(got.cpu.throttling.throttled_time, 3);
        let io = &got.blkio.io_serviced_recursive;
        assert_eq!((io.len(), io[0].op.as_str(), io[0].major, io[0].value), (1, "Read", 8, 6));
        assert!(got.rdma.is_none());
    }
}
