//! Rates that devices of a pod are held to, seen by the guest's own clock: beside
//! a pod without a limit, which moves the same at the same time.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use super::volume::sleeper;
use super::{Bench, Case, husk_case};
use crate::block::LoopDevice;
use crate::cri::Cri;
use crate::cri::api::Device;
use crate::footprint;
use crate::pod::Pod;
use crate::template;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("limits/disk-rate", 90, disk_rate),
    husk_case("limits/network-rate", 90, network_rate),
    husk_case("limits/idle", 90, idle),
];

/// Of the shortest time that the rate allows, so much must be seen: clocks of
/// emulated hosts are none too good.
const SLACK: f64 = 0.8;

/// How much faster a pod without a limit is, or nothing is shown.
const FASTER: f64 = 1.5;

/// Longest time that a command may take, seconds.
const PATIENCE: i64 = 120;

/// A pod whose annotations say these of its devices.
fn pod<'a>(bench: &'a Bench, cri: &Cri, limits: &[(&str, u32)]) -> Result<Pod<'a>> {
    Pod::run(bench, cri, |config| {
        for (name, value) in limits {
            let key = format!("io.husk.vm.{name}");
            config.annotations.insert(key, value.to_string());
        }
    })
}

/// How long a command takes in a container, by that one's clock, seconds.
fn timed(cri: &Cri, container: &str, script: &str) -> Result<f64> {
    let script = format!("cat /proc/uptime; {script} || echo failed; cat /proc/uptime");
    let said = cri.exec_sync(container, &["sh", "-c", &script], PATIENCE)?;
    let said = said.ok()?;
    ensure!(!said.contains("failed"), "{script}: {said}");
    let moments: Vec<f64> = said
        .lines()
        .filter(|line| line.split(' ').count() == 2)
        .filter_map(|line| line.split(' ').next()?.parse().ok())
        .collect();
    match moments[..] {
        [begun, ended] => Ok(ended - begun),
        _ => Err(anyhow!("{script}: {said}")),
    }
}

/// The limited one and the free one do the same at the same time: how long each
/// took.
fn side_by_side(bench: &Bench, limited: (&str, &str), free: (&str, &str)) -> Result<(f64, f64)> {
    thread::scope(|scope| {
        let measure = |(container, script): (&str, &str)| -> Result<f64> {
            timed(&bench.cri()?, container, script)
        };
        let slow = scope.spawn(move || measure(limited));
        let quick = measure(free);
        let slow = slow.join().map_err(|_| anyhow!("a thread panicked"))?;
        Ok((slow?, quick?))
    })
}

/// It took as long as the rate wants, and the other did not.
fn ensure_held(what: &str, least: f64, (limited, free): (f64, f64)) -> Result<()> {
    println!("{what}: {limited:.2} s, {least:.2} s at least; without a limit {free:.2} s");
    ensure!(
        limited >= least * SLACK,
        "{what} took {limited:.2} s, which is less than {least:.2} s"
    );
    ensure!(
        limited >= free * FASTER,
        "{what}: {limited:.2} s, and without a limit {free:.2} s, which shows nothing"
    );
    Ok(())
}

fn disk_rate(bench: &Bench) -> Result<()> {
    const RATE: [(&str, u32); 4] = [
        ("disk_kib_per_second", 1024),
        ("disk_burst_kib", 256),
        ("disk_requests_per_second", 20),
        ("disk_burst_requests", 5),
    ];
    // With what is left of the burst and one request that may be owed.
    let bytes = (4096.0 - 256.0 - 64.0) / 1024.0;
    let requests = (100.0 - 5.0 - 1.0) / 20.0;
    let folder = bench.folder();
    let disks = [
        LoopDevice::new(&folder.join("limited.img"), 8)?,
        LoopDevice::new(&folder.join("free.img"), 8)?,
    ];
    let cri = bench.cri()?;
    let pods = [pod(bench, &cri, &RATE)?, pod(bench, &cri, &[])?];
    let mut containers = Vec::new();
    for (pod, disk) in pods.iter().zip(&disks) {
        let device = Device {
            container_path: "/dev/xvda".into(),
            host_path: disk.path.clone(),
            permissions: "rwm".into(),
        };
        containers.push(sleeper(&cri, pod, &[], &[device])?);
    }
    for (what, least, script) in [
        (
            "reading 4 MiB",
            bytes,
            "dd if=/dev/xvda of=/dev/null bs=64k count=64 iflag=direct 2> /dev/null",
        ),
        (
            "writing 4 MiB",
            bytes,
            "dd if=/dev/zero of=/dev/xvda bs=64k count=64 oflag=direct 2> /dev/null",
        ),
        (
            "100 requests",
            requests,
            "dd if=/dev/xvda of=/dev/null bs=4096 count=100 iflag=direct 2> /dev/null",
        ),
    ] {
        let both = side_by_side(bench, (&containers[0], script), (&containers[1], script))?;
        ensure_held(what, least, both)?;
    }
    for pod in pods {
        pod.remove(&cri)?;
    }
    Ok(())
}

