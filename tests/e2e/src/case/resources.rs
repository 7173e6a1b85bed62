//! What a container and a pod may use, and how much they do.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Bench, Case, Skip, case};
use crate::block::LoopDevice;
use crate::cri::Cri;
use crate::cri::api::{ContainerConfig, ContainerState, LinuxContainerResources};
use crate::node::Runtime;
use crate::oci;
use crate::pod::Pod;
use crate::pod_cgroup::PodCgroup;
use crate::process::{Finished, eventually};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("resources/limit-files", 40, limit_files),
    case("resources/limits-hold", 60, limits_hold),
    case("resources/out-of-memory-group", 60, out_of_memory_group),
    case("resources/update", 60, update),
    case("resources/statistics", 60, statistics),
    case("resources/oci-limits", 40, oci_limits),
    case("resources/io-throttle", 60, io_throttle),
    case("resources/io-in-pod", 60, io_in_pod),
];

pub(super) const MIB: i64 = 1 << 20;

/// A container's configuration with these resources.
pub(super) fn limited(
    pod: &Pod,
    command: &[&str],
    resources: LinuxContainerResources,
) -> ContainerConfig {
    let mut config = pod.container(command);
    config.linux.get_or_insert_default().resources = Some(resources);
    config
}

fn unified(key: &str, value: &str) -> std::collections::HashMap<String, String> {
    [(key.to_owned(), value.to_owned())].into()
}

/// What a command in the container prints.
pub(super) fn shown(cri: &Cri, container: &str, script: &str) -> Result<String> {
    cri.exec_sync(container, &["sh", "-c", script], 10)?.ok()
}

/// The number beside `key` in the lines of a flat keyed file.
pub(super) fn value_of(text: &str, key: &str) -> Result<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
        .with_context(|| format!("no {key} in\n{text}"))
}

/// What the CRI asks for is in the files of the container's cgroup.
fn limit_files(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let resources = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 256,
        memory_limit_in_bytes: 64 * MIB,
        oom_score_adj: 500,
        unified: unified("pids.max", "40"),
        ..Default::default()
    };
    let container = pod.start_config(&cri, &limited(&pod, &["sleep", "1000"], resources))?;
    let files = shown(
        &cri,
        &container,
        "cd /sys/fs/cgroup; for file in cpu.max memory.max memory.swap.max pids.max; do \
         echo $file $(cat $file); done; echo oom $(cat /proc/1/oom_score_adj)",
    )?;
    let expected = "cpu.max 50000 100000\nmemory.max 67108864\nmemory.swap.max 0\n\
                    pids.max 40\noom 500";
    ensure!(files == expected, "{files}\nexpected\n{expected}");
    // How shares become a weight is the runtime's to say; the default is 100.
    let weight: u64 = shown(&cri, &container, "cat /sys/fs/cgroup/cpu.weight")?.parse()?;
    ensure!((1..100).contains(&weight), "256 shares weigh {weight}");
    let plain = pod.start(&cri, &["sleep", "1000"])?;
    let files = shown(&cri, &plain, "cd /sys/fs/cgroup; cat cpu.max memory.max")?;
    ensure!(files == "max 100000\nmax", "without limits: {files}");
    pod.remove(&cri)
}

/// Limits that are reached hold, and hurt nobody else.
fn limits_hold(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let sibling = pod.start(&cri, &["sleep", "1000"])?;

    let script = "i=0; while [ $i -lt 60 ]; do sleep 1000 & i=$((i+1)); done; echo made all";
    let resources = LinuxContainerResources {
        unified: unified("pids.max", "20"),
        ..Default::default()
    };
    let forks = pod.start_config(&cri, &limited(&pod, &["sh", "-c", script], resources))?;
    let log = pod.await_log(&cri, &forks, "fork")?;
    ensure!(
        log.contains("Resource temporarily unavailable") && !log.contains("made all"),
        "{log}"
    );
    let status = pod.await_exit(&cri, &forks)?;
    ensure!(status.exit_code != 0, "{status:?}");

    let resources = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 10_000,
        ..Default::default()
    };
    let busy = ["sh", "-c", "while :; do :; done"];
    let busy = pod.start_config(&cri, &limited(&pod, &busy, resources))?;
    eventually("the busy container is throttled", bench.seconds(10), || {
        let text = shown(&cri, &busy, "cat /sys/fs/cgroup/cpu.stat")?;
        Ok((value_of(&text, "nr_throttled ")? > 3).then_some(()))
    })?;
    let others = shown(&cri, &sibling, "cat /sys/fs/cgroup/cpu.stat")?;
    ensure!(value_of(&others, "nr_throttled ")? == 0, "{others}");
    pod.remove(&cri)
}

