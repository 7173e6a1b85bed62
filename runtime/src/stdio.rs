//! Standard streams: containerd's fifos on one side, one host port of the
//! guest's vsock each on the other. Nothing is buffered here beyond one copy's
//! worth, so whoever reads slowly slows the process down, as on any node.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::agent::Streams as StreamPorts;
use rustix::net::{Shutdown, shutdown};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use ttrpc::Code;

use crate::agent_client::Written;
use crate::ports;

mod logger;
mod progress;
mod sink;

pub use logger::Owner;
use logger::{Logger, LoggerInput, is_program};
pub use progress::Limits;
use progress::{Outputs, Progress, Wait};
use sink::{Sink, local_path};

/// One read or write at most, bytes.
const CHUNK: usize = 32 << 10;

/// How often it is looked at whether output is complete.
const TICK: Duration = Duration::from_millis(50);

/// What containerd asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Fifo; empty: none.
    pub stdin: String,
    /// Fifo or `file://`, or `binary://` for both outputs; empty: none.
    pub stdout: String,
    /// Fifo or `file://`; empty: none.
    pub stderr: String,
    /// One terminal instead of three streams.
    pub terminal: bool,
}

/// The streams of one process. They end when this is dropped.
#[derive(Debug)]
pub struct Stdio {
    input: Option<Input>,
    copies: JoinSet<()>,
    outputs: Outputs,
    logger: Option<Logger>,
}

/// What the machine and the agent are told about the streams of one process.
#[derive(Debug)]
pub struct GuestStreams {
    /// For the VMM.
    pub host_ports: Vec<(u32, OwnedFd)>,
    /// For the agent.
    pub ports: StreamPorts,
}

impl GuestStreams {
    /// What the VMM is told to open.
    pub fn port_numbers(&self) -> Vec<u32> {
        self.host_ports.iter().map(|(port, _)| *port).collect()
    }
}

/// Called with the first byte of output.
pub type OnFirstOutput = Box<dyn FnOnce() + Send>;

/// Keeps the input open for those who attach later: the fifo's reader sees its
/// end only after this and every other writer is gone.
#[derive(Debug)]
struct Input {
    copy: AbortHandle,
    keeper: Option<OwnedFd>,
}

/// Streams that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A scheme that we do not speak.
    #[error("{stream} is {uri:?}; known are fifos, file:// and, for stdout, binary://")]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// As given.
        uri: String,
    },
    /// It could not be opened.
    #[error("{stream} {path}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// The fifo or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program that is to take it.
    #[error("logging program {path}")]
    Logger {
        /// The program.
        path: PathBuf,
        /// Why it does not.
        #[source]
        source: io::Error,
    },
    /// No socket for it.
    #[error("socket for {stream}")]
    Socket {
        /// Which stream.
        stream: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl StdioError {
    /// What containerd is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Scheme { .. } => Code::UNIMPLEMENTED,
            Self::Open { source, .. } | Self::Logger { source, .. }
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Code::NOT_FOUND
            }
            Self::Open { .. } | Self::Logger { .. } | Self::Socket { .. } => Code::UNKNOWN,
        }
    }
}

impl Stdio {
    /// Opens the streams and begins to copy.
    ///
    /// # Errors
    /// A stream cannot be opened.
    pub async fn open(
        paths: &StdioPaths,
        owner: &Owner,
        on_first_output: OnFirstOutput,
    ) -> Result<(Self, GuestStreams), StdioError> {
        let mut guest = GuestStreams {
            host_ports: Vec::new(),
            ports: StreamPorts::default(),
        };
        let mut connect = |stream| {
            let (near, far) = pair(stream)?;
            let port = ports::random().map_err(|source| StdioError::Socket { stream, source })?;
            guest.host_ports.push((port, far.into()));
            Ok::<_, StdioError>((near, port))
        };

        let sinks = Sinks::open(paths, owner).await?;
        let mut input = None;
        if !paths.stdin.is_empty() {
            let (fifo, keeper) = open_input(&paths.stdin)?;
            let (socket, port) = connect("stdin")?;
            let copy = tokio::spawn(copy_in(fifo, socket)).abort_handle();
            guest.ports.stdin_port = port;
            input = Some(Input {
                copy,
                keeper: Some(keeper),
            });
        }
        let mut copies = JoinSet::new();
        // The end of a terminal's output may still be on its way through it.
        let mut outputs = Outputs::new(!paths.terminal);
        let mut on_first_output = Some(on_first_output);
        if let Some(sink) = sinks.stdout {
            let (socket, port) = connect("stdout")?;
            guest.ports.stdout_port = port;
            let first = on_first_output.take();
            let progress = Arc::clone(outputs.stdout.insert(Arc::default()));
            copies.spawn(copy_out(socket, sink, progress, first));
        }
        if let Some(sink) = sinks.stderr {
            let (socket, port) = connect("stderr")?;
            guest.ports.stderr_port = port;
            let first = on_first_output.take();
            let progress = Arc::clone(outputs.stderr.insert(Arc::default()));
            copies.spawn(copy_out(socket, sink, progress, first));
        }
        let stdio = Self {
            input,
            copies,
            outputs,
            logger: sinks.logger,
        };
        Ok((stdio, guest))
    }

