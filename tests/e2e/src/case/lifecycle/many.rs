//! Many of what there is mostly one of, and none of what there mostly is.

use std::thread;

use anyhow::{Context, Result, ensure};

use crate::case::{Bench, Case, case};
use crate::cri::Cri;
use crate::cri::api::ContainerState;
use crate::pod::Pod;
use crate::process::eventually;

/// The cases of this theme.
pub const CASES: &[Case] = &[
    case("lifecycle/exec-200", 180, exec_200),
    case("lifecycle/exec-50-at-once", 90, exec_50_at_once),
    case("lifecycle/containers-64", 180, containers_64),
    case("lifecycle/empty-image", 40, empty_image),
];

fn exec_200(bench: &Bench) -> Result<()> {
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    for number in 0..200 {
        let script = format!("echo {number}; exit {number}");
        let done = cri
            .exec_sync(&container, &["sh", "-c", &script], 10)
            .with_context(|| format!("exec {number}"))?;
        ensure!(
            done.code == number && done.stdout == format!("{number}\n"),
            "exec {number}: {done:?}"
        );
    }
    // None of them has left a process.
    let seen = cri.exec_sync(&container, &["ps"], 10)?.ok()?;
    ensure!(seen.lines().count() == 3, "{seen}");
    pod.remove(&cri)
}

fn exec_50_at_once(bench: &Bench) -> Result<()> {
    const COUNT: i32 = 50;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let container = pod.start(&cri, &["sleep", "1000"])?;
    let one = |number: i32| -> Result<()> {
        let cri = Cri::connect(bench.node.socket.clone(), bench.seconds(60))?;
        let script = format!(
            "touch /tmp/{number}; until [ -e /tmp/go ]; do sleep 2; done; echo {number}; \
             exit {number}"
        );
        let done = cri.exec_sync(&container, &["sh", "-c", &script], 0)?;
        ensure!(
            done.code == number && done.stdout == format!("{number}\n"),
            "{done:?}"
        );
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..COUNT)
            .map(|number| scope.spawn(move || one(number)))
            .collect();
        // All of them run before the first may end.
        let count = "probe count /tmp";
        let all = eventually("all of them run", bench.seconds(45), || {
            let seen = cri.exec_sync(&container, &["sh", "-c", count], 10)?.ok()?;
            Ok((seen == COUNT.to_string()).then_some(()))
        });
        cri.exec_sync(&container, &["touch", "/tmp/go"], 10)?.ok()?;
        for (number, thread) in threads.into_iter().enumerate() {
            let done = thread.join();
            done.map_err(|_| anyhow::anyhow!("its thread panicked"))
                .flatten()
                .with_context(|| format!("exec {number}"))?;
        }
        all
    })?;
    pod.remove(&cri)
}

fn containers_64(bench: &Bench) -> Result<()> {
    const COUNT: usize = 64;
    let cri = bench.cri()?;
    let pod = Pod::run(bench, &cri, |_| {})?;
    let mut ids = Vec::new();
    for number in 0..COUNT {
        let seconds = (2000 + number).to_string();
        let started = pod.start(&cri, &["sleep", &seconds]);
        ids.push(started.with_context(|| format!("container {number}"))?);
    }
    let listed = cri.containers(&pod.id)?;
    let running = listed
        .iter()
        .filter(|container| container.state() == ContainerState::ContainerRunning)
        .count();
    ensure!(
        running == COUNT,
        "{running} of {} containers run",
        listed.len()
    );
    for number in [0, COUNT - 1] {
        let seen = cri
            .exec_sync(
                &ids[number],
                &["sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline"],
                10,
            )?
            .ok()?;
        ensure!(seen == format!("sleep {}", 2000 + number), "{seen}");
    }
    // One may go, and its place is free.
    cri.stop(&ids[1], 0)?;
    cri.remove(&ids[1])?;
    let next = pod.start(&cri, &["echo", "in its place"])?;
    pod.await_log(&cri, &next, "in its place")?;
    pod.remove(&cri)
}

/// An image without layers: no file at all, what it runs comes by a mount.
fn empty_image(bench: &Bench) -> Result<()> {
    const IMAGE: &str = "husk.test/empty:1";
    crate::image::install_empty(&bench.node, IMAGE)?;
    let ctr = bench.ctr.with_image(IMAGE);
    let mount = format!(
        "type=bind,src={},dst=/tools/probe,options=rbind:ro",
        bench.node.work.join("probe").display()
    );
    let run = |flags: &[&str], command: &[&str]| {
        let mut all = vec!["--mount", &mount];
        all.extend(flags);
        ctr.run(&all, &bench.id(), command)
    };
    // There is no /etc/passwd to look the user up in.
    let ids = run(&["--user", "1234:2345"], &["/tools/probe", "ids"]);
    let shell = run(&[], &["sh"]);
    bench
        .ctr
        .call(&["images", "remove", "--sync", IMAGE])?
        .ok()?;
    let ids = ids?.ok()?;
    ensure!(ids.out() == "1234 1234 2345 2345\n", "{}", ids.tail());
    let shell = shell?;
    ensure!(
        shell.code() != 0 && shell.err().contains("\"sh\""),
        "{}",
        shell.tail()
    );
    Ok(())
}
