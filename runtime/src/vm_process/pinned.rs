//! What may be pinned of a machine's memory: what a PCI device of the node reaches is,
//! all of the guest's for each group, and the kernel counts it as the VMM's locked
//! memory.

use std::collections::BTreeSet;
use std::io;

use husk_vmm_spec::{DeviceId, Failure, Request};
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::process::Process;

/// Locked memory beside guest memory: io_uring's rings, as the VMM's jail says.
const LOCKED_BESIDE: u64 = 1 << 20;

/// The limit of a VMM's locked memory. For who reaps the VMM alone: its number is
/// another's afterwards.
pub(super) struct Pinned {
    process: Process,
    /// All that the guest can come to have.
    memory_mib: u32,
    /// Those that the VMM has, or may have.
    groups: BTreeSet<DeviceId>,
}

/// A group whose coming or going the VMM was asked for.
#[derive(Debug)]
pub(super) enum Plugging {
    Add(DeviceId),
    Remove(DeviceId),
}

impl Pinned {
    /// Nothing yet.
    pub(super) fn new(process: Process, memory_mib: u32) -> Self {
        Self {
            process,
            memory_mib,
            groups: BTreeSet::new(),
        }
    }

    /// Allows what a request needs before the VMM has it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn expect(&mut self, request: &Request) -> Result<Option<Plugging>, Failure> {
        let plugging = self.note(request);
        if let Some(Plugging::Add(id)) = &plugging
            && let Err(error) = self.limit()
        {
            self.groups.remove(id);
            let message = format!("raising the VMM's limit of locked memory: {error}");
            return Err(Failure { message });
        }
        Ok(plugging)
    }

    fn note(&mut self, request: &Request) -> Option<Plugging> {
        match request {
            Request::AddVfio(spec) => {
                self.groups.insert(spec.id.clone());
                Some(Plugging::Add(spec.id.clone()))
            }
            Request::RemoveDevice(id) => Some(Plugging::Remove(id.clone())),
            _ => None,
        }
    }

    /// Takes back what is not needed any more, once the VMM has answered.
    pub(super) fn answered(&mut self, plugging: Option<Plugging>, is_done: bool) {
        if self.settle(plugging, is_done)
            && let Err(error) = self.limit()
        {
            tracing::debug!(%error, "the VMM's limit of locked memory");
        }
    }

    /// Whether there is one less.
    fn settle(&mut self, plugging: Option<Plugging>, is_done: bool) -> bool {
        match plugging {
            Some(Plugging::Add(id)) => !is_done && self.groups.remove(&id),
            // It was there, or there is none of this name.
            Some(Plugging::Remove(id)) => self.groups.remove(&id),
            None => false,
        }
    }

    /// Bytes.
    fn most(&self) -> u64 {
        let groups = u64::try_from(self.groups.len()).unwrap_or(u64::MAX);
        let most = (u64::from(self.memory_mib) << 20).saturating_mul(groups);
        most.saturating_add(LOCKED_BESIDE)
    }

    fn limit(&self) -> io::Result<()> {
        let most = Some(self.most());
        let limit = Rlimit {
            current: most,
            maximum: most,
        };
        // No number would be this process itself.
        let pid = i32::try_from(self.process.pid).ok();
        let pid = pid.and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        prlimit(Some(pid), Resource::Memlock, limit)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_vmm_spec::{Descriptor, VfioSpec};
    use std::process::Command;

    fn add(id: &str) -> Request {
        Request::AddVfio(VfioSpec {
            id: id.into(),
            container: Descriptor(0),
            group: Descriptor(1),
            functions: Vec::new(),
        })
    }

    fn locked(pid: &str) -> String {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max locked memory"));
        line.unwrap().to_owned()
    }

    #[test]
    fn the_limit_follows_what_is_plugged() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let mut pinned = Pinned::new(Process::find(child.id()).unwrap(), 128);
        let mib = |pinned: &Pinned| pinned.most() >> 20;
        let first = pinned.note(&add("a"));
        assert_eq!(mib(&pinned), 129);
        assert!(!pinned.settle(first, true));
        let second = pinned.note(&add("b"));
        assert_eq!(mib(&pinned), 257);
        // It could not be plugged.
        assert!(pinned.settle(second, false));
        assert_eq!(mib(&pinned), 129);
        let disk = pinned.note(&Request::RemoveDevice("disk-1".into()));
        assert!(!pinned.settle(disk, true));
        let gone = pinned.note(&Request::RemoveDevice("a".into()));
        assert_eq!(mib(&pinned), 129);
        // Which anybody may do, unlike raising it again.
        pinned.answered(gone, true);
        assert_eq!(mib(&pinned), 1);
        let line = locked(&child.id().to_string());
        let limits: Vec<_> = line.split_whitespace().skip(3).take(2).collect();
        assert_eq!(limits, ["1048576"; 2], "{line}");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn no_process_is_not_this_one() {
        let before = locked("self");
        let nobody = Process {
            pid: 0,
            start_ticks: 0,
        };
        let failure = Pinned::new(nobody, 1).expect(&add("a")).unwrap_err();
        assert!(failure.message.contains("No such process"), "{failure:?}");
        assert_eq!(locked("self"), before);
    }
}
