//! The host's file system, one path component or open descriptor at a time.

use std::ffi::CStr;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::abi::{Attr, SxTime};
use crate::name::Name;

/// A name is one component, and nothing on the way is followed.
const ONE_STEP: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

const STAT_FIELDS: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// Opens an entry of a directory for reference only, whatever it is.
pub fn open_reference(dir: BorrowedFd<'_>, name: Name<'_>) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(dir, name.as_c_str(), flags, Mode::empty(), ONE_STEP)
}

/// Creates and opens a regular file; fails when the name exists.
pub fn create(
    dir: BorrowedFd<'_>,
    name: Name<'_>,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(dir, name.as_c_str(), flags, mode, ONE_STEP)
}

/// Attributes of an open file.
pub fn stat(fd: BorrowedFd<'_>) -> Result<Statx, Errno> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, STAT_FIELDS)
}

/// Attributes of a directory's entry.
pub fn stat_entry(dir: BorrowedFd<'_>, name: Name<'_>) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(dir, name.as_c_str(), flags, STAT_FIELDS)
}

/// The type of the file.
pub fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// What tells files apart: the same file seen through two mounts counts as
/// two, since one of them may be read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    device: (u32, u32),
    inode: u64,
    mount: u64,
}

impl Identity {
    /// The identity of a file.
    pub fn new(stat: &Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        }
    }

    /// The mount through which the file was reached.
    pub fn mount(&self) -> u64 {
        self.mount
    }

    /// The device, major and minor.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    /// Whether both lie in the same mount.
    pub fn same_mount(&self, other: &Self) -> bool {
        self.device == other.device && self.mount == other.mount
    }
}

/// `/proc/self/fd`, through which a reference becomes an open file. It is the
/// process's (or thread's) working directory, since the xattr calls know no
/// directory descriptor; no other path is relative to it.
#[derive(Debug)]
pub struct ProcSelfFd(OwnedFd);

impl ProcSelfFd {
    /// Makes the directory given the working directory.
    pub fn enter(dir: OwnedFd) -> Result<Self, Errno> {
        rustix::process::fchdir(&dir)?;
        Ok(Self(dir))
    }

    /// Opens the file that `fd` refers to. The caller has seen that it is a
    /// regular file or a directory: opening others can block or act.
    pub fn open(&self, fd: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = (flags | OFlags::CLOEXEC) - OFlags::NOFOLLOW;
        rustix::fs::openat(&self.0, FdName::new(fd).as_c_str(), flags, Mode::empty())
    }

    /// Changes the mode of the file that `fd` refers to.
    pub fn chmod(&self, fd: BorrowedFd<'_>, mode: Mode) -> Result<(), Errno> {
        rustix::fs::chmodat(&self.0, FdName::new(fd).as_c_str(), mode, AtFlags::empty())
    }

    /// Gives the file that `fd` refers to another name.
    pub fn link(
        &self,
        fd: BorrowedFd<'_>,
        dir: BorrowedFd<'_>,
        name: Name<'_>,
    ) -> Result<(), Errno> {
        rustix::fs::linkat(
            &self.0,
            FdName::new(fd).as_c_str(),
            dir,
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )
    }
}

/// The name of a descriptor in `/proc/self/fd`.
#[derive(Debug)]
pub struct FdName([u8; 12]);

impl FdName {
    /// Names an owned descriptor.
    pub fn of(fd: &OwnedFd) -> Self {
        Self::new(fd.as_fd())
    }

    /// Names the descriptor.
    pub fn new(fd: BorrowedFd<'_>) -> Self {
        let mut text = [0; 12];
        // Ten digits and a NUL always fit.
        let _ = write!(text.as_mut_slice(), "{}", fd.as_fd().as_raw_fd());
        Self(text)
    }

    /// The name as the kernel takes it.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

/// The attributes as FUSE tells them.
pub fn attr(stat: &Statx) -> Attr {
    Attr {
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        // Seconds before 1970 travel as two's complement.
        atime: stat.stx_atime.tv_sec.cast_unsigned(),
        mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
        ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

/// The attributes as `FUSE_STATX` tells them.
pub fn statx(stat: &Statx) -> crate::abi::Statx {
    let time = |t: rustix::fs::StatxTimestamp| SxTime {
        tv_sec: t.tv_sec,
        tv_nsec: t.tv_nsec,
        reserved: 0,
    };
    let told = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    crate::abi::Statx {
        mask: stat.stx_mask & told.bits(),
        blksize: stat.stx_blksize,
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mode: stat.stx_mode,
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: time(stat.stx_atime),
        btime: time(stat.stx_btime),
        ctime: time(stat.stx_ctime),
        mtime: time(stat.stx_mtime),
        rdev_major: stat.stx_rdev_major,
        rdev_minor: stat.stx_rdev_minor,
        dev_major: stat.stx_dev_major,
        dev_minor: stat.stx_dev_minor,
        ..Default::default()
    }
}

/// A device number as the kernel tells it to user space (`new_encode_dev`).
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// A device number from FUSE.
pub fn decode_device(raw: u32) -> u64 {
    let major = (raw & 0xf_ff00) >> 8;
    let minor = (raw & 0xff) | ((raw >> 12) & 0xf_ff00);
    rustix::fs::makedev(major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (1, 3), (253, 1), (4095, 0xf_ffff), (8, 256)] {
            let raw = encode_device(major, minor);
            assert_eq!(decode_device(raw), rustix::fs::makedev(major, minor));
        }
    }
}
