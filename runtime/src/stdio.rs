//! Standard streams: containerd's fifos on one side, one host port of the
//! guest's vsock each on the other. Nothing is buffered here beyond one copy's
//! worth, so whoever reads slowly slows the process down, as on any node.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use husk_protocol::agent::Streams as StreamPorts;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use ttrpc::Code;

use crate::agent_client::Written;
use crate::ports;

mod progress;

pub use progress::Limits;
use progress::{Outputs, Progress, Wait};

/// One read or write at most, bytes.
const CHUNK: usize = 32 << 10;

/// How often it is looked at whether output is complete.
const TICK: Duration = Duration::from_millis(50);

/// What containerd asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Fifo; empty: none.
    pub stdin: String,
    /// Fifo or `file://`; empty: none.
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

enum Sink {
    Fifo(pipe::Sender),
    File(Arc<File>),
}

/// Streams that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A scheme that we do not speak.
    #[error("{stream} is {uri:?}; known are fifos and file://")]
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
            Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Code::NOT_FOUND
            }
            Self::Open { .. } | Self::Socket { .. } => Code::UNKNOWN,
        }
    }
}

impl Stdio {
    /// Opens the streams and begins to copy.
    ///
    /// # Errors
    /// A stream cannot be opened.
    pub fn open(
        paths: &StdioPaths,
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
        if !paths.stdout.is_empty() {
            let sink = Sink::open("stdout", &paths.stdout)?;
            let (socket, port) = connect("stdout")?;
            guest.ports.stdout_port = port;
            let first = on_first_output.take();
            let progress = Arc::clone(outputs.stdout.insert(Arc::default()));
            copies.spawn(copy_out(socket, sink, progress, first));
        }
        // A terminal has one output.
        if !paths.stderr.is_empty() && !paths.terminal {
            let sink = Sink::open("stderr", &paths.stderr)?;
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

impl Drop for Input {
    fn drop(&mut self) {
        self.copy.abort();
    }
}

impl Sink {
    fn open(stream: &'static str, uri: &str) -> Result<Self, StdioError> {
        let path = local_path(stream, uri)?;
        let fail = |source| StdioError::Open {
            stream,
            path: path.clone(),
            source,
        };
        let is_file = uri.starts_with("file://");
        if !is_file && path.metadata().map_err(fail)?.file_type().is_fifo() {
            // Both ways: opening does not wait for a reader, and readers may
            // come and go.
            let fifo = pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(&path)
                .map_err(fail)?;
            return Ok(Self::Fifo(fifo));
        }
        let file = OpenOptions::new()
            .append(true)
            .create(is_file)
            .open(&path)
            .map_err(fail)?;
        Ok(Self::File(Arc::new(file)))
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => fifo.write_all(bytes).await,
            Self::File(file) => {
                let (mut file, bytes) = (Arc::clone(file), bytes.to_vec());
                tokio::task::spawn_blocking(move || file.write_all(&bytes)).await?
            }
        }
    }
}

fn local_path(stream: &'static str, uri: &str) -> Result<PathBuf, StdioError> {
    match uri.split_once("://") {
        None => Ok(PathBuf::from(uri)),
        Some(("file" | "fifo", path)) => {
            Ok(PathBuf::from(path.split('?').next().unwrap_or_default()))
        }
        Some(_) => Err(StdioError::Scheme {
            stream,
            uri: uri.to_owned(),
        }),
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
    let _ = shutdown_read(&socket);
}

fn shutdown_read(socket: &UnixStream) -> io::Result<()> {
    use std::os::fd::AsFd;
    let socket: std::os::unix::net::UnixStream = socket.as_fd().try_clone_to_owned()?.into();
    socket.shutdown(Shutdown::Both)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream as StdStream;
    use tokio::time::Instant;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn far(guest: &mut GuestStreams, port: u32) -> StdStream {
        let index = guest
            .host_ports
            .iter()
            .position(|(p, _)| *p == port)
            .unwrap();
        let stream: StdStream = guest.host_ports.remove(index).1.into();
        stream.set_nonblocking(false).unwrap();
        stream
    }

    fn nothing() -> OnFirstOutput {
        Box::new(|| {})
    }

    fn slow_reader(seconds: u64) -> Limits {
        Limits {
            slow_reader: Duration::from_secs(seconds),
            stalled: Duration::from_secs(60),
            others: Duration::from_secs(60),
        }
    }

    #[tokio::test]
    async fn input_ends_only_when_closed_and_after_its_data() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StdioPaths {
            stdin: fifo(dir.path(), "in"),
            ..StdioPaths::default()
        };
        let (mut stdio, mut guest) = Stdio::open(&paths, nothing()).unwrap();
        let port = guest.ports.stdin_port;
        let mut process = far(&mut guest, port);
        for text in ["first ", "second"] {
            // Each writer is a client that attaches and detaches.
            let path = paths.stdin.clone();
            tokio::task::spawn_blocking(move || std::fs::write(path, text))
                .await
                .unwrap()
                .unwrap();
        }
        stdio.close_input();
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            process.read_to_string(&mut text).unwrap();
            text
        });
        assert_eq!(read.await.unwrap(), "first second");
    }

