//! What stands for a container of a pod on the node.
//!
//! containerd has one name for a PID namespace that a container shall join: the
//! pid that it was told for the container that has it (`kubectl debug --target`).
//! Told the VMM's for all of them, it could not say which. So each has a number
//! of its own: that of a thread of the shim's, which does nothing but wait for
//! the container's end. Being a thread, it costs little and goes with the shim;
//! a number that is no thread's could become another process's.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::thread::{Pid, gettid};
use tokio::sync::oneshot;

use crate::process::Process;

/// It calls next to nothing.
const STACK: usize = 32 << 10;

/// A thread that waits until this is dropped.
#[derive(Debug)]
pub struct StandIn {
    tid: u32,
    _waits_for: Sender<Infallible>,
}

impl StandIn {
    /// Starts one. Tools enter the namespaces of a pid that they were told: this
    /// one's are the VMM's, which are empty.
    ///
    /// # Errors
    /// The node has no threads left, or the VMM has ended.
    pub async fn start(vmm: Process) -> io::Result<Self> {
        let (told, number) = oneshot::channel();
        let (waits_for, end) = channel();
        thread::Builder::new()
            .name("container".into())
            .stack_size(STACK)
            .spawn(move || stand(vmm, told, &end))?;
        Ok(Self {
            tid: number.await.map_err(io::Error::other)??,
            _waits_for: waits_for,
        })
    }

    /// Its number on the node.
    pub fn tid(&self) -> u32 {
        self.tid
    }
}

fn stand(vmm: Process, told: oneshot::Sender<io::Result<u32>>, end: &Receiver<Infallible>) {
    let number = enter(vmm).map(|()| Pid::as_raw_nonzero(gettid()).get().cast_unsigned());
    if told.send(number).is_ok() {
        // Never brings anything: it returns when the other end is gone.
        let _ = end.recv();
    }
}

/// Leaves the node's namespaces. For this thread alone; that of PIDs is for
/// children, of which there are none.
fn enter(vmm: Process) -> io::Result<()> {
    let vmm = vmm.open().ok_or(io::ErrorKind::NotFound)?;
    // Who shares a working directory may not change its mount namespace.
    unshare(CloneFlags::CLONE_FS)?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    Ok(setns(vmm.as_fd(), namespaces)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    #[tokio::test]
    async fn each_has_a_number_until_it_goes() {
        let this = Process::find(std::process::id()).unwrap();
        let started = StandIn::start(this).await;
        if !rustix::process::geteuid().is_root() {
            assert_eq!(started.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            return;
        }
        let (first, second) = (started.unwrap(), StandIn::start(this).await.unwrap());
        assert_ne!(first.tid(), second.tid());
        let exists = |tid: u32| PathBuf::from(format!("/proc/self/task/{tid}")).exists();
        assert!(exists(first.tid()) && exists(second.tid()));
        let tid = first.tid();
        drop(first);
        let began = Instant::now();
        while exists(tid) {
            assert!(began.elapsed() < Duration::from_secs(5));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(exists(second.tid()));
    }

    #[tokio::test]
    async fn a_machine_that_has_ended_has_none() {
        let this = Process::find(std::process::id()).unwrap();
        let later = Process {
            start_ticks: this.start_ticks + 1,
            ..this
        };
        let error = StandIn::start(later).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
