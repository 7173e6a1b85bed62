//! A driver for tests: finds its way through a device's PCI function as a
//! guest's does, and keeps the driver's end of the rings.

use std::error::Error;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::event_loop::EventLoop;
use crate::fd::borrow;
use crate::pci::{MsiMessage, MsiVectors, PciFunction, VirtioPci};
use crate::{GuestMemory, VirtioDevice};

pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 0x40;

/// Longest wait for what has to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// Two regions with a hole at `HOLE`, as below and above the MMIO hole.
pub(crate) const MEMORY_BYTES: u64 = 4 << 20;
pub(crate) const HOLE: u64 = MEMORY_BYTES;
pub(crate) const HIGH: u64 = 8 << 20;

/// Where rings are, and from where on [`Driver::allocate`] gives buffers.
const RINGS: u64 = 0x1_0000;
const RING_BYTES: u64 = 0x1_0000;
const BUFFERS: u64 = 0x10_0000;

/// Waits for what no interrupt tells of.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

pub(crate) fn memory() -> GuestMemory {
    let ranges = [
        (GuestAddress(0), MEMORY_BYTES as usize),
        (GuestAddress(HIGH), MEMORY_BYTES as usize),
    ];
    GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// Memory whose regions touch: a buffer may lie across them.
pub(crate) fn adjacent_memory() -> GuestMemory {
    let region = |at| GuestRegionMmap::from_range(GuestAddress(at), 0x10_0000, None).unwrap();
    let regions = (0..4).map(|i| region(i * 0x10_0000)).collect();
    GuestMemoryAtomic::new(GuestMemoryMmap::from_regions(regions).unwrap())
}

/// Vectors that go nowhere, and what was asked of them.
#[derive(Clone)]
pub(crate) struct TestVectors {
    events: Vec<Arc<EventFd>>,
    pub(crate) connected: Arc<Mutex<Vec<Option<MsiMessage>>>>,
}

impl TestVectors {
    pub(crate) fn new(count: usize) -> Self {
        let event = |_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Self {
            events: (0..count).map(event).collect(),
            connected: Arc::new(Mutex::new(vec![None; count])),
        }
    }
}

impl MsiVectors for TestVectors {
    fn events(&self) -> &[Arc<EventFd>] {
        &self.events
    }

    fn connect(&mut self, vector: u16, message: MsiMessage) -> io::Result<()> {
        self.connected.lock().unwrap()[usize::from(vector)] = Some(message);
        Ok(())
    }

    fn disconnect(&mut self, vector: u16) -> io::Result<()> {
        self.connected.lock().unwrap()[usize::from(vector)] = None;
        Ok(())
    }
}

/// A structure that a vendor capability names.
#[derive(Clone, Copy, Debug, Default)]
struct Structure {
    offset: u64,
    len: u32,
}

/// A driver and the machine around it.
pub(crate) struct Driver {
    pub(crate) function: VirtioPci,
    pub(crate) memory: GuestMemory,
    pub(crate) vectors: TestVectors,
    pub(crate) reports: Arc<Mutex<Vec<String>>>,
    /// After the function, which gives its worker back.
    pub(crate) event_loop: EventLoop,
    structures: [Structure; 6],
    notify_multiplier: u64,
    next_buffer: u64,
}

impl Driver {
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_memory(device, memory())
    }

    pub(crate) fn with_memory(device: impl VirtioDevice + 'static, memory: GuestMemory) -> Self {
        let vectors = TestVectors::new(VirtioPci::vectors_for(&device));
        let reports = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&reports);
        let report = move |name: &str, error: &dyn Error| {
            let mut text = format!("{name}: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                text += &format!(": {cause}");
                source = cause.source();
            }
            log.lock().unwrap().push(text);
        };
        let event_loop = EventLoop::start("test", || Ok(())).unwrap();
        let function = VirtioPci::new(
            "test",
            Box::new(device),
            memory.clone(),
            event_loop.handle(),
            Box::new(vectors.clone()),
            Arc::new(report),
        )
        .unwrap();
        let mut driver = Self {
            function,
            memory,
            vectors,
            reports,
            event_loop,
            structures: Default::default(),
            notify_multiplier: 0,
            next_buffer: BUFFERS,
        };
        driver.find_structures();
        driver
    }

    /// Walks the capabilities and switches memory decoding and MSI-X on.
    fn find_structures(&mut self) {
        assert!(
            !self
                .function
                .write_config(0x10, &0xe000_0000_u32.to_le_bytes())
        );
        assert!(self.function.write_config(4, &[6, 0]));
        let mut at = u16::from(self.config::<1>(0x34)[0]);
        while at != 0 {
            let [id, next, _, structure] = self.config::<4>(at);
            match id {
                0x09 if usize::from(structure) < self.structures.len() => {
                    self.structures[usize::from(structure)] = Structure {
                        offset: u32::from_le_bytes(self.config(at + 8)).into(),
                        len: u32::from_le_bytes(self.config(at + 12)),
                    };
                    if structure == 2 {
                        self.notify_multiplier = u32::from_le_bytes(self.config(at + 16)).into();
                    }
                }
                0x11 => {
                    let count = u16::from_le_bytes(self.config(at + 2)) + 1;
                    let table = u64::from(u32::from_le_bytes(self.config(at + 4)));
                    for vector in 0..u64::from(count) {
                        let entry = table + vector * 16;
                        self.function
                            .write_bar(0, entry, &0xfee0_0000_u64.to_le_bytes());
                        self.function
                            .write_bar(0, entry + 8, &(vector as u32).to_le_bytes());
                        self.function.write_bar(0, entry + 12, &[0; 4]);
                    }
                    assert!(!self.function.write_config(at + 2, &[0, 0x80]));
                }
                _ => {}
            }
            at = next.into();
        }
        for structure in 1..5 {
            assert_ne!(self.structures[structure].len, 0, "structure {structure}");
        }
    }

    pub(crate) fn config<const N: usize>(&mut self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.function.read_config(offset, &mut data);
        data
    }

    pub(crate) fn common<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        let at = self.structures[1].offset + offset;
        self.function.read_bar(0, at, &mut data);
        data
    }

    pub(crate) fn set_common(&mut self, offset: u64, data: &[u8]) {
        let at = self.structures[1].offset + offset;
        self.function.write_bar(0, at, data);
    }

    pub(crate) fn isr(&mut self) -> u8 {
        let mut data = [0];
        self.function
            .read_bar(0, self.structures[3].offset, &mut data);
        data[0]
    }

    pub(crate) fn device_config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        let at = self.structures[4].offset + offset;
        self.function.read_bar(0, at, &mut data);
        data
    }

    pub(crate) fn status(&mut self) -> u8 {
        self.common::<1>(0x14)[0]
    }

    pub(crate) fn set_status(&mut self, status: u8) {
        self.set_common(0x14, &[status]);
    }

    pub(crate) fn offered_features(&mut self) -> u64 {
        let mut half = |select: u32| {
            self.set_common(0, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.common(4)))
        };
        half(0) | half(1) << 32
    }

    /// Takes `wanted` of the features offered, sets up every queue and says
    /// DRIVER_OK. Gives the queues.
    pub(crate) fn start(&mut self, wanted: u64) -> Vec<DriverQueue> {
        self.negotiate(wanted);
        let count = u16::from_le_bytes(self.common(0x12));
        let queues = (0..count).map(|queue| self.set_up_queue(queue)).collect();
        let status = self.status();
        self.set_status(status | DRIVER_OK);
        queues
    }

    pub(crate) fn negotiate(&mut self, wanted: u64) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        for event in &self.vectors.events {
            let _ = event.read();
        }
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let features = self.offered_features() & (wanted | 1 << 32);
        for half in [0_u32, 1] {
            self.set_common(8, &half.to_le_bytes());
            self.set_common(12, &((features >> (half * 32)) as u32).to_le_bytes());
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.set_common(0x10, &0_u16.to_le_bytes());
        assert_eq!(self.common(0x10), [0, 0]);
    }

    pub(crate) fn set_up_queue(&mut self, index: u16) -> DriverQueue {
        let queue = self.set_up_queue_as_is(index);
        let vector = index + 1;
        self.set_common(0x1a, &vector.to_le_bytes());
        assert_eq!(self.common(0x1a), vector.to_le_bytes());
        assert_eq!(self.common(0x1c), [1, 0]);
        queue
    }

    /// The same, whether or not it becomes enabled.
    pub(crate) fn set_up_queue_as_is(&mut self, index: u16) -> DriverQueue {
        self.set_common(0x16, &index.to_le_bytes());
        let size = u16::from_le_bytes(self.common(0x18));
        let at = RINGS + u64::from(index) * RING_BYTES;
        let queue = DriverQueue {
            memory: self.memory.clone(),
            index,
            size,
            descriptors: at,
            available: at + u64::from(size) * 16,
            used: (at + u64::from(size) * 18 + 6).next_multiple_of(4),
            next_descriptor: 0,
            next_available: 0,
            seen_used: 0,
        };
        assert!(queue.used + 6 + u64::from(size) * 8 < at + RING_BYTES);
        let zeroes = vec![0; RING_BYTES as usize];
        let memory = self.memory.memory();
        memory.write_slice(&zeroes, GuestAddress(at)).unwrap();
        self.set_common(0x20, &queue.descriptors.to_le_bytes());
        self.set_common(0x28, &queue.available.to_le_bytes()[..4]);
        self.set_common(0x2c, &[0; 4]);
        self.set_common(0x30, &queue.used.to_le_bytes());
        self.set_common(0x1c, &[1, 0]);
        queue
    }

    /// Notifies as KVM does for an ioeventfd.
    pub(crate) fn notify(&mut self, queue: u16) {
        self.set_common(0x16, &queue.to_le_bytes());
        let offset = u64::from(u16::from_le_bytes(self.common(0x1e)));
        let at = self.structures[2].offset + offset * self.notify_multiplier;
        let notifications = self.function.notifications();
        let notification = notifications.iter().find(|n| n.offset == at).unwrap();
        notification.event.write(1).unwrap();
    }

    /// True if the vector is raised in time; takes it.
    pub(crate) fn interrupted(&self, vector: usize, wait: Duration) -> bool {
        let event = &self.vectors.events[vector];
        let wait = Timespec::try_from(wait).unwrap();
        let mut fds = [PollFd::from_borrowed_fd(borrow(event), PollFlags::IN)];
        poll(&mut fds, Some(&wait)).unwrap() > 0 && event.read().is_ok()
    }

    /// Waits for a queue's interrupt.
    pub(crate) fn wait_queue(&self, queue: u16) {
        let raised = self.interrupted(usize::from(queue) + 1, PATIENCE);
        assert!(
            raised,
            "no interrupt of queue {queue}: {:?}",
            self.reports.lock().unwrap()
        );
    }

    /// Waits for word that the configuration has changed.
    pub(crate) fn wait_config(&mut self) {
        assert!(self.interrupted(0, PATIENCE), "no word of a change");
        assert_eq!(self.status() & NEEDS_RESET, 0);
    }

    /// Waits until the device asks to be reset.
    pub(crate) fn wait_needs_reset(&mut self) {
        assert!(
            self.interrupted(0, PATIENCE),
            "no interrupt of the configuration"
        );
        assert_ne!(self.status() & NEEDS_RESET, 0);
    }

    /// A buffer of `len` bytes.
    pub(crate) fn allocate(&mut self, len: usize) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += (len as u64).next_multiple_of(16);
        assert!(self.next_buffer <= MEMORY_BYTES);
        at
    }

    /// Gives buffers from the beginning again.
    pub(crate) fn forget_buffers(&mut self) {
        self.next_buffer = BUFFERS;
    }

    /// A buffer with `data` in it.
    pub(crate) fn allocate_with(&mut self, data: &[u8]) -> Buffer {
        let at = self.allocate(data.len());
        self.write(at, data);
        Buffer::readable(at, data.len() as u32)
    }

    pub(crate) fn write(&self, at: u64, data: &[u8]) {
        let memory = self.memory.memory();
        memory.write_slice(data, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let memory = self.memory.memory();
        memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}

/// A descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    /// Taken as it is when the chain is raw.
    pub(crate) next: u16,
}

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITABLE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

