//! A device's end of a split virtqueue (virtio 1.2, 2.7).
//!
//! Yields only chains that keep the rules: in guest memory altogether, of
//! bounded length, whole, readable buffers before writable ones. What the driver
//! writes elsewhere in the meantime changes nothing about a chain once popped.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemory as _, GuestMemoryMmap, Le64,
    Permissions, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

use crate::{ActivateError, Activation, ActiveQueue, DeviceError, GuestMemory, Interrupt};

/// Features of the rings that [`DeviceQueue`] knows, for devices to offer.
pub const FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Most pieces of memory in one chain. More than any driver makes, and what
/// bounds the memory that a chain costs us; the kernel would take 1024 at once
/// (`UIO_MAXIOV`).
pub const CHAIN_SEGMENTS_MAX: usize = 256;

/// A queue that the device itself works on.
pub struct DeviceQueue {
    index: u16,
    queue: Queue,
    notify: Arc<EventFd>,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// Chains that may still be popped in this event.
    budget: u16,
    /// Index in the used ring up to which the driver was told.
    signalled: u16,
}

impl Activation {
    /// Takes out queue `index` to be worked on by the device itself.
    ///
    /// # Errors
    /// The driver did not enable it, or it was taken before.
    pub fn take_queue(&mut self, index: u16) -> Result<DeviceQueue, ActivateError> {
        let ActiveQueue { queue, notify } = self
            .queues
            .get_mut(usize::from(index))
            .and_then(Option::take)
            .ok_or(ActivateError::QueueDisabled(index))?;
        Ok(DeviceQueue {
            index,
            budget: queue.size(),
            signalled: queue.next_used(),
            queue,
            notify,
            memory: self.memory.clone(),
            interrupt: Arc::clone(&self.interrupt),
        })
    }
}

impl DeviceQueue {
    /// Which of the device's queues it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries in the ring.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Renews the number of chains that may be popped: as many as the ring has
    /// entries. To be called when [`crate::Event::Queue`] comes.
    pub fn begin(&mut self) {
        self.budget = self.queue.size();
    }

    /// The same with at most `chains`, for devices whose work takes long.
    pub fn begin_with(&mut self, chains: u16) {
        self.budget = chains.min(self.queue.size());
    }

    /// Takes the next available chain.
    ///
    /// With `None`, either the ring is empty and the driver will notify of the
    /// next chain, or the number of [`DeviceQueue::begin`] is used up and the
    /// queue has notified itself. In both cases [`crate::Event::Queue`] comes.
    ///
    /// # Errors
    /// The driver broke the rules; the queue is no longer of use.
    pub fn pop(&mut self) -> Result<Option<Chain>, DeviceError> {
        let memory = self.memory.memory().into_inner();
        loop {
            if self.budget == 0 {
                // Fails only when the counter is full, which wakes as well.
                let _ = self.notify.write(1);
                return Ok(None);
            }
            let queue = self.index;
            let found = self
                .queue
                .iter(&*memory)
                .map_err(|source| DeviceError::Queue { queue, source })?
                .next();
            if let Some(found) = found {
                self.budget -= 1;
                return Chain::new(found, Arc::clone(&memory))
                    .map(Some)
                    .map_err(|what| self.chain_error(what));
            }
            let more = self
                .queue
                .enable_notification(&*memory)
                .map_err(|source| self.ring_error(source))?;
            if !more {
                return Ok(None);
            }
        }
    }

    /// Puts back the chain that was popped last: it will be popped again.
    pub fn unpop(&mut self, chain: Chain) {
        drop(chain);
        self.queue.go_to_previous_position();
        self.budget = self.budget.saturating_add(1);
    }

