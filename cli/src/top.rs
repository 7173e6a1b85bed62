//! `husk top`: what the pods of this node use, again and again.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, StdoutLock, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::termios::tcgetwinsize;
use serde_json::{Value, json};

use husk_node::process::Process;

use crate::answer::Answer;
use crate::arguments::TopArguments;
use crate::memory::Memory;
use crate::pods::{self, Pod};
use crate::text;

mod usage;

use usage::{Counters, Rates, Usage};

/// Longest id shown; `--json` tells all of it.
const ID: usize = 20;

/// Rows and columns.
type Size = (usize, usize);

/// A pod and what it uses.
struct Row {
    pod: Pod,
    memory: Option<Memory>,
    rates: Rates,
}

/// What pods had used at some time.
struct Sample {
    at: Instant,
    /// By the pods' directories and shims: another may have its id.
    used: BTreeMap<PathBuf, (Option<Process>, Usage)>,
}

/// Shows the pods until it is interrupted, or as often as was asked for.
///
/// # Errors
/// The pods are not for this user.
pub fn run(asked: &TopArguments, json: bool) -> anyhow::Result<Answer> {
    Answer::streamed(follow(asked, json))
}

fn follow(asked: &TopArguments, json: bool) -> anyhow::Result<()> {
    let state_dir = pods::state_dir()?;
    let interval = Duration::from_secs(u64::from(asked.interval));
    let counters = Counters::default();
    let mut output = io::stdout().lock();
    let is_drawn = output.is_terminal() && !json;
    let mut before = sample(&counters, &pods::all(&state_dir)?);
    let mut shown = 0;
    while asked.count.is_none_or(|count| shown < count) {
        thread::sleep(interval.saturating_sub(before.at.elapsed()));
        let pods = pods::all(&state_dir)?;
        let now = sample(&counters, &pods);
        let (time, took) = (
            text::utc(SystemTime::now()),
            now.at.duration_since(before.at),
        );
        let mut rows: Vec<Row> = pods
            .into_iter()
            .map(|pod| row(pod, &before, &now))
            .collect();
        busiest_first(&mut rows);
        if json {
            let line = text::ascii(&value(&time, took, &rows).to_string());
            writeln!(output, "{line}")?;
        } else if is_drawn {
            draw(&mut output, &table(&time, &rows), shown == 0)?;
        } else {
            writeln!(output, "{}", table(&time, &rows))?;
        }
        output.flush()?;
        before = now;
        shown = shown.saturating_add(1);
    }
    Ok(())
}

fn sample(counters: &Counters, pods: &[Pod]) -> Sample {
    let used = |pod: &Pod| {
        let usage = counters.of(&pod.state);
        (pod.dir.clone(), (pod.state.shim, usage))
    };
    Sample {
        at: Instant::now(),
        used: pods.iter().map(used).collect(),
    }
}

fn row(pod: Pod, before: &Sample, now: &Sample) -> Row {
    let of = |sample: &Sample| {
        let (shim, usage) = sample.used.get(&pod.dir)?;
        (*shim == pod.state.shim).then_some(*usage)
    };
    let time = now.at.duration_since(before.at);
    let rates = of(now)
        .zip(of(before))
        .map(|(now, before)| now.since(&before, time));
    Row {
        memory: Memory::of(&pod.state),
        rates: rates.unwrap_or_default(),
        pod,
    }
}

fn busiest_first(rows: &mut [Row]) {
    let cpu = |row: &Row| row.rates.cpu_percent.unwrap_or(-1.0);
    rows.sort_by(|one, other| cpu(other).total_cmp(&cpu(one)));
}

fn table(time: &str, rows: &[Row]) -> String {
    // The sum of no numbers is -0, which would be shown.
    let cpu = rows.iter().filter_map(|row| row.rates.cpu_percent);
    let cpu = cpu.fold(0.0, |sum, one| sum + one);
    let memory = rows.iter().filter_map(|row| row.memory);
    let memory = memory.map(|memory| memory.sum_kib()).sum();
    let unknown = || "-".to_owned();
    let cells = |row: &Row| {
        let (pod, rates) = (&row.pod, &row.rates);
        vec![
            text::plain(&pod.namespace),
            text::plain(&pod.id.chars().take(ID).collect::<String>()),
            pod.name.as_deref().map_or_else(unknown, text::short),
            pod.status.word().to_owned(),
            rates
                .cpu_percent
                .map_or_else(unknown, |cpu| format!("{cpu:.1}%")),
            row.memory
                .map_or_else(unknown, |memory| text::mib(memory.sum_kib())),
            rates.read.map_or_else(unknown, a_second),
            rates.written.map_or_else(unknown, a_second),
            rates
                .exits
                .map_or_else(unknown, |exits| format!("{exits:.0}/s")),
        ]
    };
    let headings = [
        "NAMESPACE",
        "POD",
        "NAME",
        "STATUS",
        "CPU",
        "USED",
        "READ",
        "WRITTEN",
        "EXITS",
    ];
    let rows: Vec<_> = rows.iter().map(cells).collect();
    format!(
        "{time}  pods: {}, CPU: {cpu:.1}%, memory used: {}\n{}",
        rows.len(),
        text::mib(memory),
        text::table(&headings, &rows)
    )
}

