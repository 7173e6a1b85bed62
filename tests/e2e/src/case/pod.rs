//! CRI pods: life cycle, shared namespaces, logs, statistics, restart.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, case};
use crate::cri::api::{
    ContainerState, DnsConfig, KeyValue, LinuxContainerResources, Mount, NamespaceMode,
    PodSandboxState,
};
use crate::pod::Pod;
use crate::pod_cgroup::PodCgroup;
use crate::process::eventually;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("pod/life-cycle", 40, life_cycle),
    case("pod/localhost", 40, localhost),
    case("pod/shared-namespaces", 40, shared_namespaces),
    case("pod/dns-and-hostname", 40, dns_and_hostname),
    case("pod/exec-sync", 40, exec_sync),
    case("pod/exec-sync-timeout", 40, exec_sync_timeout),
    case("pod/logs", 40, logs),
    case("pod/restart-container", 60, restart_container),
    case("pod/restart-only-container", 60, restart_only_container),
    case("pod/stop-with-grace", 60, stop_with_grace),
    case("pod/stop-kills-at-last", 60, stop_kills_at_last),
    case("pod/stop-while-running", 40, stop_while_running),
    case("pod/out-of-memory", 60, out_of_memory),
    case("pod/volumes", 40, volumes),
    case("pod/statistics", 60, statistics),
    case("pod/failed-start", 40, failed_start),
];

/// A pod and a container through all their states.
pub fn life_cycle(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let status = cri.pod_status(&pod.id)?;
    ensure!(
        status.state() == PodSandboxState::SandboxReady,
        "{status:?}"
    );
    ensure!(status.runtime_handler == bench.runtime.name(), "{status:?}");
    ensure!(
        status.network.is_some_and(|network| !network.ip.is_empty()),
        "no address"
    );

    let config = pod.container(&["sh", "-c", "echo up; sleep 1000"]);
    let container = cri.create(&pod.id, &config, &pod.config)?;
    ensure!(cri.container_status(&container)?.state() == ContainerState::ContainerCreated);
    cri.start(&container)?;
    let running = cri.container_status(&container)?;
    ensure!(
        running.state() == ContainerState::ContainerRunning && running.started_at > 0,
        "{running:?}"
    );
    pod.await_log(&cri, &container, "up")?;
    let listed = cri.containers(&pod.id)?;
    ensure!(
        listed.len() == 1 && listed[0].state() == ContainerState::ContainerRunning,
        "{listed:?}"
    );

    cri.stop(&container, 0)?;
    let stopped = cri.container_status(&container)?;
    ensure!(
        stopped.state() == ContainerState::ContainerExited && stopped.exit_code == 137,
        "{stopped:?}"
    );
    ensure!(stopped.finished_at >= stopped.started_at, "{stopped:?}");
    cri.remove(&container)?;
    ensure!(cri.containers(&pod.id)?.is_empty());

    cri.stop_pod(&pod.id)?;
    ensure!(cri.pod_status(&pod.id)?.state() == PodSandboxState::SandboxNotready);
    // Both are idempotent.
    cri.stop_pod(&pod.id)?;
    cri.remove_pod(&pod.id)?;
    cri.remove_pod(&pod.id)?;
    ensure!(!cri.pods(&[])?.iter().any(|other| other.id == pod.id));
    Ok(())
}

fn localhost(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    for (host, port) in [("127.0.0.1", 7001), ("[::1]", 7002)] {
        let address = format!("{host}:{port}");
        let server = pod.start(&cri, &["probe", "echo", &address])?;
        pod.await_log(&cri, &server, "listening")?;
        let client = pod.start(&cri, &["probe", "fetch", &address, "over localhost"])?;
        let status = pod.await_exit(&cri, &client)?;
        let log = pod.await_log(&cri, &client, "over localhost")?;
        ensure!(status.exit_code == 0, "{status:?} {log}");
    }
    pod.remove(&cri)
}

