//! What the guest is shown of a function of the node: its identity, its memory
//! BARs, MSI-X, and the capabilities of its vendor. The rest is hidden: ports, the
//! ROM, other interrupts, and whatever else the guest could only get wrong.

use std::ops::Range;

use husk_virtio::pci::{BarKind, ConfigSpace, Identity, MSIX_CAPABILITY, MSIX_WRITABLE};

use super::VfioError;

/// Bytes of a configuration space that the machine's bus reaches.
pub(super) const CONFIG_BYTES: usize = 256;

/// Vectors that a guest sees: as many as its processors can use, where each costs
/// descriptors and one of the node's vectors.
const VECTORS_MAX: usize = 64;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const HEADER_TYPE: usize = 0x0e;
const BAR_0: usize = 0x10;
const BARS: usize = 6;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const CAPABILITIES_MAX: usize = (CONFIG_BYTES - FIRST_CAPABILITY) / 4;

const VENDOR_CAPABILITY: u8 = 0x09;

const BAR_IS_PORTS: u32 = 1;
const BAR_TYPE: u32 = 0b110;
const BAR_TYPE_64: u32 = 0b100;

const ENTRY_BYTES: u64 = 16;

/// A part of what is behind a BAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) bar: u8,
    pub(super) range: Range<u64>,
}

/// A function as the guest sees it.
#[derive(Debug)]
pub(super) struct Description {
    pub(super) space: ConfigSpace,
    /// Parts of configuration space where the guest reaches the device.
    pub(super) passed: Vec<Range<usize>>,
    /// Offset of the MSI-X capability.
    pub(super) msix: u16,
    pub(super) vectors: usize,
    pub(super) table: Place,
    pub(super) pending: Place,
}

impl Description {
    /// From a function's configuration space, the sizes of its BARs and how many
    /// MSI-X vectors the node can give it.
    pub(super) fn new(
        config: &[u8; CONFIG_BYTES],
        sizes: &[u64; BARS],
        vectors: u32,
    ) -> Result<Self, VfioError> {
        if config[HEADER_TYPE] & 0x7f != 0 {
            return Err(VfioError::NoEndpoint);
        }
        let u16_at = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
        let mut space = ConfigSpace::new(Identity {
            vendor: u16_at(0),
            device: u16_at(2),
            revision: config[8],
            class: u32::from_le_bytes([config[9], config[10], config[11], 0]),
            subsystem_vendor: u16_at(0x2c),
            subsystem: u16_at(0x2e),
        });
        let mut shown = [0; BARS];
        let mut high_half = false;
        for (index, size) in (0_u8..).zip(*sizes) {
            let at = BAR_0 + 4 * usize::from(index);
            let register = u32_at(config, at);
            let is_high_half = std::mem::replace(&mut high_half, false);
            if size == 0 || is_high_half || register & BAR_IS_PORTS != 0 {
                continue;
            }
            let (kind, largest) = match register & BAR_TYPE {
                BAR_TYPE_64 => (BarKind::Memory64, 1 << 62),
                _ => (BarKind::Memory32, 1 << 31),
            };
            high_half = kind == BarKind::Memory64;
            let fits = usize::from(index) + usize::from(high_half) < BARS;
            if !size.is_power_of_two() || !(16..=largest).contains(&size) || !fits {
                return Err(VfioError::Bar { index, size });
            }
            space.add_bar(index, size, kind);
            shown[usize::from(index)] = size;
        }
        let mut passed = Vec::new();
        let mut msix = None;
        let places = capabilities(config);
        for &at in &places {
            let next = places.iter().copied().filter(|other| *other > at).min();
            let end = next.unwrap_or(CONFIG_BYTES);
            match config[at] {
                VENDOR_CAPABILITY => {
                    let length = config.get(at + 2).map_or(0, |length| usize::from(*length));
                    let end = end.min(at + length);
                    if let Some(body) = config.get(at + 2..end) {
                        space.add_capability_at(at, VENDOR_CAPABILITY, body);
                        passed.push(at + 2..end);
                    }
                }
                MSIX_CAPABILITY if msix.is_none() && at + 12 <= end => {
                    let found = Msix::new(config, at, &shown)?;
                    let vectors = found.entries.min(vectors as usize).min(VECTORS_MAX);
                    if vectors > 0 {
                        // VECTORS_MAX fits.
                        let control = vectors as u16 - 1;
                        let mut body = control.to_le_bytes().to_vec();
                        body.extend(&config[at + 4..at + 12]);
                        let offset = space.add_capability_at(at, MSIX_CAPABILITY, &body);
                        space.allow_writes(offset + 2, &MSIX_WRITABLE.to_le_bytes());
                        msix = Some((offset, vectors, found));
                    }
                }
                _ => {}
            }
        }
        let (msix, vectors, Msix { table, pending, .. }) = msix.ok_or(VfioError::NoMsix)?;
        Ok(Self {
            space,
            passed,
            msix,
            vectors,
            table,
            pending,
        })
    }
}

