//! One round: each contender once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_e2e::ctr::Ctr;
use husk_e2e::footprint::{self, HostProcess};
use husk_e2e::node::{Node, Runtime};

use crate::contender::Contender;
use crate::output::Speaker;

/// One figure.
#[derive(Clone, Debug)]
pub struct Measured {
    /// What was measured.
    pub what: String,
    /// Of whom.
    pub who: String,
    /// The figure.
    pub value: f64,
    /// `ms`, `KiB`, `bytes`; none where what was measured says it.
    pub unit: &'static str,
}

impl Measured {
    /// Prints it, for whoever waits for a long run.
    pub fn told(self) -> Self {
        let Self {
            what,
            who,
            value,
            unit,
        } = &self;
        println!("{what}, {who}: {value:.1} {unit}");
        self
    }
}

/// From `ctr run` to the first byte of output.
pub const FIRST_OUTPUT: &str = "ctr run to first output";
/// From `ctr run` to its end, the container removed.
pub const END: &str = "ctr run to its end";
/// What ran meanwhile on the node's processors, without the time in which nothing did:
/// waiting for the disk is as long as the machine below lets it be.
pub const WORK: &str = "work of ctr run to its end";
/// From the VMM's exec to the agent's answer; for QEMU, to init's first line.
pub const GUEST_READY: &str = "VMM exec to guest ready";
/// Memory of the host's processes, without the guest's.
pub const OWN_MEMORY: &str = "memory of";
/// Memory that the guest has touched.
pub const GUEST_MEMORY: &str = "guest memory, idle";
/// What one more idle pod costs the node, everything included.
pub const ONE_MORE: &str = "node's memory for one more pod";
/// Size of a file.
pub const FILE_SIZE: &str = "size of";

/// From the specification, which for a copy names its template, to the agent's answer.
pub const RESTORED: &str = "specification to guest ready";

/// Parts of a start: the name, and the moments of the shim's record between which
/// it lies.
const STAGES: [(&str, &str, &str); 7] = [
    (
        "containerd's request to VMM's exec",
        "request_ns",
        "vmm_exec_ns",
    ),
    (
        "VMM's exec to the specification",
        "vmm_exec_ns",
        "vmm_spec_ns",
    ),
    (
        "specification to the guest's first instruction",
        "vmm_spec_ns",
        "guest_entered_ns",
    ),
    (
        "the guest's first instruction to agent ready",
        "guest_entered_ns",
        "agent_ready_ns",
    ),
    (RESTORED, "vmm_spec_ns", "agent_ready_ns"),
    (
        "agent ready to container created",
        "agent_ready_ns",
        "container_created_ns",
    ),
    (
        "container created to started",
        "container_created_ns",
        "container_started_ns",
    ),
];

/// How many pods stand for "one more".
const MORE: u64 = 4;

/// What is compared, where.
pub struct Setup {
    /// The node.
    pub node: Node,
    /// A QEMU and an initramfs for it.
    pub qemu: Option<(PathBuf, PathBuf)>,
    /// How often.
    pub rounds: u32,
}

/// How long QEMU's machine may take, and how often it is tried.
const MICROVM_LIMIT: Duration = Duration::from_secs(2);
const MICROVM_TRIES: u32 = 3;

const KERNEL: &str = "/usr/share/husk/vmlinux";

impl Setup {
    /// Every contender once, in turns.
    pub fn round(&self, round: u32) -> Result<Vec<Measured>> {
        let mut all = Vec::new();
        for contender in Contender::ALL {
            let _prepared = contender.prepare()?;
            let ctr = Ctr::new(&self.node, contender.runtime());
            let id = format!("bench-{}-{round}", contender.word());
            let before = worked()?;
            let mut run = Speaker::start(
                &mut ctr.run_rm_command(&[], &id, &["uname"]),
                ctr.deadline(),
            )?;
            let first = run.until("Linux")?;
            let end = run.end()?;
            let work = worked()?.saturating_sub(before);
            all.push(milliseconds(FIRST_OUTPUT, contender.name(), first));
            all.push(milliseconds(END, contender.name(), end));
            all.push(milliseconds(WORK, contender.name(), work));
            settle();
            all.extend(self.at_rest(&ctr, contender, &format!("{id}-idle"))?);
            settle();
        }
        if let Some((qemu, initramfs)) = &self.qemu {
            all.extend(self.microvm(qemu, initramfs)?);
        }
        println!("round {round}: {}", summary(&all));
        Ok(all)
    }

