//! Copies what an image has at a place into the tmpfs mounted over it.

use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid, chownat, fchmod, fchown, fstat, mkdirat,
    mknodat, openat, readlinkat, statat, symlinkat,
};
use rustix::io::Errno;

/// Deeper trees than this are not copied but refused.
const DEPTH: usize = 64;

/// Copies a directory's content, owners and modes.
pub fn copy_up(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    copy_directory(from, to, DEPTH)
}

fn copy_directory(from: &OwnedFd, to: &OwnedFd, depth: usize) -> Result<(), Errno> {
    let depth = depth.checked_sub(1).ok_or(Errno::LOOP)?;
    let from = openat(
        from,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let to = openat(
        to,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    for entry in Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(&from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mode = Mode::from_raw_mode(stat.st_mode);
        let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        match kind {
            FileType::Directory => {
                mkdirat(&to, name, Mode::RWXU)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = openat(&from, name, flags, Mode::empty())?;
                let target = openat(&to, name, flags, Mode::empty())?;
                copy_directory(&source, &target, depth)?;
                fchown(&target, Some(owner.0), Some(owner.1))?;
                fchmod(&target, mode)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = openat(&from, name, OFlags::RDONLY | flags, Mode::empty())?;
                let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let target = openat(&to, name, create | flags, Mode::RUSR | Mode::WUSR)?;
                while rustix::fs::sendfile(&target, &source, None, 1 << 20)? > 0 {}
                fchown(&target, Some(owner.0), Some(owner.1))?;
                fchmod(&target, mode)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(&from, name, Vec::new())?, &to, name)?;
                chownat(
                    &to,
                    name,
                    Some(owner.0),
                    Some(owner.1),
                    AtFlags::SYMLINK_NOFOLLOW,
                )?;
            }
            _ => {
                mknodat(&to, name, kind, mode, stat.st_rdev)?;
                chownat(
                    &to,
                    name,
                    Some(owner.0),
                    Some(owner.1),
                    AtFlags::SYMLINK_NOFOLLOW,
                )?;
            }
        }
    }
    let stat = fstat(&from)?;
    fchown(
        &to,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )?;
    fchmod(&to, Mode::from_raw_mode(stat.st_mode))
}
