//! A pod that finds too few processes or too little memory, however far its start
//! comes with what there is: one clear error, nothing left, and nobody else notices.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::abuse::{Configured, ensure_clear};
use super::{Bench, Case, husk_case};
use crate::pod::Pod;
use crate::pod_cgroup::PodCgroup;
use crate::process::eventually;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    husk_case("scarce/processes", 120, processes),
    husk_case("scarce/memory", 120, memory),
];

/// So many starts in a row must work, and a sweep is over.
const ENOUGH: u32 = 2;

/// A machine boots, so that one that fails is no template's fault.
const BOOTS: &str = "template_max_age_seconds = 0";

/// Starts with a limit that grows, in a cgroup around the pod's, until they work.
/// Some fail, and say one of `words`.
fn sweep(bench: &Bench, file: &str, limits: &[u64], words: &[&str]) -> Result<()> {
    let cri = bench.cri()?;
    let other = Pod::run(bench, &cri, |_| {})?;
    let witness = other.start(&cri, &["sleep", "1000000"])?;
    let configured = Configured::with(BOOTS)?;
    let cgroup = PodCgroup::make(&bench.id())?;
    let (mut failed, mut worked) = (0, 0);
    for limit in limits {
        cgroup.limit(file, &limit.to_string())?;
        let id = bench.id();
        let path = format!("{}/{id}", cgroup.name);
        let begun = Instant::now();
        let done = bench.ctr.run(&["--cgroup", &path], &id, &["true"])?;
        let took = begun.elapsed();
        let what = format!("{file} is {limit}");
        println!(
            "{what}: code {} after {took:?}: {}",
            done.code(),
            done.err().trim()
        );
        if done.code() == 0 {
            worked += 1;
        } else {
            ensure_clear(&done, &[]).with_context(|| what.clone())?;
            let said = done.err();
            ensure!(
                words.iter().any(|words| said.contains(words)),
                "{what}: {said}"
            );
            failed += 1;
            worked = 0;
        }
        // What ctr could not remove was never there.
        let known = bench.ctr.call(&["container", "info", &id])?;
        ensure!(known.code() != 0, "{what}: the container is left");
        let path = format!("/sys/fs/cgroup{}/pids.current", cgroup.name);
        eventually("nobody is left", bench.seconds(5), || {
            let count = fs::read_to_string(&path)?;
            Ok((count.trim() == "0").then_some(()))
        })
        .with_context(|| what.clone())?;
        cri.exec_sync(&witness, &["true"], 60)?.ok()?;
        if worked == ENOUGH {
            break;
        }
    }
    ensure!(
        failed >= 3 && worked == ENOUGH,
        "{failed} failed, then {worked} worked"
    );
    drop((cgroup, configured));
    other.remove(&cri)
}

/// As the kubelet limits them with `podPidsLimit`.
fn processes(bench: &Bench) -> Result<()> {
    let limits: Vec<u64> = (1..=24).collect();
    // In the kernel's words, for processes and threads alike.
    sweep(
        bench,
        "pids.max",
        &limits,
        &["Resource temporarily unavailable"],
    )
}

/// The kernel ends whoever asks for more; the shim itself where there is next to
/// nothing.
fn memory(bench: &Bench) -> Result<()> {
    let limits: Vec<u64> = [
        1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512,
    ]
    .map(|mib| mib << 20)
    .into();
    sweep(
        bench,
        "memory.max",
        &limits,
        &["for want of memory", "ttrpc: closed"],
    )
}
