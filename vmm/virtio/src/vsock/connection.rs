//! One stream between the guest and a socket on the host: credit both ways
//! (virtio 1.2, 5.10.6.3), half-close, and what could not be written yet.
//!
//! Each direction ends by itself. Bytes for the host that its socket does not
//! take are kept, at most as many as the guest was told it may send ahead.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvFlags, Shutdown, recv, shutdown};

use super::packet::{
    HEADER_BYTES, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::socket;
use crate::queue::Chain;

/// Bytes that the guest may send ahead of what the host's socket has taken.
pub(super) const BUFFER_BYTES: u32 = 256 * 1024;

/// The guest learns of freed credit at the latest when it has grown by this.
const CREDIT_STEP: u32 = BUFFER_BYTES / 2;

/// Most bytes of payload in a packet, either way.
pub(super) const PAYLOAD_BYTES: u32 = 64 * 1024;

/// Ports of the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub guest: u32,
    pub host: u32,
}

/// A packet that a connection wants to send to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    Response,
    Shutdown,
    CreditUpdate,
    CreditRequest,
    /// Whatever the socket has, if it has something.
    Data,
}

/// The guest broke the rules of the stream; it gets an RST.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// What became of a read from the host's socket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    Bytes(u32),
    /// The host has nothing more now, or will never.
    Nothing,
}

/// A joined stream.
#[derive(Debug)]
pub(super) struct Connection {
    pub ports: Ports,
    socket: OwnedFd,

    /// What the guest said with SHUTDOWN so far.
    guest_shutdown: u32,
    /// What the host's socket came to; said with SHUTDOWN.
    host_shutdown: u32,
    /// How much of `host_shutdown` the guest knows.
    told_shutdown: u32,
    /// Nobody is at the other end of the socket any more.
    hung_up: bool,
    /// The guest knows this connection no more; what is left goes out.
    detached: bool,

    /// Bytes sent to the guest, and what it says of them.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// The socket has bytes, or its end, to read.
    readable: bool,

    /// Bytes from the guest that the socket did not take.
    backlog: Backlog,
    /// Bytes taken from the guest and gone, and what the guest knows of that.
    forwarded: u32,
    told_forwarded: u32,

    response_due: bool,
    credit_update_due: bool,
    credit_request_due: bool,
    /// One CREDIT_REQUEST is on its way; another must wait for news.
    credit_requested: bool,
}

impl Connection {
    /// The answer to the guest's REQUEST.
    pub(super) fn new(ports: Ports, socket: OwnedFd, request: &Header) -> Self {
        Self {
            ports,
            socket,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            hung_up: false,
            detached: false,
            sent: 0,
            guest_buf_alloc: request.buf_alloc,
            guest_fwd_cnt: request.fwd_cnt,
            readable: false,
            backlog: Backlog::default(),
            forwarded: 0,
            told_forwarded: 0,
            response_due: true,
            credit_update_due: false,
            credit_request_due: false,
            credit_requested: false,
        }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What to wait for on the socket: readable, writable; `None`: nothing, not
    /// even a hang-up.
    pub(super) fn interest(&self) -> Option<(bool, bool)> {
        if self.hung_up {
            return None;
        }
        Some((
            self.host_may_send() && !self.readable,
            !self.backlog.is_empty(),
        ))
    }

    /// Nothing is left to do: the guest is done with it and everything is out.
    pub(super) fn finished(&self) -> bool {
        self.detached && self.backlog.is_empty()
    }

    /// The guest has closed both directions.
    pub(super) fn guest_closed(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    /// The guest knows this connection no more.
    pub(super) fn detach(&mut self) {
        self.detached = true;
        self.guest_shutdown = SHUTDOWN_BOTH;
    }

    fn host_may_send(&self) -> bool {
        self.host_shutdown & SHUTDOWN_SEND == 0 && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Bytes that the guest's buffer has room for.
    fn credit(&self) -> u32 {
        // A guest that claims to have taken what was never sent gets nothing.
        let in_flight = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight)
    }

    // From the guest.

    /// Takes note of what the guest says about its buffer.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    pub(super) fn credit_wanted(&mut self) {
        self.credit_update_due = true;
    }

    /// The guest's SHUTDOWN.
    pub(super) fn on_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // Fails only when the other end is gone, which shows elsewhere.
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
        self.end_output_when_written();
    }

