//! `ctr task`: signals, exec, statistics, pause and resume, processes.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{Bench, Case, case};
use crate::node::Runtime;
use crate::process::{self, eventually};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("task/signals", 40, signals),
    case("task/kill-hard", 30, kill_hard),
    case("task/exec", 40, exec),
    case("task/exec-many", 60, exec_many),
    case("task/exec-outlived", 30, exec_outlived),
    case("task/metrics", 30, metrics),
    case("task/pause-resume", 40, pause_resume),
    case("task/ps", 30, ps),
    case("task/create-start-delete", 30, create_start_delete),
    case("task/update-limits", 30, update_limits),
    case("task/events", 30, events),
];

fn signals(bench: &Bench) -> Result<()> {
    let id = bench.id();
    let script = "trap 'echo got term; exit 7' TERM; trap 'echo got usr1' USR1; echo ready; \
                  while :; do sleep 0.1; done";
    let wait = bench.ctr.deadline();
    let mut running = bench.ctr.start(&[], &id, &["sh", "-c", script])?;
    running.await_output("ready", wait)?;
    bench
        .ctr
        .call(&["task", "kill", "--signal", "SIGUSR1", &id])?
        .ok()?;
    running.await_output("got usr1", wait)?;
    bench.ctr.call(&["task", "kill", &id])?.ok()?;
    let done = running.wait(wait)?.expect_code(7)?;
    ensure!(
        done.out() == "ready\ngot usr1\ngot term\n",
        "{}",
        done.tail()
    );
    // ctr forwards its own signals to the container.
    let mut running = bench.ctr.start(&[], &bench.id(), &["sh", "-c", script])?;
    running.await_output("ready", wait)?;
    // It begins to do so some time after it has started the container.
    thread::sleep(bench.seconds(1) / 2);
    running.signal(Signal::SIGTERM)?;
    let done = running.wait(wait)?.expect_code(7)?;
    ensure!(done.out() == "ready\ngot term\n", "{}", done.tail());
    Ok(())
}

fn kill_hard(bench: &Bench) -> Result<()> {
    // As PID 1 it ignores SIGTERM by default; SIGKILL can't be ignored.
    let id = bench.id();
    let mut running = bench.ctr.start(&[], &id, &["sleep", "1000"])?;
    bench.ctr.await_state(&id, "RUNNING", bench.seconds(10))?;
    bench.ctr.call(&["task", "kill", &id])?.ok()?;
    thread::sleep(Duration::from_secs(1));
    ensure!(
        running.is_running()?,
        "PID 1 without a handler died by SIGTERM"
    );
    bench
        .ctr
        .call(&["task", "kill", "--signal", "SIGKILL", &id])?
        .ok()?;
    running.wait(bench.ctr.deadline())?.expect_code(137)?;
    Ok(())
}

fn exec(bench: &Bench) -> Result<()> {
    let (id, ctr) = (bench.id(), &bench.ctr);
    ctr.run_detached(
        &["--env", "SPEC=yes"],
        &id,
        &["sh", "-c", "echo kept > /tmp/file; sleep 1000"],
    )?;
    let done = ctr.exec(
        &["--cwd", "/tmp"],
        &id,
        "e1",
        &[
            "sh",
            "-c",
            "pwd; echo $SPEC; until [ -s file ]; do sleep 0.1; done; cat file; echo no >&2; exit 4",
        ],
    )?;
    let done = done.expect_code(4)?;
    ensure!(
        done.out() == "/tmp\nyes\nkept\n" && done.err() == "no\n",
        "{}",
        done.tail()
    );
    let user = ctr
        .exec(&["--user", "1000:1000"], &id, "e2", &["id", "-u"])?
        .ok()?;
    ensure!(user.out() == "1000\n", "{}", user.tail());
    let mut with_input = process::start(&mut ctr.exec_command(&[], &id, "e3", &["sha256sum"]))?;
    with_input.write(b"abc")?;
    let sum = with_input.finish(ctr.deadline())?.ok()?;
    ensure!(sum.out().starts_with("ba7816bf8f01cfea"), "{}", sum.tail());
    // The same id once more: the first is deleted.
    ctr.exec(&[], &id, "e1", &["sh", "-c", "kill -9 $$"])?
        .expect_code(137)?;
    ctr.remove(&id)
}