/// A function's MSI-X capability.
struct Msix {
    entries: usize,
    table: Place,
    pending: Place,
}

impl Msix {
    fn new(config: &[u8; CONFIG_BYTES], at: usize, sizes: &[u64; BARS]) -> Result<Self, VfioError> {
        let control = u32_at(config, at) >> 16;
        let entries = (control & 0x7ff) + 1;
        let place = |register: u32, bytes: u64| {
            let (bar, start) = (register & 7, u64::from(register & !7));
            let size = sizes.get(bar as usize).copied().unwrap_or(0);
            match start + bytes <= size {
                true => Ok(Place {
                    bar: bar as u8,
                    range: start..start + bytes,
                }),
                false => Err(VfioError::Table),
            }
        };
        let entries = u64::from(entries);
        Ok(Self {
            entries: entries as usize,
            table: place(u32_at(config, at + 4), entries * ENTRY_BYTES)?,
            pending: place(u32_at(config, at + 8), entries.div_ceil(64) * 8)?,
        })
    }
}

/// Where the capabilities are, in their order.
fn capabilities(config: &[u8; CONFIG_BYTES]) -> Vec<usize> {
    let mut places = Vec::new();
    if config[STATUS] & STATUS_CAPABILITIES == 0 {
        return places;
    }
    let mut at = usize::from(config[CAPABILITIES] & !3);
    while at >= FIRST_CAPABILITY && places.len() < CAPABILITIES_MAX && !places.contains(&at) {
        places.push(at);
        at = usize::from(config[at + 1] & !3);
    }
    places
}

