//! Counters of a cgroup, in the form that containerd wants.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};

/// Reads what the kernel offers; what it does not stays 0.
pub fn read(dir: &Path) -> Metrics {
    let cpu = table(dir, "cpu.stat");
    let memory = table(dir, "memory.stat");
    let cpu_value = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let memory_value = |key: &str| memory.get(key).copied().unwrap_or(0);
    Metrics {
        pids: Some(PidsStat {
            current: number(dir, "pids.current"),
            limit: number(dir, "pids.max"),
            ..PidsStat::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: cpu_value("usage_usec"),
            user_usec: cpu_value("user_usec"),
            system_usec: cpu_value("system_usec"),
            nr_periods: cpu_value("nr_periods"),
            nr_throttled: cpu_value("nr_throttled"),
            throttled_usec: cpu_value("throttled_usec"),
            ..CPUStat::default()
        })
        .into(),
        memory: Some(MemoryStat {
            anon: memory_value("anon"),
            file: memory_value("file"),
            shmem: memory_value("shmem"),
            inactive_anon: memory_value("inactive_anon"),
            active_anon: memory_value("active_anon"),
            inactive_file: memory_value("inactive_file"),
            active_file: memory_value("active_file"),
            pgfault: memory_value("pgfault"),
            pgmajfault: memory_value("pgmajfault"),
            usage: number(dir, "memory.current"),
            usage_limit: number(dir, "memory.max"),
            swap_usage: number(dir, "memory.swap.current"),
            swap_limit: number(dir, "memory.swap.max"),
            ..MemoryStat::default()
        })
        .into(),
        ..Metrics::default()
    }
}

/// `max` is no limit, as containerd's own shims write it.
fn number(dir: &Path, file: &str) -> u64 {
    match fs::read_to_string(dir.join(file)) {
        Ok(text) if text.trim() == "max" => u64::MAX,
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(_) => 0,
    }
}

fn table(dir: &Path, file: &str) -> HashMap<String, u64> {
    let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_files() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 12\nuser_usec 7\nsystem_usec 5\n");
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("memory.stat", "anon 1024\nfile 2048\n");
        let metrics = read(dir.path());
        assert_eq!(metrics.cpu.usage_usec, 12);
        assert_eq!(metrics.memory.usage, 4096);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.memory.file, 2048);
        assert_eq!(metrics.pids.current, 0);
    }
}