fn exec_many(bench: &Bench) -> Result<()> {
    let (id, ctr) = (bench.id(), &bench.ctr);
    ctr.run_detached(&[], &id, &["sleep", "1000"])?;
    let mut running = Vec::new();
    for index in 0..8 {
        let script = format!("sleep 0.2; echo {index}; exit {index}");
        running.push(process::start(&mut ctr.exec_command(
            &[],
            &id,
            &format!("e{index}"),
            &["sh", "-c", &script],
        ))?);
    }
    for (index, running) in running.into_iter().enumerate() {
        let done = running
            .finish(bench.seconds(40))?
            .expect_code(i32::try_from(index)?)?;
        ensure!(done.out() == format!("{index}\n"), "{}", done.tail());
    }
    ctr.remove(&id)
}

/// An exec'd process dies with its container, and its client is told.
fn exec_outlived(bench: &Bench) -> Result<()> {
    let (id, ctr) = (bench.id(), &bench.ctr);
    ctr.run_detached(&[], &id, &["sleep", "1000"])?;
    let script = "echo up; sleep 1000";
    let mut command = ctr.exec_command(&[], &id, "long", &["sh", "-c", script]);
    let mut exec = process::start(&mut command)?;
    exec.await_output("up", ctr.deadline())?;
    ctr.call(&["task", "kill", "--signal", "SIGKILL", &id])?
        .ok()?;
    let done = exec.wait(ctr.deadline())?.expect_code(137)?;
    ensure!(done.out() == "up\n", "{}", done.tail());
    ctr.await_state(&id, "STOPPED", bench.seconds(5))?;
    ctr.call(&["task", "delete", &id])?;
    ctr.call(&["container", "delete", &id])?.ok()?;
    Ok(())
}

/// Numbers by name from `ctr task metrics --format json`, of cgroup v1 or v2.
fn measured(bench: &Bench, id: &str) -> Result<serde_json::Value> {
    let shown = bench
        .ctr
        .call(&["task", "metrics", "--format", "json", id])?
        .ok()?;
    serde_json::from_slice(&shown.stdout).with_context(|| shown.tail())
}

fn number(value: &serde_json::Value, paths: &[&str]) -> Result<u64> {
    paths
        .iter()
        .find_map(|path| {
            let found = value.pointer(path)?;
            found.as_u64().or_else(|| found.as_str()?.parse().ok())
        })
        .with_context(|| format!("none of {paths:?} in {value}"))
}

fn metrics(bench: &Bench) -> Result<()> {
    let id = bench.id();
    bench.ctr.run_detached(
        &[],
        &id,
        &["sh", "-c", "probe eat 24 & while :; do :; done"],
    )?;
    let cpu = [
        "/cpu/usage_usec",
        "/cpu/usageUsec",
        "/cpu/usage/total",
        "/CPU/UsageUsec",
    ];
    let memory = ["/memory/usage", "/memory/usage/usage", "/Memory/Usage"];
    let pids = ["/pids/current", "/Pids/Current"];
    let first = measured(bench, &id)?;
    let later = eventually("CPU time passes", bench.seconds(10), || {
        let now = measured(bench, &id)?;
        Ok((number(&now, &cpu)? > number(&first, &cpu)?).then_some(now))
    })?;
    ensure!(number(&later, &pids)? >= 1, "{later}");
    eventually("24 MiB are in use", bench.seconds(15), || {
        Ok((number(&measured(bench, &id)?, &memory)? > 24 << 20).then_some(()))
    })?;
    bench.ctr.remove(&id)
}

