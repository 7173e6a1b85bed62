//! `husk bench`: what starts take on this node, with `ctr` as its users have it.
//!
//! One container a round and runtime, in turns; the first round is not counted:
//! in it containerd and the node read what they keep afterwards.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use husk_node::state::State;

use crate::answer::Answer;
use crate::arguments::BenchArguments;
use crate::pods;
use crate::text;
use crate::timeline::{self, Stage, milliseconds};

/// Before each start: what the last end still does is no part of it.
const PAUSE: Duration = Duration::from_millis(500);

/// How long the shim may take to write what containerd knows already.
const RECORD: Duration = Duration::from_secs(5);

/// How a container began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// In a copy of a machine that had booted.
    Copy,
    /// In a machine that booted.
    Boot,
    /// With runc.
    Runc,
}

impl Kind {
    /// In the order of columns.
    const ALL: [Self; 3] = [Self::Copy, Self::Boot, Self::Runc];

    fn is_husk(self) -> bool {
        self != Self::Runc
    }

    fn runtime(self) -> &'static str {
        match self.is_husk() {
            true => "io.containerd.husk.v2",
            false => "io.containerd.runc.v2",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Copy => "HUSK, COPY",
            Self::Boot => "HUSK, BOOT",
            Self::Runc => "RUNC",
        }
    }
}

/// One start, and its end.
#[derive(Clone, Debug)]
struct Start {
    kind: Kind,
    started: Duration,
    removed: Duration,
    stages: Vec<Stage>,
}

/// Starts containers, and tells what that took.
///
/// # Errors
/// One could not be started or removed.
pub fn run(asked: &BenchArguments, json: bool) -> anyhow::Result<Answer> {
    let state_dir = pods::state_dir()?.join(&asked.namespace);
    let mut starts = Vec::new();
    for round in 0..=asked.rounds {
        for (is_asked, runtime) in [(true, Kind::Boot), (asked.runc, Kind::Runc)] {
            if !is_asked {
                continue;
            }
            thread::sleep(PAUSE);
            let id = format!("husk-bench-{}-{}", process::id(), starts.len());
            starts.push((round, once(asked, &state_dir, runtime, id)?));
        }
    }
    starts.retain(|(round, _)| *round > 0);
    let starts: Vec<_> = starts.into_iter().map(|(_, start)| start).collect();
    if json {
        return Answer::json(&value(asked, &starts));
    }
    Ok(Answer::done(table(&starts)))
}

fn once(
    asked: &BenchArguments,
    state_dir: &Path,
    runtime: Kind,
    id: String,
) -> anyhow::Result<Start> {
    let begun = Instant::now();
    let container = Container::run(asked, runtime, id)?;
    let started = begun.elapsed();
    let (kind, stages) = match runtime.is_husk() {
        true => record(state_dir.join(&container.id))?,
        false => (Kind::Runc, Vec::new()),
    };
    let begun = Instant::now();
    container.remove()?;
    Ok(Start {
        kind,
        started,
        removed: begun.elapsed(),
        stages,
    })
}

