//! A cgroup's numbers as containerd's message.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use husk_protocol::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData,
    PSIStats, PidsStat,
};
use protobuf::{Message, MessageField};

use super::cgroup::value_of;
use crate::error::{Doing, Error};

/// Reads what the kernel tells; files that are not there count nothing.
pub fn of(cgroup: &Path) -> Result<Vec<u8>, Error> {
    let files = Files(cgroup);
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: files.number("pids.current"),
            limit: files.limit("pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(&files)),
        memory: MessageField::some(memory(&files)),
        memory_events: MessageField::some(memory_events(&files)),
        io: MessageField::some(io(&files)),
        hugetlb: huge_pages(&files),
        network: network(),
        ..Default::default()
    };
    let bytes = metrics.write_to_bytes().map_err(std::io::Error::other);
    Ok(bytes.doing("serialize", "statistics")?)
}

struct Files<'a>(&'a Path);

impl Files<'_> {
    fn text(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }

    fn number(&self, file: &str) -> u64 {
        parse(self.text(file).trim())
    }

    /// No limit is the largest number.
    fn limit(&self, file: &str) -> u64 {
        match self.text(file).trim() {
            "" | "max" => u64::MAX,
            number => parse(number),
        }
    }

    fn pressure(&self, file: &str) -> MessageField<PSIStats> {
        let text = self.text(file);
        let line = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(PSIData {
                avg10: field(line, "avg10"),
                avg60: field(line, "avg60"),
                avg300: field(line, "avg300"),
                total: field(line, "total"),
                ..Default::default()
            })
        };
        if text.is_empty() {
            return MessageField::none();
        }
        MessageField::some(PSIStats {
            some: line("some ").into(),
            full: line("full ").into(),
            ..Default::default()
        })
    }
}

fn parse<T: FromStr + Default>(text: &str) -> T {
    text.parse().unwrap_or_default()
}

/// The value of `key=value` in a line.
fn field<T: FromStr + Default>(line: &str, key: &str) -> T {
    let mut pairs = line
        .split_ascii_whitespace()
        .filter_map(|pair| pair.split_once('='));
    pairs
        .find(|(name, _)| *name == key)
        .map(|(_, value)| parse(value))
        .unwrap_or_default()
}

fn cpu(files: &Files<'_>) -> CPUStat {
    let text = files.text("cpu.stat");
    let get = |key| value_of(&text, key).unwrap_or(0);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        psi: files.pressure("cpu.pressure"),
        ..Default::default()
    }
}

fn memory(files: &Files<'_>) -> MemoryStat {
    let text = files.text("memory.stat");
    let get = |key| value_of(&text, key).unwrap_or(0);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        // The kernel counts them apart since 5.9.
        workingset_refault: get("workingset_refault_anon") + get("workingset_refault_file"),
        workingset_activate: get("workingset_activate_anon") + get("workingset_activate_file"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: files.number("memory.current"),
        usage_limit: files.limit("memory.max"),
        swap_usage: files.number("memory.swap.current"),
        swap_limit: files.limit("memory.swap.max"),
        max_usage: files.number("memory.peak"),
        swap_max_usage: files.number("memory.swap.peak"),
        psi: files.pressure("memory.pressure"),
        ..Default::default()
    }
}

fn memory_events(files: &Files<'_>) -> MemoryEvents {
    let text = files.text("memory.events");
    let get = |key| value_of(&text, key).unwrap_or(0);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..Default::default()
    }
}

fn io(files: &Files<'_>) -> IOStat {
    let text = files.text("io.stat");
    let entry = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        Some(IOEntry {
            major: parse(major),
            minor: parse(minor),
            rbytes: field(rest, "rbytes"),
            wbytes: field(rest, "wbytes"),
            rios: field(rest, "rios"),
            wios: field(rest, "wios"),
            ..Default::default()
        })
    };
    IOStat {
        usage: text.lines().filter_map(entry).collect(),
        psi: files.pressure("io.pressure"),
        ..Default::default()
    }
}

fn huge_pages(files: &Files<'_>) -> Vec<HugeTlbStat> {
    let entries = fs::read_dir(files.0).into_iter().flatten().flatten();
    let size_of = |name: &str| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        (!size.contains('.')).then(|| size.to_owned())
    };
    let sizes = entries.filter_map(|entry| size_of(entry.file_name().to_str()?));
    let stat = |size: String| HugeTlbStat {
        current: files.number(&format!("hugetlb.{size}.current")),
        max: files.limit(&format!("hugetlb.{size}.max")),
        failcnt: value_of(&files.text(&format!("hugetlb.{size}.events")), "max").unwrap_or(0),
        pagesize: size,
        ..Default::default()
    };
    sizes.map(stat).collect()
}

/// The pod's interfaces: all of its containers share them.
fn network() -> Vec<NetworkStat> {
    let text = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let stat = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_ascii_whitespace().map(parse).collect();
        let get = |index: usize| numbers.get(index).copied().unwrap_or(0);
        Some(NetworkStat {
            name: name.trim().to_owned(),
            rx_bytes: get(0),
            rx_packets: get(1),
            rx_errors: get(2),
            rx_dropped: get(3),
            tx_bytes: get(8),
            tx_packets: get(9),
            tx_errors: get(10),
            tx_dropped: get(11),
            ..Default::default()
        })
    };
    text.lines().skip(2).filter_map(stat).collect()
}
