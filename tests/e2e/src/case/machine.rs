//! How large a pod's machine is, and how it follows the limits of its containers.

use anyhow::{Context, Result, ensure};

use super::resources::{MIB, limited, shown, value_of};
use super::{Bench, Case, Skip, husk_case};
use crate::cri::Cri;
use crate::cri::api::LinuxContainerResources;
use crate::drop_in::DropIn;
use crate::footprint;
use crate::pod::Pod;
use crate::pod_cgroup::PodCgroup;
use crate::pod_state::is_copy;
use crate::process::eventually;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("resources/machine-size", 90, machine_size),
    husk_case("resources/machine-grows", 90, machine_grows),
    husk_case("resources/freed-memory", 90, freed_memory),
    husk_case("resources/processors-grow", 90, processors_grow),
    husk_case("resources/beyond-machine", 60, beyond_machine),
];

/// Memory in MiB and processors of a pod's machine.
fn machine_of(bench: &Bench, cri: &Cri, pod: &Pod) -> Result<(u64, u64)> {
    let container = pod.start(cri, &["sleep", "1000"])?;
    let memory = shown(cri, &container, "cat /proc/meminfo")?;
    let memory = memory.replace(" kB", "");
    let vcpus = shown(cri, &container, "nproc")?.parse()?;
    let memory_mib = value_of(&memory, "MemTotal:")? >> 10;
    println!("{}: {memory_mib} MiB, {vcpus} vCPUs", bench.runtime.name());
    Ok((memory_mib, vcpus))
}

/// The machine is as large as the pod's limits; where they leave something
/// open, there is room for that.
fn machine_size(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let limits = |memory_mib: i64, cpu_quota: i64| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota,
        memory_limit_in_bytes: memory_mib * MIB,
        ..Default::default()
    };
    let run = |cgroup: &PodCgroup, resources: LinuxContainerResources| {
        Pod::run(bench, &cri, |config| {
            let linux = config.linux.get_or_insert_default();
            linux.cgroup_parent = cgroup.name.clone();
            linux.resources = Some(resources);
        })
    };
    let processors = thread_count();

    // Every container has limits: the kubelet limits the pod's cgroup as well.
    let all = PodCgroup::make(&bench.id())?;
    all.limit("memory.max", &(500 * MIB).to_string())?;
    all.limit("cpu.max", "150000 100000")?;
    let pod = run(&all, limits(200, 150_000))?;
    let (memory, vcpus) = machine_of(bench, &cri, &pod)?;
    ensure!(
        (200..320).contains(&memory) && vcpus == 2.min(processors),
        "200 MiB and 1.5 CPUs: {memory} MiB, {vcpus} vCPUs of {processors}"
    );
    pod.remove(&cri)?;

    // A limit of CPU alone.
    let cpu = PodCgroup::make(&bench.id())?;
    cpu.limit("cpu.max", "50000 100000")?;
    let pod = run(&cpu, limits(0, 50_000))?;
    let (memory, vcpus) = machine_of(bench, &cri, &pod)?;
    ensure!(
        memory >= 400 && vcpus == 1,
        "0.5 CPUs: {memory} MiB, {vcpus} vCPUs"
    );
    pod.remove(&cri)?;

    // One container of several has limits: their sum is told, and the pod's
    // cgroup has none.
    let some = PodCgroup::make(&bench.id())?;
    let pod = run(&some, limits(64, 20_000))?;
    let (memory, _) = machine_of(bench, &cri, &pod)?;
    ensure!(
        memory >= 464,
        "64 MiB and a container without limit: {memory} MiB"
    );
    pod.remove(&cri)
}

fn thread_count() -> u64 {
    let count = std::thread::available_parallelism();
    count.map_or(1, |count| count.get() as u64)
}

/// The machine follows the limits of its containers, up and down.
fn machine_grows(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let limits = |mib: i64| LinuxContainerResources {
        memory_limit_in_bytes: mib * MIB,
        ..Default::default()
    };
    let cgroup = PodCgroup::make(&bench.id())?;
    cgroup.limit("memory.max", &(1200 * MIB).to_string())?;
    let pod = Pod::run(bench, &cri, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.cgroup_parent = cgroup.name.clone();
        linux.resources = Some(limits(64));
    })?;
    let small = pod.start_config(&cri, &limited(&pod, &["sleep", "1000"], limits(64)))?;
    let memory = || -> Result<u64> {
        let text = shown(&cri, &small, "cat /proc/meminfo")?;
        Ok(value_of(&text.replace(" kB", ""), "MemTotal:")? >> 10)
    };
    let at_first = memory()?;
    ensure!(at_first < 200, "64 MiB: {at_first} MiB");

    // A container that the pod's limits did not know of, and that uses its own.
    let large = limited(&pod, &["probe", "eat", "220"], limits(300));
    let large = pod.start_config(&cri, &large)?;
    pod.await_log(&cri, &large, "holding 220 MiB")?;
    let with_large = memory()?;
    ensure!(with_large >= at_first + 280, "{at_first}, {with_large} MiB");
    // A limit that is raised in place.
    cri.update(&small, limits(160))?;
    eventually("more memory", bench.seconds(10), || {
        Ok((memory()? >= with_large + 90).then_some(()))
    })?;
    let used = shown(&cri, &small, "cat /sys/fs/cgroup/memory.max")?;
    ensure!(used == (160 * MIB).to_string(), "{used}");

    cri.stop(&large, 0)?;
    cri.remove(&large)?;
    cri.update(&small, limits(64))?;
    eventually("less memory", bench.seconds(20), || {
        Ok((memory()? <= at_first + 64).then_some(()))
    })?;
    pod.remove(&cri)
}

