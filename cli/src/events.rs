//! `husk events`: what happens to the pods of this node.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::event::PollFlags;
use serde_json::json;

use crate::answer::Answer;
use crate::pods::{self, Pod, Status};
use crate::text;

pub mod watch;

use watch::Watch;

/// How soon after a machine's end its shim says why.
const EXPLAINED: Duration = Duration::from_millis(200);

/// The pods, by their directories.
pub type Known = BTreeMap<PathBuf, Pod>;

/// What has happened to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It was there when the command began.
    Present,
    /// Its shim has begun.
    Added,
    /// Its machine is ready.
    Running,
    /// Its first container is made.
    Created,
    /// Its first container's program runs.
    Started,
    /// That program has said something.
    Output,
    /// Its machine is gone.
    Ended,
    /// Its shim is gone.
    Abandoned,
    /// Nothing is left of it.
    Removed,
}

impl Event {
    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Added => "added",
            Self::Running => "running",
            Self::Created => "container-created",
            Self::Started => "container-started",
            Self::Output => "first-output",
            Self::Ended => "ended",
            Self::Abandoned => "abandoned",
            Self::Removed => "removed",
        }
    }

    /// The moment at which the shim has noted it; 0: not yet, or never.
    fn moment_ns(self, pod: &Pod) -> u64 {
        let timeline = &pod.state.timeline;
        match self {
            Self::Running => timeline.agent_ready_ns,
            Self::Created => timeline.container_created_ns,
            Self::Started => timeline.container_started_ns,
            Self::Output => timeline.first_output_ns,
            _ => 0,
        }
    }

    /// Why the machine is gone, where this is what has happened.
    fn end(self, pod: &Pod) -> Option<&str> {
        let end = pod.state.end.as_ref().filter(|_| self == Self::Ended)?;
        Some(&end.reason)
    }

    /// How long after containerd's request it was.
    fn after_ms(self, pod: &Pod) -> Option<u64> {
        let moment = self.moment_ns(pod);
        let after = moment.checked_sub(pod.state.timeline.request_ns)?;
        (moment > 0).then_some(after / 1_000_000)
    }
}

/// Tells until it is interrupted, or nobody reads any more.
///
/// # Errors
/// The pods are not for this user, or cannot be watched.
pub fn run(pod: Option<&str>, json: bool) -> anyhow::Result<Answer> {
    Answer::streamed(follow(pod, json))
}

fn follow(only: Option<&str>, json: bool) -> anyhow::Result<()> {
    let state_dir = pods::state_dir()?;
    // For the sake of its message, where that is refused.
    pods::all(&state_dir)?;
    let mut watch = Watch::new(state_dir.clone())?;
    let mut output = io::stdout().lock();
    let mut known: Option<Known> = None;
    loop {
        // Whatever comes after this is told, though the look may have seen it.
        watch.arm()?;
        let mut now = look(&state_dir, known.as_ref())?;
        let time = SystemTime::now();
        if happened(known.as_ref(), &now).iter().any(is_unexplained) {
            thread::sleep(EXPLAINED);
            now = look(&state_dir, known.as_ref())?;
        }
        for (event, pod) in happened(known.as_ref(), &now) {
            if only.is_none_or(|only| pod.answers_to(only)) {
                output.write_all(line(event, pod, time, json).as_bytes())?;
            }
        }
        output.flush()?;
        // Of what is written to only its end is ever told.
        let written = watch.wait(now.values(), Some((output.as_fd(), PollFlags::empty())))?;
        if written.contains(PollFlags::ERR) {
            return Ok(());
        }
        known = Some(now);
    }
}

/// The machine has just gone, and its shim has not said why.
fn is_unexplained((event, pod): &(Event, &Pod)) -> bool {
    *event == Event::Ended && pod.state.end.is_none()
}

/// The pods of now. Names are looked up once, since that takes longest.
///
/// # Errors
/// The directory is not for this user.
pub fn look(state_dir: &Path, known: Option<&Known>) -> anyhow::Result<Known> {
    let pods = pods::all_named(state_dir, |dir, state| {
        let before = known.and_then(|known| known.get(dir));
        match before.filter(|pod| pod.state.shim == state.shim) {
            Some(pod) => pod.name.clone(),
            None => pods::name_of(state),
        }
    })?;
    Ok(pods.into_iter().map(|pod| (pod.dir.clone(), pod)).collect())
}

/// What has happened between two looks, pod by pod.
pub fn happened<'a>(known: Option<&'a Known>, now: &'a Known) -> Vec<(Event, &'a Pod)> {
    let Some(known) = known else {
        return now.values().map(|pod| (Event::Present, pod)).collect();
    };
    let mut events = Vec::new();
    for (dir, before) in known {
        // Another may have its id.
        let is_same = |pod: &&Pod| pod.state.shim == before.state.shim;
        if now.get(dir).filter(is_same).is_none() {
            events.push((Event::Removed, before));
        }
    }
    for (dir, pod) in now {
        let is_same = |before: &&Pod| before.state.shim == pod.state.shim;
        let before = known.get(dir).filter(is_same);
        let of_pod = of_pod(before, pod);
        events.extend(of_pod.into_iter().map(|event| (event, pod)));
    }
    events
}

