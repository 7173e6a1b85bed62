//! Commands that go on until they are interrupted.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::node::{Node, Part, expect, out};

/// The longest that anything here takes on a machine with other work.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command that goes on, and its lines.
struct Following {
    child: Child,
    lines: Receiver<String>,
}

impl Following {
    fn start(node: &Node, words: &[&str]) -> Self {
        let mut command = node.command(words);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in output.lines() {
                let _ = sender.send(line.unwrap());
            }
        });
        Self { child, lines }
    }

    #[track_caller]
    fn next(&self) -> String {
        self.lines.recv_timeout(PATIENCE).unwrap()
    }

    #[track_caller]
    fn expect_event(&self, word: &str, id: &str) -> Value {
        let event: Value = serde_json::from_str(&self.next()).unwrap();
        assert_eq!((&event["event"], &event["id"]), (&json!(word), &json!(id)));
        event
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_happens_to_pods_is_told_at_once() {
    let node = Node::new();
    node.pod("first", "{}");
    let events = Following::start(&node, &["events", "--json"]);
    assert_eq!(
        events.expect_event("present", "first")["status"],
        "abandoned"
    );
    let of_one = Following::start(&node, &["events", "k8s.io/0123abc"]);

    let (mut shim, mut vmm) = (
        Part::start(&["sleep", "100"]),
        Part::start(&["sleep", "100"]),
    );
    let mut state = json!({ "shim": shim.value(), "timeline": { "request_ns": 1_000_000 } });
    node.pod("0123abc", &state.to_string());
    assert_eq!(
        events.expect_event("added", "0123abc")["status"],
        "starting"
    );
    state["vmm"] = vmm.value();
    state["machine"] = json!({});
    state["timeline"]["guest_entered_ns"] = json!(2_000_000);
    state["timeline"]["agent_ready_ns"] = json!(9_000_000);
    node.pod("0123abc", &state.to_string());
    let running = events.expect_event("running", "0123abc");
    assert_eq!(
        (&running["status"], &running["after_ms"]),
        (&json!("running"), &json!(8))
    );
    node.pod("another", "{}");
    events.expect_event("added", "another");
    events.expect_event("abandoned", "another");
    // Nothing is written when these end.
    vmm.end();
    events.expect_event("ended", "0123abc");
    shim.end();
    events.expect_event("abandoned", "0123abc");
    std::fs::remove_file(node.path().join("state/k8s.io/0123abc/state.json")).unwrap();
    events.expect_event("removed", "0123abc");

    // The other may have begun later, and have seen both ends at once.
    let mut told = Vec::new();
    while !told
        .last()
        .is_some_and(|line: &String| line.contains("  removed  "))
    {
        told.push(of_one.next());
    }
    assert!(told.len() >= 2, "{told:?}");
    let is_its = |line: &String| line.contains("  k8s.io/0123abc");
    assert!(told.iter().all(is_its), "{told:?}");
}

#[test]
fn the_first_pod_of_a_node_is_told() {
    let node = Node::new();
    let events = Following::start(&node, &["events", "--json"]);
    for turn in 0..3 {
        let id = format!("pod-{turn}");
        node.pod(&id, "{}");
        let event: Value = serde_json::from_str(&events.next()).unwrap();
        assert_eq!(event["id"], id.as_str());
        if event["event"] == "added" {
            events.expect_event("abandoned", &id);
        } else {
            assert_eq!((turn, &event["event"]), (0, &json!("present")));
        }
        // The directories go as well, and come again.
        node.remove_last(&id);
        events.expect_event("removed", &id);
    }
}

#[test]
fn nobody_is_told_without_end() {
    let node = Node::new();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut child = node.command(&["events"]).stdout(writer).spawn().unwrap();
    drop(reader);
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(began.elapsed() < PATIENCE, "it goes on");
        thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}

#[test]
fn what_pods_use_is_shown_again_and_again() {
    let node = Node::new();
    let busy = Part::start(&["sh", "-c", "while :; do :; done"]);
    let idle = Part::start(&["sleep", "100"]);
    node.pod("idle", &json!({ "shim": idle.value() }).to_string());
    node.pod("zbusy", &json!({ "shim": busy.value() }).to_string());
    let endless = Following::start(&node, &["top", "--interval", "1", "--json"]);
    let began = Instant::now();
    // Where others have much to do, it may get nothing of a processor for a while.
    loop {
        let table: Value = serde_json::from_str(&endless.next()).unwrap();
        assert!(table["seconds"].as_f64() > Some(0.9), "{table}");
        let pods = table["pods"].as_array().unwrap();
        assert_eq!(pods.len(), 2, "{table}");
        let cpu = |at: usize| pods[at]["cpu_percent"].as_f64().unwrap();
        assert!(cpu(0) >= cpu(1), "{table}");
        assert!(pods[0]["used_kib"].as_u64() > Some(0), "{table}");
        if cpu(0) > 0.5 && pods[0]["id"] == "zbusy" {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{table}");
    }
    drop(endless);
    let counted = node.husk(&["top", "--interval", "1", "--count", "2", "--json"]);
    expect(&counted, 0, "");
    assert_eq!(out(&counted).lines().count(), 2, "{}", out(&counted));
    // No terminal: nothing acts on one.
    let shown = node.husk(&["top", "-i", "1", "-n", "1"]);
    expect(&shown, 0, "");
    assert!(!out(&shown).contains('\x1b') && out(&shown).contains("  pods: 2, CPU: "));
    expect(
        &node.husk(&["top", "--interval", "0"]),
        2,
        "0 is not in 1..=3600",
    );
}
