//! The driver's end of a queue, and the loop that a worker runs in, for tests.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::fd::borrow;
use crate::{
    Activation, ActiveQueue, DeviceError, Event, GuestMemory, Interrupt, VirtioDevice, Worker,
};

/// A buffer of a chain: address, length, whether the device writes to it.
pub(crate) type Buffer = (u64, u32, bool);

/// A driver's end of a queue. It takes up less than a page for sizes up to 64
/// and 8 KiB up to 256.
pub(crate) struct DriverQueue {
    memory: GuestMemory,
    size: u16,
    base: u64,
    free: Vec<u16>,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    pub notify: Arc<EventFd>,
}

impl DriverQueue {
    pub(crate) fn new(memory: &GuestMemory, base: u64, size: u16, features: u64) -> Self {
        Self {
            memory: memory.clone(),
            size,
            base,
            free: (0..size).collect(),
            next_avail: 0,
            next_used: 0,
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            notify: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used(&self) -> u64 {
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// What the device gets.
    pub(crate) fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used()))
            .unwrap();
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory.memory()));
        ActiveQueue {
            queue,
            notify: Arc::clone(&self.notify),
        }
    }

    /// Descriptors not in use.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// Writes descriptor `index`.
    pub(crate) fn write_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let memory = self.memory.memory();
        let at = self.base + 16 * u64::from(index);
        memory.write_obj(addr, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain available and returns its head. Does not notify.
    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let chain: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (i, (addr, len, writable)) in buffers.iter().enumerate() {
            let next = chain.get(i + 1);
            let mut flags = 0;
            if next.is_some() {
                flags |= VRING_DESC_F_NEXT as u16;
            }
            if *writable {
                flags |= VRING_DESC_F_WRITE as u16;
            }
            self.write_descriptor(chain[i], *addr, *len, flags, next.copied().unwrap_or(0));
        }
        self.offer(chain[0]);
        chain[0]
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer(&mut self, head: u16) {
        let memory = self.memory.memory();
        let slot = self.avail() + 4 + 2 * u64::from(self.next_avail % self.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        memory
            .store(
                self.next_avail,
                GuestAddress(self.avail() + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Notifies the device as a driver does: only if it wants to know.
    pub(crate) fn kick(&self, added: u16) {
        std::sync::atomic::fence(Ordering::SeqCst);
        let memory = self.memory.memory();
        let wanted = if self.event_idx {
            let at = self.used() + 4 + 8 * u64::from(self.size);
            let event: u16 = memory.load(GuestAddress(at), Ordering::SeqCst).unwrap();
            let past_event = self.next_avail.wrapping_sub(event).wrapping_sub(1);
            past_event < added
        } else {
            let flags: u16 = memory
                .load(GuestAddress(self.used()), Ordering::SeqCst)
                .unwrap();
            flags & 1 == 0
        };
        if wanted {
            self.notify.write(1).unwrap();
        }
    }

    /// Takes a used chain back: its head and how many bytes were written. Asks
    /// for an interrupt for the next one when there is none.
    pub(crate) fn used_chain(&mut self) -> Option<(u16, u32)> {
        let memory = self.memory.memory();
        let index = GuestAddress(self.used() + 2);
        if memory.load::<u16>(index, Ordering::Acquire).unwrap() == self.next_used {
            let event = GuestAddress(self.avail() + 4 + 2 * u64::from(self.size));
            memory
                .store(self.next_used, event, Ordering::SeqCst)
                .unwrap();
            std::sync::atomic::fence(Ordering::SeqCst);
            if memory.load::<u16>(index, Ordering::SeqCst).unwrap() == self.next_used {
                return None;
            }
        }
        let slot = self.used() + 4 + 8 * u64::from(self.next_used % self.size);
        let head: u32 = memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        let mut next = Some(head);
        while let Some(index) = next {
            self.free.push(index);
            let at = self.base + 16 * u64::from(index);
            let flags: u16 = memory.read_obj(GuestAddress(at + 12)).unwrap();
            let has_next = u32::from(flags) & VRING_DESC_F_NEXT != 0
                && u32::from(flags) & VRING_DESC_F_INDIRECT == 0;
            next = has_next.then(|| memory.read_obj(GuestAddress(at + 14)).unwrap());
        }
        Some((head, len))
    }
}

/// Interrupts, counted, each queue's on an eventfd of its own.
pub(crate) struct TestInterrupt {
    pub queues: Vec<EventFd>,
    pub config: AtomicU32,
}

impl TestInterrupt {
    pub(crate) fn new(queues: usize) -> Arc<Self> {
        Arc::new(Self {
            queues: (0..queues).map(|_| EventFd::new(0).unwrap()).collect(),
            config: AtomicU32::new(0),
        })
    }
}

impl Interrupt for TestInterrupt {
    fn signal_queue(&self, queue: u16) -> io::Result<()> {
        self.queues[usize::from(queue)].write(1)
    }

    fn signal_config(&self) -> io::Result<()> {
        self.config.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn queue_call(&self, queue: u16) -> io::Result<OwnedFd> {
        borrow(&self.queues[usize::from(queue)]).try_clone_to_owned()
    }
}

/// Guest memory of `len` bytes from 0 on.
pub(crate) fn memory(len: usize) -> GuestMemory {
    GuestMemory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap())
}

/// Activates a device with the given queues.
pub(crate) fn activate(
    device: &mut dyn VirtioDevice,
    memory: &GuestMemory,
    queues: &[&DriverQueue],
    negotiated_features: u64,
    interrupt: &Arc<TestInterrupt>,
) -> Box<dyn Worker> {
    device
        .activate(Activation {
            memory: memory.clone(),
            queues: queues.iter().map(|queue| Some(queue.active())).collect(),
            negotiated_features,
            interrupt: Arc::clone(interrupt) as _,
        })
        .unwrap()
}

/// Runs a worker as an event loop does until nothing is ready any more. Panics
/// when that takes more than `limit` events: then it spins.
pub(crate) fn run(
    worker: &mut dyn Worker,
    notify: &[&EventFd],
    limit: usize,
) -> Result<usize, DeviceError> {
    for done in 0..limit {
        worker.sources_changed();
        let sources = worker.sources();
        let mut polled: Vec<PollFd<'_>> = Vec::new();
        for notify in notify {
            polled.push(PollFd::from_borrowed_fd(borrow(notify), PollFlags::IN));
        }
        let mut tokens = Vec::new();
        for source in &sources {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN | PollFlags::RDHUP, source.readable);
            flags.set(PollFlags::OUT, source.writable);
            polled.push(PollFd::from_borrowed_fd(source.fd.as_fd(), flags));
            tokens.push(source.token);
        }
        let now = rustix::event::Timespec::default();
        if poll(&mut polled, Some(&now)).unwrap() == 0 {
            return Ok(done);
        }
        // One after another, so that none is always first.
        let count = polled.len();
        let event = (0..count)
            .map(|i| (i + done) % count)
            .find_map(|i| {
                let got = polled[i].revents();
                if got.is_empty() {
                    return None;
                }
                Some(match i.checked_sub(notify.len()) {
                    None => {
                        let _ = notify[i].read();
                        Event::Queue(i as u16)
                    }
                    Some(source) => Event::Ready {
                        token: tokens[source],
                        readable: got.intersects(PollFlags::IN | PollFlags::RDHUP),
                        writable: got.contains(PollFlags::OUT),
                        hangup: got.intersects(PollFlags::HUP | PollFlags::ERR),
                    },
                })
            })
            .unwrap();
        drop(polled);
        worker.process(event)?;
    }
    panic!("the worker spins");
}
