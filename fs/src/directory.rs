//! Directory listings.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Bytes of entries read from the kernel at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// Offset of the name in `struct linux_dirent64`.
const NAME_OFFSET: usize = 19;

/// An open directory and the entries read ahead from it.
#[derive(Debug)]
pub struct Listing {
    dir: OwnedFd,
    /// `struct linux_dirent64`s as the kernel wrote them.
    chunk: Vec<u8>,
    /// The next entry in `chunk`.
    at: usize,
    /// The position that the next entry has for `seek`.
    position: u64,
    /// The descriptor is not where `chunk` ends.
    rested: bool,
}

/// An entry of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Inode number.
    pub inode: u64,
    /// Position of the entry after this.
    pub next: u64,
    /// `DT_*`.
    pub kind: u8,
    /// The name.
    pub name: &'a CStr,
}

impl Listing {
    /// Lists an open directory from its start.
    pub fn new(dir: OwnedFd) -> Self {
        Self {
            dir,
            chunk: Vec::new(),
            at: 0,
            position: 0,
            rested: false,
        }
    }

    /// Gives back the memory of what was read ahead, which `seek` reads again.
    pub fn rest(&mut self) {
        self.rested |= self.at < self.chunk.len();
        self.chunk = Vec::new();
        self.at = 0;
    }

    /// The directory.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Goes to the position that an entry named as `next`, or to 0.
    pub fn seek(&mut self, position: u64) -> Result<(), Errno> {
        // Position 0 reads the directory again (rewinddir).
        if position == self.position && position != 0 && !self.rested {
            return Ok(());
        }
        self.chunk.clear();
        self.at = 0;
        rustix::fs::seek(&self.dir, SeekFrom::Start(position))?;
        self.rested = false;
        self.position = position;
        Ok(())
    }

    /// The entry at the position, without moving on.
    pub fn peek(&mut self) -> Result<Option<Entry<'_>>, Errno> {
        if self.at >= self.chunk.len() {
            self.chunk.resize(CHUNK_BYTES, 0);
            let filled = getdents(self.dir.as_fd(), &mut self.chunk);
            self.chunk.truncate(*filled.as_ref().unwrap_or(&0));
            self.at = 0;
            filled?;
            if self.chunk.is_empty() {
                // At the end; an open directory costs next to nothing.
                self.chunk = Vec::new();
            }
        }
        let Some(rest) = self.chunk.get(self.at..).filter(|rest| !rest.is_empty()) else {
            return Ok(None);
        };
        parse(rest).map(|(entry, _)| Some(entry)).ok_or(Errno::IO)
    }

    /// Moves past the entry that `peek` returned.
    pub fn advance(&mut self) {
        if let Some((entry, size)) = self.chunk.get(self.at..).and_then(parse) {
            self.position = entry.next;
            self.at += size;
        }
    }
}

/// The first entry of a chunk and its size.
fn parse(chunk: &[u8]) -> Option<(Entry<'_>, usize)> {
    let (inode, rest) = chunk.split_first_chunk()?;
    let (next, rest) = rest.split_first_chunk()?;
    let (size, rest) = rest.split_first_chunk()?;
    let kind = *rest.first()?;
    let size = usize::from(u16::from_ne_bytes(*size));
    let name = chunk.get(NAME_OFFSET..size)?;
    let entry = Entry {
        inode: u64::from_ne_bytes(*inode),
        next: u64::from_ne_bytes(*next),
        kind,
        name: CStr::from_bytes_until_nul(name).ok()?,
    };
    Some((entry, size))
}

fn getdents(dir: BorrowedFd<'_>, chunk: &mut [u8]) -> Result<usize, Errno> {
    use std::os::fd::AsRawFd;
    // SAFETY: the kernel writes at most `chunk.len()` bytes to `chunk`.
    let count = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            dir.as_raw_fd(),
            chunk.as_mut_ptr(),
            chunk.len(),
        )
    };
    usize::try_from(count).map_err(|_| last_error())
}

/// The error of the call before.
pub fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn names(listing: &mut Listing) -> Vec<(String, u64)> {
        let mut names = Vec::new();
        while let Some(entry) = listing.peek().unwrap() {
            names.push((entry.name.to_str().unwrap().to_owned(), entry.next));
            listing.advance();
        }
        names
    }

    #[test]
    fn lists_many_and_resumes_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..1000 {
            std::fs::write(dir.path().join(format!("file-{i:040}")), "").unwrap();
        }
        let open = std::fs::File::open(dir.path()).unwrap();
        let mut listing = Listing::new(open.into());
        let all = names(&mut listing);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 1002);
        for index in [0, 1, 500, 999] {
            listing.seek(all[index].1).unwrap();
            assert_eq!(names(&mut listing), all[index + 1..]);
        }
        listing.seek(0).unwrap();
        assert_eq!(names(&mut listing), all);
    }

    #[test]
    fn goes_on_where_it_was_after_a_rest() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..1000 {
            std::fs::write(dir.path().join(format!("file-{i:040}")), "").unwrap();
        }
        let mut listing = Listing::new(std::fs::File::open(dir.path()).unwrap().into());
        let all = names(&mut listing);
        listing.seek(0).unwrap();
        for (index, (_, next)) in all.iter().enumerate() {
            assert_eq!(listing.peek().unwrap().unwrap().next, *next);
            listing.advance();
            if index % 7 == 0 {
                listing.rest();
                assert_eq!(listing.chunk.capacity(), 0);
                listing.seek(*next).unwrap();
            }
        }
        assert_eq!(listing.peek(), Ok(None));
    }

    #[test]
    fn rejects_cut_entries() {
        assert_eq!(parse(&[0; 18]), None);
        assert_eq!(parse(&[0; 64]), None);
        let mut entry = [1; 32];
        entry[16..18].copy_from_slice(&64u16.to_ne_bytes());
        assert_eq!(parse(&entry), None);
        entry[16..18].copy_from_slice(&32u16.to_ne_bytes());
        assert_eq!(parse(&entry), None, "no NUL");
        entry[31] = 0;
        assert_eq!(parse(&entry).unwrap().1, 32);
    }
}
