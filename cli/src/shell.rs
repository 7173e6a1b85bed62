//! `husk exec` and `husk console`: programs in a pod's guest itself, where the
//! node's configuration allows it.
//!
//! What the guest prints goes to the terminal as it is, which a hostile guest can
//! use like any program that is run over ssh.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use husk_node::config::{Loaded, Sources};
use husk_node::shell::{self, Asked, Request, TerminalRequest, Told};

use crate::answer::{Answer, DONE, NotRun};
use crate::pods::{self, Pod, Status};

/// Ctrl-], which leaves a console whose guest does not answer.
const LEAVE: u8 = 0x1d;

/// How often it is looked at how large the terminal is.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000_000,
};

/// How many frames may wait for a guest that takes none.
const WAITING: usize = 64;

/// How long what was typed before [`LEAVE`] may take to be written.
const LAST: Duration = Duration::from_millis(200);

/// One read at most, bytes.
const CHUNK: usize = 16 << 10;

/// What to run, and how.
#[derive(Debug, Default)]
pub struct Asking<'a> {
    /// In which pod.
    pub pod: &'a str,
    /// Empty: a shell.
    pub args: Vec<String>,
    /// With standard input.
    pub stdin: bool,
    /// With a terminal.
    pub terminal: bool,
}

/// Runs it, and ends as it does.
///
/// # Errors
/// Nothing was run, or nobody knows how it ended.
pub fn run(asking: Asking<'_>, json: bool) -> anyhow::Result<Answer> {
    let code = carry_out(asking, json).map_err(NotRun)?;
    Ok(Answer::done(String::new()).with_code(code))
}

fn carry_out(asking: Asking<'_>, json: bool) -> anyhow::Result<u8> {
    ensure!(!json, "a program in a guest has no answer in JSON");
    let loaded = Sources::of_node().load()?;
    let pod = pods::find(&loaded.config.state_dir, asking.pod)?;
    let is_terminal = asking.terminal;
    ensure!(
        !is_terminal || io::stdin().is_terminal(),
        "standard input is no terminal; without -t a program needs none"
    );
    let size = is_terminal.then(size);
    let request = Request {
        args: asking.args,
        stdin: asking.stdin,
        terminal: size.map(terminal_request),
    };
    request.check()?;
    let stream = connect(&pod, &loaded)?;
    // Keys that nobody reads would end nothing: without input they stay ours.
    let raw = match is_terminal && asking.stdin {
        true => Some(Raw::enter()?),
        false => None,
    };
    let mut asks = stream.try_clone()?;
    asks.write_all(&Asked::Run(request).frame())?;
    let was_left = Arc::new(AtomicBool::new(false));
    if asking.stdin || is_terminal {
        let was_left = Arc::clone(&was_left);
        // It ends with this process, since nobody can be told to read no more.
        thread::spawn(move || pass_on(asks, asking.stdin, size, &was_left));
    }
    let ended = listen(stream);
    drop(raw);
    ensure!(!was_left.load(Ordering::Relaxed), "left; what ran is ended");
    ended
}

/// Where debug shells are allowed there is a socket.
fn connect(pod: &Pod, loaded: &Loaded) -> anyhow::Result<UnixStream> {
    ensure!(
        pod.status == Status::Running,
        "the pod is {}; only in one that runs can a program be run",
        pod.status.word()
    );
    let dir = File::open(&pod.dir).with_context(|| pod.dir.display().to_string())?;
    match UnixStream::connect(shell::path_in(dir.as_raw_fd())) {
        Ok(stream) => Ok(stream),
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(refusal(loaded)),
        Err(error) => Err(error).context("the pod's socket for debug shells"),
    }
}

fn refusal(loaded: &Loaded) -> String {
    match (loaded.config.debug_shell, loaded.files.last()) {
        (true, _) => "the pod began while `debug_shell` was false, and keeps that; a new one \
                      may be looked into"
            .to_owned(),
        (false, file) => {
            let default = Path::new(husk_node::config::CONFIG_FILE);
            let file = file.map_or(default, |file| file.as_path()).display();
            format!(
                "debug shells are off on this node; with `debug_shell = true` in {file} pods \
                 that begin from then on may be looked into"
            )
        }
    }
}

/// Passes on what the program prints, until it ends.
fn listen(mut stream: UnixStream) -> anyhow::Result<u8> {
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    loop {
        let Some((kind, rest)) = shell::read(&mut stream)? else {
            bail!("the pod's machine, or its shim, has ended");
        };
        match Told::parse(kind, rest).map_err(io::Error::from)? {
            Told::Output(bytes) => {
                let written = stdout.write_all(&bytes).and_then(|()| stdout.flush());
                match written {
                    // Whoever reads has seen enough.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(DONE),
                    written => written?,
                }
            }
            Told::Errors(bytes) => stderr.write_all(&bytes)?,
            Told::Exit(code) => return Ok(code),
            Told::Failed(why) => bail!(why),
        }
    }
}

