//! The daemon that `start` leaves behind: it serves once `start` has said so,
//! and ends where `start` was killed before. containerd knows nothing of one
//! whose address it was not told, so nobody would ever end it.

use std::env;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, Stdio};

/// A daemon that waits for its word, and dies unless it gets it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    word: Option<ChildStdin>,
}

impl Daemon {
    /// Runs this program with what `command` adds. It gets `listener` as standard
    /// output, which it has no other use for: whoever started us waits until
    /// nobody holds our own any more.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn spawn(
        listener: OwnedFd,
        command: impl FnOnce(&mut Command) -> &mut Command,
    ) -> io::Result<Self> {
        let mut program = Command::new(env::current_exe()?);
        let mut child = command(&mut program)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(listener))
            .stderr(Stdio::null())
            .spawn()?;
        let word = child.stdin.take();
        Ok(Self { child, word })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says that it may serve, and lets it go.
    ///
    /// # Errors
    /// It has ended already.
    pub fn release(mut self) -> io::Result<()> {
        match self.word.take() {
            Some(mut word) => word.write_all(b"\n"),
            None => Ok(()),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.word.is_some() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Waits, as the daemon, for the word; false: nobody will say it any more.
///
/// # Errors
/// The standard input cannot be read.
pub fn is_released() -> io::Result<bool> {
    Ok(io::stdin().read(&mut [0])? > 0)
}
