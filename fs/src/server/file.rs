//! Open files.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::ByteValued;

use crate::abi::{
    self, CopyFileRangeIn, CreateIn, FallocateIn, FlushIn, FsyncIn, LseekIn, LseekOut, OpenIn,
    OpenOut, ReadIn, ReleaseIn, WriteIn, WriteOut, fopen,
};
use crate::buffers::Buffers;
use crate::directory::last_error;
use crate::handle::Opened;
use crate::host;
use crate::name::Name;
use crate::node::NodeId;

use super::entry::entry_out;
use super::{Answer, DATA_BYTES, Request, Server, with_room};

/// Flags of the guest's `open` that are kept. Left out: O_APPEND (told with
/// each write, since the guest may change it later), O_DIRECT (the guest's own
/// cache is what it wants to pass by), and what its kernel has dealt with.
const OPEN_FLAGS: OFlags = OFlags::RWMODE
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

/// Most bytes copied by one COPY_FILE_RANGE; the guest asks again for more.
const COPY_BYTES: usize = 64 << 20;

/// File systems whose files have no true size, or content that changes without
/// a sign: the guest must not cache them (`f_type` of linux/magic.h).
const SYNTHETIC: [u64; 10] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x0027_e0eb, // cgroup
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x6265_6570, // configfs
    0xcafe_4a11, // bpf
    0xde5e_81e4, // efivarfs
];

impl Server {
    pub(super) fn open(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let open: OpenIn = request.body.read_object()?;
        let id = request.header.nodeid;
        if self.nodes.get(id)?.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let flags = open_flags(open.flags)?;
        self.credentials
            .keep_set_id(open.open_flags & abi::OPEN_KILL_SUIDGID == 0)?;
        let file = self.open_node(id, flags)?;
        let out = self.opened(id, file)?;
        self.answer(&out)
    }

    /// Keeps an open file and says how the guest may cache it.
    fn opened(&mut self, id: NodeId, file: OwnedFd) -> Result<OpenOut, Errno> {
        let mut open_flags = 0;
        if self.nodes.get(id)?.area.is_own() {
            open_flags |= fopen::KEEP_CACHE | fopen::NOFLUSH;
        } else if self.is_synthetic(id, file.as_fd())? {
            open_flags |= fopen::DIRECT_IO;
        }
        Ok(OpenOut {
            fh: self.handles.add(id, Opened::File(Rc::new(file))),
            open_flags,
            padding: 0,
        })
    }

    fn is_synthetic(&mut self, id: NodeId, file: BorrowedFd<'_>) -> Result<bool, Errno> {
        let device = self.nodes.get(id)?.device();
        if let Some(known) = self.synthetic.get(&device) {
            return Ok(*known);
        }
        let magic = rustix::fs::fstatfs(file)?.f_type;
        let synthetic = SYNTHETIC.contains(&magic.cast_unsigned());
        self.synthetic.insert(device, synthetic);
        Ok(synthetic)
    }

    pub(super) fn create(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let create: CreateIn = request.body.read_object()?;
        let flags = open_flags(create.flags)?;
        let exclusive = OFlags::from_bits_retain(create.flags).contains(OFlags::EXCL);
        self.with_arguments(request, |server, header, arguments| {
            let parent = header.nodeid;
            let name = Name::take(arguments)?;
            let mode = Mode::from_raw_mode(create.mode & 0o7777);
            let dir = server.changeable(parent)?;
            server.credentials.umask(create.umask);
            server.credentials.keep_set_id(true)?;
            let created = with_room(&mut server.nodes, |_| {
                // There is nothing to truncate in a new file.
                host::create(dir.as_fd(), name, flags - OFlags::TRUNC, mode)
            });
            let (entry, file) = match created {
                Ok(file) => (server.entry_of_new(parent, Some(name), &file)?, file),
                Err(Errno::EXIST) if !exclusive => {
                    // The guest did not know of it yet.
                    let kill = create.open_flags & abi::OPEN_KILL_SUIDGID != 0;
                    server.credentials.keep_set_id(!kill)?;
                    let entry = server.entry(parent, name)?;
                    match server.open_existing(entry.nodeid, flags) {
                        Ok(file) => (entry, file),
                        Err(error) => {
                            server.nodes.forget(entry.nodeid, 1);
                            return Err(error);
                        }
                    }
                }
                Err(error) => return Err(error),
            };
            let opened = server.opened(entry.nodeid, file)?;
            server.out.extend_from_slice(entry.as_slice());
            server.answer(&opened)
        })
    }

