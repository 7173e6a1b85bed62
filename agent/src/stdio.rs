//! Carries standard streams between a process and the host: one connection a
//! stream, end of file as half-close, and never more than one buffer of bytes
//! in our hands, so that who reads slowly slows down who writes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};

use husk_protocol::agent::Streams;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::task::JoinHandle;

use crate::error::{Doing, OsError};
use crate::lock::lock;
use crate::socket::{Dialler, Socket, registered};

/// Held only while there is something to carry.
const BUFFER_BYTES: usize = 64 << 10;

/// The agent's end of a process's terminal.
#[derive(Debug, Clone)]
pub struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    /// Takes over the descriptor of the master.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&master, true)?;
        Ok(Self(Arc::new(registered(master)?)))
    }

    /// Tells the terminal's size.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        let size = Winsize {
            ws_row: height,
            ws_col: width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(self.0.get_ref(), size)?)
    }
}

/// What a new process gets as its standard streams; `None` is the null device.
#[derive(Debug, Default)]
pub struct ChildStreams {
    /// Descriptor 0.
    pub stdin: Option<OwnedFd>,
    /// Descriptor 1.
    pub stdout: Option<OwnedFd>,
    /// Descriptor 2.
    pub stderr: Option<OwnedFd>,
}

impl ChildStreams {
    /// Lets a user open them by name, as /dev/stdout.
    pub fn hand_over(&self, uid: u32, gid: u32) -> Result<(), OsError> {
        let owner = (
            rustix::fs::Uid::from_raw(uid),
            rustix::fs::Gid::from_raw(gid),
        );
        for pipe in [&self.stdin, &self.stdout, &self.stderr]
            .into_iter()
            .flatten()
        {
            rustix::fs::fchown(pipe, Some(owner.0), Some(owner.1)).doing("hand over", "a pipe")?;
        }
        Ok(())
    }
}

/// The connections of a process's streams and our ends of its pipes.
#[derive(Debug)]
pub struct Stdio {
    stdin: Option<Socket>,
    stdout: Option<Socket>,
    stderr: Option<Socket>,
    pipes: Pipes,
}

#[derive(Debug, Default)]
struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Stdio {
    /// Dials the streams' ports and makes the pipes of a process without a
    /// terminal.
    pub async fn connect(
        dialler: &Dialler,
        ports: &Streams,
        terminal: bool,
    ) -> Result<(Self, ChildStreams), OsError> {
        let dial = async |port: u32| match port {
            0 => Ok(None),
            port => dialler
                .dial(port)
                .await
                .map(Some)
                .doing("dial host port", port),
        };
        let stderr_port = if terminal { 0 } else { ports.stderr_port };
        let (stdin, stdout, stderr) = tokio::try_join!(
            dial(ports.stdin_port),
            dial(ports.stdout_port),
            dial(stderr_port),
        )?;
        let mut pipes = Pipes::default();
        let mut child = ChildStreams::default();
        if !terminal {
            let pipe = || pipe_with(PipeFlags::CLOEXEC).doing("make", "a pipe");
            if stdin.is_some() {
                let (read, write) = pipe()?;
                (child.stdin, pipes.stdin) = (Some(read), Some(write));
            }
            if stdout.is_some() {
                let (read, write) = pipe()?;
                (pipes.stdout, child.stdout) = (Some(read), Some(write));
            }
            if stderr.is_some() {
                let (read, write) = pipe()?;
                (pipes.stderr, child.stderr) = (Some(read), Some(write));
            }
        }
        let stdio = Self {
            stdin,
            stdout,
            stderr,
            pipes,
        };
        Ok((stdio, child))
    }

    /// Starts to carry. What is returned ends the input when dropped.
    pub fn start(self, terminal: Option<&Terminal>) -> Result<Carried, OsError> {
        let ours = |fd: OwnedFd| -> io::Result<Arc<AsyncFd<OwnedFd>>> {
            rustix::io::ioctl_fionbio(&fd, true)?;
            Ok(Arc::new(registered(fd)?))
        };
        let end = |pipe: Option<OwnedFd>| match (terminal, pipe) {
            (Some(terminal), _) => Ok(Some(Arc::clone(&terminal.0))),
            (None, Some(pipe)) => ours(pipe).map(Some).doing("use", "a pipe"),
            (None, None) => Ok(None),
        };
        let carry = |socket: Option<Socket>, pipe| {
            let (Some(socket), Some(from)) = (socket, end(pipe)?) else {
                return Ok(Written::default());
            };
            let written = Written::of(&from);
            let taken = Arc::clone(&written.taken);
            tokio::spawn(async move {
                if let Err(error) = carry_out(&from, socket, &taken).await {
                    log::debug!("output: {error}");
                }
            });
            Ok(written)
        };
        let stdout = carry(self.stdout, self.pipes.stdout)?;
        let stderr = carry(self.stderr, self.pipes.stderr)?;
        let input = match (self.stdin, end(self.pipes.stdin)?) {
            (Some(socket), Some(to)) => Some(tokio::spawn(async move {
                if let Err(error) = carry_in(socket, &to).await {
                    log::debug!("input: {error}");
                }
            })),
            _ => None,
        };
        Ok(Carried {
            input,
            stdout,
            stderr,
        })
    }
}