/// As the kubelet asks for it: memory that a child wants ends the whole
/// container, and only that.
fn out_of_memory_group(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let sibling = pod.start(&cri, &["sleep", "1000"])?;
    let start = |unified| {
        let resources = LinuxContainerResources {
            memory_limit_in_bytes: 48 * MIB,
            unified,
            ..Default::default()
        };
        let script = "probe eat 200; echo child ended with $?; sleep 1000";
        pod.start_config(&cri, &limited(&pod, &["sh", "-c", script], resources))
    };
    let whole = start(unified("memory.oom.group", "1"))?;
    let status = pod.await_exit(&cri, &whole)?;
    ensure!(
        status.exit_code == 137 && status.reason == "OOMKilled",
        "{status:?}"
    );
    // Without it the parent sees how its child ended.
    let parts = start(Default::default())?;
    pod.await_log(&cri, &parts, "child ended with 137")?;
    let status = cri.container_status(&parts)?;
    ensure!(
        status.state() == ContainerState::ContainerRunning,
        "{status:?}"
    );
    shown(&cri, &sibling, "true")?;
    pod.remove(&cri)
}

/// Limits of a running container change in place.
fn update(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 48 * MIB,
        cpu_period: 100_000,
        cpu_quota: 20_000,
        cpu_shares: 1024,
        ..Default::default()
    };
    let script = "until [ -e /tmp/go ]; do sleep 0.1; done; exec probe eat 80";
    let container = pod.start_config(&cri, &limited(&pod, &["sh", "-c", script], resources))?;
    let weight = || -> Result<u64> {
        Ok(shown(&cri, &container, "cat /sys/fs/cgroup/cpu.weight")?.parse()?)
    };
    let before = weight()?;
    let grown = LinuxContainerResources {
        memory_limit_in_bytes: 128 * MIB,
        cpu_period: 50_000,
        cpu_quota: 45_000,
        cpu_shares: 256,
        ..Default::default()
    };
    cri.update(&container, grown)?;
    let files = "cd /sys/fs/cgroup; cat memory.max cpu.max";
    let seen = shown(&cri, &container, files)?;
    ensure!(seen == "134217728\n45000 50000", "{seen}");
    let after = weight()?;
    ensure!(
        after < before,
        "weight {after} after fewer shares, {before} before"
    );
    // It may use what it was given, without a restart.
    shown(&cri, &container, "touch /tmp/go")?;
    pod.await_log(&cri, &container, "holding 80 MiB")?;
    let shrunk = LinuxContainerResources {
        memory_limit_in_bytes: 112 * MIB,
        ..Default::default()
    };
    cri.update(&container, shrunk)?;
    let seen = shown(&cri, &container, files)?;
    ensure!(seen == "117440512\n45000 50000", "{seen}");
    let status = cri.container_status(&container)?;
    ensure!(
        status.state() == ContainerState::ContainerRunning,
        "{status:?}"
    );
    pod.remove(&cri)
}

