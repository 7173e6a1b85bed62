//! Child processes with a deadline, their output kept.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a finished process left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub took: Duration,
}

impl Finished {
    /// Exit code as a shell shows it.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails with both outputs unless the exit code is `code`.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(
            self.code() == code,
            "exit code {}, expected {code}\n{}",
            self.code(),
            self.tail()
        );
        Ok(self)
    }

    /// Fails with both outputs unless the exit code is 0.
    pub fn ok(self) -> Result<Self> {
        self.expect_code(0)
    }

    /// The end of both outputs, for messages.
    pub fn tail(&self) -> String {
        format!(
            "stdout: {}\nstderr: {}",
            tail(&self.out(), 1500),
            tail(&self.err(), 1500)
        )
    }
}

/// The last `length` bytes of a text, whole characters.
pub fn tail(text: &str, length: usize) -> &str {
    let mut from = text.len().saturating_sub(length);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

/// A running process whose outputs are being collected.
pub struct Running {
    child: Child,
    begun: Instant,
    stdout: Option<Collector>,
    stderr: Option<Collector>,
}

/// Reads a stream to its end on a thread of its own.
struct Collector {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: JoinHandle<()>,
}

/// Starts a process with piped standard streams.
pub fn start(command: &mut Command) -> Result<Running> {
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    Ok(Running {
        child,
        begun,
        stdout,
        stderr,
    })
}

fn collect(mut stream: impl Read + Send + 'static) -> Collector {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let collected = Arc::clone(&bytes);
    let thread = thread::spawn(move || {
        let mut block = vec![0; 1 << 16];
        // A stream that breaks has given all it will give.
        while let Ok(length @ 1..) = stream.read(&mut block) {
            lock(&collected).extend_from_slice(&block[..length]);
        }
    });
    Collector { bytes, thread }
}

/// Bytes are whole whatever happened to the thread that held them.
fn lock(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), signal)?)
    }

    /// Writes to its standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self
            .child
            .stdin
            .as_mut()
            .context("standard input is closed")?;
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// A handle of its standard input for another thread to write to.
    pub fn take_stdin(&mut self) -> Result<std::process::ChildStdin> {
        self.child.stdin.take().context("standard input is closed")
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits until its standard output holds `wanted`.
    pub fn await_output(&mut self, wanted: &str, deadline: Duration) -> Result<()> {
        eventually(&format!("{wanted:?} on standard output"), deadline, || {
            let shown = self
                .stdout
                .as_ref()
                .map(|collector| lock(&collector.bytes).clone());
            let found = String::from_utf8_lossy(&shown.unwrap_or_default()).contains(wanted);
            ensure!(
                found || self.is_running()?,
                "ended before {wanted:?} on standard output"
            );
            Ok(found.then_some(()))
        })
    }

    /// Closes its standard input and waits; past the deadline it is killed
    /// and its output is in the error.
    pub fn finish(mut self, deadline: Duration) -> Result<Finished> {
        self.close_stdin();
        self.wait(deadline)
    }

    /// Waits with standard input left open.
    pub fn wait(mut self, deadline: Duration) -> Result<Finished> {
        let mut late = false;
        let asked = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if asked.elapsed() > deadline {
                late = true;
                self.child.kill()?;
                break self.child.wait()?;
            }
            thread::sleep(Duration::from_millis(5));
        };
        let took = self.begun.elapsed();
        let finished = Finished {
            status,
            stdout: joined(self.stdout.take()),
            stderr: joined(self.stderr.take()),
            took,
        };
        if late {
            bail!(
                "still running after {} s\n{}",
                deadline.as_secs(),
                finished.tail()
            );
        }
        Ok(finished)
    }
}

fn joined(collector: Option<Collector>) -> Vec<u8> {
    let Some(collector) = collector else {
        return Vec::new();
    };
    // What it had read before it panicked counts.
    let _ = collector.thread.join();
    std::mem::take(&mut *lock(&collector.bytes))
}

