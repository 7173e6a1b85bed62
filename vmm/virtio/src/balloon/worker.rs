use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use crate::discard::discard;
use crate::queue::{Chain, DeviceQueue};
use crate::{DeviceError, Event, GuestMemory, Pins, Source, Worker};

/// What the host gives and takes.
const PAGE_BYTES: u64 = 4096;

pub(super) struct BalloonWorker {
    /// Pages for the balloon, and out of it: it takes none.
    pub(super) unwanted: [DeviceQueue; 2],
    pub(super) reports: Option<DeviceQueue>,
    pub(super) memory: GuestMemory,
    pub(super) pins: Pins,
}

impl Worker for BalloonWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }

    fn process(&mut self, event: Event) -> Result<(), DeviceError> {
        let Event::Queue(index) = event else {
            return Ok(());
        };
        if let Some(queue) = self.unwanted.get_mut(usize::from(index)) {
            queue.begin();
            while let Some(chain) = queue.pop()? {
                queue.add_used(chain.head(), 0)?;
            }
            return queue.signal();
        }
        let Some(reports) = &mut self.reports else {
            return Ok(());
        };
        // Giving memory back may take long.
        reports.begin_with(1);
        while let Some(chain) = reports.pop()? {
            self.pins.unless_any(|| give_back(&self.memory, &chain));
            reports.add_used(chain.head(), 0)?;
        }
        reports.signal()
    }
}

/// Takes the host's memory from the whole pages of a chain's buffers. What the
/// guest finds there later is zeroes or, in memory that it shares with others until
/// it writes, what was there at its beginning: the driver expects neither.
fn give_back(memory: &GuestMemory, chain: &Chain) {
    let memory = memory.memory();
    for piece in chain.writable_iovecs(0, chain.writable_len()) {
        for region in memory.iter() {
            // A piece lies in one region, and all of them begin at a page.
            let from = piece.iov_base.addr().checked_sub(region.as_ptr().addr());
            let Some(from) = from.map(|from| from as u64) else {
                continue;
            };
            let end = (from + piece.iov_len as u64).min(region.len()) / PAGE_BYTES * PAGE_BYTES;
            let from = from.next_multiple_of(PAGE_BYTES);
            if from < end {
                // What is not taken stays the guest's, as it was before.
                let _ = discard(region, from, end - from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{
        FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
    };

    use crate::Pins;
    use crate::balloon::Balloon;
    use crate::testing::{Buffer, Driver, HIGH, MEMORY_BYTES};

    const PAGE: u32 = 4096;
    const LOW_PAGE: u64 = 0x20_0000;
    const HIGH_PAGE: u64 = HIGH + 0x1000;

    /// A driver whose memory is `file`, twice: below and above the hole.
    fn driver(file: &Arc<File>, flags: i32) -> Driver {
        driver_of(file, flags, Pins::default())
    }

    fn driver_of(file: &Arc<File>, flags: i32, pins: Pins) -> Driver {
        let region = |start, offset| {
            let mapping = MmapRegionBuilder::new(MEMORY_BYTES as usize)
                .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags)
                .build()
                .unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
        };
        let regions = vec![region(0, 0), region(HIGH, MEMORY_BYTES)];
        let memory = GuestMemoryMmap::from_regions(regions).unwrap();
        Driver::with_memory(Balloon::new(pins), GuestMemoryAtomic::new(memory))
    }

    fn file(byte: u8) -> Arc<File> {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        let all = vec![byte; 2 * MEMORY_BYTES as usize];
        std::os::unix::fs::FileExt::write_all_at(&file, &all, 0).unwrap();
        Arc::new(file)
    }

    fn held(file: &File) -> u64 {
        rustix::fs::fstat(file).unwrap().st_blocks as u64 * 512
    }

    fn report(driver: &mut Driver, pieces: &[Buffer]) {
        let mut queues = driver.start(u64::MAX);
        queues[2].add(pieces);
        driver.notify(2);
        driver.wait_queue(2);
        assert_eq!(queues[2].pop_used().map(|used| used.1), Some(0));
    }

    #[test]
    fn whole_pages_that_are_reported_go_back() {
        let file = file(7);
        let mut driver = driver(&file, libc::MAP_SHARED);
        let before = held(&file);
        let pieces = [
            Buffer::writable(LOW_PAGE, 2 * PAGE),
            // A page, and parts of its neighbours.
            Buffer::writable(HIGH_PAGE - 1, PAGE + 2),
            Buffer::writable(LOW_PAGE + 0x8000 + 1, 2 * PAGE - 2),
        ];
        report(&mut driver, &pieces);
        assert_eq!(before - held(&file), 3 * u64::from(PAGE));
        assert_eq!(driver.read(LOW_PAGE, 8192), [0; 8192]);
        assert_eq!(driver.read(LOW_PAGE - 1, 1), [7]);
        assert_eq!(driver.read(LOW_PAGE + 8192, 1), [7]);
        assert_eq!(driver.read(HIGH_PAGE, 4096), [0; 4096]);
        assert_eq!(driver.read(HIGH_PAGE - 1, 1), [7]);
        assert_eq!(driver.read(HIGH_PAGE + 4096, 1), [7]);
        // And are there again when they are touched.
        driver.write(LOW_PAGE, &[9]);
        assert_eq!(driver.read(LOW_PAGE, 2), [9, 0]);
    }

    #[test]
    fn a_copy_gives_back_what_is_its_own() {
        let file = file(7);
        let mut driver = driver(&file, libc::MAP_PRIVATE);
        driver.write(LOW_PAGE, &[9; 8192]);
        report(&mut driver, &[Buffer::writable(LOW_PAGE, PAGE)]);
        assert_eq!(driver.read(LOW_PAGE, 4097), [&[7; 4096][..], &[9]].concat());
        assert_eq!(held(&file), 2 * MEMORY_BYTES, "the others' is as it was");
    }

    #[test]
    fn nothing_is_taken_while_memory_is_pinned() {
        let file = file(7);
        let pins = Pins::default();
        let mut driver = driver_of(&file, libc::MAP_SHARED, pins.clone());
        let before = held(&file);
        let piece = [Buffer::writable(LOW_PAGE, PAGE)];
        pins.add();
        report(&mut driver, &piece);
        assert_eq!(held(&file), before);
        pins.remove();
        report(&mut driver, &piece);
        assert_eq!(before - held(&file), u64::from(PAGE));
    }

    #[test]
    fn nothing_else_is_taken() {
        let file = file(7);
        let mut driver = driver(&file, libc::MAP_SHARED);
        let before = held(&file);
        // Readable: nothing is said about these.
        report(&mut driver, &[Buffer::readable(LOW_PAGE, PAGE)]);
        // No page is wanted in the balloon.
        let mut queues = driver.start(u64::MAX);
        for queue in [0, 1] {
            queues[queue].add(&[Buffer::readable(LOW_PAGE, PAGE)]);
            driver.notify(queue as u16);
            driver.wait_queue(queue as u16);
            assert!(queues[queue].pop_used().is_some());
        }
        assert_eq!(held(&file), before);
        assert_eq!(driver.device_config(0), [0; 8]);
    }

    #[test]
    fn a_buffer_outside_memory_costs_a_reset() {
        let file = file(7);
        let mut driver = driver(&file, libc::MAP_SHARED);
        let mut queues = driver.start(u64::MAX);
        queues[2].add(&[Buffer::writable(MEMORY_BYTES - 4096, 2 * PAGE)]);
        driver.notify(2);
        driver.wait_needs_reset();
    }
}
