//! What only somebody who has watched can tell: how long starts took, and how
//! often what happened.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;

use husk_node::process::Process;
use husk_node::state::{EndFacts, EndKind};

use crate::events::{self, Event, Known};
use crate::pods::Pod;
use crate::timeline;

/// Upper bounds of the buckets, milliseconds.
const BOUNDS_MS: [u64; 14] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000,
];

/// The name of the whole start among its stages.
const WHOLE: &str = "all";

/// What is counted. A counter that is not there before it is 1 never increases, by
/// what Prometheus sees: each is there from the beginning.
const EVENTS: [Event; 8] = [
    Event::Added,
    Event::Running,
    Event::Created,
    Event::Started,
    Event::Output,
    Event::Ended,
    Event::Abandoned,
    Event::Removed,
];
const KINDS: [EndKind; 9] = [
    EndKind::PoweredOff,
    EndKind::Reset,
    EndKind::Panicked,
    EndKind::Killed,
    EndKind::VmmFailed,
    EndKind::VmmGone,
    EndKind::LostAgent,
    EndKind::LostFileServer,
    EndKind::Unknown,
];

/// How many lengths of time are how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Histogram {
    /// Of each bucket alone, not of those before it.
    buckets: [u64; BOUNDS_MS.len()],
    /// All, also those that are longer than the last bound.
    count: u64,
    sum_ns: u128,
}

/// What has happened since the watch began.
#[derive(Debug, Default)]
pub struct Starts {
    by_stage: BTreeMap<&'static str, Histogram>,
    events: BTreeMap<&'static str, u64>,
    /// Machines that have ended unasked.
    failures: BTreeMap<&'static str, u64>,
    /// Pods that are there whose start has been counted, or was over before.
    counted: BTreeSet<(PathBuf, Option<(u32, u64)>)>,
}

impl Histogram {
    fn add(&mut self, ns: u64) {
        let bucket = BOUNDS_MS.iter().position(|bound| ns <= bound * 1_000_000);
        if let Some(bucket) = bucket {
            self.buckets[bucket] += 1;
        }
        self.count += 1;
        self.sum_ns += u128::from(ns);
    }

    fn write(&self, page: &mut String, name: &str, stage: &str) -> std::fmt::Result {
        let mut below = 0;
        for (bound, count) in BOUNDS_MS.iter().zip(self.buckets) {
            below += count;
            let le = format!("{}.{:03}", bound / 1000, bound % 1000);
            writeln!(
                page,
                "{name}_bucket{{stage=\"{stage}\",le=\"{le}\"}} {below}"
            )?;
        }
        let count = self.count;
        writeln!(
            page,
            "{name}_bucket{{stage=\"{stage}\",le=\"+Inf\"}} {count}"
        )?;
        let (whole, rest) = (self.sum_ns / 1_000_000_000, self.sum_ns % 1_000_000_000);
        writeln!(page, "{name}_sum{{stage=\"{stage}\"}} {whole}.{rest:09}")?;
        writeln!(page, "{name}_count{{stage=\"{stage}\"}} {count}")
    }
}

impl Starts {
    /// Takes note of the pods as they are now; `known` are those of the look
    /// before, if this is not the first.
    pub fn note(&mut self, known: Option<&Known>, now: &Known) {
        let of = |pod: &Pod| (pod.dir.clone(), pod.state.shim.map(key));
        let present: BTreeSet<_> = now.values().map(of).collect();
        self.counted.retain(|pod| present.contains(pod));
        if known.is_some() {
            for (event, _) in events::happened(known, now) {
                *self.events.entry(event.word()).or_default() += 1;
            }
            for end in failures(known, now) {
                *self.failures.entry(end.kind.word()).or_default() += 1;
            }
        }
        for pod in now.values() {
            // When it is over its stages are known; the output is the program's.
            if pod.state.timeline.container_started_ns == 0 || !self.counted.insert(of(pod)) {
                continue;
            }
            // Else each restart of this command would count the same pods again.
            if known.is_some() {
                self.count(pod);
            }
        }
    }

    fn count(&mut self, pod: &Pod) {
        let stages = timeline::stages(&pod.state.timeline);
        let stages = stages.iter().filter(|stage| stage.key != "output");
        let mut whole_ns = 0;
        for stage in stages {
            let histogram = self.by_stage.entry(stage.key).or_default();
            histogram.add(stage.to_ns - stage.from_ns);
            whole_ns = stage.to_ns;
        }
        self.by_stage.entry(WHOLE).or_default().add(whole_ns);
    }

    /// All of it, as the text format wants it.
    ///
    /// # Errors
    /// None while there is memory.
    pub fn page(&self) -> Result<String, std::fmt::Error> {
        let mut page = String::new();
        let name = "husk_starts_seconds";
        writeln!(
            page,
            "# HELP {name} Starts of pods since this endpoint began, up to the first container's \
             program, by stage.\n# TYPE {name} histogram"
        )?;
        for stage in timeline::OF_START.into_iter().chain([WHOLE]) {
            let none = Histogram::default();
            let histogram = self.by_stage.get(stage).unwrap_or(&none);
            histogram.write(&mut page, name, stage)?;
        }
        let name = "husk_events_total";
        writeln!(
            page,
            "# HELP {name} What happened to pods since this endpoint began, as `husk events` tells it.\n\
             # TYPE {name} counter"
        )?;
        for event in EVENTS.map(Event::word) {
            let count = self.events.get(event).unwrap_or(&0);
            writeln!(page, "{name}{{event=\"{event}\"}} {count}")?;
        }
        let name = "husk_failures_total";
        writeln!(
            page,
            "# HELP {name} Machines that ended unasked since this endpoint began, by why.\n\
             # TYPE {name} counter"
        )?;
        for kind in KINDS.map(EndKind::word) {
            let count = self.failures.get(kind).unwrap_or(&0);
            writeln!(page, "{name}{{kind=\"{kind}\"}} {count}")?;
        }
        Ok(page)
    }
}

