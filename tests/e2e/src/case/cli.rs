//! The operator's command, against pods that run.

pub mod bench;
pub mod guest;
pub mod traces;

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Bench, Case, Skip, husk_case};
use crate::node::NAMESPACE;
use crate::pod::Pod;
use crate::process::{self, Finished};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("cli/ps-and-inspect", 40, ps_and_inspect),
    husk_case("cli/kubernetes-name", 40, kubernetes_name),
    husk_case("cli/timeline", 40, timeline),
    husk_case("cli/config", 20, config),
    husk_case("cli/check", 20, check),
    husk_case("cli/install", 30, install),
    husk_case("cli/logs", 30, logs),
    husk_case("cli/metrics-and-bundle", 40, metrics_and_bundle),
    husk_case("cli/events", 40, events),
    husk_case("cli/top", 40, top),
];

const PROGRAM: &str = "/usr/bin/husk";

fn husk(bench: &Bench, words: &[&str]) -> Result<Finished> {
    if !fs::exists(PROGRAM)? {
        bail!(Skip(format!("no {PROGRAM}")));
    }
    let mut command = Command::new(PROGRAM);
    process::run(command.args(words), bench.seconds(10))
}

fn json(bench: &Bench, words: &[&str]) -> Result<Value> {
    let words = [&["--json"], words].concat();
    let done = husk(bench, &words)?.ok()?;
    serde_json::from_str(&done.out()).with_context(|| done.tail())
}

/// What `husk ps` says of a pod.
fn listed(bench: &Bench, id: &str) -> Result<Option<Value>> {
    let pods = json(bench, &["ps"])?;
    let pods = pods.as_array().context("no list")?;
    Ok(pods.iter().find(|pod| pod["id"] == id).cloned())
}

fn ps_and_inspect(bench: &Bench) -> Result<()> {
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?.ok()?;
    let pod = listed(bench, &id)?.with_context(|| format!("husk ps has no {id}"))?;
    ensure!(pod["status"] == "running", "{pod}");
    ensure!(pod["namespace"] == NAMESPACE, "{pod}");
    ensure!(pod["age_seconds"].as_u64().is_some(), "{pod}");

    let seen = json(bench, &["inspect", &id])?;
    let machine = &seen["machine"];
    // As `docs/differences.md` says of a container without limits.
    ensure!(
        machine["memory_mib"] == 512 && machine["vcpus"] == 1,
        "{machine}"
    );
    ensure!(
        machine["shim_version"] == machine["agent_version"],
        "{machine}"
    );
    let kernel = bench.ctr.exec(&[], &id, "uname", &["uname", "-r"])?.ok()?;
    ensure!(
        machine["kernel_release"] == kernel.out().trim(),
        "{machine} {}",
        kernel.out()
    );
    let memory = &seen["memory"];
    for part in ["guest_kib", "vmm_kib", "shim_kib", "file_server_kib"] {
        ensure!(
            memory[part].as_u64().is_some_and(|kib| kib > 100),
            "{part}: {memory}"
        );
    }
    ensure!(memory["guest_kib"].as_u64() < Some(512 << 10), "{memory}");
    for process in ["shim", "vmm", "file_server"] {
        let pid = &seen["processes"][process]["pid"];
        ensure!(
            fs::exists(format!("/proc/{pid}"))?,
            "{process} {pid}: {seen}"
        );
    }
    let shown = husk(bench, &["inspect", &id])?.ok()?;
    ensure!(shown.out().contains("memory used"), "{}", shown.tail());

    bench.ctr.remove(&id)?;
    ensure!(listed(bench, &id)?.is_none(), "{id} is still listed");
    husk(bench, &["inspect", &id])?.expect_code(3)?;
    Ok(())
}

fn kubernetes_name(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    pod.start(&cri, &["sleep", "1000"])?;
    let metadata = pod.config.metadata.clone().context("no metadata")?;
    let name = format!("{}/{}", metadata.namespace, metadata.name);
    let seen = json(bench, &["inspect", &name])?;
    ensure!(
        seen["id"] == pod.id.as_str() && seen["status"] == "running",
        "{seen}"
    );
    let nics = seen["machine"]["nics"]
        .as_array()
        .context("no interfaces")?;
    ensure!(nics.iter().any(|nic| nic["name"] == "eth0"), "{seen}");
    let list = husk(bench, &["ps"])?.ok()?;
    ensure!(list.out().contains(&name), "{}", list.tail());
    pod.remove(&cri)
}

