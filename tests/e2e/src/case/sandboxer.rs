//! Pods of a handler with `sandboxer = "shim"`: containerd 2 speaks the Sandbox API
//! with the shim, and there is no pause container.

use anyhow::{Result, ensure};

use super::{Bench, Case, Skip, husk_case};
use crate::cri::api::{ContainerState, PodSandboxState};
use crate::pod::Pod;

/// The cases of this theme.
pub const CASES: &[Case] = &[husk_case("pod/shim-sandboxer", 60, shim_sandboxer)
    // containerd makes a directory for the namespace, which stays empty.
    .forgiving(&["io.containerd.sandbox.controller.v1.shim/k8s.io"], &[])];

/// As the node's configuration names it.
const HANDLER: &str = "husk-shim";

fn need_sandboxer(bench: &Bench) -> Result<()> {
    let plugins = bench.ctr.call(&["plugins", "list"])?.ok()?.out();
    let is_it = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        matches!(words[..], [kind, "shim", .., "ok"] if kind.contains("sandbox.controller"))
    };
    match plugins.lines().any(is_it) {
        true => Ok(()),
        false => Err(Skip("containerd has no sandboxer but its own here".into()).into()),
    }
}

fn shim_sandboxer(bench: &Bench) -> Result<()> {
    need_sandboxer(bench)?;
    let cri = bench.cri()?;
    let pod = Pod::run_as(bench, &cri, HANDLER, |config| {
        config.dns_config.get_or_insert_default().searches = vec!["one.test".into()];
    })?;
    let status = cri.pod_status(&pod.id)?;
    ensure!(
        status.state() == PodSandboxState::SandboxReady && status.runtime_handler == HANDLER,
        "{status:?}"
    );
    ensure!(
        status.network.is_some_and(|network| !network.ip.is_empty()),
        "no address"
    );
    // Two containers of one machine, each with its own end.
    let server = pod.start(&cri, &["probe", "echo", "127.0.0.1:7000"])?;
    pod.await_log(&cri, &server, "listening")?;
    let client = pod.start(
        &cri,
        &["sh", "-c", "probe fetch 127.0.0.1:7000 across; exit 5"],
    )?;
    let ended = pod.await_exit(&cri, &client)?;
    pod.await_log(&cri, &client, "across")?;
    ensure!(ended.exit_code == 5, "{ended:?}");
    let script = "hostname; grep search /etc/resolv.conf; ip -o address show eth0 | grep -c inet";
    let seen = cri.exec_sync(&server, &["sh", "-c", script], 10)?.ok()?;
    ensure!(
        seen.starts_with("a-pod\nsearch one.test\n") && !seen.ends_with("\n0"),
        "{seen:?}"
    );
    cri.stop(&server, 0)?;
    let status = cri.container_status(&server)?;
    ensure!(
        status.state() == ContainerState::ContainerExited && status.exit_code == 137,
        "{status:?}"
    );
    cri.remove(&server)?;
    let again = pod.start(&cri, &["echo", "again"])?;
    pod.await_log(&cri, &again, "again")?;

    cri.stop_pod(&pod.id)?;
    let status = cri.pod_status(&pod.id)?;
    ensure!(
        status.state() == PodSandboxState::SandboxNotready,
        "{status:?}"
    );
    cri.remove_pod(&pod.id)
}
