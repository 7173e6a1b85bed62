//! The connection to the file server. Every wait for it has a deadline: a server
//! that hangs costs its file system, not the machine.
//!
//! This speaks for itself instead of through the `vhost` crate, whose front end
//! tries again without end when a receive times out.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, recv, sendmsg,
    shutdown,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::message::{
    ANSWER_BYTES, F_PROTOCOL_FEATURES, HEADER_BYTES, MEMORY_REGIONS, PROTOCOL_MQ,
    PROTOCOL_REPLY_ACK, Region, Request, answer, memory_table, message, vring_addr, vring_state,
};
use crate::queue::FEATURES;

/// Longest wait for the server to finish what it was told.
pub const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 5 });

/// What is wrong with the file server.
#[derive(Debug, thiserror::Error)]
pub enum BackEndError {
    /// It closed the connection, or the connection failed before.
    #[error("the file server is gone")]
    Gone,
    /// It did not answer in time.
    #[error("the file server does not answer")]
    Silent,
    /// It sent what is no answer to what it was asked.
    #[error("the file server's answer makes no sense")]
    Nonsense,
    /// It refused something.
    #[error("the file server refuses a request of type {request}")]
    Refused {
        /// As numbered by vhost-user.
        request: u32,
    },
    /// It cannot do what is needed.
    #[error("the file server lacks {0}")]
    Lacks(&'static str),
    /// It broke the rules of a ring that it works on.
    #[error("the file server returns {0}")]
    Returned(&'static str),
    /// Guest memory cannot be given to another process.
    #[error("guest memory is in no file, or in more than {MEMORY_REGIONS} pieces")]
    Memory,
    /// The socket is no use.
    #[error("the file server's socket")]
    Socket(#[source] io::Error),
}

/// A queue that the server works on.
#[derive(Debug)]
pub(super) struct ServedQueue {
    pub index: u16,
    pub queue: Queue,
    /// The driver writes it when there is something in the queue.
    pub kick: OwnedFd,
    /// The server writes it when it has put something into the queue.
    pub call: OwnedFd,
}

/// The file server. A failure is for ever.
#[derive(Debug)]
pub(super) struct BackEnd {
    socket: OwnedFd,
    /// Requests that are to be acknowledged, in order.
    unanswered: VecDeque<Request>,
    failed: bool,
}

impl BackEnd {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            unanswered: VecDeque::new(),
            failed: false,
        }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Asks for what the server can do and sets what is not the driver's affair;
    /// returns the virtio features that it offers.
    pub(super) fn negotiate(
        &mut self,
        queues: usize,
        patience: Duration,
    ) -> Result<u64, BackEndError> {
        self.exchange(patience, |back_end, deadline| {
            back_end.post(Request::SetOwner, false, &[], &[], deadline)?;
            let features = back_end.ask(Request::GetFeatures, &[], deadline)?;
            if features & 1 << VIRTIO_F_VERSION_1 == 0 {
                return Err(BackEndError::Lacks("VIRTIO_F_VERSION_1"));
            }
            if features & F_PROTOCOL_FEATURES == 0 {
                return Err(BackEndError::Lacks("protocol features"));
            }
            let offered = back_end.ask(Request::GetProtocolFeatures, &[], deadline)?;
            if offered & PROTOCOL_REPLY_ACK == 0 {
                return Err(BackEndError::Lacks("REPLY_ACK"));
            }
            if offered & PROTOCOL_MQ == 0 {
                return Err(BackEndError::Lacks("MQ"));
            }
            let wanted = (PROTOCOL_MQ | PROTOCOL_REPLY_ACK).to_le_bytes();
            back_end.post(Request::SetProtocolFeatures, false, &wanted, &[], deadline)?;
            let most = back_end.ask(Request::GetQueueNum, &[], deadline)?;
            if most < queues as u64 {
                return Err(BackEndError::Lacks("queues"));
            }
            Ok(features)
        })
    }

    /// Gives the server guest memory and queues, and lets it work.
    pub(super) fn start(
        &mut self,
        negotiated_features: u64,
        memory: &GuestMemoryMmap,
        queues: &[ServedQueue],
    ) -> Result<(), BackEndError> {
        let (regions, files) = regions(memory)?;
        let features =
            negotiated_features & (FEATURES | 1 << VIRTIO_F_VERSION_1) | F_PROTOCOL_FEATURES;
        self.exchange(PATIENCE, |back_end, deadline| {
            let mut gone = false;
            let mut post = |request, payload: &[u8], fds: &[BorrowedFd<'_>]| {
                match back_end.post(request, true, payload, fds, deadline) {
                    // What it said before it went tells why.
                    Err(BackEndError::Gone) => gone = true,
                    other => other?,
                }
                Ok::<_, BackEndError>(())
            };
            post(Request::SetFeatures, &features.to_le_bytes(), &[])?;
            post(Request::SetMemTable, &memory_table(&regions), &files)?;
            for served in queues {
                let (index, queue) = (served.index, &served.queue);
                let size = queue.size().into();
                let base = queue.next_avail().into();
                let (descriptors, used, available) =
                    (queue.desc_table(), queue.used_ring(), queue.avail_ring());
                let number = u64::from(index).to_le_bytes();
                post(Request::SetVringNum, &vring_state(index, size), &[])?;
                post(Request::SetVringBase, &vring_state(index, base), &[])?;
                let addresses = vring_addr(index, descriptors, used, available);
                post(Request::SetVringAddr, &addresses, &[])?;
                post(Request::SetVringCall, &number, &[served.call.as_fd()])?;
                post(Request::SetVringKick, &number, &[served.kick.as_fd()])?;
            }
            for served in queues {
                post(Request::SetVringEnable, &vring_state(served.index, 1), &[])?;
            }
            back_end.settle(deadline)?;
            match gone {
                true => Err(BackEndError::Gone),
                false => Ok(()),
            }
        })
    }

    /// Takes the queues back. When this succeeds, the server touches guest memory
    /// no more.
    pub(super) fn stop(&mut self, queues: &mut [ServedQueue]) -> Result<(), BackEndError> {
        self.exchange(PATIENCE, |back_end, deadline| {
            for served in queues {
                let state = vring_state(served.index, 0);
                let answer = back_end.ask(Request::GetVringBase, &state, deadline)?;
                // The index, then how far the server has come.
                if answer & 0xffff_ffff != u64::from(served.index) {
                    return Err(BackEndError::Nonsense);
                }
                served.queue.set_next_avail((answer >> 32) as u16);
            }
            Ok(())
        })
    }

    /// Carries out an exchange of messages. After a failure nobody can tell what
    /// the next message on the connection would be, so it is cut.
    fn exchange<T>(
        &mut self,
        patience: Duration,
        run: impl FnOnce(&mut Self, Instant) -> Result<T, BackEndError>,
    ) -> Result<T, BackEndError> {
        if self.failed {
            return Err(BackEndError::Gone);
        }
        let result = run(self, Instant::now() + patience);
        if result.is_err() {
            self.fail();
        }
        result
    }

    /// Gives the server up.
    pub(super) fn fail(&mut self) {
        self.failed = true;
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Sends a request without waiting for its answer. With `acknowledge`, the
    /// server says later whether it could do it.
    fn post(
        &mut self,
        request: Request,
        acknowledge: bool,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), BackEndError> {
        if acknowledge {
            self.unanswered.push_back(request);
        }
        let message = message(request, acknowledge, payload);
        let mut space =
            [mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MEMORY_REGIONS))];
        let mut left = &message[..];
        while !left.is_empty() {
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            // Descriptors go with the first byte.
            if left.len() == message.len() && !fds.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(fds));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(
                &self.socket,
                &[io::IoSlice::new(left)],
                &mut ancillary,
                flags,
            ) {
                Ok(sent) => left = &left[sent..],
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(BackEndError::Gone),
                Err(error) => return Err(BackEndError::Socket(error.into())),
            }
        }
        Ok(())
    }