fn pause_resume(bench: &Bench) -> Result<()> {
    let (id, ctr, folder) = (bench.id(), &bench.ctr, bench.folder());
    let mount = format!(
        "type=bind,src={},dst=/mnt,options=rbind:rw",
        folder.display()
    );
    let script = "i=0; while :; do i=$((i+1)); echo $i > /mnt/count; sleep 0.1; done";
    ctr.run_detached(&["--mount", &mount], &id, &["sh", "-c", script])?;
    let count = || -> u64 {
        let text = std::fs::read_to_string(folder.join("count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let wait = bench.seconds(10);
    eventually("it counts", wait, || Ok((count() > 1).then_some(())))?;
    ctr.call(&["task", "pause", &id])?.ok()?;
    ctr.await_state(&id, "PAUSED", bench.seconds(2))?;
    let paused_at = count();
    thread::sleep(Duration::from_secs(2));
    ensure!(
        count() <= paused_at + 1,
        "it counted from {paused_at} to {} while paused",
        count()
    );
    ctr.call(&["task", "resume", &id])?.ok()?;
    ctr.await_state(&id, "RUNNING", bench.seconds(2))?;
    eventually("it counts on", wait, || {
        Ok((count() > paused_at + 2).then_some(()))
    })?;
    // A paused one can be killed and removed.
    ctr.call(&["task", "pause", &id])?.ok()?;
    ctr.call(&["task", "resume", &id])?.ok()?;
    ctr.remove(&id)
}

fn ps(bench: &Bench) -> Result<()> {
    let id = bench.id();
    bench
        .ctr
        .run_detached(&[], &id, &["sh", "-c", "sleep 1001 & sleep 1002 & wait"])?;
    let processes = || -> Result<usize> {
        let list = bench.ctr.call(&["task", "ps", &id])?.ok()?.out();
        Ok(list
            .lines()
            .skip(1)
            .filter(|line| !line.trim().is_empty())
            .count())
    };
    // Those in a VM are none of the node's: the machine stands for them.
    let expected = match bench.runtime {
        Runtime::Husk => 1,
        Runtime::Runc => 3,
    };
    eventually("the processes", bench.seconds(5), || {
        Ok((processes()? == expected).then_some(()))
    })?;
    ensure!(bench.ctr.pid(&id)? > 0);
    bench.ctr.remove(&id)
}

/// Each step by itself, as other clients take them.
fn create_start_delete(bench: &Bench) -> Result<()> {
    let (id, ctr) = (bench.id(), &bench.ctr);
    let runtime = bench.runtime.ctr_name();
    ctr.call(&[
        "container",
        "create",
        "--runtime",
        runtime,
        crate::image::BASE,
        &id,
        "sleep",
        "1000",
    ])?
    .ok()?;
    ctr.call(&["task", "start", "--detach", "--null-io", &id])?
        .ok()?;
    ctr.await_state(&id, "RUNNING", bench.seconds(5))?;
    // A running task can't be deleted.
    let refused = ctr.call(&["task", "delete", &id])?;
    ensure!(
        refused.code() != 0 && ctr.state(&id)? == Some("RUNNING"),
        "{}",
        refused.tail()
    );
    ctr.call(&["task", "kill", "--signal", "SIGKILL", &id])?
        .ok()?;
    ctr.await_state(&id, "STOPPED", bench.seconds(5))?;
    ctr.delete_task(&id, 137)?;
    // The container can have another task.
    ctr.call(&["task", "start", "--detach", "--null-io", &id])?
        .ok()?;
    ctr.await_state(&id, "RUNNING", bench.seconds(5))?;
    ctr.remove(&id)
}

fn update_limits(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = crate::pod::Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let resources = crate::cri::api::LinuxContainerResources {
        memory_limit_in_bytes: 48 << 20,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        ..Default::default()
    };
    cri.update(&container, resources)?;
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max 2>/dev/null || \
                  cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    let limits = cri.exec_sync(&container, &["sh", "-c", script], 10)?.ok()?;
    ensure!(limits.starts_with(&(48 << 20).to_string()), "{limits}");
    pod.remove(&cri)
}

/// containerd's clients rely on the order of a task's events.
fn events(bench: &Bench) -> Result<()> {
    let id = bench.id();
    let mut listener = process::start(&mut bench.ctr.command(&["events"]))?;
    // It listens once it shows an event.
    let mut pokes = 0;
    eventually("ctr shows events", bench.seconds(20), || {
        pokes += 1;
        let label = format!("poke={pokes}");
        bench
            .ctr
            .call(&["namespace", "label", crate::node::NAMESPACE, &label])?
            .ok()?;
        let heard = listener.await_output("/namespaces/update", Duration::from_millis(500));
        Ok(heard.is_ok().then_some(()))
    })?;
    bench
        .ctr
        .call(&["namespace", "label", crate::node::NAMESPACE, "poke="])?
        .ok()?;
    let running = bench.ctr.start(&[], &id, &["sleep", "1000"])?;
    bench.ctr.await_state(&id, "RUNNING", bench.seconds(10))?;
    bench.ctr.exec(&[], &id, "e1", &["true"])?.ok()?;
    bench.ctr.call(&["task", "pause", &id])?.ok()?;
    bench.ctr.call(&["task", "resume", &id])?.ok()?;
    bench
        .ctr
        .call(&["task", "kill", "--signal", "SIGKILL", &id])?
        .ok()?;
    running.wait(bench.ctr.deadline())?.expect_code(137)?;
    listener.await_output("/tasks/delete", bench.seconds(5))?;
    listener.signal(Signal::SIGTERM)?;
    let shown = listener.finish(bench.seconds(5))?.out();
    let ours = shown.lines().filter(|line| line.contains(&id));
    let topics: Vec<&str> = ours
        .filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with("/tasks/"))
        })
        .collect();
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(
        topics == expected,
        "{topics:?}, expected {expected:?}\n{shown}"
    );
    Ok(())
}
