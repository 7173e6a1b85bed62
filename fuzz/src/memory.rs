//! Guest memory whose surroundings cannot be touched: an access that misses it
//! ends the process, with and without AddressSanitizer.

use std::fs::File;
use std::ops::Range;

use husk_virtio::GuestMemory;
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap,
    GuestRegionMmap,
};

/// Bytes of each of the two regions that buffers are in.
pub const REGION_BYTES: u64 = 512 << 10;

/// Where the second region begins; between the two there is nothing.
pub const HIGH: u64 = 1 << 20;

/// A third one, of four blocks of virtio-mem.
pub const PLUGGABLE: Range<u64> = 16 << 20..24 << 20;

/// Pages on each side of a region that nobody may touch.
const GUARD_BYTES: usize = 1 << 20;

/// Regions in files, as a machine's are.
pub fn guest_memory() -> GuestMemory {
    let buffers = [0, HIGH].map(|start| region(GuestAddress(start), REGION_BYTES));
    let pluggable = region(
        GuestAddress(PLUGGABLE.start),
        PLUGGABLE.end - PLUGGABLE.start,
    );
    let regions = buffers.into_iter().chain([pluggable]).collect();
    let memory = GuestMemoryMmap::from_regions(regions).expect("they are apart");
    GuestMemoryAtomic::new(memory)
}

/// Fills it with zeroes.
pub fn clear(memory: &GuestMemory) {
    let memory = memory.memory();
    for start in [0, HIGH] {
        memory
            .write_slice(&[0; REGION_BYTES as usize], GuestAddress(start))
            .expect("it is there");
    }
}

fn region(start: GuestAddress, bytes: u64) -> GuestRegionMmap {
    let file: File = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC)
        .expect("a memfd")
        .into();
    file.set_len(bytes).expect("memory");
    let bytes = bytes as usize;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: fresh addresses, of which the middle is then replaced; they are
    // never unmapped.
    let region = unsafe {
        let around = rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            bytes + 2 * GUARD_BYTES,
            ProtFlags::empty(),
            MapFlags::PRIVATE,
        )
        .expect("addresses");
        let at = rustix::mm::mmap(
            around.byte_add(GUARD_BYTES),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::FIXED,
            &file,
            0,
        )
        .expect("memory");
        MmapRegionBuilder::<()>::new(bytes)
            .with_raw_mmap_pointer(at.cast())
            .with_mmap_prot(protection)
            .with_mmap_flags(flags)
            .with_file_offset(FileOffset::new(file, 0))
            .build()
            .expect("a region")
    };
    GuestRegionMmap::new(region, start).expect("the address space is large enough")
}