    /// Waits until everything that was posted is acknowledged.
    fn settle(&mut self, deadline: Instant) -> Result<(), BackEndError> {
        while let Some(request) = self.unanswered.pop_front() {
            if self.answer(request, deadline)? != 0 {
                return Err(BackEndError::Refused {
                    request: request as u32,
                });
            }
        }
        Ok(())
    }

    /// Sends a request and waits for its answer.
    fn ask(
        &mut self,
        request: Request,
        payload: &[u8],
        deadline: Instant,
    ) -> Result<u64, BackEndError> {
        self.post(request, false, payload, &[], deadline)?;
        self.answer(request, deadline)
    }

    /// Receives the answer to a request. Descriptors with it are not received.
    fn answer(&mut self, request: Request, deadline: Instant) -> Result<u64, BackEndError> {
        let mut message = [0; HEADER_BYTES + ANSWER_BYTES];
        let mut done = 0;
        while done < message.len() {
            match recv(&self.socket, &mut message[done..], RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Err(BackEndError::Gone),
                Ok((count, _)) => done += count,
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(BackEndError::Socket(error.into())),
            }
        }
        answer(request, &message).ok_or(BackEndError::Nonsense)
    }

    /// Waits for the socket, until `deadline` at the latest.
    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), BackEndError> {
        // Whoever makes the socket ready again and again, and says nothing by it,
        // does not put the deadline off.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(BackEndError::Silent);
        }
        let limit = Timespec {
            tv_sec: left.as_secs() as _,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.socket, flags)], Some(&limit)) {
            Ok(0) => Err(BackEndError::Silent),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(BackEndError::Socket(error.into())),
        }
    }
}

/// Guest memory as the server can map it: each region and its file.
fn regions(memory: &GuestMemoryMmap) -> Result<(Vec<Region>, Vec<BorrowedFd<'_>>), BackEndError> {
    let mut regions = Vec::new();
    let mut files = Vec::new();
    for region in memory.iter() {
        let file = region.file_offset().ok_or(BackEndError::Memory)?;
        regions.push(Region {
            guest_addr: region.start_addr().0,
            len: region.len(),
            file_offset: file.start(),
        });
        files.push(file.file().as_fd());
    }
    match regions.len() {
        1..=MEMORY_REGIONS => Ok((regions, files)),
        _ => Err(BackEndError::Memory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_that_is_ready_puts_no_deadline_off() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"x").unwrap();
        let back_end = BackEnd::new(ours.into());
        let wait = |deadline| back_end.wait(PollFlags::IN, deadline);
        assert!(wait(Instant::now() + PATIENCE).is_ok());
        assert!(matches!(wait(Instant::now()), Err(BackEndError::Silent)));
    }
}
