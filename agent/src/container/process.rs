//! A process of a container while it runs and after.

use nix::errno::Errno;
use tokio::sync::{oneshot, watch};

use crate::error::{Doing, Error};
use crate::reaper::Exit;
use crate::stdio::{Input, Terminal};

/// A process that was made.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    terminal: Option<Terminal>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Process {
    /// Watches over a process; `on_exit` runs before anybody hears of its end.
    pub fn new(
        pid: i32,
        terminal: Option<Terminal>,
        input: Input,
        ended: oneshot::Receiver<Exit>,
        on_exit: impl FnOnce() + Send + 'static,
    ) -> Self {
        let (publish, exit) = watch::channel(None);
        tokio::spawn(async move {
            if let Ok(ended) = ended.await {
                on_exit();
                drop(input);
                publish.send_replace(Some(ended));
            }
        });
        Self {
            pid,
            terminal,
            exit,
        }
    }

    /// As our PID namespace numbers it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How it ended, if it did.
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Returns when it has ended.
    pub async fn wait(&self) -> Result<Exit, Error> {
        let mut exit = self.exit.clone();
        let exit = exit.wait_for(Option::is_some).await;
        exit.ok().and_then(|exit| *exit).ok_or(Error::Finished)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        if self.exited().is_some() {
            return Err(Error::Finished);
        }
        send_signal(self.pid, signal)
    }

    /// Tells its terminal's size.
    pub fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        let terminal = self.terminal.as_ref().ok_or(Error::NoTerminal)?;
        Ok(terminal
            .resize(width, height)
            .doing("resize", "the terminal")?)
    }
}

/// Any signal number, real-time ones included.
pub fn send_signal(pid: i32, signal: i32) -> Result<(), Error> {
    // SAFETY: two numbers; the pid is positive, so it is one process.
    let sent = Errno::result(unsafe { libc::kill(pid, signal) });
    match sent {
        Ok(_) => Ok(()),
        Err(Errno::ESRCH) => Err(Error::Finished),
        Err(Errno::EINVAL) => Err(Error::Invalid {
            field: "signal",
            reason: format!("there is no signal {signal}"),
        }),
        Err(errno) => Ok(Err(errno).doing("signal", pid)?),
    }
}
