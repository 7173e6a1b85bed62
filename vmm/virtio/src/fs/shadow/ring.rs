//! The driver's end of a ring whose device is the file server. The server may
//! write all of it at any time: what is read from it is the server's word, and
//! nothing that was written to it is read again.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::arena::PAGE_BYTES;

/// Descriptors in the ring.
pub(super) const SIZE: u16 = 128;

/// Chains that can be in it: what is read and what is written are one descriptor
/// each.
pub(super) const CHAINS: u16 = SIZE / 2;

/// In the ring's page.
pub(super) const AVAILABLE: u64 = 16 * SIZE as u64;
pub(super) const USED: u64 = (AVAILABLE + 6 + 2 * SIZE as u64).next_multiple_of(4);
const _: () = assert!(USED + 6 + 8 * SIZE as u64 <= PAGE_BYTES);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_NOTIFY: u16 = 1;

/// Address and length of a buffer.
pub(super) type Buffer = (u64, u32);

type Result<T> = std::result::Result<T, GuestMemoryError>;

pub(super) struct Ring {
    memory: GuestMemoryMmap,
    /// Its page.
    at: u64,
    event_idx: bool,
    /// Index in the available ring.
    offered: u16,
    /// The same when the server was last told.
    told: u16,
    /// Index in the used ring.
    taken: u16,
}

impl Ring {
    /// An empty ring in the page at `at`. The server must not run.
    pub(super) fn new(memory: &GuestMemoryMmap, at: u64, event_idx: bool) -> Result<Self> {
        memory.write_slice(&[0; PAGE_BYTES as usize], GuestAddress(at))?;
        Ok(Self {
            memory: memory.clone(),
            at,
            event_idx,
            offered: 0,
            told: 0,
            taken: 0,
        })
    }

    /// Makes chain number `chain`, below [`CHAINS`], available.
    pub(super) fn offer(
        &mut self,
        chain: u16,
        readable: Buffer,
        writable: Option<Buffer>,
    ) -> Result<()> {
        let head = 2 * chain;
        let flags = if writable.is_some() { NEXT } else { 0 };
        self.describe(head, readable, flags)?;
        if let Some(writable) = writable {
            self.describe(head + 1, writable, WRITE)?;
        }
        let slot = u64::from(self.offered % SIZE);
        self.put(AVAILABLE + 4 + 2 * slot, head)?;
        self.offered = self.offered.wrapping_add(1);
        let index = GuestAddress(self.at + AVAILABLE + 2);
        self.memory
            .store(self.offered.to_le(), index, Ordering::Release)
    }

    fn describe(&self, index: u16, (address, len): Buffer, flags: u16) -> Result<()> {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(index + 1) << 48;
        let at = 16 * u64::from(index);
        self.put(at, address)?;
        self.put(at + 8, rest)
    }

    /// Whether the server is to be kicked for what was offered since this was
    /// last asked (virtio 1.2, 2.7.10).
    pub(super) fn wants_kick(&mut self) -> Result<bool> {
        // The available ring is written before the server's wish is read.
        fence(Ordering::SeqCst);
        let added = self.offered.wrapping_sub(self.told);
        self.told = self.offered;
        if self.event_idx {
            let event = self.load(USED + 4 + 8 * u64::from(SIZE))?;
            Ok(self.offered.wrapping_sub(event).wrapping_sub(1) < added)
        } else {
            Ok(added > 0 && self.load(USED)? & NO_NOTIFY == 0)
        }
    }

    /// How many chains the server says that it has returned since the last taken.
    pub(super) fn returned(&self) -> Result<u16> {
        Ok(self.load(USED + 2)?.wrapping_sub(self.taken))
    }

    /// Takes one that was returned: its head and how much was written, as the
    /// server says.
    pub(super) fn take(&mut self) -> Result<(u32, u32)> {
        let slot = u64::from(self.taken % SIZE);
        self.taken = self.taken.wrapping_add(1);
        let at = GuestAddress(self.at + USED + 4 + 8 * slot);
        let element = u64::from_le(self.memory.read_obj(at)?);
        Ok((element as u32, (element >> 32) as u32))
    }

