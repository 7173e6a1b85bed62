//! A program of ours that the shim runs beside itself: the VMM, the file server.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::cgroup::CgroupDir;
use crate::process::Process;

mod beginning;

use beginning::Beginning;

/// What a program takes to end that was killed, at most. It takes longer only in the
/// kernel: where a disk or a device of the node does not answer, and then nobody
/// knows how long.
pub const AFTER_KILL: Duration = Duration::from_secs(10);

/// What is started.
#[derive(Debug)]
pub struct Program<'a> {
    /// Its file.
    pub path: &'a Path,
    /// The first of the ids of which it has one.
    pub first_uid: u32,
    /// Where it begins, if not where the shim is.
    pub cgroup: Option<&'a CgroupDir>,
    /// Where what it has to say goes.
    pub complaints: OwnedFd,
}

/// A running program. It is told to end by hanging up its socket; dropping this
/// ends it the hard way.
#[derive(Debug)]
pub struct Child {
    started: Arc<AsyncFd<Started>>,
    reaped: AtomicBool,
}

/// The process. Whoever gives it up, and be it before there is a [`Child`], ends and
/// reaps it.
#[derive(Debug)]
struct Started {
    process: Process,
    pidfd: OwnedFd,
}

impl AsRawFd for Started {
    fn as_raw_fd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        end(&self.pidfd);
    }
}

/// Ends and reaps a process that is mostly reaped already; otherwise it ends at once,
/// unless the kernel keeps it, for which nobody is to wait.
fn end(pidfd: &OwnedFd) {
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
    let limit = Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    let _ = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&limit));
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let _ = waitid(WaitId::PidFd(pidfd.as_fd()), options);
}

impl Child {
    /// Starts `program` with these arguments, besides who it is, and with `socket` as
    /// descriptor 3, in a PID namespace of its own: it can name no other process, to
    /// signal it for instance, and nobody else is the user that it is told to be.
    ///
    /// # Errors
    /// The program is not there or cannot be executed.
    pub async fn spawn(
        program: Program<'_>,
        arguments: &[&OsStr],
        socket: OwnedFd,
    ) -> io::Result<Self> {
        let words = [&[program.path.as_os_str()], arguments].concat();
        let words = words.iter().map(|word| CString::new(word.as_bytes()));
        let beginning = Beginning {
            words: words.collect::<Result<Vec<_>, _>>()?,
            first_uid: program.first_uid,
            cgroup: program.cgroup.cloned(),
            complaints: program.complaints,
            socket,
        };
        let (sender, receiver) = oneshot::channel();
        // A thread of its own: it waits until the program is being executed.
        thread::Builder::new()
            .name("spawn".into())
            .spawn(move || sender.send(beginning.start()))?;
        let started = receiver.await.map_err(io::Error::other)??;
        // SAFETY: its descriptor is the same open one until it is dropped.
        let registered = unsafe { AsyncFd::register(started) };
        Ok(Self {
            started: Arc::new(registered.map_err(|error| error.into_parts().1)?),
            reaped: AtomicBool::new(false),
        })
    }

    /// The process on the node.
    pub fn process(&self) -> Process {
        self.started.get_ref().process
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // It may have ended already.
        let _ = pidfd_send_signal(&self.started.get_ref().pidfd, Signal::KILL);
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
            let pid = self.process().pid;
            tracing::error!(pid, "a process does not end, though it was killed");
        }
        ended
    }

    /// Waits for its end and reaps it. May be called again.
    pub async fn wait(&self) {
        reap(&self.started).await;
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
            let started = Arc::clone(&self.started);
            runtime.spawn(async move { reap(&started).await });
        }
    }
}

async fn reap(started: &AsyncFd<Started>) {
    // Readable once it has ended (pidfd_open(2)); reaping twice does no harm.
    let _ = started.readable().await;
    let pidfd = started.get_ref().pidfd.as_fd();
    let _ = waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::{Duration, Instant};

    use tokio::time::{sleep, timeout};

    /// Processes of this name, zombies among them.
    fn named(name: &str) -> usize {
        let entries = fs::read_dir("/proc").unwrap();
        let is_named = |entry: &fs::DirEntry| {
            let comm = fs::read_to_string(entry.path().join("comm"));
            comm.is_ok_and(|comm| comm.trim_end() == name)
        };
        entries.flatten().filter(is_named).count()
    }

    #[tokio::test]
    async fn nothing_is_left_of_one_that_nobody_waits_for() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can make PID namespaces");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        // As long as the kernel remembers.
        let name = format!("gone-{}", std::process::id());
        let path = dir.path().join(&name);
        symlink("/bin/sh", &path).unwrap();
        let arguments = ["-c", "read -r _ <&3"].map(OsStr::new);
        let spawn = |socket: OwnedFd| {
            let program = Program {
                path: &path,
                first_uid: 1 << 16,
                cgroup: None,
                complaints: fs::File::open("/dev/null").unwrap().into(),
            };
            Child::spawn(program, &arguments, socket)
        };
        // What it waits for never comes.
        let mut kept = Vec::new();
        let mut socket = || {
            let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
            kept.push(near);
            OwnedFd::from(far)
        };
        let child = spawn(socket()).await.unwrap();
        assert_eq!(named(&name), 1);
        drop(child);
        for after in [0, 1, 2, 5, 10, 20] {
            let spawned = timeout(Duration::from_millis(after), spawn(socket())).await;
            drop(spawned);
        }
        sleep(Duration::from_millis(500)).await;
        let began = Instant::now();
        while named(&name) > 0 {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "{}",
                named(&name)
            );
            sleep(Duration::from_millis(20)).await;
        }
    }
}
