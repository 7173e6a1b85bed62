//! Attributes of files and file systems.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Statx, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::abi::{self, AttrOut, GetattrIn, SetattrIn, StatfsOut, StatxIn, StatxOut, fattr};
use crate::host;
use crate::node::NodeId;

use super::{Answer, Request, Server, seconds, with_room};

impl Server {
    pub(super) fn getattr(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let getattr: GetattrIn = request.body.read_object()?;
        let id = request.header.nodeid;
        let stat = self.stat_open(id, getattr.getattr_flags, getattr.fh)?;
        self.answer_attr(id, &stat)
    }

    pub(super) fn statx(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let statx: StatxIn = request.body.read_object()?;
        let id = request.header.nodeid;
        let stat = self.stat_open(id, statx.getattr_flags, statx.fh)?;
        let (attr_valid, attr_valid_nsec) = seconds(self.nodes.get(id)?.area.lifetime());
        self.answer(&StatxOut {
            attr_valid,
            attr_valid_nsec,
            stat: host::statx(&stat),
            ..StatxOut::default()
        })
    }

    /// Attributes by the open file if there is one: its name may be gone.
    fn stat_open(&mut self, id: NodeId, flags: u32, fh: u64) -> Result<Statx, Errno> {
        if flags & abi::GETATTR_FH != 0
            && let Ok(file) = self.handles.file(id, fh)
        {
            return host::stat(file.as_fd());
        }
        host::stat(self.reference(id)?.as_fd())
    }

    fn answer_attr(&mut self, id: NodeId, stat: &Statx) -> Result<Answer, Errno> {
        let (attr_valid, attr_valid_nsec) = seconds(self.nodes.get(id)?.area.lifetime());
        self.answer(&AttrOut {
            attr_valid,
            attr_valid_nsec,
            dummy: 0,
            attr: host::attr(stat),
        })
    }

    pub(super) fn setattr(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let set: SetattrIn = request.body.read_object()?;
        let id = request.header.nodeid;
        let file = self.changeable(id)?;
        let has = |flag| set.valid & flag != 0;
        // With a change of owner the guest always asks for it; what the kernel
        // does then by itself is what root's change brings on a disk.
        let by_root = request.header.uid == 0 && !has(fattr::SIZE);
        let kill = has(fattr::KILL_SUIDGID) && !by_root;
        self.credentials.keep_set_id(!kill)?;
        if has(fattr::MODE) {
            let mode = Mode::from_raw_mode(set.mode & 0o7777);
            self.proc_self_fd.chmod(file.as_fd(), mode)?;
        }
        if has(fattr::UID | fattr::GID) {
            let id = |flag, id: u32| (has(flag) && id != u32::MAX).then_some(id);
            let uid = id(fattr::UID, set.uid).map(Uid::from_raw);
            let gid = id(fattr::GID, set.gid).map(Gid::from_raw);
            rustix::fs::chownat(&*file, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if has(fattr::SIZE) {
            let fh = has(fattr::FH).then_some(set.fh);
            let writable = self.writable(id, fh)?;
            match rustix::fs::ftruncate(&*writable, set.size) {
                // The file was opened for reading only.
                Err(Errno::INVAL) if fh.is_some() => {
                    rustix::fs::ftruncate(&*self.writable(id, None)?, set.size)?;
                }
                result => result?,
            }
        }
        if has(fattr::ATIME | fattr::MTIME) {
            let time = |set, now, seconds: u64, nanoseconds: u32| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: if !has(set) {
                    rustix::fs::UTIME_OMIT
                } else if has(now) {
                    rustix::fs::UTIME_NOW
                } else {
                    nanoseconds.into()
                },
            };
            let times = Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, set.atime, set.atimensec),
                last_modification: time(fattr::MTIME, fattr::MTIME_NOW, set.mtime, set.mtimensec),
            };
            rustix::fs::utimensat(&*file, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let stat = host::stat(file.as_fd())?;
        self.answer_attr(id, &stat)
    }

    /// The open file, or a regular file opened for writing.
    fn writable(&mut self, id: NodeId, fh: Option<u64>) -> Result<Rc<OwnedFd>, Errno> {
        if let Some(file) = fh.and_then(|fh| self.handles.file(id, fh).ok()) {
            return Ok(file);
        }
        self.open_node(id, OFlags::WRONLY | OFlags::NONBLOCK)
            .map(Rc::new)
    }

    /// Opens a regular file or a directory; nothing else is ever opened.
    pub(super) fn open_node(&mut self, id: NodeId, flags: OFlags) -> Result<OwnedFd, Errno> {
        match self.nodes.get(id)?.kind {
            FileType::RegularFile | FileType::Directory => (),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let proc_self_fd = &self.proc_self_fd;
        with_room(&mut self.nodes, |nodes| {
            let reference = nodes.reference(id)?;
            // With the host's /proc as a volume: the memory of this process,
            // which the kernel would let it open.
            if nodes.is_named(id, c"mem")
                && rustix::fs::fstatfs(&*reference)?.f_type == rustix::fs::PROC_SUPER_MAGIC
            {
                return Err(Errno::ACCESS);
            }
            proc_self_fd.open(reference.as_fd(), flags)
        })
    }

    pub(super) fn statfs(&mut self, request: &mut Request<'_>) -> Result<Answer, Errno> {
        let node = self.reference(request.header.nodeid)?;
        let stat = rustix::fs::fstatvfs(&*node)?;
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        self.answer(&StatfsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: narrow(stat.f_bsize),
            namelen: narrow(stat.f_namemax),
            frsize: narrow(stat.f_frsize),
            ..StatfsOut::default()
        })
    }
}