/// What a container held and holds no more is the node's again, while the pod goes
/// on: whether its machine booted or is a copy.
fn freed_memory(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let no_templates = DropIn::with("template_max_age_seconds = 0\n")?;
    freed_memory_of(bench, &cri)?;
    drop(no_templates);
    freed_memory_of(bench, &cri)
}

fn freed_memory_of(bench: &Bench, cri: &Cri) -> Result<()> {
    let pod = Pod::run(bench, cri, |_| {})?;
    let held_mib = || -> Result<u64> {
        let processes = footprint::of_pod(&pod.id)?;
        Ok(processes
            .iter()
            .map(|process| process.guest_kib)
            .sum::<u64>()
            >> 10)
    };
    let idle = pod.start(cri, &["sleep", "1000"])?;
    let before = held_mib()?;
    let large = pod.start(cri, &["probe", "eat", "220"])?;
    pod.await_log(cri, &large, "holding 220 MiB")?;
    let with_large = held_mib()?;
    ensure!(with_large >= before + 200, "{before}, {with_large} MiB");
    cri.stop(&large, 0)?;
    cri.remove(&large)?;
    let after = eventually("the memory is the node's again", bench.seconds(10), || {
        Ok(Some(held_mib()?).filter(|held| *held <= before + 20))
    })?;
    let how = if is_copy(&pod.id)? {
        "a copy"
    } else {
        "a boot"
    };
    println!("{how}: {before}, {with_large}, {after} MiB");
    ensure!(shown(cri, &idle, "echo works")? == "works");
    pod.remove(cri)
}

/// As many processors as the containers' limits come to, up and down.
fn processors_grow(bench: &Bench) -> Result<()> {
    if thread_count() < 2 {
        return Err(Skip("the node has one processor".into()).into());
    }
    let cri = bench.cri()?;
    let limits = |cpu_quota: i64| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota,
        memory_limit_in_bytes: 64 * MIB,
        ..Default::default()
    };
    let cgroup = PodCgroup::make(&bench.id())?;
    cgroup.limit("memory.max", &(400 * MIB).to_string())?;
    cgroup.limit("cpu.max", "200000 100000")?;
    let pod = Pod::run(bench, &cri, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.cgroup_parent = cgroup.name.clone();
        linux.resources = Some(limits(50_000));
    })?;
    let first = pod.start_config(&cri, &limited(&pod, &["sleep", "1000"], limits(50_000)))?;
    let processors = || shown(&cri, &first, "nproc");
    let at_first = processors()?;
    ensure!(at_first == "1", "half a processor: {at_first}");

    let busy = limited(&pod, &["sh", "-c", "while :; do :; done"], limits(150_000));
    let busy = pod.start_config(&cri, &busy)?;
    let with_second = processors()?;
    ensure!(with_second == "2", "two processors: {with_second}");
    // Both do work.
    let script = "grep '^cpu1 ' /proc/stat | cut -d' ' -f2";
    let worked = || -> Result<u64> { Ok(shown(&cri, &first, script)?.parse()?) };
    let before = worked()?;
    for _ in 0..2 {
        shown(
            &cri,
            &first,
            "taskset 2 sh -c 'for i in $(seq 20000); do :; done'",
        )?;
    }
    ensure!(worked()? > before, "cpu1 did nothing: {before} ticks");

    cri.stop(&busy, 0)?;
    cri.remove(&busy)?;
    eventually("one processor less", bench.seconds(20), || {
        Ok((processors()? == "1").then_some(()))
    })?;
    pod.remove(&cri)
}

/// A limit that the machine can't hold is refused, and the pod goes on.
fn beyond_machine(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let much = || LinuxContainerResources {
        memory_limit_in_bytes: 65_536 * MIB,
        ..Default::default()
    };
    let refused = |outcome: Result<()>| -> Result<()> {
        let said = outcome.err().map(|error| format!("{error:#}"));
        let said = said.context("64 GiB fit in a machine of a pod without limits")?;
        ensure!(
            said.contains("68719476736") && said.contains("machine"),
            "{said}"
        );
        Ok(())
    };
    refused(cri.update(&container, much()))?;
    let seen = shown(&cri, &container, "cat /sys/fs/cgroup/memory.max")?;
    ensure!(seen == "max", "{seen}");
    let config = limited(&pod, &["true"], much());
    let started = pod.start_config(&cri, &config);
    refused(started.map(drop))?;
    let next = pod.start(&cri, &["echo", "works"])?;
    pod.await_log(&cri, &next, "works")?;
    pod.remove(&cri)
}
