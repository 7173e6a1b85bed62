//! Framed JSON between the agent and its helper over a unix socket: four bytes
//! of length, then the message. Descriptors ride on the length.

use std::convert::Infallible;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use rustix::io::retry_on_intr;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::Interest;

use super::InitError;
use super::plan::Report;

/// Far above the largest spec that ttrpc carries.
const FRAME_BYTES: usize = 16 << 20;

/// The helper's end; blocking.
#[derive(Debug)]
pub struct HelperChannel(UnixStream);

impl HelperChannel {
    /// Takes over the descriptor the agent named on the command line.
    fn from_inherited(fd: RawFd) -> io::Result<Self> {
        nix::fcntl::fcntl(
            // SAFETY: borrowed for this call only; a number that isn't open fails with EBADF.
            unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) },
            nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
        )?;
        // SAFETY: the agent left this descriptor open for us and nobody else here knows it.
        Ok(Self(unsafe { UnixStream::from_raw_fd(fd) }))
    }

    /// What a helper does with its life: `work` on that descriptor, and an end
    /// that the agent is told of.
    pub fn serve(fd: RawFd, work: impl FnOnce(&mut Self) -> Result<Infallible, InitError>) -> ! {
        if let Ok(mut channel) = Self::from_inherited(fd) {
            let Err(error) = work(&mut channel);
            // If the agent is gone there is nobody to tell.
            let _ = channel.send(&Report::Failure(error.into()), None);
        }
        std::process::exit(1)
    }

    /// Reads one message.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length)?;
        let mut body = vec![0; frame_length(length)?];
        self.0.read_exact(&mut body)?;
        Ok(serde_json::from_slice(&body)?)
    }

    /// Writes one message.
    pub fn send<T: Serialize>(&mut self, message: &T, fd: Option<&OwnedFd>) -> io::Result<()> {
        let frame = frame(message)?;
        let Some(fd) = fd else {
            return self.write(&frame);
        };
        let (length, body) = frame.split_at(4);
        let fds = [fd.as_raw_fd()];
        let sent = sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(length)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        self.write(&length[sent..])?;
        self.write(body)
    }

    /// With write(2): the last word, why a program cannot be executed, comes when
    /// its seccomp filter holds, and few filters leave that call out.
    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = retry_on_intr(|| rustix::io::write(&self.0, bytes))?;
            bytes = &bytes[count..];
        }
        Ok(())
    }
}

/// The agent's end.
#[derive(Debug)]
pub struct AgentChannel(tokio::net::UnixStream);

impl AgentChannel {
    /// Makes both ends; the helper's one survives an exec.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let ours = tokio::net::UnixStream::from_std(ours)?;
        let theirs = OwnedFd::from(theirs);
        inherit(&theirs)?;
        Ok((Self(ours), theirs))
    }

    /// Writes one message.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> io::Result<()> {
        use tokio::io::AsyncWriteExt;
        self.0.write_all(&frame(message)?).await
    }

    /// Reads one message and the descriptor with it; `None` at the end.
    pub async fn receive<T: DeserializeOwned>(
        &mut self,
    ) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        let mut length = [0; 4];
        let (count, fd) = self.receive_with_fd(&mut length).await?;
        if count == 0 {
            return Ok(None);
        }
        self.read_exact(&mut length[count..]).await?;
        let mut body = vec![0; frame_length(length)?];
        self.read_exact(&mut body).await?;
        Ok(Some((serde_json::from_slice(&body)?, fd)))
    }

    async fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        use tokio::io::AsyncReadExt;
        self.0.read_exact(buf).await?;
        Ok(())
    }

    async fn receive_with_fd(&self, buf: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        let socket = &self.0;
        socket
            .async_io(Interest::READABLE, || {
                let mut space = nix::cmsg_space!(RawFd);
                let mut parts = [IoSliceMut::new(buf)];
                let received = recvmsg::<()>(
                    socket.as_raw_fd(),
                    &mut parts,
                    Some(&mut space),
                    MsgFlags::MSG_CMSG_CLOEXEC,
                )?;
                let mut fd = None;
                for message in received.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(fds) = message {
                        for raw in fds {
                            // SAFETY: the kernel has just made this descriptor for us alone.
                            fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
                        }
                    }
                }
                Ok((received.bytes, fd))
            })
            .await
    }
}

/// Leaves a descriptor open across the next exec.
pub fn inherit(fd: &impl AsFd) -> io::Result<()> {
    set_flags(fd, nix::fcntl::FdFlag::empty())
}

/// Undoes that: what is started later has no business with it.
pub fn keep(fd: &impl AsFd) -> io::Result<()> {
    set_flags(fd, nix::fcntl::FdFlag::FD_CLOEXEC)
}

fn set_flags(fd: &impl AsFd, flags: nix::fcntl::FdFlag) -> io::Result<()> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(flags))?;
    Ok(())
}

fn frame<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = u32::try_from(frame.len() - 4).map_err(io::Error::other)?;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

fn frame_length(bytes: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(bytes) as usize;
    if length > FRAME_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(length)
}
