//! The control socket: one message a packet, descriptors beside it.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use husk_vmm_spec::{Message, PACKET_BYTES, PACKET_DESCRIPTORS};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};
use serde::Serialize;
use tokio::io::unix::AsyncFd;

/// Our end.
#[derive(Debug)]
pub struct ControlSocket {
    socket: AsyncFd<OwnedFd>,
    buffer: Vec<u8>,
}

impl ControlSocket {
    /// Our end and the VMM's.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (near, far) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        ioctl_fionbio(&near, true)?;
        // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
        let socket = unsafe { AsyncFd::register(near)? };
        let near = Self {
            socket,
            buffer: vec![0; PACKET_BYTES],
        };
        Ok((near, far))
    }

    /// Sends one packet.
    ///
    /// # Errors
    /// The VMM has hung up.
    pub async fn send(&self, message: &impl Serialize, descriptors: &[OwnedFd]) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.socket
            .async_io(tokio::io::Interest::WRITABLE, |socket| {
                let mut space =
                    [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty()
                    && !control.push(SendAncillaryMessage::ScmRights(&descriptors))
                {
                    return Err(io::Error::from(io::ErrorKind::InvalidInput));
                }
                sendmsg(
                    socket,
                    &[IoSlice::new(&text)],
                    &mut control,
                    SendFlags::NOSIGNAL,
                )?;
                Ok(())
            })
            .await
    }

    /// Receives one packet; none: the VMM has hung up. The VMM sends no
    /// descriptors, so there is no room for any.
    ///
    /// # Errors
    /// It is no message.
    pub async fn receive(&mut self) -> io::Result<Option<Message>> {
        let buffer = &mut self.buffer;
        let count = self
            .socket
            .async_io(tokio::io::Interest::READABLE, |socket| {
                let mut once = || recv(socket, &mut buffer[..], RecvFlags::empty());
                let (count, _) = match once() {
                    // Told one time, before what it has said: that it has ended and
                    // left something of ours unread.
                    Err(Errno::CONNRESET) => once()?,
                    received => received?,
                };
                Ok(count)
            })
            .await?;
        match count {
            0 => Ok(None),
            count => Ok(Some(serde_json::from_slice(&self.buffer[..count])?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_vmm_spec::{ExitReason, Request};
    use rustix::net::send;

    #[tokio::test]
    async fn the_last_word_of_one_that_leaves_requests_unread_is_heard() {
        let (mut near, far) = ControlSocket::pair().unwrap();
        near.send(&Request::Stats, &[]).await.unwrap();
        let word = Message::Exited(ExitReason::Panic);
        let text = serde_json::to_vec(&word).unwrap();
        send(&far, &text, SendFlags::empty()).unwrap();
        drop(far);
        assert_eq!(near.receive().await.unwrap(), Some(word));
        assert_eq!(near.receive().await.unwrap(), None);
    }
}