    /// Opens what turned out to exist. Only a regular file will do; for
    /// anything else the guest has to look the name up again.
    fn open_existing(&mut self, id: NodeId, flags: OFlags) -> Result<OwnedFd, Errno> {
        match self.nodes.get(id)?.kind {
            FileType::RegularFile => self.open_node(id, flags),
            FileType::Directory => Err(Errno::ISDIR),
            _ => Err(Errno::STALE),
        }
    }

    pub(super) fn tmpfile(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let create: CreateIn = request.body.read_object()?;
        let parent = request.header.nodeid;
        let flags = open_flags(create.flags)? - OFlags::TRUNC;
        let mode = Mode::from_raw_mode(create.mode & 0o7777);
        let dir = self.changeable(parent)?;
        self.credentials.umask(create.umask);
        self.credentials.keep_set_id(true)?;
        let excl = OFlags::from_bits_retain(create.flags) & OFlags::EXCL;
        let file = with_room(&mut self.nodes, |_| {
            let flags = flags | excl | OFlags::TMPFILE | OFlags::CLOEXEC;
            rustix::fs::openat(&*dir, c".", flags, mode)
        })?;
        let entry = self.entry_of_new(parent, None, &file)?;
        let opened = self.opened(entry.nodeid, file)?;
        self.out.extend_from_slice(entry.as_slice());
        self.answer(&opened)
    }

    /// Tells the guest of a file that was just created.
    fn entry_of_new(
        &mut self,
        parent: NodeId,
        name: Option<Name<'_>>,
        file: &OwnedFd,
    ) -> Result<abi::EntryOut, Errno> {
        let proc_self_fd = &self.proc_self_fd;
        let reference = with_room(&mut self.nodes, |_| {
            proc_self_fd.open(file.as_fd(), OFlags::PATH)
        })?;
        let stat = host::stat(reference.as_fd())?;
        let id = match name {
            Some(name) => self.nodes.remember(parent, name, reference, &stat)?,
            None => {
                let area = self.nodes.get(parent)?.area;
                self.nodes.remember_unnamed(reference, &stat, area)?
            }
        };
        entry_out(&self.nodes, id, &stat)
    }

