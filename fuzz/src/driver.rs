//! A driver of a virtio device that does as the fuzzer says: it writes registers
//! and rings, and has the real device, its transport and its event loop answer.

use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use husk_virtio::event_loop::EventLoop;
use husk_virtio::pci::{FunctionState, PciFunction, VirtioPci};
use husk_virtio::{GuestMemory, VirtioDevice};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::memory::{HIGH, REGION_BYTES, clear, guest_memory};
use crate::vectors::Vectors;

/// One thing that the driver does, or with `Host` the other side of the device.
#[derive(Arbitrary, Clone, Debug)]
pub enum Act<Host> {
    /// Accesses the device's BAR anywhere.
    Register {
        /// Reads if not.
        write: bool,
        /// Where; of 32 KiB, which is a little more than there is.
        at: u16,
        /// As many bytes as an instruction may move, one to eight.
        data: [u8; 8],
        /// How many.
        width: u8,
    },
    /// Writes a field of the common configuration in its right width.
    Common(Field, u64),
    /// Writes configuration space.
    Config {
        /// Where.
        at: u16,
        /// What.
        data: [u8; 4],
        /// One to four bytes of it.
        width: u8,
    },
    /// Puts a descriptor into a ring, as it is.
    Descriptor(u8, u8, Piece),
    /// Puts bytes into guest memory.
    Bytes(Place, Vec<u8>),
    /// Makes a chain available that has these buffers, the first ones readable
    /// and with this in them, the others writable; then notifies.
    Request {
        /// Which queue.
        queue: u8,
        /// What the device reads.
        readable: Vec<Vec<u8>>,
        /// Lengths of what it writes.
        writable: Vec<u16>,
        /// The chain is in a table of its own.
        indirect: bool,
    },
    /// Makes a head available, whatever is there.
    Publish(u8, u8),
    /// Sets the available index.
    Jump(u8, u16),
    /// Notifies a queue. Here and in requests, the highest bit says not to wait for
    /// the device: what comes next meets it at work.
    Notify(u8),
    /// Resets, negotiates these features, sets all queues up and starts.
    Start(u64),
    /// The machine is paused and goes on.
    Pause,
    /// What happens on the host.
    Host(Host),
}

/// Fields of the common configuration (virtio 1.2, 4.1.4.3).
#[derive(Arbitrary, Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Field {
    DeviceFeatureSelect,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    Status,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueDescriptors,
    QueueDriver,
    QueueDevice,
}

impl Field {
    /// Offset and width.
    fn place(self) -> (u64, usize) {
        match self {
            Self::DeviceFeatureSelect => (0x00, 4),
            Self::DriverFeatureSelect => (0x08, 4),
            Self::DriverFeature => (0x0c, 4),
            Self::ConfigVector => (0x10, 2),
            Self::Status => (0x14, 1),
            Self::QueueSelect => (0x16, 2),
            Self::QueueSize => (0x18, 2),
            Self::QueueVector => (0x1a, 2),
            Self::QueueEnable => (0x1c, 2),
            Self::QueueDescriptors => (0x20, 8),
            Self::QueueDriver => (0x28, 8),
            Self::QueueDevice => (0x30, 8),
        }
    }
}

/// A guest address, mostly of memory.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    /// Where buffers usually are.
    Near(u16),
    /// Anywhere in memory, rings included.
    Low(u32),
    /// Before or after the end of the first region.
    Edge(i8),
    /// In the second region.
    High(u32),
    /// Anywhere at all.
    Any(u64),
}

impl Place {
    /// As the guest counts.
    pub fn address(self) -> u64 {
        match self {
            Self::Near(offset) => BUFFERS + u64::from(offset),
            Self::Low(offset) => u64::from(offset) % REGION_BYTES,
            Self::Edge(offset) => REGION_BYTES.wrapping_add_signed(offset.into()),
            Self::High(offset) => HIGH + u64::from(offset) % (REGION_BYTES + 64),
            Self::Any(address) => address,
        }
    }
}

/// A descriptor.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Piece {
    /// Where its buffer is.
    pub place: Place,
    /// How long.
    pub len: Length,
    /// NEXT, WRITE, INDIRECT and others.
    pub flags: u8,
    /// The one that follows.
    pub next: u8,
}

/// A buffer's length, mostly short.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Length {
    /// Up to 255.
    Short(u8),
    /// Up to 64 KiB.
    Medium(u16),
    /// Whatever fits.
    Any(u32),
}

