//! A program of ours that the shim runs beside itself: the VMM, the file server.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::process::Process;

/// Descriptor number of the socket that each program is given.
const SOCKET: i32 = husk_vmm_spec::CONTROL_FD;

/// What a program takes to end that was killed, at most. It takes longer only in the
/// kernel: where a disk or a device of the node does not answer, and then nobody
/// knows how long.
pub const AFTER_KILL: Duration = Duration::from_secs(10);

/// A running program. It is told to end by hanging up its socket; dropping this
/// ends it the hard way.
#[derive(Debug)]
pub struct Child {
    process: Process,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    reaped: AtomicBool,
}

impl Child {
    /// Starts `command` with `socket` as descriptor 3, in a PID namespace of its
    /// own: it can name no other process, to signal it for instance.
    ///
    /// # Errors
    /// The program is not there or cannot be executed.
    pub async fn spawn(command: Command, socket: OwnedFd) -> io::Result<Self> {
        let (sender, receiver) = oneshot::channel();
        // A thread of its own: unsharing the PID namespace marks it for good.
        thread::Builder::new()
            .name("spawn".into())
            .spawn(move || sender.send(spawn(command, &socket)))?;
        let (process, pidfd) = receiver.await.map_err(io::Error::other)??;
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
        let registered = unsafe { AsyncFd::register(pidfd) };
        let pidfd = registered.map_err(|error| {
            let (pidfd, error) = error.into_parts();
            // It ends at once, and this waits for nothing else.
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            error
        })?;
        Ok(Self {
            process,
            pidfd: Arc::new(pidfd),
            reaped: AtomicBool::new(false),
        })
    }

    /// The process on the node.
    pub fn process(&self) -> Process {
        self.process
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // It may have ended already.
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Waits for a program that was told to end, but not for long: it is killed
    /// after `patience`, and given up as much later as `after_kill`. False: it has
    /// not ended yet.
    pub async fn end(&self, patience: Duration, after_kill: Duration) -> bool {
        if timeout(patience, self.wait()).await.is_ok() {
            return true;
        }
        self.kill();
        let ended = timeout(after_kill, self.wait()).await.is_ok();
        if !ended {
            let pid = self.process.pid;
            tracing::error!(pid, "a process does not end, though it was killed");
        }
        ended
    }

    /// Waits for its end and reaps it. May be called again.
    pub async fn wait(&self) {
        reap(&self.pidfd).await;
        self.reaped.store(true, Ordering::Relaxed);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.reaped.load(Ordering::Relaxed) {
            return;
        }
        self.kill();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let pidfd = Arc::clone(&self.pidfd);
            runtime.spawn(async move { reap(&pidfd).await });
        }
    }
}

async fn reap(pidfd: &AsyncFd<OwnedFd>) {
    // Readable once it has ended (pidfd_open(2)); reaping twice does no harm.
    let _ = pidfd.readable().await;
    let _ = waitid(
        WaitId::PidFd(pidfd.get_ref().as_fd()),
        WaitIdOptions::EXITED,
    );
}

fn spawn(mut command: Command, socket: &OwnedFd) -> io::Result<(Process, OwnedFd)> {
    // SAFETY: no shared descriptor table is given up.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID)? };
    let socket = socket.as_raw_fd();
    // SAFETY: between fork and exec only dup2(2) is called, which is
    // async-signal-safe. 3 is held by the shim, so the descriptors that Command
    // opens for itself are others, and `socket`, being another, loses its
    // close-on-exec flag by the copy.
    unsafe {
        command.pre_exec(move || match libc::dup2(socket, SOCKET) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut child = command.spawn()?;
    // Not reaped before this type does it, so the number is still its own. Both
    // take a descriptor, and it is the second that says that there is none.
    let process = Process::find(child.id());
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    match (process, pidfd) {
        (Some(process), Ok(pidfd)) => Ok((process, pidfd)),
        (_, pidfd) => {
            // Nobody else will.
            child.kill()?;
            child.wait()?;
            let missing = io::Error::from(io::ErrorKind::NotFound);
            Err(pidfd.map_or_else(io::Error::from, |_| missing))
        }
    }
}
