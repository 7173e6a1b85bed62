//! `husk logs`: what belongs to a pod in containerd's log.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use husk_node::pod_log;

use crate::answer::{Answer, NoPod};
use crate::arguments::LogArguments;
use crate::pods;
use crate::text;

/// Units that may run the engine whose log has the shims' lines.
const UNITS: [&str; 3] = ["containerd", "docker", "crio"];

/// Longest line; the shim's are shorter.
const LINE: u64 = 64 << 10;

/// Shows the lines of a pod.
///
/// # Errors
/// There are none, or of several pods, or the log cannot be read.
pub fn run(asked: &LogArguments, json: bool) -> anyhow::Result<Answer> {
    // One that is gone is known by its id alone.
    let found = pods::state_dir().and_then(|dir| pods::find(&dir, &asked.pod));
    let id = found.map_or_else(|_| asked.pod.clone(), |pod| pod.id);
    let lines = match &asked.file {
        Some(path) => {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            of_pod(BufReader::new(file), &id, asked.lines)?
        }
        None => journal(asked.since.as_deref(), |log| of_pod(log, &id, asked.lines))?,
    };
    if json {
        return Answer::json(&lines);
    }
    let lines = lines.iter().map(|line| text::plain(line) + "\n");
    Ok(Answer::done(lines.collect()))
}

/// Gives the engines' journal to `read`.
///
/// # Errors
/// There is no journal, or what `read` says.
pub fn journal<T>(
    since: Option<&str>,
    read: impl FnOnce(BufReader<&mut dyn Read>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut command = Command::new("journalctl");
    command.args(["--quiet", "--no-pager", "--output=cat"]);
    command.args(UNITS.map(|unit| format!("--unit={unit}")));
    command.args(since.map(|since| format!("--since={since}")));
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command
        .spawn()
        .context("journalctl (without a journal, --file names containerd's log)")?;
    let mut output = child.stdout.take().context("journalctl has no output")?;
    let answer = read(BufReader::new(&mut output as &mut dyn Read));
    drop(output);
    let status = child.wait()?;
    let answer = answer?;
    ensure!(status.success(), "journalctl: {status}");
    Ok(answer)
}

/// The last lines of the one pod whose id begins so.
fn of_pod(log: impl BufRead, id: &str, most: usize) -> anyhow::Result<VecDeque<String>> {
    let mut ids = BTreeSet::new();
    let lines = last(log, most, |pod| {
        let is_its = pod.starts_with(id);
        if is_its && ids.len() < 8 {
            ids.insert(pod.to_owned());
        }
        is_its
    })?;
    // The whole id of one may be the beginning of another's.
    let ids: Vec<_> = ids.into_iter().collect();
    match &ids[..] {
        [_] => Ok(lines),
        [] => Err(NoPod(format!("containerd's log has nothing of a pod {id:?}")).into()),
        _ => Err(NoPod(format!("{id:?} may be {}", ids.join(", "))).into()),
    }
}

/// The last lines of the pods that are meant.
///
/// # Errors
/// The log cannot be read.
pub fn last(
    mut log: impl BufRead,
    most: usize,
    mut is_meant: impl FnMut(&str) -> bool,
) -> io::Result<VecDeque<String>> {
    let mut lines = VecDeque::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut log).take(LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(lines);
        }
        let line = String::from_utf8_lossy(&line);
        if pod_log::pod_of(&line).is_some_and(&mut is_meant) {
            lines.push_back(line.trim_end().to_owned());
            if lines.len() > most {
                lines.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> String {
        let line = |id, text: &str| {
            let mark = pod_log::mark("k8s.io", id);
            format!("time=\"1\" level=info msg=\"guest\"{mark} console={text:?}\n")
        };
        let own = "time=\"1\" level=info msg=\"of containerd\"\n";
        [
            own,
            &line("a1", "one"),
            &line("a2", "other"),
            &line("a1", "\x1b[2J"),
            own,
        ]
        .concat()
    }

    #[test]
    fn shows_one_pod_alone() {
        let lines = of_pod(log().as_bytes(), "a1", 10).unwrap();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].ends_with("console=\"one\""), "{lines:?}");
        assert_eq!(of_pod(log().as_bytes(), "a1", 1).unwrap().len(), 1);
        for (id, words) in [("a", "a1, a2"), ("b", "nothing of a pod")] {
            let error = of_pod(log().as_bytes(), id, 10).unwrap_err();
            assert!(
                error.is::<NoPod>() && error.to_string().contains(words),
                "{error}"
            );
        }
    }
}