    /// Asks for a call when the next chain is returned, and tells how many have been
    /// meanwhile. Without an event index every chain comes with a call.
    pub(super) fn ask_for_call(&self) -> Result<u16> {
        if !self.event_idx {
            return Ok(0);
        }
        let event = GuestAddress(self.at + AVAILABLE + 4 + 2 * u64::from(SIZE));
        self.memory
            .store(self.taken.to_le(), event, Ordering::Relaxed)?;
        // The wish is written before the used ring is read.
        fence(Ordering::SeqCst);
        self.returned()
    }

    /// How many were taken back, of all.
    pub(super) fn position(&self) -> u16 {
        self.taken
    }

    fn load(&self, offset: u64) -> Result<u16> {
        let at = GuestAddress(self.at + offset);
        self.memory.load(at, Ordering::Acquire).map(u16::from_le)
    }

    fn put<T: Into<u64> + vm_memory::ByteValued>(&self, offset: u64, value: T) -> Result<()> {
        self.memory.write_obj(value, GuestAddress(self.at + offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};

    const AT: u64 = 0x3000;

    fn ring_and_device(event_idx: bool) -> (GuestMemoryMmap, Ring, Queue) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        memory.write_slice(&[0xff; 4096], GuestAddress(AT)).unwrap();
        let ring = Ring::new(&memory, AT, event_idx).unwrap();
        let mut device = Queue::new(SIZE).unwrap();
        super::super::place(&mut device, AT);
        device.set_event_idx(event_idx);
        assert!(device.is_valid(&memory));
        (memory, ring, device)
    }

    #[test]
    fn a_device_finds_what_is_offered() {
        for event_idx in [false, true] {
            let (memory, mut ring, mut device) = ring_and_device(event_idx);
            // Round it more than once, and the index as well.
            for step in 0..70_000_u32 {
                let chain = (step % u32::from(CHAINS)) as u16;
                let writable = (step % 3 != 0).then_some((0x2_0000 + u64::from(step), 7));
                ring.offer(chain, (0x1_0000, step + 1), writable).unwrap();
                assert!(ring.wants_kick().unwrap());
                assert!(!ring.wants_kick().unwrap());
                let found = device.iter(&memory).unwrap().next().unwrap();
                assert_eq!(found.head_index(), 2 * chain);
                let parts: Vec<_> = found
                    .map(|part| (part.addr().0, part.len(), part.is_write_only()))
                    .collect();
                let readable = (0x1_0000, step + 1, false);
                let expected = match writable {
                    Some((address, len)) => vec![readable, (address, len, true)],
                    None => vec![readable],
                };
                assert_eq!(parts, expected);
                assert!(!device.enable_notification(&memory).unwrap());

                assert_eq!(ring.returned().unwrap(), 0);
                assert_eq!(ring.ask_for_call().unwrap(), 0);
                device.add_used(&memory, 2 * chain, step).unwrap();
                assert!(device.needs_notification(&memory).unwrap());
                assert_eq!(ring.ask_for_call().unwrap(), u16::from(event_idx));
                assert_eq!(ring.returned().unwrap(), 1);
                assert_eq!(ring.take().unwrap(), (2 * u32::from(chain), step));
                assert_eq!(ring.position(), (step + 1) as u16);
            }
        }
    }

    #[test]
    fn neither_side_is_told_what_it_does_not_want_to_know() {
        for event_idx in [false, true] {
            let (memory, mut ring, mut device) = ring_and_device(event_idx);
            assert!(!ring.wants_kick().unwrap());
            ring.offer(0, (0, 1), None).unwrap();
            assert!(ring.wants_kick().unwrap());
            // It is at work, and looks without being told.
            device.disable_notification(&memory).unwrap();
            ring.offer(1, (0, 1), None).unwrap();
            assert!(!ring.wants_kick().unwrap());
            if event_idx {
                device.add_used(&memory, 0, 0).unwrap();
                assert!(device.needs_notification(&memory).unwrap());
                // The first is enough, as nothing was taken since.
                device.add_used(&memory, 2, 0).unwrap();
                assert!(!device.needs_notification(&memory).unwrap());
            }
        }
    }
}
