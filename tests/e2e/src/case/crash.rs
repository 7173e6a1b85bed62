//! Parties that are killed: containerd tells the truth within two seconds, and
//! removal cleans everything.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Bench, Case, Skip, case, husk_case};
use crate::clean::pids;
use crate::cri::api::{ContainerState, PodSandboxState};
use crate::footprint::is_shim_of;
use crate::node::Runtime;
use crate::pod::Pod;
use crate::process::{self, eventually};

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("crash/vmm", 40, vmm),
    husk_case("crash/file-server", 40, file_server),
    husk_case("crash/agent", 40, agent),
    case("crash/shim", 40, shim).forgiving(&[], RUNC_SOCKET),
    husk_case("crash/vmm-of-pod", 40, vmm_of_pod),
    case("crash/shim-of-pod", 40, shim_of_pod).forgiving(&[], RUNC_SOCKET),
    husk_case("crash/vmm-during-start", 200, vmm_during_start).forgiving(FIFOS, &[]),
    case("crash/shim-during-start", 200, shim_during_start).forgiving(FIFOS, RUNC_HALF_MADE),
    case("crash/containerd", 60, containerd),
    case("crash/containerd-with-pod", 60, containerd_with_pod),
];

/// runc's shim leaves its socket when it is killed.
const RUNC_SOCKET: &[&str] = &["/s/"];

/// ctr leaves its fifos when it fails to start a task; runc its cgroup too
/// when its shim dies between making and starting a container.
const FIFOS: &[&str] = &["/fifo/"];
const RUNC_HALF_MADE: &[&str] = &["/s/", "cgroup "];

/// How soon containerd must know, on hardware.
pub(super) const TRUTH: Duration = Duration::from_secs(2);

/// Processes of a program, by the start of its name as the kernel keeps it.
fn processes(program: &str) -> Vec<i32> {
    let named = |pid: &i32| {
        let name = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let first = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        String::from_utf8_lossy(first).ends_with(program)
            || (!comm.trim().is_empty() && program.starts_with(comm.trim()))
    };
    pids().filter(named).collect()
}

/// The shim that serves `id`; a runtime's shims differ by this argument.
fn shim_of(id: &str) -> Result<i32> {
    pids()
        .find(|pid| is_shim_of(*pid, id))
        .with_context(|| format!("no shim of {id}"))
}

pub(super) fn kill_hard(pid: i32) -> Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("kill {pid}"))
}

/// The only process of a program on this node.
fn only(program: &str) -> Result<i32> {
    let found = processes(program);
    ensure!(
        found.len() == 1,
        "{} processes of {program}: {found:?}",
        found.len()
    );
    Ok(found[0])
}

/// Waits until containerd no longer says that `id` runs.
fn await_truth(bench: &Bench, id: &str, since: Instant) -> Result<()> {
    loop {
        let state = bench.ctr.state(id)?;
        if !matches!(state, Some("RUNNING" | "PAUSED" | "CREATED")) {
            println!("containerd knew after {} ms", since.elapsed().as_millis());
            return Ok(());
        }
        ensure!(
            since.elapsed() < TRUTH * bench.node.slowness,
            "after {:?} containerd says {state:?}",
            since.elapsed()
        );
        thread::sleep(Duration::from_millis(50));
    }
}

/// A container whose party dies at rest; then it is removed.
fn at_rest(bench: &Bench, victim: impl FnOnce(&str) -> Result<i32>) -> Result<()> {
    let id = bench.id();
    bench.ctr.run_detached(&[], &id, &["sleep", "1000"])?;
    kill_hard(victim(&id)?)?;
    await_truth(bench, &id, Instant::now())?;
    bench.ctr.remove(&id)?;
    // The node serves on.
    bench.ctr.run(&[], &bench.id(), &["true"])?.ok()?;
    Ok(())
}

fn vmm(bench: &Bench) -> Result<()> {
    at_rest(bench, |_| only("husk-vmm"))
}

fn file_server(bench: &Bench) -> Result<()> {
    at_rest(bench, |_| only("husk-fs"))
}

