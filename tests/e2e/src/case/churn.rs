//! Many pods, one after another and at once. That nothing is left is what the
//! runner checks after every case.

use std::thread;

use anyhow::{Context, Result, ensure};

use super::{Bench, Case, case};
use crate::pod::Pod;
use crate::process;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("churn/one-after-another", 300, one_after_another),
    case("churn/at-once", 120, at_once),
    case("churn/ctr-at-once", 120, ctr_at_once),
];

const ONE_AFTER_ANOTHER: usize = 30;
const AT_ONCE: usize = 6;

fn one_after_another(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    for round in 0..ONE_AFTER_ANOTHER {
        let said = format!("round {round}");
        let pod = Pod::run(bench, &cri, |_| {})?;
        let container = pod.start(&cri, &["echo", &said])?;
        pod.await_log(&cri, &container, &said).context(said)?;
        pod.remove(&cri)?;
    }
    Ok(())
}

fn at_once(bench: &Bench) -> Result<()> {
    let starts: Vec<_> = (0..AT_ONCE).map(|_| bench.sibling()).collect();
    thread::scope(|scope| {
        let started: Vec<_> = starts
            .iter()
            .map(|bench| {
                scope.spawn(move || -> Result<()> {
                    let cri = bench.cri()?;
                    let pod = Pod::run(bench, &cri, |_| {})?;
                    let container = pod.start(&cri, &["sh", "-c", "echo up; sleep 1000"])?;
                    pod.await_log(&cri, &container, "up")?;
                    cri.exec_sync(&container, &["true"], 20)?.ok()?;
                    pod.remove(&cri)
                })
            })
            .collect();
        for thread in started {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

fn ctr_at_once(bench: &Bench) -> Result<()> {
    let mut running = Vec::new();
    for index in 0..AT_ONCE {
        let said = format!("number {index}");
        running.push((bench.ctr.start(&[], &bench.id(), &["echo", &said])?, said));
    }
    for (running, said) in running {
        let done: process::Finished = running.finish(bench.seconds(100))?.ok()?;
        ensure!(done.out() == format!("{said}\n"), "{}", done.tail());
    }
    Ok(())
}