    /// A container that does nothing: its memory, and Husk's own timeline.
    fn at_rest(&self, ctr: &Ctr, contender: Contender, id: &str) -> Result<Vec<Measured>> {
        ctr.run_detached(&[], id, &["sleep", "1000"])?.ok()?;
        settle();
        let mut all = Vec::new();
        let processes = footprint::of_pod(id)?;
        for process in processes.iter().filter(|process| is_ours(process)) {
            // Both shims' names are cut to the same by the kernel.
            let of = format!("{}, {}", contender.name(), process.name);
            all.push(kib(OWN_MEMORY, &of, process.own_kib));
        }
        if contender.runtime() == Runtime::Husk {
            // The file server maps it too: what each shares adds up.
            let guest = processes.iter().map(|process| process.guest_kib).sum();
            all.push(kib(GUEST_MEMORY, contender.name(), guest));
            all.extend(timeline(contender, id)?);
        }
        ctr.remove(id)?;
        Ok(all)
    }

    /// What the node's memory loses for each idle pod after the first.
    pub fn one_more(&self, contender: Contender) -> Result<Measured> {
        let _prepared = contender.prepare()?;
        let ctr = Ctr::new(&self.node, contender.runtime());
        let ids: Vec<String> = (0..=MORE)
            .map(|index| format!("more-{}-{index}", contender.word()))
            .collect();
        let mut before = 0;
        for (index, id) in ids.iter().enumerate() {
            ctr.run_detached(&[], id, &["sleep", "1000"])?.ok()?;
            if contender.runtime() == Runtime::Husk {
                contender.record(id)?;
            }
            if index == 0 {
                settle();
                before = used_kib()?;
            }
        }
        settle();
        let grown = used_kib()?.saturating_sub(before);
        for id in &ids {
            ctr.remove(id)?;
        }
        Ok(kib(ONE_MORE, contender.name(), grown / MORE))
    }

    /// QEMU's smallest machine with Husk's kernel.
    fn microvm(&self, qemu: &Path, initramfs: &Path) -> Result<Vec<Measured>> {
        let mut command = Command::new(qemu);
        command
            .args([
                "-M",
                "microvm,pit=off,pic=off,rtc=off,acpi=off,isa-serial=on,memory-backend=guest",
            ])
            .args(["-enable-kvm", "-cpu", "host", "-smp", "1", "-m", "512"])
            .args(["-object", "memory-backend-memfd,id=guest,size=512M"])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .args(["-kernel", KERNEL])
            .args(["-append", "console=ttyS0 quiet reboot=t panic=-1"])
            .arg("-initrd")
            .arg(initramfs);
        let (up, memory) = self.first_of(&mut command)?;
        Ok(vec![
            milliseconds(GUEST_READY, "qemu microvm", up),
            kib(OWN_MEMORY, "qemu microvm", memory.own_kib),
            kib(GUEST_MEMORY, "qemu microvm", memory.guest_kib),
        ])
    }

    /// When a machine's init speaks, and the machine's memory then. The emulated
    /// processor now and then lets an interrupt in where the guest has locked them out;
    /// a guest that waits for itself since then is tried again.
    fn first_of(&self, command: &mut Command) -> Result<(Duration, HostProcess)> {
        let limit = MICROVM_LIMIT * self.node.slowness;
        let mut tries = 1;
        loop {
            let mut machine = Speaker::start(command, limit)?;
            match machine.until("guest up") {
                Ok(up) => return Ok((up, footprint::of_process(machine.pid()?)?)),
                Err(error) if tries < MICROVM_TRIES => println!("qemu microvm: {error:#}"),
                Err(error) => return Err(error.context("qemu microvm")),
            }
            tries += 1;
        }
    }

