//! Many pods at once: how long each start takes when they come together, and what
//! pods cost the node that do nothing.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use husk_e2e::ctr::Ctr;
use husk_e2e::footprint;
use husk_e2e::node::Node;

use crate::contender::Contender;
use crate::measure::{Measured, milliseconds, used_kib};
use crate::output::Speaker;
use crate::results::{About, Results};

/// How many are started at once, and how often: one alone is disturbed by little.
const TOGETHER: [(usize, u32); 3] = [(1, 5), (8, 2), (32, 1)];

/// How many live at once.
const ALIVE: usize = 64;

/// How long those are watched that do nothing.
const WATCHED: Duration = Duration::from_secs(30);

/// Everything once for each contender, in turns.
///
/// # Errors
/// One start of all fails, or a pod does not answer.
pub fn measure(node: &Node) -> Result<Vec<Measured>> {
    for contender in Contender::USUAL {
        contender.warm_up(node)?;
    }
    let mut all = Vec::new();
    for (count, times) in TOGETHER {
        for round in 1..=times {
            for contender in Contender::USUAL {
                all.extend(together(node, contender, count, round)?);
            }
        }
    }
    for contender in Contender::USUAL {
        all.push(growth(&all, contender)?);
    }
    for contender in Contender::USUAL {
        all.extend(alive(node, contender)?);
    }
    Ok(all)
}

/// The first outputs of `count` containers in pods of their own, started at the same
/// moment.
fn together(node: &Node, contender: Contender, count: usize, round: u32) -> Result<Vec<Measured>> {
    let _prepared = contender.prepare()?;
    let ctr = Ctr::new(node, contender.runtime());
    // They have one another to wait for.
    let limit = ctr.deadline() * u32::try_from(count)?;
    let starts: Vec<_> = (0..count)
        .map(|index| {
            let id = format!("together-{}-{count}-{round}-{index}", contender.word());
            let mut command = ctr.run_rm_command(&[], &id, &["uname"]);
            thread::spawn(move || -> Result<Duration> {
                let mut run = Speaker::start(&mut command, limit)?;
                let first = run.until("Linux")?;
                run.end()?;
                Ok(first)
            })
        })
        .collect();
    let what = at_once(count);
    let mut all = Vec::new();
    for start in starts {
        let Ok(first) = start.join() else {
            bail!("a start panicked");
        };
        all.push(milliseconds(&what, contender.name(), first?));
    }
    let longest = all.iter().map(|first| first.value).fold(0.0, f64::max);
    println!(
        "{what}, {}: the last after {longest:.1} ms",
        contender.name()
    );
    Ok(all)
}

fn at_once(count: usize) -> String {
    format!("{count} started at once, first output")
}

/// How much later the first output comes where many start at once.
fn growth(all: &[Measured], contender: Contender) -> Result<Measured> {
    let [(few, _), .., (many, _)] = TOGETHER;
    let results = Results::of(all, About::default());
    let median = |count: usize| -> Result<f64> {
        let what = at_once(count);
        let figure = results
            .figures
            .iter()
            .find(|figure| figure.what == what && figure.who == contender.name());
        Ok(figure.with_context(|| format!("no {what}"))?.median)
    };
    Ok(Measured {
        what: format!("{many} started at once, first output over that of {few}"),
        who: contender.name().into(),
        value: median(many)? / median(few)?,
        unit: "",
    }
    .told())
}

/// What a process did, nanoseconds on a processor and times it was woken.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    ns: u64,
    wakes: u64,
}

fn alive(node: &Node, contender: Contender) -> Result<Vec<Measured>> {
    let _prepared = contender.prepare()?;
    let ctr = Ctr::new(node, contender.runtime());
    let id = |index: usize| format!("alive-{}-{index}", contender.word());
    ctr.run_detached(&[], &id(0), &["sleep", "100000"])?;
    thread::sleep(Duration::from_secs(2));
    let before = used_kib()?;
    for index in 1..ALIVE {
        ctr.run_detached(&[], &id(index), &["sleep", "100000"])?;
    }
    // Their guests report what they do not use.
    thread::sleep(WATCHED);
    let grown = used_kib()?.saturating_sub(before);
    let worked = || -> Result<Work> {
        let mut sum = Work::default();
        for index in 0..ALIVE {
            for process in footprint::of_pod(&id(index))? {
                let work = work_of(process.pid)?;
                sum.ns += work.ns;
                sum.wakes += work.wakes;
            }
        }
        Ok(sum)
    };
    let first = worked()?;
    thread::sleep(WATCHED);
    let last = worked()?;
    for index in 0..ALIVE {
        let said = ctr
            .exec(&[], &id(index), "alive", &["echo", "here"])?
            .ok()?
            .out();
        ensure!(said.trim() == "here", "{}: {said}", id(index));
    }
    for index in 0..ALIVE {
        ctr.remove(&id(index))?;
    }
    let pod_seconds = WATCHED.as_secs_f64() * ALIVE as f64;
    let figure = |what: String, value: f64, unit: &'static str| {
        Measured {
            what,
            who: contender.name().into(),
            value,
            unit,
        }
        .told()
    };
    Ok(vec![
        figure(
            format!("{ALIVE} alive: node's memory for each more"),
            grown as f64 / (ALIVE - 1) as f64,
            "KiB",
        ),
        figure(
            format!("{ALIVE} alive: an idle pod's time on processors"),
            last.ns.saturating_sub(first.ns) as f64 / 1e3 / pod_seconds,
            "µs/s",
        ),
        figure(
            format!("{ALIVE} alive: wake-ups of an idle pod"),
            last.wakes.saturating_sub(first.wakes) as f64 / pod_seconds,
            "1/s",
        ),
    ])
}

/// Of all its threads so far: schedstat's first number, and how often each went to
/// wait by itself.
fn work_of(pid: i32) -> Result<Work> {
    let mut sum = Work::default();
    for thread in fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))?.flatten() {
        let read = |name: &str| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let first = |text: &str| {
            text.split_whitespace()
                .next()
                .and_then(|word| word.parse().ok())
        };
        let status = read("status");
        let waited = status
            .lines()
            .find_map(|line| first(line.strip_prefix("voluntary_ctxt_switches:")?));
        sum.ns += first(&read("schedstat")).unwrap_or(0);
        sum.wakes += waited.unwrap_or(0_u64);
    }
    Ok(sum)
}
