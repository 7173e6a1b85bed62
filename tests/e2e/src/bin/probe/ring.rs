//! Files through io_uring, as databases and servers read and write them.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use super::files::expect;

// linux/io_uring.h
const OFFSET_OF_ENTRIES: libc::off_t = 0x1000_0000;
const ENTER_GETEVENTS: u32 = 1;
const FEATURE_SINGLE_MMAP: u32 = 1;
const FSYNC: u8 = 3;
const READ: u8 = 22;
const WRITE: u8 = 23;
const ENTRY: usize = 64;
const COMPLETION: usize = 16;

/// `struct io_uring_params`, as words: 10, then two tables of 10.
const WORDS: usize = 30;
const SUBMISSION: usize = 10;
const COMPLETED: usize = 20;

/// One that has one request at a time.
struct Ring {
    fd: OwnedFd,
    words: [u32; WORDS],
    rings: *mut u8,
    entries: *mut u8,
}

impl Ring {
    fn new() -> io::Result<Self> {
        let mut words = [0_u32; WORDS];
        // SAFETY: the structure has as many words, and the kernel fills it.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, words.as_mut_ptr()) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        expect(words[5] & FEATURE_SINGLE_MMAP != 0, || {
            "two mappings".into()
        })?;
        let submissions = words[SUBMISSION + 6] as usize + words[0] as usize * 4;
        let completions = words[COMPLETED + 5] as usize + words[1] as usize * COMPLETION;
        let rings = map(&fd, submissions.max(completions), 0)?;
        let entries = map(&fd, words[0] as usize * ENTRY, OFFSET_OF_ENTRIES)?;
        Ok(Self {
            fd,
            words,
            rings,
            entries,
        })
    }

    /// A word of the rings, at the offset that this word of the parameters says.
    fn word(&self, table: usize, number: usize) -> &AtomicU32 {
        let offset = self.words[table + number] as usize;
        // SAFETY: the kernel has put a word there, and the mapping stays.
        unsafe { AtomicU32::from_ptr(self.rings.add(offset).cast()) }
    }

    /// Does one thing and waits for it; what the kernel answers.
    fn act(
        &self,
        operation: u8,
        file: i32,
        at: u64,
        buffer: *mut u8,
        length: usize,
    ) -> io::Result<i32> {
        let mut entry = [0_u8; ENTRY];
        entry[0] = operation;
        entry[4..8].copy_from_slice(&file.to_ne_bytes());
        entry[8..16].copy_from_slice(&at.to_ne_bytes());
        entry[16..24].copy_from_slice(&(buffer as u64).to_ne_bytes());
        entry[24..28].copy_from_slice(
            &u32::try_from(length)
                .map_err(io::Error::other)?
                .to_ne_bytes(),
        );
        // SAFETY: the mapping has room for one entry, of which the kernel has none now.
        unsafe { self.entries.copy_from_nonoverlapping(entry.as_ptr(), ENTRY) };
        self.word(SUBMISSION, 6).store(0, Ordering::Relaxed);
        self.word(SUBMISSION, 1).fetch_add(1, Ordering::Release);
        // SAFETY: the entry's buffer lives until its answer is here.
        let entered = unsafe {
            let nothing = std::ptr::null::<u8>();
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.fd.as_raw_fd(),
                1,
                1,
                ENTER_GETEVENTS,
                nothing,
                0,
            )
        };
        if entered < 0 {
            return Err(io::Error::last_os_error());
        }
        let (head, tail) = (self.word(COMPLETED, 0), self.word(COMPLETED, 1));
        let number = head.load(Ordering::Relaxed);
        expect(number != tail.load(Ordering::Acquire), || {
            "no answer".into()
        })?;
        let mask = self.word(COMPLETED, 2).load(Ordering::Relaxed);
        let place = self.words[COMPLETED + 5] as usize + (number & mask) as usize * COMPLETION;
        // SAFETY: within the mapping; the kernel has written it before the tail.
        let result = unsafe { self.rings.add(place + 8).cast::<i32>().read() };
        head.store(number.wrapping_add(1), Ordering::Release);
        match result {
            0.. => Ok(result),
            code => Err(io::Error::from_raw_os_error(-code)),
        }
    }
}

fn map(fd: &OwnedFd, length: usize, offset: libc::off_t) -> io::Result<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    // SAFETY: a new mapping.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            access,
            flags,
            fd.as_raw_fd(),
            offset,
        )
    };
    match at {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        at => Ok(at.cast()),
    }
}

/// Writes, has it written to the disk, reads, and looks at it otherwise.
pub fn ring(dir: &Path) -> io::Result<()> {
    const AT: u64 = 4096;
    let path = dir.join("file");
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    let ring = Ring::new()?;
    let mut text: Vec<u8> = (0..12_288_u32).map(|index| (index % 251) as u8).collect();
    let (length, fd) = (text.len(), file.as_raw_fd());
    let whole = |what: &str, done: i32| {
        expect(usize::try_from(done) == Ok(length), || {
            format!("{what} {done} of {length}")
        })
    };
    whole("wrote", ring.act(WRITE, fd, AT, text.as_mut_ptr(), length)?)?;
    ring.act(FSYNC, fd, 0, std::ptr::null_mut(), 0)?;
    let mut read = vec![0; length];
    whole("read", ring.act(READ, fd, AT, read.as_mut_ptr(), length)?)?;
    expect(read == text, || "reads what was not written".into())?;
    let other = fs::read(&path)?;
    expect(other[AT as usize..] == text, || {
        "others read something else".into()
    })?;
    let end = ring.act(READ, fd, AT + length as u64, read.as_mut_ptr(), length)?;
    expect(end == 0, || format!("{end} bytes after the end"))?;
    let closed = ring.act(READ, -1, 0, read.as_mut_ptr(), length);
    expect(
        closed.is_err_and(|error| error.raw_os_error() == Some(libc::EBADF)),
        || "reads of no file".into(),
    )
}
