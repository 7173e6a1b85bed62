//! A container's life as Kubernetes shapes it: init containers and sidecars,
//! hooks and probes, last words, signals.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Bench, Case, case};
use crate::cri::api::{ContainerConfig, ContainerState, Mount, NamespaceMode, PodSandboxConfig};
use crate::node::Runtime;
use crate::pod::Pod;
use crate::process::eventually;

pub mod many;
pub mod streams;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("lifecycle/init-sidecar-app", 60, init_sidecar_app),
    case("lifecycle/debug-target", 40, debug_target),
    case("lifecycle/hooks-and-probes", 60, hooks_and_probes),
    case("lifecycle/oci-hooks", 40, oci_hooks),
    case("lifecycle/termination-message", 40, termination_message),
    case("lifecycle/kill-all", 30, kill_all),
    case("lifecycle/exit-signals", 60, exit_signals),
    case("lifecycle/shared-pids-signals", 40, shared_pids_signals),
];

/// Containers of a pod see each other's processes.
fn set_pids(config: &mut ContainerConfig, mode: NamespaceMode, target: &str) {
    let context = config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    let options = context.namespace_options.get_or_insert_default();
    options.pid = mode.into();
    options.target_id = target.to_owned();
}

/// `shareProcessNamespace` for a whole pod.
fn share_pids(config: &mut PodSandboxConfig) {
    let context = config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    context.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
}

/// What the kubelet does with `initContainers`: each runs to its end before the
/// next is made, a sidecar only until it is up.
fn init_sidecar_app(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let shared = bench.folder().join("shared");
    fs::create_dir_all(&shared)?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let start = |script: &str| {
        let mut config = pod.container(&["sh", "-c", script]);
        config.mounts = vec![Mount {
            container_path: "/shared".into(),
            host_path: shared.display().to_string(),
            ..Default::default()
        }];
        pod.start_config(&cri, &config)
    };
    for script in [
        "echo one > /shared/one",
        "cat /shared/one && echo two > /shared/two",
    ] {
        let init = start(script)?;
        let status = pod.await_exit(&cri, &init)?;
        ensure!(
            status.exit_code == 0 && status.reason == "Completed",
            "{script}: {status:?}"
        );
    }
    let sidecar = start(
        "trap 'echo over > /shared/sidecar; exit 0' TERM; echo up; while :; do sleep 0.1; done",
    )?;
    pod.await_log(&cri, &sidecar, "up")?;
    let app = start("cat /shared/two; exec sleep 1000")?;
    pod.await_log(&cri, &app, "two")?;
    // A pod that ends takes its sidecars down after its containers.
    cri.stop(&app, 0)?;
    let status = cri.container_status(&sidecar)?;
    ensure!(
        status.state() == ContainerState::ContainerRunning,
        "the sidecar ended with the container: {status:?}"
    );
    cri.stop(&sidecar, 20)?;
    let status = cri.container_status(&sidecar)?;
    ensure!(status.exit_code == 0, "{status:?}");
    let said = fs::read_to_string(shared.join("sidecar"))?;
    ensure!(said == "over\n", "{said:?}");
    pod.remove(&cri)
}

/// `kubectl debug --target`: an ephemeral container among the processes of
/// another, and of no more.
fn debug_target(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let target = pod.start(
        &cri,
        &["sh", "-c", "echo mine > /tmp/mark; exec sleep 1001"],
    )?;
    pod.start(&cri, &["sleep", "1002"])?;
    let mut config = pod.container(&["sleep", "1003"]);
    set_pids(&mut config, NamespaceMode::Target, &target);
    let debugger = pod.start_config(&cri, &config)?;
    let run = |script: &str| cri.exec_sync(&debugger, &["sh", "-c", script], 10)?.ok();
    eventually("the target is PID 1", bench.seconds(5), || {
        Ok((run("tr '\\0' ' ' < /proc/1/cmdline")? == "sleep 1001").then_some(()))
    })
    .with_context(|| run("ps").unwrap_or_else(|error| format!("{error:#}")))?;
    let seen = run("ps")?;
    ensure!(
        seen.contains("sleep 1003") && !seen.contains("sleep 1002"),
        "{seen}"
    );
    // Its files are those of the target's processes.
    let mark = run("cat /proc/1/root/tmp/mark; ls /tmp")?;
    ensure!(mark == "mine", "{mark}");
    // The debugger's end is not the target's, which a container that is stopped
    // in a PID namespace of its own would be.
    cri.stop(&debugger, 0)?;
    let status = cri.container_status(&target)?;
    ensure!(
        status.state() == ContainerState::ContainerRunning,
        "{status:?}"
    );
    pod.remove(&cri)
}

