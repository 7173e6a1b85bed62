//! `husk-fs --socket-fd N --source DIR --uid N --gid N --nodes N`: serves DIR, a mount
//! point with shared propagation, to the front end at the other end of the connected
//! vhost-user socket, until that is closed. The process is that user's; its guest may
//! know so many files at a time.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use husk_fs::jail::User;
use husk_fs::server::Server;
use husk_fs::{jail, seccomp, vhost_user};
use rustix::io::Errno;

const USAGE: &str = "husk-fs --socket-fd N --source DIR --uid N --gid N --nodes N";

/// What the command line says.
struct Arguments {
    socket: OwnedFd,
    source: PathBuf,
    user: User,
    nodes: u32,
}

#[derive(Debug, thiserror::Error)]
enum ArgumentError {
    #[error("usage: {USAGE}")]
    Usage,
    #[error("{0} must be a number from 1 to 4294967294")]
    Number(&'static str),
    #[error("{0} is no descriptor passed to this process")]
    Descriptor(RawFd, #[source] Errno),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut line = format!("husk-fs: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                line += &format!(": {cause}");
                source = cause.source();
            }
            // Not eprintln!, which panics where the pipe is full.
            let _ = writeln!(std::io::stderr(), "{line}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let Arguments {
        socket,
        source,
        user,
        nodes,
    } = parse(std::env::args_os().skip(1))?;
    let resources = jail::enter(&source)?;
    jail::check_descriptors(socket.as_fd(), &resources)?;
    jail::lock(user)?;
    jail::rule_out(resources.top.as_fd())?;
    let mut server = Server::new(resources)?;
    server.know_at_most(usize::try_from(nodes)?);
    seccomp::install()?;
    vhost_user::serve(UnixStream::from(socket), &mut server)?;
    Ok(())
}

/// Call before anything opens a descriptor: inherited ones are closed.
fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Arguments, ArgumentError> {
    let mut socket = None;
    let mut source = None;
    let (mut uid, mut gid, mut nodes) = (None, None, None);
    while let Some(flag) = words.next() {
        let value = words.next().ok_or(ArgumentError::Usage)?;
        match flag.to_str() {
            Some("--socket-fd") => socket = value.to_str().and_then(|text| text.parse().ok()),
            Some("--source") => source = Some(PathBuf::from(value)),
            Some("--uid") => uid = Some(number("--uid", &value)?),
            Some("--gid") => gid = Some(number("--gid", &value)?),
            Some("--nodes") => nodes = Some(number("--nodes", &value)?),
            _ => return Err(ArgumentError::Usage),
        }
    }
    let (Some(socket), Some(source), Some(uid), Some(gid), Some(nodes)) =
        (socket, source, uid, gid, nodes)
    else {
        return Err(ArgumentError::Usage);
    };
    Ok(Arguments {
        socket: take_only(socket)?,
        source,
        user: User { uid, gid },
        nodes,
    })
}

fn number(option: &'static str, value: &OsStr) -> Result<u32, ArgumentError> {
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        // All ones as an id means "unchanged" to the kernel.
        .filter(|number| (1..u32::MAX).contains(number))
        .ok_or(ArgumentError::Number(option))
}

/// Takes an inherited descriptor and closes the others, standard streams apart.
fn take_only(fd: RawFd) -> Result<OwnedFd, ArgumentError> {
    let fail = |error| ArgumentError::Descriptor(fd, error);
    let number = u32::try_from(fd).map_err(|_| fail(Errno::BADF))?;
    if number <= 2 {
        return Err(fail(Errno::BADF));
    }
    for (first, last) in [(3, number - 1), (number + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: nothing in this process has opened a descriptor yet.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
    // SAFETY: passed to this process for this purpose; checked to be open below,
    // before its first use.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC) {
        Ok(()) => Ok(owned),
        Err(error) => {
            std::mem::forget(owned);
            Err(fail(error))
        }
    }
}
