//! A process of a container while it runs and after.

use nix::errno::Errno;
use tokio::sync::watch;

use super::launch::Child;
use crate::error::{Doing, Error};
use crate::pidfd::PidFd;
use crate::reaper::Exit;
use crate::stdio::{Carried, Terminal};

/// A process that was made.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: PidFd,
    terminal: Option<Terminal>,
    ended: watch::Receiver<Option<Ended>>,
}

/// How a process ended, and what it had written by then.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    pub exit: Exit,
    /// Bytes of its standard output.
    pub stdout: u64,
    /// Bytes of its standard error.
    pub stderr: u64,
}

impl Process {
    /// Watches over a process; `on_exit` runs before anybody hears of its end.
    pub fn new(
        child: Child,
        terminal: Option<Terminal>,
        streams: Carried,
        on_exit: impl FnOnce() + Send + 'static,
    ) -> Self {
        let (publish, ended) = watch::channel(None);
        tokio::spawn(async move {
            if let Ok(exit) = child.exit.await {
                on_exit();
                publish.send_replace(Some(Ended {
                    exit,
                    stdout: streams.stdout.bytes(),
                    stderr: streams.stderr.bytes(),
                }));
            }
        });
        Self {
            pid: child.pid,
            pidfd: child.pidfd,
            terminal,
            ended,
        }
    }

    /// As our PID namespace numbers it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The same, whatever has its number.
    pub fn pidfd(&self) -> &PidFd {
        &self.pidfd
    }

    /// How it ended, if it did.
    pub fn ended(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    /// Returns when it has ended.
    pub async fn wait(&self) -> Result<Ended, Error> {
        let mut ended = self.ended.clone();
        let ended = ended.wait_for(Option::is_some).await;
        ended.ok().and_then(|ended| *ended).ok_or(Error::Finished)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        if self.ended().is_some() {
            return Err(Error::Finished);
        }
        signalled(self.pidfd.signal(signal), self.pid, signal)
    }

    /// Tells its terminal's size.
    pub fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        let terminal = self.terminal.as_ref().ok_or(Error::NoTerminal)?;
        Ok(terminal
            .resize(width, height)
            .doing("resize", "the terminal")?)
    }
}

/// To whatever has this number; real-time signals included.
pub fn send_signal(pid: i32, signal: i32) -> Result<(), Error> {
    // SAFETY: two numbers; the pid is positive, so it is one process.
    let sent = Errno::result(unsafe { libc::kill(pid, signal) });
    signalled(sent.map(|_| ()), pid, signal)
}

fn signalled(sent: Result<(), Errno>, pid: i32, signal: i32) -> Result<(), Error> {
    match sent {
        Ok(()) => Ok(()),
        Err(Errno::ESRCH) => Err(Error::Finished),
        Err(Errno::EINVAL) => Err(Error::Invalid {
            field: "signal",
            reason: format!("there is no signal {signal}"),
        }),
        Err(errno) => Ok(Err(errno).doing("signal", pid)?),
    }
}
