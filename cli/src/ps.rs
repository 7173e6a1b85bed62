//! `husk ps`.

use serde_json::{Value, json};

use crate::answer::Answer;
use crate::memory::Memory;
use crate::pods::{self, Pod};
use crate::text;

/// Longest id shown; `--json` tells all of it.
const ID: usize = 20;

/// Lists the pods.
///
/// # Errors
/// They are not for this user.
pub fn run(json: bool) -> anyhow::Result<Answer> {
    let pods = pods::with_memory()?;
    if json {
        let list: Vec<Value> = pods.iter().map(|(pod, used)| value(pod, *used)).collect();
        return Answer::json(&list);
    }
    Ok(Answer::done(list(&pods)))
}

/// A pod in JSON.
pub fn value(pod: &Pod, memory: Option<Memory>) -> Value {
    let machine = pod.state.machine.as_ref();
    pod.described(json!({
        "vcpus": machine.map(|machine| machine.vcpus),
        "memory_mib": machine.map(|machine| machine.memory_mib),
        "used_kib": memory.map(|memory| memory.sum_kib()),
        "end": pod.state.end.as_ref().map(|end| &end.reason),
    }))
}

fn status(pod: &Pod) -> String {
    match pod.failure() {
        Some(failure) => text::short(&format!("{}: {failure}", pod.status.word())),
        None => pod.status.word().to_owned(),
    }
}

fn list(pods: &[(Pod, Option<Memory>)]) -> String {
    let unknown = || "-".to_owned();
    let row = |(pod, memory): &(Pod, Option<Memory>)| {
        let machine = pod.state.machine.as_ref();
        vec![
            text::plain(&pod.namespace),
            text::plain(&pod.id.chars().take(ID).collect::<String>()),
            pod.name.as_deref().map_or_else(unknown, text::short),
            status(pod),
            pod.age().map_or_else(unknown, text::age),
            machine.map_or_else(unknown, |machine| machine.vcpus.to_string()),
            machine.map_or_else(unknown, |machine| format!("{} MiB", machine.memory_mib)),
            memory.map_or_else(unknown, |memory| text::mib(memory.sum_kib())),
        ]
    };
    let headings = [
        "NAMESPACE",
        "POD",
        "NAME",
        "STATUS",
        "AGE",
        "CPUS",
        "MEMORY",
        "USED",
    ];
    text::table(&headings, &pods.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::Status;
    use husk_node::state::{EndFacts, MachineFacts, State};

    #[test]
    fn a_line_a_pod() {
        let machine = MachineFacts {
            vcpus: 2,
            memory_mib: 512,
            ..MachineFacts::default()
        };
        let pod = Pod {
            namespace: "k8s.io".into(),
            id: "0123456789abcdef0123456789".into(),
            name: Some("shop/\x1b[2Jweb".into()),
            dir: "/run/husk/k8s.io/0".into(),
            state: State {
                machine: Some(machine),
                ..State::default()
            },
            status: Status::Running,
        };
        let memory = Memory {
            guest_kib: 2048,
            ..Memory::default()
        };
        let text = list(&[(pod.clone(), Some(memory)), (pod.clone(), None)]);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split("  ").collect())
            .collect();
        assert_eq!(lines.len(), 3);
        let words: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        let expected = [
            "k8s.io",
            "0123456789abcdef0123",
            "shop/\\u{1b}[2Jweb",
            "running",
            "-",
            "2",
            "512",
            "MiB",
            "2.0",
            "MiB",
        ];
        assert_eq!(words, expected);
        let json = value(&pod, Some(memory));
        assert_eq!(
            (json["used_kib"].as_u64(), json["vcpus"].as_u64()),
            (Some(2048), Some(2))
        );
        assert_eq!(json["status"], "running");

        let mut pod = pod;
        pod.status = Status::Ended;
        let mut end = EndFacts {
            reason: "the guest's kernel panicked".into(),
            ..EndFacts::default()
        };
        pod.state.end = Some(end.clone());
        assert!(list(&[(pod.clone(), None)]).contains("  ended: the guest's kernel panicked  "));
        assert_eq!(value(&pod, None)["end"], "the guest's kernel panicked");
        end.was_asked = true;
        pod.state.end = Some(end);
        assert!(list(&[(pod, None)]).contains("  ended  "));
    }
}
