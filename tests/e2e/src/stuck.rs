//! What the runtime's processes are doing, told when a case failed and they are
//! still there: a hang explains itself only while it lasts.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::clean::pids;

/// How long the guests' exits are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// Lines of them that are told.
const EXITS: usize = 24;

/// Where the kernel's events are read. Not every node has it mounted.
const TRACING: &str = "/sys/kernel/tracing";

/// The threads of every shim, VMM and file server, where each of them waits, and
/// what makes the guests leave their virtual CPUs; nothing when none is there.
pub fn tell() -> String {
    let mut text = String::new();
    let mut has_machine = false;
    for pid in pids() {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let program = command.split('\0').next().unwrap_or_default();
        let name = program.rsplit('/').next().unwrap_or_default();
        if ["containerd-shim-husk", "husk-vmm", "husk-fs"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        {
            has_machine |= name.starts_with("husk-vmm");
            let _ = writeln!(text, "{pid} {}", command.replace('\0', " ").trim());
            threads(&mut text, pid);
        }
    }
    if has_machine {
        let _ = writeln!(text, "exits of all guests in {} s:", LOOK.as_secs());
        text.push_str(&exits());
    }
    text
}

fn threads(text: &mut String, pid: i32) {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return;
    };
    for entry in entries.flatten() {
        let read = |file: &str| {
            let text = fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            text.trim().to_owned()
        };
        let stat = read("stat");
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        let stack = read("stack");
        let frames: Vec<&str> = stack
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1)?.split('+').next())
            .take(5)
            .collect();
        let _ = writeln!(
            text,
            "  {} {} {}, system call {}, in {}",
            entry.file_name().display(),
            read("comm"),
            state.unwrap_or('?'),
            read("syscall").split(' ').next().unwrap_or_default(),
            frames.join(" < ")
        );
    }
}

/// The last events of KVM within a while.
fn exits() -> String {
    let tracing = Path::new(TRACING);
    let mounted = !tracing.join("trace").exists()
        && Command::new("mount")
            .args(["-t", "tracefs", "tracefs", TRACING])
            .status()
            .is_ok_and(|status| status.success());
    let switch = tracing.join("events/kvm/enable");
    let shown = fs::write(&switch, "1").and_then(|()| {
        thread::sleep(LOOK);
        fs::write(&switch, "0")?;
        let trace = fs::read_to_string(tracing.join("trace"))?;
        fs::write(tracing.join("trace"), "")?;
        Ok(trace)
    });
    if mounted {
        let _ = Command::new("umount").arg(TRACING).status();
    }
    match shown {
        Err(error) => format!("{}: {error}\n", switch.display()),
        Ok(trace) => {
            let events: Vec<&str> = trace
                .lines()
                .filter(|line| !line.starts_with('#'))
                .collect();
            let skipped = events.len().saturating_sub(EXITS);
            let mut text = format!("{} events\n", events.len());
            for event in &events[skipped..] {
                let _ = writeln!(text, "{}", event.trim());
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;

    #[test]
    fn tells_where_a_thread_waits() {
        let mut child = Command::new("sleep")
            .arg0("/usr/libexec/husk-fs")
            .arg("1000")
            .spawn()
            .unwrap();
        // Until it sleeps.
        let wanted = format!("{} /usr/libexec/husk-fs 1000\n", child.id());
        let told = (0..500).find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            let told = tell();
            let thread = told[told.find(&wanted)?..].lines().nth(1)?;
            thread
                .contains("sleep S, system call")
                .then(|| told.clone())
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(told.is_some(), "{}", tell());
    }
}