fn shared_namespaces(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let first = pod.start(&cri, &["sleep", "1001"])?;
    let second = pod.start(&cri, &["sleep", "1002"])?;
    let run =
        |container: &str, script: &str| cri.exec_sync(container, &["sh", "-c", script], 10)?.ok();
    for kind in ["net", "ipc", "uts"] {
        let script = format!("readlink /proc/self/ns/{kind}");
        ensure!(
            run(&first, &script)? == run(&second, &script)?,
            "{kind} namespaces differ"
        );
    }
    for kind in ["mnt", "pid"] {
        let script = format!("readlink /proc/self/ns/{kind}");
        ensure!(
            run(&first, &script)? != run(&second, &script)?,
            "{kind} namespace is shared"
        );
    }
    // /dev/shm belongs to the pod.
    run(&first, "echo shared > /dev/shm/file")?;
    ensure!(run(&second, "cat /dev/shm/file")? == "shared");
    ensure!(
        run(&second, "ps | grep -c '[s]leep 1001' || true")? == "0",
        "sees the other's processes"
    );
    pod.remove(&cri)?;

    // shareProcessNamespace.
    let pod = Pod::run(bench, &cri, |config| {
        let context = config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        context.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
    })?;
    let in_pod = |command: &[&str]| {
        let mut config = pod.container(command);
        let context = config
            .linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default();
        context.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
        pod.start_config(&cri, &config)
    };
    in_pod(&["sleep", "1003"])?;
    let second = in_pod(&["sleep", "1004"])?;
    let seen = cri.exec_sync(&second, &["ps"], 10)?.ok()?;
    ensure!(
        seen.contains("sleep 1003") && seen.contains("sleep 1004"),
        "{seen}"
    );
    pod.remove(&cri)
}

fn dns_and_hostname(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |config| {
        config.hostname = "named-pod".into();
        config.dns_config = Some(DnsConfig {
            servers: vec!["10.9.8.7".into(), "fd00::53".into()],
            searches: vec!["one.test".into(), "two.test".into()],
            options: vec!["ndots:3".into()],
        });
    })?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let run = |script: &str| cri.exec_sync(&container, &["sh", "-c", script], 10)?.ok();
    ensure!(
        run("hostname; cat /etc/hostname; echo $HOSTNAME")? == "named-pod\nnamed-pod\nnamed-pod"
    );
    let resolver = run("cat /etc/resolv.conf")?;
    for line in [
        "nameserver 10.9.8.7",
        "nameserver fd00::53",
        "search one.test two.test",
        "options ndots:3",
    ] {
        ensure!(resolver.lines().any(|seen| seen == line), "{resolver}");
    }
    ensure!(run("cat /etc/hosts")?.contains("localhost"));
    pod.remove(&cri)
}

fn exec_sync(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let mut config = pod.container(&["sleep", "1000"]);
    config.envs = vec![KeyValue {
        key: "GREETING".into(),
        value: "hei".into(),
    }];
    config.working_dir = "/tmp".into();
    let container = pod.start_config(&cri, &config)?;
    let done = cri.exec_sync(
        &container,
        &["sh", "-c", "echo $GREETING; pwd; echo no >&2; exit 42"],
        10,
    )?;
    ensure!(
        done.stdout == "hei\n/tmp\n" && done.stderr == "no\n" && done.code == 42,
        "{done:?}"
    );
    let much = cri
        .exec_sync(
            &container,
            &["sh", "-c", "probe pattern 300000 | od -An -v -tx1 | wc -l"],
            20,
        )?
        .ok()?;
    ensure!(much == "18750", "{much}");
    let begun = Instant::now();
    let missing = cri.exec_sync(&container, &["no-such-command"], 10);
    ensure!(missing.is_err_and(|error| format!("{error:#}").contains("no-such-command")));
    ensure!(
        begun.elapsed() < bench.seconds(2),
        "answered after {:?}",
        begun.elapsed()
    );
    pod.remove(&cri)
}

fn exec_sync_timeout(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let begun = Instant::now();
    let late = cri.exec_sync(&container, &["sleep", "77"], 2);
    let took = begun.elapsed();
    ensure!(late.is_err(), "{late:?}");
    ensure!(
        took >= Duration::from_secs(2) && took < bench.seconds(8),
        "answered after {took:?}"
    );
    eventually("the late process is gone", bench.seconds(5), || {
        let list = cri.exec_sync(&container, &["ps"], 10)?.ok()?;
        Ok((!list.contains("sleep 77")).then_some(()))
    })?;
    pod.remove(&cri)
}