fn timeline(bench: &Bench) -> Result<()> {
    let id = bench.id();
    let script = ["sh", "-c", "echo begun; exec sleep 1000"];
    bench.ctr.run_detached(&[], &id, &script)?.ok()?;
    let seen = json(bench, &["timeline", &id])?;
    let stages = seen["stages"].as_array().context("no stages")?;
    ensure!(stages.len() >= 6, "{seen}");
    let mut at = 0;
    for stage in stages {
        let (from, to) = (stage["from_ns"].as_u64(), stage["to_ns"].as_u64());
        ensure!(from == Some(at) && to >= from, "{seen}");
        at = to.unwrap_or_default();
    }
    let boot = &stages[3];
    ensure!(
        boot["to_ns"].as_u64() > boot["from_ns"].as_u64(),
        "no time in the guest: {seen}"
    );
    let chart = husk(bench, &["timeline", &id])?.ok()?;
    ensure!(
        chart.out().contains("guest: kernel and agent"),
        "{}",
        chart.tail()
    );
    let drawn = husk(bench, &["timeline", &id, "--svg"])?.ok()?;
    ensure!(
        drawn.out().starts_with("<svg ") && drawn.out().ends_with("</svg>\n"),
        "{}",
        drawn.tail()
    );
    bench.ctr.remove(&id)
}

fn config(bench: &Bench) -> Result<()> {
    let file = bench.folder().join("new.toml");
    fs::write(&file, "boot_timeout_second = 3\n")?;
    let checked = husk(bench, &["config", "--check", &file.display().to_string()])?;
    let checked = checked.expect_code(4)?;
    ensure!(
        checked.out().contains("`boot_timeout_seconds`"),
        "{}",
        checked.tail()
    );
    let seen = json(bench, &["config"])?;
    let keys = seen["keys"].as_array().context("no keys")?;
    let state = keys.iter().find(|key| key["key"] == "state_dir");
    let state = state.context("no state_dir")?;
    ensure!(
        state["value"] == "/run/husk" && state["from"].is_null(),
        "{state}"
    );
    Ok(())
}

fn check(bench: &Bench) -> Result<()> {
    let done = husk(bench, &["check", "--json"])?.ok()?;
    let seen: Value = serde_json::from_str(&done.out()).with_context(|| done.tail())?;
    let findings = seen["findings"].as_array().context("no findings")?;
    for about in ["KVM", "shim", "VMM", "file server", "containerd", "handler"] {
        let found = findings.iter().find(|finding| finding["about"] == about);
        let found = found.with_context(|| format!("nothing about {about}: {seen}"))?;
        ensure!(found["verdict"] == "ok", "{found}");
    }
    // As `abuse/bad-configuration` has it, told before a pod is asked for.
    let file = bench.folder().join("config.toml");
    fs::write(&file, "kernel = '/nowhere/vmlinux'\n")?;
    let mut command = Command::new(PROGRAM);
    let command = command.arg("check").env("HUSK_CONFIG", &file);
    let done = process::run(command, bench.seconds(10))?.expect_code(4)?;
    let told = "PROBLEM  guest kernel: /nowhere/vmlinux";
    ensure!(done.out().contains(told), "{}", done.tail());
    Ok(())
}

const CONTAINERD: &str = "/etc/containerd/config.toml";

/// containerd's configuration for the time of a case; it is not restarted.
struct Kept(String);

impl Kept {
    fn new() -> Result<Self> {
        Ok(Self(fs::read_to_string(CONTAINERD)?))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = fs::write(CONTAINERD, &self.0);
    }
}

/// What containerd makes of its files.
fn dump(bench: &Bench) -> Result<String> {
    let mut command = Command::new("containerd");
    let done = process::run(command.args(["config", "dump"]), bench.seconds(20))?.ok()?;
    Ok(done.out())
}

fn install(bench: &Bench) -> Result<()> {
    let kept = Kept::new()?;
    // containerd 2 tells it in the newer form, whatever its files have.
    let is_new = dump(bench)?.contains("io.containerd.cri.v1.runtime");
    there_and_back(bench, &["runtimes.runc]", "runtimes.husk]"])?;
    if is_new {
        let newer = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\n\
                     conf_dir = '/etc/cni/kept.d'\n";
        fs::write(CONTAINERD, newer)?;
        there_and_back(bench, &["/etc/cni/kept.d"])?;
    }
    drop(kept);
    Ok(())
}

/// containerd sees a handler that was installed, beside all else; then it is as
/// before.
fn there_and_back(bench: &Bench, beside: &[&str]) -> Result<()> {
    let place = ["--for", "containerd", "--handler", "second", "--no-restart"];
    let (before, text) = (dump(bench)?, fs::read_to_string(CONTAINERD)?);
    let installed = husk(bench, &[&["install"], &place[..]].concat())?.ok()?;
    let seen = dump(bench);
    husk(bench, &[&["uninstall"], &place[..]].concat())?.ok()?;
    let seen = seen?;
    for part in beside.iter().chain(&["runtimes.second]"]) {
        ensure!(
            seen.contains(part),
            "no {part} in:\n{seen}\n{}",
            installed.tail()
        );
    }
    ensure!(
        fs::read_to_string(CONTAINERD)? == text,
        "{CONTAINERD} is another"
    );
    let after = dump(bench)?;
    // In whichever order it tells them.
    let [was, is] = [&before, &after].map(|text| {
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        lines
    });
    ensure!(
        was == is,
        "containerd sees something else than before: {before}\nis now {after}"
    );
    Ok(())
}

