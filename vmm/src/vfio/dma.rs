//! What of guest memory devices of the node reach: all that the guest has. Memory
//! that is plugged is reached from then on; what is unplugged no more.
//!
//! The kernel pins what devices reach: it is there from then on, whether the guest
//! uses it or not. Private memory of a restored guest is the guest's own from then
//! on as well, since the kernel pins it to be written (`FOLL_WRITE`, Linux's
//! drivers/vfio/vfio_iommu_type1.c).

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_virtio::mem::{BLOCK_BYTES, Change};
use husk_virtio::{GuestMemory, Pins};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::abi;

/// The machine's memory as devices see it.
pub struct DmaSpace {
    memory: GuestMemory,
    pluggable: Range<u64>,
    pins: Pins,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Blocks of pluggable memory that the guest has. Each is mapped by itself, since
    /// each may go by itself.
    plugged: BTreeSet<u64>,
    containers: Vec<Arc<OwnedFd>>,
}

impl DmaSpace {
    /// Of `memory`, of which nothing in `pluggable` is there yet.
    pub fn new(memory: GuestMemory, pluggable: Range<u64>, pins: Pins) -> Self {
        Self {
            memory,
            pluggable,
            pins,
            state: Mutex::default(),
        }
    }

    /// Has the devices of a container reach guest memory.
    ///
    /// # Errors
    /// The kernel refuses: more would be pinned than may be.
    pub fn add(&self, container: &Arc<OwnedFd>) -> io::Result<()> {
        // Nothing is taken from the guest from here on.
        self.pins.add();
        let added = self.map_all(container);
        if added.is_err() {
            self.pins.remove();
        }
        added
    }

    fn map_all(&self, container: &Arc<OwnedFd>) -> io::Result<()> {
        // Without the lock, which the thread of all devices takes when memory is
        // plugged: pinning takes long, and this part stays as it is.
        let memory = self.memory.memory();
        let regions = memory.iter().map(|region| {
            let start = region.start_addr().0;
            start..start + region.len()
        });
        for range in regions.filter(|range| !self.pluggable.contains(&range.start)) {
            self.map(container.as_fd(), &range)?;
        }
        let mut state = self.lock();
        for block in &state.plugged {
            self.map(container.as_fd(), &(*block..block + BLOCK_BYTES))?;
        }
        state.containers.push(Arc::clone(container));
        Ok(())
    }

    /// Forgets a container. Its mappings go with its last descriptor.
    pub fn remove(&self, container: &Arc<OwnedFd>) {
        let mut state = self.lock();
        let before = state.containers.len();
        state.containers.retain(|one| !Arc::ptr_eq(one, container));
        if state.containers.len() < before {
            self.pins.remove();
        }
    }

    /// Follows memory that comes and goes.
    ///
    /// # Errors
    /// The kernel refuses what comes; devices reach none of it then.
    pub fn follow(&self, change: Change) -> io::Result<()> {
        let mut state = self.lock();
        match change {
            Change::Plug(range) => {
                let blocks = range.step_by(BLOCK_BYTES as usize);
                for (done, block) in blocks.clone().enumerate() {
                    if let Err(error) = self.map_everywhere(&state, block) {
                        for block in blocks.take(done) {
                            self.forget(&mut state, block);
                        }
                        return Err(error);
                    }
                    state.plugged.insert(block);
                }
            }
            Change::Unplug(range) => {
                let gone: Vec<_> = state.plugged.range(range).copied().collect();
                for block in gone {
                    self.forget(&mut state, block);
                }
            }
        }
        Ok(())
    }

    fn map_everywhere(&self, state: &State, block: u64) -> io::Result<()> {
        let range = block..block + BLOCK_BYTES;
        for (done, container) in state.containers.iter().enumerate() {
            if let Err(error) = self.map(container.as_fd(), &range) {
                for container in &state.containers[..done] {
                    let _ = abi::unmap(container.as_fd(), block, BLOCK_BYTES);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn forget(&self, state: &mut State, block: u64) {
        state.plugged.remove(&block);
        for container in &state.containers {
            // Can only fail if it was not mapped.
            let _ = abi::unmap(container.as_fd(), block, BLOCK_BYTES);
        }
    }

    fn map(&self, container: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
        let size = range.end - range.start;
        let memory = self.memory.memory();
        let length = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
        let slice = memory
            .get_slice(GuestAddress(range.start), length)
            .map_err(|_| io::ErrorKind::InvalidInput)?;
        let pointer = slice.ptr_guard().as_ptr();
        // SAFETY: guest memory, which is never unmapped.
        unsafe { abi::map(container, range.start, pointer, size) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory;
    use std::fs::File;
    use vm_memory::GuestMemoryAtomic;

    const START: u64 = 4 << 30;

    fn space() -> DmaSpace {
        let memory = GuestMemoryAtomic::new(memory::create(64, 128).unwrap());
        DmaSpace::new(memory, START..START + (128 << 20), Pins::default())
    }

    fn plugged(space: &DmaSpace) -> Vec<u64> {
        let state = space.lock();
        let blocks = state.plugged.iter();
        blocks.map(|block| (block - START) / BLOCK_BYTES).collect()
    }

    fn blocks(range: Range<u64>) -> Range<u64> {
        START + range.start * BLOCK_BYTES..START + range.end * BLOCK_BYTES
    }

    #[test]
    fn knows_what_the_guest_has_before_there_is_a_device() {
        let space = space();
        space.follow(Change::Plug(blocks(0..5))).unwrap();
        space.follow(Change::Unplug(blocks(1..3))).unwrap();
        assert_eq!(plugged(&space), [0, 3, 4]);
        space.follow(Change::Unplug(blocks(0..64))).unwrap();
        assert!(plugged(&space).is_empty());
    }

    #[test]
    fn what_cannot_be_reached_is_not_plugged() {
        let space = space();
        let none = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        assert!(space.add(&none).is_err());
        assert!(space.lock().containers.is_empty());
        space.lock().containers.push(Arc::clone(&none));
        assert!(space.follow(Change::Plug(blocks(0..2))).is_err());
        assert!(plugged(&space).is_empty());
        space.remove(&none);
        space.follow(Change::Plug(blocks(0..2))).unwrap();
        assert_eq!(plugged(&space), [0, 1]);
    }
}
