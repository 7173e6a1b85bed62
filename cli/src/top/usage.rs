//! What a pod has used of the node since it began: from its cgroup where it has
//! one of its own, else from its processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_node::process::Process;
use husk_node::state::State;

/// Counters of a pod; none where nobody counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Time on processors, microseconds.
    pub cpu_usec: Option<u64>,
    /// Read from disks, bytes.
    pub read_bytes: Option<u64>,
    /// Written to disks, bytes.
    pub written_bytes: Option<u64>,
    /// How often the guest was left for the VMM's or the kernel's work.
    pub exits: Option<u64>,
}

/// The same as rates, a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Per cent of a processor.
    pub cpu_percent: Option<f64>,
    /// Bytes read.
    pub read: Option<f64>,
    /// Bytes written.
    pub written: Option<f64>,
    /// Exits.
    pub exits: Option<f64>,
}

/// Where the node's kernel tells it.
#[derive(Clone, Debug)]
pub struct Counters {
    /// Of processes.
    pub proc: PathBuf,
    /// Of control groups.
    pub cgroups: PathBuf,
    /// Of KVM; only where debugfs is mounted.
    pub kvm: PathBuf,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            cgroups: "/sys/fs/cgroup".into(),
            kvm: "/sys/kernel/debug/kvm".into(),
        }
    }
}

impl Counters {
    /// What a pod has used.
    pub fn of(&self, state: &State) -> Usage {
        let processes: Vec<Process> = [state.shim, state.vmm, state.file_server]
            .into_iter()
            .flatten()
            .filter(|process| process.is_alive())
            .collect();
        let group = state.cgroup.as_deref().map(|path| {
            let path = path.strip_prefix("/").unwrap_or(path);
            self.cgroups.join(path)
        });
        let of_group = |file: &str| fs::read_to_string(group.as_ref()?.join(file)).ok();
        let cpu_usec = of_group("cpu.stat").as_deref().and_then(group_cpu_usec);
        let disks = of_group("io.stat").as_deref().map(group_disks);
        let disks = disks.or_else(|| self.disks(&processes));
        Usage {
            cpu_usec: cpu_usec.or_else(|| self.cpu_usec(&processes)),
            read_bytes: disks.map(|(read, _)| read),
            written_bytes: disks.map(|(_, written)| written),
            exits: state.vmm.and_then(|vmm| self.exits(vmm.pid)),
        }
    }

    fn cpu_usec(&self, processes: &[Process]) -> Option<u64> {
        let hertz = rustix::param::clock_ticks_per_second().max(1);
        let ticks = |process: &Process| {
            let stat = fs::read_to_string(self.file(*process, "stat")).ok()?;
            cpu_ticks(&stat)
        };
        let ticks: Vec<u64> = processes.iter().filter_map(ticks).collect();
        let sum = ticks
            .iter()
            .fold(0_u64, |sum, one| sum.saturating_add(*one));
        (!ticks.is_empty()).then(|| sum.saturating_mul(1_000_000) / hertz)
    }

    /// Bytes read from and written to disks.
    fn disks(&self, processes: &[Process]) -> Option<(u64, u64)> {
        let io = |process: &Process| fs::read_to_string(self.file(*process, "io")).ok();
        let all: Vec<String> = processes.iter().filter_map(io).collect();
        let sum = |key: &str| {
            let numbers = all.iter().filter_map(|io| number_of(io, key));
            numbers.fold(0, u64::saturating_add)
        };
        (!all.is_empty()).then(|| (sum("read_bytes:"), sum("write_bytes:")))
    }

    fn file(&self, process: Process, name: &str) -> PathBuf {
        self.proc.join(process.pid.to_string()).join(name)
    }

    /// KVM has a directory a machine, named after the thread that made it, which
    /// is the VMM's first, and a descriptor (`kvm_create_vm_debugfs`).
    fn exits(&self, vmm: u32) -> Option<u64> {
        let mine = format!("{vmm}-");
        let mut machines = fs::read_dir(&self.kvm).ok()?.filter_map(Result::ok);
        let machine = machines.find(|dir| {
            let name = dir.file_name();
            name.to_str().is_some_and(|name| name.starts_with(&mine))
        })?;
        number(&machine.path().join("exits"))
    }
}