    #[tokio::test]
    async fn output_arrives_whole_before_drain_returns() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StdioPaths {
            stdout: fifo(dir.path(), "out"),
            stderr: format!("file://{}", dir.path().join("err").display()),
            ..StdioPaths::default()
        };
        let (mut stdio, mut guest) = Stdio::open(&paths, nothing()).unwrap();
        let (out, err) = (guest.ports.stdout_port, guest.ports.stderr_port);
        let mut out = far(&mut guest, out);
        let mut err = far(&mut guest, err);
        let path = paths.stdout.clone();
        let reader = tokio::task::spawn_blocking(move || std::fs::read(path).unwrap());
        let writer = tokio::task::spawn_blocking(move || {
            out.write_all(&vec![7; 1 << 20]).unwrap();
            err.write_all(b"complaint").unwrap();
        });
        writer.await.unwrap();
        stdio.drain(slow_reader(60)).await;
        let err = std::fs::read(dir.path().join("err")).unwrap();
        assert_eq!(err, b"complaint");
        assert_eq!(reader.await.unwrap().len(), 1 << 20);
    }

    #[tokio::test]
    async fn drain_does_not_wait_for_others_that_hold_the_output() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StdioPaths {
            stdout: fifo(dir.path(), "out"),
            ..StdioPaths::default()
        };
        let (mut stdio, guest) = Stdio::open(&paths, nothing()).unwrap();
        timeout(Duration::from_secs(5), stdio.drain(slow_reader(60)))
            .await
            .unwrap();
        drop(guest);
    }

    #[tokio::test]
    async fn drain_waits_for_a_guest_that_takes_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StdioPaths {
            stdout: format!("file://{}", dir.path().join("out").display()),
            ..StdioPaths::default()
        };
        let (mut stdio, mut guest) = Stdio::open(&paths, nothing()).unwrap();
        let port = guest.ports.stdout_port;
        let mut out = far(&mut guest, port);
        stdio.expect(Written {
            stdout: 4,
            stderr: 0,
        });
        let writer = tokio::task::spawn_blocking(move || {
            std::thread::sleep(Duration::from_millis(1500));
            out.write_all(b"tail").unwrap();
            out
        });
        stdio.drain(slow_reader(60)).await;
        assert_eq!(std::fs::read(dir.path().join("out")).unwrap(), b"tail");
        drop(writer.await);
    }

    #[tokio::test]
    async fn drain_waits_for_a_slow_reader_as_long_as_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StdioPaths {
            stdout: fifo(dir.path(), "out"),
            ..StdioPaths::default()
        };
        let (mut stdio, mut guest) = Stdio::open(&paths, nothing()).unwrap();
        let port = guest.ports.stdout_port;
        let mut out = far(&mut guest, port);
        // More than the fifo holds, and the process has gone.
        let size = 100 << 10;
        out.write_all(&vec![7; size]).unwrap();
        drop(out);
        let began = Instant::now();
        stdio.drain(slow_reader(1)).await;
        assert!(began.elapsed() >= Duration::from_secs(1));

        let path = paths.stdout.clone();
        let reader = tokio::task::spawn_blocking(move || {
            let mut file = File::open(path).unwrap();
            std::thread::sleep(Duration::from_secs(1));
            let mut text = Vec::new();
            file.read_to_end(&mut text).unwrap();
            text.len()
        });
        stdio.drain(slow_reader(60)).await;
        drop(stdio);
        assert_eq!(reader.await.unwrap(), size);
    }

    #[tokio::test]
    async fn names_what_it_cannot_open() {
        let cases = [
            ("binary:///bin/logger", "binary:///bin/logger"),
            ("/does/not/exist", "stdout /does/not/exist"),
        ];
        for (uri, expected) in cases {
            let paths = StdioPaths {
                stdout: uri.to_owned(),
                ..StdioPaths::default()
            };
            let error = Stdio::open(&paths, nothing()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