impl Length {
    fn bytes(self) -> u32 {
        match self {
            Self::Short(len) => len.into(),
            Self::Medium(len) => len.into(),
            Self::Any(len) => len,
        }
    }
}

// virtio 1.2, 2.1, 2.7.5.
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;

/// Rings, then the buffers of requests.
const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x4000;
const BUFFERS: u64 = 0x2_0000;

/// Not to wait, in the number of a queue.
const AT_WORK: u8 = 0x80;

/// Rounds of work that one input may ask for.
const ACTS_MAX: usize = 256;

/// Descriptors of a queue that acts name, and that requests are made of.
const NAMED: u16 = 16;

struct Ring {
    size: u16,
    at: u64,
    /// Next descriptor, next slot of the available ring.
    next: u16,
    available: u16,
}

/// The driver's side of one device.
pub struct Driver {
    function: VirtioPci,
    memory: GuestMemory,
    rings: Vec<Ring>,
    /// Where the next buffer goes.
    buffer: u64,
}

/// One thread works for all devices, as in a machine.
static LOOP: LazyLock<EventLoop> =
    LazyLock::new(|| EventLoop::start("devices", || Ok(())).expect("a thread"));
static MEMORY: LazyLock<GuestMemory> = LazyLock::new(guest_memory);

/// Has a driver do `acts` to `device`. Afterwards the device can be reset and
/// started again, and its loop answers.
pub fn drive<Host>(
    device: impl VirtioDevice + 'static,
    acts: Vec<Act<Host>>,
    host: impl FnMut(&mut VirtioPci, Host),
) {
    let mut driver = Driver::of(device);
    driver.run(acts, host);
    driver.end();
}

/// Has a driver do `before` to a device, saves that, makes `changes` to what was
/// saved (bytes at places), and has the driver do `after` to another device that
/// goes on from there, if it takes it.
pub fn drive_saved(
    mut make: impl FnMut() -> Box<dyn VirtioDevice>,
    before: Vec<Act<()>>,
    changes: &[(u16, u8)],
    after: Vec<Act<()>>,
) {
    let mut driver = Driver::of_boxed(make());
    driver.run(before, |_, ()| {});
    LOOP.handle().pause().expect("the loop lives");
    let saved = driver.function.save();
    LOOP.handle().resume().expect("the loop lives");
    let saved = saved.expect("the loop lives");
    driver.function.retire();
    let bytes = postcard::to_allocvec(&saved).expect("it can be written");
    // What does not fit its format any more is the file's affair.
    let saved: FunctionState = postcard::from_bytes(&changed(bytes, changes)).unwrap_or(saved);
    driver.function = function(make());
    if driver.function.restore(&saved).is_ok() {
        assert_eq!(
            driver.function.save().expect("the loop lives").config.len(),
            256
        );
    }
    driver.settle();
    driver.run(after, |_, ()| {});
    driver.end();
}

/// `bytes`, with those at some places replaced.
pub fn changed(mut bytes: Vec<u8>, changes: &[(u16, u8)]) -> Vec<u8> {
    for (at, byte) in changes {
        let at = usize::from(*at) % bytes.len().max(1);
        if let Some(place) = bytes.get_mut(at) {
            *place = *byte;
        }
    }
    bytes
}

fn function(device: Box<dyn VirtioDevice>) -> VirtioPci {
    let vectors = Vectors::new(VirtioPci::vectors_for(&*device));
    VirtioPci::new(
        "fuzzed",
        device,
        MEMORY.clone(),
        LOOP.handle(),
        Box::new(vectors),
        Arc::new(|_, _| {}),
    )
    .expect("a function")
}

impl Driver {
    /// Switches it on.
    fn of(device: impl VirtioDevice + 'static) -> Self {
        Self::of_boxed(Box::new(device))
    }

    fn of_boxed(device: Box<dyn VirtioDevice>) -> Self {
        clear(&MEMORY);
        let mut driver = Self {
            function: function(device),
            memory: MEMORY.clone(),
            rings: Vec::new(),
            buffer: BUFFERS,
        };
        driver.switch_on();
        driver.start(u64::MAX);
        driver
    }

    fn run<Host>(&mut self, acts: Vec<Act<Host>>, mut host: impl FnMut(&mut VirtioPci, Host)) {
        for act in acts.into_iter().take(ACTS_MAX) {
            match act {
                Act::Host(act) => {
                    host(&mut self.function, act);
                    self.settle();
                }
                act => self.act(act),
            }
        }
    }

