//! The control socket: one message a packet, descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_vmm_spec::{Descriptor, Message, PACKET_BYTES, PACKET_DESCRIPTORS};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendFlags,
};
use serde_json::Error as JsonError;

/// A packet that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("control socket")]
    Socket(#[source] io::Error),
    /// The packet, or what came with it, is too long.
    #[error(
        "the packet has more than {PACKET_BYTES} bytes or {PACKET_DESCRIPTORS} descriptors, or \
         this process has no room for them"
    )]
    TooLong,
}

/// Bytes and descriptors of one packet.
pub struct Packet {
    /// JSON.
    pub bytes: Vec<u8>,
    /// Its descriptors.
    pub descriptors: Descriptors,
}

impl Packet {
    /// Reads the packet's one value.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, JsonError> {
        serde_json::from_slice(&self.bytes)
    }
}

/// The descriptors of one packet. Those that nobody takes are closed.
#[derive(Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// How many came.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Takes one; each can be taken once.
    ///
    /// # Errors
    /// It did not come, or was taken before: a checked spec excludes both.
    pub fn take(&mut self, descriptor: Descriptor) -> io::Result<OwnedFd> {
        self.0
            .get_mut(descriptor.0 as usize)
            .and_then(Option::take)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }
}

impl From<Vec<OwnedFd>> for Descriptors {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }
}

/// Our end of the control socket.
pub struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Takes our end of a connected `SOCK_SEQPACKET` pair.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Waits for a packet; none when the shim has hung up.
    ///
    /// # Errors
    /// The socket failed or the packet is too long.
    pub fn receive(&self) -> Result<Option<Packet>, PacketError> {
        let mut bytes = vec![0; PACKET_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match rustix::net::recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                // A hang-up with unread data of ours.
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                result => break result.map_err(|error| PacketError::Socket(error.into()))?,
            }
        };
        let descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        let cut = received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
        if cut || descriptors.len() > PACKET_DESCRIPTORS {
            return Err(PacketError::TooLong);
        }
        // No message is empty, so no bytes are a hang-up.
        if received.bytes == 0 {
            return Ok(None);
        }
        bytes.truncate(received.bytes);
        Ok(Some(Packet {
            bytes,
            descriptors: descriptors.into(),
        }))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The shim has hung up.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        loop {
            match rustix::net::sendmsg(
                &self.0,
                &[IoSlice::new(&bytes)],
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL,
            ) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result.map(drop)?),
            }
        }
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SendAncillaryMessage, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, ControlSocket) {
        let (shim, vmm) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        (shim, ControlSocket::new(vmm))
    }

    fn send(to: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        rustix::net::sendmsg(
            to,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::empty(),
        )
        .unwrap();
    }

    #[test]
    fn descriptors_come_along_and_are_taken_once() {
        let (shim, vmm) = pair();
        send(&shim, b"7", &[shim.as_fd(), shim.as_fd()]);
        let mut packet = vmm.receive().unwrap().unwrap();
        assert_eq!(packet.parse::<u32>().unwrap(), 7);
        assert_eq!(packet.descriptors.count(), 2);
        assert!(packet.descriptors.take(Descriptor(1)).is_ok());
        assert!(packet.descriptors.take(Descriptor(1)).is_err());
        assert!(packet.descriptors.take(Descriptor(2)).is_err());
    }

    #[test]
    fn a_hang_up_is_no_packet() {
        let (shim, vmm) = pair();
        drop(shim);
        assert!(vmm.receive().unwrap().is_none());
    }

    #[test]
    fn too_much_is_refused() {
        let (shim, vmm) = pair();
        send(&shim, &vec![b' '; PACKET_BYTES + 1], &[]);
        assert!(matches!(vmm.receive(), Err(PacketError::TooLong)));
        send(&shim, b"7", &vec![shim.as_fd(); PACKET_DESCRIPTORS + 1]);
        assert!(matches!(vmm.receive(), Err(PacketError::TooLong)));
    }
}