/// The ends that nobody asked for and that were noted since the look before.
fn failures<'a>(known: Option<&'a Known>, now: &'a Known) -> impl Iterator<Item = &'a EndFacts> {
    let before = move |pod: &Pod| {
        let before = known?.get(&pod.dir)?;
        let is_same = before.state.shim == pod.state.shim;
        before.state.end.as_ref().filter(|_| is_same)
    };
    let new = now.values().filter(move |pod| before(pod).is_none());
    let ends = new.filter_map(|pod| pod.state.end.as_ref());
    ends.filter(|end| !end.was_asked)
}

fn key(process: Process) -> (u32, u64) {
    (process.pid, process.start_ticks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::Status;
    use husk_node::state::{EndKind, State, Timeline};

    fn pod(id: &str, started_ms: u64) -> Pod {
        let at = |ms: u64| 5_000_000_000 + ms * 1_000_000;
        let timeline = Timeline {
            request_ns: at(0),
            vmm_exec_ns: at(10),
            container_started_ns: if started_ms > 0 { at(started_ms) } else { 0 },
            first_output_ns: at(60_000),
            ..Timeline::default()
        };
        Pod {
            namespace: "k8s.io".into(),
            id: id.into(),
            name: None,
            dir: PathBuf::from("/run/husk/k8s.io").join(id),
            state: State {
                timeline,
                ..State::default()
            },
            status: Status::Running,
        }
    }

    fn known(pods: &[Pod]) -> Known {
        let entry = |pod: &Pod| (pod.dir.clone(), pod.clone());
        pods.iter().map(entry).collect()
    }

    #[test]
    fn counters_begin_with_nothing() {
        let page = Starts::default().page().unwrap();
        for line in [
            "husk_starts_seconds_count{stage=\"all\"} 0",
            "husk_starts_seconds_bucket{stage=\"guest\",le=\"+Inf\"} 0",
            "husk_events_total{event=\"first-output\"} 0",
            "husk_failures_total{kind=\"vmm-gone\"} 0",
        ] {
            assert!(page.lines().any(|shown| shown == line), "{page}");
        }
        // What no event is counted as is no event.
        let words = EVENTS.map(Event::word);
        assert!(!words.contains(&Event::Present.word()));
    }

    #[test]
    fn each_start_is_counted_once() {
        let mut starts = Starts::default();
        let first = known(&[pod("old", 40)]);
        starts.note(None, &first);
        let starting = known(&[pod("old", 40), pod("new", 0)]);
        starts.note(Some(&first), &starting);
        assert_eq!(starts.by_stage.len(), 0);
        let started = known(&[pod("old", 40), pod("new", 150)]);
        starts.note(Some(&starting), &started);
        starts.note(Some(&started), &started);
        let page = starts.page().unwrap();
        for line in [
            "husk_starts_seconds_bucket{stage=\"node\",le=\"0.005\"} 0",
            "husk_starts_seconds_bucket{stage=\"node\",le=\"0.010\"} 1",
            "husk_starts_seconds_bucket{stage=\"node\",le=\"30.000\"} 1",
            "husk_starts_seconds_bucket{stage=\"all\",le=\"0.100\"} 0",
            "husk_starts_seconds_bucket{stage=\"all\",le=\"0.200\"} 1",
            "husk_starts_seconds_bucket{stage=\"all\",le=\"+Inf\"} 1",
            "husk_starts_seconds_sum{stage=\"all\"} 0.150000000",
            "husk_starts_seconds_count{stage=\"start\"} 1",
            "husk_events_total{event=\"added\"} 1",
            "husk_events_total{event=\"container-started\"} 1",
        ] {
            assert!(
                page.lines().any(|shown| shown == line),
                "{page} lacks {line}"
            );
        }
        assert!(
            !page.contains("stage=\"output\"") && !page.contains("present"),
            "{page}"
        );

        // Gone, and come again under the same name.
        let nothing = known(&[]);
        starts.note(Some(&started), &nothing);
        starts.note(Some(&nothing), &started);
        assert_eq!(starts.by_stage[WHOLE].count, 3);
        assert_eq!(starts.events["removed"], 2);
    }

    #[test]
    fn ends_that_nobody_asked_for_are_counted_once() {
        let mut starts = Starts::default();
        let mut pods = [pod("a", 40), pod("b", 40)];
        let running = known(&pods);
        starts.note(None, &running);
        // The VMM's end is seen before the shim has said why.
        pods[0].status = Status::Ended;
        let gone = known(&pods);
        starts.note(Some(&running), &gone);
        for (pod, was_asked) in pods.iter_mut().zip([false, true]) {
            pod.state.end = Some(EndFacts {
                kind: EndKind::Panicked,
                was_asked,
                ..EndFacts::default()
            });
        }
        let told = known(&pods);
        starts.note(Some(&gone), &told);
        starts.note(Some(&told), &told);
        let page = starts.page().unwrap();
        let line = "husk_failures_total{kind=\"panicked\"} 1";
        assert!(page.lines().any(|shown| shown == line), "{page}");
    }

    #[test]
    fn what_takes_longest_is_in_no_bucket() {
        let mut histogram = Histogram::default();
        histogram.add(u64::MAX);
        histogram.add(30_000_000_000);
        assert_eq!((histogram.count, histogram.buckets[13]), (2, 1));
        let mut page = String::new();
        histogram.write(&mut page, "a", "b").unwrap();
        assert!(
            page.ends_with("a_sum{stage=\"b\"} 18446744103.709551615\na_count{stage=\"b\"} 2\n")
        );
    }
}