/// What has happened to a pod since it was `before`.
fn of_pod(before: Option<&Pod>, now: &Pod) -> Vec<Event> {
    let mut events = Vec::new();
    if before.is_none() {
        events.push(Event::Added);
    }
    let is_over = |event: Event, pod: &Pod| event.moment_ns(pod) > 0;
    for event in [
        Event::Running,
        Event::Created,
        Event::Started,
        Event::Output,
    ] {
        if is_over(event, now) && !before.is_some_and(|before| is_over(event, before)) {
            events.push(event);
        }
    }
    if before.map(|before| before.status) != Some(now.status) {
        match now.status {
            Status::Ended => events.push(Event::Ended),
            Status::Abandoned => events.push(Event::Abandoned),
            Status::Starting | Status::Running => {}
        }
    }
    events
}

fn line(event: Event, pod: &Pod, time: SystemTime, json: bool) -> String {
    let (time, word, after) = (text::utc(time), event.word(), event.after_ms(pod));
    if json {
        let value = json!({
            "time": time,
            "event": word,
            "namespace": pod.namespace,
            "id": pod.id,
            "name": pod.name,
            "status": pod.status.word(),
            "after_ms": after,
            "end": event.end(pod),
        });
        return text::ascii(&value.to_string()) + "\n";
    }
    let mut line = format!("{time}  {word:<17}  {}/{}", pod.namespace, pod.id);
    if let Some(name) = &pod.name {
        line.push_str(&format!("  {name}"));
    }
    if let Some(end) = event.end(pod) {
        line.push_str(&format!("  {end}"));
    }
    if event == Event::Present {
        line.push_str(&format!("  {}", pod.status.word()));
    }
    if let Some(after) = after {
        line.push_str(&format!("  {after} ms after the request"));
    }
    text::plain(&line) + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_node::process::Process;
    use husk_node::state::{EndFacts, State};
    use std::time::UNIX_EPOCH;

    fn pod(id: &str, shim: u32, status: Status) -> Pod {
        Pod {
            namespace: "k8s.io".into(),
            id: id.into(),
            name: Some("shop/web".into()),
            dir: PathBuf::from("/run/husk/k8s.io").join(id),
            state: State {
                shim: Some(Process {
                    pid: shim,
                    start_ticks: 1,
                }),
                ..State::default()
            },
            status,
        }
    }

    fn known(pods: &[Pod]) -> Known {
        let entry = |pod: &Pod| (pod.dir.clone(), pod.clone());
        pods.iter().map(entry).collect()
    }

    fn words(before: &Known, now: &Known) -> Vec<String> {
        let word = |(event, pod): (Event, &Pod)| format!("{} {}", event.word(), pod.id);
        happened(Some(before), now).into_iter().map(word).collect()
    }

    #[test]
    fn a_pods_life_is_told_once() {
        let nothing = known(&[]);
        let mut web = pod("a", 7, Status::Starting);
        let starting = known(std::slice::from_ref(&web));
        let told = happened(None, &starting);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].0, Event::Present);
        assert_eq!(words(&nothing, &starting), ["added a"]);
        assert!(words(&starting, &starting).is_empty());

        web.state.timeline.agent_ready_ns = 5_000_000;
        web.status = Status::Running;
        let running = known(std::slice::from_ref(&web));
        assert_eq!(words(&starting, &running), ["running a"]);
        web.state.timeline.container_created_ns = 6_000_000;
        web.state.timeline.container_started_ns = 7_000_000;
        web.status = Status::Ended;
        let ended = known(std::slice::from_ref(&web));
        let all = ["container-created a", "container-started a", "ended a"];
        assert_eq!(words(&running, &ended), all);
        // One that was missed altogether until it had ended.
        let missed = words(&nothing, &ended);
        assert_eq!(missed.len(), 5, "{missed:?}");
        web.status = Status::Abandoned;
        let abandoned = known(&[web]);
        assert_eq!(words(&ended, &abandoned), ["abandoned a"]);
        assert_eq!(words(&abandoned, &nothing), ["removed a"]);
    }

    #[test]
    fn another_pod_of_the_same_id_is_another() {
        let one = known(&[pod("a", 7, Status::Running)]);
        let other = known(&[pod("a", 8, Status::Starting)]);
        assert_eq!(words(&one, &other), ["removed a", "added a"]);
    }

    #[test]
    fn lines_act_on_no_terminal() {
        let time = UNIX_EPOCH + Duration::from_secs(60);
        let mut web = pod("a", 7, Status::Running);
        web.name = Some("shop/\x1b[2Jweb".into());
        web.state.timeline.request_ns = 1_000_000;
        web.state.timeline.agent_ready_ns = 232_900_000;
        assert_eq!(
            line(Event::Running, &web, time, false),
            "1970-01-01T00:01:00.000Z  running            k8s.io/a  shop/\\u{1b}[2Jweb  \
             231 ms after the request\n"
        );
        assert!(line(Event::Present, &web, time, false).ends_with("web  running\n"));
        let json = line(Event::Running, &web, time, true);
        assert!(json.ends_with("}\n") && json.is_ascii() && json.lines().count() == 1);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            (&value["event"], &value["after_ms"]),
            (&json!("running"), &json!(231))
        );
        assert_eq!(value["name"], "shop/\x1b[2Jweb");
        web.state.end = Some(EndFacts {
            reason: "the guest reset itself".into(),
            ..EndFacts::default()
        });
        let ended = line(Event::Ended, &web, time, false);
        assert!(ended.ends_with("web  the guest reset itself\n"), "{ended}");
        // Of another clock.
        web.state.timeline.request_ns = u64::MAX;
        assert_eq!(Event::Running.after_ms(&web), None);
    }
}
