//! `husk inspect`.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use husk_node::process::Process;
use husk_node::shell;
use husk_node::state::{EndFacts, MachineFacts};

use crate::answer::Answer;
use crate::memory::Memory;
use crate::pods::{self, Pod};
use crate::text;

/// Where cgroup v2 is mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Shows a pod.
///
/// # Errors
/// There is no such pod.
pub fn run(pod: &str, json: bool) -> anyhow::Result<Answer> {
    let pod = pods::find(&pods::state_dir()?, pod)?;
    let memory = Memory::of(&pod.state);
    if json {
        return Answer::json(&value(&pod, memory));
    }
    Ok(Answer::done(show(&pod, memory)))
}

/// A pod in JSON.
pub fn value(pod: &Pod, memory: Option<Memory>) -> Value {
    let state = &pod.state;
    let process = |process: Option<Process>| {
        let is_alive = process.is_some_and(Process::is_alive);
        process.map(|process| json!({ "pid": process.pid, "alive": is_alive }))
    };
    pod.described(json!({
        "state_dir": pod.dir,
        "cgroup": state.cgroup.as_deref().map(cgroup),
        "processes": {
            "shim": process(state.shim),
            "vmm": process(state.vmm),
            "file_server": process(state.file_server),
        },
        "memory": memory,
        "machine": state.machine,
        "end": state.end,
        "debug_shell": has_shell(pod),
    }))
}

/// Programs may be run in its guest: there is a socket for it.
fn has_shell(pod: &Pod) -> bool {
    pod.dir.join(shell::SOCKET).exists()
}

fn cgroup(path: &Path) -> String {
    format!(
        "{CGROUPS}/{}",
        path.to_string_lossy().trim_start_matches('/')
    )
}

fn show(pod: &Pod, memory: Option<Memory>) -> String {
    let state = &pod.state;
    let mut facts = vec![("pod", format!("{}/{}", pod.namespace, pod.id))];
    if let Some(name) = &pod.name {
        facts.push(("name", name.clone()));
    }
    let age = pod.age().map(|age| format!(" for {}", text::age(age)));
    facts.push((
        "status",
        pod.status.word().to_owned() + &age.unwrap_or_default(),
    ));
    if let Some(end) = &state.end {
        facts.extend(end_facts(end));
    }
    if let Some(machine) = &state.machine {
        facts.extend(machine_facts(machine));
    }
    if let Some(memory) = memory {
        facts.push((
            "memory used",
            format!(
                "{}: guest {}, VMM {}, shim {}, file server {}",
                text::mib(memory.sum_kib()),
                text::mib(memory.guest_kib),
                text::mib(memory.vmm_kib),
                text::mib(memory.shim_kib),
                text::mib(memory.file_server_kib),
            ),
        ));
    }
    for (name, process) in [
        ("shim", state.shim),
        ("VMM", state.vmm),
        ("file server", state.file_server),
    ] {
        let Some(process) = process else { continue };
        let gone = if process.is_alive() { "" } else { " (gone)" };
        facts.push((name, format!("process {}{gone}", process.pid)));
    }
    if let Some(path) = &state.cgroup {
        facts.push(("cgroup", cgroup(path)));
    }
    if has_shell(pod) {
        facts.push(("debug shell", "allowed when it began".to_owned()));
    }
    facts.push(("state", pod.dir.to_string_lossy().into_owned()));
    for (_, value) in &mut facts {
        *value = text::short(value);
    }
    text::facts(&facts)
}

fn end_facts(end: &EndFacts) -> Vec<(&'static str, String)> {
    let at = text::utc(UNIX_EPOCH + Duration::from_nanos(end.at_ns));
    let asked = if end.was_asked { ", as asked" } else { "" };
    let mut facts = vec![("ended", format!("{at}: {}{asked}", end.reason))];
    if !end.console.is_empty() {
        facts.push(("console", end.console.clone()));
    }
    facts
}

