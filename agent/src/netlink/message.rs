//! rtnetlink requests and the socket they go to. The kernel has answered when
//! the send returns, so nothing here waits.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

// linux/netlink.h
const NLM_F_REQUEST: u16 = 0x01;
const NLM_F_ACK: u16 = 0x04;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;

/// What a request does about an object that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Changes one.
    Change,
    /// Makes or replaces one.
    Replace,
    /// Makes one, and fails with EEXIST.
    Create,
}

/// A message to the kernel.
#[derive(Debug)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// With the fixed part that its kind has.
    pub fn new(kind: u16, mode: Mode, fixed: &[&[u8]]) -> Self {
        let more = match mode {
            Mode::Change => 0,
            Mode::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Mode::Create => NLM_F_CREATE | NLM_F_EXCL,
        };
        Self::with_flags(kind, NLM_F_REQUEST | NLM_F_ACK | more, fixed)
    }

    fn with_flags(kind: u16, flags: u16, fixed: &[&[u8]]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        // Sequence number and port: the socket has one request at a time.
        bytes.extend([0; 8]);
        for part in fixed {
            bytes.extend_from_slice(part);
        }
        Self { bytes }
    }

    /// Adds an attribute.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        push_attribute(&mut self.bytes, kind, value);
        self
    }

    /// Adds a number.
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// Adds a name.
    pub fn name(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    /// Adds an attribute that holds one other.
    pub fn nested_number(self, outer: u16, inner: u16, value: u32) -> Self {
        let mut bytes = Vec::new();
        push_attribute(&mut bytes, inner, &value.to_ne_bytes());
        self.attribute(outer, &bytes)
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

/// Adds an attribute to those in `bytes`.
pub fn push_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// A NETLINK_ROUTE socket.
#[derive(Debug)]
pub struct RouteSocket(OwnedFd);

impl RouteSocket {
    /// Opens one in this network namespace.
    pub fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is protocol 0.
            None,
        )?;
        rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Sends a request; the kernel's answer.
    pub fn request(&self, request: Request) -> io::Result<()> {
        rustix::net::send(&self.0, &request.finish(), SendFlags::empty())?;
        self.receive(|_, _| ())
    }

    /// Asks for all objects of a kind; calls with the body of each message.
    pub fn dump(&self, kind: u16, fixed: &[&[u8]], each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let request = Request::with_flags(kind, NLM_F_REQUEST | NLM_F_DUMP, fixed);
        rustix::net::send(&self.0, &request.finish(), SendFlags::empty())?;
        self.receive(each)
    }

    fn receive(&self, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buf = vec![0; 32 << 10];
        loop {
            let (count, _) = rustix::net::recv(&self.0, &mut buf[..], RecvFlags::empty())?;
            let mut rest = &buf[..count];
            while let Some((kind, body, after)) = split_message(rest) {
                rest = after;
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
                            Some(0) => Ok(()),
                            Some(code) => Err(io::Error::from_raw_os_error(-code)),
                            None => Err(io::ErrorKind::InvalidData.into()),
                        };
                    }
                    kind => each(kind, body),
                }
            }
        }
    }
}

fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    let after = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, after))
}

/// The attribute of a kind among those after a fixed part.
pub fn find_attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_found() {
        let request = Request::new(16, Mode::Change, &[&[0; 16]])
            .name(3, "lo")
            .number(4, 1500);
        let bytes = request.finish();
        assert_eq!(bytes.len(), HEADER_BYTES + 16 + 8 + 8);
        assert_eq!(
            bytes[..4],
            u32::try_from(bytes.len()).unwrap().to_ne_bytes()
        );
        let attributes = &bytes[HEADER_BYTES + 16..];
        assert_eq!(find_attribute(attributes, 3), Some(&b"lo\0"[..]));
        assert_eq!(
            find_attribute(attributes, 4),
            Some(&1500_u32.to_ne_bytes()[..])
        );
        assert_eq!(find_attribute(attributes, 5), None);
        assert_eq!(find_attribute(&[1, 0, 3, 0], 3), None);
    }
}
