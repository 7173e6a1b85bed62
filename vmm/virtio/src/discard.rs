//! Guest memory that the host takes back.

use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

/// Takes the host's memory from `length` bytes of a region from `from` on. What is
/// found there afterwards is zeroes; or, in memory that is private to the guest,
/// the file's.
///
/// # Errors
/// The host refuses, or there is no such part of the region. The memory is as it
/// was then.
pub(crate) fn discard(region: &GuestRegionMmap, from: u64, length: u64) -> io::Result<()> {
    let is_inside = from
        .checked_add(length)
        .is_some_and(|end| end <= region.len());
    if !is_inside {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let is_shared = region.flags() & libc::MAP_SHARED != 0;
    if let Some(file) = region.file_offset().filter(|_| is_shared) {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file.file(), mode, file.start() + from, length)?;
        return Ok(());
    }
    // SAFETY: the range lies in the mapping, and nobody here has a reference to what
    // is in it: the guest may change it at any time.
    let done = unsafe {
        let at = region.as_ptr().add(from as usize);
        libc::madvise(at.cast(), length as usize, libc::MADV_DONTNEED)
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
