//! A type 0 configuration space (PCI 3.0, 6.1).

use super::{Bar, BarKind, StateError};

/// Bytes of a configuration space without the extension of PCI Express.
pub const CONFIG_SPACE_BYTES: usize = 256;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
const BAR_0: usize = 0x10;
const BARS: usize = 6;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const COMMAND_INTERRUPT_DISABLE_HIGH: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR_MEMORY_64: u8 = 0b10 << 1;

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass, programming interface, from the highest of the
    /// three bytes down.
    pub class: u32,
    /// Subsystem's vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// A function's configuration space: bytes, and which bits of them the guest
/// may write. Sizing a BAR needs nothing else: the bits below its size are not
/// writable, so that writing all ones reads back as the size's complement.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SPACE_BYTES],
    writable: [u8; CONFIG_SPACE_BYTES],
    bars: Vec<(u8, u64, BarKind)>,
    last_capability: usize,
    end: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SPACE_BYTES],
            writable: [0; CONFIG_SPACE_BYTES],
            bars: Vec::new(),
            last_capability: 0,
            end: FIRST_CAPABILITY,
        };
        space.set(VENDOR, &identity.vendor.to_le_bytes());
        space.set(DEVICE, &identity.device.to_le_bytes());
        space.set(REVISION, &[identity.revision]);
        space.set(CLASS, &identity.class.to_le_bytes()[..3]);
        space.set(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_BUS_MASTER;
        space.writable[COMMAND + 1] = COMMAND_INTERRUPT_DISABLE_HIGH;
        space.writable[CACHE_LINE] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Adds a memory BAR of `size` bytes, a power of two of at least 16.
    ///
    /// # Panics
    /// The register does not exist or is taken, or the size cannot be: a
    /// mistake in the caller's code, not in anybody's input.
    pub fn add_bar(&mut self, index: u8, size: u64, kind: BarKind) {
        let registers = match kind {
            BarKind::Memory32 => 1,
            BarKind::Memory64 => 2,
        };
        let at = BAR_0 + usize::from(index) * 4;
        let end = at + registers * 4;
        assert!(usize::from(index) + registers <= BARS, "BAR {index}");
        assert!(self.writable[at..end].iter().all(|b| *b == 0), "BAR taken");
        assert!(size.is_power_of_two() && size >= 16, "BAR of {size} bytes");
        assert!(registers == 2 || size <= 1 << 31, "BAR of {size} bytes");
        let mask = (!(size - 1)).to_le_bytes();
        self.writable[at..end].copy_from_slice(&mask[..end - at]);
        if kind == BarKind::Memory64 {
            self.bytes[at] = BAR_MEMORY_64;
        }
        self.bars.push((index, size, kind));
    }

    /// Appends a capability: its id, a pointer that this fills in, and `body`
    /// after them. Gives the offset of the id.
    ///
    /// # Panics
    /// There is no room left.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        self.add_capability_at(self.end, id, body)
    }

    /// Likewise, at `at`, behind all that were added before or between them.
    ///
    /// # Panics
    /// It does not fit there.
    pub fn add_capability_at(&mut self, at: usize, id: u8, body: &[u8]) -> u16 {
        assert!(at >= FIRST_CAPABILITY, "capability at {at:#x}");
        let end = at + 2 + body.len();
        assert!(end <= CONFIG_SPACE_BYTES, "no room for capability {id:#x}");
        let pointer = match self.last_capability {
            0 => CAPABILITIES,
            last => last + 1,
        };
        self.bytes[pointer] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[at] = id;
        self.bytes[at + 2..end].copy_from_slice(body);
        self.last_capability = at;
        self.end = self.end.max(end.next_multiple_of(4));
        at as u16
    }

    /// Lets the guest write the bits of `mask` from `offset` on.
    ///
    /// # Panics
    /// The mask goes past the end.
    pub fn allow_writes(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Fills `data` from `offset` on; zeroes past the end.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).map_or(0, |b| *b);
        }
    }

    /// Takes what the guest writes, as far as it may. True when BARs moved or
    /// decoding was switched.
    #[must_use]
    pub fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        let before = self.decoded();
        for (i, byte) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
        self.decoded() != before
    }

    /// All of its bytes.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes what the guest had written from `saved`.
    ///
    /// # Errors
    /// The rest is not what it is here: another function was saved.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), StateError> {
        let unlike = StateError::Unlike("configuration space");
        let Ok(saved) = <[u8; CONFIG_SPACE_BYTES]>::try_from(saved) else {
            return Err(unlike);
        };
        let fixed = |bytes: &[u8; CONFIG_SPACE_BYTES]| -> Vec<u8> {
            let each = bytes.iter().zip(&self.writable);
            each.map(|(byte, writable)| byte & !writable).collect()
        };
        if fixed(&saved) != fixed(&self.bytes) {
            return Err(unlike);
        }
        self.bytes = saved;
        Ok(())
    }

    /// The BARs as the guest has set them.
    pub fn bars(&self) -> impl Iterator<Item = Bar> {
        let memory = self.bytes[COMMAND] & COMMAND_MEMORY != 0;
        self.bars.iter().map(move |&(index, size, kind)| {
            let at = BAR_0 + usize::from(index) * 4;
            let low = u64::from(self.u32_at(at)) & !0xf;
            let address = match kind {
                BarKind::Memory32 => low,
                BarKind::Memory64 => low | u64::from(self.u32_at(at + 4)) << 32,
            };
            let end = match kind {
                BarKind::Memory32 => address + size <= 1 << 32,
                BarKind::Memory64 => address.checked_add(size).is_some(),
            };
            Bar {
                index,
                size,
                kind,
                address,
                decoded: memory && end,
            }
        })
    }

    fn decoded(&self) -> [Option<u64>; BARS] {
        let mut decoded = [None; BARS];
        for bar in self.bars().filter(|bar| bar.decoded) {
            decoded[usize::from(bar.index)] = Some(bar.address);
        }
        decoded
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn u32_at(&self, at: usize) -> u32 {
        let mut value = [0; 4];
        value.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        space.add_bar(0, 0x8000, BarKind::Memory32);
        space.add_bar(2, 1 << 33, BarKind::Memory64);
        space
    }

    fn read_u32(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn shows_its_identity() {
        let space = space();
        assert_eq!(read_u32(&space, 0), 0x1042_1af4);
        assert_eq!(read_u32(&space, 8), 0x0180_0001);
        assert_eq!(read_u32(&space, 0x2c), 0x0040_1af4);
    }

    #[test]
    fn sizes_its_bars() {
        let mut space = space();
        for at in [0x10, 0x14, 0x18, 0x1c] {
            assert!(!space.write(at, &[0xff; 4]), "decoding is off");
        }
        assert_eq!(read_u32(&space, 0x10), !0x7fff);
        assert_eq!(read_u32(&space, 0x14), 0);
        assert_eq!(read_u32(&space, 0x18), 0x4);
        assert_eq!(read_u32(&space, 0x1c), !1);
    }

    #[test]
    fn reports_moves() {
        let mut space = space();
        assert!(!space.write(0x10, &0xe000_1234_u32.to_le_bytes()));
        assert!(space.bars().all(|bar| !bar.decoded));
        assert!(space.write(4, &[2, 0]));
        let bars: Vec<_> = space.bars().collect();
        assert_eq!(bars[0].address, 0xe000_0000);
        assert!(bars[0].decoded);
        assert!(!space.write(0x3c, &[9]));
        assert!(space.write(0x12, &[1]));
        assert!(space.write(4, &[0]));
    }

    #[test]
    fn does_not_decode_round_the_end() {
        let mut space = space();
        let _ = space.write(0x10, &[0xff; 16]);
        let _ = space.write(4, &[2]);
        let bars: Vec<_> = space.bars().collect();
        assert!(bars[0].decoded, "the last place below 4 GiB is sound");
        assert_eq!(bars[1].address, 0_u64.wrapping_sub(1 << 33));
        assert!(!bars[1].decoded);
    }

    #[test]
    fn chains_capabilities() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0; 10]);
        let second = space.add_capability(0x09, &[1, 2, 3]);
        assert_eq!((first, second), (0x40, 0x4c));
        assert_eq!(read_u32(&space, 0x34), 0x40);
        assert_eq!(read_u32(&space, 0x40), 0x4c11);
        assert_eq!(read_u32(&space, 0x4c), 0x0201_0009);
        assert_eq!(read_u32(&space, 4) >> 16, 0x10);
    }

    #[test]
    fn goes_on_as_it_was_saved() {
        let mut before = space();
        let _ = before.write(0x10, &0xe000_0000_u32.to_le_bytes());
        let _ = before.write(4, &[2, 0]);
        let mut after = space();
        after.restore(&before.save()).unwrap();
        assert_eq!(after.decoded(), before.decoded());
        assert_eq!(after.save(), before.save());

        let mut other = before.save();
        other[2] ^= 1;
        assert!(after.restore(&other).is_err(), "another device");
        assert!(after.restore(&other[..255]).is_err());
        assert!(after.restore(&[]).is_err());
    }

    proptest! {
        #[test]
        fn survives_any_access(
            accesses in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let mut space = space();
            for (offset, mut data) in accesses {
                for offset in [offset, offset % 256] {
                    let before = space.decoded();
                    let moved = space.write(offset, &data);
                    prop_assert_eq!(moved, before != space.decoded());
                    space.read(offset, &mut data);
                }
            }
            prop_assert_eq!(read_u32(&space, 0), 0x1042_1af4);
            for bar in space.bars() {
                prop_assert_eq!(bar.address % bar.size.min(1 << 31), 0);
            }
        }
    }
}