/// How long a pod that does nothing is looked at, seconds.
const IDLE: u32 = 20;

/// How often its processes may be woken in a second, all of them together.
const WAKES: u32 = 20;

/// How often the threads of a process have waited so far.
fn waits(pid: i32) -> Result<u64> {
    let mut waits = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let of = status.lines().filter_map(|line| {
            let count = line.strip_prefix("voluntary_ctxt_switches:")?;
            count.trim().parse::<u64>().ok()
        });
        waits += of.sum::<u64>();
    }
    Ok(waits)
}

/// A pod that does nothing hardly wakes the node.
fn idle(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    pod.start(&cri, &["sleep", "1000000"])?;
    // The guest has something to do after its start, as has whoever makes a template.
    template::await_maker(bench.seconds(60))?;
    thread::sleep(bench.seconds(2));
    let count = || -> Result<Vec<(String, u64)>> {
        let processes = footprint::of_pod(&pod.id)?;
        let counted = processes.into_iter().map(|process| {
            let waits = waits(process.pid)?;
            Ok((process.name, waits))
        });
        counted.collect()
    };
    let before = count()?;
    thread::sleep(Duration::from_secs(IDLE.into()));
    let after = count()?;
    let mut all = 0;
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        println!("{name}: woken {} times in {IDLE} s", after - before);
        all += after - before;
    }
    ensure!(
        all <= u64::from(WAKES * IDLE),
        "woken {all} times in {IDLE} s"
    );
    pod.remove(&cri)
}

/// The first port of those that count what comes.
const PORT: u16 = 7001;

/// Counts what comes to each of two ports, once each.
fn counter(cri: &Cri, pod: &Pod) -> Result<(String, String)> {
    // The kernel's table has ports in hexadecimal, and 0A for one that listens.
    let script = "for port in 7001 7002; do nc -l -p $port -e wc -c & done; \
                  until [ $(cat /proc/net/tcp /proc/net/tcp6 | grep -c ':1B5[9A] .* 0A ') -ge 2 ]; \
                  do sleep 0.1; done; echo listening; sleep 1000";
    let container = pod.start(cri, &["sh", "-c", script])?;
    pod.await_log(cri, &container, "listening")?;
    let network = cri.pod_status(&pod.id)?.network.context("no network")?;
    Ok((container, network.ip))
}

/// Sends as much as that, and returns when it was counted.
fn send(bytes: u32, address: &str, port: u16) -> String {
    format!("[ \"$(probe pattern {bytes} | nc {address} {port})\" = {bytes} ]")
}

fn network_rate(bench: &Bench) -> Result<()> {
    const KIB: u32 = 512;
    const RATE: [(&str, u32); 2] = [("network_kib_per_second", 32), ("network_burst_kib", 32)];
    // One large frame may be owed.
    let least = (512.0 - 32.0 - 64.0) / 32.0;
    let cri = bench.cri()?;
    let limited = pod(bench, &cri, &RATE)?;
    let free = pod(bench, &cri, &[])?;
    let other = pod(bench, &cri, &[])?;
    let (to_limited, limited_ip) = counter(&cri, &limited)?;
    let (to_free, free_ip) = counter(&cri, &free)?;
    let (to_other, other_ip) = counter(&cri, &other)?;

    // What the limited one sends, beside what the free one sends.
    let scripts = [PORT, PORT + 1].map(|port| send(KIB << 10, &other_ip, port));
    let both = side_by_side(bench, (&to_limited, &scripts[0]), (&to_free, &scripts[1]))?;
    ensure_held("sending 512 KiB", least, both)?;

    // What it receives, beside what the free one receives.
    let scripts = [&limited_ip, &free_ip].map(|ip| send(KIB << 10, ip, PORT));
    let both = side_by_side(bench, (&to_other, &scripts[0]), (&to_other, &scripts[1]))?;
    ensure_held("receiving 512 KiB", least, both)?;
    for pod in [limited, free, other] {
        pod.remove(&cri)?;
    }
    Ok(())
}