fn u32_at(config: &[u8; CONFIG_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([config[at], config[at + 1], config[at + 2], config[at + 3]])
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A virtio disk as QEMU makes it: MSI-X in BAR 1, its registers in BAR 4, a port
    /// BAR, and power management, which is hidden.
    pub(in crate::vfio) fn disk() -> ([u8; CONFIG_BYTES], [u64; BARS]) {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0xf4, 0x1a, 0x42, 0x10, 3, 1, 0x10, 0, 1, 0, 0, 1]);
        put(0x10, &[1, 0xc0, 0, 0, 0, 0x40, 0xbc, 0xfe]);
        put(0x20, &[0x0c, 0, 1, 0, 0xc0]);
        put(0x2c, &[0xf4, 0x1a, 0, 0x11]);
        put(0x34, &[0x98]);
        put(0x40, &[9, 0, 16, 1, 4]);
        put(0x84, &[9, 0x40, 20, 5]);
        put(0x98, &[0x11, 0xa4, 1, 0, 1, 0, 0, 0, 1, 8, 0, 0]);
        put(0xa4, &[1, 0x84, 3, 0]);
        (config, [0x80, 0x1000, 0, 0, 0x4000, 0])
    }

    fn read(space: &ConfigSpace, at: u16) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn shows_what_the_guest_can_use() {
        let (config, sizes) = disk();
        let shown = Description::new(&config, &sizes, 2).unwrap();
        let bars: Vec<_> = shown
            .space
            .bars()
            .map(|b| (b.index, b.size, b.kind))
            .collect();
        let (one, four) = (BarKind::Memory32, BarKind::Memory64);
        assert_eq!(bars, [(1, 0x1000, one), (4, 0x4000, four)]);
        assert_eq!(read(&shown.space, 0), 0x1042_1af4);
        assert_eq!(read(&shown.space, 8), 0x0100_0001);
        assert_eq!(read(&shown.space, 0x2c), 0x1100_1af4);
        // Ports, ROM and pin are not there; nor is what the device had been set to.
        assert_eq!(read(&shown.space, 0x10), 0);
        assert_eq!(read(&shown.space, 0x20), 4);
        assert_eq!(read(&shown.space, 4), 0x10_0000);
        // The chain leads past the capability that is hidden.
        assert_eq!(read(&shown.space, 0x34), 0x98);
        assert_eq!(read(&shown.space, 0x98) & 0xffff, 0x8411);
        assert_eq!(read(&shown.space, 0x84), 0x0514_4009);
        assert_eq!(read(&shown.space, 0x40), 0x0110_0009);
        assert_eq!(shown.passed, [0x86..0x98, 0x42..0x50]);
        assert_eq!((shown.msix, shown.vectors), (0x98, 2));
        let place = |range| Place { bar: 1, range };
        assert_eq!(shown.table, place(0..0x20));
        assert_eq!(shown.pending, place(0x800..0x808));
    }

    #[test]
    fn shows_no_more_vectors_than_there_are() {
        let (mut config, mut sizes) = disk();
        sizes[1] = 0x10000;
        config[0x9a..0x9c].copy_from_slice(&0x7ff_u16.to_le_bytes());
        config[0xa0..0xa4].copy_from_slice(&0x8001_u32.to_le_bytes());
        let shown = Description::new(&config, &sizes, 2048).unwrap();
        assert_eq!(shown.vectors, VECTORS_MAX);
        // The device's own table is as large as it is.
        assert_eq!(shown.table.range, 0..0x8000);
        assert_eq!(shown.pending.range, 0x8000..0x8100);
        assert_eq!(Description::new(&config, &sizes, 5).unwrap().vectors, 5);
    }

    #[test]
    fn refuses_what_cannot_be() {
        let refused = |change: fn(&mut [u8; CONFIG_BYTES], &mut [u64; BARS])| {
            let (mut config, mut sizes) = disk();
            change(&mut config, &mut sizes);
            Description::new(&config, &sizes, 2)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(|config, _| config[0x0e] = 1).contains("no PCI endpoint"));
        assert!(refused(|config, _| config[6] = 0).contains("no MSI-X"));
        assert!(refused(|_, sizes| sizes[1] = 0x1001).contains("BAR 1 has 0x1001 bytes"));
        assert!(refused(|_, sizes| sizes[1] = 8).contains("BAR 1"));
        assert!(refused(|_, sizes| sizes[1] = 0x400).contains("MSI-X table"));
        // In ports; in a BAR that is none.
        assert!(refused(|config, _| config[0x9c] = 0).contains("MSI-X table"));
        assert!(refused(|config, _| config[0x9c] = 7).contains("MSI-X table"));
        // Half of a register behind the last.
        assert!(
            refused(|config, sizes| {
                config[0x24] = 4;
                (sizes[4], sizes[5]) = (0, 0x1000);
            })
            .contains("BAR 5")
        );
    }

    proptest! {
        #[test]
        fn any_device_is_described_or_refused(
            mut config in prop::collection::vec(any::<u8>(), CONFIG_BYTES),
            sizes in prop::array::uniform6(prop_oneof![
                Just(0_u64), any::<u64>(), (0_u32..64).prop_map(|bit| 1 << bit)]),
            vectors in any::<u32>(),
        ) {
            config[HEADER_TYPE] = 0;
            config[STATUS] |= STATUS_CAPABILITIES;
            config[0x40] = MSIX_CAPABILITY;
            let config: [u8; CONFIG_BYTES] = config.try_into().unwrap();
            if let Ok(shown) = Description::new(&config, &sizes, vectors) {
                prop_assert!((1..=VECTORS_MAX).contains(&shown.vectors));
                for place in [shown.table, shown.pending] {
                    prop_assert!(place.range.end <= sizes[usize::from(place.bar)]);
                }
                for range in shown.passed {
                    prop_assert!(range.start >= FIRST_CAPABILITY && range.end <= CONFIG_BYTES);
                }
            }
        }
    }
}