fn logs(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let script = "echo first; echo wrong >&2; printf 'no newline'; sleep 0.3; \
                  while ! [ -e /tmp/go ]; do sleep 0.1; done; echo; echo after";
    let container = pod.start(&cri, &["sh", "-c", script])?;
    let text = pod.await_log(&cri, &container, "stderr F wrong")?;
    ensure!(text.contains("stdout F first"), "{text}");
    // Rotation as the kubelet does it.
    let file = pod.log_file(&cri, &container)?;
    fs::rename(&file, file.with_extension("rotated"))?;
    cri.reopen_log(&container)?;
    cri.exec_sync(&container, &["touch", "/tmp/go"], 10)?.ok()?;
    let after = pod.await_log(&cri, &container, "stdout F after")?;
    ensure!(!after.contains("first"), "{after}");
    pod.await_exit(&cri, &container)?;

    // Output written just before the end, and lines longer than the log's.
    let last = pod.start(
        &cri,
        &[
            "sh",
            "-c",
            "probe pattern 40000 | od -An -v -tx1 | tr -d '\\n'; echo end",
        ],
    )?;
    let status = pod.await_exit(&cri, &last)?;
    ensure!(status.exit_code == 0, "{status:?}");
    let text = pod.await_log(&cri, &last, "end\n")?;
    let line: String = text
        .lines()
        .filter_map(|line| line.splitn(4, ' ').nth(3))
        .collect();
    ensure!(
        line.len() == 120_000 + 3 && text.contains(" stdout P "),
        "{} characters",
        line.len()
    );
    pod.remove(&cri)
}

/// What the kubelet does to a container that has ended: it makes another.
fn restart(bench: &Bench, with_sibling: bool) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let sibling = with_sibling
        .then(|| pod.start(&cri, &["sleep", "1000"]))
        .transpose()?;
    let mut config = pod.container(&[
        "sh",
        "-c",
        "ls /tmp; echo once > /tmp/file; hostname; exit 3",
    ]);
    for attempt in 0..3 {
        if let Some(metadata) = &mut config.metadata {
            metadata.attempt = attempt;
        }
        config.log_path = format!("{attempt}.log");
        let container = pod.start_config(&cri, &config)?;
        let status = pod.await_exit(&cri, &container)?;
        ensure!(status.exit_code == 3, "{status:?}");
        let log = pod.await_log(&cri, &container, "a-pod")?;
        ensure!(
            !log.contains("file"),
            "attempt {attempt} sees the last one's files: {log}"
        );
        // A pod without a running container stays ready.
        thread::sleep(Duration::from_secs(1));
        ensure!(
            cri.pod_status(&pod.id)?.state() == PodSandboxState::SandboxReady,
            "the pod went away"
        );
        cri.remove(&container)?;
    }
    if let Some(sibling) = sibling {
        ensure!(cri.container_status(&sibling)?.state() == ContainerState::ContainerRunning);
        cri.exec_sync(&sibling, &["true"], 10)?.ok()?;
    }
    pod.remove(&cri)
}

fn restart_container(bench: &Bench) -> Result<()> {
    restart(bench, true)
}

fn restart_only_container(bench: &Bench) -> Result<()> {
    restart(bench, false)
}

fn stop_with_grace(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let script = "trap 'echo stopping; sleep 1; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let container = pod.start(&cri, &["sh", "-c", script])?;
    pod.await_log(&cri, &container, "up")?;
    let begun = Instant::now();
    cri.stop(&container, 20)?;
    let took = begun.elapsed();
    let status = cri.container_status(&container)?;
    ensure!(
        status.state() == ContainerState::ContainerExited && status.exit_code == 5,
        "{status:?}"
    );
    ensure!(
        took >= Duration::from_millis(900) && took < bench.seconds(10),
        "took {took:?}"
    );
    pod.await_log(&cri, &container, "stopping")?;
    pod.remove(&cri)
}

fn stop_kills_at_last(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(
        &cri,
        &[
            "sh",
            "-c",
            "trap '' TERM; echo up; while :; do sleep 0.1; done",
        ],
    )?;
    pod.await_log(&cri, &container, "up")?;
    let begun = Instant::now();
    cri.stop(&container, 2)?;
    let took = begun.elapsed();
    let status = cri.container_status(&container)?;
    ensure!(
        status.state() == ContainerState::ContainerExited && status.exit_code == 137,
        "{status:?}"
    );
    ensure!(
        took >= Duration::from_secs(2) && took < bench.seconds(6),
        "took {took:?}"
    );
    pod.remove(&cri)
}

fn stop_while_running(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    pod.start(&cri, &["sleep", "1000"])?;
    let created = pod.container(&["true"]);
    cri.create(&pod.id, &created, &pod.config)?;
    pod.start(&cri, &["sh", "-c", "while :; do :; done"])?;
    pod.remove(&cri)?;
    ensure!(cri.containers(&pod.id)?.is_empty());
    Ok(())
}

