//! One program in the guest, from the operator's request to its end. What it prints
//! waits in the guest until the operator has taken it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use husk_node::shell::{self, Asked, Request, Told};
use husk_protocol::agent::{RunShellRequest, Streams};
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::agent_client::{Agent, AgentError, Written};
use crate::error::{Error, chain};
use crate::ports;
use crate::stdio::StdioError;
use crate::vm_process::Vm;

/// How soon whoever connects says what to run.
const FIRST: Duration = Duration::from_secs(10);

/// How much of a command line is logged, characters.
const LOGGED: usize = 256;

/// One read at most, bytes.
const CHUNK: usize = 32 << 10;

/// How often it is looked at whether output is complete.
const TICK: Duration = Duration::from_millis(20);

/// How often it is looked at whether somebody listens.
const LOOK: Duration = Duration::from_millis(500);

/// How long a guest may take to send what it says a program has printed.
const STALLED: Duration = Duration::from_secs(10);

/// The shim's ends of the program's streams.
struct Ends {
    stdin: Option<UnixStream>,
    stdout: UnixStream,
    stderr: Option<UnixStream>,
}

/// Runs what is asked for, and tells how it ended.
pub async fn attend(stream: UnixStream, vm: Vm, agent: Agent) {
    let (mut asks, tells) = stream.into_split();
    let request = match timeout(FIRST, read(&mut asks)).await {
        Ok(Ok(Some(Asked::Run(request)))) if request.args.len() <= shell::WORDS => request,
        _ => return tell_failure(tells, "this is no request".to_owned()).await,
    };
    let line = request.args.join(" ");
    let line: String = line.chars().take(LOGGED).collect();
    tracing::info!(line, "debug shell");
    let id = match ports::random() {
        Ok(number) => format!("{number:x}"),
        Err(error) => return tell_failure(tells, error.to_string()).await,
    };
    match start(&id, request, &vm, &agent).await {
        Ok(ends) => follow(&id, ends, asks, tells, &agent).await,
        Err(error) => tell_failure(tells, chain(&error)).await,
    }
    // Nothing of it outlives whoever asked; and where nothing ran, nobody knows it.
    if let Err(error) = agent.end_shell(&id).await {
        tracing::debug!(%error, "end of a debug shell");
    }
}

async fn tell_failure(mut tells: OwnedWriteHalf, why: String) {
    // Nobody may listen any more.
    let _ = tells.write_all(&Told::Failed(why).frame()).await;
}

/// Connects the streams, and has the agent run the program.
async fn start(id: &str, request: Request, vm: &Vm, agent: &Agent) -> Result<Ends, Error> {
    let mut host_ports: Vec<(u32, OwnedFd)> = Vec::new();
    let mut open = |is_wanted: bool| match is_wanted {
        true => {
            let (port, near, far) = connection().map_err(|source| StdioError::Socket {
                stream: "debug shell",
                source,
            })?;
            host_ports.push((port, far));
            Ok((port, Some(near)))
        }
        false => Ok::<_, StdioError>((0, None)),
    };
    let (stdin_port, stdin) = open(request.stdin)?;
    let (stdout_port, stdout) = open(true)?;
    let (stderr_port, stderr) = open(request.terminal.is_none())?;
    let numbers: Vec<u32> = host_ports.iter().map(|(port, _)| *port).collect();
    vm.add_host_ports(host_ports).await?;
    let terminal = request.terminal;
    let is_terminal = terminal.is_some();
    let terminal = terminal.unwrap_or_default();
    let request = RunShellRequest {
        shell_id: id.to_owned(),
        args: request.args,
        streams: Some(Streams {
            stdin_port,
            stdout_port,
            stderr_port,
            ..Streams::default()
        })
        .into(),
        terminal: is_terminal,
        terminal_kind: terminal.kind,
        width: terminal.width.into(),
        height: terminal.height.into(),
        ..RunShellRequest::default()
    };
    if let Err(error) = agent.run_shell(&request).await {
        vm.remove_host_ports(numbers).await;
        return Err(error.into());
    }
    let stdout = stdout.ok_or(Error::ShuttingDown)?;
    Ok(Ends {
        stdin,
        stdout,
        stderr,
    })
}

fn connection() -> io::Result<(u32, UnixStream, OwnedFd)> {
    let (near, far) = std::os::unix::net::UnixStream::pair()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    Ok((ports::random()?, UnixStream::from_std(near)?, far.into()))
}