    fn end(mut self) {
        self.settle();
        self.set(Field::Status, 0);
        assert_eq!(self.status(), 0, "a reset is done at once");
        self.function.retire();
    }

    /// Memory decoding, bus mastering and MSI-X on.
    fn switch_on(&mut self) {
        let _ = self
            .function
            .write_config(0x10, &0xe000_0000_u32.to_le_bytes());
        let _ = self.function.write_config(4, &[6, 0]);
        let mut at = [0];
        self.function.read_config(0x34, &mut at);
        let mut at = u16::from(at[0]);
        while at != 0 {
            let mut capability = [0; 8];
            self.function.read_config(at, &mut capability);
            if capability[0] == 0x11 {
                let count = u16::from_le_bytes([capability[2], capability[3]]) & 0x7ff;
                let table: [u8; 4] = capability[4..].try_into().expect("four bytes");
                for vector in 0..=u64::from(count) {
                    let entry = u64::from(u32::from_le_bytes(table)) + vector * 16;
                    let address = 0xfee0_0000_u64.to_le_bytes();
                    self.function.write_bar(0, entry, &address);
                    self.function.write_bar(0, entry + 12, &[0; 4]);
                }
                let _ = self.function.write_config(at + 2, &[0, 0x80]);
            }
            at = capability[1].into();
        }
    }

    fn set(&mut self, field: Field, value: u64) {
        let (at, width) = field.place();
        self.function
            .write_bar(0, at, &value.to_le_bytes()[..width]);
    }

    fn get(&mut self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.function.read_bar(0, at, &mut data);
        u32::from_le_bytes(data)
    }

    fn status(&mut self) -> u8 {
        let mut status = [0];
        self.function.read_bar(0, 0x14, &mut status);
        status[0]
    }

    /// From reset to DRIVER_OK.
    fn start(&mut self, wanted: u64) {
        self.set(Field::Status, 0);
        self.set(Field::Status, ACKNOWLEDGE.into());
        self.set(Field::Status, (ACKNOWLEDGE | DRIVER).into());
        for half in [0_u64, 1] {
            self.set(Field::DeviceFeatureSelect, half);
            let offered = self.get(4);
            let wanted = (wanted >> (32 * half)) as u32 | half as u32;
            self.set(Field::DriverFeatureSelect, half);
            self.set(Field::DriverFeature, (offered & wanted).into());
        }
        let mut status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        self.set(Field::Status, status.into());
        let count = self.get(0x12) as u16;
        self.rings.clear();
        self.buffer = BUFFERS;
        for index in 0..count {
            self.set(Field::QueueSelect, index.into());
            let mut size = [0; 2];
            self.function.read_bar(0, 0x18, &mut size);
            let size = u16::from_le_bytes(size).min(256);
            let at = RINGS + u64::from(index) * RING_BYTES;
            let ring = Ring {
                size,
                at,
                next: 0,
                available: 0,
            };
            self.write(at, &[0; RING_BYTES as usize]);
            self.set(Field::QueueSize, size.into());
            self.set(Field::QueueVector, (index + 1).into());
            self.set(Field::QueueDescriptors, at);
            self.set(Field::QueueDriver, ring.driver());
            self.set(Field::QueueDevice, ring.device());
            self.set(Field::QueueEnable, 1);
            self.rings.push(ring);
        }
        status |= DRIVER_OK;
        self.set(Field::Status, status.into());
        self.settle();
    }

    fn act<Host>(&mut self, act: Act<Host>) {
        match act {
            Act::Register {
                write,
                at,
                mut data,
                width,
            } => {
                let width = usize::from(width % 8) + 1;
                let at = (at & 0x7fff).into();
                match write {
                    true => self.function.write_bar(0, at, &data[..width]),
                    false => self.function.read_bar(0, at, &mut data[..width]),
                }
            }
            Act::Common(field, value) => self.set(field, value),
            Act::Config {
                at,
                mut data,
                width,
            } => {
                let width = usize::from(width % 4) + 1;
                let _ = self.function.write_config(at, &data[..width]);
                self.function.read_config(at, &mut data[..width]);
                let _ = self.function.bars();
            }
            Act::Descriptor(queue, index, piece) => {
                let flags = (piece.flags & 7).into();
                let next = (piece.next % 17).into();
                let index = u16::from(index) % NAMED;
                if let Some(ring) = self.rings.get(usize::from(queue)) {
                    let at = ring.at + u64::from(index) * 16;
                    let len = piece.len.bytes();
                    self.descriptor(at, piece.place.address(), len, flags, next);
                }
            }
            Act::Bytes(place, bytes) => self.write(place.address(), &bytes),
            Act::Request {
                queue,
                readable,
                writable,
                indirect,
            } => self.request(queue, &readable, &writable, indirect),
            Act::Publish(queue, head) => self.publish(queue, head.into()),
            Act::Jump(queue, index) => {
                if let Some(ring) = self.rings.get_mut(usize::from(queue)) {
                    ring.available = index;
                    let at = ring.driver() + 2;
                    self.write(at, &index.to_le_bytes());
                }
            }
            Act::Notify(queue) => self.notify(queue),
            Act::Start(features) => self.start(features),
            Act::Pause => {
                self.settle();
                self.settle();
            }
            Act::Host(_) => {}
        }
    }

