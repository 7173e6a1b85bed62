//! What is there of pods that should be gone.

use husk_node::config::Config;

use super::{Finding, Node};
use crate::pods::{self, Pod, Status};
use crate::text;

pub fn check(node: &Node, config: &Config) -> Vec<Finding> {
    let dir = node.path(&config.state_dir.to_string_lossy());
    // Only root may see them.
    let pods = pods::all(&dir).unwrap_or_default();
    let left = pods.iter().filter_map(|pod| match pod.status {
        Status::Abandoned => Some(remains(node, pod)),
        Status::Ended => held(pod),
        Status::Starting | Status::Running => None,
    });
    let mut left = left.peekable();
    match left.peek() {
        Some(_) => left.collect(),
        None => vec![Finding::ok(ABOUT, "nothing is left of any that has ended")],
    }
}

/// One whose VMM does not end with it.
fn held(pod: &Pod) -> Option<Finding> {
    let vmm = pod.state.vmm.filter(|vmm| vmm.is_alive())?;
    let found = format!("{} has ended, and process {} not", pod.title(), vmm.pid);
    let advice = "it waits in the kernel for a disk or a device (dmesg), and the pod with it, until \
                  that answers or is given up";
    Some(Finding::warning(ABOUT, found, advice))
}

const ABOUT: &str = "pods";

fn remains(node: &Node, pod: &Pod) -> Finding {
    let processes = [pod.state.vmm, pod.state.file_server];
    let alive = processes.into_iter().flatten().filter(|one| one.is_alive());
    let mut what: Vec<_> = alive
        .map(|process| format!("process {}", process.pid))
        .collect();
    let cgroup = pod.state.cgroup.as_ref();
    let cgroup = cgroup.map(|path| format!("/sys/fs/cgroup{}", path.display()));
    what.extend(cgroup.filter(|path| node.path(path).exists()));
    let [namespace, id] = [&pod.namespace, &pod.id].map(|name| text::plain(name));
    let found = match what.is_empty() {
        true => format!("{namespace}/{id} has lost its shim"),
        false => format!(
            "{namespace}/{id} has lost its shim, and there is of it: {}",
            what.join(", ")
        ),
    };
    let advice = format!(
        "containerd cleans up when it runs; what stays then waits in the kernel for a disk or a \
         device (dmesg), and once that answers, or is given up: containerd-shim-husk-v2 \
         -namespace {namespace} -id {id} delete"
    );
    Finding::warning(ABOUT, found, advice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;
    use husk_node::process::Process;
    use husk_node::state::{EndFacts, FILE, State};
    use std::fs;

    #[test]
    fn names_what_is_left() {
        let root = tempfile::tempdir().unwrap();
        let node = Node::at(root.path());
        let config = Config::default();
        let found = || check(&node, &config);
        assert_eq!(found()[0].verdict, Verdict::Ok);
        let dir = root.path().join("run/husk/k8s.io/left");
        fs::create_dir_all(&dir).unwrap();
        let this = Process::find(std::process::id());
        let write = |state: &State| {
            fs::write(dir.join(FILE), serde_json::to_vec(state).unwrap()).unwrap();
        };
        write(&State {
            shim: this,
            vmm: this,
            ..State::default()
        });
        assert_eq!(found()[0].verdict, Verdict::Ok);
        write(&State {
            shim: this,
            vmm: this,
            end: Some(EndFacts::default()),
            ..State::default()
        });
        let held = format!(
            "k8s.io/left has ended, and process {} not",
            std::process::id()
        );
        assert_eq!(found()[0].found, held);
        let mut state = State {
            vmm: this,
            cgroup: Some("/pods/left".into()),
            ..State::default()
        };
        write(&state);
        let process = format!("there is of it: process {}", std::process::id());
        let finding = found().remove(0);
        assert_eq!(finding.verdict, Verdict::Warning);
        assert!(finding.found.ends_with(&process), "{finding:?}");
        let command = "containerd-shim-husk-v2 -namespace k8s.io -id left delete";
        assert!(finding.advice.ends_with(command), "{finding:?}");
        let cgroup = root.path().join("sys/fs/cgroup/pods/left");
        fs::create_dir_all(&cgroup).unwrap();
        let both = format!("{process}, /sys/fs/cgroup/pods/left");
        assert!(found()[0].found.ends_with(&both), "{:?}", found());
        fs::remove_dir(&cgroup).unwrap();
        state.vmm = None;
        write(&state);
        assert_eq!(found()[0].found, "k8s.io/left has lost its shim");
    }
}
