//! PID 1 of the PID namespace that a pod's containers share, when they do: a
//! copy of this program, `husk-agent hold FD`, which only collects orphans.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::{Command, Stdio};
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{ForkResult, fork};
use rustix::process::WaitOptions;

use crate::container::LaunchError;
use crate::error::{Doing, OsError};
use crate::init::channel::{AgentChannel, HelperChannel};
use crate::init::plan::Report;
use crate::reaper::Reaper;

/// A held PID namespace.
#[derive(Debug)]
pub struct PidNamespace {
    pid: i32,
}

impl PidNamespace {
    /// Makes one.
    pub async fn make(reaper: &Arc<Reaper>) -> Result<Self, LaunchError> {
        let launching = reaper.launching();
        let (mut channel, theirs) = AgentChannel::pair().doing("make", "a channel")?;
        spawn(theirs)?;
        loop {
            let report = channel
                .receive::<Report>()
                .await
                .doing("hear", "the holder")?;
            match report {
                Some((Report::Child(pid), _)) => {
                    // It ends with the guest: nobody waits.
                    drop(launching.claim(pid));
                    return Ok(Self { pid });
                }
                Some((Report::Failure(failure), _)) => return Err(LaunchError::Reported(failure)),
                Some(_) => {}
                None => return Err(LaunchError::Ended),
            }
        }
    }

    /// Any process in it stands for it.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

fn spawn(channel: OwnedFd) -> Result<(), OsError> {
    Command::new("/proc/self/exe")
        .args(["hold", &channel.as_raw_fd().to_string()])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .doing("start", "the holder")?;
    Ok(())
}

/// Makes the namespace, tells of it, and stays.
pub fn main(fd: RawFd) -> ! {
    let told = HelperChannel::from_inherited(fd).and_then(|mut channel| hold(&mut channel));
    std::process::exit(i32::from(told.is_err()))
}

fn hold(channel: &mut HelperChannel) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => channel.send(&Report::Child(child.as_raw()), None),
        ForkResult::Child => collect(),
    }
}

fn collect() -> ! {
    // Containers see this process.
    let _ = rustix::thread::set_name(c"husk-agent");
    // SAFETY: sets made by the library, on the stack until the calls return.
    unsafe {
        let mut child = std::mem::zeroed();
        libc::sigemptyset(&raw mut child);
        libc::sigaddset(&raw mut child, libc::SIGCHLD);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const child, std::ptr::null_mut());
        loop {
            libc::sigwaitinfo(&raw const child, std::ptr::null_mut());
            while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        }
    }
}