/// What the shim has written of a start.
fn record(dir: PathBuf) -> anyhow::Result<(Kind, Vec<Stage>)> {
    let begun = Instant::now();
    loop {
        let read = State::read(&dir);
        if let Ok(state) = &read
            && state.timeline.container_started_ns > 0
        {
            let is_copy = state.machine.as_ref().is_some_and(|it| it.from_template);
            let kind = if is_copy { Kind::Copy } else { Kind::Boot };
            return Ok((kind, timeline::stages(&state.timeline)));
        }
        if begun.elapsed() > RECORD {
            read.with_context(|| format!("what the shim writes into {}", dir.display()))?;
            bail!("{}: no time at which the container began", dir.display());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A container, which is gone when this is.
struct Container<'a> {
    namespace: &'a str,
    id: String,
    is_removed: bool,
}

impl<'a> Container<'a> {
    fn run(asked: &'a BenchArguments, runtime: Kind, id: String) -> anyhow::Result<Self> {
        let this = Self {
            namespace: &asked.namespace,
            id,
            is_removed: false,
        };
        let mut words = vec!["run", "--detach", "--null-io", "--runtime"];
        words.extend([runtime.runtime(), &asked.image, &this.id]);
        words.extend(asked.args.iter().map(String::as_str));
        // What fails may have left the container.
        this.ctr(&words)?;
        Ok(this)
    }

    fn remove(mut self) -> anyhow::Result<()> {
        self.delete()?;
        self.is_removed = true;
        Ok(())
    }

    /// A task that has gone by itself is no error: containerd deletes no container
    /// whose task is left.
    fn delete(&self) -> anyhow::Result<()> {
        let task = self.ctr(&["task", "delete", "--force", &self.id]);
        self.ctr(&["container", "delete", &self.id])
            .or_else(|error| task.and(Err(error)))
    }

    fn ctr(&self, words: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new("ctr");
        command.args(["--namespace", self.namespace]).args(words);
        let done = command.stdin(Stdio::null()).output();
        let done = done.context("ctr, which comes with containerd")?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            bail!("ctr {}: {}", words.join(" "), said.trim());
        }
        Ok(())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if !self.is_removed {
            let _ = self.delete();
        }
    }
}

/// Of some lengths of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spread {
    median_ns: u64,
    least_ns: u64,
    most_ns: u64,
}

impl Spread {
    /// None of none.
    fn of(times: impl Iterator<Item = u64>) -> Option<Self> {
        let mut times: Vec<u64> = times.collect();
        times.sort_unstable();
        let (least_ns, most_ns) = (*times.first()?, *times.last()?);
        let (lower, upper) = (times[(times.len() - 1) / 2], times[times.len() / 2]);
        Some(Self {
            median_ns: lower.midpoint(upper),
            least_ns,
            most_ns,
        })
    }

    fn value(self) -> Value {
        json!({ "median_ns": self.median_ns, "least_ns": self.least_ns, "most_ns": self.most_ns })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&milliseconds(self.median_ns))
    }
}

/// Those of one kind.
struct Column<'a> {
    kind: Kind,
    starts: Vec<&'a Start>,
}

impl Column<'_> {
    fn spread(&self, time: impl Fn(&Start) -> Duration) -> Option<Spread> {
        let times = self.starts.iter().map(|start| time(start).as_nanos());
        Spread::of(times.map(|ns| u64::try_from(ns).unwrap_or(u64::MAX)))
    }

    fn stage(&self, key: &str) -> Option<Spread> {
        let stages = self.starts.iter().flat_map(|start| &start.stages);
        let wanted = stages.filter(|stage| stage.key == key);
        Spread::of(wanted.map(|stage| stage.to_ns - stage.from_ns))
    }

    /// The keys and names of all stages that one of them has, in their order.
    fn stages(&self) -> Vec<(&'static str, &'static str)> {
        let longest = self.starts.iter().max_by_key(|start| start.stages.len());
        let stages = longest.map_or(&[][..], |start| &start.stages);
        stages.iter().map(|it| (it.key, it.what)).collect()
    }
}

fn columns(starts: &[Start]) -> Vec<Column<'_>> {
    let columns = Kind::ALL.map(|kind| Column {
        kind,
        starts: starts.iter().filter(|start| start.kind == kind).collect(),
    });
    let mut columns = Vec::from(columns);
    columns.retain(|column| !column.starts.is_empty());
    columns
}

fn value(asked: &BenchArguments, starts: &[Start]) -> Value {
    let columns = columns(starts);
    let columns = columns.iter().map(|column| {
        let stages = column.stages().into_iter().map(|(key, what)| {
            json!({ "stage": key, "what": what, "took": column.stage(key).map(Spread::value) })
        });
        json!({
            "runtime": column.kind.runtime(),
            "from_template": column.kind.is_husk().then_some(column.kind == Kind::Copy),
            "starts": column.starts.len(),
            "started": column.spread(|start| start.started).map(Spread::value),
            "removed": column.spread(|start| start.removed).map(Spread::value),
            "stages": stages.collect::<Vec<_>>(),
        })
    });
    json!({
        "image": asked.image,
        "rounds": asked.rounds,
        "contenders": columns.collect::<Vec<_>>(),
    })
}