    /// Lets the process see the end of its input, after what is in the fifo.
    pub fn close_input(&mut self) {
        if let Some(input) = &mut self.input {
            input.keeper = None;
        }
    }

    /// The process has ended and wrote so much.
    pub fn expect(&mut self, written: Written) {
        self.outputs.expect(written);
    }

    /// Ends the copying, and waits until a program that takes the output has.
    pub async fn close(mut self) {
        self.input = None;
        self.copies.shutdown().await;
        if let Some(logger) = self.logger.take() {
            logger.end().await;
        }
    }

    /// Ends the input and waits for the output: until it ends, or until all is
    /// there that was written and nothing comes any more because another process
    /// holds it open, or for as long as `limits` say.
    pub async fn drain(&mut self, limits: Limits) {
        self.input = None;
        let mut wait = Wait::new(&self.outputs, limits);
        loop {
            match timeout(TICK, self.copies.join_next()).await {
                Ok(Some(_)) => continue,
                Ok(None) => return,
                Err(_) if wait.is_over(&mut self.outputs) => return,
                Err(_) => {}
            }
        }
    }
}

/// Where the outputs of one process go.
struct Sinks {
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

impl Sinks {
    async fn open(paths: &StdioPaths, owner: &Owner) -> Result<Self, StdioError> {
        // A terminal has one output.
        let has_errors = !paths.terminal;
        if is_program(&paths.stdout) {
            let (logger, input) = Logger::start(&paths.stdout, owner).await?;
            let LoggerInput { stdout, stderr } = input;
            return Ok(Self {
                stdout: Some(Sink::Pipe(stdout)),
                stderr: has_errors.then_some(Sink::Pipe(stderr)),
                logger: Some(logger),
            });
        }
        let open = |stream, uri: &str| match uri {
            "" => Ok(None),
            uri => Sink::open(stream, uri).map(Some),
        };
        let stderr = if has_errors { &paths.stderr } else { "" };
        Ok(Self {
            stdout: open("stdout", &paths.stdout)?,
            stderr: open("stderr", stderr)?,
            logger: None,
        })
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.copy.abort();
    }
}

/// The fifo's reading end, and a writing end that keeps it open.
fn open_input(uri: &str) -> Result<(pipe::Receiver, OwnedFd), StdioError> {
    let path = local_path("stdin", uri)?;
    let open = |path: &Path| {
        // Held until both are open: a writer that comes and goes in between would
        // leave the reader with an end of input that is none, to look at for ever.
        let _both = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let reader = pipe::OpenOptions::new().open_receiver(path)?;
        // A writer that would not wait is refused unless there is a reader.
        let keeper = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Ok((reader, keeper.into()))
    };
    open(&path).map_err(|source| StdioError::Open {
        stream: "stdin",
        path,
        source,
    })
}

fn pair(stream: &'static str) -> Result<(UnixStream, std::os::unix::net::UnixStream), StdioError> {
    let make = || {
        let (near, far) = std::os::unix::net::UnixStream::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        Ok((UnixStream::from_std(near)?, far))
    };
    make().map_err(|source| StdioError::Socket { stream, source })
}

/// Until the input ends, or the process does not want it any more.
async fn copy_in(mut fifo: pipe::Receiver, mut socket: UnixStream) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match fifo.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => {
                tracing::warn!(%error, "stdin");
                break;
            }
        };
        if socket.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
    // Gone already is as good.
    let _ = socket.shutdown().await;
}

/// Until the output ends.
async fn copy_out(
    mut socket: UnixStream,
    mut sink: Sink,
    progress: Arc<Progress>,
    on_first_output: Option<OnFirstOutput>,
) {
    let mut on_first_output = on_first_output;
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match socket.read(&mut buffer).await {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => {
                tracing::debug!(%error, "output");
                break;
            }
        };
        if let Some(report) = on_first_output.take() {
            report();
        }
        progress.take(count);
        if let Err(error) = sink.write(&buffer[..count]).await {
            tracing::warn!(%error, "output");
            break;
        }
        progress.pass_on(count);
    }
    progress.end();
    // Nobody takes more: the process shall know.
    let _ = shutdown(&socket, Shutdown::Both);
}

#[cfg(test)]
mod tests;