/// The streams of a process under way.
#[derive(Debug)]
pub struct Carried {
    input: Option<JoinHandle<()>>,
    /// What it wrote as its standard output.
    pub stdout: Written,
    /// What it wrote as its standard error.
    pub stderr: Written,
}

impl Drop for Carried {
    fn drop(&mut self) {
        if let Some(task) = &self.input {
            task.abort();
        }
    }
}

/// What was written to a stream, as far as we can see.
#[derive(Debug, Default)]
pub struct Written {
    /// Bytes taken from it. Locked while more are taken.
    taken: Arc<Mutex<u64>>,
    from: Weak<AsyncFd<OwnedFd>>,
}

impl Written {
    fn of(from: &Arc<AsyncFd<OwnedFd>>) -> Self {
        Self {
            taken: Arc::default(),
            from: Arc::downgrade(from),
        }
    }

    /// Bytes so far, those that nobody has taken yet included.
    pub fn bytes(&self) -> u64 {
        let taken = lock(&self.taken);
        let waiting = self.from.upgrade().map(|from| {
            // A terminal whose other end is closed may refuse; then it is empty.
            rustix::io::ioctl_fionread(from.get_ref()).unwrap_or(0)
        });
        *taken + waiting.unwrap_or(0)
    }
}

/// Until nobody has the other end of the pipe or terminal open.
async fn carry_out(from: &AsyncFd<OwnedFd>, mut to: Socket, taken: &Mutex<u64>) -> io::Result<()> {
    'carry: loop {
        let mut guard = from.readable().await?;
        let mut buf: Vec<u8> = Vec::with_capacity(BUFFER_BYTES);
        loop {
            buf.clear();
            let read = guard.try_io(|from| {
                let mut taken = lock(taken);
                let spare = rustix::buffer::spare_capacity(&mut buf);
                let count = rustix::io::read(from.get_ref(), spare)?;
                *taken += count as u64;
                Ok(count)
            });
            match read {
                Ok(Ok(0)) => break 'carry,
                Ok(Ok(_)) => to.write_all(&buf).await?,
                // How a terminal says that nobody uses it any more.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => break 'carry,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => break,
            }
        }
    }
    to.shutdown().await
}

/// Until the host half-closes or nobody reads any more.
async fn carry_in(mut from: Socket, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        from.readable().await?;
        let mut buf = vec![0; BUFFER_BYTES];
        let count = from.read(&mut buf).await?;
        if count == 0 {
            return Ok(());
        }
        let mut rest = &buf[..count];
        while !rest.is_empty() {
            let written = to
                .async_io(Interest::WRITABLE, |to| Ok(rustix::io::write(to, rest)?))
                .await;
            match written {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
