//! A template's memory file in large pages. Where a copy only reads, the kernel then
//! gives its guest 2 MiB at a time instead of 4 KiB, each of which costs an exit.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Of the host's memory, bytes.
const LARGE_PAGE: usize = 2 << 20;

/// Has the kernel put what there is of `file`, whose holes are as large as large
/// pages, into such (`MADV_COLLAPSE`, Linux 6.1). That works for files of tmpfs,
/// however `/sys/kernel/mm/transparent_hugepage` is set.
///
/// # Errors
/// It did not for some of them: they are as they were.
pub fn collapse(file: &File) -> io::Result<()> {
    let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mapping = Mapping::new(file, bytes)?;
    let mut outcome = Ok(());
    for run in data(file, bytes as u64)? {
        outcome = outcome.and(mapping.collapse(run));
    }
    outcome
}

/// Where the file is.
fn data(file: &File, bytes: u64) -> io::Result<Vec<Range<usize>>> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            // Nothing more.
            Err(Errno::NXIO) => break,
            start => start?,
        };
        at = seek(file, SeekFrom::Hole(start))?;
        let large = LARGE_PAGE as u64;
        let whole = start.next_multiple_of(large)..at / large * large;
        if !whole.is_empty() {
            runs.push(whole.start as usize..whole.end as usize);
        }
    }
    Ok(runs)
}

/// The file, at the beginning of a large page.
struct Mapping {
    reserved: *mut libc::c_void,
    bytes: usize,
    start: *mut libc::c_void,
}

impl Mapping {
    fn new(file: &File, length: usize) -> io::Result<Self> {
        let bytes = length
            .checked_add(LARGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let none = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: new addresses, which nobody else knows.
        let reserved = unsafe { mmap_anonymous(ptr::null_mut(), bytes, none.0, none.1)? };
        let start = reserved.wrapping_byte_add(reserved.align_offset(LARGE_PAGE));
        let mapping = Self {
            reserved,
            bytes,
            start,
        };
        if length > 0 {
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: all of it lies in what was reserved, and nothing refers to it.
            unsafe { mmap(start, length, ProtFlags::READ, flags, file.as_fd(), 0)? };
        }
        Ok(mapping)
    }

    /// `run` lies in the file.
    fn collapse(&self, run: Range<usize>) -> io::Result<()> {
        let address = self.start.wrapping_byte_add(run.start);
        let length = run.end - run.start;
        // SAFETY: the range is mapped, and what is in it stays as it is.
        match unsafe { libc::madvise(address, length, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: these addresses are its own, and nothing refers to them.
        let _ = unsafe { munmap(self.reserved, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(bytes: u64) -> File {
        let file = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        file.into()
    }

    #[test]
    fn what_is_there_stays_what_it_is() {
        let large = LARGE_PAGE as u64;
        let file = file(8 * large);
        let content = |page: u64| vec![page as u8 + 1; LARGE_PAGE];
        for page in [1, 2, 5] {
            file.write_all_at(&content(page), page * large).unwrap();
        }
        let runs = data(&file, 8 * large).unwrap();
        assert_eq!(
            runs,
            [LARGE_PAGE..3 * LARGE_PAGE, 5 * LARGE_PAGE..6 * LARGE_PAGE]
        );
        let blocks =
            |file: &File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let before = blocks(&file);
        // A kernel without large pages says so.
        if let Err(error) = collapse(&file) {
            println!("not here: {error}");
        }
        assert_eq!(blocks(&file), before, "holes stay");
        for page in [1, 2, 5] {
            let mut read = vec![0; LARGE_PAGE];
            file.read_exact_at(&mut read, page * large).unwrap();
            assert!(read == content(page));
        }
    }

    #[test]
    fn nothing_is_no_matter() {
        collapse(&file(0)).unwrap();
        collapse(&file(4096)).unwrap();
    }
}
