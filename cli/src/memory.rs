//! What a pod's processes really use of the node's memory.

use serde::Serialize;

use husk_node::process::Process;
use husk_node::smaps;
use husk_node::state::State;

/// Memory of a pod, KiB. Pages that several processes share count in parts
/// (proportional set size), so that the sum over all processes is the truth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// What the guest has touched and not given back.
    pub guest_kib: u64,
    /// The VMM, without the guest's memory.
    pub vmm_kib: u64,
    /// The shim.
    pub shim_kib: u64,
    /// The file server, without the guest's memory.
    pub file_server_kib: u64,
}

impl Memory {
    /// Of a pod; none when its processes are not for this user, or gone.
    pub fn of(state: &State) -> Option<Self> {
        let (shim_kib, _) = measure(state.shim)?;
        let (vmm_kib, vmm_guest) = measure(state.vmm).unwrap_or_default();
        let (file_server_kib, server_guest) = measure(state.file_server).unwrap_or_default();
        Some(Self {
            guest_kib: vmm_guest + server_guest,
            vmm_kib,
            shim_kib,
            file_server_kib,
        })
    }

    /// All of it.
    pub fn sum_kib(&self) -> u64 {
        self.guest_kib + self.vmm_kib + self.shim_kib + self.file_server_kib
    }
}

/// A process's own memory, and its part of the guest's, KiB.
fn measure(process: Option<Process>) -> Option<(u64, u64)> {
    let process = process.filter(|process| process.is_alive())?;
    let found = smaps::of_process(process.pid).ok()?;
    // What was read was another's if it has gone.
    process
        .is_alive()
        .then_some((found.own_kib, found.guest_kib))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_a_process() {
        let state = State {
            shim: Process::find(std::process::id()),
            ..State::default()
        };
        let memory = Memory::of(&state).unwrap();
        assert!(memory.shim_kib > 100 && memory.sum_kib() == memory.shim_kib);
        assert_eq!(Memory::of(&State::default()), None);
    }
}
