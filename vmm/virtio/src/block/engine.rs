//! Carries out what requests ask of the host's kernel.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::{IoUring, opcode, register::Restriction, squeue, types};

use super::QUEUE_SIZE;

/// `BLKDISCARD` of linux/fs.h: position and length, bytes.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Threads of the kernel for what it cannot do without waiting, one disk.
const KERNEL_THREADS: [u32; 2] = [8, 1];

/// One call to the host's kernel.
#[derive(Debug)]
pub(super) enum Call {
    /// Into the pieces, from the position on.
    Read {
        pieces: Vec<libc::iovec>,
        position: u64,
    },
    /// Out of the pieces; on stable storage when done, if `durable`.
    Write {
        pieces: Vec<libc::iovec>,
        position: u64,
        durable: bool,
    },
    /// Everything written before to stable storage.
    Flush,
    /// `fallocate(2)`.
    Allocate { mode: i32, position: u64, len: u64 },
    /// `BLKDISCARD`; there is no other way than to wait for it.
    DiscardDevice { position: u64, len: u64 },
}

// SAFETY: the pieces are guest memory, which belongs to no thread and which the
// call's owner keeps mapped.
unsafe impl Send for Call {}

/// How a disk's requests are carried out.
///
/// It is made before the process locks itself up, since io_uring is set up with
/// system calls that no thread has afterwards; disks that come later take theirs
/// from [`Spares`].
pub enum Engine {
    /// Asynchronously.
    Uring(Box<Ring>),
    /// One by one, while the worker's loop waits. Where the node forbids
    /// io_uring.
    Waiting,
}

impl Engine {
    /// io_uring if it can be had.
    pub fn new() -> Self {
        Ring::new().map_or(Self::Waiting, |ring| Self::Uring(Box::new(ring)))
    }

    /// Begins `call` on `file`. The result if it is there already, as system
    /// calls of the kernel give it; otherwise it comes out of
    /// [`Engine::finished`] under `token`.
    ///
    /// # Safety
    /// The pieces of `call`, and `call` itself, stay where they are until the
    /// result is there.
    pub(super) unsafe fn begin(
        &mut self,
        file: &Arc<File>,
        call: &Call,
        token: u64,
    ) -> io::Result<Option<i32>> {
        match (self, call) {
            (_, Call::DiscardDevice { .. }) | (Self::Waiting, _) => {
                // SAFETY: as the caller says.
                Ok(Some(unsafe { perform(file, call) }))
            }
            (Self::Uring(ring), _) => {
                let Some(entry) = entry(file, call) else {
                    return Ok(Some(-libc::EINVAL));
                };
                // SAFETY: as the caller says; the worker keeps `file` open.
                unsafe { ring.push(&entry.user_data(token)) }?;
                Ok(None)
            }
        }
    }

    /// Hands what was begun to the kernel.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Uring(ring) => ring.submit(0),
            Self::Waiting => Ok(()),
        }
    }

    /// Token and result of a call that has ended.
    pub(super) fn finished(&mut self) -> Option<(u64, i32)> {
        match self {
            Self::Uring(ring) => {
                let entry = ring.uring.completion().next()?;
                Some((entry.user_data(), entry.result()))
            }
            Self::Waiting => None,
        }
    }

    /// Waits until a call that was begun has ended.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self {
            Self::Uring(ring) => ring.submit(1),
            Self::Waiting => Ok(()),
        }
    }

    /// The disk goes, and nothing of it is in flight.
    pub(super) fn give_back(self) {
        if let Self::Uring(ring) = self
            && let Ring {
                uring,
                home: Some(home),
            } = *ring
        {
            home.lock().push(uring);
        }
    }

    /// Readable when something has finished.
    pub(super) fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            // SAFETY: the ring owns the descriptor and is borrowed as long as it.
            Self::Uring(ring) => Some(unsafe { BorrowedFd::borrow_raw(ring.uring.as_raw_fd()) }),
            Self::Waiting => None,
        }
    }
}

impl Default for Engine {
    fn default() -> Self {
        Self::new()
    }
}

/// Rings for the disks that come after the process has locked itself up. A disk
/// that goes gives its ring back.
#[derive(Clone, Default)]
pub struct Spares(Arc<Mutex<Vec<IoUring>>>);

impl Spares {
    /// So many, or as many as can be had.
    pub fn new(count: usize) -> Self {
        let rings = (0..count).map_while(|_| Ring::make().ok());
        Self(Arc::new(Mutex::new(rings.collect())))
    }