    /// Payload from the guest, `len` bytes behind the header: as much as goes into
    /// the socket, the rest is kept.
    pub(super) fn on_data(&mut self, packet: &Chain, len: usize) -> Result<(), Violation> {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            return Err(Violation);
        }
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            // Sent before the guest could know that nobody reads.
            self.forward(len);
            return Ok(());
        }
        let mut written = 0;
        if self.backlog.is_empty() {
            match socket::send(self.socket.as_fd(), packet, HEADER_BYTES, len) {
                Ok(count) => {
                    written = count;
                    self.forward(count);
                }
                Err(error) if is_full(&error) => {}
                Err(_) => {
                    self.forward(len);
                    self.stop_output();
                    return Ok(());
                }
            }
        }
        if self.backlog.len() + (len - written) > BUFFER_BYTES as usize {
            return Err(Violation);
        }
        self.backlog
            .push(packet, HEADER_BYTES + written, len - written)
    }

    // From the host.

    /// The socket is ready for something.
    pub(super) fn on_ready(&mut self, readable: bool, writable: bool, hangup: bool) {
        if readable || hangup {
            self.readable = self.host_may_send();
        }
        if hangup {
            self.hung_up = true;
            self.stop_output();
            if !self.readable {
                self.host_shutdown |= SHUTDOWN_SEND;
            }
        } else if writable {
            self.flush();
        }
    }

    /// Writes what was kept, as far as the socket takes it.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            match socket::send_bytes(self.socket.as_fd(), self.backlog.bytes()) {
                Ok(written) => {
                    self.backlog.consume(written);
                    self.forward(written);
                }
                Err(error) if is_full(&error) => return,
                Err(_) => self.stop_output(),
            }
        }
        self.end_output_when_written();
    }

    /// Nobody reads any more what the guest sends.
    fn stop_output(&mut self) {
        self.host_shutdown |= SHUTDOWN_RECEIVE;
        self.forward(self.backlog.len());
        self.backlog.clear();
    }

    fn end_output_when_written(&self) {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.backlog.is_empty() {
            // Fails only when the other end is gone, which shows elsewhere.
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
    }

    fn forward(&mut self, bytes: usize) {
        // Never more than `BUFFER_BYTES` and a packet at a time.
        self.forwarded = self.forwarded.wrapping_add(bytes as u32);
        if self.forwarded.wrapping_sub(self.told_forwarded) >= CREDIT_STEP {
            self.credit_update_due = true;
        }
    }

    // To the guest.

    /// What to send next, if anything.
    pub(super) fn outgoing(&mut self) -> Option<Outgoing> {
        if self.detached {
            return None;
        }
        if self.response_due {
            return Some(Outgoing::Response);
        }
        if self.credit_update_due {
            return Some(Outgoing::CreditUpdate);
        }
        if self.readable && self.host_may_send() {
            if self.credit() > 0 {
                return Some(Outgoing::Data);
            }
            if !self.credit_requested {
                self.credit_requested = true;
                self.credit_request_due = true;
            }
        }
        if self.credit_request_due {
            return Some(Outgoing::CreditRequest);
        }
        (self.told_shutdown != self.host_shutdown).then_some(Outgoing::Shutdown)
    }

    /// Reads from the socket into a buffer behind the header, at most what the
    /// guest has room for.
    pub(super) fn receive(&mut self, buffer: &Chain) -> Received {
        let room = self.credit().min(PAYLOAD_BYTES);
        match socket::receive(self.socket.as_fd(), buffer, HEADER_BYTES, room as usize) {
            Ok(count) if count > 0 => {
                // At most `room`.
                let count = count as u32;
                self.sent = self.sent.wrapping_add(count);
                Received::Bytes(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Received::Nothing
            }
            // At its end, or reset by a peer that left bytes unread.
            Ok(_) | Err(_) => {
                self.readable = false;
                self.host_shutdown |= SHUTDOWN_SEND;
                Received::Nothing
            }
        }
    }

    /// The header of a packet about to be sent; it is then no longer due.
    pub(super) fn header(&mut self, guest_cid: u64, outgoing: Outgoing, len: u32) -> Header {
        let (op, flags) = match outgoing {
            Outgoing::Response => {
                self.response_due = false;
                (Op::Response, 0)
            }
            Outgoing::Shutdown => {
                self.told_shutdown = self.host_shutdown;
                (Op::Shutdown, self.host_shutdown)
            }
            Outgoing::CreditRequest => {
                self.credit_request_due = false;
                (Op::CreditRequest, 0)
            }
            Outgoing::CreditUpdate => (Op::CreditUpdate, 0),
            Outgoing::Data => (Op::Data, 0),
        };
        self.told_forwarded = self.forwarded;
        self.credit_update_due = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            socket_type: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded,
        }
    }
}

/// The socket takes no more for now.
fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

impl Drop for Connection {
    /// Ends both directions. What the guest never read is taken out first: a unix
    /// socket closed over unread bytes gives its peer an error instead of the end.
    fn drop(&mut self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
        let mut unread = [0u8; 4096];
        while let Ok((count, _)) = recv(&self.socket, &mut unread, RecvFlags::DONTWAIT) {
            if count == 0 {
                break;
            }
        }
    }
}

/// Bytes in the order they came; holds no memory when empty.
#[derive(Debug, Default)]
struct Backlog {
    held: Vec<u8>,
    /// How many of `held` are gone already.
    gone: usize,
}

impl Backlog {
    fn bytes(&self) -> &[u8] {
        &self.held[self.gone..]
    }

    fn len(&self) -> usize {
        self.held.len() - self.gone
    }

    fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Takes `len` bytes of a packet from `offset` on.
    fn push(&mut self, packet: &Chain, offset: usize, len: usize) -> Result<(), Violation> {
        if len == 0 {
            return Ok(());
        }
        if self.gone > self.held.len() / 2 {
            self.held.drain(..self.gone);
            self.gone = 0;
        }
        let end = self.held.len();
        self.held.resize(end + len, 0);
        match packet.read(offset, &mut self.held[end..]) {
            true => Ok(()),
            false => Err(Violation),
        }
    }

    fn consume(&mut self, count: usize) {
        self.gone += count;
        if self.gone >= self.held.len() {
            self.clear();
        }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}
