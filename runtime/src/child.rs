//! A program of ours that the shim runs beside itself: the VMM, the file server.

use std::ffi::{CString, OsStr};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::config;
use crate::process::Process;

/// Descriptor number of the socket that each program is given.
const SOCKET: i32 = husk_vmm_spec::CONTROL_FD;

/// What a program takes to end that was killed, at most. It takes longer only in the
/// kernel: where a disk or a device of the node does not answer, and then nobody
/// knows how long.
pub const AFTER_KILL: Duration = Duration::from_secs(10);

/// Most words of a command line, path and user included.
const WORDS: usize = 16;

/// What is started.
#[derive(Debug)]
pub struct Program<'a> {
    /// Its file.
    pub path: &'a Path,
    /// What it is told besides who it is.
    pub arguments: &'a [&'a OsStr],
    /// The first of the ids of which it has one.
    pub first_uid: u32,
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
        // Mostly it is reaped already; otherwise it ends at once, unless the kernel
        // keeps it, for which nobody is to wait.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let limit = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        let _ = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&limit));
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), options);
    }
}

impl Child {
    /// Starts `program` with `socket` as descriptor 3, in a PID namespace of its
    /// own: it can name no other process, to signal it for instance, and nobody else
    /// is the user that it is told to be.
    ///
    /// # Errors
    /// The program is not there or cannot be executed.
    pub async fn spawn(program: Program<'_>, socket: OwnedFd) -> io::Result<Self> {
        let mut command = Command::new(program.path);
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(program.complaints);
        let words = [&[program.path.as_os_str()], program.arguments].concat();
        let words = words.iter().map(|word| CString::new(word.as_bytes()));
        let words = words.collect::<Result<Vec<_>, _>>()?;
        let first_uid = program.first_uid;
        let (sender, receiver) = oneshot::channel();
        // A thread of its own: unsharing the PID namespace marks it for good.
        thread::Builder::new()
            .name("spawn".into())
            .spawn(move || sender.send(spawn(command, words, first_uid, &socket)))?;
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

fn spawn(
    mut command: Command,
    words: Vec<CString>,
    first_uid: u32,
    socket: &OwnedFd,
) -> io::Result<Started> {
    // SAFETY: no shared descriptor table is given up.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID)? };
    let socket = socket.as_raw_fd();
    // SAFETY: between fork and exec only system calls are made, nothing is allocated.
    // 3 is held by the shim, so the descriptors that Command opens for itself are
    // others, and `socket`, being another, loses its close-on-exec flag by the copy.
    unsafe {
        command.pre_exec(move || match libc::dup2(socket, SOCKET) {
            -1 => Err(io::Error::last_os_error()),
            _ => Err(execute(&words, own_uid(first_uid)?)),
        });
    }
    let mut child = command.spawn()?;
    // Not reaped before this type does it, so the number is still its own. Both
    // take a descriptor, and it is the second that says that there is none.
    let process = Process::find(child.id());
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    match (process, pidfd) {
        (Some(process), Ok(pidfd)) => Ok(Started { process, pidfd }),
        (_, pidfd) => {
            // Nobody else will.
            child.kill()?;
            child.wait()?;
            let missing = io::Error::from(io::ErrorKind::NotFound);
            Err(pidfd.map_or_else(io::Error::from, |_| missing))
        }
    }
}

/// The user that this process alone is, as long as anything of it is there. Its
/// namespace has no name before the process is in it.
fn own_uid(first_uid: u32) -> io::Result<u32> {
    let namespace = rustix::fs::stat(c"/proc/self/ns/pid")?.st_ino;
    config::uid(first_uid, namespace).ok_or_else(|| io::Error::from_raw_os_error(libc::EUSERS))
}

/// Becomes the program whose path and arguments these are, which has no environment
/// and is told to be `uid`. Returns only if that cannot be; allocates nothing.
fn execute(words: &[CString], uid: u32) -> io::Error {
    // Ten digits at most, and what ends them.
    let mut text = [0; 11];
    if let Err(error) = write!(&mut text[..], "{uid}") {
        return error;
    }
    let text = text.as_ptr().cast();
    let user = [c"--uid".as_ptr(), text, c"--gid".as_ptr(), text];
    let mut arguments = [ptr::null(); WORDS + 1];
    if words.is_empty() || words.len() + user.len() > WORDS {
        return io::Error::from_raw_os_error(libc::E2BIG);
    }
    let all = words.iter().map(|word| word.as_ptr()).chain(user);
    for (argument, word) in arguments.iter_mut().zip(all) {
        *argument = word;
    }
    let environment = [ptr::null()];
    // SAFETY: strings that end and lists that end, which are there until the program is.
    unsafe { libc::execve(arguments[0], arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
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
                arguments: &arguments,
                first_uid: 1 << 16,
                complaints: fs::File::open("/dev/null").unwrap().into(),
            };
            Child::spawn(program, socket)
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