/// Bytes a second.
fn a_second(bytes: f64) -> String {
    let kib = bytes / 1024.0;
    match kib < 1024.0 {
        true => format!("{kib:.0} KiB/s"),
        false => format!("{:.1} MiB/s", kib / 1024.0),
    }
}

fn value(time: &str, took: Duration, rows: &[Row]) -> Value {
    let pods: Vec<Value> = rows
        .iter()
        .map(|row| {
            row.pod.described(json!({
                "cpu_percent": row.rates.cpu_percent,
                "used_kib": row.memory.map(|memory| memory.sum_kib()),
                "read_bytes_per_second": row.rates.read,
                "written_bytes_per_second": row.rates.written,
                "exits_per_second": row.rates.exits,
            }))
        })
        .collect();
    json!({ "time": time, "seconds": took.as_secs_f64(), "pods": pods })
}

/// Draws over what was drawn before.
fn draw(output: &mut StdoutLock<'_>, table: &str, is_first: bool) -> io::Result<()> {
    // A size of 0 is none.
    let size = tcgetwinsize(&*output)
        .ok()
        .filter(|size| size.ws_row > 1 && size.ws_col > 0);
    let size = size.map_or((24, 80), |size| (size.ws_row.into(), size.ws_col.into()));
    output.write_all(screen(table, size, is_first).as_bytes())
}

/// ECMA-48: erase all (once), go home, and erase what is left of each line and
/// below the last. Whatever is too large is cut, since it would scroll.
fn screen(table: &str, (rows, columns): Size, is_first: bool) -> String {
    let mut screen = String::from(if is_first { "\x1b[2J\x1b[H" } else { "\x1b[H" });
    for line in table.lines().take(rows - 1) {
        screen.extend(line.chars().take(columns));
        screen.push_str("\x1b[K\n");
    }
    screen + "\x1b[J"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::Status;
    use husk_node::state::State;

    fn row(id: &str, cpu_percent: Option<f64>) -> Row {
        let pod = Pod {
            namespace: "k8s.io".into(),
            id: id.into(),
            name: Some("shop/\x1b[2Jweb".into()),
            dir: "/run/husk/k8s.io/a".into(),
            state: State::default(),
            status: Status::Running,
        };
        let memory = Memory {
            guest_kib: 2048,
            ..Memory::default()
        };
        let rates = Rates {
            cpu_percent,
            read: Some(2048.0),
            written: Some(3_145_728.0),
            exits: None,
        };
        Row {
            pod,
            memory: Some(memory),
            rates,
        }
    }

    #[test]
    fn the_busiest_is_first_and_sums_are_above() {
        let mut rows = [row("a", None), row("b", Some(2.0)), row("c", Some(150.25))];
        busiest_first(&mut rows);
        let table = table("now", &rows);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[0], "now  pods: 3, CPU: 152.2%, memory used: 6.0 MiB");
        let words: Vec<_> = lines[2].split_whitespace().collect();
        let expected = [
            "k8s.io",
            "c",
            "shop/\\u{1b}[2Jweb",
            "running",
            "150.2%",
            "2.0",
            "MiB",
            "2",
            "KiB/s",
            "3.0",
            "MiB/s",
            "-",
        ];
        assert_eq!(words, expected);
        assert!(lines[4].contains("  a  "), "{table}");
        let empty = super::table("now", &[]);
        assert!(empty.starts_with("now  pods: 0, CPU: 0.0%, memory used: 0.0 MiB\n"));
        let json = value("now", Duration::from_secs(2), &rows);
        assert_eq!(json["pods"][0]["cpu_percent"], 150.25);
        assert_eq!(json["pods"][2]["cpu_percent"], Value::Null);
    }

    #[test]
    fn a_screen_is_not_scrolled() {
        let shown = screen("abcdef\ngh\nij\n", (3, 4), true);
        assert_eq!(shown, "\x1b[2J\x1b[Habcd\x1b[K\ngh\x1b[K\n\x1b[J");
        assert!(!screen("a\n", (24, 80), false).contains("\x1b[2J"));
    }

    #[test]
    fn another_pod_of_the_same_id_has_used_nothing_yet() {
        let mut pod = row("a", None).pod;
        pod.state.shim = Process::find(std::process::id());
        let usage = |cpu_usec| Usage {
            cpu_usec: Some(cpu_usec),
            ..Usage::default()
        };
        let sample = |at, shim, cpu_usec| Sample {
            at,
            used: BTreeMap::from([(pod.dir.clone(), (shim, usage(cpu_usec)))]),
        };
        let (earlier, shim) = (Instant::now(), pod.state.shim);
        let now = sample(earlier + Duration::from_secs(1), shim, 500_000);
        let same = super::row(pod.clone(), &sample(earlier, shim, 0), &now);
        assert_eq!(same.rates.cpu_percent, Some(50.0));
        let other = super::row(pod.clone(), &sample(earlier, None, 0), &now);
        assert_eq!(other.rates.cpu_percent, None);
    }
}
