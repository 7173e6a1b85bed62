//! The memory of a saved guest: written into a file, and mapped private, so that
//! many guests share what none of them writes.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::sync::Arc;

use rustix::fs::{OFlags, SealFlags, SeekFrom};
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::memory::{MemoryError, Sharing, is_region_shared, regions, sealed_file};
use crate::arch::x86_64::layout;

/// What is copied at once.
const COPY_BYTES: usize = 64 << 10;
const PAGE_BYTES: usize = 4096;

/// Memory of a guest that was saved into `file`, `mib` MiB of it: the pages are
/// those of the file until the guest writes them. The region of `pluggable_mib`
/// MiB behind it is new.
///
/// # Errors
/// As for [`super::memory::create`], or the descriptor can write, or the file is of
/// another size.
pub fn restore(file: File, mib: u32, pluggable_mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    let (bytes, pluggable) = (u64::from(mib) << 20, u64::from(pluggable_mib) << 20);
    // This process cannot change it under all the other guests, or cut it off.
    if !is_read_only(&file) {
        return Err(MemoryError::Saved("the descriptor can write to the file"));
    }
    if length(&file).ok() != Some(bytes) {
        return Err(MemoryError::Saved("the file is not as long as boot_mib"));
    }
    let saved = Arc::new(file);
    let mut all = regions(layout::memory_ranges(bytes), &saved, Sharing::Private)?;
    if pluggable > 0 {
        let file = Arc::new(sealed_file(pluggable)?);
        let range = layout::pluggable_range(bytes, pluggable);
        all.extend(regions([range], &file, Sharing::Shared)?);
    }
    GuestMemoryMmap::from_regions(all).map_err(MemoryError::Layout)
}

/// Whether the descriptor lets nobody write: as it was opened, or by seals.
fn is_read_only(file: &File) -> bool {
    let flags = rustix::fs::fcntl_getfl(file);
    let needed = SealFlags::WRITE | SealFlags::SHRINK;
    let seals = rustix::fs::fcntl_get_seals(file);
    flags.is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDONLY)
        || seals.is_ok_and(|seals| seals.contains(needed))
}

/// Writes memory that nobody changes into an empty file of the same size. Pages
/// of zeroes stay holes.
///
/// # Errors
/// The file is of another size or takes no more.
pub fn save(memory: &GuestMemoryMmap, mut file: &File) -> io::Result<()> {
    let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    if length(file)? != bytes {
        return Err(io::Error::other("the file is not as long as guest memory"));
    }
    let mut buffer = vec![0; COPY_BYTES];
    let mut base = 0;
    for region in memory.iter() {
        let mut at = 0;
        while let Some(data) = next_data(region, at)? {
            let length = (region.len() - data).min(COPY_BYTES as u64);
            let chunk = buffer.get_mut(..length as usize).unwrap_or_default();
            region
                .read_slice(chunk, MemoryRegionAddress(data))
                .map_err(io::Error::other)?;
            for (index, page) in chunk.chunks(PAGE_BYTES).enumerate() {
                if page.iter().any(|byte| *byte != 0) {
                    let to = base + data + (index * PAGE_BYTES) as u64;
                    file.seek(io::SeekFrom::Start(to))?;
                    file.write_all(page)?;
                }
            }
            at = data + length;
        }
        base += region.len();
    }
    Ok(())
}

/// Where the next page of a region is that the host holds, from `at` on.
fn next_data(region: &GuestRegionMmap, at: u64) -> io::Result<Option<u64>> {
    if at >= region.len() {
        return Ok(None);
    }
    let Some(file) = region.file_offset() else {
        return Ok(Some(at));
    };
    if !is_region_shared(region) {
        // What the guest has written is not in the file.
        return Ok(Some(at));
    }
    let page = PAGE_BYTES as u64;
    match rustix::fs::seek(file.file(), SeekFrom::Data(file.start() + at)) {
        Ok(found) => {
            let found = found.saturating_sub(file.start()) / page * page;
            Ok(Some(found.max(at)).filter(|found| *found < region.len()))
        }
        // No more until the end.
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn length(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.len())
}
