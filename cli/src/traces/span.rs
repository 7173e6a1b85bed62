//! Spans: requests as parts of others' traces, starts as traces of their own, and
//! below them what was done when.

use std::time::{SystemTime, UNIX_EPOCH};

use husk_node::state::Timeline;
use husk_node::trace::{Request, stage};
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{ClockId, clock_gettime};

use crate::pods::Pod;
use crate::timeline;

/// A span, times in nanoseconds since the epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its trace.
    pub trace: u128,
    /// It.
    pub id: u64,
    /// The one that it is a part of; 0: none.
    pub parent: u64,
    /// That is somebody else's.
    pub is_remote: bool,
    /// What was done.
    pub name: String,
    /// When it began.
    pub begin_ns: u64,
    /// When it was over.
    pub end_ns: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// What else there is to tell.
    pub attributes: Vec<(&'static str, String)>,
}

/// What `CLOCK_MONOTONIC` is by the wall's clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    wall_ns: u64,
    monotonic_ns: u64,
}

impl Clock {
    /// Both of now.
    pub fn now() -> Self {
        let monotonic = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(monotonic.tv_sec).unwrap_or(0);
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            wall_ns: since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0)),
            monotonic_ns: seconds * 1_000_000_000 + u64::try_from(monotonic.tv_nsec).unwrap_or(0),
        }
    }

    fn wall(self, monotonic_ns: u64) -> u64 {
        let ago = self.monotonic_ns.saturating_sub(monotonic_ns);
        self.wall_ns.saturating_sub(ago)
    }
}

/// A part of something, by `CLOCK_MONOTONIC`.
struct Part<'a> {
    key: &'a str,
    what: &'a str,
    from_ns: u64,
    to_ns: u64,
}

/// The spans of a request that is part of a trace, its own first.
pub fn of_request(pod: &Pod, request: &Request, timeline: &Timeline, clock: Clock) -> Vec<Span> {
    let mut attributes = of_pod(pod);
    attributes.push(("container.id", request.container.clone()));
    if !request.exec.is_empty() {
        attributes.push(("husk.exec.id", request.exec.clone()));
    }
    let whole = Span {
        trace: request.parent.trace,
        id: random(),
        parent: request.parent.span,
        is_remote: true,
        name: request.method.clone(),
        begin_ns: clock.wall(request.begin_ns),
        end_ns: clock.wall(request.end_ns.max(request.begin_ns)),
        error: request.error.clone(),
        attributes,
    };
    let mut from_ns = request.begin_ns;
    let own = request.stages.iter().map(|stage| {
        let part = Part {
            key: &stage.what,
            what: what(&stage.what),
            from_ns,
            to_ns: stage.end_ns.max(from_ns),
        };
        from_ns = part.to_ns;
        part
    });
    let own: Vec<Part<'_>> = own.collect();
    let is_in = |at: u64| request.begin_ns <= at && at <= request.end_ns;
    // Where the request has told more of it already.
    let has_own = !own.is_empty();
    let is_told = |part: &Part<'_>| has_own && matches!(part.key, stage::CREATE | stage::START);
    let of_start = parts(timeline).filter(|part| is_in(part.to_ns) && !is_told(part));
    let of_start = of_start.map(|part| Part {
        from_ns: part.from_ns.max(request.begin_ns),
        ..part
    });
    let mut spans = vec![whole];
    let parts: Vec<_> = of_start.chain(own).collect();
    add(&mut spans, parts, timeline, clock);
    spans
}

/// The spans of a start that nobody else traces, the whole of it first.
pub fn of_start(pod: &Pod, clock: Clock) -> Vec<Span> {
    let timeline = &pod.state.timeline;
    let parts: Vec<_> = parts(timeline).collect();
    let end_ns = parts.last().map_or(timeline.request_ns, |part| part.to_ns);
    let whole = Span {
        trace: (u128::from(random()) << 64) | u128::from(random()),
        id: random(),
        parent: 0,
        is_remote: false,
        name: "start of a pod".into(),
        begin_ns: clock.wall(timeline.request_ns),
        end_ns: clock.wall(end_ns),
        error: None,
        attributes: of_pod(pod),
    };
    let mut spans = vec![whole];
    add(&mut spans, parts, timeline, clock);
    spans
}

