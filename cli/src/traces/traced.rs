//! What is told of which pod.

use std::collections::BTreeMap;
use std::path::PathBuf;

use husk_node::process::Process;
use husk_node::state::Timeline;
use husk_node::trace::Line;

use super::file::Lines;
use super::span::{self, Clock, Span};
use crate::events::Known;
use crate::pods::Pod;

/// A pod's directory and its shim: another may have its id.
type Key = (PathBuf, Option<(u32, u64)>);

/// The pods of the last look.
#[derive(Debug, Default)]
pub struct Traced {
    /// None: nothing has been looked at.
    pods: Option<BTreeMap<Key, Followed>>,
}

/// A pod.
#[derive(Debug)]
struct Followed {
    pod: Pod,
    /// What its shim writes down, where containerd traces it.
    lines: Option<Lines>,
    timeline: Timeline,
    /// Its start is told of, or is no more to be.
    is_told: bool,
}

impl Traced {
    /// The spans of what has been done since the last look. What was over before the
    /// first one is none of them, or each restart of this command would tell it again.
    pub fn note(&mut self, now: &Known, clock: Clock) -> Vec<Span> {
        let is_first = self.pods.is_none();
        let mut before = self.pods.take().unwrap_or_default();
        let mut spans = Vec::new();
        let mut pods = BTreeMap::new();
        for pod in now.values() {
            let key = (pod.dir.clone(), pod.state.shim.map(key));
            let mut followed = before
                .remove(&key)
                .unwrap_or_else(|| Followed::new(pod.clone(), is_first));
            followed.pod = pod.clone();
            spans.extend(followed.note(clock));
            pods.insert(key, followed);
        }
        // Those that are gone may have said something at last.
        for mut gone in before.into_values() {
            spans.extend(gone.requests(clock));
        }
        self.pods = Some(pods);
        spans
    }
}

impl Followed {
    fn new(pod: Pod, is_first: bool) -> Self {
        let mut followed = Self {
            lines: None,
            timeline: Timeline::default(),
            is_told: is_first && pod.state.timeline.container_started_ns > 0,
            pod,
        };
        if is_first {
            followed.lines = Lines::open(&followed.pod.dir);
            followed.read();
        }
        followed
    }

    fn note(&mut self, clock: Clock) -> Vec<Span> {
        if self.lines.is_none() {
            self.lines = Lines::open(&self.pod.dir);
        }
        let mut spans = self.requests(clock);
        // When it is over its stages are known.
        if !self.is_told && self.pod.state.timeline.container_started_ns > 0 {
            self.is_told = true;
            // Somebody else's trace has it already, or is not to be recorded.
            if self.lines.is_none() {
                spans.extend(span::of_start(&self.pod, clock));
            }
        }
        spans
    }

    fn requests(&mut self, clock: Clock) -> Vec<Span> {
        let mut spans = Vec::new();
        for request in self.read() {
            spans.extend(span::of_request(&self.pod, &request, &self.timeline, clock));
        }
        spans
    }

    /// Takes note of what the shim has written down since, and answers the requests.
    fn read(&mut self) -> Vec<husk_node::trace::Request> {
        let mut requests = Vec::new();
        for line in self.lines.iter_mut().flat_map(Lines::read) {
            match line {
                Line::Timeline(timeline) => self.timeline = timeline,
                Line::Request(request) => requests.push(request),
            }
        }
        requests
    }
}

fn key(process: Process) -> (u32, u64) {
    (process.pid, process.start_ticks)
}
