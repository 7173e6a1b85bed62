//! One round: each contender once.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_e2e::ctr::Ctr;
use husk_e2e::footprint::{self, HostProcess};
use husk_e2e::node::{NAMESPACE, Node, Runtime};
use serde_json::Value;

/// One figure.
#[derive(Clone, Debug)]
pub struct Measured {
    /// What was measured.
    pub what: &'static str,
    /// Of whom.
    pub who: String,
    /// The figure.
    pub value: f64,
    /// `ms`, `KiB` or `bytes`.
    pub unit: &'static str,
}

/// From `ctr run` to the first byte of output.
pub const FIRST_OUTPUT: &str = "ctr run to first output";
/// From `ctr run` to its end, the container removed.
pub const END: &str = "ctr run to its end";
/// From the VMM's exec to the agent's answer; for QEMU, to init's first line.
pub const GUEST_READY: &str = "VMM exec to guest ready";
/// The same from the guest's first instruction.
pub const GUEST_BOOT: &str = "kernel entry to agent ready";
/// Memory of the host's processes, without the guest's.
pub const OWN_MEMORY: &str = "memory of";
/// Memory that the guest has touched.
pub const GUEST_MEMORY: &str = "guest memory, idle";
/// Size of a file.
pub const FILE_SIZE: &str = "size of";

/// What is compared, where.
pub struct Setup {
    /// The node.
    pub node: Node,
    /// A QEMU and an initramfs for it.
    pub qemu: Option<(PathBuf, PathBuf)>,
    /// How often.
    pub rounds: u32,
}

const KERNEL: &str = "/usr/share/husk/vmlinux";

impl Setup {
    /// Every contender once, in turns.
    pub fn round(&self, round: u32) -> Result<Vec<Measured>> {
        let mut all = Vec::new();
        for runtime in [Runtime::Husk, Runtime::Runc] {
            let ctr = Ctr::new(&self.node, runtime);
            let id = format!("bench-{}-{round}", runtime.name());
            let (first, end) =
                first_output(&mut ctr.run_rm_command(&[], &id, &["uname"]), "Linux")?;
            all.push(milliseconds(FIRST_OUTPUT, runtime.name(), first));
            all.push(milliseconds(END, runtime.name(), end));
            all.extend(self.at_rest(&ctr, runtime, &format!("{id}-idle"))?);
        }
        if let Some((qemu, initramfs)) = &self.qemu {
            all.extend(self.microvm(qemu, initramfs)?);
        }
        println!("round {round}: {}", summary(&all));
        Ok(all)
    }

    /// A container that does nothing: its memory, and Husk's own timeline.
    fn at_rest(&self, ctr: &Ctr, runtime: Runtime, id: &str) -> Result<Vec<Measured>> {
        ctr.run_detached(&[], id, &["sleep", "1000"])?;
        // What the start still does in the background is not rest.
        std::thread::sleep(Duration::from_secs(2));
        let mut all = Vec::new();
        let processes = footprint::of_pod(id)?;
        for process in processes.iter().filter(|process| is_ours(process)) {
            // Both shims' names are cut to the same by the kernel.
            let of = format!("{}, {}", runtime.name(), process.name);
            all.push(kib(OWN_MEMORY, &of, process.own_kib));
        }
        if runtime == Runtime::Husk {
            // The file server maps it too: what each shares adds up.
            let guest = processes.iter().map(|process| process.guest_kib).sum();
            all.push(kib(GUEST_MEMORY, "husk", guest));
            all.extend(timeline(id)?);
        }
        ctr.remove(id)?;
        Ok(all)
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
        let begun = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().context("piped")?;
        let up = until(output, "guest up", begun);
        let memory = footprint::of_process(i32::try_from(child.id())?);
        child.kill()?;
        child.wait()?;
        let memory = memory?;
        Ok(vec![
            milliseconds(GUEST_READY, "qemu microvm", up?),
            kib(OWN_MEMORY, "qemu microvm", memory.own_kib),
            kib(GUEST_MEMORY, "qemu microvm", memory.guest_kib),
        ])
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
                    what: FILE_SIZE,
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

fn milliseconds(what: &'static str, who: &str, took: Duration) -> Measured {
    Measured {
        what,
        who: who.to_owned(),
        value: took.as_secs_f64() * 1e3,
        unit: "ms",
    }
}

fn kib(what: &'static str, who: &str, kib: u64) -> Measured {
    Measured {
        what,
        who: who.to_owned(),
        value: kib as f64,
        unit: "KiB",
    }
}

fn summary(all: &[Measured]) -> String {
    let starts: Vec<String> = all
        .iter()
        .filter(|measured| [FIRST_OUTPUT, GUEST_READY].contains(&measured.what))
        .map(|measured| {
            format!(
                "{} {:.0} ms ({})",
                measured.who, measured.value, measured.what
            )
        })
        .collect();
    starts.join(", ")
}

/// When `wanted` came, and when the process had ended.
fn first_output(command: &mut Command, wanted: &str) -> Result<(Duration, Duration)> {
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().context("piped")?;
    let first = until(output, wanted, begun);
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said)?;
    }
    let status = child.wait()?;
    ensure!(status.success(), "{status}: {said}");
    Ok((first?, begun.elapsed()))
}

fn until(mut output: impl Read, wanted: &str, begun: Instant) -> Result<Duration> {
    let (mut seen, mut block) = (Vec::new(), [0; 4096]);
    loop {
        let length = output.read(&mut block)?;
        let at = begun.elapsed();
        seen.extend_from_slice(&block[..length]);
        let text = String::from_utf8_lossy(&seen);
        if text.contains(wanted) {
            return Ok(at);
        }
        ensure!(length > 0, "ended without {wanted:?}: {text}");
    }
}

/// From the shim's record of the start.
fn timeline(id: &str) -> Result<Vec<Measured>> {
    let file = format!("/run/husk/{NAMESPACE}/{id}/state.json");
    let text = std::fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let state: Value = serde_json::from_str(&text)?;
    let moment = |stage: &str| {
        state["timeline"][stage]
            .as_u64()
            .filter(|ns| *ns > 0)
            .with_context(|| format!("no {stage} in {file}"))
    };
    let between = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
    let (exec, entered) = (moment("vmm_exec_ns")?, moment("guest_entered_ns")?);
    let ready = moment("agent_ready_ns")?;
    Ok(vec![
        milliseconds(GUEST_READY, "husk", between(exec, ready)),
        milliseconds(GUEST_BOOT, "husk", between(entered, ready)),
    ])
}
