//! Connections to the shim: the guest dials, nothing listens.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, VsockAddr, connect, getsockopt, socket, sockopt,
};
use rustix::net::{SendFlags, Shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// The host's context id.
const HOST_CID: u32 = 2;

/// The VMM answers at once: it holds the descriptor or it doesn't.
pub const DIAL_DEADLINE: Duration = Duration::from_secs(10);

/// Reaches a port of the host.
#[derive(Debug, Clone)]
pub enum Dialler {
    /// The host's ports, as the VMM serves them.
    Vsock,
    /// Port N is the unix socket `PATH.N`.
    Unix(PathBuf),
}

impl Dialler {
    /// Connects to a port. A refusal is final, nobody listens later.
    pub async fn dial(&self, port: u32) -> io::Result<Socket> {
        let family = match self {
            Self::Vsock => AddressFamily::Vsock,
            Self::Unix(_) => AddressFamily::Unix,
        };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(family, SockType::Stream, flags, None)?;
        let connected = match self {
            Self::Vsock => connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, port)),
            Self::Unix(path) => {
                let mut path = path.clone().into_os_string();
                path.push(format!(".{port}"));
                connect(fd.as_raw_fd(), &UnixAddr::new(path.as_os_str())?)
            }
        };
        let socket = Socket(registered(fd)?);
        match connected {
            Ok(()) => return Ok(socket),
            Err(nix::errno::Errno::EINPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        let writable = tokio::time::timeout(DIAL_DEADLINE, socket.0.writable()).await;
        let mut guard = writable.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        guard.retain_ready();
        match getsockopt(socket.0.get_ref(), sockopt::SocketError)? {
            0 => Ok(socket),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Lets the runtime wait for a descriptor; it must not block.
pub fn registered(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays open, and the same, until it is dropped.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

/// A connected stream socket of any family.
#[derive(Debug)]
pub struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    /// What tells of its end by an error.
    pub fn break_watch(&self) -> io::Result<BreakWatch> {
        let fd = self.0.get_ref().try_clone()?;
        // SAFETY: as in `registered`.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::ERROR) };
        Ok(BreakWatch(fd?))
    }

    /// Waits until there is something to read, end of file included, without
    /// holding a buffer.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await?.retain_ready();
        Ok(())
    }
}

/// Tells when a connection breaks, which is not to be read from it: the kernel
/// ends the streams of a vsock device that was restored with an error alone, and
/// tokio wakes no reader for that.
#[derive(Debug)]
pub struct BreakWatch(AsyncFd<OwnedFd>);

impl BreakWatch {
    /// Waits for it.
    pub async fn wait(&self) {
        // Without the runtime nobody waits.
        let _ = self.0.ready(Interest::ERROR).await;
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let read = guard.try_io(|fd| {
                rustix::io::read(fd.get_ref(), buf.initialize_unfilled()).map_err(Into::into)
            });
            if let Ok(read) = read {
                return Poll::Ready(read.map(|count| buf.advance(count)));
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            let sent = guard.try_io(|fd| {
                rustix::net::send(fd.get_ref(), buf, SendFlags::NOSIGNAL).map_err(Into::into)
            });
            if let Ok(sent) = sent {
                return Poll::Ready(sent);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(self.0.get_ref(), Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(errno) => Poll::Ready(Err(errno.into())),
        }
    }
}