/// Adds the parts of the first span.
fn add(spans: &mut Vec<Span>, parts: Vec<Part<'_>>, timeline: &Timeline, clock: Clock) {
    let Some(whole) = spans.first() else { return };
    let (trace, whole) = (whole.trace, whole.id);
    let span = |part: &Part<'_>, parent| Span {
        trace,
        id: random(),
        parent,
        is_remote: false,
        name: part.what.to_owned(),
        begin_ns: clock.wall(part.from_ns),
        end_ns: clock.wall(part.to_ns),
        error: None,
        attributes: vec![("husk.stage", part.key.to_owned())],
    };
    for part in parts {
        let of_part = span(&part, whole);
        let id = of_part.id;
        spans.push(of_part);
        if part.key == "guest" {
            let halves = halves(&part, timeline.agent_began_ns);
            spans.extend(halves.iter().flatten().map(|half| span(half, id)));
        }
    }
}

/// Those of a start up to the first container's program; its output is its own.
fn parts(timeline: &Timeline) -> impl Iterator<Item = Part<'static>> {
    let at = |since: u64| timeline.request_ns.saturating_add(since);
    let stages = timeline::stages(timeline).into_iter();
    let stages = stages.filter(|stage| stage.key != "output");
    stages.map(move |stage| Part {
        key: stage.key,
        what: stage.what,
        from_ns: at(stage.from_ns),
        to_ns: at(stage.to_ns),
    })
}

/// The kernel's part of a boot and the agent's, where that has told when it began.
fn halves(guest: &Part<'_>, agent_began_ns: u64) -> Option<[Part<'static>; 2]> {
    if agent_began_ns == 0 {
        return None;
    }
    let between = agent_began_ns.clamp(guest.from_ns, guest.to_ns);
    let half = |key, what, from_ns, to_ns| Part {
        key,
        what,
        from_ns,
        to_ns,
    };
    Some([
        half("guest-kernel", "guest: kernel", guest.from_ns, between),
        half("guest-agent", "guest: agent", between, guest.to_ns),
    ])
}

fn what(stage: &str) -> &str {
    match stage {
        stage::FILES => "node: root file system and volumes",
        stage::CREATE => "guest: the container is created",
        stage::NETWORK => "node: network",
        stage::START => "guest: the program is executed",
        stage::STREAMS => "node: streams",
        stage::EXEC => "guest: the added program is executed",
        other => other,
    }
}

/// By the names that OpenTelemetry has for them, where it has some.
fn of_pod(pod: &Pod) -> Vec<(&'static str, String)> {
    let mut attributes = vec![
        ("husk.pod.id", pod.id.clone()),
        ("husk.namespace", pod.namespace.clone()),
    ];
    let machine = pod.state.machine.as_ref();
    if let Some(template) = machine.and_then(|machine| machine.template.clone()) {
        attributes.push(("husk.template", template));
    }
    let name = pod.name.as_deref().and_then(|name| name.split_once('/'));
    if let Some((namespace, name)) = name {
        attributes.push(("k8s.namespace.name", namespace.to_owned()));
        attributes.push(("k8s.pod.name", name.to_owned()));
    }
    attributes
}