impl Usage {
    /// What was used in each second since it was `before`; a counter that has
    /// begun anew says nothing.
    pub fn since(&self, before: &Self, time: Duration) -> Rates {
        let rate = |now: Option<u64>, before: Option<u64>| {
            #[allow(clippy::cast_precision_loss)] // shown with three digits
            let more = now?.checked_sub(before?)? as f64;
            let seconds = time.as_secs_f64();
            (seconds > 0.0).then(|| more / seconds)
        };
        Rates {
            cpu_percent: rate(self.cpu_usec, before.cpu_usec).map(|usec| usec / 10_000.0),
            read: rate(self.read_bytes, before.read_bytes),
            written: rate(self.written_bytes, before.written_bytes),
            exits: rate(self.exits, before.exits),
        }
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number behind a word at the beginning of a line.
fn number_of(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().parse().ok()
}

/// Of `cpu.stat`, which each cgroup has.
fn group_cpu_usec(stat: &str) -> Option<u64> {
    number_of(stat, "usage_usec ")
}

/// Of `io.stat`: a line a disk.
fn group_disks(stat: &str) -> (u64, u64) {
    let sum = |key: &str| {
        let fields = stat.split_whitespace();
        let numbers = fields.filter_map(|field| field.strip_prefix(key)?.parse().ok());
        numbers.fold(0, u64::saturating_add)
    };
    (sum("rbytes="), sum("wbytes="))
}

/// proc_pid_stat(5): fields 14 and 15, counted behind the name, which may hold
/// anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(14 - 3);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    user.checked_add(system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kernels_write() {
        let stat = "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\nnr_periods 0\n";
        assert_eq!(group_cpu_usec(stat), Some(1_234_567));
        let io = "8:16 rbytes=4096 wbytes=1 rios=1 wios=1 dbytes=50331648 dios=3000\n\
                  8:0 rbytes=1000 wbytes=2 rios=2 wios=1 dbytes=0 dios=0\n";
        assert_eq!(group_disks(io), (5096, 3));
        assert_eq!(group_disks(""), (0, 0));
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 25 6 7 20 0 1 0 100 0 0\n";
        assert_eq!(cpu_ticks(stat), Some(175));
        assert_eq!(cpu_ticks("7 (a"), None);
    }

    #[test]
    fn a_cgroup_counts_before_processes() {
        let root = tempfile::tempdir().unwrap();
        let counters = Counters {
            proc: "/proc".into(),
            cgroups: root.path().join("cgroup"),
            kvm: root.path().join("kvm"),
        };
        let mine = Process::find(std::process::id());
        let state = State {
            shim: mine,
            vmm: mine,
            cgroup: Some("/a/b".into()),
            ..State::default()
        };
        let of_processes = counters.of(&state);
        assert!(of_processes.cpu_usec.is_some() && of_processes.read_bytes.is_some());
        assert_eq!(of_processes.exits, None);

        let group = root.path().join("cgroup/a/b");
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("cpu.stat"), "usage_usec 7\n").unwrap();
        fs::write(group.join("io.stat"), "8:0 rbytes=8 wbytes=9\n").unwrap();
        for (name, exits) in [
            ("1-2", "3"),
            (&format!("{}-11", std::process::id()), "77\n"),
        ] {
            let machine = root.path().join("kvm").join(name);
            fs::create_dir_all(&machine).unwrap();
            fs::write(machine.join("exits"), exits).unwrap();
        }
        let usage = Usage {
            cpu_usec: Some(7),
            read_bytes: Some(8),
            written_bytes: Some(9),
            exits: Some(77),
        };
        assert_eq!(counters.of(&state), usage);
        assert_eq!(counters.of(&State::default()), Usage::default());
    }

    #[test]
    fn rates_are_of_a_second() {
        let before = Usage {
            cpu_usec: Some(1_000_000),
            read_bytes: Some(5000),
            written_bytes: Some(10),
            exits: None,
        };
        let now = Usage {
            cpu_usec: Some(2_500_000),
            read_bytes: Some(0),
            written_bytes: Some(4010),
            exits: Some(3),
        };
        let rates = now.since(&before, Duration::from_secs(2));
        assert_eq!(rates.cpu_percent, Some(75.0));
        assert_eq!(rates.written, Some(2000.0));
        // Begun anew, and not there before.
        assert_eq!((rates.read, rates.exits), (None, None));
        assert_eq!(now.since(&before, Duration::ZERO), Rates::default());
    }
}