    /// Returns a chain to the driver, `written` bytes of which have been
    /// written. [`DeviceQueue::signal`] then tells the driver.
    ///
    /// # Errors
    /// As for [`DeviceQueue::pop`].
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), DeviceError> {
        let memory = self.memory.memory();
        self.queue
            .add_used(&*memory, head, written)
            .map_err(|source| self.ring_error(source))
    }

    /// The same for chains that belong together: the driver sees all of them or
    /// none.
    ///
    /// # Errors
    /// As for [`DeviceQueue::pop`].
    pub fn add_used_together(&mut self, used: &[(u16, u32)]) -> Result<(), DeviceError> {
        let Some(((head, written), others)) = used.split_last() else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let mut next = self.queue.next_used();
        for (head, written) in others {
            let slot = u64::from(next % self.queue.size());
            // Its index, then its length.
            let element = Le64::from(u64::from(*head) | u64::from(*written) << 32);
            memory
                .write_obj(element, GuestAddress(self.queue.used_ring() + 4 + 8 * slot))
                .map_err(|source| self.ring_error(virtio_queue::Error::GuestMemory(source)))?;
            next = next.wrapping_add(1);
        }
        // What is added now makes the others visible as well.
        self.queue.set_next_used(next);
        self.add_used(*head, *written)
    }

    /// Interrupts the driver if there is something new and it wants to know.
    ///
    /// # Errors
    /// As for [`DeviceQueue::pop`], or the interrupt could not be sent.
    pub fn signal(&mut self) -> Result<(), DeviceError> {
        let used = self.queue.next_used();
        let added = used.wrapping_sub(self.signalled);
        if added == 0 {
            return Ok(());
        }
        self.signalled = used;
        if self.driver_wants_signal(used, added)? {
            self.interrupt
                .signal_queue(self.index)
                .map_err(|source| DeviceError::Host {
                    what: "interrupting the driver",
                    source,
                })?;
        }
        Ok(())
    }

    /// virtio 1.2, 2.7.7.2.
    fn driver_wants_signal(&self, used: u16, added: u16) -> Result<bool, DeviceError> {
        // The used ring is written before the driver's wish is read.
        fence(Ordering::SeqCst);
        let load = |at| {
            let at = GuestAddress(self.queue.avail_ring() + at);
            self.memory
                .memory()
                .load::<u16>(at, Ordering::Relaxed)
                .map_err(|source| self.ring_error(virtio_queue::Error::GuestMemory(source)))
        };
        if self.queue.event_idx_enabled() {
            let event = load(4 + 2 * u64::from(self.queue.size()))?;
            Ok(used.wrapping_sub(event).wrapping_sub(1) < added)
        } else {
            Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Where the device's interrupts go.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    /// The failure that a chain of this queue is `what` the device cannot take.
    pub fn chain_error(&self, what: &'static str) -> DeviceError {
        DeviceError::Chain {
            queue: self.index,
            what,
        }
    }

    fn ring_error(&self, source: virtio_queue::Error) -> DeviceError {
        DeviceError::Queue {
            queue: self.index,
            source,
        }
    }
}

/// A chain of buffers, all of them in guest memory, which it keeps mapped.
pub struct Chain {
    head: u16,
    /// Readable ones first.
    segments: Vec<libc::iovec>,
    readable: usize,
    readable_len: usize,
    writable_len: usize,
    /// What the segments point into.
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the pointers are to memory that `_memory` keeps mapped whichever thread
// holds it; nothing about them belongs to a thread.
unsafe impl Send for Chain {}

impl Chain {
    fn new(
        found: virtio_queue::DescriptorChain<&GuestMemoryMmap>,
        memory: Arc<GuestMemoryMmap>,
    ) -> Result<Self, &'static str> {
        let mut chain = Self {
            head: found.head_index(),
            segments: Vec::with_capacity(4),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
            _memory: Arc::clone(&memory),
        };
        let mut whole = false;
        for (seen, descriptor) in found.enumerate() {
            // An indirect table has room for 2^16, and empty ones become no segment.
            if seen == CHAIN_SEGMENTS_MAX {
                return Err("the chain has too many buffers");
            }
            whole = !descriptor.has_next();
            let len = descriptor.len() as usize;
            let (access, writable) = match descriptor.is_write_only() {
                true => (Permissions::Write, true),
                false => (Permissions::Read, false),
            };
            if !writable && chain.readable < chain.segments.len() {
                return Err("a readable buffer follows a writable one");
            }
            let slices = memory
                .get_slices(descriptor.addr(), len, access)
                .map_err(|_| "a buffer is outside guest memory")?;
            for slice in slices {
                let slice = slice.map_err(|_| "a buffer is outside guest memory")?;
                if chain.segments.len() == CHAIN_SEGMENTS_MAX {
                    return Err("the chain has too many buffers");
                }
                chain.segments.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
                if !writable {
                    chain.readable += 1;
                }
            }
            match writable {
                true => chain.writable_len += len,
                false => chain.readable_len += len,
            }
        }
        // The iterator ends early at an index outside the table, a loop, a
        // descriptor outside memory, a bad indirect table and above 4 GiB.
        match whole {
            true => Ok(chain),
            false => Err("the chain is broken"),
        }
    }

    /// Index of its first descriptor, for [`DeviceQueue::add_used`].
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read; below 4 GiB.
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes that the device may write; below 4 GiB.
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// Copies out of the readable buffers from `offset` on. False, and nothing
    /// of use in `data`, when they end before.
    #[must_use]
    pub fn read(&self, offset: usize, data: &mut [u8]) -> bool {
        let mut done = 0;
        for slice in slices(&self.segments[..self.readable], offset, data.len()) {
            done += slice.copy_to(&mut data[done..]);
        }
        done == data.len()
    }

    /// An object out of the readable buffers at `offset`; `None` when they end
    /// before.
    pub fn read_object<T: ByteValued>(&self, offset: usize) -> Option<T> {
        let mut object = T::zeroed();
        self.read(offset, object.as_mut_slice()).then_some(object)
    }

    /// Copies into the writable buffers from `offset` on. False when they end
    /// before; what fits has been written then.
    #[must_use]
    pub fn write(&self, offset: usize, data: &[u8]) -> bool {
        let mut done = 0;
        for slice in slices(&self.segments[self.readable..], offset, data.len()) {
            slice.copy_from(&data[done..done + slice.len()]);
            done += slice.len();
        }
        done == data.len()
    }

    /// Copies the readable buffers into `to`, as far as it goes.
    pub fn copy_out(&self, to: &VolatileSlice<'_>) {
        let mut done = 0;
        for slice in slices(&self.segments[..self.readable], 0, to.len()) {
            if let Ok(rest) = to.offset(done) {
                slice.copy_to_volatile_slice(rest);
            }
            done += slice.len();
        }
    }

    /// Copies `from` into the writable buffers, as far as they go.
    pub fn copy_in(&self, from: &VolatileSlice<'_>) {
        let mut done = 0;
        for slice in slices(&self.segments[self.readable..], 0, from.len()) {
            if let Ok(rest) = from.offset(done) {
                rest.copy_to_volatile_slice(slice);
            }
            done += slice.len();
        }
    }

    /// The pieces of at most `len` bytes of the readable buffers from `offset`
    /// on. They are of use as long as the chain is.
    pub fn readable_iovecs(&self, offset: usize, len: usize) -> Vec<libc::iovec> {
        pieces(&self.segments[..self.readable], offset, len).collect()
    }

    /// The same of the writable buffers.
    pub fn writable_iovecs(&self, offset: usize, len: usize) -> Vec<libc::iovec> {
        pieces(&self.segments[self.readable..], offset, len).collect()
    }

    /// `writev(2)` of at most `len` bytes of the readable buffers from `offset`
    /// on.
    ///
    /// # Errors
    /// Those of the call.
    pub fn write_to(&self, fd: BorrowedFd<'_>, offset: usize, len: usize) -> io::Result<usize> {
        let iovecs = self.readable_iovecs(offset, len);
        // SAFETY: the pieces lie in guest memory, which self keeps mapped, and
        // there are at most UIO_MAXIOV of them.
        let done = unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// `readv(2)` of at most `len` bytes into the writable buffers from `offset`
    /// on.
    ///
    /// # Errors
    /// Those of the call.
    pub fn read_from(&self, fd: BorrowedFd<'_>, offset: usize, len: usize) -> io::Result<usize> {
        let iovecs = self.writable_iovecs(offset, len);
        // SAFETY: the pieces lie in guest memory, which self keeps mapped and the
        // guest expects to change; there are at most UIO_MAXIOV of them.
        let done = unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }
}

/// What of `segments` lies in `len` bytes from `offset` on.
fn pieces(
    segments: &[libc::iovec],
    mut offset: usize,
    mut len: usize,
) -> impl Iterator<Item = libc::iovec> {
    segments.iter().filter_map(move |segment| {
        let skip = offset.min(segment.iov_len);
        offset -= skip;
        let take = len.min(segment.iov_len - skip);
        len -= take;
        (take > 0).then(|| libc::iovec {
            iov_base: segment.iov_base.wrapping_byte_add(skip),
            iov_len: take,
        })
    })
}

/// The same for copying. The slices must not outlive the chain.
fn slices(
    segments: &[libc::iovec],
    offset: usize,
    len: usize,
) -> impl Iterator<Item = VolatileSlice<'_>> {
    pieces(segments, offset, len).map(|piece| {
        // SAFETY: segments come from slices of guest memory that the chain keeps
        // mapped, and the chain is borrowed as long as they are. Accesses are
        // volatile; the guest may change the memory at any time.
        unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }
    })
}

#[cfg(test)]
mod tests;
