//! Brings the node back to order after a case that failed.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri::Cri;
use crate::ctr::Ctr;
use crate::docker;
use crate::node::{Node, Runtime};

/// Ends every process of a session.
pub fn kill_session(session: i32) {
    for pid in pids() {
        // SAFETY: getsid only asks; a pid that is gone gives an error.
        if unsafe { libc::getsid(pid) } == session {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Removes every pod, and every container of the cases' namespace. What can't
/// be removed shows in the comparison that follows.
pub fn remove_all(node: &Node) -> Result<()> {
    let ctr = Ctr::new(node, Runtime::Runc);
    let tasks = ctr.call(&["task", "ls", "--quiet"])?.out();
    for id in tasks.split_whitespace() {
        ctr.call(&["task", "kill", "--all", "--signal", "SIGKILL", id])?;
        let _ = ctr.await_state(id, "STOPPED", Duration::from_secs(5));
        ctr.call(&["task", "delete", "--force", id])?;
    }
    let containers = ctr.call(&["container", "ls", "--quiet"])?.out();
    for id in containers.split_whitespace() {
        ctr.call(&["container", "delete", id])?;
    }
    docker::remove_all(node)?;
    let cri = Cri::connect(node.socket.clone(), Duration::from_secs(30) * node.slowness)?;
    for pod in cri.pods(&[])? {
        let removed = cri.stop_pod(&pod.id).and_then(|()| cri.remove_pod(&pod.id));
        if let Err(error) = removed {
            println!("        | pod {} can't be removed: {error:#}", pod.id);
        }
    }
    Ok(())
}

/// Ends the runtime's processes that serve this node's containerd and did not
/// end by themselves, so that the next case finds a quiet node.
pub fn kill_leftovers(node: &Node) {
    let socket = node.socket.display().to_string();
    for pid in pids() {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let name = command.split('\0').next().unwrap_or_default();
        let is_shim = name.contains("containerd-shim-") && command.contains(&socket);
        if is_shim || name.contains("husk-vmm") || name.contains("husk-fs") {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Every process.
pub fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// With which words a process was started; none where it is gone, or the kernel's.
pub fn arguments(pid: i32) -> Vec<String> {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command);
    command.split_terminator('\0').map(str::to_owned).collect()
}