/// Until the program has ended and all it printed is told, or nobody listens.
async fn follow(id: &str, ends: Ends, asks: OwnedReadHalf, tells: OwnedWriteHalf, agent: &Agent) {
    // One frame waits at most: what comes next stays in the guest.
    let (sender, receiver) = mpsc::channel(1);
    let taken: [Arc<AtomicU64>; 2] = Default::default();
    let mut outputs = JoinSet::new();
    outputs.spawn(carry(
        ends.stdout,
        Told::Output,
        sender.clone(),
        Arc::clone(&taken[0]),
    ));
    if let Some(stderr) = ends.stderr {
        outputs.spawn(carry(
            stderr,
            Told::Errors,
            sender.clone(),
            Arc::clone(&taken[1]),
        ));
    }
    let end = async {
        let told = match agent.wait_shell(id).await {
            Ok((code, written)) => {
                drain(&mut outputs, &taken, written, &sender).await;
                Told::Exit(code)
            }
            Err(error) => Told::Failed(chain(&error)),
        };
        outputs.abort_all();
        while outputs.join_next().await.is_some() {}
        let _ = sender.send(told).await;
        drop(sender);
    };
    let listener: &UnixStream = asks.as_ref();
    let Ok(listener) = listener.as_fd().try_clone_to_owned() else {
        return;
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(end, write(receiver, tells)) } => {}
        () = obey(id, asks, ends.stdin, agent) => {}
        () = gone(&listener) => {}
    }
}

/// Returns when the other end is closed, also where what was sent by then waits for
/// a program that reads no input.
async fn gone(stream: &OwnedFd) {
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    loop {
        sleep(LOOK).await;
        let mut fds = [PollFd::new(stream, PollFlags::empty())];
        let polled = rustix::event::poll(&mut fds, Some(&at_once));
        let [stream] = &fds;
        if polled.is_ok() && stream.revents().intersects(PollFlags::HUP | PollFlags::ERR) {
            return;
        }
    }
}

/// Takes what the program prints.
async fn carry(
    mut from: UnixStream,
    told: fn(Vec<u8>) -> Told,
    to: mpsc::Sender<Told>,
    taken: Arc<AtomicU64>,
) {
    loop {
        let mut buffer = vec![0; CHUNK];
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                buffer.truncate(count);
                if to.send(told(buffer)).await.is_err() {
                    return;
                }
                taken.fetch_add(count as u64, Ordering::Relaxed);
            }
        }
    }
}

/// Waits until all is taken that was printed before the end. What the program has
/// left behind may hold its streams open.
async fn drain(
    outputs: &mut JoinSet<()>,
    taken: &[Arc<AtomicU64>; 2],
    written: Written,
    sender: &mpsc::Sender<Told>,
) {
    let count = || taken.each_ref().map(|taken| taken.load(Ordering::Relaxed));
    let (mut before, mut since) = (count(), Instant::now());
    loop {
        while outputs.try_join_next().is_some() {}
        let [stdout, stderr] = count();
        if outputs.is_empty() || (stdout >= written.stdout && stderr >= written.stderr) {
            return;
        }
        // Whoever listens may take as long as they like; the guest may not.
        if count() != before || sender.capacity() == 0 {
            (before, since) = (count(), Instant::now());
        }
        if since.elapsed() > STALLED {
            return;
        }
        sleep(TICK).await;
    }
}

/// Until there is nothing more to tell, or nobody listens.
async fn write(mut told: mpsc::Receiver<Told>, mut to: OwnedWriteHalf) {
    while let Some(told) = told.recv().await {
        if to.write_all(&told.frame()).await.is_err() {
            return;
        }
    }
}

/// Does what is asked, until whoever asks is gone.
async fn obey(id: &str, mut asks: OwnedReadHalf, stdin: Option<UnixStream>, agent: &Agent) {
    let mut stdin = stdin;
    loop {
        match read(&mut asks).await {
            Ok(Some(Asked::Input(bytes))) => {
                // A program may close its input and go on.
                if let Some(to) = &mut stdin
                    && to.write_all(&bytes).await.is_err()
                {
                    stdin = None;
                }
            }
            Ok(Some(Asked::EndOfInput)) => {
                if let Some(mut stdin) = stdin.take() {
                    let _ = stdin.shutdown().await;
                }
            }
            Ok(Some(Asked::Resize { width, height })) => {
                if let Err(error) = agent.resize_shell(id, width, height).await {
                    tracing::debug!(%error, "size of a debug shell");
                    if matches!(error, AgentError::Gone) {
                        return;
                    }
                }
            }
            Ok(None | Some(Asked::Run(_))) | Err(_) => return,
        }
    }
}

async fn read(from: &mut OwnedReadHalf) -> io::Result<Option<Asked>> {
    let mut head = [0; shell::HEAD];
    if from.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[1..]).await?;
    let (kind, length) = shell::head(head)?;
    let mut rest = vec![0; length];
    from.read_exact(&mut rest).await?;
    Ok(Some(Asked::parse(kind, rest)?))
}