/// Not 0, which is no id.
fn random() -> u64 {
    let mut bytes = [0; 8];
    loop {
        // So few bytes come at once, or not at all: while a node boots.
        let got = getrandom(&mut bytes, GetRandomFlags::empty());
        let number = u64::from_ne_bytes(bytes);
        if got == Ok(bytes.len()) && number > 0 {
            return number;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::Status;
    use husk_node::state::State;
    use husk_node::trace::{Parent, Stage};

    const CLOCK: Clock = Clock {
        wall_ns: 1_000_000,
        monotonic_ns: 600_000,
    };

    fn pod(timeline: Timeline) -> Pod {
        Pod {
            namespace: "k8s.io".into(),
            id: "abc".into(),
            name: Some("shop/web".into()),
            dir: "/run/husk/k8s.io/abc".into(),
            state: State {
                timeline,
                ..State::default()
            },
            status: Status::Running,
        }
    }

    fn timeline() -> Timeline {
        Timeline {
            request_ns: 1000,
            vmm_exec_ns: 1010,
            guest_entered_ns: 1030,
            agent_began_ns: 1050,
            agent_ready_ns: 1060,
            container_created_ns: 2080,
            container_started_ns: 3090,
            first_output_ns: 3100,
            ..Timeline::default()
        }
    }

    fn request(method: &str, begin_ns: u64, end_ns: u64, stages: &[(&str, u64)]) -> Request {
        let stage = |&(what, end_ns): &(&str, u64)| Stage {
            what: what.to_owned(),
            end_ns,
        };
        Request {
            parent: Parent::read("00-0000000000000000000000000000abcd-000000000000000f-01")
                .unwrap(),
            method: method.into(),
            container: "web".into(),
            exec: String::new(),
            begin_ns,
            end_ns,
            error: None,
            stages: stages.iter().map(stage).collect(),
        }
    }

    /// Names of spans, of what they are below, and when they were.
    fn told(spans: &[Span]) -> Vec<(&str, &str, u64, u64)> {
        let name = |id: u64| spans.iter().find(|span| span.id == id);
        let name = |id| name(id).map_or("", |span| &span.name);
        let base = CLOCK.wall(0);
        spans
            .iter()
            .map(|span| {
                let (begin, end) = (span.begin_ns - base, span.end_ns - base);
                (&span.name[..], name(span.parent), begin, end)
            })
            .collect()
    }

    #[test]
    fn stages_are_below_the_request_that_did_them() {
        let pod = pod(timeline());
        let of = |request: &Request| of_request(&pod, request, &timeline(), CLOCK);
        let sandbox = of(&request("Create", 990, 1070, &[]));
        assert_eq!(
            told(&sandbox),
            [
                ("Create", "", 990, 1070),
                ("node: mounts, network, VMM's program", "Create", 1000, 1010),
                ("VMM: the machine is built", "Create", 1010, 1030),
                ("guest: kernel and agent", "Create", 1030, 1060),
                ("guest: kernel", "guest: kernel and agent", 1030, 1050),
                ("guest: agent", "guest: kernel and agent", 1050, 1060),
            ]
        );
        assert!(sandbox[0].is_remote && sandbox[0].parent == 15);
        assert!(sandbox.iter().all(|span| span.trace == 0xabcd));
        let attributes = &sandbox[0].attributes;
        assert!(
            attributes.contains(&("k8s.pod.name", "web".into())),
            "{attributes:?}"
        );

        // A container of its own: what it has told is not told twice.
        let stages = [("files", 2010), ("create", 2070)];
        let created = of(&request("Create", 2000, 2090, &stages));
        assert_eq!(
            told(&created),
            [
                ("Create", "", 2000, 2090),
                ("node: root file system and volumes", "Create", 2000, 2010),
                ("guest: the container is created", "Create", 2010, 2070),
            ]
        );
        // One that is the pod: it began before containerd asked for its start.
        let started = of(&request("Start", 3000, 3095, &[]));
        assert_eq!(
            told(&started)[1],
            ("first container: executed", "Start", 3000, 3090)
        );
        // What a later shim tells.
        let odd = of(&request(
            "Melt",
            4000,
            3999,
            &[("news", 3), ("more", u64::MAX)],
        ));
        assert_eq!(told(&odd)[1], ("news", "Melt", 4000, 4000));
        assert_eq!(odd.len(), 3);
    }

    #[test]
    fn a_start_is_a_trace() {
        let spans = of_start(&pod(timeline()), CLOCK);
        let told = told(&spans);
        assert_eq!(told[0], ("start of a pod", "", 1000, 3090));
        assert_eq!(told.len(), 8, "{told:?}");
        assert_eq!(told[7].1, "start of a pod");
        assert!(spans[0].trace > u128::from(u64::MAX) && !spans[0].is_remote);
        // One from a template has no kernel that boots.
        let restored = Timeline {
            agent_began_ns: 0,
            ..timeline()
        };
        assert_eq!(of_start(&pod(restored), CLOCK).len(), 6);
        // An agent that lies.
        let lies = Timeline {
            agent_began_ns: u64::MAX,
            ..timeline()
        };
        let lies = of_start(&pod(lies), CLOCK);
        assert!(
            lies.iter().all(|span| span.begin_ns <= span.end_ns),
            "{lies:?}"
        );
    }
}
