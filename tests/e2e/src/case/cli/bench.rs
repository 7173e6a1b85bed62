//! The operator's command, which starts containers of its own to measure that.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Bench, Case, PROGRAM, Skip, husk_case};
use crate::image;
use crate::node::NAMESPACE;
use crate::process;

/// The cases of this theme.
pub const CASES: &[Case] = &[husk_case("cli/bench", 60, measured).forgiving(RUNC_STATE, &[])];

/// runc's shim keeps these directories from its first container on.
const RUNC_STATE: &[&str] = &["/run/containerd/runc"];

fn measured(bench: &Bench) -> Result<()> {
    if !fs::exists(PROGRAM)? {
        return Err(Skip(format!("no {PROGRAM}")).into());
    }
    let mut command = Command::new(PROGRAM);
    command.env("CONTAINERD_ADDRESS", &bench.node.socket);
    command.args(["--json", "bench", "--rounds", "2", "--runc"]);
    command.args(["--namespace", NAMESPACE, image::BASE, "--", "sleep", "1000"]);
    let told = process::run(&mut command, bench.seconds(50))?.ok()?;
    let told: Value = serde_json::from_str(&told.out()).with_context(|| told.tail())?;
    let contenders = told["contenders"].as_array().context("nobody")?;
    let (mut husk, mut runc) = (0, 0);
    for contender in contenders {
        let starts = contender["starts"].as_u64().unwrap_or_default();
        for what in ["started", "removed"] {
            let median = contender[what]["median_ns"].as_u64();
            ensure!(median > Some(0), "{what}: {contender}");
        }
        if contender["runtime"] == "io.containerd.runc.v2" {
            ensure!(contender["stages"] == serde_json::json!([]), "{contender}");
            runc += starts;
            continue;
        }
        husk += starts;
        let stages = contender["stages"].as_array().context("no stages")?;
        let guest = stages.iter().find(|stage| stage["stage"] == "guest");
        let guest = guest.with_context(|| format!("no guest: {contender}"))?;
        // The stages are parts of the start.
        let took = guest["took"]["least_ns"].as_u64();
        ensure!(
            took > Some(0) && took < contender["started"]["most_ns"].as_u64(),
            "{contender}"
        );
    }
    ensure!((husk, runc) == (2, 2), "{told}");
    let left = bench.ctr.call(&["containers", "list", "--quiet"])?.ok()?;
    ensure!(!left.out().contains("husk-bench-"), "{}", left.tail());
    Ok(())
}
