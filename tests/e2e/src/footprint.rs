//! What a pod costs the host: its processes and their memory.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use husk_node::smaps;

use crate::clean::{arguments, pids};
use crate::template;

/// One process of a pod as the host sees it.
#[derive(Clone, Debug)]
pub struct HostProcess {
    /// Process id.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// User it runs as.
    pub uid: u32,
    /// Name as the kernel keeps it.
    pub name: String,
    /// Its own share of memory without the guest's, KiB.
    pub own_kib: u64,
    /// Its share of the guest's memory, KiB.
    pub guest_kib: u64,
}

/// The shim of a pod and every process below it, but for what makes a template,
/// which is nobody's.
pub fn of_pod(pod: &str) -> Result<Vec<HostProcess>> {
    let all: Vec<HostProcess> = pids().filter_map(|pid| host_process(pid).ok()).collect();
    let shim = all
        .iter()
        .find(|process| is_shim_of(process.pid, pod))
        .with_context(|| format!("no shim of {pod}"))?;
    let mut found = vec![shim.clone()];
    let mut index = 0;
    while let Some(process) = found.get(index).cloned() {
        found.extend(
            all.iter()
                .filter(|child| child.parent == process.pid && !template::is_maker(child.pid))
                .cloned(),
        );
        index += 1;
    }
    Ok(found)
}

/// One process.
pub fn of_process(pid: i32) -> Result<HostProcess> {
    host_process(pid)
}

/// Whether a process is a pod's shim, of whatever runtime, or is about to start it.
pub fn is_shim_of(pid: i32, pod: &str) -> bool {
    let words = arguments(pid);
    words
        .first()
        .is_some_and(|name| name.contains("containerd-shim-"))
        && words.windows(2).any(|pair| pair == ["-id", pod])
}

fn host_process(pid: i32) -> Result<HostProcess> {
    let folder = Path::new("/proc").join(pid.to_string());
    let status = fs::read_to_string(folder.join("status"))?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.split_whitespace().next())
            .with_context(|| format!("no {name} of {pid}"))
    };
    let memory = smaps::of_process(pid.unsigned_abs()).unwrap_or_default();
    Ok(HostProcess {
        pid,
        parent: field("PPid:")?.parse()?,
        uid: field("Uid:")?.parse()?,
        name: field("Name:")?.to_owned(),
        own_kib: memory.own_kib,
        guest_kib: memory.guest_kib,
    })
}