    /// A chain as a good driver makes it.
    fn request(&mut self, queue: u8, readable: &[Vec<u8>], writable: &[u16], indirect: bool) {
        let (notified, queue) = (queue, queue & !AT_WORK);
        let Some(ring) = self.rings.get(usize::from(queue)) else {
            return;
        };
        let (size, head, ring_at) = (ring.size, ring.next, ring.at);
        if self.status() & NEEDS_RESET != 0 || size == 0 {
            return;
        }
        let (table, first) = match indirect {
            true => (self.allocate(16 * u64::from(NAMED)), 0),
            false => (ring_at, head),
        };
        let count = (readable.len() + writable.len()).min(usize::from(NAMED)) as u16;
        let wrap = if indirect { NAMED } else { size };
        for index in 0..count {
            let (len, flags, bytes) = match readable.get(usize::from(index)) {
                Some(bytes) => (bytes.len() as u32, 0, &bytes[..]),
                None => {
                    let len = writable[usize::from(index) - readable.len()];
                    (len.into(), WRITABLE, &[][..])
                }
            };
            let buffer = self.allocate(len.into());
            self.write(buffer, bytes);
            let more = if index + 1 < count { NEXT } else { 0 };
            let at = table + u64::from((first + index) % wrap) * 16;
            self.descriptor(at, buffer, len, flags | more, (first + index + 1) % wrap);
        }
        if indirect {
            let at = ring_at + u64::from(head) * 16;
            self.descriptor(at, table, u32::from(count) * 16, INDIRECT, 0);
        }
        if let Some(ring) = self.rings.get_mut(usize::from(queue)) {
            let used = if indirect { 1 } else { count };
            ring.next = (head + used) % size;
        }
        self.publish(queue, head);
        self.notify(notified);
    }

    fn publish(&mut self, queue: u8, head: u16) {
        let Some(ring) = self.rings.get_mut(usize::from(queue)) else {
            return;
        };
        if ring.size == 0 {
            return;
        }
        let slot = ring.driver() + 4 + u64::from(ring.available % ring.size) * 2;
        ring.available = ring.available.wrapping_add(1);
        let (index, at) = (ring.available, ring.driver() + 2);
        self.write(slot, &head.to_le_bytes());
        self.write(at, &index.to_le_bytes());
    }

    /// As KVM does for an ioeventfd; returns when the device is through with it,
    /// unless it is to be met at work.
    fn notify(&mut self, queue: u8) {
        let number = usize::from(queue & !AT_WORK);
        if let Some(notification) = self.function.notifications().get(number) {
            let _ = notification.event.write(1);
            if queue & AT_WORK == 0 {
                self.settle();
            }
        }
    }

    /// Waits until what was begun has ended: the loop looks at events first.
    fn settle(&mut self) {
        let handle = LOOP.handle();
        handle.pause().expect("the loop lives");
        handle.resume().expect("the loop lives");
    }

    fn allocate(&mut self, len: u64) -> u64 {
        if self.buffer + len > REGION_BYTES {
            self.buffer = BUFFERS;
        }
        let at = self.buffer;
        self.buffer = (at + len).next_multiple_of(16);
        at
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(at, &bytes);
    }

    /// Where there is no memory, nothing happens.
    fn write(&self, at: u64, data: &[u8]) {
        let _ = self.memory.memory().write(data, GuestAddress(at));
    }
}

impl Ring {
    fn driver(&self) -> u64 {
        self.at + u64::from(self.size) * 16
    }

    fn device(&self) -> u64 {
        (self.driver() + 6 + u64::from(self.size) * 2).next_multiple_of(4)
    }
}