    pub(super) fn read(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let read: ReadIn = request.body.read_object()?;
        let file = self.handles.file(request.header.nodeid, read.fh)?;
        let mut room = std::mem::take(&mut request.room);
        room.truncate(read.size.min(DATA_BYTES) as usize);
        transfer(room, read.offset, false, |iovecs, offset| {
            // SAFETY: the vectors describe memory of the message, which is
            // mapped for as long as `room` lives.
            unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                    offset,
                )
            }
        })
        .map(Answer::Room)
    }

    pub(super) fn write(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let write: WriteIn = request.body.read_object()?;
        let file = self.handles.file(request.header.nodeid, write.fh)?;
        let size = write.size as usize;
        let mut data = std::mem::take(&mut request.body);
        if write.size > DATA_BYTES || size > data.len() {
            return Err(Errno::INVAL);
        }
        data.truncate(size);
        self.credentials
            .keep_set_id(write.write_flags & abi::WRITE_KILL_SUIDGID == 0)?;
        // What the page cache writes back has its place already.
        let append = OFlags::from_bits_retain(write.flags).contains(OFlags::APPEND)
            && write.write_flags & abi::WRITE_CACHE == 0;
        let flags = if append { libc::RWF_APPEND } else { 0 };
        let written = transfer(data, write.offset, true, |iovecs, offset| {
            // SAFETY: as in `read`, with `data`.
            unsafe {
                libc::pwritev2(
                    file.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                    offset,
                    flags,
                )
            }
        })?;
        self.answer(&WriteOut {
            size: u32::try_from(written).map_err(|_| Errno::IO)?,
            padding: 0,
        })
    }

    /// A file was closed. Reports what only the close of a network file does;
    /// the guest leaves it out for its own files (`FOPEN_NOFLUSH`).
    pub(super) fn flush(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let flush: FlushIn = request.body.read_object()?;
        let file = self.handles.file(request.header.nodeid, flush.fh)?;
        let copy = with_room(&mut self.nodes, |_| {
            rustix::io::fcntl_dupfd_cloexec(&*file, 0)
        })?;
        // SAFETY: the descriptor is owned here and not used again.
        if unsafe { libc::close(copy.into_raw_fd()) } == 0 {
            Ok(Answer::Out)
        } else {
            Err(last_error())
        }
    }

    pub(super) fn release(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let release: ReleaseIn = request.body.read_object()?;
        self.handles.remove(request.header.nodeid, release.fh)?;
        Ok(Answer::Out)
    }

    pub(super) fn fsync(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let fsync: FsyncIn = request.body.read_object()?;
        let file = self.handles.file(request.header.nodeid, fsync.fh)?;
        sync(file.as_fd(), fsync.fsync_flags)?;
        Ok(Answer::Out)
    }

    pub(super) fn fallocate(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let allocate: FallocateIn = request.body.read_object()?;
        let file = self.handles.file(request.header.nodeid, allocate.fh)?;
        self.changed_by(request.header.uid)?;
        let mode = FallocateFlags::from_bits_retain(allocate.mode);
        rustix::fs::fallocate(&*file, mode, allocate.offset, allocate.length)?;
        Ok(Answer::Out)
    }

    pub(super) fn copy_file_range(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let copy: CopyFileRangeIn = request.body.read_object()?;
        let from = self.handles.file(request.header.nodeid, copy.fh_in)?;
        let to = self.handles.file(copy.nodeid_out, copy.fh_out)?;
        if copy.flags != 0 {
            return Err(Errno::INVAL);
        }
        self.changed_by(request.header.uid)?;
        let mut from_offset = copy.off_in;
        let mut to_offset = copy.off_out;
        let bytes = usize::try_from(copy.len).unwrap_or(usize::MAX);
        let copied = rustix::fs::copy_file_range(
            &*from,
            Some(&mut from_offset),
            &*to,
            Some(&mut to_offset),
            bytes.min(COPY_BYTES),
        )?;
        self.answer(&WriteOut {
            size: u32::try_from(copied).map_err(|_| Errno::IO)?,
            padding: 0,
        })
    }

    /// These requests do not say whether set-id bits have to go, so it is told
    /// by the caller: root keeps them.
    fn changed_by(&mut self, uid: u32) -> Result<(), Errno> {
        self.credentials.keep_set_id(uid == 0)
    }

    pub(super) fn lseek(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let lseek: LseekIn = request.body.read_object()?;
        let file = self.handles.file(request.header.nodeid, lseek.fh)?;
        const DATA: u32 = libc::SEEK_DATA as u32;
        const HOLE: u32 = libc::SEEK_HOLE as u32;
        let to = match lseek.whence {
            DATA => SeekFrom::Data(lseek.offset),
            HOLE => SeekFrom::Hole(lseek.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = rustix::fs::seek(&*file, to)?;
        self.answer(&LseekOut { offset })
    }
}

/// The flags to open a file with on the host.
fn open_flags(asked: u32) -> Result<OFlags, Errno> {
    let flags = OFlags::from_bits_retain(asked) & OPEN_FLAGS;
    if flags.contains(OFlags::RWMODE) {
        // Neither read nor write: for ioctls alone.
        return Err(Errno::INVAL);
    }
    // Without effect on regular files of disks, this keeps the kernel's own
    // files (tracing pipes) from blocking the server.
    Ok(flags | OFlags::NONBLOCK | OFlags::NOCTTY)
}

/// Makes data durable.
pub(super) fn sync(file: BorrowedFd<'_>, flags: u32) -> Result<(), Errno> {
    if flags & abi::FSYNC_FDATASYNC != 0 {
        rustix::fs::fdatasync(file)
    } else {
        rustix::fs::fsync(file)
    }
}

/// Repeats a transfer between a file and memory until all is done or the file
/// ends. The kernel may stop early because of an error that it tells the next
/// time. A short write is told as it is; a short read would look like the end
/// of the file.
fn transfer(
    mut memory: Buffers<'_>,
    offset: u64,
    partial_is_told: bool,
    mut call: impl FnMut(&[libc::iovec], libc::off_t) -> isize,
) -> Result<usize, Errno> {
    let mut done = 0;
    while !memory.is_empty() {
        let at = offset
            .checked_add(done as u64)
            .and_then(|at| libc::off_t::try_from(at).ok())
            .ok_or(Errno::INVAL)?;
        match usize::try_from(call(&memory.iovecs(), at)) {
            Ok(0) => break,
            Ok(count) => {
                memory.skip(count);
                done += count;
            }
            Err(_) => match last_error() {
                Errno::INTR => (),
                _ if done > 0 && partial_is_told => break,
                error => return Err(error),
            },
        }
    }
    Ok(done)
}