/// What is told of a container is what its cgroup's files say.
fn statistics(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    // The kubelet makes a cgroup for the pod; containerd takes its figures there.
    let parent = PodCgroup::make(&bench.id())?;
    let pod = Pod::run(bench, &cri, |config| {
        config.linux.get_or_insert_default().cgroup_parent = parent.name.clone();
    })?;
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 128 * MIB,
        ..Default::default()
    };
    let config = limited(&pod, &["probe", "eat", "40"], resources);
    let container = pod.start_config(&cri, &config)?;
    pod.await_log(&cri, &container, "holding 40 MiB")?;
    let files = || {
        let files = "cd /sys/fs/cgroup; cat cpu.stat; echo current $(cat memory.current); \
                     cat memory.stat";
        shown(&cri, &container, files)
    };
    let before = files()?;
    let stats = cri.container_stats(&container)?;
    let after = files()?;

    let cpu = stats.cpu.context("no CPU figures")?;
    let cpu = cpu.usage_core_nano_seconds.context("no CPU time")?.value / 1000;
    let between = value_of(&before, "usage_usec ")?..=value_of(&after, "usage_usec ")?;
    ensure!(
        between.contains(&cpu),
        "{cpu} µs are told, the file says {between:?}"
    );

    let memory = stats.memory.context("no memory figures")?;
    let told = |number: &Option<crate::cri::api::UInt64Value>| {
        number.as_ref().map_or(0, |number| number.value)
    };
    // The processes that read the files are in the cgroup, too.
    let near = |told: u64, key: &str| -> Result<()> {
        let file = value_of(&before, key)?;
        ensure!(
            told.abs_diff(file) < 6 << 20,
            "{key}: {told} is told, the file says {file}"
        );
        Ok(())
    };
    near(told(&memory.usage_bytes), "current ")?;
    near(told(&memory.rss_bytes), "anon ")?;
    ensure!(told(&memory.rss_bytes) > 40 << 20, "{memory:?}");
    let idle = value_of(&before, "inactive_file ")?;
    near(told(&memory.working_set_bytes) + idle, "current ")?;
    let left = told(&memory.available_bytes);
    ensure!(
        (1 << 20..88 << 20).contains(&left),
        "{left} of 128 MiB are left beside 40 MiB"
    );

    let address = "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'";
    shown(&cri, &container, &format!("ping -c 3 -W 5 $({address})"))?;
    let of_pod = cri.pod_stats(&pod.id)?;
    let of_pod = of_pod.linux.context("no figures for the pod")?;
    let pod_cpu = of_pod.cpu.context("no CPU figures for the pod")?;
    let pod_cpu = told(&pod_cpu.usage_core_nano_seconds) / 1000;
    ensure!(
        pod_cpu > cpu,
        "the pod has used {pod_cpu} µs, its container {cpu}"
    );
    let pod_memory = of_pod.memory.context("no memory figures for the pod")?;
    ensure!(
        told(&pod_memory.working_set_bytes) > 40 << 20,
        "{pod_memory:?}"
    );
    let network = of_pod.network.context("no network figures for the pod")?;
    let interface = network.default_interface.context("no interface")?;
    ensure!(
        interface.name == "eth0"
            && told(&interface.rx_bytes) >= 3 * 98
            && told(&interface.tx_bytes) >= 3 * 98,
        "{interface:?}"
    );
    ensure!(of_pod.containers.len() == 1, "{:?}", of_pod.containers);
    pod.remove(&cri)
}

/// What an OCI spec can say beside.
fn oci_limits(bench: &Bench) -> Result<()> {
    let script = "awk '/^Max core/ { print $5, $6 } /^Max processes/ { print $3, $4 } \
                  /^Max open files/ { print $4, $5 }' /proc/self/limits; \
                  cat /proc/self/oom_score_adj; cd /sys/fs/cgroup; \
                  cat pids.max memory.max memory.low memory.high memory.swap.max cpu.max";
    let done = oci::run(bench, &["sh", "-c", script], |spec| {
        spec["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 333, "hard": 4444 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            { "type": "RLIMIT_NPROC", "soft": 77, "hard": 88 },
        ]);
        spec["process"]["oomScoreAdj"] = json!(300);
        let resources = &mut spec["linux"]["resources"];
        resources["pids"] = json!({ "limit": 50 });
        resources["memory"] = json!({
            "limit": 96 * MIB, "reservation": 32 * MIB, "swap": 128 * MIB,
        });
        resources["cpu"] = json!({ "quota": 80_000, "period": 40_000 });
        resources["unified"] = json!({ "memory.high": "83886080" });
    })?
    .ok()?;
    let expected = "0 0\n77 88\n333 4444\n300\n50\n100663296\n33554432\n83886080\n\
                    33554432\n80000 40000\n";
    ensure!(done.out() == expected, "{}expected {expected}", done.tail());
    Ok(())
}

/// As device files and cgroups have it.
fn parts(device: u64) -> (u64, u64) {
    (nix::sys::stat::major(device), nix::sys::stat::minor(device))
}