/// Passes on what is typed, and the size of the terminal whenever it is another.
fn pass_on(asks: UnixStream, stdin: bool, size: Option<[u16; 2]>, was_left: &AtomicBool) {
    // Whoever listens is gone, and says so on the other thread.
    let _ = try_pass_on(asks, stdin, size, was_left);
}

/// Writes on a thread of its own, so that [`LEAVE`] is heard while nobody takes it.
struct Outbox {
    frames: SyncSender<Vec<u8>>,
    finished: Receiver<()>,
}

impl Outbox {
    fn new(mut asks: UnixStream) -> Self {
        let (frames, waiting) = mpsc::sync_channel::<Vec<u8>>(WAITING);
        let (writes, finished) = mpsc::channel();
        thread::spawn(move || {
            let _writes = writes;
            for frame in waiting {
                if asks.write_all(&frame).is_err() {
                    return;
                }
            }
        });
        Self { frames, finished }
    }

    fn put(&self, asked: &Asked) -> io::Result<()> {
        let put = self.frames.send(asked.frame());
        put.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Unless too much waits already; whether it did not.
    fn try_put(&self, asked: &Asked) -> io::Result<bool> {
        match self.frames.try_send(asked.frame()) {
            Ok(()) => Ok(true),
            Err(TrySendError::Full(_)) => Ok(false),
            Err(TrySendError::Disconnected(_)) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Gives what waits a moment.
    fn finish(self) {
        drop(self.frames);
        let _ = self.finished.recv_timeout(LAST);
    }
}

fn try_pass_on(
    asks: UnixStream,
    stdin: bool,
    mut size: Option<[u16; 2]>,
    was_left: &AtomicBool,
) -> io::Result<()> {
    let input = io::stdin();
    let outbox = Outbox::new(asks.try_clone()?);
    let is_terminal = size.is_some();
    let mut is_open = stdin;
    let mut buffer = vec![0; CHUNK];
    loop {
        if is_terminal {
            let now = self::size();
            let [width, height] = now;
            if size != Some(now) && outbox.try_put(&Asked::Resize { width, height })? {
                size = Some(now);
            }
        } else if !is_open {
            return Ok(());
        }
        if !is_readable(input.as_fd(), is_open, is_terminal)? {
            continue;
        }
        match input.lock().read(&mut buffer)? {
            0 => {
                is_open = false;
                outbox.put(&Asked::EndOfInput)?;
            }
            count => {
                let typed = &buffer[..count];
                let leaves = is_terminal && typed.contains(&LEAVE);
                let until = typed.iter().position(|byte| leaves && *byte == LEAVE);
                let typed = &typed[..until.unwrap_or(count)];
                let typed = Asked::Input(typed.to_vec());
                match is_terminal {
                    // Keys for a guest that takes none are lost, as on any terminal.
                    true => drop(outbox.try_put(&typed)?),
                    false => outbox.put(&typed)?,
                }
                if leaves {
                    outbox.finish();
                    was_left.store(true, Ordering::Relaxed);
                    return asks.shutdown(std::net::Shutdown::Both);
                }
            }
        }
    }
}

/// Waits for input; with a terminal not for long.
fn is_readable(input: BorrowedFd<'_>, is_open: bool, is_terminal: bool) -> io::Result<bool> {
    let events = if is_open {
        PollFlags::IN
    } else {
        PollFlags::empty()
    };
    let mut fds = [PollFd::from_borrowed_fd(input, events)];
    let watched = if is_open { &mut fds[..] } else { &mut [] };
    match poll(watched, is_terminal.then_some(&LOOK)) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Columns and rows of the terminal.
fn size() -> [u16; 2] {
    let size = tcgetwinsize(io::stdin()).map(|size| [size.ws_col, size.ws_row]);
    size.unwrap_or([80, 24])
}

fn terminal_request([width, height]: [u16; 2]) -> TerminalRequest {
    TerminalRequest {
        kind: std::env::var("TERM").unwrap_or_default(),
        width,
        height,
    }
}

/// The terminal while it passes on each key; afterwards it is as it was.
struct Raw(Termios);

impl Raw {
    fn enter() -> anyhow::Result<Self> {
        let input = io::stdin();
        let before = tcgetattr(&input)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_key() {
        let mut loaded = Loaded::default();
        let off = refusal(&loaded);
        assert!(
            off.contains("`debug_shell = true` in /etc/husk/config.toml"),
            "{off}"
        );
        loaded.files = vec!["/etc/husk/conf.d/a.toml".into()];
        assert!(refusal(&loaded).contains("in /etc/husk/conf.d/a.toml"));
        loaded.config.debug_shell = true;
        assert!(refusal(&loaded).starts_with("the pod began while `debug_shell` was false"));
    }
}
