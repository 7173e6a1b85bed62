//! Guest memory: one sealed memory file, mapped shared so that the file
//! server of a virtio-fs device can map it as well.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use crate::arch::x86_64::layout;

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
    let file = Arc::new(sealed_file(bytes + pluggable)?);
    let mut offset = 0;
    let mut regions = Vec::new();
    let pluggable = Some(layout::pluggable_range(bytes, pluggable));
    let pluggable = pluggable.filter(|range| !range.is_empty());
    for range in layout::memory_ranges(bytes).chain(pluggable) {
        let length = range.end - range.start;
        let map_error = |source| MemoryError::Map {
            gpa: range.start,
            bytes: length,
            source,
        };
        let mapping = MmapRegion::build(
            Some(FileOffset::from_arc(Arc::clone(&file), offset)),
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(map_error)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
            .ok_or_else(|| map_error(vm_memory::mmap::MmapRegionError::InvalidOffsetLength))?;
        regions.push(region);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)
}

/// Copies `bytes` of `file` from `offset` on to `gpa`. The copy goes from file to
/// file inside the host's kernel: reading into the mapping would fault on each
/// of its pages.
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
    let region = memory.find_region(GuestAddress(gpa));
    let found = region.and_then(|region| {
        let at = gpa.checked_sub(region.start_addr().0)?;
        let fits = at.checked_add(bytes)? <= region.len();
        fits.then_some((region.file_offset()?, at))
    });
    let Some((memory_file, at)) = found else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    rustix::fs::seek(
        memory_file.file(),
        SeekFrom::Start(memory_file.start() + at),
    )?;
    let mut from = offset;
    let mut left = bytes;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX);
        match rustix::fs::sendfile(memory_file.file(), file, Some(&mut from), most) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(copied) => left = left.saturating_sub(copied as u64),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whoever else gets the file can neither shrink it under our feet (SIGBUS) nor
/// grow it past what the pod is accounted for.
fn sealed_file(bytes: u64) -> Result<File, MemoryError> {
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