/// A limit of bytes a second on the disk that holds a volume.
fn io_throttle(bench: &Bench) -> Result<()> {
    let folder = bench.folder();
    let device = nix::sys::stat::stat(&folder)?.st_dev;
    let (major, minor) = parts(device);
    let disk = format!("/sys/dev/block/{major}:{minor}");
    let is_whole =
        fs::metadata(&disk).is_ok() && fs::metadata(format!("{disk}/partition")).is_err();
    if !is_whole {
        return Err(Skip(format!("{} is on no whole disk", folder.display())).into());
    }
    let run = |rate: Option<u64>| -> Result<f64> {
        let script = "cat /proc/uptime; dd if=/dev/zero of=/mnt/file bs=64k count=64 conv=fsync \
                      2> /dev/null || echo failed; cat /proc/uptime";
        let done = oci::run(bench, &["sh", "-c", script], |spec| {
            let mount = json!({
                "destination": "/mnt", "type": "bind",
                "source": folder.display().to_string(), "options": ["rbind", "rw"],
            });
            oci::push(&mut spec["mounts"], mount);
            if let Some(rate) = rate {
                spec["linux"]["resources"]["blockIO"] = json!({
                    "throttleWriteBpsDevice": [{ "major": major, "minor": minor, "rate": rate }],
                });
            }
        })?
        .ok()?;
        let moments: Vec<f64> = done
            .out()
            .lines()
            .filter_map(|line| line.split(' ').next()?.parse().ok())
            .collect();
        match moments[..] {
            [begun, ended] => Ok(ended - begun),
            _ => anyhow::bail!("{}", done.tail()),
        }
    };
    // 4 MiB at half a MiB a second.
    let slow = run(Some(512 << 10))?;
    ensure!(
        slow > 6.0,
        "4 MiB at 512 KiB/s took {slow:.1} s; without a limit {:.1} s",
        run(None)?
    );
    ensure!(fs::metadata(folder.join("file"))?.size() == 4 << 20);
    Ok(())
}

/// What one container of several may do with a disk of its own.
fn io_in_pod(bench: &Bench) -> Result<()> {
    let disk = LoopDevice::new(&bench.folder().join("disk.img"), 8)?;
    let (major, minor) = parts(fs::metadata(&disk.path)?.rdev());
    let below = parts(nix::sys::stat::stat(&disk.file)?.st_dev);
    let note = |spec: &mut serde_json::Value, kind: &str, of: &str| {
        spec["annotations"]["io.kubernetes.cri.container-type"] = json!(kind);
        spec["annotations"]["io.kubernetes.cri.sandbox-id"] = json!(of);
    };
    let pod = bench.id();
    oci::start(bench, &pod, &["sleep", "1000"], |spec| {
        note(spec, "sandbox", &pod);
    })?;
    let run = |block_io: serde_json::Value| {
        let script = "cat /proc/uptime; dd if=/dev/own of=/dev/null bs=64k count=32 iflag=direct \
                      2> /dev/null || echo failed; cat /proc/uptime; cat /sys/fs/cgroup/io.max \
                      /sys/fs/cgroup/io.weight 2> /dev/null; true";
        let done = oci::run(bench, &["sh", "-c", script], |spec| {
            note(spec, "container", &pod);
            let device = json!({ "path": "/dev/own", "type": "b", "major": major, "minor": minor });
            spec["linux"]["devices"] = json!([device]);
            let rule = json!({
                "allow": true, "type": "b", "major": major, "minor": minor, "access": "rwm",
            });
            oci::push(&mut spec["linux"]["resources"]["devices"], rule);
            spec["linux"]["resources"]["blockIO"] = block_io;
        });
        done?.ok()
    };
    let throttle =
        |(major, minor): (u64, u64)| json!([{ "major": major, "minor": minor, "rate": 512 << 10 }]);
    let took = |done: &Finished| -> Result<f64> {
        let text = done.out();
        let mut moments = text.lines().filter_map(|line| {
            let moment = line.split(' ').next()?;
            moment.contains('.').then(|| moment.parse::<f64>().ok())?
        });
        let (begun, ended) = (moments.next(), moments.next());
        ensure!(!text.contains("failed"), "{}", done.tail());
        Ok(ended.context("no end")? - begun.context("no beginning")?)
    };
    // 2 MiB at half a MiB a second.
    let slow = run(json!({ "throttleReadBpsDevice": throttle((major, minor)) }))?;
    let fast = run(json!({}))?;
    ensure!(
        took(&slow)? > 3.0 && took(&fast)? < took(&slow)?,
        "{}{}",
        slow.tail(),
        fast.tail()
    );
    let on_disk = fs::exists(format!("/sys/dev/block/{}:{}", below.0, below.1))?;
    if bench.runtime == Runtime::Husk && on_disk {
        // What is said of the disk that the file is on holds for this one, too.
        let slow = run(json!({ "weight": 500, "throttleReadBpsDevice": throttle(below) }))?;
        let said = slow.out();
        ensure!(
            took(&slow)? > 3.0 && said.contains(" rbps=524288 ") && said.contains("default 4950"),
            "{}",
            slow.tail()
        );
    }
    bench.ctr.remove(&pod)
}
