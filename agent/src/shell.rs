//! Programs that root of the node runs in the guest itself, beside all containers:
//! only in machines that were started for it (docs/decisions/debug-shell.md).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use husk_protocol::agent::{
    Empty, ResizeShellRequest, RunShellRequest, Shell, ShellRequest, WaitResponse,
};
use husk_protocol::limit;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::time::timeout;
use ttrpc::r#async::TtrpcContext;

use crate::container::cgroup::Cgroup;
use crate::container::{Child, LaunchError, Process};
use crate::error::{Doing, Error, OsError};
use crate::init::{program, terminal};
use crate::kernel_file;
use crate::lock::lock;
use crate::pidfd::PidFd;
use crate::sandbox::{Sandbox, check_id};
use crate::service::to_the_end;
use crate::stdio::{self, ChildStreams};

/// What runs where nothing else is asked for.
const SHELL: &str = "/bin/sh";

/// Where programs are looked for.
const PATH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";

/// Longest name of a terminal's kind, bytes.
const KIND: usize = 64;

/// How eagerly the kernel kills it for memory: before any container.
const OOM_SCORE: &str = "1000";

/// How long all of them together may take to end.
const END: Duration = Duration::from_secs(1);

/// Exit codes of a shell whose program cannot be run, or is not there.
const CANNOT_RUN: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Those that run or have ended.
#[derive(Debug)]
pub struct Shells {
    sandbox: Arc<Sandbox>,
    all: Mutex<HashMap<String, Slot>>,
}

/// Answers the shim.
#[derive(Debug)]
pub struct ShellService(pub Arc<Shells>);

/// What an id stands for.
#[derive(Debug, Clone)]
enum Slot {
    Making,
    /// Whoever asked for it has given it up meanwhile.
    Unwanted,
    Made(Arc<Running>),
}

/// A program, and whatever it has started.
#[derive(Debug)]
struct Running {
    process: Process,
    cgroup: Cgroup,
}

impl Shells {
    /// None yet.
    pub fn new(sandbox: Arc<Sandbox>) -> Self {
        Self {
            sandbox,
            all: Mutex::default(),
        }
    }

    /// Ends all of them, as far as time allows.
    pub async fn end_all(&self) {
        let ids: Vec<String> = lock(&self.all).keys().cloned().collect();
        let ends = ids.iter().map(async |id| {
            if let Err(error) = self.end(id).await {
                log::warn!("shell {id}: {error}");
            }
        });
        if timeout(END, join_all(ends)).await.is_err() {
            log::warn!("not every shell ended within {END:?}");
        }
    }

    async fn run(&self, request: RunShellRequest) -> Result<(), Error> {
        let id = request.shell_id.clone();
        check_id(&id)?;
        {
            let mut all = lock(&self.all);
            if all.len() >= limit::SHELLS {
                return Err(Error::TooMany {
                    what: "debug shells",
                    limit: limit::SHELLS,
                });
            }
            match all.entry(id.clone()) {
                Entry::Vacant(slot) => slot.insert(Slot::Making),
                Entry::Occupied(_) => return Err(Error::ShellExists { id }),
            };
        }
        let made = self.make(&request).await;
        let unwanted = match made {
            Ok(running) => self.keep(&id, Arc::new(running)),
            Err(error) => {
                lock(&self.all).remove(&id);
                return Err(error);
            }
        };
        match unwanted {
            None => Ok(()),
            Some(running) => {
                running.cgroup.remove().await?;
                lock(&self.all).remove(&id);
                Err(Error::NoShell { id })
            }
        }
    }

    /// From now on it is known, unless nobody wants it any more.
    fn keep(&self, id: &str, running: Arc<Running>) -> Option<Arc<Running>> {
        let mut all = lock(&self.all);
        let is_unwanted = matches!(all.get(id), Some(Slot::Unwanted));
        // Where its cgroup stays, whoever ends all of them tries again.
        all.insert(id.to_owned(), Slot::Made(Arc::clone(&running)));
        is_unwanted.then_some(running)
    }

    async fn make(&self, request: &RunShellRequest) -> Result<Running, Error> {
        // Containers' ids do not begin so.
        let name = format!(".shell-{}", request.shell_id);
        let cgroup = Cgroup::create(&self.sandbox.around().cgroup_root, &name)?;
        match self.start(request, &cgroup).await {
            Ok(process) => Ok(Running { process, cgroup }),
            Err(error) => {
                cgroup.remove().await?;
                Err(error)
            }
        }
    }

    async fn start(&self, request: &RunShellRequest, cgroup: &Cgroup) -> Result<Process, Error> {
        let around = self.sandbox.around();
        let ports = request.streams.clone().unwrap_or_default();
        let connected = stdio::Stdio::connect(&around.dialler, &ports, request.terminal).await;
        let (stdio, mut streams) = connected?;
        let mut master = None;
        if request.terminal {
            let ends = terminal::Terminal::open_in_own_root();
            let ends = ends.map_err(|error| LaunchError::Reported(error.into()))?;
            resize(&ends.master, request.width, request.height)?;
            let other = || ends.slave.try_clone().doing("open", "the terminal");
            (streams.stdin, streams.stdout) = (Some(other()?), Some(other()?));
            streams.stderr = Some(ends.slave);
            master = Some(ends.master);
        }
        let mut command = command(request, cgroup);
        let child = spawn(&mut command, streams)?;
        // It holds our copies of what is the program's.
        drop(command);
        // The reaper runs on this thread, so it has not been collected yet.
        let pid = child.id().cast_signed();
        let child = Child {
            pid,
            pidfd: PidFd::open(pid).doing("open", "the shell")?,
            exit: around.reaper.claim(pid),
        };
        let wired = || {
            let terminal = master.map(stdio::Terminal::new).transpose();
            let terminal = terminal.doing("use", "the terminal")?;
            let carried = stdio.start(terminal.as_ref())?;
            Ok::<_, OsError>((terminal, carried))
        };
        let (terminal, carried) = wired().inspect_err(|_| {
            // It may not be in its cgroup yet, with which it would end.
            let _ = child.pidfd.signal(libc::SIGKILL);
        })?;
        Ok(Process::new(child, terminal, carried, || ()))
    }

