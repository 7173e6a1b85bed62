//! Guest memory: one sealed memory file, mapped shared so that the file
//! server of a virtio-fs device can map it as well. That of a saved guest is in
//! [`super::saved_memory`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::arch::x86_64::layout;

/// A large page of the host's memory, and of its tables for the guest.
pub(super) const LARGE_PAGE: u64 = 2 << 20;

/// Guest memory that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The file could not be made.
    #[error("memory file: {step}")]
    File {
        /// The system call.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// There is no address space for a part of it.
    #[error("find {bytes} bytes of addresses for guest memory at {gpa:#x}")]
    Addresses {
        /// Where the guest sees it.
        gpa: u64,
        /// How long it is.
        bytes: u64,
        /// Why there are none.
        #[source]
        source: io::Error,
    },
    /// A part of it could not be mapped.
    #[error("map {bytes} bytes of guest memory at {gpa:#x}")]
    Map {
        /// Where the guest sees it.
        gpa: u64,
        /// How long it is.
        bytes: u64,
        /// Why it failed.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// A saved guest's memory that may change, or is that of another size.
    #[error("saved memory: {0}")]
    Saved(&'static str),
    /// The parts do not fit beside one another.
    #[error("lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// Makes `mib` MiB of guest memory, and a region of `pluggable_mib` MiB behind
/// it. Pages exist once they are touched.
///
/// # Errors
/// The host refuses so much memory or address space.
pub fn create(mib: u32, pluggable_mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    let (bytes, pluggable) = (u64::from(mib) << 20, u64::from(pluggable_mib) << 20);
    let file = Arc::new(sealed_file(next_large_page(bytes) + pluggable)?);
    let pluggable = Some(layout::pluggable_range(bytes, pluggable));
    let ranges = layout::memory_ranges(bytes).chain(pluggable);
    let regions = regions(ranges, &file, Sharing::Shared)?;
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)
}

/// Who sees what the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Whoever maps the file.
    Shared,
    /// The guest alone: the file stays as it is.
    Private,
}

impl Sharing {
    fn flags(self) -> MapFlags {
        MapFlags::NORESERVE
            | match self {
                Self::Shared => MapFlags::SHARED,
                Self::Private => MapFlags::PRIVATE,
            }
    }
}

/// Whether others can map what the guest writes.
pub fn is_shared(memory: &GuestMemoryMmap) -> bool {
    memory.iter().all(is_region_shared)
}

pub(super) fn is_region_shared(region: &GuestRegionMmap) -> bool {
    region.flags() & libc::MAP_SHARED != 0
}

/// Maps parts of `file`, one after the other from large page to large page, at
/// `ranges`; empty ones are left out.
pub(super) fn regions(
    ranges: impl IntoIterator<Item = Range<u64>>,
    file: &Arc<File>,
    sharing: Sharing,
) -> Result<Vec<GuestRegionMmap>, MemoryError> {
    let mut offset = 0;
    let mut regions = Vec::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        let length = range.end - range.start;
        let map_error = |source| MemoryError::Map {
            gpa: range.start,
            bytes: length,
            source,
        };
        let mapping =
            map(file, offset, length, sharing).map_err(|source| MemoryError::Addresses {
                gpa: range.start,
                bytes: length,
                source,
            })?;
        // SAFETY: these bytes were just mapped, and are never unmapped.
        let mapping = unsafe {
            MmapRegionBuilder::new(length as usize)
                .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(sharing.flags().bits().cast_signed())
                .with_raw_mmap_pointer(mapping)
                .build()
        };
        let mapping = mapping.map_err(map_error)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
            .ok_or_else(|| map_error(vm_memory::mmap::MmapRegionError::InvalidOffsetLength))?;
        regions.push(region);
        offset = next_large_page(offset + length);
    }
    Ok(regions)
}

/// Maps `bytes` of `file` from `offset` on at the beginning of a large page, for
/// as long as this process lives: the kernel uses large pages where the addresses
/// of file, process and guest agree in what is below them.
fn map(file: &File, offset: u64, bytes: u64, sharing: Sharing) -> io::Result<*mut u8> {
    let (length, large) = (bytes as usize, LARGE_PAGE as usize);
    let whole = length
        .checked_add(large)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    let none = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: new addresses, which nobody else knows.
    let reserved = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), whole, none.0, none.1)? };
    let before = reserved.align_offset(large);
    let start = reserved.wrapping_byte_add(before);
    // SAFETY: all of it lies in what was reserved, and nothing refers to it yet.
    unsafe {
        rustix::mm::mmap(
            start,
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            sharing.flags() | MapFlags::FIXED,
            file,
            offset,
        )?;
        if before > 0 {
            rustix::mm::munmap(reserved, before)?;
        }
        rustix::mm::munmap(start.wrapping_byte_add(length), large - before)?;
    }
    Ok(start.cast())
}

/// The beginning of a large page at `gpa` or next behind it.
pub fn next_large_page(gpa: u64) -> u64 {
    gpa.checked_next_multiple_of(LARGE_PAGE).unwrap_or(gpa)
}

/// The beginning of the large page that `gpa` lies in.
pub fn large_page_of(gpa: u64) -> u64 {
    gpa / LARGE_PAGE * LARGE_PAGE
}