impl Buffer {
    pub(crate) fn readable(address: u64, len: u32) -> Self {
        Self::raw(address, len, 0, 0)
    }

    pub(crate) fn writable(address: u64, len: u32) -> Self {
        Self::raw(address, len, WRITABLE, 0)
    }

    pub(crate) fn raw(address: u64, len: u32, flags: u16, next: u16) -> Self {
        Self {
            address,
            len,
            flags,
            next,
        }
    }

    pub(crate) fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The driver's end of a ring. Descriptors are used round and round; tests do
/// not have more in flight than there are.
pub(crate) struct DriverQueue {
    memory: GuestMemory,
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    next_descriptor: u16,
    next_available: u16,
    seen_used: u16,
}

impl DriverQueue {
    /// Makes a chain of `buffers` available; gives its head.
    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (i, buffer) in buffers.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            let mut buffer = *buffer;
            if i + 1 < buffers.len() {
                buffer.flags |= NEXT;
                buffer.next = self.next_descriptor;
            }
            self.set_descriptor(at, buffer);
        }
        self.publish(head);
        head
    }

    pub(crate) fn set_descriptor(&self, index: u16, buffer: Buffer) {
        let at = self.descriptors + u64::from(index) * 16;
        self.put(at, &buffer.bytes());
    }

    /// Makes the chain that begins at `head` available, whatever is there.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.put(self.available + 4 + slot * 2, &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    pub(crate) fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        let memory = self.memory.memory();
        let at = GuestAddress(self.available + 2);
        memory
            .store(index.to_le(), at, std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    /// Asks for an interrupt when used entry `index` has been added (EVENT_IDX).
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.available + 4 + u64::from(self.size) * 2;
        self.put(at, &index.to_le_bytes());
    }

    /// How many entries the device has used in all.
    pub(crate) fn used_index(&self) -> u16 {
        let memory = self.memory.memory();
        let at = GuestAddress(self.used + 2);
        u16::from_le(
            memory
                .load(at, std::sync::atomic::Ordering::SeqCst)
                .unwrap(),
        )
    }

    /// The next used chain: head and bytes written.
    pub(crate) fn pop_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.seen_used {
            return None;
        }
        let slot = u64::from(self.seen_used % self.size);
        self.seen_used = self.seen_used.wrapping_add(1);
        // Wants an interrupt for the next one (EVENT_IDX).
        self.set_used_event(self.seen_used);
        let memory = self.memory.memory();
        let at = GuestAddress(self.used + 4 + slot * 8);
        let [head, written]: [u32; 2] = memory.read_obj(at).unwrap();
        Some((head, written))
    }

    fn put(&self, at: u64, data: &[u8]) {
        let memory = self.memory.memory();
        memory.write_slice(data, GuestAddress(at)).unwrap();
    }
}