/// Where the lab's containerd logs; elsewhere there is a journal.
const LOG: &str = "/var/log/containerd.log";

fn logs(bench: &Bench) -> Result<()> {
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?.ok()?;
    bench.ctr.remove(&id)?;
    let mut words = vec!["logs", &id];
    if fs::exists(LOG)? {
        words.extend(["--file", LOG]);
    }
    // It is gone, and what it logged is not.
    let told = husk(bench, &words)?.ok()?;
    for part in [
        "msg=\"shim serves\"",
        "msg=\"machine is ready\"",
        "console=",
    ] {
        ensure!(told.out().contains(part), "no {part} in: {}", told.tail());
    }
    let mark = format!("pod=\"{id}\"");
    ensure!(
        told.out().lines().all(|line| line.contains(&mark)),
        "{}",
        told.tail()
    );
    words[1] = "no-such-pod";
    husk(bench, &words)?.expect_code(3)?;
    Ok(())
}

fn metrics_and_bundle(bench: &Bench) -> Result<()> {
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?.ok()?;
    let page = husk(bench, &["metrics"])?.ok()?.out();
    let of_pod: Vec<_> = page.lines().filter(|line| line.contains(&id)).collect();
    for part in [
        "used_bytes{",
        "size_bytes{",
        "part=\"guest\"",
        "stage=\"guest\"",
    ] {
        ensure!(
            of_pod.iter().any(|line| line.contains(part)),
            "no {part}: {page}"
        );
    }
    let value = |line: &&str| {
        line.rsplit(' ')
            .next()
            .is_some_and(|n| n.parse::<f64>().is_ok())
    };
    ensure!(of_pod.iter().all(value), "{page}");
    let file = bench.folder().join("bundle.tar");
    let words = ["support-bundle", "--output", &file.display().to_string()];
    husk(bench, &words)?.ok()?;
    let mut archive = tar::Archive::new(fs::File::open(&file)?);
    let mut names = Vec::new();
    for entry in archive.entries()? {
        names.push(entry?.path()?.display().to_string());
    }
    let wanted = format!("{id}/inspect.json");
    ensure!(
        names.iter().any(|name| name.ends_with(&wanted)),
        "{names:?}"
    );
    bench.ctr.remove(&id)
}

/// What is told of a pod that comes and goes, in this order.
const LIFE: [&str; 5] = [
    "added",
    "running",
    "container-created",
    "container-started",
    "removed",
];

fn events(bench: &Bench) -> Result<()> {
    let id = bench.id();
    if !fs::exists(PROGRAM)? {
        bail!(Skip(format!("no {PROGRAM}")));
    }
    let mut command = Command::new(PROGRAM);
    let mut following = process::start(command.args(["--json", "events"]))?;
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?.ok()?;
    following.await_output("\"event\":\"container-started\"", bench.seconds(10))?;
    bench.ctr.remove(&id)?;
    following.await_output("\"event\":\"removed\"", bench.seconds(10))?;
    following.signal(Signal::SIGTERM)?;
    let told = following.finish(bench.seconds(10))?;
    let mut words = Vec::new();
    for line in told.out().lines() {
        let event: Value = serde_json::from_str(line).with_context(|| told.tail())?;
        if event["id"] == id.as_str() {
            words.push(event["event"].as_str().unwrap_or_default().to_owned());
        }
    }
    // The end of the machine may be seen before nothing is left of the pod.
    words.retain(|word| LIFE.contains(&word.as_str()));
    ensure!(words == LIFE, "{words:?}: {}", told.tail());
    Ok(())
}

fn top(bench: &Bench) -> Result<()> {
    let id = bench.id();
    let script = ["sh", "-c", "while :; do :; done"];
    bench.ctr.run_detached(&[], &id, &script)?.ok()?;
    let seen = json(bench, &["top", "--interval", "2", "--count", "1"])?;
    let pods = seen["pods"].as_array().context("no pods")?;
    let pod = pods.iter().find(|pod| pod["id"] == id.as_str());
    let pod = pod.with_context(|| format!("no {id}: {seen}"))?;
    // It has one processor, and other work is done beside it.
    ensure!(
        pod["cpu_percent"]
            .as_f64()
            .is_some_and(|cpu| (10.0..150.0).contains(&cpu)),
        "{pod}"
    );
    for key in [
        "used_kib",
        "read_bytes_per_second",
        "written_bytes_per_second",
    ] {
        ensure!(
            pod[key].as_f64().is_some_and(|value| value >= 0.0),
            "{key}: {pod}"
        );
    }
    if fs::exists("/sys/kernel/debug/kvm")? {
        ensure!(pod["exits_per_second"].as_f64() > Some(0.0), "{pod}");
    }
    let shown = husk(bench, &["top", "-i", "1", "-n", "1"])?.ok()?;
    ensure!(shown.out().contains("  pods: "), "{}", shown.tail());
    bench.ctr.remove(&id)
}
