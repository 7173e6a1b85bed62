use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use husk_virtio::pci::MsiMessage;
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::description::tests::disk;
use super::*;

/// What a device was told, in short.
#[derive(Debug, Default)]
struct Told {
    writes: Vec<(u32, u64, Vec<u8>)>,
    placed: BTreeMap<u8, u64>,
    vectors: usize,
    resets: usize,
    connected: BTreeMap<u16, MsiMessage>,
    complaints: usize,
    gone: bool,
}

type Shared = Arc<Mutex<Told>>;

struct Fake(Shared);

impl Drop for Fake {
    fn drop(&mut self) {
        if let Ok(mut told) = self.0.lock() {
            told.gone = true;
        }
    }
}

impl Hardware for Fake {
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(region as u8 ^ offset as u8);
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut told = self.0.lock().unwrap();
        told.writes.push((region, offset, data.to_vec()));
        Ok(())
    }

    fn place(&mut self, bar: u8, address: Option<u64>) -> io::Result<()> {
        let mut told = self.0.lock().unwrap();
        told.placed.remove(&bar);
        if let Some(address) = address {
            assert!(!told.placed.values().any(|other| *other == address));
            told.placed.insert(bar, address);
        }
        Ok(())
    }

    fn interrupt(&self, events: &[Arc<EventFd>]) -> io::Result<()> {
        self.0.lock().unwrap().vectors = events.len();
        Ok(())
    }

    fn reset(&self) {
        self.0.lock().unwrap().resets += 1;
    }
}

struct Vectors(Vec<Arc<EventFd>>, Shared);

impl MsiVectors for Vectors {
    fn events(&self) -> &[Arc<EventFd>] {
        &self.0
    }

    fn connect(&mut self, vector: u16, message: MsiMessage) -> io::Result<()> {
        self.1.lock().unwrap().connected.insert(vector, message);
        Ok(())
    }

    fn disconnect(&mut self, vector: u16) -> io::Result<()> {
        self.1.lock().unwrap().connected.remove(&vector);
        Ok(())
    }
}

fn function() -> (VfioFunction, Shared, Vec<Arc<EventFd>>) {
    let (config, sizes) = disk();
    let description = Description::new(&config, &sizes, 2).unwrap();
    let shared = Shared::default();
    let event = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let events = vec![event(), event()];
    let vectors = Box::new(Vectors(events.clone(), Arc::clone(&shared)));
    let complaints = Arc::clone(&shared);
    let reporter: Reporter = Arc::new(move |_, _| complaints.lock().unwrap().complaints += 1);
    let hardware = Box::new(Fake(Arc::clone(&shared)));
    let function = VfioFunction::new("disk", description, hardware, vectors, reporter).unwrap();
    (function, shared, events)
}

fn command(told: &Shared) -> Option<u16> {
    let told = told.lock().unwrap();
    let (region, offset, bytes) = told.writes.last()?;
    assert_eq!((*region, *offset), (CONFIG_REGION, 4));
    Some(u16::from_le_bytes(bytes[..].try_into().unwrap()))
}

#[test]
fn the_device_is_as_new_and_may_not_write_before_its_driver_says_so() {
    let (mut function, told, _) = function();
    assert_eq!(told.lock().unwrap().resets, 1);
    assert_eq!(command(&told), Some(0x402));
    assert!(!function.write_config(4, &[4, 0]));
    assert_eq!(command(&told), Some(0x406));
    // The guest's view is its own.
    assert!(!function.write_config(4, &[0, 4]));
    assert_eq!(command(&told), Some(0x402));
}

#[test]
fn registers_are_where_the_bus_puts_them() {
    let (mut function, told, _) = function();
    assert!(!function.write_config(0x14, &0xe000_0000_u32.to_le_bytes()));
    assert!(!function.write_config(0x20, &0xd000_0000_u32.to_le_bytes()));
    assert!(function.write_config(4, &[2, 0]));
    let mut bars = function.bars();
    function.placed(&bars);
    let placed = |told: &Shared| told.lock().unwrap().placed.clone();
    assert_eq!(placed(&told), [(1, 0xe000_0000), (4, 0xd000_0000)].into());
    // They change places; one lies on memory.
    (bars[0].address, bars[1].address) = (bars[1].address, bars[0].address);
    function.placed(&bars);
    assert_eq!(placed(&told), [(1, 0xd000_0000), (4, 0xe000_0000)].into());
    function.placed(&bars[..1]);
    assert_eq!(placed(&told), [(1, 0xd000_0000)].into());
    // None of it is the device's to know.
    assert_eq!(
        told.lock()
            .unwrap()
            .writes
            .iter()
            .filter(|w| w.1 != 4)
            .count(),
        0
    );
}

