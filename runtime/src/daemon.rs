//! The daemon that `start` leaves behind: it says when it can serve, serves once
//! `start` has said so, and ends where `start` was killed before. containerd knows
//! nothing of one whose address it was not told, so nobody would ever end it; and
//! it learns only from `start` why there is none.

use std::env;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// What the daemon says when it can serve. Whatever else it says is why not.
const READY: &[u8] = b"\n";

/// Longest word of a daemon that cannot serve, bytes.
const COMPLAINT: u64 = 4096;

/// How long a daemon may take to be ready; some nodes are slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long one may take to end that has lost whoever started it.
const LAST_PATIENCE: Duration = Duration::from_secs(5);

/// A daemon that waits for its word, and dies unless it gets it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// Its standard input, both ways.
    line: Option<UnixStream>,
}

impl Daemon {
    /// Runs this program with what `command` adds. It does not get our standard
    /// output: whoever started us waits until nobody holds that any more.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn spawn(command: impl FnOnce(&mut Command) -> &mut Command) -> io::Result<Self> {
        let (line, far) = UnixStream::pair()?;
        line.set_read_timeout(Some(PATIENCE))?;
        let mut program = Command::new(env::current_exe()?);
        let child = command(&mut program)
            .stdin(Stdio::from(OwnedFd::from(far)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self {
            child,
            line: Some(line),
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it can serve.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn await_ready(&mut self) -> io::Result<()> {
        let Some(line) = &self.line else {
            return Ok(());
        };
        let mut said = [0];
        let count = { line }.read(&mut said).map_err(too_late)?;
        if said[..count] == *READY {
            return Ok(());
        }
        let mut complaint = said[..count].to_vec();
        let rest = line.take(COMPLAINT).read_to_end(&mut complaint);
        rest.map_err(too_late)?;
        if complaint.is_empty() {
            complaint.extend(b"it ended without a word");
        }
        Err(io::Error::other(String::from_utf8_lossy(&complaint)))
    }

    /// Says that it may serve, and lets it go.
    ///
    /// # Errors
    /// It has ended already.
    pub fn release(mut self) -> io::Result<()> {
        match self.line.take() {
            Some(mut line) => line.write_all(b"\n"),
            None => Ok(()),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let Some(mut line) = self.line.take() else {
            return;
        };
        // It ends by itself then, and takes its socket with it.
        let _ = line.shutdown(Shutdown::Write);
        let _ = line.set_read_timeout(Some(LAST_PATIENCE));
        let _ = io::copy(&mut line, &mut io::sink());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says, as the daemon, that it can serve.
///
/// # Errors
/// Nobody hears it.
pub fn tell_ready() -> io::Result<()> {
    say(READY)
}

/// Says, as the daemon, why it cannot.
pub fn tell_failure(why: &str) {
    // Started by hand, there may be nobody to tell.
    let _ = say(why.as_bytes());
}

/// Waits, as the daemon, for the word; false: nobody will say it any more.
///
/// # Errors
/// The standard input cannot be read.
pub fn is_released() -> io::Result<bool> {
    match io::stdin().read(&mut [0]) {
        // It has not even read that this is ready.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
        read => Ok(read? > 0),
    }
}

/// The kernel's words for it, `EAGAIN`'s, are those for want of threads as well.
fn too_late(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(
            io::ErrorKind::TimedOut,
            format!("it was not ready within {} s", PATIENCE.as_secs()),
        ),
        _ => error,
    }
}

fn say(text: &[u8]) -> io::Result<()> {
    let stdin = io::stdin();
    rustix::io::write(stdin.as_fd(), text)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_late_is_told_of_in_words() {
        let (line, _far) = UnixStream::pair().unwrap();
        line.set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        let mut daemon = Daemon {
            child: Command::new("true").spawn().unwrap(),
            line: Some(line),
        };
        let error = daemon.await_ready().unwrap_err();
        assert_eq!(error.to_string(), "it was not ready within 60 s");
        // Nobody is at the other end whose end could be waited for.
        daemon.line = None;
        daemon.child.wait().unwrap();
    }
}
