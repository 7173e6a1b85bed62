//! Runs cases, each in a process of its own with a deadline, cleans up after
//! it, and reports.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::case::{Case, Verdict};
use crate::clean;
use crate::host::HostState;
use crate::node::{Node, Runtime};
use crate::process;
use crate::stuck;
use crate::template;

/// Exit code of a case's process for a skip, its reason on standard output.
const SKIPPED: i32 = 77;

/// One case's result with one runtime.
pub struct Ran {
    name: &'static str,
    runtime: Runtime,
    verdict: Verdict,
    took: Duration,
}

/// Runs one case in this process; the exit code says how it went.
pub fn run_here(case: &Case, node: &Node, runtime: Runtime) -> i32 {
    match case.run(node, runtime) {
        Ok(()) => 0,
        Err(error) => match error.downcast_ref::<crate::case::Skip>() {
            Some(skip) => {
                println!("{}", skip.0);
                SKIPPED
            }
            None => {
                println!("{error:#}");
                1
            }
        },
    }
}

/// Runs the cases for each runtime, printing as they end.
pub fn run_all(cases: &[&'static Case], runtimes: &[Runtime], node: &Node) -> Result<Vec<Ran>> {
    let mut all = Vec::new();
    for case in cases {
        for &runtime in runtimes.iter().filter(|runtime| case.is_for(**runtime)) {
            let ran = run_one(case, node, runtime)?;
            println!("{}", line(&ran));
            let told = match &ran.verdict {
                Verdict::Passed(remarks) => remarks,
                Verdict::Failed(why) => why,
                Verdict::Skipped(_) => "",
            };
            for text in process::tail(told, 6000).lines() {
                println!("        | {text}");
            }
            all.push(ran);
        }
    }
    Ok(all)
}

fn run_one(case: &'static Case, node: &Node, runtime: Runtime) -> Result<Ran> {
    let before = HostState::capture(node);
    let begun = Instant::now();
    let deadline = case.time_limit() * node.slowness;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--one", case.name, "--runtime", runtime.name()])
        .args(node.arguments());
    // A session of its own: what the case started can be ended with it.
    // SAFETY: setsid is safe to call between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    let running = process::start(&mut command)?;
    let session = running.pid();
    let finished = running.finish(deadline);
    let took = begun.elapsed();
    let mut verdict = match finished {
        Ok(finished) => match finished.code() {
            0 => Verdict::Passed(finished.out()),
            SKIPPED => Verdict::Skipped(finished.out().trim().to_owned()),
            _ => Verdict::Failed(format!("{}{}", finished.out(), finished.err())),
        },
        Err(late) => Verdict::Failed(format!("{late:#}")),
    };
    clean::kill_session(session);
    // A pod of other settings may have had one made; it shows as left behind if it stays.
    let _ = template::await_maker(Duration::from_secs(30) * node.slowness);
    let patience = Duration::from_secs(10) * node.slowness;
    let counts = |difference: &str| case.counts(runtime, difference);
    let failed = matches!(verdict, Verdict::Failed(_));
    if failed {
        // Cleaning up may hang on the same thing, and ends what could tell.
        let still = stuck::tell();
        if !still.is_empty() {
            println!("{} failed with this still there:", case.name);
        }
        for text in process::tail(&still, 12_000).lines() {
            println!("        | {text}");
        }
        clean::remove_all(node).context("clean up after a failed case")?;
        if before.await_same(node, patience, counts).is_err() {
            clean::kill_leftovers(node);
        }
    } else if let Err(left) = before.await_same(node, patience, counts) {
        verdict = Verdict::Failed(format!("passed, but left something behind: {left}"));
        clean::remove_all(node)?;
        clean::kill_leftovers(node);
    }
    Ok(Ran {
        name: case.name,
        runtime,
        verdict,
        took,
    })
}

fn line(ran: &Ran) -> String {
    let verdict = match &ran.verdict {
        Verdict::Passed(_) => "ok".to_owned(),
        Verdict::Failed(_) => "FAILED".to_owned(),
        Verdict::Skipped(reason) => format!("skipped: {reason}"),
    };
    format!(
        "{:<28} {:<5} {:>7.1} s  {verdict}",
        ran.name,
        ran.runtime.name(),
        ran.took.as_secs_f64()
    )
}

/// Prints a table and the closing line; returns whether nothing failed.
pub fn report(all: &[Ran]) -> bool {
    println!("\n{:<28} {:>16} {:>16}", "case", "husk", "runc");
    let mut names: Vec<&str> = all.iter().map(|ran| ran.name).collect();
    names.dedup();
    for name in names {
        let cell = |runtime| {
            all.iter()
                .find(|ran| ran.name == name && ran.runtime == runtime)
                .map_or_else(
                    || "-".to_owned(),
                    |ran| {
                        let word = match ran.verdict {
                            Verdict::Passed(_) => "ok",
                            Verdict::Failed(_) => "FAILED",
                            Verdict::Skipped(_) => "skipped",
                        };
                        format!("{word} {:.1} s", ran.took.as_secs_f64())
                    },
                )
        };
        println!(
            "{name:<28} {:>16} {:>16}",
            cell(Runtime::Husk),
            cell(Runtime::Runc)
        );
    }
    let count =
        |wanted: fn(&Verdict) -> bool| all.iter().filter(|ran| wanted(&ran.verdict)).count();
    let failed = count(|verdict| matches!(verdict, Verdict::Failed(_)));
    println!(
        "\n{} passed, {failed} failed, {} skipped",
        count(|verdict| matches!(verdict, Verdict::Passed(_))),
        count(|verdict| matches!(verdict, Verdict::Skipped(_))),
    );
    failed == 0
}