/// One HTTP request as a probe of the kubelet makes it; the first line of the
/// answer.
fn get(address: SocketAddr, patience: Duration) -> Result<String> {
    let mut connection = TcpStream::connect_timeout(&address, patience)
        .with_context(|| format!("connect to {address}"))?;
    connection.set_read_timeout(Some(patience))?;
    connection.write_all(b"GET /healthz HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

fn hooks_and_probes(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let network = cri.pod_status(&pod.id)?.network.context("no network")?;
    let address =
        |port| -> Result<SocketAddr> { Ok(SocketAddr::new(network.ip.parse::<IpAddr>()?, port)) };
    let wait = bench.seconds(5);
    let script = "trap 'test -e /tmp/pre-stop && exit 9; exit 1' TERM; \
                  until [ -e /tmp/post-start ]; do sleep 0.1; done; echo began; \
                  probe serve 0.0.0.0:8080 /tmp/ready & while :; do sleep 0.1; done";
    let container = pod.start(&cri, &["sh", "-c", script])?;
    let run = |script: &str| cri.exec_sync(&container, &["sh", "-c", script], 10);

    // postStart, as soon as the container is started.
    run("touch /tmp/post-start")?.ok()?;
    pod.await_log(&cri, &container, "began")?;
    pod.await_log(&cri, &container, "listening")?;

    // Each kind of probe, of what is not ready and of what is.
    let unready = run("cat /tmp/ready")?;
    ensure!(unready.code == 1, "{unready:?}");
    let answer = get(address(8080)?, wait)?;
    ensure!(answer.contains(" 503 "), "{answer:?}");
    run("touch /tmp/ready")?.ok()?;
    run("cat /tmp/ready")?.ok()?;
    let answer = get(address(8080)?, wait)?;
    ensure!(answer.contains(" 200 "), "{answer:?}");
    TcpStream::connect_timeout(&address(8080)?, wait).context("tcp probe of an open port")?;
    let begun = Instant::now();
    let closed = TcpStream::connect_timeout(&address(8081)?, wait);
    let kind = closed.map_err(|error| error.kind());
    ensure!(
        matches!(kind, Err(std::io::ErrorKind::ConnectionRefused)),
        "tcp probe of a closed port: {kind:?} after {:?}",
        begun.elapsed()
    );

    // preStop, then the stop itself.
    run("touch /tmp/pre-stop")?.ok()?;
    cri.stop(&container, 20)?;
    let status = cri.container_status(&container)?;
    ensure!(status.exit_code == 9, "{status:?}");
    pod.remove(&cri)
}

/// Programs that the spec wants run: the node's at the turns of the container's
/// life, and one of the container's before its own.
fn oci_hooks(bench: &Bench) -> Result<()> {
    // runc before 1.2 calls a container created that has just been started.
    const TURNS: [(&str, &[&str]); 4] = [
        ("prestart", &["creating"]),
        ("createRuntime", &["creating"]),
        ("poststart", &["running", "created"]),
        ("poststop", &["stopped"]),
    ];
    let shell = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    let file = |turn: &str| bench.folder().join(turn);
    let done = crate::oci::run(bench, &["cat", "/tmp/told"], |spec| {
        for (turn, _) in TURNS {
            spec["hooks"][turn] = shell(&format!("cat > {}", file(turn).display()));
        }
        spec["hooks"]["startContainer"] = shell("/bin/cat > /tmp/told");
    })?
    .ok()?;
    let told: Value = serde_json::from_slice(&done.stdout).with_context(|| done.tail())?;
    ensure!(told["status"] == "created", "startContainer: {told}");
    for (turn, states) in TURNS {
        let text = fs::read(file(turn)).with_context(|| turn.to_owned())?;
        let other: Value = serde_json::from_slice(&text)?;
        ensure!(
            states.iter().any(|state| other["status"] == *state) && other["id"] == told["id"],
            "{turn}: {other}"
        );
    }
    // One that says no.
    for turn in ["createRuntime", "startContainer"] {
        let refused = crate::oci::run(bench, &["echo", "it runs"], |spec| {
            spec["hooks"][turn] = shell("echo not today >&2; exit 3");
        })?;
        ensure!(
            refused.code() != 0 && refused.out().is_empty(),
            "{turn}: {}",
            refused.tail()
        );
        // runc does not tell why a container's own hook ended it.
        let said = refused.err();
        ensure!(
            turn == "startContainer"
                || said.contains("hook")
                    && said.contains("exit status")
                    && said.contains("not today"),
            "{turn}: {said}"
        );
    }
    Ok(())
}

/// The kubelet mounts a file where the container leaves its last words.
fn termination_message(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    for (attempt, script, code) in [
        (0, "printf 'out of ideas' > /dev/termination-log; exit 4", 4),
        // Another attempt has another file; one that is killed keeps what it wrote.
        (
            1,
            "printf killed >> /dev/termination-log; exec sleep 1000",
            137,
        ),
    ] {
        let file = bench.folder().join(format!("message-{attempt}"));
        fs::write(&file, "")?;
        let mut config = pod.container(&["sh", "-c", script]);
        config.mounts = vec![Mount {
            container_path: "/dev/termination-log".into(),
            host_path: file.display().to_string(),
            ..Default::default()
        }];
        let container = pod.start_config(&cri, &config)?;
        let message = || fs::read_to_string(&file).unwrap_or_default();
        eventually("a message", bench.seconds(10), || {
            Ok((!message().is_empty()).then_some(()))
        })?;
        if code == 137 {
            cri.stop(&container, 0)?;
        }
        let status = pod.await_exit(&cri, &container)?;
        ensure!(status.exit_code == code, "{status:?}");
        let expected = if code == 137 {
            "killed"
        } else {
            "out of ideas"
        };
        ensure!(message() == expected, "{:?}", message());
    }
    pod.remove(&cri)
}

fn kill_all(bench: &Bench) -> Result<()> {
    let (id, wait) = (bench.id(), bench.ctr.deadline());
    let script = "for n in 1 2; do \
                    (trap \"echo child $n told\" USR1; echo child $n up; while :; do sleep 0.1; done) & \
                  done; \
                  trap 'echo main told' USR1; echo main up; while :; do sleep 0.1; done";
    let mut running = bench.ctr.start(&[], &id, &["sh", "-c", script])?;
    for who in ["child 1", "child 2", "main"] {
        running.await_output(&format!("{who} up"), wait)?;
    }
    let kill = |signal: &str| {
        bench
            .ctr
            .call(&["task", "kill", "--all", "--signal", signal, &id])?
            .ok()
    };
    kill("SIGUSR1")?;
    running.await_output("main told", wait)?;
    // runc has given up signalling all but the first process, except to kill.
    if bench.runtime == Runtime::Husk {
        running.await_output("child 1 told", wait)?;
        running.await_output("child 2 told", wait)?;
    }
    kill("SIGKILL")?;
    running.wait(wait)?.expect_code(137)?;
    Ok(())
}

/// Every way in which a process ends, by its exit code.
fn exit_signals(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    for code in [2, 126, 127, 128, 200] {
        let script = format!("exit {code}");
        let done = cri.exec_sync(&container, &["sh", "-c", &script], 10)?;
        ensure!(done.code == code, "{done:?}, expected {code}");
    }
    // Hang-up, interrupt, quit, illegal instruction, abort, bus error, division
    // by zero, user 1, segmentation fault, broken pipe, alarm, termination, CPU
    // time, and the first and last of real time.
    for signal in [1, 2, 3, 4, 6, 7, 8, 10, 11, 13, 14, 15, 24, 34, 64] {
        let done = cri.exec_sync(&container, &["probe", "die", &signal.to_string()], 10)?;
        ensure!(
            done.code == 128 + signal,
            "{done:?}, expected {}",
            128 + signal
        );
    }
    // PID 1 dies by what it does itself; what it is sent, it ignores by default.
    let faulty = pod.start(&cri, &["probe", "die", "11"])?;
    let status = pod.await_exit(&cri, &faulty)?;
    ensure!(status.exit_code == 139, "{status:?}");
    let deaf = pod.start(&cri, &["sh", "-c", "kill -TERM 1; kill -KILL 1; exit 6"])?;
    let status = pod.await_exit(&cri, &deaf)?;
    ensure!(status.exit_code == 6, "{status:?}");
    pod.remove(&cri)
}

/// Nobody is PID 1 here but the pod's own process: `SIGTERM` ends who has no
/// handler, and a container's end is that of all its processes.
fn shared_pids_signals(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, share_pids)?;
    let start = |command: &[&str]| {
        let mut config = pod.container(command);
        set_pids(&mut config, NamespaceMode::Pod, "");
        pod.start_config(&cri, &config)
    };
    let plain = start(&["sleep", "1001"])?;
    let parent = start(&["sh", "-c", "sleep 1002 & sleep 1003 & wait"])?;
    let watcher = start(&["sleep", "1004"])?;
    let ps = || cri.exec_sync(&watcher, &["ps"], 10)?.ok();
    eventually("all processes", bench.seconds(5), || {
        Ok(ps()?.contains("sleep 1003").then_some(()))
    })?;
    let begun = Instant::now();
    cri.stop(&plain, 30)?;
    let took = begun.elapsed();
    let status = cri.container_status(&plain)?;
    ensure!(
        status.exit_code == 143 && took < bench.seconds(10),
        "{status:?} after {took:?}"
    );
    cri.stop(&parent, 0)?;
    eventually("its processes are gone", bench.seconds(5), || {
        let seen = ps()?;
        Ok((!seen.contains("sleep 1002") && !seen.contains("sleep 1003")).then_some(()))
    })
    .with_context(|| ps().unwrap_or_default())?;
    ensure!(ps()?.contains("sleep 1004"));
    pod.remove(&cri)
}