fn machine_facts(machine: &MachineFacts) -> Vec<(&'static str, String)> {
    let mut facts = vec![(
        "processors",
        format!("{} (may grow to {})", machine.vcpus, machine.vcpus_max),
    )];
    let more = match machine.pluggable_mib {
        0 => String::new(),
        more => format!(" (may grow by {more} MiB)"),
    };
    facts.push(("memory", format!("{} MiB{more}", machine.memory_mib)));
    for nic in &machine.nics {
        let what = format!("{} {} mtu {}", nic.name, nic.mac, nic.mtu);
        facts.push(("interface", what));
    }
    for disk in &machine.disks {
        let how = if disk.read_only { " read-only" } else { "" };
        facts.push(("disk", format!("{}{how}", disk.serial)));
    }
    let began = match machine.from_template {
        true => "as a copy of the node's template",
        false => "by booting",
    };
    facts.push(("began", began.to_owned()));
    let installed = env!("CARGO_PKG_VERSION");
    let older = match machine.shim_version == installed {
        true => String::new(),
        false => format!(" (this command is {installed})"),
    };
    facts.push(("version", format!("{}{older}", machine.shim_version)));
    facts.push(("agent", machine.agent_version.clone()));
    facts.push(("guest kernel", machine.kernel_release.clone()));
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::Status;
    use husk_node::state::{DiskFacts, EndKind, NicFacts, State};

    #[test]
    fn tells_all_and_trusts_nobody() {
        let machine = MachineFacts {
            vcpus: 1,
            vcpus_max: 4,
            memory_mib: 512,
            pluggable_mib: 2048,
            from_template: true,
            template: Some("0".repeat(32)),
            nics: vec![NicFacts {
                name: "eth0".into(),
                mac: "02:00:00:00:00:01".into(),
                mtu: 1500,
            }],
            disks: vec![DiskFacts {
                serial: "disk-0".into(),
                read_only: true,
            }],
            shim_version: "0.0.1".into(),
            agent_version: "0.0.1\x1b]0;owned\x07".into(),
            kernel_release: "k".repeat(100_000),
        };
        let pod = Pod {
            namespace: "default".into(),
            id: "a".into(),
            name: None,
            dir: "/run/husk/default/a".into(),
            state: State {
                vmm: Some(Process {
                    pid: 1,
                    start_ticks: 1,
                }),
                cgroup: Some("/default/a".into()),
                machine: Some(machine),
                end: Some(EndFacts {
                    kind: EndKind::Panicked,
                    reason: "the guest's kernel panicked".into(),
                    was_asked: false,
                    console: "sysrq: Trigger a crash\x1b[2J".into(),
                    at_ns: 60_000_000_000,
                }),
                ..State::default()
            },
            status: Status::Ended,
        };
        let memory = Memory {
            guest_kib: 1024,
            vmm_kib: 512,
            shim_kib: 256,
            file_server_kib: 256,
        };
        let text = show(&pod, Some(memory));
        for line in [
            "ended         1970-01-01T00:01:00.000Z: the guest's kernel panicked",
            "console       sysrq: Trigger a crash\\u{1b}[2J",
            "processors    1 (may grow to 4)",
            "memory        512 MiB (may grow by 2048 MiB)",
            "interface     eth0 02:00:00:00:00:01 mtu 1500",
            "disk          disk-0 read-only",
            "memory used   2.0 MiB: guest 1.0 MiB, VMM 0.5 MiB, shim 0.2 MiB, file server 0.2 MiB",
            "VMM           process 1 (gone)",
            "cgroup        /sys/fs/cgroup/default/a",
            "agent         0.0.1\\u{1b}]0;owned\\u{7}",
        ] {
            assert!(
                text.lines().any(|shown| shown == line),
                "{text} lacks {line}"
            );
        }
        assert!(text.contains("this command is"), "{text}");
        assert!(text.len() < 2000);
        let json = value(&pod, Some(memory));
        assert_eq!(json["machine"]["disks"][0]["serial"], "disk-0");
        assert_eq!(json["processes"]["vmm"]["alive"], false);
        assert_eq!(json["end"]["reason"], "the guest's kernel panicked");
        assert_eq!(json["end"]["kind"], "panicked");
    }
}