    /// Sizes of what is installed.
    pub fn sizes(&self) -> Vec<Measured> {
        let qemu_program = Path::new("/opt/qemu/qemu-system-x86_64");
        let files = [
            (
                "containerd-shim-husk-v2",
                Path::new("/usr/bin/containerd-shim-husk-v2"),
            ),
            ("husk-vmm", Path::new("/usr/libexec/husk/husk-vmm")),
            ("husk-fs", Path::new("/usr/libexec/husk/husk-fs")),
            (
                "initramfs (the agent)",
                Path::new("/usr/share/husk/initramfs.cpio"),
            ),
            ("guest kernel", Path::new(KERNEL)),
            (
                "containerd-shim-runc-v2",
                Path::new("/usr/bin/containerd-shim-runc-v2"),
            ),
            ("runc", Path::new("/usr/sbin/runc")),
            ("qemu", qemu_program),
        ];
        files
            .into_iter()
            .filter_map(|(who, file)| {
                let value = std::fs::metadata(file).ok()?.len() as f64;
                Some(Measured {
                    what: FILE_SIZE.to_owned(),
                    who: who.into(),
                    value,
                    unit: "bytes",
                })
            })
            .collect()
    }
}

fn is_ours(process: &HostProcess) -> bool {
    ["containerd-shim", "husk-"]
        .iter()
        .any(|name| process.name.starts_with(name))
}

/// A time.
pub fn milliseconds(what: &str, who: &str, took: Duration) -> Measured {
    Measured {
        what: what.to_owned(),
        who: who.to_owned(),
        value: took.as_secs_f64() * 1e3,
        unit: "ms",
    }
}

fn kib(what: &str, who: &str, kib: u64) -> Measured {
    Measured {
        what: what.to_owned(),
        who: who.to_owned(),
        value: kib as f64,
        unit: "KiB",
    }
}

fn summary(all: &[Measured]) -> String {
    let starts: Vec<String> = all
        .iter()
        .filter(|measured| [FIRST_OUTPUT, GUEST_READY].contains(&measured.what.as_str()))
        .map(|measured| {
            format!(
                "{} {:.0} ms ({})",
                measured.who, measured.value, measured.what
            )
        })
        .collect();
    starts.join(", ")
}

/// From the shim's record of the start.
fn timeline(contender: Contender, id: &str) -> Result<Vec<Measured>> {
    let state = contender.record(id)?;
    let between = |from: &str, to: &str| -> Result<Duration> {
        let moment = |stage: &str| {
            state["timeline"][stage]
                .as_u64()
                .filter(|ns| *ns > 0)
                .with_context(|| format!("no {stage} of {id}"))
        };
        let (from, to) = (moment(from)?, moment(to)?);
        Ok(Duration::from_nanos(to.saturating_sub(from)))
    };
    let ready = between("vmm_exec_ns", "agent_ready_ns")?;
    let mut all = vec![milliseconds(GUEST_READY, contender.name(), ready)];
    for (what, from, to) in STAGES {
        all.push(milliseconds(what, contender.name(), between(from, to)?));
    }
    Ok(all)
}

/// What all tasks have run on all processors so far (the kernel's
/// Documentation/scheduler/sched-stats.rst).
fn worked() -> Result<Duration> {
    ran_in(&std::fs::read_to_string("/proc/schedstat")?)
}

fn ran_in(schedstat: &str) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for line in schedstat.lines().filter(|line| line.starts_with("cpu")) {
        let ns = line.split_whitespace().nth(7);
        sum += Duration::from_nanos(ns.with_context(|| line.to_owned())?.parse()?);
    }
    ensure!(!sum.is_zero(), "no processor ran anything: {schedstat}");
    Ok(sum)
}

/// What a start or an end still does in the background is not part of what comes next.
fn settle() {
    std::thread::sleep(Duration::from_secs(2));
}

/// What is in use and no cache.
pub fn used_kib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kib.with_context(|| format!("no {name}"))?.parse()?)
    };
    let cache = field("Cached")? + field("Buffers")? + field("SReclaimable")?;
    let used = field("MemTotal")? + field("Shmem")?;
    Ok(used.saturating_sub(field("MemFree")? + cache))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ran_is_the_seventh_of_each_processor() {
        let text = "version 17\ntimestamp 5\ncpu0 0 0 0 0 0 0 1500 7 8\ndomain0 MC 1\ncpu1 0 0 0 0 0 0 500 7 8\n";
        assert_eq!(ran_in(text).expect("sums"), Duration::from_nanos(2000));
        assert!(ran_in("version 17\n").is_err());
        assert!(ran_in("cpu0 0 0\n").is_err());
    }
}