#[test]
fn interrupts_go_as_the_guest_masks_them() {
    let (mut function, told, events) = function();
    let entry =
        |address: u32, control: u32| [address, 0, 0x41, control].map(u32::to_le_bytes).concat();
    function.write_bar(1, 0, &entry(0xfee0_0000, 0));
    function.write_bar(1, 16, &entry(0xfee0_1000, 1));
    assert_eq!(told.lock().unwrap().vectors, 0);
    let control = 0x98 + 2;
    assert!(!function.write_config(control, &0x8000_u16.to_le_bytes()));
    let message = |address| MsiMessage {
        address,
        data: 0x41,
    };
    let connected = |told: &Shared| told.lock().unwrap().connected.clone();
    assert_eq!(told.lock().unwrap().vectors, 2);
    assert_eq!(connected(&told), [(0, message(0xfee0_0000))].into());
    // One that is masked counts, and is seen to.
    events[1].write(1).unwrap();
    let mut pending = [0; 8];
    function.read_bar(1, 0x800, &mut pending);
    assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
    function.write_bar(1, 0x800, &[0xff; 8]);
    function.write_bar(1, 16 + 12, &[0, 0, 0, 0]);
    assert_eq!(connected(&told).len(), 2);
    // A double word that has other bytes of the capability as well.
    assert!(!function.write_config(0x98, &[0xff, 0xff, 0, 0]));
    assert_eq!(told.lock().unwrap().vectors, 0);
    assert!(connected(&told).is_empty());
    // The device's own table was never touched.
    assert!(told.lock().unwrap().writes.iter().all(|write| write.0 != 1));
}

#[test]
fn the_rest_is_the_devices() {
    let (mut function, told, _) = function();
    let mut data = [0; 4];
    function.read_bar(4, 0x3004, &mut data);
    assert_eq!(data, [0; 4]);
    function.write_bar(4, 0x3000, &[1, 2]);
    function.read_bar(1, 0x7fc, &mut data);
    assert_eq!(data, [0xfd; 4]);
    assert_eq!(
        told.lock().unwrap().writes.last(),
        Some(&(4, 0x3000, vec![1, 2]))
    );
    // The window of a virtio device (virtio 1.2, 4.1.4.9), whole or not.
    assert!(!function.write_config(0x94, &[7; 4]));
    let wrote = (CONFIG_REGION, 0x94, vec![7; 4]);
    assert_eq!(told.lock().unwrap().writes.last(), Some(&wrote));
    function.read_config(0x94, &mut data);
    assert_eq!(data, [0x93; 4]);
    function.read_config(0x84, &mut data);
    assert_eq!(data, [9, 0x40, 20, 5]);
    let before = told.lock().unwrap().writes.len();
    assert!(!function.write_config(0x84, &[0xff; 4]));
    assert_eq!(told.lock().unwrap().writes.len(), before);
}

#[test]
fn who_comes_too_late_finds_nothing() {
    let (mut function, told, _) = function();
    assert!(!function.write_config(0x14, &0xe000_0000_u32.to_le_bytes()));
    assert!(function.write_config(4, &[6, 0]));
    function.placed(&function.bars());
    assert_eq!(told.lock().unwrap().placed.len(), 2);
    assert!(!function.write_config(0x9a, &0x8000_u16.to_le_bytes()));
    function.retire();
    {
        let told = told.lock().unwrap();
        assert!(told.gone && told.placed.is_empty());
        assert_eq!((told.vectors, told.resets, told.complaints), (0, 2, 0));
        assert_eq!(told.writes.last(), Some(&(CONFIG_REGION, 4, vec![0, 4])));
    }
    let writes = told.lock().unwrap().writes.len();
    let mut data = [0; 4];
    function.read_bar(4, 0, &mut data);
    function.write_bar(4, 0, &data);
    function.read_config(0x94, &mut data);
    let _ = function.write_config(0x94, &data);
    let _ = function.write_config(4, &data);
    function.placed(&[]);
    function.retire();
    assert_eq!(told.lock().unwrap().writes.len(), writes);
    assert!(function.save().is_err());
}

proptest! {
    #[test]
    fn survives_any_access(
        accesses in prop::collection::vec((
            any::<bool>(), 0_u8..6, any::<u16>(), prop::collection::vec(any::<u8>(), 1..9)), 0..64)
    ) {
        let (mut function, told, _) = function();
        for (is_config, bar, offset, mut data) in accesses {
            if is_config {
                let offset = offset % 256;
                let before: Vec<_> = function.bars();
                let moved = function.write_config(offset, &data);
                let decoded = |bars: &[Bar]| -> Vec<_> {
                    bars.iter().map(|b| b.decoded.then_some(b.address)).collect()
                };
                prop_assert_eq!(moved, decoded(&before) != decoded(&function.bars()));
                function.read_config(offset, &mut data);
            } else {
                let offset = u64::from(offset % 0x1000);
                function.write_bar(bar, offset, &data);
                data.fill(0);
                function.read_bar(bar, offset, &mut data);
            }
        }
        let told = told.lock().unwrap();
        // Only its command register, and what its vendor added.
        let config = told.writes.iter().filter(|write| write.0 == CONFIG_REGION);
        for (_, offset, data) in config {
            let end = offset + data.len() as u64;
            let passed = [(4, 6), (0x42, 0x50), (0x86, 0x98)];
            prop_assert!(passed.iter().any(|(from, to)| *from <= *offset && end <= *to));
        }
        for (region, offset, _) in &told.writes {
            prop_assert!(*region != 1 || *offset >= 0x20);
        }
        prop_assert!(told.complaints == 0);
    }
}