fn shim(bench: &Bench) -> Result<()> {
    at_rest(bench, shim_of)
}

/// The agent can't be reached from a container; the guest's kernel can be
/// made to panic by a privileged one, which is what PID 1's death does.
fn agent(bench: &Bench) -> Result<()> {
    let id = bench.id();
    bench
        .ctr
        .run_detached(&["--privileged"], &id, &["sleep", "1000"])?;
    let panic = "[ -w /proc/sysrq-trigger ] || exit 99; echo c > /proc/sysrq-trigger";
    let begun = Instant::now();
    let done = bench.ctr.exec(&[], &id, "panic", &["sh", "-c", panic])?;
    if done.code() == 99 {
        bench.ctr.remove(&id)?;
        return Err(Skip("the guest has no sysrq".into()).into());
    }
    await_truth(bench, &id, begun)?;
    bench.ctr.remove(&id)
}

/// The same with a CRI pod.
fn pod_at_rest(bench: &Bench, victim: impl FnOnce(&str) -> Result<i32>) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let pid = victim(&pod.id)?;
    let begun = Instant::now();
    kill_hard(pid)?;
    let (mut state, mut pod_state) = (
        ContainerState::ContainerRunning,
        PodSandboxState::SandboxReady,
    );
    while begun.elapsed() < TRUTH * bench.node.slowness {
        state = cri.container_status(&container)?.state();
        pod_state = cri.pod_status(&pod.id)?.state();
        if state != ContainerState::ContainerRunning
            && pod_state == PodSandboxState::SandboxNotready
        {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(
        state != ContainerState::ContainerRunning,
        "the container still counts as running"
    );
    ensure!(
        pod_state == PodSandboxState::SandboxNotready,
        "the pod still counts as ready"
    );
    pod.remove(&cri)
}

fn vmm_of_pod(bench: &Bench) -> Result<()> {
    pod_at_rest(bench, |_| only("husk-vmm"))
}

fn shim_of_pod(bench: &Bench) -> Result<()> {
    pod_at_rest(bench, shim_of)
}

/// Kills a party at moments spread over a start; the start fails with a word
/// or has been quicker, and what is there can be removed.
fn during_start(bench: &Bench, victims: impl Fn(&str) -> Vec<i32>) -> Result<()> {
    let calm = bench.ctr.run(&[], &bench.id(), &["true"])?.ok()?.took;
    let rounds = 8;
    let mut killed = 0;
    for round in 0..rounds {
        let id = bench.id();
        let mut running = bench.ctr.start(&[], &id, &["sleep", "0.2"])?;
        let moment = calm * round / rounds;
        thread::sleep(moment);
        let begun = Instant::now();
        // The party may not be there yet: then its first moment is taken.
        let found = loop {
            let found = victims(&id);
            if !found.is_empty() || !running.is_running()? || begun.elapsed() > bench.seconds(10) {
                break found;
            }
            thread::sleep(Duration::from_millis(2));
        };
        killed += found.iter().filter(|pid| kill_hard(**pid).is_ok()).count();
        let done = running
            .finish(bench.seconds(15))
            .with_context(|| format!("killed after {moment:?}"))?;
        ensure!(
            done.code() == 0 || !done.stderr.is_empty() || done.code() > 128,
            "code {} without a word",
            done.code()
        );
        // ctr removes what it could make; what it could not, must not exist
        // or be removable.
        if bench.ctr.call(&["container", "info", &id])?.code() == 0 {
            bench
                .ctr
                .remove(&id)
                .with_context(|| format!("killed after {moment:?}"))?;
        }
    }
    ensure!(
        killed >= rounds as usize / 2,
        "only {killed} of {rounds} rounds found their victim"
    );
    bench.ctr.run(&[], &bench.id(), &["true"])?.ok()?;
    Ok(())
}

fn vmm_during_start(bench: &Bench) -> Result<()> {
    during_start(bench, |_| processes("husk-vmm"))
}

fn shim_during_start(bench: &Bench) -> Result<()> {
    during_start(bench, |id| shim_of(id).into_iter().collect())
}

/// Kills containerd and starts it again, with these in its environment.
pub(super) fn restart_containerd(bench: &Bench, settings: &[(&str, &str)]) -> Result<()> {
    let restart = bench
        .node
        .restart
        .as_ref()
        .ok_or_else(|| Skip("no --restart command".into()))?;
    kill_hard(only("containerd")?)?;
    eventually("containerd is gone", bench.seconds(5), || {
        Ok(processes("containerd").is_empty().then_some(()))
    })?;
    let mut command = Command::new("sh");
    command.args(["-c", restart]).envs(settings.iter().copied());
    let done = command.status()?;
    ensure!(done.success(), "{restart}: {done}");
    eventually("containerd answers", bench.seconds(20), || {
        let answer = process::run(&mut bench.ctr.command(&["version"]), bench.seconds(5));
        Ok(answer.is_ok_and(|answer| answer.code() == 0).then_some(()))
    })
}

fn containerd(bench: &Bench) -> Result<()> {
    let (id, ctr, folder) = (bench.id(), &bench.ctr, bench.folder());
    let mount = format!(
        "type=bind,src={},dst=/mnt,options=rbind:rw",
        folder.display()
    );
    let script =
        "trap 'exit 9' TERM; i=0; while :; do i=$((i+1)); echo $i > /mnt/count; sleep 0.1; done";
    ctr.run_detached(&["--mount", &mount], &id, &["sh", "-c", script])?;
    let count = || -> u64 {
        let text = fs::read_to_string(folder.join("count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    eventually("it counts", bench.seconds(10), || {
        Ok((count() > 0).then_some(()))
    })?;
    restart_containerd(bench, &[])?;
    let counted = count();
    eventually("it still counts", bench.seconds(5), || {
        Ok((count() > counted).then_some(()))
    })?;
    ensure!(ctr.state(&id)? == Some("RUNNING"), "{:?}", ctr.state(&id)?);
    let done = ctr.exec(&[], &id, "after", &["echo", "still here"])?.ok()?;
    ensure!(done.out() == "still here\n", "{}", done.tail());
    ctr.call(&["task", "kill", &id])?.ok()?;
    ctr.await_state(&id, "STOPPED", bench.seconds(5))?;
    ctr.delete_task(&id, 9)?;
    ctr.call(&["container", "delete", &id])?.ok()?;
    Ok(())
}

fn containerd_with_pod(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let running = pod.start(
        &cri,
        &[
            "sh",
            "-c",
            "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done",
        ],
    )?;
    let ends = pod.start(&cri, &["sh", "-c", "sleep 2; exit 7"])?;
    pod.await_log(&cri, &running, "line 2")?;
    drop(cri);
    restart_containerd(bench, &[])?;
    let cri = eventually("the CRI answers", bench.seconds(20), || {
        let cri = bench.cri()?;
        Ok(cri.pod_status(&pod.id).is_ok().then_some(cri))
    })?;
    ensure!(cri.pod_status(&pod.id)?.state() == PodSandboxState::SandboxReady);
    ensure!(cri.container_status(&running)?.state() == ContainerState::ContainerRunning);
    cri.exec_sync(&running, &["true"], 10)?.ok()?;
    // One that ended meanwhile, or ends now, has its exit code; containerd 1.7
    // gives 255 for runc's (docs/differences.md).
    let status = pod.await_exit(&cri, &ends)?;
    ensure!(
        status.exit_code == 7 || bench.runtime == Runtime::Runc,
        "{status:?}"
    );
    // The log goes on.
    let length = fs::metadata(pod.log_file(&cri, &running)?)?.len();
    let file = pod.log_file(&cri, &running)?;
    eventually("the log grows", bench.seconds(5), || {
        Ok((fs::metadata(&file)?.len() > length).then_some(()))
    })?;
    pod.start(&cri, &["true"])?;
    pod.remove(&cri)
}