/// Makes the memory at `range` exist at once, the whole large pages in it as
/// such where the host has them: each small page that the guest is the first to
/// touch costs an exit and two page faults. For what is filled or used soon in
/// any case. A host that cannot do so gives the pages one by one, when touched.
pub fn populate(memory: &GuestMemoryMmap, range: Range<u64>) {
    let Some(region) = memory.find_region(GuestAddress(range.start)) else {
        return;
    };
    let region_start = region.start_addr().0;
    let range =
        range.start - region_start..range.end.min(region_start + region.len()) - region_start;
    if range.is_empty() {
        return;
    }
    let large = next_large_page(range.start)..large_page_of(range.end);
    for page in large.clone().step_by(LARGE_PAGE as usize) {
        // The kernel takes a large page for one that has been touched.
        let _ = memory.read_obj::<u8>(GuestAddress(region_start + page));
    }
    let advise = |range: Range<u64>, advice| {
        // SAFETY: the range lies in the mapping, whose content stays as it is.
        let address = unsafe { region.as_ptr().add(range.start as usize) };
        // SAFETY: as above.
        let result =
            unsafe { libc::madvise(address.cast(), (range.end - range.start) as usize, advice) };
        result == 0
    };
    // Linux 6.1. Whatever /sys/kernel/mm/transparent_hugepage/shmem_enabled says.
    let is_large = !large.is_empty() && advise(large.clone(), libc::MADV_COLLAPSE);
    let small = if is_large {
        [range.start..large.start, large.end..range.end]
    } else {
        [range, 0..0]
    };
    for range in small.into_iter().filter(|range| !range.is_empty()) {
        // Linux 5.14.
        let _ = advise(range, libc::MADV_POPULATE_WRITE);
    }
}

/// Reads `bytes` of `file` from `offset` on to `gpa`, which is best populated.
///
/// # Errors
/// The file is shorter, cannot be read, or there is no such memory.
pub fn copy_in(
    memory: &GuestMemoryMmap,
    gpa: u64,
    file: &File,
    offset: u64,
    bytes: u64,
) -> io::Result<()> {
    let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    let slice = memory
        .get_slice(GuestAddress(gpa), length)
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    let to = slice.ptr_guard_mut();
    let mut done = 0;
    while done < length {
        let from = i64::try_from(offset + done as u64).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the slice has `length` bytes, of which `done` are behind us.
        let read = unsafe {
            libc::pread(
                file.as_raw_fd(),
                to.as_ptr().add(done).cast(),
                length - done,
                from,
            )
        };
        match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Whoever else gets the file can neither shrink it under our feet (SIGBUS) nor
/// grow it past what the pod is accounted for.
pub(super) fn sealed_file(bytes: u64) -> Result<File, MemoryError> {
    let fail = |step| {
        move |source: rustix::io::Errno| MemoryError::File {
            step,
            source: source.into(),
        }
    };
    let fd = rustix::fs::memfd_create(
        "guest-memory",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .map_err(fail("memfd_create"))?;
    rustix::fs::ftruncate(&fd, bytes).map_err(fail("ftruncate"))?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(fail("F_ADD_SEALS"))?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_above_the_hole_is_the_rest_of_the_file() {
        let memory = create(3 * 1024 + 64, 0).unwrap();
        assert_eq!(memory.num_regions(), 2);
        let high = memory.find_region(GuestAddress(1 << 32)).unwrap();
        assert_eq!(high.len(), 64 << 20);
        assert_eq!(high.file_offset().unwrap().start(), 3 << 30);
        memory.write_obj(7u8, GuestAddress(1 << 32)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn pluggable_memory_is_the_end_of_the_file() {
        let memory = create(64, 128).unwrap();
        let region = memory.find_region(GuestAddress(4 << 30)).unwrap();
        assert_eq!((memory.num_regions(), region.len()), (2, 128 << 20));
        assert_eq!(region.file_offset().unwrap().start(), 64 << 20);

        // And begins at a large page there too.
        let memory = create(65, 128).unwrap();
        let file = memory.iter().last().unwrap().file_offset().unwrap();
        assert_eq!(file.start(), 66 << 20);
        assert_eq!(file.file().metadata().unwrap().len(), (66 + 128) << 20);
    }

    /// Where the file has pages: their first byte, and the first behind them.
    fn data(memory: &GuestMemoryMmap) -> Range<u64> {
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let file = region.file_offset().unwrap().file();
        let start = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(0)).unwrap();
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        start..end
    }

    #[test]
    fn memory_begins_at_a_large_page() {
        let memory = create(3 * 1024 + 64, 128).unwrap();
        for region in memory.iter() {
            assert_eq!(region.as_ptr() as u64 % LARGE_PAGE, 0);
        }
    }

    #[test]
    fn populated_memory_exists_and_keeps_its_content() {
        let memory = create(64, 0).unwrap();
        memory.write_obj(7_u8, GuestAddress(5 << 20)).unwrap();
        let range = (3 << 20)..(9 << 20) + 4096;
        populate(&memory, range.clone());
        assert_eq!(data(&memory), range);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(5 << 20)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(9 << 20)).unwrap(), 0);
    }

    #[test]
    fn what_is_no_memory_is_not_populated() {
        let memory = create(64, 0).unwrap();
        populate(&memory, 1 << 40..1 << 41);
        populate(&memory, 4096..4096);
        populate(&memory, 63 << 20..80 << 20);
        assert_eq!(data(&memory), 63 << 20..64 << 20);
    }

    #[test]
    fn a_file_that_is_too_short_or_long_is_refused() {
        let memory = create(64, 0).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        copy_in(&memory, 4096, &file, 4096, 4096).unwrap();
        let kind = |gpa, bytes| {
            copy_in(&memory, gpa, &file, 4096, bytes)
                .unwrap_err()
                .kind()
        };
        assert_eq!(kind(4096, 4097), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind((64 << 20) - 4095, 4096), io::ErrorKind::InvalidInput);
        assert_eq!(kind(4096, u64::MAX), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_file_keeps_its_size() {
        let memory = create(64, 0).unwrap();
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(1 << 20).is_err());
        assert!(file.set_len(128 << 20).is_err());
    }
}
