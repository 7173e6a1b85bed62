//! Which pod a container joins that asks for another's network
//! (`docker run --network container:NAME`).
//!
//! Two machines can't share the interfaces of a network namespace, nor a
//! localhost. So such a container becomes one of the other's pod, as containers
//! of Kubernetes are by their annotations.

use std::fs;
use std::path::Path;

use crate::id::Id;
use crate::network::NetnsId;
use crate::state_dir::{State, StateDir};

/// File in the bundle with the pod's name, from which everybody else learns of
/// it.
pub const POD_FILE: &str = "pod";

/// The running pod that has the network namespace at `netns`.
pub fn pod_with(state_root: &Path, namespace: &Id, netns: &Path) -> Option<Id> {
    let netns = NetnsId::of(netns)?;
    let entries = fs::read_dir(state_root.join(namespace.as_str())).ok()?;
    entries.flatten().find_map(|entry| {
        let id = Id::new("pod", entry.file_name().to_str()?).ok()?;
        let state = StateDir::new(state_root, namespace, &id).read()?;
        has(&state, netns).then_some(id)
    })
}

/// By the namespace that its machine took over, or by the empty one of the VMM:
/// there the pids lead that are told for its containers.
fn has(state: &State, netns: NetnsId) -> bool {
    let Some(vmm) = state.vmm.filter(|vmm| vmm.is_alive()) else {
        return false;
    };
    let own = NetnsId::of(Path::new(&format!("/proc/{}/ns/net", vmm.pid)));
    state.netns == Some(netns) || own == Some(netns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;
    use std::process::Command;

    #[test]
    fn finds_the_pod_by_its_network() {
        let mut vmm = match Command::new("unshare").args(["-n", "sleep", "100"]).spawn() {
            Ok(vmm) => vmm,
            Err(error) => return println!("SKIPPED: unshare: {error}"),
        };
        let theirs = format!("/proc/{}/ns/net", vmm.id());
        let theirs = Path::new(&theirs);
        let own = Path::new("/proc/self/ns/net");
        for _ in 0..100 {
            if NetnsId::of(theirs) != NetnsId::of(own) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        if NetnsId::of(theirs) == NetnsId::of(own) {
            return println!("SKIPPED: no network namespace can be made");
        }
        let root = tempfile::tempdir().unwrap();
        let id = |name| Id::new("id", name).unwrap();
        let find = |path: &Path| pod_with(root.path(), &id("n"), path);
        let write = |name, state: &State| {
            let dir = StateDir::new(root.path(), &id("n"), &id(name));
            dir.create().unwrap();
            dir.write(state).unwrap();
        };
        assert_eq!(find(own), None);
        write("other", &State::default());
        let mut state = State {
            vmm: Process::find(vmm.id()),
            ..State::default()
        };
        write("p", &state);
        assert_eq!(find(theirs), Some(id("p")));
        assert_eq!(find(own), None);
        state.netns = NetnsId::of(own);
        write("p", &state);
        assert_eq!(find(own), Some(id("p")));
        assert_eq!(find(Path::new("/proc/self/ns/uts")), None);
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        assert_eq!(find(own), None, "its machine has ended");
    }
}