    /// One of them; when all are lent, an engine that waits.
    pub fn take(&self) -> Engine {
        self.lock().pop().map_or(Engine::Waiting, |uring| {
            let home = Some(self.clone());
            Engine::Uring(Box::new(Ring { uring, home }))
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<IoUring>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An io_uring that can do nothing but what a disk needs: it would otherwise be
/// a way round the seccomp filter of whoever has it.
pub struct Ring {
    uring: IoUring,
    /// Where it goes when its disk goes.
    home: Option<Spares>,
}

impl Ring {
    fn new() -> io::Result<Self> {
        let uring = Self::make()?;
        Ok(Self { uring, home: None })
    }

    fn make() -> io::Result<IoUring> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(QUEUE_SIZE.into())?;
        let submitter = ring.submitter();
        let mut allowed = [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
        ];
        submitter.register_iowq_max_workers(&mut KERNEL_THREADS.clone())?;
        submitter.register_restrictions(&mut allowed)?;
        submitter.register_enable_rings()?;
        Ok(ring)
    }

    /// # Safety
    /// What the entry points to stays until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: as the caller says.
        while unsafe { self.uring.submission().push(entry) }.is_err() {
            self.submit(0)?;
        }
        Ok(())
    }

    fn submit(&mut self, wait_for: usize) -> io::Result<()> {
        loop {
            match self.uring.submit_and_wait(wait_for) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The submission for `call`; `None` if there is none.
fn entry(file: &File, call: &Call) -> Option<squeue::Entry> {
    let fd = types::Fd(file.as_raw_fd());
    Some(match call {
        // Chains have at most CHAIN_SEGMENTS_MAX pieces.
        Call::Read { pieces, position } => {
            opcode::Readv::new(fd, pieces.as_ptr(), pieces.len() as u32)
                .offset(*position)
                .build()
        }
        Call::Write {
            pieces,
            position,
            durable,
        } => opcode::Writev::new(fd, pieces.as_ptr(), pieces.len() as u32)
            .offset(*position)
            .rw_flags(write_flags(*durable))
            .build(),
        Call::Flush => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Call::Allocate {
            mode,
            position,
            len,
        } => opcode::Fallocate::new(fd, *len)
            .offset(*position)
            .mode(*mode)
            .build(),
        Call::DiscardDevice { .. } => return None,
    })
}

fn write_flags(durable: bool) -> i32 {
    match durable {
        true => libc::RWF_DSYNC,
        false => 0,
    }
}

/// Performs `call` at once.
///
/// # Safety
/// The pieces of `call` are memory.
unsafe fn perform(file: &File, call: &Call) -> i32 {
    let fd = file.as_raw_fd();
    // Positions are on the disk, and thereby fit.
    let result = match call {
        Call::Read { pieces, position } => {
            let (first, count) = (pieces.as_ptr(), pieces.len() as i32);
            // SAFETY: as the caller says; there are at most UIO_MAXIOV pieces.
            unsafe { libc::preadv(fd, first, count, *position as i64) }
        }
        Call::Write {
            pieces,
            position,
            durable,
        } => {
            let (first, count) = (pieces.as_ptr(), pieces.len() as i32);
            let flags = write_flags(*durable);
            // SAFETY: as the caller says; there are at most UIO_MAXIOV pieces.
            unsafe { libc::pwritev2(fd, first, count, *position as i64, flags) }
        }
        Call::Flush => {
            // SAFETY: touches no memory.
            unsafe { libc::fdatasync(fd) as isize }
        }
        Call::Allocate {
            mode,
            position,
            len,
        } => {
            // SAFETY: touches no memory.
            unsafe { libc::fallocate(fd, *mode, *position as i64, *len as i64) as isize }
        }
        Call::DiscardDevice { position, len } => {
            let range = [*position, *len];
            // SAFETY: BLKDISCARD reads two words.
            unsafe { libc::ioctl(fd, BLKDISCARD as _, range.as_ptr()) as isize }
        }
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => result,
        Ok(_) => -io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO),
        // The kernel moves less than 2 GiB at once.
        Err(_) => -libc::EIO,
    }
}

#[cfg(test)]
impl Ring {
    /// The kernel takes nothing of it until it is enabled.
    pub(super) fn disabled() -> Self {
        let mut builder = IoUring::builder();
        let uring = builder.setup_r_disabled().build(QUEUE_SIZE.into()).unwrap();
        Self { uring, home: None }
    }

    /// Neither other operations nor registrations are possible.
    pub(super) fn assert_restricted(mut self) {
        let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build();
        // SAFETY: the path is static.
        unsafe { self.push(&entry) }.unwrap();
        self.submit(1).unwrap();
        let result = self.uring.completion().next().map(|entry| entry.result());
        assert_eq!(result, Some(-libc::EACCES));
        let error = self.uring.submitter().register_files(&[0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    }
}
