//! Frames from the tap into the driver's buffers.
//!
//! The length of the next frame is not known before it is read, and what does
//! not fit into the buffers then is lost. So buffers for the longest frame are
//! held before a frame is read straight into them; those it leaves over serve the
//! next one. A driver that has given less gets its frames by way of a buffer of
//! ours, in which one frame waits until it fits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::HEADER_BYTES;
use super::tap::Tap;
use crate::DeviceError;
use crate::queue::{Chain, DeviceQueue};

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;

/// Most buffers that the kernel takes at once (`UIO_MAXIOV`), and most chains for
/// one frame.
const BUFFERS_MAX: usize = 1024;

/// What became of the attempt to receive a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// One frame of so many bytes came, and went to the driver or was dropped.
    Frame(usize),
    /// The tap has none.
    Nothing,
    /// The driver has to give buffers first.
    NoBuffers,
    /// The tap will never have one again.
    Gone,
}

/// The receive queue and the tap's frames on their way into it.
pub(super) struct Receiver {
    pub queue: DeviceQueue,
    /// A frame may be spread over several chains.
    mergeable: bool,
    /// The longest frame with its header.
    longest: usize,
    /// Taken from the driver and not yet used, and how much fits into them.
    held: VecDeque<Chain>,
    room: usize,
    /// The frame that waits for buffers, if `waiting` bytes are not none.
    detour: Vec<u8>,
    waiting: usize,
}

impl Receiver {
    pub(super) fn new(queue: DeviceQueue, mergeable: bool, longest: usize) -> Self {
        Self {
            queue,
            mergeable,
            longest,
            held: VecDeque::new(),
            room: 0,
            detour: Vec::new(),
            waiting: 0,
        }
    }

    /// Receives one frame.
    pub(super) fn receive(&mut self, tap: &Tap) -> Result<Received, DeviceError> {
        self.hold_buffers()?;
        if self.waiting > 0 {
            return self.deliver_waiting();
        }
        if self.held.is_empty() {
            return Ok(Received::NoBuffers);
        }
        let pieces = match self.room >= self.longest {
            true => self.pieces(),
            false => Vec::new(),
        };
        let direct = (1..=BUFFERS_MAX).contains(&pieces.len());
        let read = match direct {
            true => self.read(tap, &pieces),
            false => {
                self.detour.resize(self.longest + 1, 0);
                rustix::io::read(tap, &mut self.detour[..]).map_err(io::Error::from)
            }
        };
        let len = match read {
            Ok(0) => return Ok(Received::Gone),
            Ok(len) => len,
            Err(error) => {
                return Ok(match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Received::Nothing,
                    // The kernel dropped a frame for which virtio's header has no
                    // words (`tun_put_user`), such as some that a NIC merged.
                    io::ErrorKind::InvalidInput => Received::Frame(0),
                    _ => Received::Gone,
                });
            }
        };
        if len <= HEADER_BYTES || len > self.longest {
            return Ok(Received::Frame(len));
        }
        if direct {
            self.use_buffers(len)?;
            return Ok(Received::Frame(len));
        }
        self.waiting = len;
        self.deliver_waiting()
    }

    /// Puts back what was taken from the driver and not used.
    pub(super) fn release_buffers(&mut self) {
        while let Some(chain) = self.held.pop_back() {
            self.queue.unpop(chain);
        }
        self.room = 0;
    }

    /// Takes buffers for the longest frame, as far as there are any.
    fn hold_buffers(&mut self) -> Result<(), DeviceError> {
        let wanted = self.longest.max(self.waiting);
        while self.room < wanted
            && self.held.len() < BUFFERS_MAX
            && (self.mergeable || self.held.is_empty())
        {
            let Some(chain) = self.queue.pop()? else {
                break;
            };
            if chain.writable_len() < HEADER_BYTES {
                return Err(self.queue.chain_error("a buffer is shorter than a header"));
            }
            self.room += chain.writable_len();
            self.held.push_back(chain);
        }
        Ok(())
    }

    /// The held buffers, one byte longer than the longest frame if they are: that
    /// tells apart what is longer.
    fn pieces(&self) -> Vec<libc::iovec> {
        let mut pieces = Vec::with_capacity(self.held.len());
        let mut left = self.longest + 1;
        for chain in &self.held {
            pieces.extend(chain.writable_iovecs(0, left));
            left -= left.min(chain.writable_len());
        }
        pieces
    }

    /// Reads a frame into `pieces` of the held buffers.
    fn read(&self, tap: &Tap, pieces: &[libc::iovec]) -> io::Result<usize> {
        let count = pieces.len() as libc::c_int;
        // SAFETY: the pieces lie in guest memory that the held chains keep mapped
        // and that the driver expects to change; there are at most UIO_MAXIOV.
        let len = unsafe { libc::readv(tap.as_fd().as_raw_fd(), pieces.as_ptr(), count) };
        usize::try_from(len).map_err(|_| io::Error::last_os_error())
    }

    /// Copies the frame that waits, if there is room, or drops it if there never
    /// will be.
    fn deliver_waiting(&mut self) -> Result<Received, DeviceError> {
        let len = self.waiting;
        if len <= self.room {
            let mut done = 0;
            for chain in &self.held {
                let count = (len - done).min(chain.writable_len());
                // It has room, as just seen.
                let _ = chain.write(0, &self.detour[done..done + count]);
                done += count;
            }
            self.waiting = 0;
            self.use_buffers(len)?;
            return Ok(Received::Frame(len));
        }
        let most = usize::from(self.queue.size()).min(BUFFERS_MAX);
        let all = if self.mergeable { most } else { 1 };
        if self.held.len() >= all {
            self.waiting = 0;
            return Ok(Received::Frame(len));
        }
        Ok(Received::NoBuffers)
    }

    /// Returns the buffers that `len` bytes of a frame are in to the driver.
    fn use_buffers(&mut self, len: usize) -> Result<(), DeviceError> {
        let mut used = Vec::with_capacity(1);
        let mut first = None;
        let mut left = len;
        while left > 0
            && let Some(chain) = self.held.pop_front()
        {
            let count = left.min(chain.writable_len());
            left -= count;
            self.room -= chain.writable_len();
            // At most `FRAME_BYTES`.
            used.push((chain.head(), count as u32));
            first.get_or_insert(chain);
        }
        if let Some(first) = first {
            // At most `BUFFERS_MAX`; every buffer has room for a header.
            let count = used.len() as u16;
            let _ = first.write(NUM_BUFFERS, &count.to_le_bytes());
        }
        self.queue.add_used_together(&used)
    }
}