fn out_of_memory(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let sibling = pod.start(&cri, &["sleep", "1000"])?;
    let mut config = pod.container(&["probe", "eat", "200"]);
    config.linux.get_or_insert_default().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    });
    let container = pod.start_config(&cri, &config)?;
    let status = pod.await_exit(&cri, &container)?;
    ensure!(
        status.exit_code == 137 && status.reason == "OOMKilled",
        "{status:?}"
    );
    cri.exec_sync(&sibling, &["true"], 10)?.ok()?;
    pod.remove(&cri)
}

fn volumes(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let (shared, settings) = (
        bench.folder().join("shared"),
        bench.folder().join("settings"),
    );
    fs::create_dir_all(&shared)?;
    fs::create_dir_all(&settings)?;
    fs::write(settings.join("key"), "one")?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let with_volumes = |command: &[&str]| {
        let mut config = pod.container(command);
        let mount = |from: &PathBuf, to: &str, readonly| Mount {
            container_path: to.into(),
            host_path: from.display().to_string(),
            readonly,
            ..Default::default()
        };
        config.mounts = vec![
            mount(&shared, "/shared", false),
            mount(&settings, "/settings", true),
        ];
        pod.start_config(&cri, &config)
    };
    let (first, second) = (
        with_volumes(&["sleep", "1001"])?,
        with_volumes(&["sleep", "1002"])?,
    );
    let run = |container: &str, script: &str| cri.exec_sync(container, &["sh", "-c", script], 10);
    run(
        &first,
        "echo from first > /shared/file; chmod 600 /shared/file",
    )?
    .ok()?;
    ensure!(run(&second, "cat /shared/file; stat -c %a /shared/file")?.ok()? == "from first\n600");
    ensure!(fs::read_to_string(shared.join("file"))? == "from first\n");
    ensure!(
        run(&first, "cat /settings/key; touch /settings/x")?.code != 0,
        "/settings is writable"
    );
    // An update as the kubelet makes it: a new file renamed over the old.
    fs::write(settings.join("next"), "two")?;
    fs::rename(settings.join("next"), settings.join("key"))?;
    eventually("the update is seen", bench.seconds(5), || {
        Ok((run(&second, "cat /settings/key")?.ok()? == "two").then_some(()))
    })?;
    pod.remove(&cri)
}

fn statistics(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    // The kubelet makes a cgroup for the pod; containerd takes its figures there.
    let parent = PodCgroup::make(&bench.id())?;
    let pod = Pod::run(bench, &cri, |config| {
        config.linux.get_or_insert_default().cgroup_parent = parent.name.clone();
    })?;
    let container = pod.start(&cri, &["sh", "-c", "probe eat 24 & while :; do :; done"])?;
    let cpu = |stats: &crate::cri::api::ContainerStats| {
        stats
            .cpu
            .as_ref()
            .and_then(|cpu| cpu.usage_core_nano_seconds)
            .map_or(0, |number| number.value)
    };
    let memory = |stats: &crate::cri::api::ContainerStats| {
        stats
            .memory
            .as_ref()
            .and_then(|memory| memory.working_set_bytes)
            .map_or(0, |number| number.value)
    };
    let first = cri.container_stats(&container)?;
    eventually("CPU time passes", bench.seconds(10), || {
        Ok((cpu(&cri.container_stats(&container)?) > cpu(&first)).then_some(()))
    })?;
    eventually("24 MiB are in use", bench.seconds(15), || {
        Ok((memory(&cri.container_stats(&container)?) > 24 << 20).then_some(()))
    })?;
    let of_pod = cri.pod_stats(&pod.id)?;
    let of_pod = of_pod.linux.context("no figures for the pod")?;
    ensure!(
        of_pod.cpu.is_some() && of_pod.memory.is_some(),
        "{of_pod:?}"
    );
    ensure!(of_pod.containers.len() == 1, "{of_pod:?}");
    pod.remove(&cri)
}

/// A container that can't start leaves the pod as it was.
fn failed_start(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = cri.create(
        &pod.id,
        &pod.container(&["/bin/no-such-command"]),
        &pod.config,
    )?;
    let refused = cri.start(&container);
    let said = refused
        .err()
        .map(|error| format!("{error:#}"))
        .unwrap_or_default();
    ensure!(
        said.contains("/bin/no-such-command") && said.contains("no such file"),
        "{said:?}"
    );
    let status = cri.container_status(&container)?;
    ensure!(
        status.state() == ContainerState::ContainerExited && status.exit_code != 0,
        "{status:?}"
    );
    cri.remove(&container)?;
    let next = pod.start(&cri, &["echo", "works"])?;
    pod.await_log(&cri, &next, "works")?;
    pod.remove(&cri)
}
