//! The memory of a saved guest: written into a file, and mapped private, so that
//! many guests share what none of them writes.
//!
//! It is a file of large pages: each is there altogether, or not at all and
//! zeroes. Those that are not there are never mapped: a page that a private mapping
//! finds missing comes into being in the file first and is copied then, so that
//! whoever touches it first pays twice, and the file grows for as long as it lives.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::iter;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{OFlags, SealFlags, SeekFrom};
use rustix::mm::{MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::memory::{
    LARGE_PAGE, MemoryError, Sharing, is_region_shared, large_page_of, regions, sealed_file,
};
use crate::arch::x86_64::layout;
use crate::bounded::at_most;

/// What is copied at once.
const COPY_BYTES: usize = 64 << 10;
const PAGE_BYTES: usize = 4096;

/// Most runs of large pages that are told apart. Each costs two mappings, of which
/// a process has 65,530 (`vm.max_map_count`).
const RUNS_MAX: usize = 4096;

/// Which large pages of a saved guest's memory are in the file, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled(#[serde(deserialize_with = "at_most::<RUNS_MAX, _, _>")] Vec<Range<u32>>);

impl Filled {
    fn add(&mut self, page: u32) {
        let is_full = self.0.len() >= RUNS_MAX;
        match self.0.last_mut() {
            Some(run) if run.end == page || is_full => run.end = page + 1,
            _ => self.0.push(page..page + 1),
        }
    }

    /// What is not there of a file of so many bytes.
    fn holes(&self, bytes: u64) -> impl Iterator<Item = Range<u64>> {
        let in_bytes = |page: u32| u64::from(page) * LARGE_PAGE;
        let runs = self
            .0
            .iter()
            .map(move |run| in_bytes(run.start)..in_bytes(run.end));
        let mut at = 0;
        runs.chain(iter::once(bytes..bytes)).filter_map(move |run| {
            let hole = at..run.start.min(bytes);
            at = at.max(run.start).max(run.end);
            (!hole.is_empty()).then_some(hole)
        })
    }
}

/// Memory of a guest that was saved into `file`, `mib` MiB of it: the pages that
/// are `filled` there are those of the file until the guest writes them. The region
/// of `pluggable_mib` MiB behind it is new.
///
/// # Errors
/// As for [`super::memory::create`], or the descriptor can write, or the file is of
/// another size.
pub fn restore(
    file: File,
    filled: &Filled,
    mib: u32,
    pluggable_mib: u32,
) -> Result<GuestMemoryMmap, MemoryError> {
    let (bytes, pluggable) = (u64::from(mib) << 20, u64::from(pluggable_mib) << 20);
    // This process cannot change it under all the other guests, or cut it off.
    if !is_read_only(&file) {
        return Err(MemoryError::Saved("the descriptor can write to the file"));
    }
    let length = length(&file).map_err(|source| MemoryError::File {
        step: "length",
        source,
    })?;
    if length != bytes {
        return Err(MemoryError::Saved("the file is not as long as boot_mib"));
    }
    let saved = Arc::new(file);
    let mut all = regions(layout::memory_ranges(bytes), &saved, Sharing::Private)?;
    for hole in filled.holes(bytes) {
        for region in &all {
            cover(region, &hole)?;
        }
    }
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

/// Gives a region new memory where the file has a `hole`.
fn cover(region: &GuestRegionMmap, hole: &Range<u64>) -> Result<(), MemoryError> {
    let start = region.file_offset().map_or(0, |file| file.start());
    let part = hole.start.max(start)..hole.end.min(start + region.len());
    if part.is_empty() {
        return Ok(());
    }
    let length = part.end - part.start;
    // SAFETY: the part lies in the region's mapping, and nobody has seen its
    // content yet.
    let mapped = unsafe {
        rustix::mm::mmap_anonymous(
            region.as_ptr().add((part.start - start) as usize).cast(),
            length as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
        )
    };
    mapped.map(|_| ()).map_err(|source| MemoryError::Addresses {
        gpa: region.start_addr().0 + part.start - start,
        bytes: length,
        source: source.into(),
    })
}

/// Writes memory that nobody changes into an empty file of the same size. Large
/// pages of zeroes stay holes.
///
/// # Errors
/// The file is not empty, of another size, or takes no more.
pub fn save(memory: &GuestMemoryMmap, mut file: &File) -> io::Result<Filled> {
    let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    if length(file)? != bytes {
        return Err(io::Error::other("the file is not as long as guest memory"));
    }
    // What was in it would show between what is written.
    if file.metadata()?.blocks() != 0 {
        return Err(io::Error::other("the file is not empty"));
    }
    let mut filled = Filled::default();
    let mut buffer = vec![0; LARGE_PAGE as usize];
    let mut base = 0;
    for region in memory.iter() {
        let mut at = 0;
        while let Some(data) = next_data(region, at)? {
            let page = large_page_of(data);
            at = (page + LARGE_PAGE).min(region.len());
            let part = buffer.get_mut(..(at - page) as usize).unwrap_or_default();
            read(region, page, part)?;
            if part.iter().any(|byte| *byte != 0) {
                file.seek(io::SeekFrom::Start(base + page))?;
                file.write_all(part)?;
                filled.add(((base + page) / LARGE_PAGE) as u32);
            }
        }
        // All but the last one are whole large pages.
        base += region.len();
    }
    Ok(filled)
}

/// Fills `buffer` from `start` of a region on, and touches nothing that the host
/// does not hold.
fn read(region: &GuestRegionMmap, start: u64, buffer: &mut [u8]) -> io::Result<()> {
    buffer.fill(0);
    let end = start + buffer.len() as u64;
    let mut at = start;
    while let Some(data) = next_data(region, at)?.filter(|data| *data < end) {
        at = end.min(data + COPY_BYTES as u64);
        let part = (data - start) as usize..(at - start) as usize;
        let part = buffer.get_mut(part).unwrap_or_default();
        region
            .read_slice(part, MemoryRegionAddress(data))
            .map_err(io::Error::other)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory::create;
    use rustix::fs::MemfdFlags;
    use vm_memory::GuestAddress;

    const MIB: u64 = 1 << 20;

    fn empty(mib: u64) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("saved", flags).unwrap());
        file.set_len(mib * MIB).unwrap();
        file
    }

    fn sealed(file: &File) -> File {
        let seals = SealFlags::WRITE | SealFlags::SHRINK;
        rustix::fs::fcntl_add_seals(file, seals).unwrap();
        file.try_clone().unwrap()
    }

    fn pages(runs: &[(u32, u32)]) -> Filled {
        Filled(runs.iter().map(|(start, end)| *start..*end).collect())
    }

    fn filled(file: &File) -> u64 {
        file.metadata().unwrap().blocks() * 512
    }

    /// Guest memory of so many MiB with these bytes in it, saved.
    fn saved(mib: u32, bytes: &[(u64, u8)]) -> (File, Filled) {
        let memory = create(mib, 0).unwrap();
        for (gpa, byte) in bytes {
            memory.write_obj(*byte, GuestAddress(*gpa)).unwrap();
        }
        let file = empty(mib.into());
        let runs = save(&memory, &file).unwrap();
        (sealed(&file), runs)
    }

    #[test]
    fn what_guests_touch_in_holes_is_their_own() {
        let (file, runs) = saved(17, &[(5, 1), (3 * MIB, 2), (9 * MIB, 3)]);
        assert_eq!(runs, pages(&[(0, 2), (4, 5)]));
        assert_eq!(filled(&file), 6 * MIB);
        let guest = || restore(file.try_clone().unwrap(), &runs, 17, 0).unwrap();
        let (one, other) = (guest(), guest());
        for memory in [&one, &other] {
            let read = |gpa| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
            assert_eq!([5, 3 * MIB, 9 * MIB].map(read), [1, 2, 3]);
            let mut all = vec![0; 17 << 20];
            memory.read_slice(&mut all, GuestAddress(0)).unwrap();
            assert_eq!(all.iter().filter(|byte| **byte != 0).count(), 3);
            let ones = vec![1; all.len()];
            memory.write_slice(&ones, GuestAddress(0)).unwrap();
            assert_eq!(filled(&file), 6 * MIB, "the file is as it was");
        }
        drop(one);
        assert_eq!(other.read_obj::<u8>(GuestAddress(17 * MIB - 1)).unwrap(), 1);
    }

    #[test]
    fn a_restored_guest_is_saved_without_growing_its_file() {
        let (file, runs) = saved(16, &[(5, 1), (9 * MIB, 3)]);
        let memory = restore(file.try_clone().unwrap(), &runs, 16, 0).unwrap();
        memory.write_obj(7_u8, GuestAddress(12 * MIB)).unwrap();
        let again = empty(16);
        let more = save(&memory, &again).unwrap();
        assert_eq!(more, pages(&[(0, 1), (4, 5), (6, 7)]));
        assert_eq!((filled(&file), filled(&again)), (4 * MIB, 6 * MIB));
    }

    #[test]
    fn memory_above_the_hole_is_saved_and_restored() {
        let (high, last) = (4 << 30, (4 << 30) + 3 * MIB - 1);
        let (file, runs) = saved(3 * 1024 + 3, &[(high, 8), (last, 9), ((3 << 30) - 1, 7)]);
        assert_eq!(runs, pages(&[(1535, 1538)]));
        let memory = restore(file, &runs, 3 * 1024 + 3, 0).unwrap();
        let read = |gpa| memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
        assert_eq!([high, last, (3 << 30) - 1, 4096].map(read), [8, 9, 7, 0]);
    }

    #[test]
    fn only_an_empty_file_takes_a_guest() {
        let memory = create(16, 0).unwrap();
        let file = empty(16);
        std::os::unix::fs::FileExt::write_all_at(&file, &[0], 9 * MIB).unwrap();
        let refused = save(&memory, &file).unwrap_err().to_string();
        assert_eq!(refused, "the file is not empty");
    }

    #[test]
    fn holes_are_within_the_file_whatever_the_runs_say() {
        let holes = |runs: &[(u32, u32)]| -> Vec<_> {
            let holes = pages(runs).holes(9 * MIB).collect::<Vec<_>>();
            holes
                .iter()
                .map(|hole| (hole.start / MIB, hole.end / MIB))
                .collect()
        };
        assert_eq!(holes(&[]), [(0, 9)]);
        assert_eq!(holes(&[(0, 9)]), []);
        assert_eq!(holes(&[(1, 2), (3, 4)]), [(0, 2), (4, 6), (8, 9)]);
        assert_eq!(holes(&[(3, 1), (2, u32::MAX), (1, 2)]), [(0, 6)]);
        assert_eq!(holes(&[(u32::MAX, 0)]), [(0, 9)]);
    }

    #[test]
    fn runs_without_end_become_one() {
        let mut runs = Filled::default();
        (0..)
            .step_by(2)
            .take(2 * RUNS_MAX)
            .for_each(|page| runs.add(page));
        assert_eq!(runs.0.len(), RUNS_MAX);
        assert_eq!(runs.0.last().unwrap().end, 4 * RUNS_MAX as u32 - 1);
    }
}