/// Runs a command to its end with nothing on standard input.
pub fn run(command: &mut Command, deadline: Duration) -> Result<Finished> {
    start(command)?
        .finish(deadline)
        .with_context(|| format!("{command:?}"))
}

/// A process on a pseudo-terminal, seen from the terminal's side.
pub struct OnTerminal {
    child: Child,
    master: std::fs::File,
}

impl OnTerminal {
    /// Starts `command` with a terminal of the given size as all its streams
    /// and as its controlling terminal.
    pub fn start(command: &mut Command, rows: u16, columns: u16) -> Result<Self> {
        use std::os::unix::process::CommandExt;
        let size = nix::pty::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = nix::pty::openpty(&size, None)?;
        command
            .stdin(Stdio::from(pty.slave.try_clone()?))
            .stdout(Stdio::from(pty.slave.try_clone()?))
            .stderr(Stdio::from(pty.slave.try_clone()?));
        // SAFETY: setsid and ioctl are safe to call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        // The command keeps copies of the slave until it is given others.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self {
            child,
            master: std::fs::File::from(pty.master),
        })
    }

    /// Types `text`.
    pub fn write(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Changes the terminal's size, which tells the process with SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = nix::pty::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the descriptor is open and `size` outlives the call.
        let done = unsafe {
            libc::ioctl(
                std::os::fd::AsRawFd::as_raw_fd(&self.master),
                libc::TIOCSWINSZ,
                &raw const size,
            )
        };
        ensure!(
            done == 0,
            "set the terminal's size: {}",
            std::io::Error::last_os_error()
        );
        Ok(())
    }

    /// Reads until the output holds `wanted`; returns all that was read.
    pub fn read_until(&mut self, wanted: &str, deadline: Duration) -> Result<String> {
        let begun = Instant::now();
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(wanted) {
            let shown = || tail(&String::from_utf8_lossy(&seen), 1500).to_owned();
            let left = deadline.saturating_sub(begun.elapsed());
            ensure!(
                !left.is_zero(),
                "no {wanted:?} on the terminal within {deadline:?}: {}",
                shown()
            );
            match self.read_some(left.min(Duration::from_millis(200)))? {
                Some(block) if block.is_empty() => {
                    bail!("terminal closed before {wanted:?}: {}", shown())
                }
                Some(block) => seen.extend(block),
                None => {}
            }
        }
        Ok(String::from_utf8_lossy(&seen).into_owned())
    }

    /// Reads what is there: `None` after `wait`, empty when closed.
    fn read_some(&mut self, wait: Duration) -> Result<Option<Vec<u8>>> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, timeout)? == 0 {
            return Ok(None);
        }
        let mut block = vec![0; 4096];
        match self.master.read(&mut block) {
            Ok(length) => {
                block.truncate(length);
                Ok(Some(block))
            }
            // Linux answers EIO once the last slave is closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(Some(Vec::new())),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads to the end and waits; returns the output and the exit code.
    pub fn finish(mut self, deadline: Duration) -> Result<(String, i32)> {
        let begun = Instant::now();
        let mut seen = Vec::new();
        let status = loop {
            if let Some(block) = self.read_some(Duration::from_millis(50))? {
                seen.extend(block);
            }
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if begun.elapsed() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!(
                    "still running after {deadline:?}: {}",
                    tail(&String::from_utf8_lossy(&seen), 1500)
                );
            }
        };
        while let Some(block) = self.read_some(Duration::from_millis(50))? {
            if block.is_empty() {
                break;
            }
            seen.extend(block);
        }
        let code = status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        Ok((String::from_utf8_lossy(&seen).into_owned(), code))
    }
}

/// Calls `check` until it gives a value, at most for `deadline`.
pub fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut check: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(value) = check()? {
            return Ok(value);
        }
        ensure!(
            begun.elapsed() < deadline,
            "not within {deadline:?}: {what}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}
