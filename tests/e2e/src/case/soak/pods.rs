//! Pods one after another, and what stays beside them: a pod of ours, containerd,
//! the node's kernel. None of it grows with their number.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::PODS;
use crate::case::Bench;
use crate::clean::pids;
use crate::cri::Cri;
use crate::footprint;
use crate::host::{self, HostState};
use crate::pod::Pod;
use crate::template;

/// What comes and goes before anything is counted.
const FIRST: u32 = 3;

/// What a pod that stays may grow by, KiB: its allocators settle.
const STAYING_KIB: u64 = 512;

/// What the node may grow by without containerd, KiB, and what a pod may leave of
/// that: bookkeeping that the kernel frees when it needs the room.
const NODE_KIB: u64 = 16 << 10;
const NODE_KIB_A_POD: u64 = 32;

/// Files that containerd may keep open, however many pods there were.
const CONTAINERD_FILES: u64 = 16;

/// What is counted.
#[derive(Debug)]
struct Count {
    /// Of the pod that stays, KiB and files.
    staying_kib: u64,
    staying_files: u64,
    /// Memory in use on the node without containerd's, KiB.
    node_kib: u64,
    containerd_kib: u64,
    containerd_files: u64,
    /// Bytes in the node's file systems in memory, KiB.
    tmpfs_kib: u64,
}

impl Count {
    fn take(pod: &str) -> Result<Self> {
        let staying = footprint::of_pod(pod)?;
        let containerd = containerd()?;
        let containerd_kib = footprint::of_process(containerd)?.own_kib;
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let value = |name: &str| -> Result<u64> {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.with_context(|| format!("no {name} in /proc/meminfo"))
        };
        let free = value("MemFree:")? + value("Buffers:")? + value("Cached:")?;
        let used = value("MemTotal:")? - free - value("SReclaimable:")?;
        let mut tmpfs_kib = 0;
        for folder in ["/run", "/dev/shm", "/tmp"] {
            let usage = nix::sys::statvfs::statvfs(folder)?;
            let blocks = usage.blocks() - usage.blocks_free();
            tmpfs_kib += blocks * usage.fragment_size() / 1024;
        }
        Ok(Self {
            staying_kib: staying.iter().map(|process| process.own_kib).sum(),
            staying_files: staying.iter().map(|process| files_of(process.pid)).sum(),
            node_kib: used.saturating_sub(containerd_kib),
            containerd_kib,
            containerd_files: files_of(containerd),
            tmpfs_kib,
        })
    }
}

fn files_of(pid: i32) -> u64 {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    entries.map_or(0, |entries| entries.count() as u64)
}

fn containerd() -> Result<i32> {
    let mut pids = pids().filter(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.trim() == "containerd")
    });
    pids.next().context("no containerd")
}

fn one(bench: &Bench, cri: &Cri, number: u32) -> Result<()> {
    let said = format!("pod {number}");
    let pod = Pod::run(bench, cri, |_| {})?;
    let container = pod.start(cri, &["sh", "-c", &format!("echo {said}; sleep 1000")])?;
    pod.await_log(cri, &container, &said)?;
    cri.exec_sync(&container, &["true"], 60)?.ok()?;
    pod.remove(cri)
}

pub fn one_after_another(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let staying = Pod::run(bench, &cri, |_| {})?;
    let container = staying.start(&cri, &["sleep", "1000000"])?;
    for number in 0..FIRST {
        one(bench, &cri, number)?;
    }
    template::await_maker(bench.seconds(60))?;
    host::await_rest(&bench.node, bench.seconds(20))?;
    let state = HostState::capture(&bench.node);
    let before = Count::take(&staying.id)?;
    println!("before: {before:?}");
    let wanted = PODS.wanted();
    for number in 0..wanted {
        one(bench, &cri, FIRST + number).with_context(|| format!("pod {number} of {wanted}"))?;
    }
    state.await_same(&bench.node, bench.seconds(10), |_| true)?;
    let after = Count::take(&staying.id)?;
    println!("after {wanted} pods: {after:?}");
    let [earlier, later] = [&before, &after].map(|count| count.containerd_kib);
    println!("containerd itself: {earlier} KiB, then {later} KiB");

    let pods = u64::from(wanted);
    for (what, before, after, more) in [
        (
            "KiB of a pod that stays",
            before.staying_kib,
            after.staying_kib,
            STAYING_KIB,
        ),
        (
            "files of a pod that stays",
            before.staying_files,
            after.staying_files,
            0,
        ),
        (
            "KiB of the node",
            before.node_kib,
            after.node_kib,
            NODE_KIB + NODE_KIB_A_POD * pods,
        ),
        (
            "files of containerd",
            before.containerd_files,
            after.containerd_files,
            CONTAINERD_FILES,
        ),
        (
            "KiB in /run, /dev/shm and /tmp",
            before.tmpfs_kib,
            after.tmpfs_kib,
            1024,
        ),
    ] {
        ensure!(after <= before + more, "{what}: {before}, then {after}");
    }
    cri.exec_sync(&container, &["true"], 60)?.ok()?;
    staying.remove(&cri)
}
