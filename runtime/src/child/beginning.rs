//! How a program of ours begins: in its PID namespace and cgroup from the first
//! instruction on. `clone3` puts it there; to be moved takes a grace period of RCU,
//! and to leave a PID namespace a thread that nothing else can use afterwards.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use super::{Started, end};
use crate::cgroup::CgroupDir;
use crate::config;
use crate::process::Process;

/// Descriptor number of the socket that each program is given.
const SOCKET: RawFd = husk_vmm_spec::CONTROL_FD;

/// linux/sched.h; `libc` has it as a number that is too small for it.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Most words of a command line, path and user included.
const WORDS: usize = 16;

/// A program that is to begin.
pub(super) struct Beginning {
    /// Its path and arguments.
    pub(super) words: Vec<CString>,
    /// The first of the ids of which it has one.
    pub(super) first_uid: u32,
    /// Where it begins, if not where this process is.
    pub(super) cgroup: Option<CgroupDir>,
    /// Its standard error.
    pub(super) complaints: OwnedFd,
    /// What it is given as descriptor 3, which the shim holds: every other that is
    /// opened has a higher number.
    pub(super) socket: OwnedFd,
}

impl Beginning {
    /// Returns once the program is being executed.
    ///
    /// # Errors
    /// It cannot be.
    pub(super) fn start(self) -> io::Result<Started> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let (failure, report) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut pidfd: RawFd = -1;
        // SAFETY: numbers, for all of which zero means that nothing is asked for.
        let mut arguments: libc::clone_args = unsafe { mem::zeroed() };
        let flags = libc::CLONE_NEWPID | libc::CLONE_PIDFD;
        arguments.flags = flags as u64;
        arguments.exit_signal = libc::SIGCHLD as u64;
        arguments.pidfd = (&raw mut pidfd) as u64;
        if let Some(cgroup) = &self.cgroup {
            arguments.flags |= CLONE_INTO_CGROUP;
            arguments.cgroup = cgroup.as_fd().as_raw_fd() as u64;
        }
        // SAFETY: the arguments are of this length, and what they point to is written
        // before the call returns. The child has memory of its own (no CLONE_VM), in
        // which it goes on alone, whatever locks other threads had: it makes system
        // calls until it is another program, and allocates nothing.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw const arguments,
                mem::size_of_val(&arguments),
            )
        };
        match pid {
            -1 => return Err(self.refused(io::Error::last_os_error())),
            0 => self.go_on(&null, &report),
            _ => {}
        }
        // SAFETY: the kernel has just made it, for this process alone.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        drop(report);
        let mut errno = [0; mem::size_of::<i32>()];
        let began = match File::from(failure).read(&mut errno) {
            // The execution closed it.
            Ok(0) => Ok(()),
            Ok(_) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
            Err(error) => Err(error),
        };
        // Not reaped before `Started` does it, so the number is still its own.
        let found = began.and_then(|()| {
            let process = u32::try_from(pid).ok().and_then(Process::find);
            process.ok_or_else(|| io::ErrorKind::NotFound.into())
        });
        match found {
            Ok(process) => Ok(Started { process, pidfd }),
            Err(error) => {
                // Nobody else will.
                end(&pidfd);
                Err(error)
            }
        }
    }

    /// Why the kernel does not begin it: mostly its cgroup takes nobody.
    fn refused(&self, error: io::Error) -> io::Error {
        // clone(2): there is too little of something, or this process may not.
        const OTHERS: [i32; 4] = [libc::EAGAIN, libc::ENOMEM, libc::ENOSPC, libc::EPERM];
        let is_other = |errno| OTHERS.contains(&errno);
        match &self.cgroup {
            Some(cgroup) if !error.raw_os_error().is_some_and(is_other) => {
                io::Error::new(error.kind(), cgroup.refused(error))
            }
            _ => error,
        }
    }

    /// The child's part.
    fn go_on(&self, null: &OwnedFd, report: &OwnedFd) -> ! {
        let error = match self.arrange(null) {
            Ok(uid) => execute(&self.words, uid),
            Err(error) => error,
        };
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        // Nobody is there to hear that this fails.
        let _ = rustix::io::write(report, &errno.to_ne_bytes());
        // SAFETY: ends this process, and runs nothing of the other's on the way.
        unsafe { libc::_exit(1) }
    }

    /// What a program finds besides its words. Allocates nothing.
    fn arrange(&self, null: &OwnedFd) -> io::Result<u32> {
        rustix::process::chdir(c"/")?;
        let (null, complaints) = (null.as_raw_fd(), self.complaints.as_raw_fd());
        let socket = self.socket.as_raw_fd();
        for (from, to) in [(null, 0), (null, 1), (complaints, 2), (socket, SOCKET)] {
            // SAFETY: the descriptors are open, and the new ones are the program's. They
            // are other ones, so that they lose their close-on-exec flag by the copy.
            if unsafe { libc::dup2(from, to) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        // Rust ignores SIGPIPE, and what is ignored or blocked stays so.
        // SAFETY: the set is empty, and this process has one thread.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            let mut none: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        }
        own_uid(self.first_uid)
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
