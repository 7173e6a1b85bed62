//! What a pod's processes really use of the node's memory.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use serde::Serialize;

use husk_node::process::Process;
use husk_node::state::State;

/// Name of the file in memory that is the guest's memory; the VMM gives it.
const GUEST_MEMORY: &str = "/memfd:guest-memory";

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
    let smaps = File::open(format!("/proc/{}/smaps", process.pid)).ok()?;
    let found = sum(BufReader::new(smaps)).ok()?;
    // What was read was another's if it has gone.
    process.is_alive().then_some(found)
}

/// Of smaps (proc_pid_smaps(5)): a line a mapping, and its counters below.
fn sum(smaps: impl BufRead) -> io::Result<(u64, u64)> {
    let (mut own, mut guest, mut in_guest) = (0, 0, false);
    for line in smaps.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if let Some(rest) = line.strip_prefix("Pss:") {
            let kib = rest.split_whitespace().next().unwrap_or_default();
            let kib: u64 = kib.parse().map_err(io::Error::other)?;
            *(if in_guest { &mut guest } else { &mut own }) += kib;
        } else if !line.split_whitespace().next().unwrap_or(":").ends_with(':') {
            in_guest = line.contains(GUEST_MEMORY);
        }
    }
    Ok((own, guest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0010000000 rw-s 00000000 00:01 17  /memfd:guest-memory (deleted)
Size:             262144 kB
Pss:               50000 kB
Pss_Dirty:         50000 kB
VmFlags: rd wr sh mr mw me ms
7f0020000000-7f0020001000 r-xp 00000000 00:01 18  /usr/libexec/husk/husk-vmm
Pss:                 700 kB
7ffe00000000-7ffe00001000 rw-p 00000000 00:00 0   [stack]
Pss:                  12 kB
";

    #[test]
    fn tells_the_guest_from_the_rest() {
        assert_eq!(sum(SMAPS.as_bytes()).unwrap(), (712, 50_000));
    }

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