    fn running(&self, id: &str) -> Result<Arc<Running>, Error> {
        match lock(&self.all).get(id) {
            Some(Slot::Made(running)) => Ok(Arc::clone(running)),
            _ => Err(Error::NoShell { id: id.to_owned() }),
        }
    }

    async fn end(&self, id: &str) -> Result<(), Error> {
        if let Some(slot @ Slot::Making) = lock(&self.all).get_mut(id) {
            *slot = Slot::Unwanted;
            return Ok(());
        }
        let running = self.running(id)?;
        running.cgroup.remove().await?;
        lock(&self.all).remove(id);
        Ok(())
    }
}

/// This program, which becomes the one that is asked for.
fn command(request: &RunShellRequest, cgroup: &Cgroup) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("shell").arg(cgroup.procs_file());
    match &request.args[..] {
        [] => command.arg(SHELL),
        args => command.args(args),
    };
    command.current_dir("/").env_clear();
    command.env("PATH", PATH).env("HOME", "/");
    let kind = &request.terminal_kind;
    let is_word = |kind: &str| kind.bytes().all(|byte| byte.is_ascii_graphic());
    if !kind.is_empty() && kind.len() <= KIND && is_word(kind) {
        command.env("TERM", kind);
    }
    command
}

fn spawn(command: &mut Command, streams: ChildStreams) -> Result<std::process::Child, OsError> {
    let or_null = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
    command
        .stdin(or_null(streams.stdin))
        .stdout(or_null(streams.stdout))
        .stderr(or_null(streams.stderr))
        .spawn()
        .doing("start", "the shell")
}

fn resize(terminal: &OwnedFd, width: u32, height: u32) -> Result<(), OsError> {
    let size = Winsize {
        ws_row: cells(height),
        ws_col: cells(width),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).doing("resize", "the terminal")
}

fn cells(count: u32) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

#[async_trait]
impl Shell for ShellService {
    async fn run_shell(&self, _: &TtrpcContext, request: RunShellRequest) -> ttrpc::Result<Empty> {
        let shells = Arc::clone(&self.0);
        to_the_end(async move { shells.run(request).await }).await?;
        Ok(Empty::new())
    }

    async fn wait_shell(
        &self,
        _: &TtrpcContext,
        request: ShellRequest,
    ) -> ttrpc::Result<WaitResponse> {
        let running = self.0.running(&request.shell_id)?;
        let ended = running.process.wait().await?;
        Ok(WaitResponse {
            exit_code: ended.exit.code,
            stdout_bytes: ended.stdout,
            stderr_bytes: ended.stderr,
            ..Default::default()
        })
    }

    async fn resize_shell(
        &self,
        _: &TtrpcContext,
        request: ResizeShellRequest,
    ) -> ttrpc::Result<Empty> {
        let running = self.0.running(&request.shell_id)?;
        let (width, height) = (cells(request.width), cells(request.height));
        running.process.resize(width, height)?;
        Ok(Empty::new())
    }

    async fn end_shell(&self, _: &TtrpcContext, request: ShellRequest) -> ttrpc::Result<Empty> {
        let shells = Arc::clone(&self.0);
        to_the_end(async move { shells.end(&request.shell_id).await }).await?;
        Ok(Empty::new())
    }
}

/// Becomes a program: `CGROUP-FILE PROGRAM ARGUMENTS…`. Like a shell it says on
/// standard error why it could not.
pub fn main(arguments: &[String]) -> ExitCode {
    let [procs, program, rest @ ..] = arguments else {
        return ExitCode::FAILURE;
    };
    let complain = |what: &str, error: &dyn std::fmt::Display| {
        let _ = writeln!(std::io::stderr(), "husk-agent: {what}: {error}");
    };
    if let Err(error) = leave_agent(procs) {
        complain("shell", &crate::error::chain(&error));
        return ExitCode::from(CANNOT_RUN);
    }
    let error = Command::new(program).args(rest).exec();
    complain(program, &error);
    ExitCode::from(match error.kind() {
        std::io::ErrorKind::NotFound => NOT_FOUND,
        _ => CANNOT_RUN,
    })
}

/// Into a cgroup and a session of its own.
fn leave_agent(procs: &str) -> Result<(), OsError> {
    kernel_file::write(procs, "0").doing("join", procs)?;
    kernel_file::write("/proc/self/oom_score_adj", OOM_SCORE).doing("set", "oom_score_adj")?;
    rustix::process::setsid().doing("begin", "a session")?;
    program::reset_signals();
    let stdin = std::io::stdin();
    if rustix::termios::isatty(&stdin) {
        rustix::process::ioctl_tiocsctty(&stdin).doing("control", "the terminal")?;
    }
    Ok(())
}