fn table(starts: &[Start]) -> String {
    let columns = columns(starts);
    let row = |what: &str, cell: &dyn Fn(&Column) -> Option<String>| {
        let cells = columns.iter().map(cell);
        let cells = cells.map(|cell| cell.unwrap_or_else(|| "-".to_owned()));
        let what = std::iter::once(what.to_owned());
        what.chain(cells).collect::<Vec<_>>()
    };
    let shown = |spread: Option<Spread>| spread.map(|spread| spread.to_string());
    let started = |column: &Column| column.spread(|start| start.started);
    let mut rows = vec![
        row("starts", &|it| Some(it.starts.len().to_string())),
        row("ctr run, until it runs", &|it| shown(started(it))),
        row("  the fastest", &|it| {
            Some(milliseconds(started(it)?.least_ns))
        }),
        row("  the slowest", &|it| {
            Some(milliseconds(started(it)?.most_ns))
        }),
    ];
    // Copies and boots have the same.
    let stages = columns.first().map(Column::stages).unwrap_or_default();
    for (key, what) in stages {
        rows.push(row(&format!("  {what}"), &|it| shown(it.stage(key))));
    }
    rows.push(row("its removal", &|it| {
        shown(it.spread(|start| start.removed))
    }));
    let mut headings = vec!["MEDIANS"];
    headings.extend(columns.iter().map(|column| column.kind.title()));
    text::table(&headings, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(kind: Kind, ms: u64) -> Start {
        let stage = |key, what, from_ns, to_ns| Stage {
            key,
            what,
            from_ns,
            to_ns,
        };
        let stages = match kind {
            Kind::Runc => Vec::new(),
            _ => vec![
                stage("node", "node: mounts", 0, 1_000_000),
                stage("guest", "guest: kernel", 1_000_000, ms * 1_000_000),
            ],
        };
        Start {
            kind,
            started: Duration::from_millis(ms),
            removed: Duration::from_millis(ms / 2),
            stages,
        }
    }

    #[test]
    fn the_median_is_in_the_middle() {
        let of = |times: &[u64]| Spread::of(times.iter().copied());
        assert_eq!(of(&[]), None);
        let spread = |median_ns, least_ns, most_ns| {
            Some(Spread {
                median_ns,
                least_ns,
                most_ns,
            })
        };
        assert_eq!(of(&[7]), spread(7, 7, 7));
        assert_eq!(of(&[9, 1, 2]), spread(2, 1, 9));
        assert_eq!(of(&[9, 1, 2, 4]), spread(3, 1, 9));
        assert_eq!(of(&[u64::MAX; 2]), spread(u64::MAX, u64::MAX, u64::MAX));
    }

    #[test]
    fn boots_and_copies_are_told_apart() {
        let starts = [
            start(Kind::Boot, 300),
            start(Kind::Runc, 90),
            start(Kind::Copy, 100),
            start(Kind::Copy, 200),
        ];
        let shown = table(&starts);
        let cells = |begin: &str| -> Vec<String> {
            let line = shown.lines().find(|line| line.starts_with(begin));
            let line = line.unwrap_or_else(|| panic!("no {begin:?}: {shown}"));
            let cells = line[begin.len()..].split("  ").map(str::trim);
            cells
                .filter(|cell| !cell.is_empty())
                .map(str::to_owned)
                .collect()
        };
        assert_eq!(cells("MEDIANS"), ["HUSK, COPY", "HUSK, BOOT", "RUNC"]);
        assert_eq!(cells("starts"), ["2", "1", "1"]);
        let run = cells("ctr run, until it runs");
        assert_eq!(run, ["150.0 ms", "300.0 ms", "90.0 ms"]);
        assert_eq!(cells("  the slowest"), ["200.0 ms", "300.0 ms", "90.0 ms"]);
        assert_eq!(cells("  guest: kernel"), ["149.0 ms", "299.0 ms", "-"]);
        assert_eq!(cells("its removal"), ["75.0 ms", "150.0 ms", "45.0 ms"]);
    }
}
